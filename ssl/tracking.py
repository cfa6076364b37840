"""What a run tells while it goes: metrics.jsonl, wandb, pictures, and a line or a bar on the terminal. Rank 0 only.

metrics.jsonl is the record. wandb is a courtesy: nothing that goes wrong in it, with its network or its account may
stop a run, so that every call to it passes through `Wandb._attempt`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ssl.pictures import save_png

log = logging.getLogger(__name__)

INIT_SECONDS = 30  # wandb's own default is 90, before it raises
FINISH_SECONDS = 60


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
        path = self.run_dir / "metrics.jsonl"
        keep_lines_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._progress = Progress(total_steps, start_step=resume_step)
        self._estimated = False
        self._wandb = Wandb(
            self.run_dir,
            mode=wandb_mode,
            config=dict(config or {}),
            project=wandb_project,
            name=wandb_name,
            group=wandb_group,
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line with `step` and the metrics, and show it. Numbers that are not finite become null."""
        if not self.is_main:
            return
        row = {"step": step} | {name: _plain(value) for name, value in metrics.items() if name != "step"}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self.run_dir / 'metrics.jsonl'} could not be written: {error}; make room, then run the same command "
                "again"
            ) from error
        self._wandb.log(row)
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
        save_png(image, path)
        self._wandb.image(step, name, path, caption)

    def say(self, text: str) -> None:
        """Print text without breaking the progress bar."""
        if self.is_main:
            self._progress.say(text)

    def close(self) -> None:
        """End the bar, the file and wandb. May be called twice."""
        if not self.is_main or self._file.closed:
            return
        self._progress.close()
        try:
            self._file.close()
        finally:
            self._wandb.close()


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file whose step is later than `step`, and torn ones; the file is replaced whole."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
    if kept == text:
        return
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _step_of(line: str) -> float:
    """The step of a line, infinite where the line is torn or has none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


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


class Wandb:
    """A wandb run that cannot hurt: no prompt, no long wait, and after the first failure silence, with one warning.

    `mode` is auto, online, offline or disabled; auto follows WANDB_MODE, else is online where an API key is configured
    and offline where none is. The id is kept in <run>/wandb_id, so that a run that continues is the same run on the
    server.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: str,
        config: Mapping[str, Any],
        project: str,
        name: str | None,
        group: str | None,
    ) -> None:
        self.run: Any = None
        self._environment: dict[str, str | None] = {}
        self.mode = os.environ.get("WANDB_MODE", "auto").lower() if mode == "auto" else mode
        self.mode = {"dryrun": "offline", "run": "online"}.get(self.mode, self.mode)  # older names of wandb's
        if self.mode == "disabled":
            return
        self._run_dir = run_dir.resolve()
        # wandb stages files under the home folder unless told otherwise; the process's next run has another folder.
        folder = self._run_dir / "wandb"
        own = {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache")}
        self._environment = {key: os.environ.get(key) for key in own}
        os.environ |= own
        self._attempt("start", lambda: self._start(config=config, project=project, name=name, group=group))

    def _start(self, **about: Any) -> None:
        import wandb  # a second to import, and not needed at all when disabled

        if self.mode != "offline" and not wandb.login(prompt=False, verify=False):  # looks for a key, asks nobody
            if self.mode == "online":
                log.warning("wandb: online, but no API key is configured (`wandb login`); going on offline")
            self.mode = "offline"
        if self.mode != "offline":
            self.mode = "online"
            try:
                self._init("online", **about)
            except Exception as error:
                log.warning("wandb: no connection (%s); going on offline", _first_line(error))
                self.mode = "offline"
                # The service still holds the run's id, and refuses it a second time ("run ID ... is in use").
                _within(FINISH_SECONDS, wandb.teardown)
        if self.mode == "offline":
            self._init("offline", **about)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def _init(self, mode: Any, **about: Any) -> None:
        import wandb

        limits: dict[str, Any] = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
        known = {key: value for key, value in limits.items() if key in wandb.Settings.model_fields}
        self.run = wandb.init(
            mode=mode,
            dir=self._run_dir,
            id=self._id(),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", **known),
            **about,
        )

    def _id(self) -> str:
        path = self._run_dir / "wandb_id"
        if not path.exists():
            path.write_text(secrets.token_hex(4) + "\n")
        return path.read_text().strip()

    def log(self, row: Mapping[str, Any]) -> None:
        """One row with its `step`, which is the x-axis of every chart."""
        if self.run is not None:
            self._attempt("log", lambda: self.run.log({key: value for key, value in row.items() if value is not None}))

    def image(self, step: int, name: str, path: Path, caption: str | None) -> None:
        """A picture file."""
        if self.run is not None:
            import wandb

            self._attempt("log", lambda: self.run.log({name: wandb.Image(str(path), caption=caption), "step": step}))

    def close(self) -> None:
        """Finish the run within FINISH_SECONDS."""
        run, self.run = self.run, None
        if run is not None and not _within(FINISH_SECONDS, lambda: self._attempt("finish", run.finish)):
            log.warning("wandb: not finished after %d s; upload later with `wandb sync`", FINISH_SECONDS)
        for key, value in self._environment.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        self._environment = {}

    def _attempt(self, what: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self.run = None
            log.warning("wandb: could not %s (%s); the run goes on without it", what, _first_line(error))


def _within(seconds: float, call: Callable[[], Any]) -> bool:
    """Whether the call came back in time. It is left to itself if it did not."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
