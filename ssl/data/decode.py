"""Encoded bytes to uint8 pixels, and the crop and resize of a view.

JPEGs go through simplejpeg with libjpeg-turbo's accurate DCT and smooth chroma upsampling, which gives Pillow's pixels
exactly; the fast DCT gained 3 % on 200 ImageNet photos and moved pixels by 1.2 levels on average. Everything else goes
through Pillow. Both release the interpreter lock while they decode.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional

MAX_PIXELS = 89_478_485
"""Larger images are refused as decompression bombs; Pillow's own limit, 256 MiB as RGB."""

_MODES = {1: "L", 3: "RGB"}
_JPEG = b"\xff\xd8\xff"
_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)
# What `functional.interpolate` calls, which alone takes memory for its result; None where torch has it no more.
_KERNELS = getattr(torch._C, "_nn", None)
_RESIZE = {
    "bicubic": getattr(_KERNELS, "_upsample_bicubic2d_aa", None),
    "bilinear": getattr(_KERNELS, "_upsample_bilinear2d_aa", None),
}


class DecodeError(ValueError):
    """The bytes are no image that can be decoded; the message says why."""


def decode(data: bytes, channels: int = 3, *, buffer: np.ndarray | None = None) -> np.ndarray:
    """The pixels of an encoded image, uint8 (H, W, C), upright by its EXIF orientation.

    Three channels are RGB, one is luma (ITU-R 601). Alpha is dropped as Pillow's `convert("RGB")` drops it, palettes
    and CMYK are resolved, 16-bit gray is scaled to 8 bits, and of an animation the first frame is taken. Raises
    DecodeError for anything else, a truncated file and an image above `MAX_PIXELS` included, and ValueError for other
    `channels`. Where a uint8 `buffer` is given and large enough, the pixels may lie in it, until it is given again:
    memory that has been touched before makes decoding a JPEG of 500x375 pixels 13 % faster.
    """
    if channels not in _MODES:
        raise ValueError(
            f"encoded images decode to 1 (luma) or 3 (RGB) channels, got channels={channels}; "
            "other counts need a source whose read() returns uint8 arrays"
        )
    if data[:3] == _JPEG:
        pixels = _decode_jpeg(data, channels, buffer)
        if pixels is not None:
            return upright(pixels, exif_orientation(data))
    return _decode_with_pillow(data, channels)


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width after EXIF orientation, read from the header alone. Raises DecodeError."""
    if data[:3] == _JPEG:
        try:
            height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data)[:2])
            return (width, height) if exif_orientation(data) in _SWAPS_SIDES else (height, width)
        except ValueError as error:
            raise DecodeError(f"JPEG header: {error}") from error
        except KeyError:  # a sampling of colours that simplejpeg has no name for, as 4:4:1
            pass
    with _open(data) as image:
        width, height = image.size
        swapped = _pillow_orientation(image) in _SWAPS_SIDES
    return (width, height) if swapped else (height, width)


def crop_resize(
    image: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: str = "bicubic"
) -> np.ndarray:
    """The box (top, left, height, width) of `image` (H, W, C) at `size` (h, w), uint8 (C, h, w).

    Antialiased `bicubic` or `bilinear`: Pillow's `resize` of the cropped box, to one or two levels.
    """
    pixels = _cut(image, box)  # (1, C, height, width)
    if pixels.shape[2:] == tuple(size):
        return pixels[0].clone(memory_format=torch.contiguous_format).numpy()
    pixels = functional.interpolate(pixels, tuple(size), mode=interpolation, antialias=True)  # (1, C, h, w)
    return pixels[0].contiguous().numpy()


def crop_resize_into(
    out: torch.Tensor, image: np.ndarray, box: tuple[int, int, int, int], interpolation: str = "bicubic"
) -> None:
    """What `crop_resize` returns, written to `out`, uint8 (C, h, w); fastest if its channels lie together in memory.

    Torch's kernel then need not part the channels of its result, which takes 40 of 107 microseconds at 224 pixels.
    """
    pixels = _cut(image, box)  # (1, C, height, width)
    resize = _RESIZE[interpolation]
    if pixels.shape[2:] == out.shape[1:]:
        out.copy_(pixels[0])
    elif resize is None:
        out.copy_(functional.interpolate(pixels, tuple(out.shape[1:]), mode=interpolation, antialias=True)[0])
    else:
        resize(pixels, out.shape[1:], False, None, None, out=out[None])


def _cut(image: np.ndarray, box: tuple[int, int, int, int]) -> torch.Tensor:
    """The box of an image (H, W, C) as a tensor (1, C, height, width) whose channels lie together in memory.

    Torch's vectorised uint8 kernel reads such memory; a copy of the box, unless it is the whole image, costs less than
    its own unpacking.
    """
    top, left, height, width = (int(number) for number in box)
    pixels = np.require(image[top : top + height, left : left + width], requirements=("C", "W"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, C) turned as EXIF `orientation` 1..8 asks; contiguous."""
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in _SWAPS_SIDES:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


