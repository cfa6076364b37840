"""Decoding the rows of a JPEG that a crop needs, against Pillow's decoding of the whole file."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from ssl.data import reader as module
from ssl.data.decode import MAX_PIXELS, DecodeError, decode
from ssl.data.jpeg_rows import decode_rows, read_layout
from ssl.data.loader import Loader
from ssl.data.reader import Reader
from ssl.data.views import View
from tests.image_list import ImageList
from tests.test_decode import PHOTOS, encode, smooth, with_orientation

SUBSAMPLINGS = ["4:4:4", "4:2:2", "4:2:0", "gray"]
END = b"\xff\xd9"


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Sharp colours, so that smoothed chroma differs from row to row."""
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def jpeg(image: np.ndarray, subsampling: str = "4:2:0", restart_rows: int = 0, **options) -> bytes:
    """As Pillow writes it, with a restart marker after every `restart_rows` rows of MCUs."""
    if subsampling == "gray":
        return encode(image[..., 0], "JPEG", restart_marker_rows=restart_rows, **options)
    return encode(image, "JPEG", subsampling=subsampling, restart_marker_rows=restart_rows, **options)


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def at_every_border(height: int) -> Iterator[tuple[int, int]]:
    """Tops and bottoms at, before and behind each multiple of 8 rows."""
    places = sorted({min(max(row + step, 0), height) for row in range(0, height + 8, 8) for step in (-1, 0, 1)})
    return itertools.combinations(places, 2)


def check_rows(data: bytes, whole: np.ndarray) -> int:
    """Every choice of rows equals those of `whole`; returns how often less than all was decoded."""
    layout = read_layout(data)
    assert layout is not None
    assert (layout.height, layout.width) == whole.shape[:2]
    num_cut = 0
    for top, bottom in at_every_border(len(whole)):
        buffer = np.full(whole.size, 7, np.uint8)
        rows = decode_rows(data, layout, top, bottom, channels=3, buffer=buffer)
        if rows is None:
            continue
        pixels, first = rows
        num_cut += len(pixels) < len(whole)
        np.testing.assert_array_equal(pixels[top - first : bottom - first], whole[top:bottom])
    return num_cut


# ---- which pixels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart_rows", [0, 1, 2, 3])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("size", [(61, 53), (64, 48), (49, 16), (150, 9)])
def test_rows_are_those_of_the_whole_image(size, subsampling, restart_rows):
    data = jpeg(noise(*size), subsampling, restart_rows)
    assert check_rows(data, pillow(data)) > 0


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_rows_are_those_of_the_whole_image_in_subsamplings_that_pillow_does_not_write(subsampling):
    data = simplejpeg.encode_jpeg(noise(70, 45), 90, colorsubsampling=subsampling)
    assert check_rows(data, pillow(data)) > 0


def test_rows_are_those_of_the_whole_image_with_chroma_halved_downwards_between_markers():
    data = bytearray(jpeg(noise(40, 64), "4:2:2", 1))
    frame = data.index(b"\xff\xc0")
    assert (data[frame + 5 : frame + 9], data[frame + 11]) == (bytes([0, 40, 0, 64]), 0x21)
    data[frame + 5 : frame + 9] = bytes([0, 80, 0, 32])  # the same blocks, two luma blocks below each other in an MCU
    data[frame + 11] = 0x12
    data = bytes(data)
    layout = read_layout(data)
    assert layout is not None
    assert (layout.row, layout.rows_per_restart) == (16, 1)
    assert check_rows(data, pillow(data)) > 0


def test_rows_of_a_gray_image_that_names_a_sampling_are_those_of_the_whole_image():
    data = bytearray(jpeg(noise(60, 50), "gray", 1))
    sampling = data.index(b"\xff\xc0") + 11
    assert data[sampling] == 0x11
    data[sampling] = 0x22  # without effect on one component alone
    assert check_rows(bytes(data), pillow(bytes(data))) > 0


