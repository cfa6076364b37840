"""Checkpoints of a run that goes on where one cannot be written: tried again, then saved elsewhere before it stops."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ssl.checkpoint as checkpoint
import ssl.distributed as distributed

log = logging.getLogger(__name__)


class CannotSave(OSError):
    """The run ends because its last step could not be saved in its folder; raised on all ranks alike.

    `folder` is the run folder in which `step` was saved instead, None where that failed too.
    """

    exit_code = 1

    def __init__(self, message: str, *, step: int, folder: Path | None) -> None:
        super().__init__(message)
        self.step, self.folder = step, folder


class Saver:
    """Writes the checkpoints of the run in `out`, and decides with all ranks what happens where that fails."""

    def __init__(
        self,
        out: Path,
        write: Callable[[Path, int], Any],
        *,
        keep_last: int,
        keep_every_steps: int | None,
        max_failed: int,
        fallback: str | Path | None = None,
        everywhere: bool = False,
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        """`write(run_dir, step)` writes one checkpoint as `checkpoint.save` does, on the first rank, or on every rank
        where `everywhere` says that each has a part of it; it raises OSError where it cannot. `max_failed` saves in a
        row may fail; `fallback` is where the last one then goes, None for the system's folder for temporary files.
        """
        self.out, self.write = out, write
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self.max_failed = max_failed
        self.fallback = fallback
        self.everywhere = everywhere
        self.warn = warn
        self.failed = 0

    def save(self, step: int, *, final: bool = False) -> bool:
        """Save `step` and remove what is not kept; returns whether that was possible. Every rank calls it.

        Where it was not, the run goes on to its next checkpoint. After `max_failed` failures in a row, and at once
        where `final` says that there will be no next one, `step` is saved in the fallback folder and CannotSave raised.
        """
        problem = self.attempt(self.out, step)
        if problem is None:
            self.failed = 0
            self._prune(self.out, step)
            return True
        self.failed += 1
        if final or self.failed >= self.max_failed:
            raise self._save_elsewhere(step, problem)
        if distributed.is_main():
            self.warn(
                f"{problem}. The run goes on and tries again at its next checkpoint; {self.failed} of "
                f"trainer.max_failed_saves={self.max_failed} failed in a row. {self._last()}"
            )
        return False

    def attempt(self, run_dir: Path, step: int) -> str | None:
        """Write `step` to `run_dir`, once; why that was not possible, None where it was. The same on every rank."""
        problem = self._write(run_dir, step)
        if isinstance(problem, checkpoint.NoRoom) and run_dir == self.out and self._made_room(step):
            problem = self._write(run_dir, step)
        return None if problem is None else str(problem)

    def _write(self, run_dir: Path, step: int) -> OSError | None:
        problem = None
        if self.everywhere or distributed.is_main():
            try:
                self.write(run_dir, step)
            except OSError as error:
                problem = error if isinstance(error, checkpoint.NoRoom) else OSError(str(error))
        return distributed.from_main(problem)

    def _prune(self, run_dir: Path, step: int) -> None:
        if distributed.is_main():
            with contextlib.suppress(ValueError):  # a folder that cannot be listed now: the next save tries again
                checkpoint.prune(run_dir, newest=step, keep_last=self.keep_last, keep_every_steps=self.keep_every_steps)

    def _made_room(self, step: int) -> bool:
        """Whether checkpoints that the next save makes superfluous were removed ahead of it; on every rank."""
        removed: list[str] = []
        if distributed.is_main():
            with contextlib.suppress(ValueError):
                gone = checkpoint.make_room(
                    self.out, newest=step, keep_last=self.keep_last, keep_every_steps=self.keep_every_steps
                )
                removed = [folder.name for folder in gone]
            if removed:
                self.warn(f"{self.out}: little room is left; removed {', '.join(removed)} before step {step} is saved")
        return bool(distributed.from_main(removed))

    def _save_elsewhere(self, step: int, problem: str) -> CannotSave:
        """Save `step` in the fallback folder; returns what then ends the run, in words."""
        elsewhere = fallback_folder(self.out, self.fallback)
        refused = None
        if distributed.is_main():
            refused = _open(elsewhere)
        refused = distributed.from_main(refused) or self.attempt(elsewhere, step)
        host = distributed.from_main(socket.gethostname())
        if refused is not None:
            text = f"{problem}. Nor could it be saved elsewhere (trainer.fallback): {refused}. Nothing of it is saved. "
            return CannotSave(text + self._last(), step=step, folder=None)
        self._prune(elsewhere, step)
        saved = elsewhere / "checkpoints" / checkpoint.folder_name(step)
        home = self.out.absolute() / "checkpoints"
        text = (
            f"{problem}. Step {step} is saved on {host} in {elsewhere} instead (trainer.fallback), which evaluations "
            f"take as ckpt=. To go on, make room, put it back and run the same command again:\n"
            f"  mkdir -p '{home}' && cp -r '{saved}' '{home}/'"
        )
        return CannotSave(text, step=step, folder=elsewhere)

    def _last(self) -> str:
        try:
            saved = checkpoint.steps_saved(self.out)
        except ValueError as error:
            return str(error)
        return f"The last checkpoint is {saved[-1][1]}" if saved else "There is no earlier checkpoint"


def fallback_folder(out: Path, fallback: str | Path | None) -> Path:
    """The run folder that stands in for `out`: below `fallback`, or the system's folder for temporary files, named
    after `out` so that no two runs share it.
    """
    where = out.absolute()
    base = Path(tempfile.gettempdir()) if fallback is None else Path(fallback).expanduser()
    digest = hashlib.sha256(str(where).encode()).hexdigest()[:8]
    return base.absolute() / f"{where.parent.name}_{where.name}_{digest}"


def _open(folder: Path) -> str | None:
    """Make a folder that is this user's own; what is wrong with it otherwise. Others may write beside it in /tmp."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return f"{folder} belongs to someone else"
    except OSError as error:
        return f"{folder} cannot be made: {error.strerror}"
    return None
