"""Decoding, against Pillow and torchvision."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as tv

from ssl.data import decode as module
from ssl.data.decode import _RESIZE as RESIZE
from ssl.data.decode import DecodeError, crop_resize, crop_resize_into, decode, image_size

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_sample"


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A soft random picture, uint8 (H, W, C)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
    return buffer.getvalue()


def with_orientation(image: Image.Image, format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, format, exif=exif)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoding_equals_pillow(format, mode):
    data = encode(Image.fromarray(smooth(37, 53)).convert(mode), format)
    want = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode(data, 3), np.asarray(want.convert("RGB")))
    assert decode(data, 1).shape == (37, 53, 1)
    assert (
        np.abs(decode(data, 1)[..., 0].astype(int) - np.asarray(want.convert("L"))).max() <= 3
    )  # luma before rounding
    assert image_size(data) == (37, 53)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "I;16"])
def test_every_png_mode_decodes_to_what_convert_gives(mode):
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16))
    else:
        image = Image.fromarray(smooth(20, 30, 4), "RGBA")
        image = image.convert("RGB").convert(mode) if mode in ("1", "P") else image.convert(mode)
    data = encode(image, "PNG")
    pixels = decode(data, 3)
    assert pixels.shape == (20, 30, 3)
    assert pixels.dtype == np.uint8
    assert decode(data, 1).shape == (20, 30, 1)
    if mode == "I;16":
        np.testing.assert_array_equal(pixels[..., 0], np.round(np.asarray(image) / 257.0))
        assert pixels.min() == 0
        assert pixels.max() == 255
    else:
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_not_clipped(format):
    image = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    np.testing.assert_array_equal(decode(encode(image, format), 1)[0, :, 0], [0, 1, 128, 255])


def test_transparent_palette_decodes_without_warning(recwarn):
    image = Image.fromarray(smooth(16, 16)).quantize(8)
    data = encode(image, "PNG", transparency=bytes(range(8)))
    np.testing.assert_array_equal(decode(data, 3), np.asarray(image.convert("RGB")))
    assert not recwarn.list


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.fromarray(np.full((9, 7, 3), value, np.uint8)) for value in (10, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    pixels = decode(data, 3)
    assert pixels.shape == (9, 7, 3)
    assert np.abs(pixels.astype(int) - 10).max() <= 1


def test_cmyk_jpeg_equals_pillow():
    data = encode(Image.fromarray(smooth(24, 32)).convert("CMYK"), "JPEG", quality=95)
    np.testing.assert_array_equal(decode(data, 3), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_as_pillow_applies_it(format, orientation):
    data = with_orientation(Image.fromarray(smooth(16, 24)), format, orientation)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode(data, 3), want)
    assert image_size(data) == want.shape[:2]
    assert decode(data, 3).flags.c_contiguous


def test_orientation_of_a_big_endian_exif_block_behind_other_segments_is_found():
    plain = encode(smooth(8, 16), "JPEG")
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    tiff = b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", 1) + entry + b"\0\0\0\0"
    segment = b"Exif\0\0" + tiff
    comment = b"\xff\xfe" + struct.pack(">H", 7) + b"hello"
    data = plain[:2] + comment + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]
    assert image_size(data) == (16, 8)
    assert image_size(plain[:2] + b"\xff\xe1\0\x08Exif\0\0" + plain[2:]) == (8, 16)  # an empty block is passed over


@pytest.mark.parametrize("kept", [0.99, 0.7, 0.3])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_file_is_an_error(format, kept):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encode(noise, format)
    with pytest.raises(DecodeError):
        decode(data[: int(len(data) * kept)], 3)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(DecodeError):
        decode(data, 3)
    with pytest.raises(DecodeError):
        image_size(data)


def test_stray_bytes_in_a_jpeg_are_passed_over():
    data = encode(smooth(16, 16), "JPEG")
    stray = data[:-2] + b"\0\0\0" + data[-2:]
    assert decode(stray, 3).shape == (16, 16, 3)


def test_decompression_bomb_is_refused_from_its_header():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(DecodeError, match="13000x13000"):
        decode(bomb, 3)


def test_large_jpeg_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    with pytest.raises(DecodeError, match="resize it first"):
        decode(encode(smooth(20, 20), "JPEG"), 3)


def test_float_image_is_refused_with_what_to_do():
    data = encode(Image.fromarray(np.random.default_rng(0).random((8, 8), dtype=np.float32)), "TIFF")
    with pytest.raises(DecodeError, match="8 or 16 bits"):
        decode(data, 3)


def test_other_channel_counts_say_which_are_allowed():
    with pytest.raises(ValueError, match=r"1 \(luma\) or 3 \(RGB\)"):
        decode(encode(smooth(8, 8), "PNG"), 4)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("box", [(0, 0, 61, 83), (5, 9, 40, 33), (13, 2, 11, 70)])
@pytest.mark.parametrize("size", [(24, 24), (32, 17), (70, 90)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_resize_equal_pillow_and_torchvision(interpolation, box, size, channels):
    image = smooth(61, 83, channels)
    top, left, height, width = box
    got = crop_resize(image, box, size, interpolation)
    assert got.shape == (channels, *size)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    crop = image[top : top + height, left : left + width]
    pillow = Image.fromarray(crop.squeeze()).resize(size[::-1], Image.Resampling[interpolation.upper()])
    want = np.asarray(pillow).reshape(*size, channels).transpose(2, 0, 1)
    assert np.abs(got.astype(int) - want).max() <= 2
    assert np.abs(got.astype(int) - want).mean() < 0.2
    whole = torch.from_numpy(image).permute(2, 0, 1)
    mode = tv.InterpolationMode[interpolation.upper()]
    torchvision = tv.resized_crop(whole, top, left, height, width, list(size), mode, antialias=True)
    assert np.abs(got.astype(int) - torchvision.numpy()).max() <= 1


def test_crop_of_the_target_size_is_exact_and_leaves_read_only_sources_alone(recwarn):
    image = smooth(20, 30)
    image.setflags(write=False)
    got = crop_resize(image, (3, 4, 10, 12), (10, 12))
    np.testing.assert_array_equal(got, image[3:13, 4:16].transpose(2, 0, 1))
    assert not recwarn.list


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("box", [(0, 0, 61, 83), (5, 9, 40, 33), (13, 2, 24, 17), (60, 82, 1, 1)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("together", [True, False], ids=["channels together", "channels apart"])
def test_a_crop_written_into_memory_is_the_same_whatever_lies_together_there(
    interpolation, box, channels, together, has_kernel, monkeypatch
):
    if not has_kernel:
        monkeypatch.setitem(RESIZE, interpolation, None)
    image = np.random.default_rng(0).integers(0, 256, (61, 83, channels), dtype=np.uint8)
    want = crop_resize(image, box, (24, 17), interpolation)
    if together:
        out = torch.zeros(3, 24, 17, channels, dtype=torch.uint8).permute(0, 3, 1, 2)
    else:
        out = torch.zeros(3, channels, 24, 17, dtype=torch.uint8)
    crop_resize_into(out[1], image, box, interpolation)
    np.testing.assert_array_equal(out[1].numpy(), want)
    assert not out[[0, 2]].any()


def jpeg_441() -> bytes:
    """A JPEG whose chroma has a fourth of the rows: 4:1:1 with its blocks called one above the other, not beside."""
    data = bytearray(simplejpeg.encode_jpeg(smooth(32, 128), 85, colorsubsampling="411"))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x41
    data[frame + 5 : frame + 9] = bytes([0, 128, 0, 32])
    data[frame + 11] = 0x14
    return bytes(data)


def test_a_sampling_without_a_name_is_decoded_by_pillow():
    data = jpeg_441()
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert image_size(data) == (128, 32)
    np.testing.assert_array_equal(decode(data), expected)


def test_the_luma_of_a_jpeg_is_the_files_whichever_decoder_takes_it():
    good = encode(smooth(64, 48), "JPEG", subsampling="4:2:0", restart_marker_rows=1)
    at = good.index(b"\xff\xd0")
    warned = good[:at] + b"\0\0" + good[at:]  # bytes before a marker: simplejpeg refuses them, Pillow passes over them
    np.testing.assert_array_equal(decode(warned, 1), decode(good, 1))


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs ../shared/data/imagenet_sample")
def test_real_photos_decode_to_pillows_pixels():
    for path in sorted(PHOTOS.iterdir())[::20]:
        data = path.read_bytes()
        want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode(data, 3), want)
        assert image_size(data) == want.shape[:2]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_of_the_whole_image_is_a_copy(channels: int):
    """The memory of an image may be that of the next one."""
    image = np.zeros((6, 5, channels), np.uint8)
    crop = crop_resize(image, (0, 0, 6, 5), (6, 5))
    image[:] = 1
    assert crop.shape == (channels, 6, 5)
    assert not crop.any()
