"""The window of a JPEG that a crop needs, decoded by compiled Python (numba) with exactly libjpeg-turbo's pixels.

Entropy decoding takes most of a JPEG's time, and it cannot begin in the middle. But what lies outside of the window
need only be stepped over: no coefficient is stored, transformed or coloured. Inside, one look at a table gives up to
two coefficients, which libjpeg-turbo takes one by one.

Only what photos are made of is decoded (ssl/data/jpeg_header.py). Anything else, and anything that is not as it should
be, is refused, for a library to decode or to call bad. Sections and figures in the comments are those of ITU-T T.81
(1992). numba makes floats of signed and unsigned numbers together: what holds bits is uint64 throughout.
"""

from __future__ import annotations

import sys
from collections import namedtuple

import numpy as np
from llvmlite import ir
from numba import types

from ssl.data import jpeg_header, jpeg_pixels
from ssl.data.compiled import intrinsic, jit, jit_kept
from ssl.data.jpeg_header import (
    AC_TABLE,
    ACROSS,
    DC_TABLE,
    DOWN,
    FIRST_COMPONENT,
    HEADER,
    HEIGHT,
    INTERVAL,
    NUM_COMPONENTS,
    PER_COMPONENT,
    QUANTIZATION,
    SCAN_AT,
    WIDTH,
    ZIGZAG,
    read_header,
)
from ssl.data.jpeg_pixels import idct, to_gray, to_rgb

DONE, REFUSED = 0, 1

LOOKUP = 10
"""Bits by which codes are looked up; longer ones are rare. 9 and 11 were up to 8 % slower, by their tables' memory."""
PADDING = 4096
"""Bytes behind the coded data that may be read in vain: an MCU has at most 10 blocks of 64 coefficients of 31 bits."""
_END_OF_BLOCK = 128
"""How far it is to a coefficient that is not there: after the last one, or the second of two."""
_DUMP = 64
"""The row of coefficients for those that are not there."""

_U = np.uint64
_BYTE, _WORD = _U(255), _U(64)
_EACH = _U(0x0101010101010101)
_LAST = _U(63)
_SHIFT = _U(64 - LOOKUP)

Codes = namedtuple("Codes", "dc ac highest shift symbols")
"""What tells codes, of up to four DC and four AC tables.

dc and ac, uint64 (4, 1024): see `_lookup_one` and `_lookup_two`. highest and shift, int64 (2, 4, 17), DC's first, then
AC's: by the length of a code the last one of it, and what leads from a code to its symbol's place in symbols, uint8
(2, 4, 256) (F.2.2.3).
"""
Window = namedtuple("Window", "first_row last_row first last num_columns across down num_kept stride")
"""Which MCUs are kept, and of these how many components.

first_row to last_row and first to last, both included; luma blocks across and down in an MCU; the stride is between the
rows of a block row's coefficients.
"""


@intrinsic
def _load(_typing, array, place):
    """Eight bytes of a uint8 array from `place` on as one number, the first byte the highest."""

    def generate(context, builder, signature, arguments):
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(builder.gep(source.data, [arguments[1]]), ir.IntType(64).as_pointer())
        return builder.bswap(builder.load(pointer, align=1))

    return types.uint64(array, types.uint64), generate


@intrinsic
def _store(_typing, array, place, number):
    """Write a number to eight bytes of a uint8 array, as `_load` reads it."""

    def generate(context, builder, signature, arguments):
        target = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(builder.gep(target.data, [arguments[1]]), ir.IntType(64).as_pointer())
        builder.store(builder.bswap(arguments[2]), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.uint64, types.uint64), generate


# ---- codes -----------------------------------------------------------------------------------------------------------


@jit
def _advance(symbol):
    """How far an AC symbol goes on from the last coefficient (F.1.2.2): by its zeros and one, or to the end."""
    if symbol & 15:
        return (symbol >> 4) + 1
    return 16 if symbol == 0xF0 else _END_OF_BLOCK


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
                bits, advance = (symbol & 15, _advance(symbol)) if is_ac else (symbol, 1)
                first = code << (LOOKUP - length)
                for entry in range(first, first + (1 << (LOOKUP - length))):
                    table[entry] = length | bits << 8 | advance << 16
            code += 1
            number += 1
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
        begins, more_bits, stored, more = 0, 0, _END_OF_BLOCK, 0
        if one != 0 and advance != _END_OF_BLOCK and used < LOOKUP:
            other = np.int64(ones[entry << used & ((1 << LOOKUP) - 1)])
            if other != 0 and used + (other & 255) <= LOOKUP:
                begins, more_bits, more = used + (other & 255), other >> 8 & 255, other >> 16
                stored, used = more, begins + more_bits
        first = _U(used) | _U(length) << _U(8) | _U(bits) << _U(16) | _U(advance) << _U(24)
        second = _U(begins) | _U(more_bits) << _U(8) | _U(stored) << _U(16) | _U(more) << _U(24)
        table[entry] = (first | second << _U(32)) if one != 0 else _U(0)


