from __future__ import annotations

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import torch

from ssl.data.augment import Augment
from ssl.data.loader import Loader
from ssl.data.recycled import KEPT, SIZES, Recycled
from ssl.data.views import View
from tests.image_list import ImageList, png


def test_memory_is_used_again_once_the_last_view_of_it_is_gone():
    recycled = Recycled()
    first = recycled.empty((3, 4), torch.float32)
    place, part = first.data_ptr(), first[1].numpy()
    del first
    second = recycled.empty((3, 4), torch.float32)
    assert second.data_ptr() != place  # a row of it was still looked at
    del part
    third = recycled.empty((4, 3), torch.int32)
    assert third.data_ptr() == place


def test_two_tensors_that_are_held_never_share_memory():
    recycled = Recycled()
    held = []
    for round_ in range(5):
        held += [recycled.empty((64,), torch.int64).fill_(len(held) + number) for number in range(3)]
        del held[round_]  # so that some memory is used again
    values = [tensor.unique().tolist() for tensor in held]
    assert all(len(value) == 1 for value in values)
    assert len({tensor.data_ptr() for tensor in held}) == len(held)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_a_tensor_has_the_shape_and_type_asked_for(dtype):
    tensor = Recycled().empty((2, 3, 5), dtype)
    assert (tensor.shape, tensor.dtype) == ((2, 3, 5), dtype)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    assert Recycled().empty((0, 3), dtype).shape == (0, 3)


def test_a_tensor_outlives_what_it_came_from():
    recycled = Recycled()
    tensor = recycled.empty((1000,), torch.int64).copy_(torch.arange(1000))
    del recycled
    gc.collect()
    others = [torch.full((1000,), 7, dtype=torch.int64) for _ in range(100)]
    assert tensor.data_ptr() not in [other.data_ptr() for other in others]
    assert torch.equal(tensor, torch.arange(1000))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_what_holds_recycled_memory_can_be_copied(copied):
    view = View()
    augment = Augment([view], mean=[0.5] * 3, std=[0.2] * 3)
    crops = torch.arange(3 * 16, dtype=torch.uint8).view(1, 3, 4, 4)
    parameters = {"flip": np.array([True])}
    expected = augment.make_view(view, crops, parameters)
    assert torch.equal(copied(augment).make_view(view, crops, parameters), expected)


@pytest.mark.parametrize("in_memory_gib", [0.0, 1.0], ids=["decoded", "held"])
def test_batches_that_are_kept_stay_as_they_were_while_others_are_made(in_memory_gib: float):
    images = [png(np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)) for number in range(12)]
    view = View(flip=0.5)
    with Loader(
        ImageList(images),
        [view],
        size=(6, 6),
        channels=3,
        seed=0,
        in_memory_gib=in_memory_gib,
        transform=Augment([view], mean=[0.5] * 3, std=[0.2] * 3),
    ) as loader:
        kept, copies = [], []
        for batch in loader.batches(start_step=0, stop_step=40, global_batch_size=4):
            (views,) = batch["views"]
            for part in (views[1], views[:, 0].numpy(), views.flatten()[5:9]):
                kept.append(part)
                copies.append(np.asarray(part).copy())
            if len(kept) > 30:
                del kept[::2], copies[::2]  # so that some memory comes back
    for part, expected in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(np.asarray(part), expected)


def test_no_more_is_kept_than_was_in_use_at_once_and_of_few_sizes():
    recycled = Recycled()
    for size in range(1, 3 * SIZES):
        held = [recycled.empty((size,), torch.uint8) for _ in range(2 * KEPT)]
        del held
    kept = {size: len(blocks) for size, blocks in recycled._free.items()}
    assert kept == dict.fromkeys(range(2 * SIZES, 3 * SIZES), KEPT)
    assert recycled._lent == {}


def test_threads_that_ask_at_once_get_memory_of_their_own():
    recycled, wrong = Recycled(), []

    def work(number: int) -> None:
        for step in range(300):
            tensor = recycled.empty((256,), torch.int64).fill_(number * 1000 + step)
            if not bool((tensor == number * 1000 + step).all()):
                wrong.append((number, step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
