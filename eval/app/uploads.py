"""What a browser sends as an image: read into bounded memory, told by its content, measured before it is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import AsyncIterator

import numpy as np
from PIL import Image

from ssl.data.decode import DecodeError, decode

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
ACCEPTED = "JPEG, PNG, WebP, GIF or BMP"
MAX_SCANS = (
    100  # of a progressive JPEG, which has about ten; each costs a pass over all pixels, however few bytes it has
)


class Refused(ValueError):
    """A request that is not answered: the message is for the person who sent it, `status` for the browser."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


async def read_body(stream: AsyncIterator[bytes], *, declared: str | None, limit: int) -> bytes:
    """The body of a request, of at most `limit` bytes; `declared` is its Content-Length header, which may lie or lack.

    Raises Refused before the first byte where the header names more, else as soon as more have come.
    """
    if declared is not None and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in stream:
        if len(body) + len(chunk) > limit:
            raise _too_large(limit)
        body += chunk
    return bytes(body)


def decode_upload(data: bytes, *, channels: int, max_pixels: int) -> tuple[np.ndarray, list[str]]:
    """The pixels of an uploaded image, uint8 (H, W, C) as training decodes them, and what was left out of it.

    Raises Refused for what is none of the accepted formats, is damaged, or has more than `max_pixels`, which its header
    tells before anything is decoded.
    """
    if not data:
        raise Refused(400, "no image came with the request; choose one")
    notes = check_header(data, max_pixels=max_pixels)
    try:
        return decode(data, channels), notes
    except DecodeError as error:
        raise Refused(422, f"this image is damaged or cut off and cannot be decoded ({error})") from error


def check_header(data: bytes, *, max_pixels: int) -> list[str]:
    """What decoding will leave out, in words; raises Refused as `decode_upload` does. No pixel is decoded."""
    size = webp_size(data)
    if size is not None:  # Pillow's reader makes the canvas of a WebP image when it opens it
        _check_pixels(*size, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # measured here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(*image.size, max_pixels)
                # a photo with a preview, or a second view, beside it is a JPEG too, which Pillow calls an MPO
                is_jpeg = data.startswith(b"\xff\xd8\xff")
                is_animated = not is_jpeg and bool(getattr(image, "is_animated", False))
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(max_pixels) from error
    except Image.UnidentifiedImageError as error:
        raise Refused(
            415,
            f"this is no {ACCEPTED} image, whatever its name says, or the beginning of it is damaged; "
            "export it as one of them and try again",
        ) from error
    except Refused:
        raise
    except Exception as error:  # on malformed headers Pillow's plugins raise nearly anything
        raise Refused(422, "the header of this image is damaged, so it cannot be read") from error
    if is_jpeg and data.count(b"\xff\xda") > MAX_SCANS:  # within the pixels' bytes an FF is followed by 00
        raise Refused(422, f"this JPEG has more than {MAX_SCANS} scans, which no camera writes; save it again")
    return ["it is animated; its first frame was used"] if is_animated else []


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header of a WebP file (RFC 9649, sections 2.5 to 2.7), None of any other."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _too_many_pixels(max_pixels, f"{width:,} x {height:,} pixels, more than")


def _too_many_pixels(max_pixels: int, given: str = "more pixels than") -> Refused:
    return Refused(
        413, f"this image has {given} the {max_pixels / 1e6:g} million that are taken; make it smaller first"
    )


def _too_large(limit: int) -> Refused:
    return Refused(413, f"this file is larger than the {limit / 2**20:,.4g} MiB that are taken; make it smaller first")
