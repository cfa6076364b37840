"""Pixels from the coefficients of JPEGs, against libjpeg's for the same files and against a DCT in floating point."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from scipy.fft import idctn
from scipy.ndimage import gaussian_filter

pytest.importorskip("numba")

from ssl.data.jpeg_pixels import idct, to_gray, to_rgb

ZIGZAG = sorted(range(64), key=lambda z: (z // 8 + z % 8, (z // 8 if (z // 8 + z % 8) % 2 else z % 8)))
SUBSAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}


class Bits:
    """Reads the Huffman-coded part of a JPEG."""

    def __init__(self, data: bytes) -> None:
        data = data.replace(b"\xff\x00", b"\xff")
        self.bits, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self.left -= count
        return self.bits >> self.left & ((1 << count) - 1)

    def symbol(self, codes: dict[tuple[int, int], int]) -> int:
        length = code = 0
        while (length, code) not in codes:
            length, code = length + 1, code << 1 | self.take(1)
        return codes[length, code]

    def number(self, count: int) -> int:
        value = self.take(count)
        return value if count == 0 or value >> (count - 1) else value - (1 << count) + 1


def read_coefficients(data: bytes) -> tuple[int, int, list]:
    """Height, width, and of each component: its samples per MCU, its table, its coefficients (rows, 65, stride)."""
    tables, codes, frame, place = {}, {}, b"", 2
    while True:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        body, place = data[place + 4 : place + 2 + length], place + 2 + length
        if marker == 0xDB:
            for start in range(0, len(body), 65):
                tables[body[start]] = np.zeros(64, np.int32)
                tables[body[start]][ZIGZAG] = list(body[start + 1 : start + 65])
        elif marker == 0xC4:
            while body:
                code, symbols, counts = 0, iter(body[17:]), body[1:17]
                table = codes[body[0]] = {}
                for bits, count in enumerate(counts, 1):
                    table |= {(bits, code + k): next(symbols) for k in range(count)}
                    code = (code + count) << 1
                body = body[17 + sum(counts) :]
        elif marker == 0xC0:
            frame = body
        elif marker == 0xDA:
            break
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    parts = [frame[at : at + 3] for at in range(6, len(frame), 3)]
    sampling = [(part[1] >> 4, part[1] & 15) if len(parts) == 3 else (1, 1) for part in parts]
    across, down = -(-width // (8 * sampling[0][0])), -(-height // (8 * sampling[0][1]))
    blocks = [np.zeros((down * v, 65, -(-across * h // 16) * 16), np.int16) for h, v in sampling]
    bits, last = Bits(data[place:-2] + bytes(4)), [0] * len(parts)
    for row, column in itertools.product(range(down), range(across)):
        for part, (h, v) in enumerate(sampling):
            chroma = 1 if part else 0
            for dy, dx in itertools.product(range(v), range(h)):
                block = blocks[part][row * v + dy, :, column * h + dx]
                last[part] += bits.number(bits.symbol(codes[chroma]))
                block[0], k = last[part], 1
                while k < 64:
                    run, size = divmod(bits.symbol(codes[16 | chroma]), 16)
                    if (run, size) == (0, 0):
                        break
                    block[ZIGZAG[k + run]] = bits.number(size)
                    k += run + 1
    return height, width, [(s, tables[part[2]], b, across * s[0]) for s, part, b in zip(sampling, parts, blocks)]


def planes_of(data: bytes) -> tuple[int, int, list[np.ndarray]]:
    """Height, width, and the samples of each component with what fills its blocks."""
    height, width, components = read_coefficients(data)
    planes = []
    for _, table, blocks, num_blocks in components:
        plane = np.full((8 * len(blocks), 8 * blocks.shape[2]), 77, np.uint8)
        for row, coefficients in enumerate(blocks):
            assert idct(coefficients, table, plane, 8 * row, num_blocks)
        planes.append(plane)
    return height, width, planes


def picture(height: int, width: int, channels: int, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    """From smooth (0) to noise with sharp colours (1)."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(float)
    smooth = gaussian_filter(values, (3, 3, 0))
    smooth = (smooth - smooth.min()) / max(float(np.ptp(smooth)), 1) * 255
    return (noise * values + (1 - noise) * smooth).astype(np.uint8)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "JPEG", **options)
    return file.getvalue()


