"""The window of a JPEG that a crop needs, decoded by compiled Python (numba) with exactly libjpeg-turbo's pixels.

Entropy decoding takes most of a JPEG's time, and it cannot begin in the middle. But what lies outside of the window
need only be stepped over: no coefficient is stored, transformed or coloured. Inside, one look at a table gives up to
two coefficients, which libjpeg-turbo takes one by one.

Only what photos are made of is decoded (ssl/data/jpeg_header.py). Anything else, and anything that is not as it should
be, is refused, for a library to decode or to call bad. Sections and figures in the comments are those of ITU-T T.81
(1992). numba makes floats of signed and unsigned numbers together, so what holds bits is uint64 throughout.
"""

from __future__ import annotations

import sys
from collections import namedtuple

import numpy as np
from llvmlite import ir
from numba import types

from ssl.data import compiled, jpeg_codes, jpeg_header, jpeg_pixels
from ssl.data.compiled import Kept, intrinsic, jit
from ssl.data.jpeg_codes import END_OF_BLOCK, LAST, LOOKUP, U, advance_of, long_code, make_codes, value_of
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

PADDING = 4096
"""Bytes behind the coded data that may be read in vain: an MCU has at most 6 blocks of 64 coefficients of 31 bits."""
_DUMP = 64
"""The row of coefficients for those that are not there."""

_BYTE = U(255)
_EACH = U(0x0101010101010101)
_SHIFT = U(64 - LOOKUP)

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


# ---- coded data ------------------------------------------------------------------------------------------------------
# 64 bits are held with the next one highest; `num_bits` of them count, and more may be there. `place` is the byte that
# follows these in the coded data.


@jit
def _unstuff(data, start, out, parts):
    """Coded data without the zeros behind 0xff (B.1.1.5); where the parts between restart markers begin, and the end.

    Returns the number of parts; 0 unless the markers are there in order and nothing but the end marker follows. `out`
    is as long as the data from `start` on. `parts`, int64, has place for the expected number and one more.
    """
    place, end, size, num_parts = U(start), U(data.size - 2), U(0), 1
    parts[0] = 0
    while place < end:
        if place + U(8) <= end:
            eight = _load(data, place)
            if (~eight - _EACH) & eight & (_EACH << U(7)) == U(0):  # no 0xff among them
                _store(out, size, eight)
                size += U(8)
                place += U(8)
                continue
        byte, follows = data[place], data[place + U(1)]
        out[size] = byte
        size += U(1)
        place += U(1)
        if byte != 0xFF:
            continue
        place += U(1)
        if follows != 0:
            if follows != 0xD0 + (num_parts - 1 & 7) or num_parts >= parts.size - 1:
                return 0
            size -= U(1)
            parts[num_parts] = np.int64(size)
            num_parts += 1
    if place != end or data[end] != 0xFF or data[end + U(1)] != 0xD9:
        return 0
    parts[num_parts] = np.int64(size)
    return num_parts


@jit
def _is_filled(k):
    """Whether a block has ended with its last coefficient, or with the code for its end before."""
    return k == LAST or U(END_OF_BLOCK) <= k < U(END_OF_BLOCK) + LAST


