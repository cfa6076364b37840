"""What this process asks of the libraries under torch. Imported before torch, which reads some of it once.

OpenMP's idle threads sleep instead of spin. Between two parallel regions GNU OpenMP's threads spin by default, and take
the cores from the decoding threads and from whatever else runs. With another busy process on 2 cores a step took up to
twenty times as long; alone, sleeping cost nothing that could be measured. OMP_WAIT_POLICY in the environment overrides
it.

The C library keeps memory that was freed. By default it hands large blocks back to the system and asks for new ones,
which come page by page and zeroed: that took a quarter of the time of making 32-pixel views. Blocks above 32 MiB, the
largest limit that it takes, still go back. MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ or GLIBC_TUNABLES in the
environment override it.
"""

import contextlib
import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h


def _keep_freed_memory() -> None:
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & set(os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_TRIM_THRESHOLD, 2**29)


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_keep_freed_memory()