@jit
def _make_codes(header, counts, symbols):
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
def _long_code(bits, highest, shift, symbols, kind, table):
    """Length and symbol of the code that the 64 `bits` begin with; length 0 if they begin with none."""
    for length in range(1, 17):
        code = np.int64(bits >> _U(64 - length))
        if code <= highest[kind, table, length]:
            return _U(length), np.int64(symbols[kind, table, shift[kind, table, length] + code])
    return _U(0), 0


@jit
def _value(bits, size):
    """The number that the first `size` of 64 bits stand for (F.2.2.1, EXTEND)."""
    number = np.int64((bits >> _U(1)) >> (_LAST - size))
    below = np.int64(1) - (np.int64(1) << np.int64(size))
    return number + (below & ~(np.int64(bits) >> 63))


# ---- coded data ------------------------------------------------------------------------------------------------------
# 64 bits are held with the next one highest; `num_bits` of them count, and more may be there. `place` is the byte that
# follows these in the coded data.


@jit
def _unstuff(data, start, out, parts):
    """Coded data without the zeros behind 0xff (B.1.1.5); where the parts between restart markers begin, and the end.

    Returns the number of parts; 0 unless the markers are there in order and nothing but the end marker follows. `out`
    is as long as the data from `start` on. `parts`, int64, has place for the expected number and one more.
    """
    place, end, size, num_parts = _U(start), _U(data.size - 2), _U(0), 1
    parts[0] = 0
    while place < end:
        if place + _U(8) <= end:
            eight = _load(data, place)
            if (~eight - _EACH) & eight & (_EACH << _U(7)) == _U(0):  # no 0xff among them
                _store(out, size, eight)
                size += _U(8)
                place += _U(8)
                continue
        byte, follows = data[place], data[place + _U(1)]
        out[size] = byte
        size += _U(1)
        place += _U(1)
        if byte != 0xFF:
            continue
        place += _U(1)
        if follows != 0:
            if follows != 0xD0 + (num_parts - 1 & 7) or num_parts >= parts.size - 1:
                return 0
            size -= _U(1)
            parts[num_parts] = np.int64(size)
            num_parts += 1
    if place != end or data[end] != 0xFF or data[end + _U(1)] != 0xD9:
        return 0
    parts[num_parts] = np.int64(size)
    return num_parts


@jit
def _is_filled(k):
    """Whether a block has ended with its last coefficient, or with the code for its end before."""
    return k == _LAST or _U(_END_OF_BLOCK) <= k < _U(_END_OF_BLOCK) + _LAST


