"""Groups of images fetched from afar: whole, by several threads, ahead of the batches, in bounded memory."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np

from ssl.data.threads import ShouldStop
from ssl.data.window import Step, Use, WindowOrder, sequential_steps

NUM_RECENT = 4
"""Groups kept of those that no batch had planned, such as that of the image that replaces an undecodable one."""
STEPS_AHEAD = 64
"""Batches planned ahead at most, where a group lasts for many."""
_POLL = 0.1  # seconds between two looks at whether to stop waiting
_GOODBYE = 2.0  # seconds that threads have to end; one that hangs in the network is left behind

Group = Sequence[bytes]
Fetch = Callable[[int, threading.Event], Group]
"""Reads a group by its number; gives up between two attempts where the event is set. Raises StreamError."""


class StreamError(ValueError):
    """A group could not be read. No OSError: the images are not bad, and no other ones take their place."""


@dataclass(frozen=True)
class StreamSettings:
    """How a set is streamed; each value is a setting of `data.source`."""

    window: int = 16384
    """Images that are mixed, see WindowOrder."""
    lanes: int = 8
    """Parts of an epoch that each batch takes equally many images from."""
    readers: int = 8
    """Groups read at the same time, and half of those that are read ahead; 0 reads each when it is needed."""
    retries: int = 4
    """Further attempts at a read that failed, after 0.5, 1, 2... seconds."""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """For the file system's constructor."""

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("lanes", 1), ("readers", 0), ("retries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.source.{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Groups:
    """In which groups of a stream the images of a source lie: starts[g] to starts[g+1] in group `numbers[g]`."""

    stream: Stream
    numbers: np.ndarray  # (G,)
    starts: np.ndarray  # (G+1,)

    def __len__(self) -> int:
        return len(self.numbers)

    def of(self, index: np.ndarray) -> np.ndarray:
        """The number of each image's group in the stream."""
        return self.numbers[np.searchsorted(self.starts, index, "right") - 1]

    def subset(self, indices: np.ndarray) -> Groups:
        """The groups of the images at `indices`. Raises ValueError unless they are sorted."""
        if (np.diff(indices) < 0).any():
            raise ValueError("a part of a streamed set is read in its order; sort the indices")
        borders = np.searchsorted(indices, self.starts)
        kept = np.flatnonzero(np.diff(borders))
        return Groups(self.stream, self.numbers[kept], np.append(borders[kept], len(indices)))

    def sample(self, count: int) -> np.ndarray:
        """Sorted indices of up to `count` images, half from the first group and half from the last."""
        ends = (self.starts[:2], self.starts[-2:])
        parts = [np.linspace(low, high - 1, min(-(-count // 2), high - low)).astype(np.int64) for low, high in ends]
        return np.unique(np.concatenate(parts))

    def checksum(self) -> int:
        """CRC-32 of the groups' sizes, in images and in bytes: tells another set without reading an image."""
        sizes = np.stack([self.numbers, np.diff(self.starts), self.stream.sizes[self.numbers]])  # (3, G)
        return zlib.crc32(np.ascontiguousarray(sizes, np.int64).tobytes())

    def check_memory(self, order: WindowOrder, *, world_size: int) -> None:
        """Raise ValueError where the window of one rank takes more memory than the stream may hold."""
        sizes, lanes = self.stream.sizes[self.numbers], order.lanes_of_a_rank(world_size)
        window = lanes * order.reach * sizes.sum() / self.starts[-1]
        largest = lanes * sizes.max()  # each lane has begun a group that it has not needed before
        if min(window + largest, sizes.sum()) > self.stream.held_bytes:
            raise ValueError(
                f"a window of {order.num_lanes * order.reach:,} images takes {window / 2**30:.2g} GiB on each of "
                f"{world_size} ranks, and the row groups that {lanes} lanes begin up to {largest / 2**30:.2g}, more "
                f"than data.source.held_gib={self.stream.held_bytes / 2**30:.2g} allows; raise that, lower "
                "data.source.window or data.source.lanes, or write smaller row groups (python -m ssl.prepare)"
            )


def groups_of(source: Any) -> Groups | None:
    """The groups in which a source is streamed; None where its images are read one by one."""
    return getattr(source, "groups", None)


def in_order(source: Any) -> Iterator[int]:
    """The indices of a source's images in turn; of a streamed one each when its image is here and others on the way."""
    groups = groups_of(source)
    if groups is None:
        yield from range(len(source))
        return
    steps = sequential_steps(groups.starts, 1, 0, len(source), epoch=0)
    with groups.stream.reading(groups, steps) as reading:
        for step in reading:
            reading.wait(step.index, lambda: False)
            yield int(step.index[0])
            reading.done(step)


class Stream:
    """The groups of a set, of `sizes` (G,) bytes each: those that batches are being made of, read ahead of them.

    `fetch` reads a group by its number.
    """

    def __init__(self, fetch: Fetch, sizes: np.ndarray, *, settings: StreamSettings, held_bytes: int) -> None:
        self.fetch = fetch
        self.sizes = sizes
        self.settings = settings
        self.held_bytes = held_bytes
        self.readings: tuple[Reading, ...] = ()  # that are open; replaced, because other threads go through it
        self._recent: OrderedDict[int, Group] = OrderedDict()
        self._fetching = threading.Lock()  # of the recent ones
        self._opening = threading.Lock()
        self._never = threading.Event()

    def group(self, number: int) -> Group:
        """A group that is held, else read now. Raises StreamError."""
        for reading in self.readings:
            if (group := reading.get(number)) is not None:
                return group
        with self._fetching:
            if number not in self._recent:
                self._recent[number] = self.fetch(number, self._never)
            self._recent.move_to_end(number)
            while len(self._recent) > NUM_RECENT:
                self._recent.popitem(last=False)
            return self._recent[number]

    def reading(self, groups: Groups, steps: Iterable[Step]) -> Reading:
        """The batches' groups, read ahead of them. Use it as a context manager."""
        return Reading(self, groups, steps)

    def open(self, reading: Reading) -> None:
        """Find groups in what `reading` holds."""
        with self._opening:
            self.readings = (*self.readings, reading)

    def close(self, reading: Reading) -> None:
        """Find no more groups there."""
        with self._opening:
            self.readings = tuple(each for each in self.readings if each is not reading)


class _Held:
    """A group that is wanted, on its way or here."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.steps: dict[Use, int] = {}  # planned batches that are not made yet, by the use that they are of
        self.over: set[Use] = set()  # uses that no batch after the planned ones has
        self.is_needed = False  # by a batch that has been started
        self.is_claimed = False
        self.group: Group | None = None
        self.error: BaseException | None = None


class Reading:
    """The batches of `steps` in turn, with their groups on the way.

    Groups are fetched in the order in which batches need them. Beyond those that started batches need, twice as many as
    there are readers are on the way or here, no more than batches have needed so far, and only while all of them fit in
    the stream's `held_bytes`. A group leaves when the last batch with an image of it is made.
    """

    def __init__(self, stream: Stream, groups: Groups, steps: Iterable[Step]) -> None:
        self._stream, self._groups = stream, groups
        self._steps = iter(steps)
        self._next: Step | None = None  # the first one that is not planned
        self._planned: deque[Step] = deque()
        self._held: dict[int, _Held] = {}  # by the group's number in the stream
        self._num_needed = 0
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._wanted: SimpleQueue[_Held | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"stream-{k}", daemon=True) for k in range(stream.settings.readers)
        ]

    def __iter__(self) -> Iterator[Step]:
        """The steps; each one's groups are wanted before it is given."""
        for thread in self._threads:
            thread.start()
        while self._planned or self._peek() is not None:
            if not self._planned:
                self._plan()
            step = self._planned.popleft()
            with self._changed:
                for number in self._numbers(step.needs):
                    held = self._held[number]
                    self._num_needed += not held.is_needed
                    held.is_needed = True
            while self._may_plan():
                self._plan()
            yield step

    def wait(self, index: np.ndarray, should_stop: ShouldStop) -> bool:
        """Wait for the groups of images of a step that was given; False where it is to stop. Raises StreamError."""
        for number in np.unique(self._groups.of(index)).tolist():
            held = self._held.get(number)
            if held is None:  # closed
                return False
            if not self._threads:
                self._read(held)
            while held.group is None:
                if held.error is not None:
                    raise held.error
                if self._closed.is_set() or should_stop():
                    return False
                with self._changed:
                    if held.group is None and held.error is None:
                        self._changed.wait(_POLL)
        return True

    def done(self, step: Step) -> None:
        """The step's batch is made: let its groups go, as far as no other one needs them."""
        with self._changed:
            for use in step.needs:
                held = self._held.get(self._number(use))
                if held is not None:
                    held.steps[use] -= 1
                    self._let_go(held, use)

    def get(self, number: int) -> Group | None:
        """A group, where it is here."""
        held = self._held.get(number)
        return None if held is None else held.group

    @property
    def num_held(self) -> int:
        """Groups that are here or on their way."""
        return len(self._held)

    def close(self) -> None:
        """Let all groups go, and end the threads."""
        self._closed.set()
        for _ in self._threads:
            self._wanted.put(None)
        deadline = time.monotonic() + _GOODBYE
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0))
        with self._changed:
            self._held.clear()
            self._changed.notify_all()
        self._stream.close(self)
        _open_readings.discard(self)

    def __enter__(self) -> Reading:
        self._stream.open(self)
        _open_readings.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _peek(self) -> Step | None:
        if self._next is None:
            self._next = next(self._steps, None)
        return self._next

    def _may_plan(self) -> bool:
        step = self._peek()
        if step is None or len(self._planned) >= STEPS_AHEAD:
            return False
        with self._changed:
            num_ahead = sum(not held.is_needed for held in self._held.values())
            num_bytes = sum(held.size for held in self._held.values())
        new = [number for number in self._numbers(step.needs) if number not in self._held]
        num_bytes += int(self._stream.sizes[new].sum())
        most = min(2 * len(self._threads), self._num_needed)
        return num_ahead < most and num_bytes <= self._stream.held_bytes

    def _plan(self) -> None:
        """Want the groups of the next step."""
        step, self._next = self._peek(), None
        assert step is not None
        with self._changed:
            for use in step.needs:
                number = self._number(use)
                if number not in self._held:
                    self._held[number] = held = _Held(number, int(self._stream.sizes[number]))
                    self._wanted.put(held)
                steps = self._held[number].steps
                steps[use] = steps.get(use, 0) + 1
            for use in step.over:
                held = self._held.get(self._number(use))
                if held is not None and use in held.steps:
                    held.over.add(use)
                    self._let_go(held, use)
        self._planned.append(step)

    def _let_go(self, held: _Held, use: Use) -> None:
        if use not in held.over or held.steps[use]:
            return
        del held.steps[use]
        if not held.steps:
            del self._held[held.number]

    def _number(self, use: Use) -> int:
        return int(self._groups.numbers[use[2]])

    def _numbers(self, uses: list[Use]) -> list[int]:
        return list(dict.fromkeys(self._number(use) for use in uses))

    def _run(self) -> None:
        while (held := self._wanted.get()) is not None and not self._closed.is_set():
            self._read(held)

    def _read(self, held: _Held) -> None:
        with self._changed:
            if held.is_claimed:
                return
            held.is_claimed = True
        try:
            held.group = self._stream.fetch(held.number, self._closed)
        except BaseException as error:  # raised again by `wait`
            held.error = error
        with self._changed:
            self._changed.notify_all()


_open_readings: weakref.WeakSet[Reading] = weakref.WeakSet()


@atexit.register
def _close_readings() -> None:
    for reading in list(_open_readings):
        reading.close()
