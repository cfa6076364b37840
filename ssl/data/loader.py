"""Batches of uint8 crops and their views' parameters, made in threads ahead of the device.

Which images a batch holds and how each is cropped is a pure function of (seed, step): threads, ranks, prefetch, the
speed of reads and a resume do not enter. How the images are stored only does where they are streamed, see WindowOrder.
Whether they are held decoded does in two ways: held and decoded crops agree to one level, before a policy, and a JPEG
that is damaged below a crop can be shown in it where it is not held.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssl.data.bad_images import BadImages, BadList
from ssl.data.batch_jobs import Batch, BatchJob, DecodedBatch, HeldBatch, Parameters, StreamedBatch
from ssl.data.jpeg_window import compile_decoder
from ssl.data.memory import common_size, hold
from ssl.data.reader import Reader
from ssl.data.recycled import Recycled
from ssl.data.stream import groups_of
from ssl.data.threads import available_cores, run_ahead
from ssl.data.window import Step, WindowOrder, sequential_steps
from ssl.randomness import shuffle

if TYPE_CHECKING:
    from ssl.data.sources import Source
    from ssl.data.views import View

__all__ = ["BadImages", "Batch", "Loader"]

log = logging.getLogger(__name__)

DRAWN_TOGETHER = 2048
"""Held images whose views' numbers are drawn at once, by the consumer: in the threads numpy's many short calls, each of
which lets go of the interpreter's lock, would make them wait for each other."""


