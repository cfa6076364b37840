"""The page of a run that is going on: what the group `report` names, called by ssl/run_report.py."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from eval.pages.page import write_page
from eval.report.budget import Budget
from eval.report.gather import RUNNING, gather, result_paths
from eval.report.metrics import History
from eval.report.page_pictures import kept_parts
from eval.report.run_page import Spent, run_page
from ssl.data.sources import Source
from ssl.methods.relative_location import RelativeLocation
from ssl.online import OnlineSubject
from ssl.run_report import Moment
from ssl.tracking import Tracker

log = logging.getLogger(__name__)

NAME = "report.html"
LEAST_ROOM = 200_000_000
"""Bytes that the disk must have, else a page is left out while the run goes on: the next checkpoint needs them more."""
READ_BYTES = 8_000_000
"""Of metrics.jsonl at once, some 0.2 s; of a longer piece a sample is read."""


class RunReport:
    """Writes `report.html` at checkpoints, with pictures of the features of `sample` images where there is time.

    All refreshes together take at most `max_share` of the training time, but for the last, which is always made: what
    the next one will take is predicted by the one before.
    """

    def __init__(self, *, max_share: float = 0.02, sample: int = 512) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"report.max_share must lie in [0, 1], got {max_share}; report=none makes no page at all")
        if sample < 0 or 0 < sample < 16:
            raise ValueError(f"report.sample must be 16 images or more, or 0 for no neighbours and map; got {sample}")
        self.max_share, self.sample = max_share, sample
        self._budget: Budget | None = None
        self._history = History()
        self._features: Any = None  # a FeatureSample
        self._pretext: Any = None  # a PretextSample
        self._failed: str | None = None

    def wants_pictures(self, moment: Moment, *, images_per_second: float | None) -> bool:
        """Whether the pictures of the features, and the page after them, are within the share."""
        if self.sample == 0 or self._failed is not None:
            return False
        budget = self._budget_of(moment.out)
        seconds = budget.expected_pictures(self.sample, images_per_second) + budget.expected_page()
        wants = budget.allows(seconds, train_seconds=moment.train_seconds, max_share=self.max_share)
        budget.pictures_left_out += not wants
        return wants

    def pictures(self, moment: Moment, subject: OnlineSubject, source: Source, tracker: Tracker) -> None:
        """Give the tracker the neighbours of some images and the map of all of the sample, and of relative location its
        answers about a few.
        """
        began = time.perf_counter()
        try:
            # Here, as most runs are too short for pictures, and matplotlib takes a second to load.
            from eval.report.feature_pictures import FeatureSample, map_picture, neighbours_picture

            if self._features is None:
                self._features = FeatureSample(source, subject, num_images=self.sample)
            seen = self._features.read(subject)
            neighbours, rest = neighbours_picture(seen), map_picture(seen)
            tracker.images(moment.step, "neighbours", neighbours)
            tracker.images(moment.step, "map", rest)
            if isinstance(subject.method, RelativeLocation):
                from eval.report.pretext_picture import PretextSample

                self._pretext = self._pretext or PretextSample(source, subject, subject.method)
                tracker.images(moment.step, "pretext", self._pretext.picture(subject, subject.method))
        except Exception as error:
            self._failed = f"{type(error).__name__}: {error}"[:300]
            raise
        finally:
            self._budget_of(moment.out).add_pictures(time.perf_counter() - began)

    def write(self, moment: Moment) -> None:
        """Make the page, unless there is no time for it and the run goes on."""
        budget = self._budget_of(moment.out)
        left = budget.allows(budget.expected_page(), train_seconds=moment.train_seconds, max_share=self.max_share)
        if moment.state == RUNNING and not (left and shutil.disk_usage(moment.out).free >= LEAST_ROOM):
            budget.num_left_out += 1
            return
        began = time.perf_counter()
        try:
            run = gather(moment.out, history=self._history, most_bytes=READ_BYTES)
            spent = Spent(budget, moment.train_seconds, self.max_share, self.sample, self._failed)
            write_page(moment.out / NAME, run_page(run, moment=moment, spent=spent))
        finally:
            budget.add_page(time.perf_counter() - began)
            budget.keep(moment.out)

    def _budget_of(self, out: Path) -> Budget:
        if self._budget is None:
            self._budget = Budget.of(out)
        return self._budget


def renew(result: Path) -> None:
    """Make the page of the run again in which a result was written, and of the run from which that was fine-tuned.

    Only pages that are there, and of runs that are at an end, are made again; a failure is a warning.
    """
    for out in result.absolute().parents:
        if (out / NAME).exists() and result.absolute() in result_paths(out.absolute()):
            try:
                _renew(out)
            except Exception as error:
                log.warning("%s could not be made again (%s: %s)", out / NAME, type(error).__name__, error)


def _renew(out: Path) -> None:
    """With the pictures of features that eval.report made for the page, where they are of the newest checkpoint."""
    run = gather(out, most_bytes=READ_BYTES)
    if run.is_locked:
        return
    before = (out / NAME).read_text(encoding="utf-8")
    write_page(out / NAME, run_page(run, kept=kept_parts(before, run.saved.step) if run.saved else {}))
