"""The Huffman codes of a JPEG as tables, for compiled Python (numba): up to two coefficients by one look.

Sections in the comments are those of ITU-T T.81 (1992). numba makes floats of signed and unsigned numbers together, so
what holds bits is uint64 throughout.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from ssl.data.compiled import jit
from ssl.data.jpeg_header import AC_TABLE, DC_TABLE, FIRST_COMPONENT, NUM_COMPONENTS, PER_COMPONENT

LOOKUP = 10
"""Bits by which codes are looked up; longer ones are rare. On 200 ImageNet photos 9 and 11 took 2 to 11 % longer."""
END_OF_BLOCK = 128
"""How far it is to a coefficient that is not there: after the last one, or the second of two."""

U = np.uint64
LAST = U(63)

Codes = namedtuple("Codes", "dc ac highest shift symbols")
"""What tells codes, of up to four DC and four AC tables.

dc and ac, uint64 (4, 1024): see `_lookup_one` and `_lookup_two`. highest and shift, int64 (2, 4, 17), DC's first, then
AC's: by the length of a code the last one of it, and what leads from a code to its symbol's place in symbols, uint8
(2, 4, 256) (F.2.2.3).
"""


@jit
def advance_of(symbol):
    """How far an AC symbol goes on from the last coefficient (F.1.2.2): by its zeros and one, or to the end."""
    if symbol & 15:
        return (symbol >> 4) + 1
    return 16 if symbol == 0xF0 else END_OF_BLOCK


@jit
def _lookup_one(counts, symbols, is_ac, table, highest, shift):
    """Codes by their first LOOKUP bits: code length | bits of the value << 8 | advance << 16; 0 for longer codes.

    False if these are no prefix codes, or no DC coefficient has so many bits.
    """
    for entry in range(1 << LOOKUP):
        table[entry] = 0
    code, number = 0, 0
    for length in range(1, 17):
        shift[length] = number - code
        for _ in range(counts[length - 1]):
            symbol = np.int64(symbols[number])
            if code >= 1 << length or (not is_ac and symbol > 11):
                return False
            if length <= LOOKUP:
                bits, advance = (symbol & 15, advance_of(symbol)) if is_ac else (symbol, 1)
                first = code << (LOOKUP - length)
                for entry in range(first, first + (1 << (LOOKUP - length))):
                    table[entry] = length | bits << 8 | advance << 16
            code += 1
            number += 1
        if counts[length - 1] and code >= 1 << length:  # no code is all ones
            return False
        highest[length] = code - 1 if counts[length - 1] else -1
        code <<= 1
    return True


@jit
def _lookup_two(ones, table):
    """Up to two AC coefficients by LOOKUP bits; 0 for longer codes. Eight bits each, from the lowest:

    the bits of both; of the first, where its value begins, its bits, its advance; of the second the same, where the
    advance is that at which it is stored; and the second's advance again, 0 if there is none.
    """
    for entry in range(1 << LOOKUP):
        one = np.int64(ones[entry])
        length, bits, advance = one & 255, one >> 8 & 255, one >> 16
        used = length + bits
        begins, more_bits, stored, more = 0, 0, END_OF_BLOCK, 0
        if one != 0 and advance != END_OF_BLOCK and used < LOOKUP:
            other = np.int64(ones[entry << used & ((1 << LOOKUP) - 1)])
            if other != 0 and used + (other & 255) <= LOOKUP:
                begins, more_bits, more = used + (other & 255), other >> 8 & 255, other >> 16
                stored, used = more, begins + more_bits
        first = U(used) | U(length) << U(8) | U(bits) << U(16) | U(advance) << U(24)
        second = U(begins) | U(more_bits) << U(8) | U(stored) << U(16) | U(more) << U(24)
        table[entry] = (first | second << U(32)) if one != 0 else U(0)


@jit
def make_codes(header, counts, symbols):
    """Codes for the tables that the components use, and whether they are codes."""
    ones = np.empty(1 << LOOKUP, np.uint64)
    codes = Codes(
        np.empty((4, 1 << LOOKUP), np.uint64),
        np.empty((4, 1 << LOOKUP), np.uint64),
        np.empty((2, 4, 17), np.int64),
        np.empty((2, 4, 17), np.int64),
        symbols,
    )
    made = 0
    for c in range(header[NUM_COMPONENTS]):
        at = FIRST_COMPONENT + c * PER_COMPONENT
        for is_ac in range(2):
            number = header[at + AC_TABLE] if is_ac else header[at + DC_TABLE]
            if made >> (4 * is_ac + number) & 1:
                continue
            made |= 1 << (4 * is_ac + number)
            table = ones if is_ac else codes.dc[number]
            highest, shift = codes.highest[is_ac, number], codes.shift[is_ac, number]
            if not _lookup_one(counts[is_ac, number], symbols[is_ac, number], is_ac == 1, table, highest, shift):
                return codes, False
            if is_ac:
                _lookup_two(ones, codes.ac[number])
    return codes, True


@jit
def long_code(bits, highest, shift, symbols, kind, table):
    """Length and symbol of the code that the 64 `bits` begin with; length 0 if they begin with none."""
    for length in range(1, 17):
        code = np.int64(bits >> U(64 - length))
        if code <= highest[kind, table, length]:
            return U(length), np.int64(symbols[kind, table, shift[kind, table, length] + code])
    return U(0), 0


@jit
def value_of(bits, size):
    """The number that the first `size` of 64 bits stand for (F.2.2.1, EXTEND)."""
    number = np.int64((bits >> U(1)) >> (LAST - size))
    below = np.int64(1) - (np.int64(1) << np.int64(size))
    return number + (below & ~(np.int64(bits) >> 63))
