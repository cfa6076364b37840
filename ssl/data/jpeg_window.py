"""`ssl.data.jpeg_scan`, where it can be had: that takes numba, and seconds to compile, once for a machine and version.

Machine code is kept in `__pycache__`, in the user's cache where that cannot be written, or where NUMBA_CACHE_DIR says.
A loader has it compiled before its threads start: meanwhile numba replaces what belongs to the whole process, such as
how warnings are shown. Without numba, or with NUMBA_DISABLE_JIT=1, libjpeg-turbo decodes, to the same pixels.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable

import numpy as np
import simplejpeg

log = logging.getLogger(__name__)

_decode: Callable[[np.ndarray, int, int, np.ndarray], bool] | None = None
_was_tried = False
_lock = threading.Lock()


def decode_window(data: bytes, box: tuple[int, int, int, int], channels: int, buffer: np.ndarray) -> np.ndarray | None:
    """The box (top, left, height, width) of an upright JPEG, uint8 (height, width, C), which lies in `buffer`.

    Equal to that part of the whole image. None where it is to be decoded otherwise: because the file is unusual, or
    damaged above the lower end of the box, or because `compile_decoder` was not called, or in vain.
    """
    if _decode is None:
        return None
    top, left, height, width = (int(number) for number in box)  # other numbers would be compiled for anew
    out = buffer[: height * width * channels].reshape(height, width, channels)
    return out if _decode(np.frombuffer(data, np.uint8), top, left, out) else None


def compile_decoder() -> bool:
    """Whether windows are decoded from now on. Does nothing the second time."""
    global _was_tried
    with _lock:
        if not _was_tried:
            _compile()
            _was_tried = True
        return _decode is not None


def _compile() -> None:
    global _decode
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return
    told = threading.Timer(1.5, _tell)  # read from disk it is there in a third of a second
    told.start()
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
        _decode = decode_window
    finally:
        told.cancel()


def _tell() -> None:
    is_kept = getattr(sys.modules.get("ssl.data.jpeg_scan"), "is_kept", True)
    how = "once for this machine" if is_kept else "anew for each run, unless NUMBA_CACHE_DIR is a folder to keep it in"
    log.info("compiling the decoder of JPEGs, some 10 s, %s", how)