def test_one_channel_is_the_luma_of_the_whole_image():
    for restart_rows in (0, 1):
        data = jpeg(noise(80, 40), restart_rows=restart_rows)
        layout = read_layout(data)
        assert layout is not None
        rows = decode_rows(data, layout, 20, 40, channels=1, buffer=np.empty(80 * 40, np.uint8))
        assert rows is not None
        pixels, first = rows
        np.testing.assert_array_equal(pixels[20 - first : 40 - first], decode(data, 1)[20:40])


def test_with_markers_no_more_than_one_row_of_mcus_is_decoded_on_each_side():
    data = jpeg(noise(160, 40), restart_rows=1)
    layout = read_layout(data)
    assert layout is not None
    for top, bottom, first, last in [(0, 15, 0, 1), (0, 16, 0, 2), (17, 30, 1, 2), (48, 64, 2, 5), (130, 160, 8, 10)]:
        rows = decode_rows(data, layout, top, bottom, channels=3, buffer=np.empty(160 * 40 * 3, np.uint8))
        assert rows is not None
        assert (rows[1], len(rows[0])) == (16 * first, 16 * (last - first))


def test_without_markers_nothing_is_decoded_far_below():
    data = jpeg(noise(160, 40))
    layout = read_layout(data)
    assert layout is not None
    rows = decode_rows(data, layout, 60, 80, channels=3, buffer=np.empty(160 * 40 * 3, np.uint8))
    assert rows is not None
    assert (rows[1], len(rows[0])) == (0, 96)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs ../shared/data/imagenet_sample")
