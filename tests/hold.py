"""An evaluation during a run that waits at one step, so that a test does something to the run at a known moment.

    online=none +online.hold={_target_:tests.hold.Hold,folder:/a/folder,step:3}

Each rank writes held_<rank>, with its process id, into the folder.
"""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import ssl.distributed as distributed
from ssl.online import OnlineSubject

SECONDS = 120.0


@dataclass
class Hold:
    """Waits until the run has got a signal or the file `go` is in the folder; two minutes at most."""

    folder: str
    step: int

    def __call__(self, subject: OnlineSubject) -> dict[str, float]:
        if subject.step == self.step:
            wait(Path(self.folder))
        return {}


def wait(folder: Path) -> None:
    receive, send = os.pipe()
    os.set_blocking(send, False)
    earlier = signal.set_wakeup_fd(send)  # Python writes there whenever a signal has a handler of its own
    try:
        held = folder / f"held_{distributed.rank()}"
        held.with_suffix(".partial").write_text(str(os.getpid()))
        held.with_suffix(".partial").rename(held)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and not (folder / "go").exists():
            if select.select([receive], [], [], 0.05)[0] and set(os.read(receive, 64)) != {signal.SIGCONT}:
                return  # Slurm sends a SIGCONT before each signal of its own
    finally:
        signal.set_wakeup_fd(earlier)
        os.close(receive)
        os.close(send)
