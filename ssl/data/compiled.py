"""Python compiled to machine code by numba, for threads that run beside each other."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import extending, njit

log = logging.getLogger(__name__)

_OPTIONS = {"nogil": True, "error_model": "numpy"}  # without the interpreter's lock; with C's division by zero
_BROKEN = (OSError, EOFError, pickle.UnpicklingError)
"""What numba raises where a file that it kept is damaged, or where it cannot write one."""


def jit(function: Callable) -> Any:
    """Compile with what calls it."""
    return njit(**_OPTIONS)(function)


def intrinsic(function: Callable) -> Any:
    """numba's decorator of the same name, for instructions of LLVM."""
    return extending.intrinsic(function)


class Kept:
    """A compiled function that is kept on disk until the source of one of the modules changes.

    numba itself keeps a function by the time of its own file, and would go on with what others were. But what a
    function's closure holds is part of what it is found by: `make` gives a function that holds the version that it is
    given. It is kept in `__pycache__`, in the user's cache where that cannot be written, or where NUMBA_CACHE_DIR says.
    Where none can, or the disk is full, it is compiled in every process.
    """

    def __init__(self, make: Callable[[str], Callable], *modules: ModuleType):
        sources = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
        self._function = make(hashlib.sha256(sources).hexdigest())
        try:
            self._compiled = njit(cache=True, **_OPTIONS)(self._function)
            self.is_kept = True
        except RuntimeError:  # numba: "no locator available"
            self._compiled = jit(self._function)
            self.is_kept = False

    def __call__(self, *given: Any) -> Any:
        try:
            return self._compiled(*given)
        except _BROKEN as error:
            if not self.is_kept:
                raise
            self.is_kept = False
            log.warning("what was compiled is kept no more: %s: %s", type(error).__name__, error)
            self._remove()
            self._compiled = jit(self._function)
            return self._compiled(*given)

    def _remove(self) -> None:
        """The files of this function, so that the next process writes them anew."""
        source = Path(self._function.__code__.co_filename).stem
        name = self._function.__qualname__.replace("<locals>", "locals")
        for path in Path(str(self._compiled.stats.cache_path)).glob(f"{source}.{name}-*.nb[ic]"):
            path.unlink(missing_ok=True)
