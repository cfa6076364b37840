"""Judging a pretrained backbone: kNN, linear probing.

Where the standard module `ssl` was imported before this project's folder was on the path (a notebook, a pytest
plugin), the project's `ssl` subpackages are grafted onto it here.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import ssl  # noqa: E402

if not hasattr(ssl, "__path__"):
    ssl.__path__ = [str(ROOT / "ssl")]

import ssl.runtime  # noqa: E402  # before torch
