"""The page of a run, kept up to date at its checkpoints: what the group `report` names, called where it can do no harm.

A report never stops a run: what goes wrong in it is one warning. Its pictures of features are made on the first rank,
between steps, under the care that `OnlineSubject` asks for; its page is written there too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

import ssl.distributed as distributed
from ssl.averaging import weights_of
from ssl.data.sources import Source
from ssl.methods.base import Method
from ssl.online import OnlineSubject, StopRun
from ssl.sharding import gathered_weights
from ssl.starts import COMPLETE, ENDED, FAILED, STOPPED, note_end, note_start
from ssl.stopping import Stopped
from ssl.tracking import Tracker

log = logging.getLogger(__name__)
RUNNING = "running"


@dataclass(frozen=True)
class Moment:
    """Where a run is when its report is made."""

    out: Path
    step: int
    """Completed steps."""
    stop_step: int
    train_seconds: float
    """Since the run began, all its starts together, without the time between them."""
    state: str
    """running, or how it ended: complete, stopped, ended (by an evaluation), failed."""
    message: str | None = None
    """Of what ended it."""


class Report(Protocol):
    """What the group `report` names by `_target_`. All methods are called on the first rank."""

    def wants_pictures(self, moment: Moment, *, images_per_second: float | None) -> bool:
        """Whether there is time for pictures of features now."""
        ...

    def pictures(self, moment: Moment, subject: OnlineSubject, source: Source, tracker: Tracker) -> None:
        """Make pictures of the features of some of the run's images, and give them to the tracker."""
        ...

    def write(self, moment: Moment) -> None:
        """Write the page, or leave it as it is where there is no time for it. At the end it is written in any case."""
        ...


@dataclass
class Reporter:
    """Calls a run's report at its checkpoints and at its end; enter it for the time of the training.

    Without a report it only notes the starts and ends of the run. Every rank has one.
    """

    report: Report | None
    out: Path
    stop_step: int
    start_step: int
    tracker: Tracker
    method: Method
    source: Source
    subject: Callable[[int], OnlineSubject]
    average: Callable[[int], dict[str, Tensor] | None]
    """The averaged weights by which a checkpoint of a step is judged; None where there are none."""
    train_seconds: Callable[[], float]
    images_per_second: Callable[[], float | None]
    step: int = 0
    """The last one that is known to be done: of the last log line or checkpoint."""
    _warned: bool = False

    def logged(self, step: int) -> None:
        """The metrics of a step were logged."""
        self.step = step

    def saved(self, step: int, final: bool) -> None:
        """A checkpoint was written: on every rank."""
        self.step = step
        if self.report is None:
            return
        moment, report = self._moment(RUNNING), self.report
        wants = False
        if distributed.is_main() and not (final and step < self.stop_step):  # who asked for the stop may not wait
            with self._harmless():
                wants = report.wants_pictures(moment, images_per_second=self.images_per_second())
        if distributed.from_main(wants):
            with torch.no_grad(), weights_of(self.method, self.average(step)), gathered_weights(self.method):
                if distributed.is_main():
                    with self._harmless():
                        report.pictures(moment, self.subject(step), self.source, self.tracker)
        if distributed.is_main() and not final:  # at the end it is written once, when it is known how the run ended
            with self._harmless():
                report.write(moment)

    def __enter__(self) -> Reporter:
        self.step = self.start_step
        if distributed.is_main():
            device = self.subject(self.step).device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            with self._harmless():
                note_start(
                    self.out,
                    step=self.start_step,
                    stop_step=self.stop_step,
                    device=name,
                    world_size=distributed.world_size(),
                    num_features=getattr(self.method.backbone, "num_features", None),
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not distributed.is_main():
            return
        how = _how(error, complete=self.step >= self.stop_step)
        message = None if error is None else f"{error}" or type(error).__name__
        with self._harmless():
            note_end(self.out, step=self.step, how=how, message=message)
            if self.report is not None:
                self.report.write(self._moment(how, message))

    def _moment(self, state: str, message: str | None = None) -> Moment:
        return Moment(self.out, self.step, self.stop_step, self.train_seconds(), state, message)

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turn whatever goes wrong into one warning for the whole run."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                self._warned = True
                said = f"{type(error).__name__}: {error}"
                log.warning("the run's report could not be made (%s); the run goes on without", said[:300])


def _how(error: BaseException | None, *, complete: bool) -> str:
    if error is None:
        return COMPLETE if complete else STOPPED
    if isinstance(error, StopRun):
        return ENDED
    return STOPPED if isinstance(error, Stopped | KeyboardInterrupt | SystemExit) else FAILED