def exif_orientation(data: bytes) -> int:
    """EXIF orientation 1..8 of a JPEG, 1 where there is none or it makes no sense. Reads the first segments only."""
    place = 2
    while data[place : place + 1] == b"\xff":
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker in (0xDA, 0xD9) or length < 2:  # pixels begin, or the file is broken
            return 1
        if marker == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            return _tiff_orientation(data[place + 10 : place + 2 + length])
        place += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block."""
    if tiff[:2] not in (b"II", b"MM"):
        return 1

    def number(place: int, length: int) -> int:
        return int.from_bytes(tiff[place : place + length], "little" if tiff[:2] == b"II" else "big")

    directory = number(4, 4)
    for entry in range(number(directory, 2)):
        place = directory + 2 + 12 * entry
        if place + 12 > len(tiff):
            break
        if number(place, 2) == _ORIENTATION:
            value = number(place + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _decode_jpeg(data: bytes, channels: int, buffer: np.ndarray | None) -> np.ndarray | None:
    """Pixels of an RGB, YCbCr or gray JPEG; None where Pillow should have a look at it."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("CMYK", "YCCK"):  # Adobe stores these inverted, which Pillow undoes
            return None
        _check_pixels(int(height), int(width))
        if buffer is not None and buffer.size < int(height) * int(width) * channels:
            buffer = None
        return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", strict=True, buffer=buffer)
    except DecodeError:
        raise
    except KeyError:  # as in `image_size`
        return None
    except ValueError as error:
        # Strict mode also refuses harmless warnings, such as stray bytes before a marker, which Pillow passes over.
        # Truncation is no such thing: lenient decoders fill the missing part with gray.
        if "premature end" in str(error).lower():
            raise DecodeError(f"truncated JPEG: {error}") from error
        return None


def _decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    with _open(data) as image:
        _check_pixels(image.height, image.width)
        try:
            orientation = _pillow_orientation(image)
            if channels == 1 and image.format == "JPEG":
                image.draft("L", None)  # the luma that the file has, as simplejpeg takes it; not that of its RGB
            image.load()
            pixels = _to_8_bit(image, channels)
        except DecodeError:
            raise
        except Exception as error:  # on malformed bytes Pillow's plugins raise nearly anything
            raise DecodeError(f"{image.format}: {error or type(error).__name__}") from error
    return upright(pixels.reshape(*pixels.shape[:2], channels), orientation)


def _to_8_bit(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3). 16-bit gray is divided by 257 and rounded, so that white stays white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        gray = np.asarray(image).astype(np.int64).clip(0, 65535)
        gray = ((gray + 128) // 257).astype(np.uint8)
        return gray if channels == 1 else np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise DecodeError(
            f"{image.format}: 32-bit pixels (mode {image.mode}) have no fixed range; store them with 8 or 16 bits"
        )
    image.info.pop("transparency", None)  # dropped below in any case; with it Pillow warns on palettes
    return np.asarray(image.convert(_MODES[channels]))


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DecodeError("the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # which tells where the bytes lie in memory
        raise DecodeError(f"no image that can be read: it begins with {bytes(data[:16])!r}") from error
    except Exception as error:  # as above; includes Pillow's own error for decompression bombs
        raise DecodeError(f"no image that can be read: it begins with {bytes(data[:16])!r} ({error})") from error


def _pillow_orientation(image: Image.Image) -> int:
    """EXIF orientation that is still to be applied; Pillow applies a TIFF's by itself.

    Not `getexif()`, which decodes a whole PNG in search of a block behind its pixels.
    """
    exif = image.info.get("exif")
    if image.format == "TIFF" or not isinstance(exif, bytes):
        return 1
    return _tiff_orientation(exif.removeprefix(b"Exif\0\0"))


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{width}x{height} pixels are more than the {MAX_PIXELS:,} that are allowed; resize it first")
