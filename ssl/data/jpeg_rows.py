"""Those rows of a JPEG that a crop needs, with exactly the pixels that decoding the whole file gives them.

A JPEG is one stream of rows of MCUs, 8 or 16 pixels high each. Below the rows that are needed a decoder can stop: the
file is decoded with a lower height in its header. Where restart markers stand at the ends of rows, as in what
`ssl.prepare` makes, it can start late as well: what lies between two markers is a JPEG of its own once its markers
count from 0 and its height is right. One more row of pixels on each side comes along, because libjpeg smooths chroma.

A file that ends early has no end marker and is decoded whole, so it is bad whatever the crop; with restart markers, so
is one whose markers are not all there in order. Other damage is noticed only in the rows that are decoded: an image of
which something else is damaged is shown, undamaged as far as the crop goes, until a crop meets the damage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import simplejpeg

from ssl.data.decode import MAX_PIXELS, exif_orientation

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_RESTARTS = bytes(range(0xD0, 0xD8))
_EXIF = b"Exif\0\0"
_SOF = (0xC0, 0xC1)  # baseline, and extended sequential, which with 8 bits differs only in how many tables it may have
_SOS, _DRI, _APP1 = 0xDA, 0xDD, 0xE1
_MARKER = re.compile(rb"\xff[^\x00\xff]")  # in coded data 0xff is followed by 0, and may be repeated before a marker
_BELOW = re.compile(r"Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9")
_COLORSPACES = {1: "GRAY", 3: "RGB"}
LARGEST_SIDE = 65_500
"""Pixels, by libjpeg; the format has 65,535."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a JPEG lie: an upright one, Huffman-coded in one scan, gray or of three components."""

    height: int
    width: int
    height_at: int
    """Of the header's two bytes."""
    scan_at: int
    """Where the coded rows begin."""
    row: int
    """Pixels in the height of an MCU."""
    rows_per_restart: int
    """Rows of MCUs from one restart marker to the next; 0 where there are none."""


def read_layout(data: bytes) -> Layout | None:
    """The layout of a JPEG by its header; None for any other, and for one without an end, which are decoded whole."""
    if data[:3] != _START or data[-2:] != _END:
        return None
    place, frame_at, interval = 2, 0, 0
    while place + 20 < len(data) and data[place] == 0xFF:  # 20: what a frame's header of three components takes
        marker, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
        if marker in _SOF:
            frame_at = place
        elif marker == _DRI:
            interval = data[place + 4] << 8 | data[place + 5]
        elif marker == _SOS:
            return _layout(data, frame_at, place, interval) if frame_at else None
        elif marker == _APP1 and data[place + 4 : place + 10] == _EXIF and exif_orientation(data) != 1:
            return None
        place += 2 + length
    return None


def _layout(data: bytes, frame_at: int, sos_at: int, interval: int) -> Layout | None:
    """What the frame's and the scan's header tell; None where they are not those of a simple file."""
    bits, components = data[frame_at + 4], data[frame_at + 9]
    height, width = data[frame_at + 5] << 8 | data[frame_at + 6], data[frame_at + 7] << 8 | data[frame_at + 8]
    if bits != 8 or components not in (1, 3) or data[sos_at + 4] != components:
        return None
    if not 0 < height * width <= MAX_PIXELS or max(height, width) > LARGEST_SIDE:
        return None
    sampling = data[frame_at + 11 : frame_at + 11 + 3 * components : 3]  # of each component: 4 bits across, 4 down
    # A scan of one component has MCUs of one block, whatever its sampling.
    across, down = (max(s >> 4 for s in sampling), max(s & 15 for s in sampling)) if components == 3 else (1, 1)
    if not (across and down):
        return None
    rows, rest = divmod(interval, -(-width // (8 * across)))
    if rest:  # markers within rows
        return None
    scan_at = sos_at + 2 + (data[sos_at + 2] << 8 | data[sos_at + 3])
    return Layout(height, width, frame_at + 5, scan_at, 8 * down, rows)


def decode_rows(
    data: bytes, layout: Layout, top: int, bottom: int, *, channels: int, buffer: np.ndarray
) -> tuple[np.ndarray, int] | None:
    """Rows of pixels, uint8 (R, W, C), and the number of the first of them; those from `top` to `bottom` are there.

    They lie in `buffer`, uint8 of at least the image's size. None where the whole file has to be decoded: because all
    rows are needed, or because something is not as it should be.
    """
    if channels not in _COLORSPACES:
        return None
    first, last = max(top - 1, 0) // layout.row, -(-(bottom + 1) // layout.row)  # rows of MCUs
    if layout.rows_per_restart:
        return _between_markers(data, layout, first, last, channels=channels, buffer=buffer)
    return _from_the_top(data, layout, last, channels=channels, buffer=buffer)


def _between_markers(
    data: bytes, layout: Layout, first: int, last: int, *, channels: int, buffer: np.ndarray
) -> tuple[np.ndarray, int] | None:
    """The rows of MCUs from `first` to before `last`, and those that no marker parts from them."""
    part = layout.row * layout.rows_per_restart  # pixels in the height of what two markers enclose
    num_parts = -(-layout.height // part)
    first, last = first // layout.rows_per_restart, min(-(-last // layout.rows_per_restart), num_parts)
    if last - first == num_parts:
        return None
    markers = [found.start() for found in _MARKER.finditer(data, layout.scan_at)]  # the end marker is the last
    if bytes([data[at + 1] for at in markers]) != _markers_of(num_parts):
        return None
    start = markers[first - 1] + 2 if first else layout.scan_at
    strip = bytearray(data[: markers[last - 1]])
    del strip[layout.scan_at : start]
    shift = start - layout.scan_at
    for number, at in enumerate(markers[first : last - 1]):
        strip[at - shift + 1] = _RESTARTS[number & 7]
    strip += _END
    height = min(last * part, layout.height) - first * part
    strip[layout.height_at : layout.height_at + 2] = height.to_bytes(2, "big")
    try:
        return simplejpeg.decode_jpeg(strip, _COLORSPACES[channels], strict=True, buffer=buffer), first * part
    except ValueError:
        return None


def _markers_of(num_parts: int) -> bytes:
    """The second bytes of the markers that end the parts: 0xd0 to 0xd7 in turn, and the end's."""
    return (_RESTARTS * (num_parts // 8 + 1))[: num_parts - 1] + _END[1:]


def _from_the_top(
    data: bytes, layout: Layout, last: int, *, channels: int, buffer: np.ndarray
) -> tuple[np.ndarray, int] | None:
    """The rows of MCUs before `last`."""
    height = last * layout.row
    if height >= layout.height:
        return None
    cut = bytearray(data)
    cut[layout.height_at : layout.height_at + 2] = height.to_bytes(2, "big")
    try:
        simplejpeg.decode_jpeg(cut, _COLORSPACES[channels], strict=True, buffer=buffer)
    except ValueError as error:
        # libjpeg tells its first warning: all rows were there before, and nothing was wrong with them.
        if _BELOW.fullmatch(str(error)):
            size = height * layout.width * channels
            return buffer.reshape(-1)[:size].reshape(height, layout.width, channels), 0
    return None  # without the coded rows below, something is amiss
