"""Which code this is: the project's version and commit, and the versions of what computes."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def versions() -> dict[str, str | None]:
    """What a checkpoint keeps of the code that wrote it; None for what is not known here."""
    return {"ssl": project_version(), "commit": commit(), "torch": torch.__version__, "timm": timm.__version__}


def project_version() -> str | None:
    """The version in pyproject.toml; None where that file was not copied along."""
    try:
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return found.group(1) if found else None


def commit() -> str | None:
    """The commit of this repository, with `+changes` where files differ from it; None outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`torch 2.11.0 -> 2.15.0, ...` for what differs, where both are known; nothing where all is the same."""
    known = [name for name in now if before.get(name) is not None and now[name] is not None]
    return ", ".join(f"{name} {before[name]} -> {now[name]}" for name in known if before[name] != now[name])


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
