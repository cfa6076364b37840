"""One batch in the making: what the loader's threads do with its images, held, encoded or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssl.data.decode import crop_resize_into
from ssl.data.jpeg_rows import Layout
from ssl.data.memory import MemoryImages
from ssl.data.policies import apply_policy_
from ssl.data.reader import UNREADABLE
from ssl.data.stream import Reading
from ssl.data.threads import ShouldStop, chunk_bounds
from ssl.data.window import Step
from ssl.randomness import uniforms

if TYPE_CHECKING:
    from ssl.data.loader import Loader
    from ssl.data.views import View

Batch = dict[str, Any]
Parameters = dict[str, np.ndarray]

# Drawing a view's numbers costs about the same for one image as for thirty, so chunks are not made smaller than they
# must be; above these sizes nothing is gained, and a stop has to wait for longer.
DECODED_CHUNK = (8, 32)
HELD_CHUNK = (64, 256)


class BatchJob:
    """One batch in the making: threads fill chunks of preallocated tensors."""

    chunk_limits: tuple[int, int]

    def __init__(self, loader: Loader, index: np.ndarray, epoch: int):
        self.loader = loader
        self.index = index
        self.shown = index.copy()  # the image whose pixels a slot has: another one where the slot's own is bad
        self.missed: set[int] = set()  # the bad images that were passed over
        self.epoch = epoch
        smallest, largest = self.chunk_limits
        self.chunks: Sequence[tuple[int, int]] = chunk_bounds(
            len(index), num_threads=loader.threads, smallest=smallest, largest=largest
        )
        shape = (len(index), loader.channels, *loader.size)
        self.crops = [loader.empty(shape) for _ in loader.views]
        self.parameters: dict[int, list[Parameters]] = {}  # by the chunk's start: V dicts

    def work(self, start: int, stop: int, should_stop: ShouldStop) -> None:
        raise NotImplementedError

    def finish(self) -> tuple[Batch, list[int]]:
        """The batch as a dict of tensors, and the bad images that it does without."""
        loader = self.loader
        chunks = [self.parameters[start] for start, _ in self.chunks]
        parameters = [
            {name: self._tensor(np.concatenate([chunk[view][name] for chunk in chunks])) for name in chunks[0][view]}
            for view in range(len(loader.views))
        ]
        noise = uniforms(loader.seed, self.epoch, self.index, "noise", loader.num_noise)
        batch = {
            "index": self._tensor(self.index),
            "label": self._tensor(np.asarray(loader.source.labels)[self.shown].astype(np.int64)),
            "crops": self.crops,
            "parameters": parameters,
            "noise": self._tensor(noise),
        }
        return batch if loader.transform is None else loader.transform(batch), sorted(self.missed)

    def do_policy(self, view: View, crops: torch.Tensor, parameters: Parameters, number: int) -> None:
        """Flip the crop of this `number` in its chunk and do its policy, in place."""
        row = slice(number, number + 1)
        chosen = {name: parameters[name][row] for name in ("policy_flip", "policy_op", "policy_argument")}
        apply_policy_(crops[row], chosen, interpolation=view.interpolation, fill=self.loader.fill)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self.loader.pin_memory else tensor


class HeldBatch(BatchJob):
    """A batch from images held in memory: crops are made for a chunk at once."""

    chunk_limits = HELD_CHUNK

    def __init__(
        self,
        loader: Loader,
        index: np.ndarray,
        epoch: int,
        *,
        shown: np.ndarray,
        missed: set[int],
        drawn: list[Parameters],
    ):
        super().__init__(loader, index, epoch)
        assert loader.memory is not None
        self.memory: MemoryImages = loader.memory
        self.shown, self.missed = shown, missed
        self.drawn = drawn  # every view's parameters, for the whole batch

    def work(self, start: int, stop: int, should_stop: ShouldStop) -> None:
        shown = self.shown[start:stop]
        parameters = [{name: values[start:stop] for name, values in drawn.items()} for drawn in self.drawn]
        for view, drawn, crops in zip(self.loader.views, parameters, self.crops):
            self.memory.crop(shown, drawn["box"], crops[start:stop], interpolation=view.interpolation)
            if view.policy is None:
                continue
            for number in range(stop - start):
                if should_stop():
                    return
                self.do_policy(view, crops[start:stop], drawn, number)
        self.parameters[start] = parameters


@dataclass
class _Opened:
    """An image that has been read but not decoded: the one for a slot, or the one that stands in for it."""

    index: int
    attempt: int
    data: bytes | np.ndarray
    size: tuple[int, int]
    layout: Layout | None


class DecodedBatch(BatchJob):
    """A batch from encoded images: of each what its views need is decoded once, for all of them.

    In the crops' memory the channels of a pixel lie together, as crops are made fastest.
    """

    chunk_limits = DECODED_CHUNK

    def __init__(self, loader: Loader, index: np.ndarray, epoch: int):
        super().__init__(loader, index, epoch)
        size = (len(index), *loader.size, loader.channels)
        self.crops = [crops.view(size).permute(0, 3, 1, 2) for crops in self.crops]  # V times (B, C, h, w)

    def work(self, start: int, stop: int, should_stop: ShouldStop) -> None:
        # The headers are read first, so that the numbers of a chunk's views are drawn at once.
        opened = []
        for slot in range(start, stop):
            if should_stop():
                return
            opened.append(self._read(slot, attempt=0))
        sizes = np.array([image.size for image in opened], np.int64)  # (B, 2)
        self.parameters[start] = parameters = self.loader.sample(self.index[start:stop], sizes, self.epoch)
        for number, slot in enumerate(range(start, stop)):
            if should_stop():
                return
            pixels, corner = self._decode(slot, number, opened[number], parameters)
            self._crop(slot, pixels, corner, [drawn["box"][number].tolist() for drawn in parameters])
            for view, drawn, crops in zip(self.loader.views, parameters, self.crops):
                if view.policy is not None:
                    self.do_policy(view, crops[start:stop], drawn, number)

    def _read(self, slot: int, *, attempt: int) -> _Opened:
        """The first readable image among the slot's own and its replacements from `attempt` on.

        An image that some crops can show is tried again: what a slot shows must not depend on which crops met the
        damage before.
        """
        bad = self.loader.bad_list
        while True:
            index = bad.candidate(int(self.index[slot]), attempt)
            if not bad.is_given_up(index):
                try:
                    return _Opened(index, attempt, *self.loader.reader.open_rows(index))
                except UNREADABLE as error:
                    bad.add(index, error)
            self.missed.add(index)
            attempt += 1

    def _decode(
        self, slot: int, number: int, opened: _Opened, parameters: list[Parameters]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """The pixels (R, S, C) that the views of the slot need, `number` in its chunk, and (top, left) of the first.

        Where they cannot be decoded, another image is shown, and the views' numbers are those of its size.
        """
        while True:
            boxes = [drawn["box"][number].tolist() for drawn in parameters]  # V times (top, left, height, width)
            top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
            bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
            box = (top, left, bottom - top, right - left)
            try:
                pixels = self.loader.reader.decode_window(opened.index, opened.data, opened.size, opened.layout, box)
            except UNREADABLE as error:
                self.loader.bad_list.add(opened.index, error, in_some_rows=opened.layout is not None)
                self.missed.add(opened.index)
                size, opened = opened.size, self._read(slot, attempt=opened.attempt + 1)
                if opened.size != size:
                    self._sample_again(slot, number, parameters, opened.size)
                continue
            self.shown[slot] = opened.index
            return pixels

    def _sample_again(self, slot: int, number: int, parameters: list[Parameters], size: tuple[int, int]) -> None:
        for drawn, again in zip(
            parameters, self.loader.sample(self.index[slot : slot + 1], np.array([size], np.int64), self.epoch)
        ):
            for name, values in again.items():
                drawn[name][number] = values[0]

    def _crop(self, slot: int, pixels: np.ndarray, corner: tuple[int, int], boxes: list[list[int]]) -> None:
        for view, (top, left, height, width), crops in zip(self.loader.views, boxes, self.crops):
            box = (top - corner[0], left - corner[1], height, width)
            crop_resize_into(crops[slot], pixels, box, view.interpolation)  # (C, h, w)


class StreamedBatch(DecodedBatch):
    """A batch whose images come in groups from afar."""

    def __init__(self, loader: Loader, step: Step, reading: Reading):
        super().__init__(loader, step.index, step.epoch)
        self.step, self.reading = step, reading

    def work(self, start: int, stop: int, should_stop: ShouldStop) -> None:
        if self.reading.wait(self.index[start:stop], should_stop):
            super().work(start, stop, should_stop)

    def finish(self) -> tuple[Batch, list[int]]:
        self.reading.done(self.step)
        return super().finish()
