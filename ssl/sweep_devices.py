"""How processes that do a sweep's runs beside each other on one machine share its GPUs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from typing import IO

import torch

from ssl.sweep import Sweep

_share: IO[str] | None = None
"""This process's lock on its share."""


def take_devices(sweep: Sweep, *, at_once: int) -> None:
    """Give this process, one of `at_once` that do a sweep's runs beside each other, its share of the visible GPUs.

    A share is kept until the process ends, whose lock on a file of the sweep then goes too. Nothing where there is at
    most one GPU.
    """
    global _share
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    if _share is not None or len(visible) < 2:
        return
    at_once = at_once if at_once > 0 else os.cpu_count() or 1
    for slot in range(at_once):
        lock = (sweep.folder / f"devices_{slot}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        _share = lock
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share_of(visible, slot, at_once))
        return


def share_of(devices: Sequence[str], slot: int, at_once: int) -> Sequence[str]:
    """The devices of the process `slot` of `at_once`: disjoint, or one each, in turn, where there are too few."""
    return devices[slot::at_once] if at_once <= len(devices) else [devices[slot % len(devices)]]
