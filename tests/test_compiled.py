"""What numba compiles is kept on disk, as long as none of its sources changes."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

numba = pytest.importorskip("numba")

from ssl.data.compiled import Kept  # noqa: E402

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
    for added, num_hits in ((1, 0), (1, 1), (10, 0), (10, 1)):
        called_file.write_text(CALLED.format(added))
        os.utime(called_file, (0, 0))
        monkeypatch.setitem(sys.modules, "called", load("called", called_file))
        calling = load("calling", calling_file)
        kept = Kept(calling.make, calling, sys.modules["called"])
        assert kept(5) == 5 + added
        assert num_loaded(kept) == num_hits


ALONE = """
def make(version):
    def plus_one(number):
        assert version
        return number + 1
    return plus_one
"""


def num_loaded(kept: Kept) -> int:
    return sum(kept._compiled.stats.cache_hits.values())


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_what_is_damaged_on_disk_is_compiled_and_kept_anew(suffix: str, kept_bytes: int, tmp_path: Path, caplog):
    file = tmp_path / "alone.py"
    file.write_text(ALONE)

    def call() -> Kept:
        module = load("alone", file)
        kept = Kept(module.make, module)
        assert kept(5) == 6
        return kept

    call()
    [stored] = Path(str(call()._compiled.stats.cache_path)).glob(f"alone.*{suffix}")
    stored.write_bytes(stored.read_bytes()[:kept_bytes])
    call()
    assert "is kept no more" in caplog.text
    caplog.clear()
    call()
    assert num_loaded(call()) == 1
    assert not caplog.text


def test_on_a_full_disk_it_is_compiled_all_the_same(tmp_path: Path, monkeypatch, caplog):
    file = tmp_path / "alone.py"
    file.write_text(ALONE)
    module = load("alone", file)
    kept = Kept(module.make, module)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept._compiled._cache, "save_overload", full)
    assert kept(5) == 6
    assert "No space left on device" in caplog.text


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same(tmp_path: Path):
    (tmp_path / "empty.py").touch()
    space = {}
    exec(ALONE, space)  # of no file
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(space["make"]("1"))
    kept = Kept(space["make"], load("empty", tmp_path / "empty.py"))
    assert kept(2) == 3
    assert not kept.is_kept
