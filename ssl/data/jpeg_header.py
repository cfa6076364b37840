"""The header of a JPEG, read by compiled Python (numba), if it is of the kind that ssl/data/jpeg_scan.py decodes.

That is what photos are made of: one scan, 8 bits, Huffman-coded and sequential, gray or YCbCr with chroma of full or
half size. Sections, tables and figures in the comments are those of ITU-T T.81 (1992).
"""

from __future__ import annotations

import numpy as np

from ssl.data.compiled import jit
from ssl.data.jpeg_rows import LARGEST_SIDE


def _zigzag(place: int) -> tuple[int, int]:
    """By which the places of a block are sorted: along diagonals, down and up in turn."""
    row, column = divmod(place, 8)
    return row + column, row if (row + column) % 2 else column


ZIGZAG = np.array(sorted(range(64), key=_zigzag), np.int64)
"""Figure A.6: where the coefficients of a block belong (8 * row + column), in the order of the code."""

# What a header tells, as one array of numbers.
HEIGHT, WIDTH, NUM_COMPONENTS, INTERVAL, SCAN_AT = range(5)
FIRST_COMPONENT, PER_COMPONENT = 5, 6
# Of component c, from FIRST_COMPONENT + c * PER_COMPONENT on:
ID, ACROSS, DOWN, QUANTIZATION, DC_TABLE, AC_TABLE = range(6)
HEADER = FIRST_COMPONENT + 3 * PER_COMPONENT

_DQT, _DHT, _SOF0, _SOF1, _DRI, _SOS, _COM = 0xDB, 0xC4, 0xC0, 0xC1, 0xDD, 0xDA, 0xFE
_APP0, _APP2, _APP14 = 0xE0, 0xE2, 0xEE
_JFIF, _ICC, _ADOBE = 0x4A46494600, 0x4943435F50, 0x41646F6265  # five bytes


@jit
def read_header(data, header, quantization, counts, symbols):
    """Fill the arrays from the segments before the scan; False for a file that is not decoded here.

    data: uint8 (bytes,). header: int64 (HEADER,). quantization: int32 (4, 64), in natural order. counts: uint8
    (2, 4, 16), how many codes there are of each length, of DC and AC tables. symbols: uint8 (2, 4, 256).
    """
    place = 2
    is_jfif, has_profile, adobe = False, False, -1
    quantizations, tables = 0, 0  # which have been seen, as bits
    while place + 4 <= data.size and data[place] == 0xFF:
        marker, start = data[place + 1], place + 4
        stop = place + 2 + (data[place + 2] << 8 | data[place + 3])
        size = stop - start
        if size < 0 or stop > data.size:
            return False
        if marker == _DQT:
            seen = _read_quantization(data, start, stop, quantization)
            if seen == 0:
                return False
            quantizations |= seen
        elif marker == _DHT:
            seen = _read_tables(data, start, stop, counts, symbols)
            if seen == 0:
                return False
            tables |= seen
        elif marker in (_SOF0, _SOF1):
            if not _read_frame(data, start, stop, header):
                return False
        elif marker == _DRI:
            if size != 2:
                return False
            header[INTERVAL] = data[start] << 8 | data[start + 1]
        elif marker == _SOS:
            header[SCAN_AT] = stop
            if not _read_scan(data, start, stop, header, quantizations, tables):
                return False
            return header[NUM_COMPONENTS] == 1 or _is_ycbcr(header, is_jfif, adobe)
        elif marker == _APP0 and size >= 14 and _begins(data, start, _JFIF):
            is_jfif = True
            if data[start + 5] != 1:  # a version of which libjpeg warns
                return False
        elif marker == _APP2 and size >= 14 and _begins(data, start, _ICC):
            # Of parts that do not fit libjpeg warns, too.
            if has_profile or data[start + 12] != 1 or data[start + 13] != 1:
                return False
            has_profile = True
        elif marker == _APP14 and size >= 12 and _begins(data, start, _ADOBE):
            adobe = data[start + 11]
        elif marker < _APP0 or (marker > 0xEF and marker != _COM):  # progressive, lossless, arithmetic, ...
            return False
        place = stop
    return False


