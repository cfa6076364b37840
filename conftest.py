"""Grafts the project's `ssl` subpackages where a pytest plugin imported the standard module first."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import ssl  # noqa: E402

if not hasattr(ssl, "__path__"):
    ssl.__path__ = [str(ROOT / "ssl")]
