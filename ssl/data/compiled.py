"""Python compiled to machine code by numba, for threads that run beside each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from numba import extending, njit


def jit(function: Callable) -> Any:
    """Compile with what calls it; without the interpreter's lock, and with C's division by zero."""
    return njit(nogil=True, error_model="numpy")(function)


def intrinsic(function: Callable) -> Any:
    """numba's decorator of the same name, for instructions of LLVM."""
    return extending.intrinsic(function)


def jit_kept(make: Callable[[str], Callable], *modules: ModuleType) -> Any:
    """As `jit` what `make` makes of a version, and kept on disk until the source of one of the modules changes.

    numba itself keeps a function by the time of its own file, and would go on with what others were. But what a
    function's closure holds is part of what it is found by: it has to hold the version. It is kept in `__pycache__`, in
    the user's cache where that cannot be written, or where NUMBA_CACHE_DIR says; where none can, nothing is kept.
    """
    version = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()
    function = make(version)
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba: "no locator available"
        return jit(function)
