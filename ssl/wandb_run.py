"""A wandb run that cannot hurt the run that it shows: everything of wandb's happens in a thread that nobody waits for.

wandb talks to a process of its own (wandb-core), which schedulers kill, which hangs where its disk or its network
does, and whose end makes every later call raise. metrics.jsonl is the record, wandb a courtesy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssl.metrics_file import last_step, rows_of

log = logging.getLogger(__name__)

INIT_SECONDS = 30  # for a connection; wandb's own default is 90, before it raises
START_SECONDS = 180  # for all of the start, which the run does not wait for
CALL_SECONDS = 60  # for one row or picture, which the run does not wait for
FINISH_SECONDS = 60  # that the end of a run waits, at most
STOPPED_SECONDS = 10  # that it waits where it was stopped or failed: a scheduler kills it soon
KILLED_SECONDS = 5  # and then for what is left of a service that was killed
MOST_WAITING = 1000  # rows and pictures that wait for wandb; later ones are dropped and counted


class Wandb:
    """A run on wandb, or in a folder for later; nothing that goes wrong in it is more than one warning.

    `mode` is auto, online, offline or disabled; auto follows WANDB_MODE, else is online where an API key is configured
    and offline where none is. The id is kept in <run>/wandb_id, so that a run that continues is the same run on the
    server, and in <run>/wandb_step how far its rows were sent.

    Each step is sent at most once over all starts: what a resume repeats is not sent again, and rows of metrics.jsonl
    that an earlier start did not get to send are sent first. A wandb-core that is killed may lose what it was sent in
    its last seconds. Create it before the metrics file drops what lies beyond the checkpoint. No method waits, but for
    `close`; no method raises.
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
        resume_step: int = 0,
    ) -> None:
        self.run: Any = None
        self.num_dropped = 0
        self._thread: threading.Thread | None = None
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
        self._waiting: deque[Callable[[], Any]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._given_up = False
        self._deadline: float | None = None  # of the call that the thread is in
        self._folders = ""  # what `wandb sync` takes: of offline starts all, by a pattern that the shell fills in
        self._process = os.getpid()
        self._mark: Path = self._run_dir / "wandb_step"
        self._sent_before = self._sent = 0
        with self._no_more_than_a_warning("see how far it is"):
            self._sent_before = self._sent = _steps_sent(self._run_dir)
        about = {"config": config, "project": project, "name": name, "group": group}
        self._thread = threading.Thread(target=self._work, args=(about, resume_step), daemon=True, name="wandb")
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """One row with its `step`, which is the x-axis of every chart."""
        self._add(int(row["step"]), lambda: self._send(row))

    def image(self, step: int, name: str, path: Path, caption: str | None) -> None:
        """A picture file."""

        def send() -> None:
            import wandb

            self.run.log({name: wandb.Image(str(path), caption=caption), "step": step})

        self._add(step, send)

    def close(self, *, stopped: bool = False) -> str | None:
        """Finish within FINISH_SECONDS, within STOPPED_SECONDS where the run was `stopped`; returns the command that
        uploads the rest later, None where there is none.
        """
        thread, self._thread = self._thread, None
        if thread is None or os.getpid() != self._process:  # a fork has no thread
            return None
        with self._changed:
            self._closing = True
            self._changed.notify()
        seconds = min(FINISH_SECONDS, STOPPED_SECONDS) if stopped else FINISH_SECONDS
        thread.join(seconds)
        if thread.is_alive():
            self._give_up(f"was not finished after {seconds} s")
            thread.join(KILLED_SECONDS)
        for key, value in self._environment.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        if self.num_dropped:
            log.warning("wandb: %d rows or pictures were not sent; metrics.jsonl has all rows", self.num_dropped)
        later = self._folders and (self.mode == "offline" or self._given_up)
        return f"wandb sync {self._folders}" if later else None

    # ---- on the run's side -----------------------------------------------------------------------------------------

    def _add(self, step: int, call: Callable[[], Any]) -> None:
        if self._thread is None or self._given_up or step <= self._sent_before or os.getpid() != self._process:
            return
        deadline = self._deadline
        if deadline is not None and time.monotonic() > deadline:
            self._give_up("does not answer")
            return
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                self.num_dropped += 1
                return
            self._waiting.append(call)
            self._changed.notify()

    def _give_up(self, why: str) -> None:
        """Warn once, and end wandb's process, so that neither the thread nor the end of ours hangs on it."""
        with self._changed:
            if self._given_up:
                return
            self._given_up = True
            self.num_dropped += len(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        log.warning("wandb: %s; the run goes on without it", why)
        _kill_service()

    # ---- in the thread ---------------------------------------------------------------------------------------------

    def _work(self, about: Mapping[str, Any], resume_step: int) -> None:
        try:
            self._call("start", START_SECONDS, lambda: self._start(**about))
            for row in rows_of(self._run_dir / "metrics.jsonl"):
                if self._sent_before < row["step"] <= resume_step and not self._given_up:
                    self._call("log", CALL_SECONDS, lambda row=row: self._send(row))
            while call := self._next():
                self._call("log", CALL_SECONDS, call)
            if not self._given_up:
                self._call("finish", FINISH_SECONDS, lambda: self.run.finish())
        finally:
            self.run = None
            # Else its own hook waits for the service at the end of the process, for as long as that hangs.
            with contextlib.suppress(Exception, SystemExit):
                _teardown()

    def _next(self) -> Callable[[], Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing or self._given_up)
            return self._waiting.popleft() if self._waiting and not self._given_up else None

    def _call(self, what: str, seconds: float, call: Callable[[], Any]) -> None:
        self._deadline = time.monotonic() + seconds
        with self._no_more_than_a_warning(what):
            call()
        self._deadline = None

    @contextlib.contextmanager
    def _no_more_than_a_warning(self, what: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self._give_up(f"could not {what} ({_first_line(error)})")

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
                with contextlib.suppress(Exception, SystemExit):
                    _teardown()
        if self.mode == "offline":
            self._init("offline", **about)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def _init(self, mode: Any, **about: Any) -> None:
        import wandb

        self._let_a_second_pass()
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
        folder = _from_here(Path(self.run.settings.sync_dir))
        every = f"{shlex.quote(str(folder.parent))}/offline-run-*-{self.run.id}"
        self._folders = every if mode == "offline" else shlex.quote(str(folder))

    def _let_a_second_pass(self) -> None:
        """wandb names its folders by the second: a start right after another one would write into the same."""
        earlier = [path.stat().st_mtime for path in (self._run_dir / "wandb").glob("*run-*")]
        time.sleep(min(max(max(earlier, default=0) + 1.1 - time.time(), 0), 1.1))

    def _id(self) -> str:
        path = self._run_dir / "wandb_id"
        kept = path.read_text().strip() if path.exists() else ""
        if not kept:
            kept = secrets.token_hex(4)
            path.write_text(kept + "\n")
        return kept

    def _send(self, row: Mapping[str, Any]) -> None:
        """A row, once it is noted as sent: one that is lost in between is missing, and none is there twice."""
        self._sent = max(self._sent, int(row["step"]))
        with self._mark.open("r+" if self._mark.exists() else "w") as file:  # of one length: needs no room again
            file.write(f"{self._sent:016d}\n")
        self.run.log({key: value for key, value in row.items() if value is not None})


def _steps_sent(run_dir: Path) -> int:
    """The last step that earlier starts have sent; by metrics.jsonl where a run was made before that was noted."""
    mark = run_dir / "wandb_step"
    if mark.exists() and mark.read_text().strip().isdigit():
        return int(mark.read_text())
    return last_step(run_dir / "metrics.jsonl") if (run_dir / "wandb_id").exists() else 0


def _teardown() -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None:
        wandb.teardown()


def _kill_service() -> None:
    """End the process that this one's wandb talks to. wandb has no call for that, so that the way there is guarded."""
    setup = getattr(sys.modules.get("wandb.sdk.wandb_setup"), "_singleton", None)
    service = getattr(getattr(setup, "_connection", None), "_proc", None)
    process = getattr(service, "_process", None)
    if process is not None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait(KILLED_SECONDS)


def _from_here(path: Path) -> Path:
    with contextlib.suppress(ValueError, OSError):
        return path.relative_to(Path.cwd().resolve())
    return path


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