@jit
def _decode_row(coded, codes, header, window, is_kept, end, coefficients, places, predicted, bits, num_bits, place):
    """A row of MCUs: the window's coefficients, int16 (block rows, 65, stride); and whether all is as it should be.

    One long function, because numba counts references to the arrays at every call of another, which took half the time.
    """
    dc_lookup, ac_lookup, highest, shift, symbols = codes
    flat = coefficients.reshape(-1)
    num_luma = window.across * window.down
    for column in range(window.num_columns):
        if (place << _U(3)) - num_bits > end << _U(3):
            return bits, num_bits, place, False
        is_within = is_kept and window.first <= column <= window.last
        for block in range(num_luma + header[NUM_COMPONENTS] - 1):
            c = max(block - num_luma + 1, 0)
            at = FIRST_COMPONENT + c * PER_COMPONENT
            dc, ac = header[at + DC_TABLE], header[at + AC_TABLE]

            # The DC coefficient less that of the block before (F.2.2.1).
            bits |= _load(coded, place) >> num_bits
            place += (_LAST - num_bits) >> _U(3)
            num_bits |= _U(56)
            entry = dc_lookup[dc, bits >> _SHIFT]
            length, size = entry & _BYTE, entry >> _U(8) & _BYTE
            if entry == _U(0):
                length, symbol = _long_code(bits, highest, shift, symbols, 0, dc)
                if length == _U(0):
                    return bits, num_bits, place, False
                size = _U(symbol)
            predicted[c] += _value(bits << length, size)
            if not -32768 <= predicted[c] <= 32767:
                return bits, num_bits, place, False
            bits <<= length + size
            num_bits -= length + size

            # The AC coefficients (F.2.2.2), k being the last one's place in the order of the code.
            k = _U(0)
            if not is_within or c >= window.num_kept:
                while k < _LAST:
                    bits |= _load(coded, place) >> num_bits
                    place += (_LAST - num_bits) >> _U(3)
                    num_bits |= _U(56)
                    entry = ac_lookup[ac, bits >> _SHIFT]
                    length = entry & _BYTE
                    if entry == _U(0):
                        length, symbol = _long_code(bits, highest, shift, symbols, 1, ac)
                        if length == _U(0):
                            return bits, num_bits, place, False
                        length += _U(symbol & 15)
                        k += _U(_advance(symbol))
                    else:
                        k += entry >> _U(24) & _BYTE
                        if k == _LAST:  # the second is the next block's
                            length = (entry >> _U(8) & _BYTE) + (entry >> _U(16) & _BYTE)
                        else:
                            k += entry >> _U(56)
                    bits <<= length
                    num_bits -= length
                if not _is_filled(k):
                    return bits, num_bits, place, False
                continue

            if c == 0:
                down, across = block // window.across, block % window.across
                start = _U(down * 65 * window.stride + (column - window.first) * window.across + across)
            else:
                start = _U((window.down + c - 1) * 65 * window.stride + column - window.first)
            flat[start] = predicted[c]
            while k < _LAST:
                bits |= _load(coded, place) >> num_bits
                place += (_LAST - num_bits) >> _U(3)
                num_bits |= _U(56)
                entry = ac_lookup[ac, bits >> _SHIFT]
                length, size = entry >> _U(8) & _BYTE, entry >> _U(16) & _BYTE
                if entry == _U(0):
                    length, symbol = _long_code(bits, highest, shift, symbols, 1, ac)
                    if length == _U(0):
                        return bits, num_bits, place, False
                    size = _U(symbol & 15)
                    k += _U(_advance(symbol))
                    flat[start + places[k]] = _value(bits << length, size)
                    used = length + size
                else:
                    k += entry >> _U(24) & _BYTE
                    flat[start + places[k]] = _value(bits << length, size)
                    if k == _LAST:  # the second is the next block's
                        used = length + size
                    else:
                        second = k + (entry >> _U(48) & _BYTE)
                        begins, size = entry >> _U(32) & _BYTE, entry >> _U(40) & _BYTE
                        flat[start + places[second]] = _value(bits << begins, size)
                        k += entry >> _U(56)
                        used = entry & _BYTE
                bits <<= used
                num_bits -= used
            if not _is_filled(k):
                return bits, num_bits, place, False
    return bits, num_bits, place, True


# ---- window ----------------------------------------------------------------------------------------------------------


