"""What a run tells while it goes: metrics.jsonl, wandb, pictures, and a line or a bar on the terminal. Rank 0 only.

Nothing that goes wrong here stops a run: not a full disk, a terminal that is gone, or wandb (ssl/wandb_run.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ssl.metrics_file import MetricsFile
from ssl.pictures import save_png
from ssl.wandb_run import Wandb

log = logging.getLogger(__name__)


class Tracker:
    """One run's metrics and pictures, in the run folder, on wandb and on the terminal.

    `resume_step` is the step that the run continues from: lines of metrics.jsonl after it, which a run that was killed
    wrote beyond its last checkpoint, are dropped. On ranks other than the first (`is_main` false) every method does
    nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: Mapping[str, Any] | None = None,
        wandb_mode: str = "auto",
        wandb_project: str = "ssl",
        wandb_name: str | None = None,
        wandb_group: str | None = None,
        total_steps: int,
        is_main: bool = True,
        resume_step: int = 0,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.is_main = is_main
        if not is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._picture_failed = False
        self._wandb = Wandb(
            self.run_dir,
            mode=wandb_mode,
            config=dict(config or {}),
            project=wandb_project,
            name=wandb_name,
            group=wandb_group,
            resume_step=resume_step,
        )
        self._file = MetricsFile(self.run_dir / "metrics.jsonl", resume_step=resume_step)
        self._progress = Progress(total_steps, start_step=resume_step)
        self._estimated = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line with `step` and the metrics, and show it. Numbers that are not finite become null."""
        if not self.is_main:
            return
        row = {"step": step} | {name: _plain(value) for name, value in metrics.items() if name != "step"}
        self._file.write(row)
        self._wandb.log(row)
        with _shown_if_possible():
            self._progress.update(step, metrics)
        left = self._progress.seconds_left(step)
        if left and not self._estimated:
            self._estimated = True
            self.say(f"about {duration(left)} for the {self._progress.total_steps - step} steps to come")

    def images(self, step: int, name: str, image: np.ndarray, *, caption: str | None = None) -> None:
        """Save an uint8 (H, W, 3) picture as pictures/<name>_<step>.png, and give it to wandb."""
        if not self.is_main:
            return
        path = self.run_dir / "pictures" / f"{name}_{step:08d}.png"
        try:
            save_png(image, path)
        except OSError as error:
            if not self._picture_failed:
                log.warning("%s cannot be written (%s); the run goes on without", path, error.strerror or error)
            self._picture_failed = True
            return
        self._wandb.image(step, name, path, caption)

    def say(self, text: str) -> None:
        """Print text without breaking the progress bar."""
        if self.is_main:
            with _shown_if_possible():
                self._progress.say(text)

    def flush(self) -> None:
        """Write the metrics that wait for room on the disk: call it where a save may have made some."""
        if self.is_main:
            self._file.flush()

    def close(self) -> None:
        """End the bar, the file and wandb. May be called twice."""
        if not self.is_main or self._file.closed:
            return
        with _shown_if_possible():
            self._progress.close()
        self._file.close()
        upload = self._wandb.close(stopped=sys.exc_info()[0] is not None)  # on the way out, by a signal or an error
        if upload is not None:
            self.say(f"to upload this run to wandb: {upload}")


@contextlib.contextmanager
def _shown_if_possible() -> Iterator[None]:
    """Let a run go on whose terminal is gone, or whose output goes to a disk that is full."""
    with contextlib.suppress(OSError):
        yield


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers of numpy and torch as Python's, not finite ones as null."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None


class Progress:
    """A bar where there is a terminal, a line per logged step where there is none."""

    def __init__(self, total_steps: int, *, start_step: int = 0) -> None:
        self.total_steps = total_steps
        self.start_step = start_step
        self._times: deque[tuple[float, int]] = deque(maxlen=20)
        self._bar: tqdm | None = None
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the run at `step`: loss, lr, images per second, share of time waiting for data, time left."""
        self._times.append((time.monotonic(), step))
        if not self._terminal:
            print(self.line(step, metrics), flush=True)
            return
        if self._bar is None:
            # Some terminals (containers, serial lines) say that they are 0 by 0, where tqdm draws nothing.
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            width: dict[str, Any] = {"dynamic_ncols": True} if columns else {"ncols": 120, "nrows": 24}
            self._bar = tqdm(total=self.total_steps, initial=self.start_step, unit="step", **width)
        self._bar.set_postfix_str(", ".join(_facts(metrics)), refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def line(self, step: int, metrics: Mapping[str, Any]) -> str:
        """The plain line."""
        parts = [f"step {step}/{self.total_steps}"]
        if "epoch" in metrics:
            parts.append(f"epoch {metrics['epoch']:.2f}")
        parts += _facts(metrics)
        left = self.seconds_left(step)
        if left is not None:
            parts.append(f"{tqdm.format_interval(left)} left")
        return "  ".join(parts)

    def seconds_left(self, step: int) -> float | None:
        """Time to the last step at the pace of the last logged steps; None before there is a pace."""
        (first_time, first_step), (last_time, last_step) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * max(self.total_steps - step, 0)

    def say(self, text: str) -> None:
        """Print above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _facts(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics that a person watches, in words."""
    formats = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.3f}", "lr": "lr {:.2e}"}
    formats |= {"images_per_second": "{:,.0f} images/s", "data_wait": "{:.0%} waiting for data"}
    formats |= {"mfu": "{:.0%} of the chip's peak"}
    return [form.format(float(metrics[name])) for name, form in formats.items() if metrics.get(name) is not None]