@jit
def _begins(data, start, five):
    """Whether these five bytes stand there."""
    found = 0
    for k in range(5):
        found = found << 8 | data[start + k]
    return found == five


@jit
def _read_quantization(data, start, stop, quantization):
    """The numbers of the tables, as bits; 0 where they are not of 8 bits each (B.2.4.1)."""
    seen = 0
    while start < stop:
        number = data[start]
        if number > 3 or start + 65 > stop:
            return 0
        for k in range(64):
            if data[start + 1 + k] == 0:
                return 0
            quantization[number, ZIGZAG[k]] = data[start + 1 + k]
        seen |= 1 << number
        start += 65
    return seen


@jit
def _read_tables(data, start, stop, counts, symbols):
    """The numbers of the tables, as bits, those of AC 4 higher; 0 where they are incomplete (B.2.4.2)."""
    seen = 0
    while start < stop:
        kind, number = data[start] >> 4, data[start] & 15
        if kind > 1 or number > 3 or start + 17 > stop:
            return 0
        total = 0
        for k in range(16):
            counts[kind, number, k] = data[start + 1 + k]
            total += data[start + 1 + k]
        if total > 256 or start + 17 + total > stop:
            return 0
        for k in range(total):
            symbols[kind, number, k] = data[start + 17 + k]
        seen |= 1 << (4 * kind + number)
        start += 17 + total
    return seen


@jit
def _read_frame(data, start, stop, header):
    """Size and components; False for a second frame, other than 8 bits and other than 1 or 3 components (B.2.2)."""
    if stop < start + 6 or header[NUM_COMPONENTS]:
        return False
    num_components = data[start + 5]
    if data[start] != 8 or (num_components != 1 and num_components != 3) or stop != start + 6 + 3 * num_components:
        return False
    header[NUM_COMPONENTS] = num_components
    header[HEIGHT] = data[start + 1] << 8 | data[start + 2]
    header[WIDTH] = data[start + 3] << 8 | data[start + 4]
    for c in range(num_components):
        at, source = FIRST_COMPONENT + c * PER_COMPONENT, start + 6 + 3 * c
        header[at + ID] = data[source]
        header[at + ACROSS], header[at + DOWN] = data[source + 1] >> 4, data[source + 1] & 15
        header[at + QUANTIZATION] = data[source + 2]
        if not (1 <= header[at + ACROSS] <= 4 and 1 <= header[at + DOWN] <= 4):
            return False
    return 0 < header[HEIGHT] <= LARGEST_SIDE and 0 < header[WIDTH] <= LARGEST_SIDE


@jit
def _read_scan(data, start, stop, header, quantizations, tables):
    """The tables of each component; False for part of the components or of the coefficients (B.2.3)."""
    num_components = header[NUM_COMPONENTS]
    if num_components == 0 or stop != start + 4 + 2 * num_components or data[start] != num_components:
        return False
    for c in range(num_components):
        at, source = FIRST_COMPONENT + c * PER_COMPONENT, start + 1 + 2 * c
        dc, ac, quantization = data[source + 1] >> 4, data[source + 1] & 15, header[at + QUANTIZATION]
        if data[source] != header[at + ID] or dc > 3 or ac > 3 or quantization > 3:
            return False
        if not quantizations >> quantization & tables >> dc & tables >> (4 + ac) & 1:
            return False
        header[at + DC_TABLE], header[at + AC_TABLE] = dc, ac
    return data[stop - 3] == 0 and data[stop - 2] == 63 and data[stop - 1] == 0


@jit
def _is_ycbcr(header, is_jfif, adobe):
    """Whether three components are such, in one of three samplings; by the rules of libjpeg."""
    luma, blue, red = FIRST_COMPONENT, FIRST_COMPONENT + PER_COMPONENT, FIRST_COMPONENT + 2 * PER_COMPONENT
    for chroma in (blue, red):
        if header[chroma + ACROSS] != 1 or header[chroma + DOWN] != 1:
            return False
    if header[luma + ACROSS] > 2 or header[luma + DOWN] > header[luma + ACROSS]:
        return False
    if is_jfif:
        return True
    if adobe >= 0:
        return adobe == 1
    return header[luma + ID] == 1 and header[blue + ID] == 2 and header[red + ID] == 3
