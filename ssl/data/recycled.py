"""Memory of batches that is used again once nothing refers to it."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KEPT = 8  # blocks of a size that wait for their next use
SIZES = 4  # sizes of which blocks are kept: those asked for last


class Recycled:
    """Hands out CPU tensors whose memory returns here when the last tensor that shares it is gone.

    The system gives large blocks page by page, zeroed, and takes them back whole, which at 32 pixels takes a sixth of
    the time of making a batch. Any thread may ask, and any may drop the last reference.
    """

    def __init__(self) -> None:
        self._free: dict[int, deque[np.ndarray]] = {}  # by bytes; the size asked for last stands at the end
        self._lent: dict[int, weakref.ref[np.ndarray]] = {}
        self._lock = threading.Lock()  # never taken by what takes blocks back, which may run at any time

    def __reduce__(self) -> tuple[type[Recycled], tuple[()]]:
        """A copy, in this process or another, begins with nothing."""
        return Recycled, ()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        free = self._blocks(size)
        try:
            block = free.pop()
        except IndexError:
            block = torch.empty(size, dtype=torch.uint8).numpy()  # aligned, as numpy's own are not
        lent = block[:]  # every tensor that shares the memory keeps this array alive
        number = id(lent)

        def take_back(_: weakref.ref[np.ndarray]) -> None:
            self._lent.pop(number, None)
            free.append(block)

        self._lent[number] = weakref.ref(lent, take_back)
        return torch.from_numpy(lent).view(dtype).view(tuple(shape))

    def _blocks(self, size: int) -> deque[np.ndarray]:
        with self._lock:
            free = self._free.pop(size, None)
            self._free[size] = free = deque(maxlen=KEPT) if free is None else free
            for other in list(self._free)[:-SIZES]:
                del self._free[other]
            return free
