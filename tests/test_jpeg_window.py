"""Decoding the window of a JPEG that a crop needs, against Pillow's decoding of the whole file."""

from __future__ import annotations

import logging
import sys
import threading

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from ssl.data import jpeg_window
from ssl.data import reader as module
from ssl.data.decode import DecodeError, decode
from ssl.data.jpeg_rows import read_layout
from ssl.data.jpeg_window import decode_window
from ssl.data.loader import Loader
from ssl.data.reader import Reader
from ssl.data.views import View
from tests.image_list import ImageList
from tests.test_decode import PHOTOS, encode, smooth, with_orientation
from tests.test_jpeg_rows import END, MARKED, SUBSAMPLINGS, UNUSUAL, UNUSUAL_MARKERS, jpeg, noise, pillow

pytest.importorskip("numba")
from ssl.data import jpeg_header, jpeg_scan

Box = tuple[int, int, int, int]


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    assert jpeg_window.compile_decoder()


def boxes(height: int, width: int, number: int = 25) -> list[Box]:
    """The whole, its corners and its first and last pixels, and some at random."""
    chosen = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (height - 1, 0, 1, width)]
    chosen += [
        (0, 0, height, 1),
        (0, width // 2, height, width - width // 2),
        (height // 2, 0, height - height // 2, 1),
    ]
    generator = np.random.default_rng(height * 1000 + width)
    for _ in range(number):
        (top, bottom), (left, right) = (np.sort(generator.integers(0, side + 1, 2)) for side in (height, width))
        chosen.append((int(top), int(left), int(max(bottom - top, 1)), int(max(right - left, 1))))
    return [box for box in chosen if box[0] + box[2] <= height and box[1] + box[3] <= width]


def window(data: bytes, box: Box, channels: int = 3) -> np.ndarray | None:
    pixels = decode_window(data, box, channels, np.full(box[2] * box[3] * channels + 5, 7, np.uint8))
    return None if pixels is None else pixels.copy()


def part(image: np.ndarray, box: Box) -> np.ndarray:
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def check_windows(data: bytes, whole: np.ndarray, channels: int = 3, number: int = 25) -> None:
    for box in boxes(*whole.shape[:2], number):
        pixels = window(data, box, channels)
        if pixels is None:  # with so little behind it that libjpeg decodes the whole file
            assert whole.shape[0] - box[0] - box[2] > 0
            assert len(data) < 1000
            continue
        np.testing.assert_array_equal(pixels, part(whole, box), err_msg=str(box))


# ---- which pixels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart_rows", [0, 1, 3])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", [(61, 53), (64, 48), (49, 16), (150, 9), (33, 300), (8, 8)])
def test_windows_are_those_of_the_whole_image(size, subsampling, restart_rows):
    data = jpeg(noise(*size), subsampling, restart_rows)
    check_windows(data, pillow(data))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_windows_of_tiny_images_are_those_of_the_whole_image(subsampling):
    for height in range(1, 12):
        for width in range(1, 36):
            data = jpeg(noise(height, width), subsampling)
            check_windows(data, pillow(data), number=4)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_windows_are_those_of_the_whole_image_at_any_quality(subsampling, optimize):
    """At quality 1 most quantisers are 255, at 100 they are 1 and codes are long."""
    for quality in (1, 2, 5, 10, 30, 60, 75, 90, 97, 100):
        for image in (noise(40, 56), smooth(40, 56)):
            data = jpeg(image, subsampling, quality=quality, optimize=optimize)
            check_windows(data, pillow(data), number=8)


@pytest.mark.parametrize("restart_rows", [0, 1])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_one_channel_is_the_luma_of_the_whole_image(subsampling, restart_rows):
    data = jpeg(noise(70, 45), subsampling, restart_rows)
    check_windows(data, decode(data, 1), channels=1)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs ../shared/data/imagenet_sample")
def test_windows_of_real_photos_are_those_of_the_whole_image():
    num_windows = 0
    for path in sorted(PHOTOS.iterdir())[::3]:
        data = path.read_bytes()
        whole = pillow(data)
        for box in boxes(*whole.shape[:2], 4):
            pixels = window(data, box)
            if pixels is not None:
                num_windows += 1
                np.testing.assert_array_equal(pixels, part(whole, box), err_msg=f"{path.name} {box}")
    assert num_windows > 400


@pytest.mark.parametrize(("across", "down"), [(2, 1), (2, 2)])
def test_a_window_holds_one_more_sample_of_chroma_on_each_side_than_its_pixels_lie_in(across: int, down: int):
    """So the decoder may read it, needed or not."""
    header = np.zeros(jpeg_header.HEADER, np.int64)
    header[[jpeg_header.HEIGHT, jpeg_header.WIDTH, jpeg_header.NUM_COMPONENTS]] = 100, 75, 3
    header[[jpeg_header.FIRST_COMPONENT + jpeg_header.ACROSS, jpeg_header.FIRST_COMPONENT + jpeg_header.DOWN]] = (
        across,
        down,
    )
    for left in range(75):
        for width in range(1, 76 - left):
            held = jpeg_scan._window_of(header, 10, left, 20, width, 3)
            first, last = left // 2, (left + width - 1) // 2
            assert 8 * held.first <= max(first - 1, 0)
            assert min(last + 1, 37) < 8 * (held.last + 1)


def test_a_gray_image_that_names_a_sampling_is_that_of_the_whole_image():
    data = bytearray(jpeg(noise(60, 50), "gray", 1))
    data[data.index(b"\xff\xc0") + 11] = 0x22  # without effect on one component alone
    check_windows(bytes(data), pillow(bytes(data)))


# ---- what is refused -------------------------------------------------------------------------------------------------


def without_jfif(image: Image.Image, segment: bytes = b"", ids: bytes = b"\1\2\3") -> bytes:
    """A JPEG of 4:4:4 without its first segment, with another one, and with these names of components."""
    data = encode(image, "JPEG", subsampling="4:4:4")
    length = int.from_bytes(data[4:6], "big")
    data = bytearray(data[:2] + segment + data[4 + length :])
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 10 : frame + 19 : 3] = ids
    data[scan + 5 : scan + 11 : 2] = ids
    return bytes(data)


ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
COLORS = {
    "as YCbCr": (without_jfif(Image.fromarray(smooth(30, 40))), True),
    "as RGB by names": (without_jfif(Image.fromarray(smooth(30, 40)), ids=b"RGB"), False),
    "by unknown names": (without_jfif(Image.fromarray(smooth(30, 40)), ids=b"\0\1\2"), False),
    "as RGB by Adobe": (without_jfif(Image.fromarray(smooth(30, 40)), ADOBE + b"\0"), False),
    "as YCbCr by Adobe": (without_jfif(Image.fromarray(smooth(30, 40)), ADOBE + b"\1"), True),
}


@pytest.mark.parametrize("kind", COLORS)
def test_colours_are_what_the_header_says(kind):
    data, is_decoded = COLORS[kind]
    whole = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    if is_decoded:
        check_windows(data, whole)
    else:
        assert window(data, (0, 0, 30, 40)) is None


REFUSED = {kind: data for kind, data in UNUSUAL.items() if kind not in ("turned", "PNG")} | UNUSUAL_MARKERS
REFUSED |= {
    "4:4:0": simplejpeg.encode_jpeg(noise(70, 45), 90, colorsubsampling="440"),
    "4:1:1": simplejpeg.encode_jpeg(noise(70, 45), 90, colorsubsampling="411"),
    "no end": MARKED[:-2],
    "nothing": END,
    "too high a box": jpeg(noise(69, 40)),
    "too wide a box": jpeg(noise(70, 39)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_unusual_is_refused(kind):
    assert window(REFUSED[kind], (0, 0, 70, 40)) is None


@pytest.mark.parametrize("data", [jpeg(noise(30, 20)), jpeg(noise(40, 20), restart_rows=1)], ids=["plain", "markers"])
def test_a_file_that_ends_anywhere_is_refused_where_rows_are_missing(data):
    height = 30 if b"\xff\xdd" not in data else 40
    for length in range(len(data) - 2):
        assert window(data[:length] + END, (0, 0, height, 20)) is None, length


def outcome(data: bytes, box: Box) -> np.ndarray | None:
    """The window that a view gets; None for a bad image."""
    reader = Reader(ImageList([data]), channels=3)
    try:
        read, size, layout = reader.open_rows(0)
        pixels, (top, left) = reader.decode_window(0, read, size, layout, box)
    except DecodeError:
        return None
    return part(pixels, (box[0] - top, box[1] - left, *box[2:])).copy()


@pytest.mark.parametrize("restart_rows", [0, 1, 2])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0", "gray"])
def test_a_damaged_image_is_shown_or_bad_as_without_this(subsampling, restart_rows, monkeypatch):
    """Damage anywhere, tables and numbers of the header included: what a run shows must not depend on numba."""
    good = jpeg(smooth(70, 60), subsampling, restart_rows, optimize=True)
    generator = np.random.default_rng(1)
    cases = []
    for _ in range(500):
        data = bytearray(good)
        for _ in range(generator.integers(1, 4)):
            data[generator.integers(2, len(data) - 2)] = generator.integers(256)
        top, left = generator.integers(0, 60, 2)
        height, width = generator.integers(1, 71 - top), generator.integers(1, 61 - left)
        layout = read_layout(bytes(data))
        if layout is None or (layout.height, layout.width) == (70, 60):
            cases.append((bytes(data), (int(top), int(left), int(height), int(width))))
    num_windows = sum(window(data, box) is not None for data, box in cases)
    ours = [_or_error(data, box) for data, box in cases]
    monkeypatch.setattr(module, "decode_window", lambda *given: None)
    for (data, box), pixels in zip(cases, ours, strict=True):
        expected = _or_error(data, box)
        assert type(pixels) is type(expected)
        np.testing.assert_array_equal(pixels, expected)
    assert 40 < num_windows < len(cases) - 40


def _or_error(data: bytes, box: Box) -> np.ndarray | str | None:
    try:
        return outcome(data, box)
    except (ValueError, RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"


def test_noise_as_coded_data_does_no_harm():
    """Whatever follows the header, it is refused or decoded as libjpeg decodes it."""
    good = jpeg(noise(40, 40), "4:2:0", optimize=True)
    scan = good.index(b"\xff\xda") + 14
    generator = np.random.default_rng(2)
    num_decoded = 0
    for length in generator.integers(0, 4000, 300):
        coded = generator.integers(0, 255, length, dtype=np.uint8).tobytes()  # without 0xff
        data = good[:scan] + coded + END
        pixels = window(data, (0, 0, 8, 40))
        if pixels is not None:
            num_decoded += 1
            expected = outcome_of_rows(data)
            assert expected is not None
            np.testing.assert_array_equal(pixels, expected[:8])
    assert num_decoded > 0


def check_alike(data: bytes, boxes: list[Box], monkeypatch) -> list[bool]:
    """Windows are shown or bad as without this; whether they are shown."""
    shown = []
    for box in boxes:
        ours = outcome(data, box)
        with monkeypatch.context() as patch:
            patch.setattr(module, "decode_window", lambda *given: None)
            expected = outcome(data, box)
        assert (ours is None) == (expected is None), box
        if ours is not None:
            np.testing.assert_array_equal(ours, expected)
        shown.append(ours is not None)
    return shown


def test_rows_that_are_missing_just_below_a_window_are_noticed_as_by_libjpeg(monkeypatch):
    """It reads up to eight bytes ahead, and then decodes all of the file."""
    data = jpeg(noise(24, 8), "gray")
    scan = data.index(b"\xff\xda") + 10
    shown = []
    for length in range(scan, len(data) - 2):
        if data[length - 1] != 0xFF:
            shown += check_alike(data[:length] + END, [(0, 0, 6, 8), (0, 0, 14, 8), (0, 0, 24, 8)], monkeypatch)
    assert True in shown
    assert False in shown


def with_codes(data: bytes, counts: list[int]) -> bytes:
    """A gray JPEG whose first DC table has so many codes by length."""
    at = data.index(b"\xff\xc4")
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    table = bytes([0, *counts]) + bytes(range(sum(counts)))
    rest = data[at + 2 + length :]
    return data[:at] + b"\xff\xc4" + (2 + len(table)).to_bytes(2, "big") + table + rest


def test_a_table_whose_last_code_is_all_ones_is_bad_as_by_libjpeg(monkeypatch):
    image = np.full((16, 16, 1), 128, np.uint8)  # all of its differences are 0, whose code is 00 in both tables
    good = with_codes(jpeg(image, "gray"), [0, 3] + [0] * 14)
    bad = with_codes(jpeg(image, "gray"), [0, 4] + [0] * 14)
    assert check_alike(good, [(0, 0, 5, 5)], monkeypatch) == [True]
    assert check_alike(bad, [(0, 0, 5, 5)], monkeypatch) == [False]


@pytest.mark.parametrize(("side", "is_shown"), [(65_500, True), (65_501, False)])
@pytest.mark.parametrize("is_high", [False, True])
def test_sides_are_limited_as_by_libjpeg(side: int, is_shown: bool, is_high: bool, monkeypatch):
    size = (65_500, 8, 1) if is_high else (8, 65_500, 1)
    data = bytearray(jpeg(np.zeros(size, np.uint8), "gray"))
    frame = data.index(b"\xff\xc0")
    at = frame + 5 if is_high else frame + 7
    data[at : at + 2] = side.to_bytes(2, "big")
    assert check_alike(bytes(data), [(0, 0, 8, 8)], monkeypatch) == [is_shown]


ICC = b"ICC_PROFILE\0"


@pytest.mark.parametrize(
    ("segment", "is_decoded"),
    [
        (b"\xff\xe0\0\x10JFIF\0\1\2\0\0\1\0\1\0\0", True),
        (b"\xff\xe0\0\x10JFIF\0\2\1\0\0\1\0\1\0\0", False),
        (b"\xff\xe2\0\x14" + ICC + b"\1\1abcd", True),
        (b"\xff\xe2\0\x14" + ICC + b"\1\2abcd", False),
        (2 * (b"\xff\xe2\0\x14" + ICC + b"\1\1abcd"), False),
        (b"\xff\xfe\0\6abcd\xff\xe3\0\4ab", True),
    ],
)
def test_segments_of_which_libjpeg_warns_are_refused(segment: bytes, is_decoded: bool):
    data = without_jfif(Image.fromarray(smooth(30, 40)), segment)
    assert (window(data, (0, 0, 30, 40)) is not None) == is_decoded
    np.testing.assert_array_equal(outcome(data, (0, 0, 30, 40)), pillow(data))


def outcome_of_rows(data: bytes) -> np.ndarray | None:
    reader = Reader(ImageList([data]), channels=3)
    read, size, layout = reader.open_rows(0)
    return reader.decode_rows(0, read, size, layout, 0, 8)[0]


# ---- in the reader and the loader ------------------------------------------------------------------------------------


def test_a_turned_image_is_decoded_whole():
    data = with_orientation(Image.fromarray(noise(40, 70)), "JPEG", 6)
    np.testing.assert_array_equal(outcome(data, (30, 10, 20, 20)), decode(data)[30:50, 10:30])


# ---- compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def uncompiled(monkeypatch):
    """As in a process that has decoded nothing yet."""
    monkeypatch.setattr(jpeg_window, "_decode", None)
    monkeypatch.setattr(jpeg_window, "_was_tried", False)


def is_decoded_by_libjpeg() -> bool:
    np.testing.assert_array_equal(outcome(MARKED, (0, 0, 5, 5)), pillow(MARKED)[:5, :5])
    return window(MARKED, (0, 0, 5, 5)) is None


def test_a_loader_has_the_decoder_compiled_before_its_threads_start(uncompiled, monkeypatch):
    assert is_decoded_by_libjpeg()
    compile_, threads = jpeg_window._compile, []
    monkeypatch.setattr(jpeg_window, "_compile", lambda: threads.append(threading.current_thread()) or compile_())
    for _ in range(2):
        with Loader(ImageList([MARKED] * 4), [View()], size=(8, 8), channels=3, seed=0, in_memory_gib=0) as loader:
            list(loader.batches(start_step=0, stop_step=1, global_batch_size=4))
    assert threads == [threading.main_thread()]
    assert not is_decoded_by_libjpeg()


def test_images_held_in_memory_need_no_compiler(uncompiled):
    with Loader(ImageList([MARKED] * 4), [View()], size=(8, 8), channels=3, seed=0) as loader:
        list(loader.batches(start_step=0, stop_step=1, global_batch_size=4))
    assert is_decoded_by_libjpeg()


def test_without_numba_images_are_decoded_by_libjpeg(uncompiled, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ssl.data.jpeg_scan", None)
    with caplog.at_level(logging.INFO):
        assert not jpeg_window.compile_decoder()
    assert "libjpeg-turbo alone" in caplog.text
    assert is_decoded_by_libjpeg()


def test_a_compiler_that_fails_is_told_once(uncompiled, monkeypatch, caplog):
    monkeypatch.setattr(jpeg_scan, "decode_window", lambda *given: False)
    for _ in range(2):
        assert not jpeg_window.compile_decoder()
    assert is_decoded_by_libjpeg()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_with_numbas_compiler_off_images_are_decoded_by_libjpeg(uncompiled, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert not jpeg_window.compile_decoder()
    assert is_decoded_by_libjpeg()