class Loader:
    """Reads, decodes and crops a source's images, `prefetch` whole batches ahead.

    A batch is a dict of CPU tensors: `index` (B,), `label` (B,), `crops` V times uint8 (B, C, h, w), `parameters` V
    times a dict of tensors (B, ...), `noise` float32 (B, num_noise). An image that cannot be decoded is replaced: its
    slot keeps its `index`, and the random numbers that follow from it, and has the other image's pixels and label.

    Every batch is its own memory, which is used again once nothing refers to it: at most `prefetch` + 1 batches exist
    beside those that the consumer keeps. `bad` tells the images that were replaced, `in_memory` whether the decoded set
    is held, `image_shape` (C, H, W) where all images agree (where they are not held: all of a sample).

    A streamed source is never held, and its `image_shape` is None: groups of images are read ahead of the batches.

    `transform` is applied to each whole batch by one of the threads: where the model runs on the CPU, `Augment` belongs
    there. In the model's thread torch would cut each small step over all cores, which the loader's threads hold too,
    and wait for the slowest.

    A view's policy, and the flip before it, are done here, on the uint8 crops; `fill` is the colour (C,) in 0..1 of
    what the policy moves in from beyond the edge, as a rule the data's mean; grey where it is left out.

    Raises BadImages when more than `max_bad_fraction` of the images cannot be decoded, and ValueError for impossible
    settings.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        size: tuple[int, int],
        channels: int,
        seed: int,
        num_noise: int = 0,
        threads: int | None = None,
        in_memory_gib: float = 4.0,
        max_bad_fraction: float = 0.01,
        prefetch: int = 2,
        pin_memory: bool = False,
        transform: Callable[[Batch], Batch] | None = None,
        fill: Sequence[float] | None = None,
    ):
        _check_settings(source, threads=threads, prefetch=prefetch)
        _check_policies(views, channels=channels, fill=fill)
        self.source = source
        self.views = list(views)
        self.size = (int(size[0]), int(size[1]))
        self.channels = channels
        self.seed = seed
        self.num_noise = num_noise
        self.threads = available_cores() if threads is None else threads
        self.prefetch = prefetch
        self.transform = transform
        self.fill = fill
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.reader = Reader(source, channels=channels)
        self.bad_list = BadList(source, seed=seed, max_fraction=max_bad_fraction)
        self.groups = groups_of(source)
        limit_gib = in_memory_gib if self.groups is None else 0.0
        self.memory = hold(source, channels=channels, limit_gib=limit_gib, num_threads=self.threads, bad=self.bad_list)
        if self.memory is not None:  # all of them were looked at
            self.bad_list.count(self.bad_list.messages)
        else:
            compile_decoder()
        self.image_shape = self._image_shape()
        self._recycled = Recycled()
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def bad(self) -> dict[int, str]:
        """The images that could not be decoded so far: index to path and reason."""
        return self.bad_list.messages

    @property
    def in_memory(self) -> bool:
        return self.memory is not None

    def describe(self) -> str:
        """One line that tells how the images are served."""
        size = f" of {self.image_shape[1]}x{self.image_shape[2]}" if self.image_shape else ""
        if self.memory is not None:
            how = f"held in memory, {self.memory.num_bytes / 2**20:,.0f} MiB"
        else:
            how = f"decoded by {self.threads} thread{'s' * (self.threads > 1)}"
        if self.groups is not None:
            settings = self.groups.stream.settings
            how += f", streamed in {len(self.groups):,} row groups, mixed in a window of {settings.window:,} images"
        return f"{len(self):,} images{size} {how}"

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Uninitialised uint8 memory for a batch, pinned where there is a GPU; used again once nothing refers to it."""
        if self.pin_memory:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)  # which torch uses again by itself
        return self._recycled.empty(shape, torch.uint8)

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """Whole batches in an epoch; what is left over differs by epoch. Raises ValueError if there is none."""
        return whole_batches(len(self), global_batch_size, where=self.source.name)

    def batches(
        self, *, start_step: int, stop_step: int, global_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """This rank's share of the global batch of each step in [start_step, stop_step), whatever ran before.

        Step s belongs to epoch s // steps_per_epoch. Raises ValueError when the ranks cannot share a batch equally.
        """
        per_epoch = self.steps_per_epoch(global_batch_size)
        if global_batch_size % world_size:
            raise ValueError(
                f"trainer.global_batch_size={global_batch_size} cannot be shared equally by {world_size} ranks; "
                f"use a multiple of {world_size}"
            )
        if self.groups is not None:
            return self._stream(self._streamed_steps(start_step, stop_step, global_batch_size, rank, world_size))
        share = global_batch_size // world_size

        def jobs() -> Iterator[BatchJob]:
            step = start_step
            while step < stop_step:
                epoch, number = divmod(step, per_epoch)
                count = min(max(DRAWN_TOGETHER // share, 1), stop_step - step, per_epoch - number)
                first = (number + np.arange(count)) * global_batch_size + rank * share  # (steps,)
                index = shuffle(self.seed, epoch, len(self), first[:, None] + np.arange(share))  # (steps, B)
                yield from self._jobs(list(index), epoch)
                step += count

        return self._start(jobs())

    def sequential(self, *, batch_size: int, rank: int = 0, world_size: int = 1, epoch: int = 0) -> Iterator[Batch]:
        """This rank's share of all images, in order, each once over all ranks; the last batch may be smaller."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        first, last = len(self) * rank // world_size, len(self) * (rank + 1) // world_size
        if self.groups is not None:
            return self._stream(sequential_steps(self.groups.starts, batch_size, first, last, epoch=epoch))

        def jobs() -> Iterator[BatchJob]:
            for start in range(first, last, batch_size):
                yield from self._jobs([np.arange(start, min(start + batch_size, last))], epoch)

        return self._start(jobs())

    def close(self) -> None:
        """Stop the threads of every iterator that is still open."""
        for iterator in list(self._open):
            iterator.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, jobs: Iterable[BatchJob]) -> Iterator[Batch]:
        iterator = self._run_ahead(jobs)
        self._open.add(iterator)
        return iterator

    def _run_ahead(self, jobs: Iterable[BatchJob]) -> Iterator[Batch]:
        with contextlib.closing(run_ahead(jobs, num_threads=self.threads, ahead=self.prefetch)) as made:
            yield from map(self._hand_out, made)  # which holds none of them

    def _hand_out(self, made: tuple[Batch, list[int]]) -> Batch:
        batch, missed = made
        self.bad_list.count(missed)
        return batch

    def _jobs(self, steps: list[np.ndarray], epoch: int) -> Iterator[BatchJob]:
        """A job for each step's images (B,)."""
        if self.memory is None:
            yield from (DecodedBatch(self, index, epoch) for index in steps)
            return
        missed: list[set[int]] = [set() for _ in steps]
        shown = [self._shown(index, passed_over) for index, passed_over in zip(steps, missed)]
        drawn = self.sample(np.concatenate(steps), self.memory.sizes(np.concatenate(shown)), epoch)
        start = 0
        for index, images, passed_over in zip(steps, shown, missed):
            part = slice(start, start := start + len(index))
            own = [{name: values[part] for name, values in parameters.items()} for parameters in drawn]
            yield HeldBatch(self, index, epoch, shown=images, missed=passed_over, drawn=own)

    def _shown(self, index: np.ndarray, missed: set[int]) -> np.ndarray:
        """The images that stand for `index` (B,): others where these are bad, which are put into `missed`."""
        if not self.bad:
            return index
        return np.array([self.bad_list.replacement(place, missed) for place in index.tolist()], np.int64)

    def sample(self, index: np.ndarray, sizes: np.ndarray, epoch: int) -> list[Parameters]:
        """Every view's parameters for the images `index` (B,) of `sizes` (B, 2), their (height, width)."""
        return [
            view.sample(
                seed=self.seed,
                epoch=epoch,
                index=index,
                view=number,
                height=sizes[:, 0],
                width=sizes[:, 1],
                size=self.size,
            )
            for number, view in enumerate(self.views)
        ]

    def _streamed_steps(
        self, start_step: int, stop_step: int, global_batch_size: int, rank: int, world_size: int
    ) -> Iterator[Step]:
        assert self.groups is not None
        settings = self.groups.stream.settings
        order = WindowOrder(
            self.groups.starts,
            seed=self.seed,
            window=settings.window,
            lanes=settings.lanes,
            global_batch_size=global_batch_size,
        )
        self.groups.check_memory(order, world_size=world_size)
        if rank == 0 and order.num_lanes % world_size:
            log.warning(
                "%d ranks share the %d lanes of %s, so several ranks read the same row groups; with data.source.lanes="
                "%d (which divides the batch) each is read by one",
                *(world_size, order.num_lanes, self.source.name, world_size),
            )
        return order.steps(start_step, stop_step, rank=rank, world_size=world_size)

    def _stream(self, steps: Iterable[Step]) -> Iterator[Batch]:
        """The steps' batches, each made when the groups of its images are here."""
        iterator = self._read_ahead(steps)
        self._open.add(iterator)
        return iterator

    def _read_ahead(self, steps: Iterable[Step]) -> Iterator[Batch]:
        assert self.groups is not None
        with self.groups.stream.reading(self.groups, steps) as reading:
            jobs = (StreamedBatch(self, step, reading) for step in reading)
            yield from self._run_ahead(jobs)

    def _image_shape(self) -> tuple[int, int, int] | None:
        if self.memory is not None:
            return (self.channels, *self.memory.pixels.shape[2:]) if self.memory.equal else None
        if self.groups is not None:
            return None
        size = common_size(self.source)
        return None if size is None else (self.channels, *size)


def whole_batches(num_images: int, global_batch_size: int, *, where: str) -> int:
    """How many whole batches an epoch of the images of `where` has. Raises ValueError if there is none."""
    if not 1 <= global_batch_size <= num_images:
        raise ValueError(
            f"trainer.global_batch_size={global_batch_size} needs that many images, {where} has {num_images}; set "
            f"trainer.global_batch_size between 1 and {num_images}"
        )
    return num_images // global_batch_size


def _check_policies(views: Sequence[View], *, channels: int, fill: Sequence[float] | None) -> None:
    policies = [view.policy for view in views if view.policy is not None]
    if policies and channels not in (1, 3):
        raise ValueError(
            f"policy={policies[0]} works on grey or RGB images, the data has {channels} channels; set policy to null"
        )
    if fill is not None and len(fill) != channels:
        raise ValueError(f"fill needs one number per channel: data.channels={channels}, got {list(fill)}")


def _check_settings(source: Source, *, threads: int | None, prefetch: int) -> None:
    if len(source) == 0:
        raise ValueError(f"{source.name} has no images; check data.root, data.limit and the split")
    if threads is not None and threads < 1:
        raise ValueError(f"loader.threads must be at least 1, got {threads}; leave it out to use all cores")
    if prefetch < 0:
        raise ValueError(f"loader.prefetch must be 0 or more, got {prefetch}")
