"""`ssl.data.jpeg_scan`, as soon as it is there: importing numba and compiling must not keep a run waiting.

Compiling takes some ten seconds, once for a machine and version: the machine code is kept in `__pycache__`, or where
NUMBA_CACHE_DIR says. It is done beside the run, which decodes with libjpeg-turbo until then, to the same pixels.
Without numba, or with NUMBA_DISABLE_JIT=1, it goes on so.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import numpy as np
import simplejpeg

log = logging.getLogger(__name__)

_compiled: Callable[[np.ndarray, int, int, np.ndarray], bool] | None = None
_compiling: threading.Thread | None = None
_lock = threading.Lock()


def decode_window(data: bytes, box: tuple[int, int, int, int], channels: int, buffer: np.ndarray) -> np.ndarray | None:
    """The box (top, left, height, width) of an upright JPEG, uint8 (height, width, C), which lies in `buffer`.

    Equal to that part of the whole image. None where the file is unusual or damaged up to the lower end of the box, or
    while this is not yet compiled: then it is to be decoded otherwise.
    """
    if _compiled is None:
        start()
        return None
    top, left, height, width = box
    out = buffer[: height * width * channels].reshape(height, width, channels)
    return out if _compiled(np.frombuffer(data, np.uint8), top, left, out) else None


def start() -> threading.Thread:
    """Begin to compile, if that has not been done, in a thread that ends when all is ready."""
    global _compiling
    with _lock:
        if _compiling is None:
            # No daemon: a process that ends amid LLVM's work could crash.
            _compiling = threading.Thread(target=_compile, name="jpeg-compiler")
            _compiling.start()
        return _compiling


def is_ready(*, wait: bool = True) -> bool:
    """Whether windows are decoded, after waiting for what is being compiled."""
    if wait:
        start().join()
    return _compiled is not None


def _compile() -> None:
    global _compiled
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return
    try:
        from ssl.data.jpeg_scan import decode_window

        data = simplejpeg.encode_jpeg(np.full((8, 8, 3), 128, np.uint8))
        for channels in (1, 3):
            out = np.empty((8, 8, channels), np.uint8)
            if not decode_window(np.frombuffer(data, np.uint8), 0, 0, out) or (out != 128).any():
                raise RuntimeError("a gray image is not decoded as such")
    except ImportError as error:
        log.info("JPEGs are decoded by libjpeg-turbo alone, which takes longer: %s", error)
    except Exception as error:  # whatever a compiler may say on a machine that it does not know
        log.warning(
            "JPEGs are decoded by libjpeg-turbo alone, which takes longer: compiling the decoder ended with %s: %s",
            type(error).__name__,
            error,
        )
    else:
        _compiled = decode_window
