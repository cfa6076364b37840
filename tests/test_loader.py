from __future__ import annotations

import io
import logging
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ssl.data import threads as threads_module
from ssl.data.loader import BadImages, Loader
from ssl.data.threads import available_cores, chunk_bounds
from ssl.data.views import View
from ssl.randomness import shuffle, uniforms
from tests.image_list import ImageList, jpeg, png

VIEWS = [
    View(crop="random_resized", scale=(0.2, 1.0), flip=0.5),
    View(crop="random_resized", scale=(0.5, 1.0), jitter=0.8, brightness=0.4),
]


def images(num: int, *, equal: bool, encode=png) -> list:
    generator = np.random.default_rng(0)
    sizes = [(20, 20) if equal else (16 + 3 * (k % 4), 16 + 5 * (k % 3)) for k in range(num)]
    return [encode(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def make(source: list, **settings) -> Loader:
    settings = {"views": VIEWS, "size": (12, 12), "channels": 3, "seed": 3, "num_noise": 5, "threads": 2} | settings
    return Loader(ImageList(source), settings.pop("views"), **settings)


def decoded(source: list, **settings) -> Loader:
    return make(source, in_memory_gib=0, **settings)


def flat(batch: dict) -> dict[str, torch.Tensor]:
    parts = {name: batch[name] for name in ("index", "label", "noise")}
    for view, (crops, parameters) in enumerate(zip(batch["crops"], batch["parameters"])):
        parts |= {f"crops{view}": crops} | {f"{name}{view}": value for name, value in parameters.items()}
    return parts


def assert_equal(ours: list[dict], theirs: list[dict], *, levels: int = 0) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(map(flat, ours), map(flat, theirs)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name.startswith("crops"):
                assert (value.int() - other[name].int()).abs().max() <= levels, name
            else:
                assert torch.equal(value, other[name]), name


def joined(batches: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([flat(batch)[name] for batch in batches]) for name in flat(batches[0])}


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]


def test_a_batch_has_the_shuffled_images_their_labels_and_noise():
    loader = decoded(images(22, equal=False))
    batches = list(loader.batches(start_step=0, stop_step=6, global_batch_size=10))
    for step, batch in enumerate(batches):
        position = np.arange(10) + 10 * (step % 2)
        np.testing.assert_array_equal(batch["index"], shuffle(3, step // 2, 22, position))
        np.testing.assert_array_equal(batch["label"], batch["index"].numpy() * 10)
        np.testing.assert_array_equal(batch["noise"], uniforms(3, step // 2, batch["index"].numpy(), "noise", 5))
        assert [(crops.shape, crops.dtype) for crops in batch["crops"]] == [((10, 3, 12, 12), torch.uint8)] * 2
        assert [parameters["box"].shape for parameters in batch["parameters"]] == [(10, 4)] * 2


def test_crops_are_pillows_antialiased_resize_of_the_box():
    source = images(8, equal=False)
    batch = next(decoded(source).batches(start_step=0, stop_step=1, global_batch_size=8))
    pictures = [np.asarray(Image.open(io.BytesIO(data))) for data in source]
    for view, crops in enumerate(batch["crops"]):
        for index, box, crop in zip(batch["index"], batch["parameters"][view]["box"].tolist(), crops):
            top, left, height, width = box
            picture = Image.fromarray(pictures[index][top : top + height, left : left + width])
            how = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[
                VIEWS[view].interpolation
            ]
            # Across, then down, as torch does it: Pillow takes the cheaper order, and the clamp between them tells.
            expected = np.asarray(picture.resize((12, height), how).resize((12, 12), how)).transpose(2, 0, 1)
            assert np.abs(crop.numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_do_not_change_batches(equal, num_threads):
    source = images(150, equal=equal)
    for loader in (decoded, make):
        one = list(loader(source, threads=1).batches(start_step=0, stop_step=4, global_batch_size=70))
        more = loader(source, threads=num_threads, prefetch=3)
        assert_equal(list(more.batches(start_step=0, stop_step=4, global_batch_size=70)), one)


@pytest.mark.parametrize("equal", [True, False])
def test_a_resume_continues_with_the_same_batches(equal):
    source = images(50, equal=equal)
    for loader in (decoded, make):
        whole = list(loader(source).batches(start_step=0, stop_step=9, global_batch_size=16))
        rest = list(loader(source, threads=1).batches(start_step=5, stop_step=9, global_batch_size=16))
        assert_equal(rest, whole[5:])


@pytest.mark.parametrize("equal", [True, False])
def test_two_ranks_joined_are_one_rank(equal):
    source = images(40, equal=equal)
    for make_loader in (decoded, make):
        loader = make_loader(source)
        whole = list(loader.batches(start_step=0, stop_step=3, global_batch_size=12))
        shares = [
            list(loader.batches(start_step=0, stop_step=3, global_batch_size=12, rank=rank, world_size=2))
            for rank in range(2)
        ]
        for step in range(3):
            one, two = joined([whole[step]]), joined([share[step] for share in shares])
            for name, value in one.items():
                if not name.startswith("crops"):
                    assert torch.equal(two[name], value), name
                else:
                    assert (two[name].int() - value.int()).abs().max() <= 1  # another batch, another order of sums


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("encode", [png, jpeg])
def test_images_held_in_memory_give_the_batches_of_decoded_ones(equal, encode):
    source = images(40, equal=equal, encode=encode)
    held, read = make(source), decoded(source)
    assert (held.in_memory, read.in_memory) == (True, False)
    arguments = {"start_step": 1, "stop_step": 6, "global_batch_size": 16}
    assert_equal(list(held.batches(**arguments)), list(read.batches(**arguments)), levels=1)


def test_whole_images_are_copied_exactly():
    arrays = [np.full((12, 12, 3), k, np.uint8) + np.arange(12, dtype=np.uint8)[:, None, None] for k in range(9)]
    for loader in (make(arrays, views=[View(crop="center")]), decoded(arrays, views=[View(crop="center")])):
        batch = next(loader.sequential(batch_size=9))
        np.testing.assert_array_equal(batch["crops"][0], np.stack(arrays).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("make_loader", [make, decoded])
def test_sequential_visits_every_image_once_in_order(make_loader, world_size):
    loader = make_loader(images(23, equal=False))
    shares = [list(loader.sequential(batch_size=4, rank=rank, world_size=world_size)) for rank in range(world_size)]
    visited = torch.cat([batch["index"] for share in shares for batch in share])
    assert visited.tolist() == list(range(23))
    assert all(len(batch["index"]) == 4 for share in shares for batch in share[:-1])


def test_a_batch_larger_than_the_set_is_refused():
    loader = make(images(6, equal=True))
    assert loader.steps_per_epoch(4) == 1
    with pytest.raises(ValueError, match=r"trainer.global_batch_size=7 .* has 6"):
        loader.steps_per_epoch(7)
    with pytest.raises(ValueError, match=r"trainer.global_batch_size=7"):
        loader.batches(start_step=0, stop_step=1, global_batch_size=7)


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="cannot be shared equally by 3 ranks"):
        make(images(8, equal=True)).batches(start_step=0, stop_step=1, global_batch_size=8, rank=0, world_size=3)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="no images"):
        make([])
    with pytest.raises(ValueError, match=r"loader.threads must be at least 1, got 0"):
        make(images(2, equal=True), threads=0)
    with pytest.raises(ValueError, match=r"loader.prefetch must be 0 or more, got -1"):
        make(images(2, equal=True), prefetch=-1)


def damaged(num: int, *, equal: bool, tmp_path) -> list:
    """Images of which some are not images, cut off after their header, vanished or unreadable."""
    source = images(num, equal=equal, encode=jpeg)
    source[3] = b"not an image"
    source[11] = source[11][: len(source[11]) * 2 // 3]
    source[17] = tmp_path / "vanished.jpg"
    source[18] = PermissionError("permission denied")
    return source


BAD = {3, 17, 18}  # and 11 where the decoder refuses a cut file


@pytest.mark.parametrize("equal", [True, False])
def test_bad_images_are_replaced_alike_whatever_the_threads_ranks_storage_and_resume(equal, tmp_path):
    source = damaged(40, equal=equal, tmp_path=tmp_path)
    arguments = {"start_step": 0, "stop_step": 4, "global_batch_size": 20}
    reference = decoded(source, threads=1, max_bad_fraction=0.5)
    whole = list(reference.batches(**arguments))
    assert BAD <= set(reference.bad) <= BAD | {11}
    for batch in whole:
        wrong = batch["label"] != batch["index"] * 10
        assert set(batch["index"][wrong].tolist()) <= BAD | {11}
        assert not set((batch["label"] // 10).tolist()) & set(reference.bad)
    several = decoded(source, threads=5, max_bad_fraction=0.5)
    assert_equal(list(several.batches(**arguments)), whole)
    assert_equal(list(decoded(source, max_bad_fraction=0.5).batches(**(arguments | {"start_step": 2}))), whole[2:])
    held = make(source, max_bad_fraction=0.5)
    assert set(held.bad) == set(reference.bad)
    assert_equal(list(held.batches(**arguments)), whole, levels=1)
    shares = [list(decoded(source, max_bad_fraction=0.5).batches(**arguments, rank=k, world_size=2)) for k in range(2)]
    for step, batch in enumerate(whole):
        two = joined([share[step] for share in shares])
        assert all(torch.equal(two[name], value) for name, value in joined([batch]).items())


def test_a_bad_image_is_logged_once_with_its_path(caplog, tmp_path):
    source = damaged(40, equal=False, tmp_path=tmp_path)
    with caplog.at_level(logging.WARNING):
        loader = decoded(source, max_bad_fraction=0.5)
        list(loader.batches(start_step=0, stop_step=8, global_batch_size=20))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(loader.bad)
    assert sum("image_3:" in line for line in told) == 1


@pytest.mark.parametrize("make_loader", [make, decoded])
def test_too_many_bad_images_stop_with_the_list(make_loader):
    source = images(100, equal=False)
    source[7] = source[50] = b"not an image"
    with pytest.raises(BadImages, match=r"2 of 100 images .*data\.max_bad_fraction=0\.01(.|\n)*image_") as error:
        list(make_loader(source).batches(start_step=0, stop_step=1, global_batch_size=100))
    assert "image_7:" in str(error.value)
    assert "image_50:" in str(error.value)
    assert loader_threads() == []


def test_one_bad_image_in_a_hundred_does_not_stop():
    source = images(100, equal=False)
    source[7] = b"not an image"
    loader = decoded(source)
    list(loader.batches(start_step=0, stop_step=1, global_batch_size=100))
    assert list(loader.bad) == [7]


def test_the_list_of_bad_images_is_cut_at_twenty():
    with pytest.raises(BadImages, match="and 5 more"):
        make([b"no"] * 24 + images(1, equal=True) * 1 + [b"no"] * 25, max_bad_fraction=0.48, threads=1)


def test_an_error_that_is_no_fault_of_a_file_names_the_image():
    source = images(20, equal=True)
    source[13] = KeyError("no such row")
    with pytest.raises(RuntimeError, match=r"reading image_13: KeyError: 'no such row'"):
        list(decoded(source).batches(start_step=0, stop_step=1, global_batch_size=20))
    assert loader_threads() == []


def test_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match=r"image_\d+ has 1 channels, data.channels=3"):
        list(decoded([np.zeros((4, 4, 1), np.uint8)] * 4).batches(start_step=0, stop_step=1, global_batch_size=4))


@pytest.mark.parametrize("make_loader", [make, decoded])
def test_no_thread_is_left_after_the_last_batch_or_an_early_stop(make_loader):
    loader = make_loader(images(40, equal=False))
    list(loader.batches(start_step=0, stop_step=3, global_batch_size=10))
    assert loader_threads() == []
    for _ in loader.batches(start_step=0, stop_step=1000, global_batch_size=10):
        break
    assert loader_threads() == []
    iterator = loader.batches(start_step=0, stop_step=1000, global_batch_size=10)
    next(iterator)
    assert len(loader_threads()) == 2
    iterator.close()
    assert loader_threads() == []


def test_closing_the_loader_closes_its_iterators():
    with decoded(images(40, equal=False)) as loader:
        iterators = [loader.sequential(batch_size=5), loader.batches(start_step=0, stop_step=99, global_batch_size=8)]
        for iterator in iterators:
            next(iterator)
        assert len(loader_threads()) == 4
    assert loader_threads() == []


def test_an_interrupted_consumer_leaves_no_thread():
    loader = decoded(images(40, equal=False))

    def consume() -> None:
        for number, _ in enumerate(loader.batches(start_step=0, stop_step=1000, global_batch_size=8)):
            if number == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert loader_threads() == []


def test_control_c_while_waiting_for_a_batch_stops_at_once_and_leaves_no_thread():
    entered, release = threading.Event(), threading.Event()

    class Stuck(ImageList):
        def read(self, index):
            entered.set()
            release.wait()
            return super().read(index)

    def interrupt() -> None:
        entered.wait()
        os.kill(os.getpid(), signal.SIGINT)
        release.set()

    source = Stuck(images(40, equal=False))
    release.set()
    loader = Loader(source, VIEWS, size=(8, 8), channels=3, seed=0, threads=2, in_memory_gib=0)
    entered.clear()
    release.clear()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        list(loader.batches(start_step=0, stop_step=10**6, global_batch_size=40))
    assert loader_threads() == []


def test_prefetch_is_bounded():
    class Counting(ImageList):
        num_read = 0

        def read(self, index):
            self.num_read += 1
            return super().read(index)

    source = Counting(images(64, equal=False))
    loader = Loader(source, VIEWS, size=(8, 8), channels=3, seed=0, threads=3, prefetch=2, in_memory_gib=0)
    source.num_read = 0
    iterator = loader.batches(start_step=0, stop_step=100, global_batch_size=8)
    for number in range(1, 6):
        next(iterator)
        deadline = time.monotonic() + 0.05
        while time.monotonic() < deadline:
            assert source.num_read <= 8 * (number + 2)
    iterator.close()


@pytest.mark.parametrize("make_loader", [make, decoded])
def test_a_transform_is_applied_by_the_loaders_threads(make_loader):
    names, counts = set(), set()

    def transform(batch: dict) -> dict:
        names.add(threading.current_thread().name)
        counts.add(torch.get_num_threads())
        return {**batch, "views": [crops.float() / 255 for crops in batch["crops"]]}

    source = images(20, equal=True)
    batch = next(make_loader(source, transform=transform).sequential(batch_size=20))
    assert torch.equal(batch["views"][1], batch["crops"][1] / 255)
    assert counts == {1}
    assert all(name.startswith("loader-") for name in names)


def test_torchs_threads_are_the_consumers_own_again():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        iterator = decoded(images(8, equal=True)).batches(start_step=0, stop_step=9, global_batch_size=4)
        next(iterator)
        assert torch.get_num_threads() == 3
        seen: list[int] = []
        late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        late.start()
        late.join()
        assert seen == [3]
        iterator.close()
    finally:
        torch.set_num_threads(before)


def test_describe_tells_how_images_are_served():
    source = images(40, equal=True)
    assert make(source).describe() == "40 images of 20x20 held in memory, 0 MiB"
    assert decoded(source).describe() == "40 images of 20x20 decoded by 2 threads"
    assert decoded(images(40, equal=False), threads=1).describe() == "40 images decoded by 1 thread"
    assert make(source).image_shape == (3, 20, 20)
    assert make(images(40, equal=False)).image_shape is None


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = available_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_cores() == max(1, alone // 2)


def test_the_containers_quota_limits_the_cores(tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads_module._cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads_module._cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").unlink()
    assert threads_module._cgroup_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("400000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert threads_module._cgroup_quota(tmp_path) == 4


@pytest.mark.parametrize("size", [1, 7, 32, 100, 1000])
def test_chunks_cover_a_batch_once(size):
    bounds = chunk_bounds(size, num_threads=3, smallest=8, largest=32)
    assert [item for start, stop in bounds for item in range(start, stop)] == list(range(size))
    assert all(0 < stop - start <= 32 for start, stop in bounds)