@jit
def _decode_row(coded, codes, header, window, is_kept, end, coefficients, places, predicted, bits, num_bits, place):
    """A row of MCUs: the window's coefficients, int16 (block rows, 65, stride); and whether all is as it should be.

    One long function, because numba counts references to the arrays at every call of another, which took half the time.
    """
    dc_lookup, ac_lookup, highest, shift, symbols = codes
    flat = coefficients.reshape(-1)
    num_luma = window.across * window.down
    for column in range(window.num_columns):
        if (place << U(3)) - num_bits > end << U(3):
            return bits, num_bits, place, False
        is_within = is_kept and window.first <= column <= window.last
        for block in range(num_luma + header[NUM_COMPONENTS] - 1):
            c = max(block - num_luma + 1, 0)
            at = FIRST_COMPONENT + c * PER_COMPONENT
            dc, ac = header[at + DC_TABLE], header[at + AC_TABLE]

            # The DC coefficient less that of the block before (F.2.2.1).
            bits |= _load(coded, place) >> num_bits
            place += (LAST - num_bits) >> U(3)
            num_bits |= U(56)
            entry = dc_lookup[dc, bits >> _SHIFT]
            length, size = entry & _BYTE, entry >> U(8) & _BYTE
            if entry == U(0):
                length, symbol = long_code(bits, highest, shift, symbols, 0, dc)
                if length == U(0):
                    return bits, num_bits, place, False
                size = U(symbol)
            predicted[c] += value_of(bits << length, size)
            if not -32768 <= predicted[c] <= 32767:
                return bits, num_bits, place, False
            bits <<= length + size
            num_bits -= length + size

            # The AC coefficients (F.2.2.2), k being the last one's place in the order of the code.
            k = U(0)
            if not is_within or c >= window.num_kept:
                while k < LAST:
                    bits |= _load(coded, place) >> num_bits
                    place += (LAST - num_bits) >> U(3)
                    num_bits |= U(56)
                    entry = ac_lookup[ac, bits >> _SHIFT]
                    length = entry & _BYTE
                    if entry == U(0):
                        length, symbol = long_code(bits, highest, shift, symbols, 1, ac)
                        if length == U(0):
                            return bits, num_bits, place, False
                        length += U(symbol & 15)
                        k += U(advance_of(symbol))
                    else:
                        k += entry >> U(24) & _BYTE
                        if k == LAST:  # the second is the next block's
                            length = (entry >> U(8) & _BYTE) + (entry >> U(16) & _BYTE)
                        else:
                            k += entry >> U(56)
                    bits <<= length
                    num_bits -= length
                if not _is_filled(k):
                    return bits, num_bits, place, False
                continue

            if c == 0:
                down, across = block // window.across, block % window.across
                start = U(down * 65 * window.stride + (column - window.first) * window.across + across)
            else:
                start = U((window.down + c - 1) * 65 * window.stride + column - window.first)
            flat[start] = predicted[c]
            while k < LAST:
                bits |= _load(coded, place) >> num_bits
                place += (LAST - num_bits) >> U(3)
                num_bits |= U(56)
                entry = ac_lookup[ac, bits >> _SHIFT]
                length, size = entry >> U(8) & _BYTE, entry >> U(16) & _BYTE
                if entry == U(0):
                    length, symbol = long_code(bits, highest, shift, symbols, 1, ac)
                    if length == U(0):
                        return bits, num_bits, place, False
                    size = U(symbol & 15)
                    k += U(advance_of(symbol))
                    flat[start + places[k]] = value_of(bits << length, size)
                    used = length + size
                else:
                    k += entry >> U(24) & _BYTE
                    flat[start + places[k]] = value_of(bits << length, size)
                    if k == LAST:  # the second is the next block's
                        used = length + size
                    else:
                        second = k + (entry >> U(48) & _BYTE)
                        begins, size = entry >> U(32) & _BYTE, entry >> U(40) & _BYTE
                        flat[start + places[second]] = value_of(bits << begins, size)
                        k += entry >> U(56)
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

    With one more row above and below, which smoothing chroma needs: those of ssl/data/jpeg_rows.py, so that damage is
    met by the same crops. And with one more sample of halved chroma on each side of those that the pixels lie in.
    """
    is_gray = header[NUM_COMPONENTS] == 1  # MCUs of one block, whatever the sampling (A.2.2)
    across = 1 if is_gray else header[FIRST_COMPONENT + ACROSS]
    down = 1 if is_gray else header[FIRST_COMPONENT + DOWN]
    side = 2 if across == 2 else 0
    first, last = max(left - side, 0) // (8 * across), (min(left + width + side, header[WIDTH]) - 1) // (8 * across)
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
    places = np.full(64 + 2 * END_OF_BLOCK, _DUMP * window.stride, np.uint64)
    for k in range(64):
        places[k] = ZIGZAG[k] * window.stride
    predicted = np.zeros(3, np.int64)
    bits, num_bits, place, end = U(0), U(0), U(0), U(0)
    for row in range(window.first_row // rows_per_part * rows_per_part, stop_row):
        if row % rows_per_part == 0:
            part = row // rows_per_part
            bits, num_bits, place, end = U(0), U(0), U(parts[part]), U(parts[part + 1])
            predicted[:] = 0
        is_kept = window.first_row <= row <= window.last_row
        if is_kept:
            flat[:] = 0
        bits, num_bits, place, is_right = _decode_row(
            coded, codes, header, window, is_kept, end, coefficients, places, predicted, bits, num_bits, place
        )
        used = ((place << U(3)) - num_bits + U(7)) >> U(3)
        is_last = row == num_rows - 1 or (row + 1) % rows_per_part == 0
        if not is_right or used > end or (is_last and used != end):
            return False
        # So near to the end libjpeg has all that is left in its hands, and cannot tell that rows are missing.
        if row == stop_row - 1 and not is_last and end - used < U(9):
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
        return False
    height, width, channels = out.shape
    if top < 0 or left < 0 or top + height > header[HEIGHT] or left + width > header[WIDTH]:
        return False
    codes, are_codes = make_codes(header, counts, symbols)
    if not are_codes:
        return False
    window = _window_of(header, top, left, height, width, channels)
    num_rows = window.last_row - window.first_row + 1
    luma = np.empty((num_rows * 8 * window.down, 8 * window.stride), np.uint8)
    chroma_size = (num_rows * 8, 8 * window.stride) if window.num_kept == 3 else (0, 0)
    blue, red = np.empty(chroma_size, np.uint8), np.empty(chroma_size, np.uint8)
    if not _decode_planes(data, header, quantization, codes, window, luma, blue, red):
        return False
    y_top, y_left = 8 * window.down * window.first_row, 8 * window.across * window.first
    if channels == 1:
        to_gray(luma, top - y_top, left - y_left, out)
        return True
    if window.num_kept == 1:
        _to_equal_channels(luma, top - y_top, left - y_left, out)
        return True
    chroma_height = (header[HEIGHT] - 1) // window.down + 1
    chroma_width = (header[WIDTH] - 1) // window.across + 1
    to_rgb(
        luma, blue, red, y_top, y_left, 8 * window.first_row, 8 * window.first, window.across, window.down,
        chroma_height, chroma_width, top, left, out,
    )  # fmt: skip
    return True


def _of_version(version: str):
    def decode_window(data, top, left, out):
        assert version
        return _decode_window(data, top, left, out)

    return decode_window


_kept = Kept(_of_version, sys.modules[__name__], compiled, jpeg_codes, jpeg_header, jpeg_pixels)
is_kept = _kept.is_kept
"""Whether it is compiled once, not in every process."""


def decode_window(data: np.ndarray, top: int, left: int, out: np.ndarray) -> bool:
    """Decode the part of a JPEG whose corner is (top, left) into `out`, uint8 (h, w, C); False where it is refused.

    data: uint8 (bytes,), an upright image. C is 3 for RGB or 1 for luma; gray becomes RGB of three equal channels.
    Nothing is known of `out` where the file is refused.
    """
    return _kept(data, top, left, out)
