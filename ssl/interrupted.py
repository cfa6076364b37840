"""Ctrl-C while libraries are still being imported, which takes seconds, is one line instead of a traceback."""

from __future__ import annotations

import sys
from types import TracebackType


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted before anything began\n")
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _tell
