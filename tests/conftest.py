"""What several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

import tests.slurm
from tests.browser import Browser, opened
from tests.pool import Pool

# Before torch is imported. The tests' tensors are small: more threads cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A contributor's own key must not send test runs to their account.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.pop("WANDB_API_KEY", None)
# A shell that starts pytest in the background has it ignore Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Variables of a launcher that started pytest would make every test a rank of something.
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)


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


@pytest.fixture(scope="session")
def slurm() -> Iterator[tests.slurm.Slurm]:
    """A real Slurm with three nodes on this machine, started in about a second; skips where it is not installed."""
    reason = tests.slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    cluster = tests.slurm.Slurm()
    yield cluster
    cluster.close()
