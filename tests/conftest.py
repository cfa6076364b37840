"""What several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

import tests.slurm
from tests.browser import Browser, opened
from tests.pool import Pool

# Before torch is imported. The tests' tensors are small: more threads cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A contributor's own key must not send test runs to their account.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("WANDB_API_KEY", None)
# A shell that starts pytest in the background has it ignore Ctrl-C, nohup the end of a session: some tests send both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Variables of a launcher that started pytest would make every test a rank of something.
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)


MOST_PICTURES = 8
"""Sets of pictures that are kept."""
_PICTURES: dict[tuple[bytes, str, int, int], np.ndarray] = {}


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Pool]:
    """Two processes joined by gloo; `two_ranks.run(function, *args)` gives what each returned."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real browser, for tests that open pages."""
    with opened() as chromium:
        yield chromium


@pytest.fixture(scope="module", autouse=True)
def pictures_made_once(request) -> Iterator[None]:
    """The embedded pictures are made once for all runs of this process, of which they take most of the time.

    They are a function of what they are asked by, which the tests of them judge without this.
    """
    import ssl.data.embedded as embedded  # not above, where torch's settings come first

    def render(index: np.ndarray, *, split: str, size: int, seed: int) -> np.ndarray:
        if len(index) == 1:  # of a set too large to be held
            return made(index, split=split, size=size, seed=seed)
        key = index.tobytes(), split, size, seed
        if key not in _PICTURES:
            if len(_PICTURES) == MOST_PICTURES:
                _PICTURES.clear()
            _PICTURES[key] = made(index, split=split, size=size, seed=seed)
        return _PICTURES[key].copy()

    made = embedded.render
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__.rpartition(".")[2] != "test_embedded":
            patch.setattr(embedded, "render", render)
        yield


@pytest.fixture(scope="session")
def slurm() -> Iterator[tests.slurm.Slurm]:
    """A real Slurm with three nodes on this machine, started in about a second; skips where it is not installed."""
    reason = tests.slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    cluster = tests.slurm.Slurm()
    yield cluster
    cluster.close()
