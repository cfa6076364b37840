"""What numba compiles is kept on disk, as long as none of its sources changes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

numba = pytest.importorskip("numba")

from ssl.data.compiled import jit_kept  # noqa: E402

CALLED = "from ssl.data.compiled import jit\n@jit\ndef called(number):\n    return number + {}\n"
CALLING = """
import called
def make(version):
    def calling(number):
        assert version
        return called.called(number)
    return calling
"""


def load(name: str, path: Path) -> ModuleType:
    """As in a new process."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_function_is_kept_until_what_it_calls_changes(tmp_path: Path, monkeypatch):
    """numba alone would go on with what the other file was."""
    calling_file, called_file = tmp_path / "calling.py", tmp_path / "called.py"
    calling_file.write_text(CALLING)
    hits = []
    for added, num_hits in ((1, 0), (1, 1), (10, 0), (10, 1)):
        called_file.write_text(CALLED.format(added))
        os.utime(called_file, (0, 0))
        monkeypatch.setitem(sys.modules, "called", load("called", called_file))
        calling = load("calling", calling_file)
        kept = jit_kept(calling.make, calling, sys.modules["called"])
        assert kept(5) == 5 + added
        hits.append(sum(kept.stats.cache_hits.values()))
        assert hits[-1] == num_hits


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same(tmp_path: Path):
    (tmp_path / "empty.py").touch()
    space = {}
    exec(
        "def make(version):\n    def plus_one(number):\n        return number + len(version[:1])\n    return plus_one",
        space,
    )
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(space["make"]("1"))
    assert jit_kept(space["make"], load("empty", tmp_path / "empty.py"))(2) == 3