def test_rows_of_real_photos_are_those_of_the_whole_image():
    for path in sorted(PHOTOS.iterdir())[5::20]:
        data = path.read_bytes()
        whole, reader = pillow(data), Reader(ImageList([data]), channels=3)
        data, size, layout = reader.open_rows(0)
        assert size == whole.shape[:2]
        for top, bottom in ((0, size[0] // 2), (size[0] // 3, size[0] - 40), (size[0] // 2, size[0])):
            rows, first = reader.decode_rows(0, data, size, layout, top, bottom)
            np.testing.assert_array_equal(rows[top - first : bottom - first], whole[top:bottom])


# ---- what is decoded whole -------------------------------------------------------------------------------------------


def with_marker(data: bytes, number: int, other: bytes) -> bytes:
    """The restart marker of a `number` below 8 replaced."""
    scan = data.index(b"\xff\xda")
    at = data.index(bytes([0xFF, 0xD0 + number]), scan)
    return data[:at] + other + data[at + 2 :]


MARKED = jpeg(noise(70, 40), restart_rows=1)  # of 5 rows of MCUs, so with markers 0 to 3


UNUSUAL = {
    "progressive": jpeg(noise(70, 40), progressive=True),
    "CMYK": encode(Image.fromarray(noise(70, 40)).convert("CMYK"), "JPEG"),
    "turned": with_orientation(Image.fromarray(noise(40, 70)), "JPEG", 6),
    "markers within rows": jpeg(noise(90, 70), restart_marker_blocks=3),
    "bytes behind the end": MARKED + b"\0",
    "PNG": encode(noise(70, 40), "PNG"),
}
UNUSUAL_MARKERS = {
    "one missing": with_marker(MARKED, 1, b""),
    "one twice": with_marker(MARKED, 1, b"\xff\xd2"),
    "another segment": with_marker(MARKED, 2, b"\xff\xfe\0\2\xff\xd2"),
}


@pytest.mark.parametrize("kind", UNUSUAL | UNUSUAL_MARKERS)
def test_anything_unusual_is_decoded_whole(kind):
    reader = Reader(ImageList([(UNUSUAL | UNUSUAL_MARKERS)[kind]]), channels=3)
    data, size, layout = reader.open_rows(0)
    assert (layout is None) == (kind in UNUSUAL)
    rows, first = reader.decode_rows(0, data, size, layout, 30, 40)
    np.testing.assert_array_equal(rows, decode(data))
    assert (size, first) == (rows.shape[:2], 0)


@pytest.mark.parametrize("restart_rows", [0, 1])
def test_what_needs_all_rows_is_decoded_whole(restart_rows):
    data = jpeg(noise(70, 40), restart_rows=restart_rows)
    layout = read_layout(data)
    assert layout is not None
    for top, bottom in ((0, 70), (16, 64)):
        assert decode_rows(data, layout, top, bottom, channels=3, buffer=np.empty(70 * 40 * 3, np.uint8)) is None


def test_a_jpeg_whose_orientation_is_upright_is_decoded_in_rows():
    layout = read_layout(with_orientation(Image.fromarray(noise(40, 70)), "JPEG", 1))
    assert layout is not None
    assert (layout.height, layout.width) == (40, 70)


def test_an_image_that_is_too_large_has_no_layout():
    data = bytearray(jpeg(noise(20, 20)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\0\xff\0"
    assert MAX_PIXELS < 0xFF00**2
    assert read_layout(bytes(data)) is None


@pytest.mark.parametrize("length", [0, 1, 3, 5, 25, 160, 300, 600])
def test_a_header_that_ends_early_has_no_layout(length):
    assert read_layout(MARKED[:length] + END) is None


# ---- what is damaged -------------------------------------------------------------------------------------------------


def outcome(data: bytes, top: int, bottom: int) -> np.ndarray | None:
    """The rows that a view gets; None for a bad image."""
    reader = Reader(ImageList([data]), channels=3)
    try:
        read, size, layout = reader.open_rows(0)
        rows, first = reader.decode_rows(0, read, size, layout, top, bottom)
    except DecodeError:
        return None
    return rows[top - first : bottom - first].copy()


@pytest.mark.parametrize("restart_rows", [0, 1])
@pytest.mark.parametrize("kept", [0.5, 0.8, 0.99])
def test_a_truncated_file_is_bad_whatever_the_crop(kept, restart_rows):
    data = jpeg(noise(90, 60), restart_rows=restart_rows)
    data = data[: int(len(data) * kept)]
    assert all(outcome(data, top, bottom) is None for top, bottom in at_every_border(90))


def test_with_markers_missing_rows_are_noticed_behind_an_end_too():
    data = jpeg(noise(90, 60), restart_rows=1)
    data = data[: int(len(data) * 0.8)] + END
    assert all(outcome(data, top, bottom) is None for top, bottom in at_every_border(90))


def test_one_marker_too_many_is_noticed_wherever_it_is():
    data = with_marker(MARKED, 3, b"\xff\xd3\xff\xd4")
    assert all(outcome(data, top, bottom) is None for top, bottom in at_every_border(70))


def test_without_markers_missing_rows_are_noticed_where_they_are_needed():
    data = jpeg(noise(96, 60))
    data = data[: int(len(data) * 0.7)] + END
    assert outcome(data, 20, 90) is None
    assert outcome(data, 70, 80) is None
    shown = outcome(data, 10, 20)
    assert shown is not None
    np.testing.assert_array_equal(shown, pillow(jpeg(noise(96, 60)))[10:20])


@pytest.mark.parametrize("restart_rows", [0, 1])
def test_rows_of_a_damaged_image_are_those_that_decoding_all_of_it_gives(restart_rows):
    """Or, where that calls the image bad, the rows are called bad or lie elsewhere."""
    good = jpeg(smooth(90, 60), restart_rows=restart_rows)
    whole, scan = pillow(good), good.index(b"\xff\xda") + 14
    generator = np.random.default_rng(0)
    num_same, num_bad = 0, 0
    for _ in range(150):
        data = bytearray(good)
        data[generator.integers(scan, len(data) - 2)] = generator.integers(256)
        data = bytes(data)
        all_rows, rows = outcome(data, 0, 90), outcome(data, 30, 50)
        if all_rows is not None:
            assert rows is not None
            np.testing.assert_array_equal(rows, all_rows[30:50])
            num_same += not np.array_equal(all_rows, whole)
        else:
            num_bad += rows is None
    assert num_same > 20
    assert num_bad > 0 or restart_rows


# ---- in the loader ---------------------------------------------------------------------------------------------------


def mixed_batches(num_views: int, channels: int) -> tuple[list[np.ndarray], set[int]]:
    """The crops of a loader of images of every kind, of which two are truncated, and the bad ones that it met."""
    sizes = [(90 + 7 * number, 130 - 11 * number) for number in range(6)]
    images = [jpeg(smooth(*size), SUBSAMPLINGS[number % 4], number % 3) for number, size in enumerate(sizes)]
    images += [jpeg(smooth(90, 80), progressive=True), encode(smooth(70, 60), "PNG"), images[1][:-300], images[0][:-90]]
    images += [with_orientation(Image.fromarray(smooth(80, 60)), "JPEG", 6)]
    views = [View(crop="random_resized", scale=(0.1, 0.5))] * num_views
    loader = Loader(
        ImageList(images), views, size=(24, 24), channels=channels, seed=0, threads=2, in_memory_gib=0,
        max_bad_fraction=0.5,
    )  # fmt: skip
    with loader:
        made = list(loader.batches(start_step=0, stop_step=6, global_batch_size=5))
    return [crops.numpy() for batch in made for crops in batch["crops"]], set(loader.bad)


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("way", ["decode_rows", "decode_window"])
def test_batches_are_those_of_images_decoded_whole(way: str, num_views: int, channels: int, monkeypatch):
    if way == "decode_window":
        pytest.importorskip("numba")
    decode_part, num_parts = getattr(module, way), []

    def counted(*given, **more):
        decoded = decode_part(*given, **more)
        num_parts.append(decoded is not None)
        return decoded

    monkeypatch.setattr(module, "decode_window", lambda *given: None)
    monkeypatch.setattr(module, way, counted)
    ours, bad = mixed_batches(num_views, channels)
    assert sum(num_parts) > 8
    monkeypatch.setattr(module, "read_layout", lambda data: None)
    whole, also_bad = mixed_batches(num_views, channels)
    assert bad == also_bad == {8, 9}
    for parts, expected in zip(ours, whole, strict=True):
        np.testing.assert_array_equal(parts, expected)


@pytest.mark.parametrize("how", [{"start": 1}, {"start": 5}, {"start": 11}, {"threads": 4}, {"num_ranks": 2}], ids=str)
def test_what_damaged_images_show_depends_on_the_step_alone(how: dict[str, int]):
    """Images that end early behind an end marker: a crop above shows them, one that needs what is missing does not."""
    images = [jpeg(smooth(96, 64) ^ np.uint8(number)) for number in range(20)]
    for number in (3, 4, 11):
        images[number] = images[number][: len(images[number]) * 8 // 10] + END

    def crops(start: int = 0, threads: int = 1, num_ranks: int = 1) -> tuple[np.ndarray, set[int]]:
        """Those of the steps from `start` on, (steps, B, C, h, w), and the images that were replaced somewhere."""
        ranks, bad = [], set()
        for rank in range(num_ranks):
            with Loader(
                ImageList(images), [View(scale=(0.1, 0.4))], size=(16, 16), channels=3, seed=1, threads=threads,
                in_memory_gib=0, max_bad_fraction=0.5, prefetch=6,
            ) as loader:  # fmt: skip
                made = loader.batches(
                    start_step=start, stop_step=24, global_batch_size=10, rank=rank, world_size=num_ranks
                )
                ranks.append(np.stack([batch["crops"][0].numpy() for batch in made]))
                bad |= set(loader.bad)
        return np.concatenate(ranks, axis=1), bad

    expected, bad = crops()
    assert bad == {3, 4, 11}
    np.testing.assert_array_equal(crops(**how)[0], expected[how.get("start", 0) :])


def test_the_channels_of_decoded_crops_lie_together_in_memory():
    loader = Loader(ImageList([jpeg(noise(40, 40))] * 3), [View()], size=(24, 16), channels=3, seed=0, in_memory_gib=0)
    with loader:
        (crops,) = next(loader.batches(start_step=0, stop_step=1, global_batch_size=3))["crops"]
    assert crops.shape == (3, 3, 24, 16)
    assert crops.is_contiguous(memory_format=torch.channels_last)