# ---- inverse DCT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks", [1, 15, 16, 17, 50])
def test_idct_is_that_of_floating_point_to_a_level(num_blocks):
    rng = np.random.default_rng(num_blocks)
    quantization = rng.integers(1, 30, 64).astype(np.int32)
    spread = 600 / (1 + np.add.outer(np.arange(8), np.arange(8)).ravel()) ** 2
    coefficients = np.zeros((65, -(-num_blocks // 16) * 16 + 16), np.int16)
    coefficients[:64, :num_blocks] = rng.normal(0, (spread / quantization)[:, None], (64, num_blocks))
    coefficients[64] = 32767  # is not read
    plane = np.full((24, 8 * coefficients.shape[1]), 77, np.uint8)
    assert idct(coefficients, quantization, plane, 8, num_blocks) is True
    blocks = (coefficients[:64] * quantization[:, None]).T.reshape(-1, 8, 8)
    exact = np.asarray(idctn(blocks[:num_blocks].astype(float), axes=(1, 2), norm="ortho")).clip(-128, 127) + 128
    exact = exact.transpose(1, 0, 2).reshape(8, -1)
    difference = plane[8:16, : 8 * num_blocks] - exact
    assert np.abs(difference).max() <= 1
    assert np.abs(difference).mean() < 0.3
    assert (plane[:8] == 77).all()
    assert (plane[16:] == 77).all()


@pytest.mark.parametrize("place", [(0, 0), (63, 0), (1, 20), (9, 15), (32, 31)])
def test_idct_refuses_coefficients_beyond_14_bits(place):
    """4096 * 128 * 8192 is 0 in 32 bits: the first pass alone would not see that."""
    coefficients, table = np.zeros((65, 32), np.int16), np.ones(64, np.int32)
    plane = np.zeros((8, 256), np.uint8)
    coefficients[place] = 2900
    assert idct(coefficients, table, plane, 0, 32)
    table[place[0]] = 128
    for value in (4096, -4096, 129, -129, 32767, -32768):
        coefficients[place] = value
        assert not idct(coefficients, table, plane, 0, 32)


def test_idct_refuses_results_of_the_first_pass_beyond_14_bits():
    coefficients = np.zeros((65, 16), np.int16)
    plane = np.zeros((8, 128), np.uint8)
    unit = np.ones(64, np.int32)
    for value, fits in ((4095, True), (4096, False), (-4096, True), (-4097, False)):
        coefficients[0, 3] = value
        assert idct(coefficients, unit, plane, 0, 16) is fits


@pytest.mark.parametrize("noise", [0, 0.2, 1])
@pytest.mark.parametrize("quality", [1, 5, 20, 50, 75, 90, 95, 100])
def test_gray_pixels_are_those_of_libjpeg(quality, noise):
    data = jpeg(picture(40, 75, 1, noise, quality), quality=quality)
    height, width, (plane,) = planes_of(data)
    expected = simplejpeg.decode_jpeg(data, "GRAY", strict=True)
    np.testing.assert_array_equal(plane[:height, :width], expected[..., 0])
    for top, left, bottom, right in ((5, 31, 22, 40), (0, 0, height, width), (39, 10, 40, 74)):
        out = np.zeros((bottom - top, right - left, 1), np.uint8)
        to_gray(plane, top, left, out)
        np.testing.assert_array_equal(out, expected[top:bottom, left:right])


def test_blocks_of_black_and_white_are_those_of_libjpeg():
    """Every coefficient as large as pixels can make it."""
    pixels = 255 * np.random.default_rng(0).integers(0, 2, (64, 128, 1)).astype(np.uint8)
    for quality in (1, 30, 100):
        data = jpeg(pixels, quality=quality)
        np.testing.assert_array_equal(planes_of(data)[2][0], simplejpeg.decode_jpeg(data, "GRAY", strict=True)[..., 0])


# ---- colour ----------------------------------------------------------------------------------------------------------


def windowed(data: bytes, sampling: tuple[int, int], box: tuple[int, int, int, int], margin: int) -> np.ndarray:
    """Pixels of `box` from planes that begin `margin` samples of chroma before it; all other samples are spoiled."""
    height, width, planes = planes_of(data)
    (across, down), (top, left, bottom, right) = sampling, box
    chroma_height, chroma_width = -(-height // down), -(-width // across)
    y_top, y_left = max(top - 3 * margin, 0), max(left - 3 * margin, 0)
    chroma_top, chroma_left = max(top // down - margin, 0), max(left // across - margin, 0)
    y = np.ascontiguousarray(planes[0][y_top:bottom, y_left:right])
    rows = slice(chroma_top, min((bottom - 1) // down + 1 + margin, chroma_height))
    columns = slice(chroma_left, min((right - 1) // across + 1 + margin, chroma_width))
    cb, cr = (np.pad(plane[rows, columns], ((0, 1), (0, 3)), constant_values=99) for plane in planes[1:])
    out = np.zeros((bottom - top, right - left, 3), np.uint8)
    origins = (y_top, y_left, chroma_top, chroma_left)
    to_rgb(y, cb, cr, *origins, across, down, chroma_height, chroma_width, top, left, out)
    return out


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_colours_of_small_images_are_those_of_libjpeg(subsampling):
    for size in [
        *itertools.product(range(1, 8), range(1, 8)),
        (1, 40),
        (40, 1),
        (17, 33),
        (16, 16),
        (39, 31),
        (18, 34),
    ]:
        data = jpeg(picture(*size, 3, seed=sum(size)), quality=90, subsampling=subsampling)
        expected = simplejpeg.decode_jpeg(data, "RGB", strict=True)
        for margin in (1, 50):
            pixels = windowed(data, SUBSAMPLINGS[subsampling], (0, 0, *size), margin)
            np.testing.assert_array_equal(pixels, expected, str((size, margin)))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", [(37, 61), (19, 64), (24, 129), (21, 150), (9, 271)])
def test_colours_of_parts_are_those_of_libjpeg(size, subsampling):
    rng = np.random.default_rng(size[1])
    data = jpeg(picture(size[0], size[1], 3, noise=0.6), quality=95, subsampling=subsampling)
    expected = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    for _ in range(20):
        top, left = (int(rng.integers(0, side)) for side in size)
        bottom, right = (int(rng.integers(first, side)) + 1 for first, side in zip((top, left), size))
        pixels = windowed(data, SUBSAMPLINGS[subsampling], (top, left, bottom, right), int(rng.integers(1, 9)))
        np.testing.assert_array_equal(pixels, expected[top:bottom, left:right])


@pytest.mark.parametrize("light", [0, 77, 128, 255])
def test_every_colour_is_that_of_libjpeg(light):
    """All of Cb and Cr, every pair as a flat block, of which a JPEG of quality 100 holds the exact values."""
    blue, red = np.mgrid[:256, :256].astype(np.uint8)
    planes = np.stack([np.full_like(blue, light), blue, red])
    large = Image.merge("YCbCr", [Image.fromarray(plane.repeat(8, 0).repeat(8, 1)) for plane in planes])
    file = io.BytesIO()
    large.save(file, "JPEG", quality=100, subsampling="4:4:4")
    expected = simplejpeg.decode_jpeg(file.getvalue(), "RGB", strict=True)[4::8, 4::8]
    out = np.zeros((256, 256, 3), np.uint8)
    to_rgb(*planes, 0, 0, 0, 0, 1, 1, 256, 256, 0, 0, out)
    np.testing.assert_array_equal(out, expected)
