"""One image of a source, decoded: what may fail is named once, here."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from ssl.data.decode import DecodeError, decode, image_size
from ssl.data.jpeg_rows import Layout, decode_rows, read_layout
from ssl.data.jpeg_window import decode_window
from ssl.data.stream import StreamError

if TYPE_CHECKING:
    from ssl.data.sources import Source

# A file that has vanished or cannot be read counts as bad, like one that cannot be decoded.
UNREADABLE = (DecodeError, OSError)
LARGEST_KEPT = 64 * 2**20  # bytes of a decoded image whose memory a thread keeps for the next


class OtherSize(DecodeError):
    """An image has another size than its header, or the rest of its set, promised."""


class Reader:
    """Reads images with a given number of channels; names the image where an error is no fault of its file."""

    def __init__(self, source: Source, *, channels: int):
        self.source = source
        self.channels = channels
        self._scratch = threading.local()

    def read(self, index: int) -> bytes | np.ndarray:
        """An image as the source has it. Raises OSError where its file cannot be read, StreamError for its group."""
        try:
            return self.source.read(index)
        except (*UNREADABLE, StreamError):
            raise
        except Exception as error:
            raise self._named(index, error) from error

    def open(self, index: int) -> tuple[bytes | np.ndarray, tuple[int, int]]:
        """An image as the source has it, and its (height, width) from the header. Raises DecodeError or OSError."""
        data = self.read(index)
        return data, (data.shape[0], data.shape[1]) if isinstance(data, np.ndarray) else image_size(data)

    def open_rows(self, index: int) -> tuple[bytes | np.ndarray, tuple[int, int], Layout | None]:
        """What `open` gives, and the layout by which less than the whole image may be decoded."""
        data = self.read(index)
        if isinstance(data, np.ndarray):
            return data, (data.shape[0], data.shape[1]), None
        layout = read_layout(data)
        return data, image_size(data) if layout is None else (layout.height, layout.width), layout

    def decode_window(
        self,
        index: int,
        data: bytes | np.ndarray,
        size: tuple[int, int],
        layout: Layout | None,
        box: tuple[int, int, int, int],
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Pixels, uint8 (R, S, C), with those of the box (top, left, height, width), and (top, left) of the first.

        Valid, and raises, as `decode`.
        """
        buffer = None if layout is None else self._buffer(box[2:])
        if buffer is not None and self.channels in (1, 3):
            assert isinstance(data, bytes)
            pixels = decode_window(data, box, self.channels, buffer)
            if pixels is not None:
                return pixels, box[:2]
        rows, first = self.decode_rows(index, data, size, layout, box[0], box[0] + box[2])
        return rows, (first, 0)

    def decode_rows(
        self, index: int, data: bytes | np.ndarray, size: tuple[int, int], layout: Layout | None, top: int, bottom: int
    ) -> tuple[np.ndarray, int]:
        """Rows of pixels, uint8 (R, W, C), those from `top` to `bottom` among them, and the number of the first.

        Valid, and raises, as `decode`.
        """
        buffer = None if layout is None else self._buffer(size)
        if layout is not None and buffer is not None:
            assert isinstance(data, bytes)
            rows = decode_rows(data, layout, top, bottom, channels=self.channels, buffer=buffer)
            if rows is not None:
                return rows
        return self.decode(index, data, size), 0

    def decode(self, index: int, data: bytes | np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The pixels, uint8 (H, W, C), valid until this thread decodes the next image.

        Raises DecodeError, and OtherSize where they are not of the (height, width) that was promised.
        """
        try:
            image = data if isinstance(data, np.ndarray) else decode(data, self.channels, buffer=self._buffer(size))
        except UNREADABLE:
            raise
        except Exception as error:
            raise self._named(index, error) from error
        if image.shape[2] != self.channels:
            raise ValueError(
                f"{self.source.describe(index)} has {image.shape[2]} channels, data.channels={self.channels}; "
                f"set data.channels={image.shape[2]}"
            )
        if image.shape[:2] != size:
            raise OtherSize(f"the header tells {size[0]}x{size[1]} pixels, the image has {image.shape[:2]}")
        return image

    def _buffer(self, size: tuple[int, int]) -> np.ndarray | None:
        """This thread's memory for an image of (height, width), if it is not too large to be kept."""
        needed = size[0] * size[1] * self.channels
        if needed > LARGEST_KEPT:
            return None
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None or buffer.size < needed:
            self._scratch.buffer = buffer = np.empty(needed, np.uint8)
        return buffer

    def _named(self, index: int, error: Exception) -> RuntimeError:
        return RuntimeError(f"reading {self.source.describe(index)}: {type(error).__name__}: {error}")