@jit
def _window_of(header, top, left, height, width, num_channels):
    """The MCUs that these pixels need.

    With one more pixel on each side, which smoothing chroma needs. The rows that are stepped through are those of
    ssl/data/jpeg_rows.py, so that damage is met by the same crops.
    """
    is_gray = header[NUM_COMPONENTS] == 1  # MCUs of one block, whatever the sampling (A.2.2)
    across = 1 if is_gray else header[FIRST_COMPONENT + ACROSS]
    down = 1 if is_gray else header[FIRST_COMPONENT + DOWN]
    first, last = max(left - 1, 0) // (8 * across), (min(left + width + 1, header[WIDTH]) - 1) // (8 * across)
    return Window(
        first_row=max(top - 1, 0) // (8 * down),
        last_row=(min(top + height + 1, header[HEIGHT]) - 1) // (8 * down),
        first=first,
        last=last,
        num_columns=(header[WIDTH] - 1) // (8 * across) + 1,
        across=across,
        down=down,
        num_kept=3 if num_channels == 3 and not is_gray else 1,
        stride=16 * (((last - first + 1) * across - 1) // 16 + 1),
    )


@jit
def _transform(coefficients, header, quantization, window, row, luma, blue, red):
    """The pixels of a row of MCUs into the planes; and whether they can be told exactly."""
    for number in range(coefficients.shape[0]):
        c = max(number - window.down + 1, 0)
        quantizer = quantization[header[FIRST_COMPONENT + c * PER_COMPONENT + QUANTIZATION]]
        num_blocks = window.last - window.first + 1
        if c == 0:
            at = 8 * (row * window.down + number)
            fits = idct(coefficients[number], quantizer, luma, at, num_blocks * window.across)
        else:
            fits = idct(coefficients[number], quantizer, blue if c == 1 else red, 8 * row, num_blocks)
        if not fits:
            return False
    return True


@jit
def _decode_planes(data, header, quantization, codes, window, luma, blue, red):
    """The window's MCUs into three planes of bytes; False if something is not as it should be."""
    num_rows = (header[HEIGHT] - 1) // (8 * window.down) + 1
    rows_per_part, stop_row = num_rows, window.last_row + 1
    if header[INTERVAL]:
        if header[INTERVAL] % window.num_columns:
            return False
        rows_per_part = header[INTERVAL] // window.num_columns
        stop_row = min((window.last_row // rows_per_part + 1) * rows_per_part, num_rows)
    coded = np.empty(data.size - header[SCAN_AT] + PADDING, np.uint8)
    parts = np.empty((num_rows - 1) // rows_per_part + 2, np.int64)
    if _unstuff(data, header[SCAN_AT], coded, parts) != parts.size - 1:
        return False

    coefficients = np.empty((window.down + window.num_kept - 1, 65, window.stride), np.int16)
    flat = coefficients.reshape(-1)
    places = np.full(64 + 2 * _END_OF_BLOCK, _DUMP * window.stride, np.uint64)
    for k in range(64):
        places[k] = ZIGZAG[k] * window.stride
    predicted = np.zeros(3, np.int64)
    bits, num_bits, place, end = _U(0), _U(0), _U(0), _U(0)
    for row in range(window.first_row // rows_per_part * rows_per_part, stop_row):
        if row % rows_per_part == 0:
            part = row // rows_per_part
            bits, num_bits, place, end = _U(0), _U(0), _U(parts[part]), _U(parts[part + 1])
            predicted[:] = 0
        is_kept = window.first_row <= row <= window.last_row
        if is_kept:
            flat[:] = 0
        bits, num_bits, place, is_right = _decode_row(
            coded, codes, header, window, is_kept, end, coefficients, places, predicted, bits, num_bits, place
        )
        used = ((place << _U(3)) - num_bits + _U(7)) >> _U(3)
        is_last = row == num_rows - 1 or (row + 1) % rows_per_part == 0
        if not is_right or used > end or (is_last and used != end):
            return False
        if is_kept and not _transform(
            coefficients, header, quantization, window, row - window.first_row, luma, blue, red
        ):
            return False
    return True


@jit
def _to_equal_channels(luma, top, left, out):
    """The rows and columns of the plane from `top` and `left` on into every channel of `out`."""
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            for channel in range(out.shape[2]):
                out[row, column, channel] = luma[top + row, left + column]


@jit
def _decode_window(data, top, left, out):
    header, quantization = np.zeros(HEADER, np.int64), np.empty((4, 64), np.int32)
    counts, symbols = np.empty((2, 4, 16), np.uint8), np.empty((2, 4, 256), np.uint8)
    if not read_header(data, header, quantization, counts, symbols):
        return REFUSED
    height, width, channels = out.shape
    if top < 0 or left < 0 or top + height > header[HEIGHT] or left + width > header[WIDTH]:
        return REFUSED
    codes, are_codes = _make_codes(header, counts, symbols)
    if not are_codes:
        return REFUSED
    window = _window_of(header, top, left, height, width, channels)
    num_rows = window.last_row - window.first_row + 1
    luma = np.empty((num_rows * 8 * window.down, 8 * window.stride), np.uint8)
    chroma_size = (num_rows * 8, 8 * window.stride) if window.num_kept == 3 else (0, 0)
    blue, red = np.empty(chroma_size, np.uint8), np.empty(chroma_size, np.uint8)
    if not _decode_planes(data, header, quantization, codes, window, luma, blue, red):
        return REFUSED
    y_top, y_left = 8 * window.down * window.first_row, 8 * window.across * window.first
    if channels == 1:
        to_gray(luma, top - y_top, left - y_left, out)
        return DONE
    if window.num_kept == 1:
        _to_equal_channels(luma, top - y_top, left - y_left, out)
        return DONE
    chroma_height = (header[HEIGHT] - 1) // window.down + 1
    chroma_width = (header[WIDTH] - 1) // window.across + 1
    to_rgb(
        luma, blue, red, y_top, y_left, 8 * window.first_row, 8 * window.first, window.across, window.down,
        chroma_height, chroma_width, top, left, out,
    )  # fmt: skip
    return DONE


def _of_version(version: str):
    def decode_window(data, top, left, out):
        assert version
        return _decode_window(data, top, left, out)

    return decode_window


_kept = jit_kept(_of_version, sys.modules[__name__], jpeg_header, jpeg_pixels)


def decode_window(data: np.ndarray, top: int, left: int, out: np.ndarray) -> bool:
    """Decode the part of a JPEG whose corner is (top, left) into `out`, uint8 (h, w, C); False where it is refused.

    data: uint8 (bytes,), an upright image. C is 3 for RGB or 1 for luma; gray becomes RGB of three equal channels.
    Nothing is known of `out` where the file is refused.
    """
    return _kept(data, top, left, out) == DONE
