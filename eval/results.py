"""Where a score is written, with all that it takes to make it again."""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import timm
import torch

import ssl.distributed as distributed
from eval.report.refresh import renew
from eval.scan import import_faiss
from ssl.version import commit

LIST_OF_NUMBERS = re.compile(r"\[\n[-+\d.,eE\s]+\]")


def open_folder(folder: Path) -> Path:
    """Make the folder of the results. Raises OSError, before anything is computed, where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"results cannot be written to {folder}: {error.strerror}; give another out=") from error
    return folder


def write_results(
    path: Path, *, metrics: dict[str, float], protocol: dict[str, Any], details: dict[str, Any] | None = None
) -> None:
    """Write `{"metrics": ..., "protocol": ...}`, and `details` where there are some, whole or not at all. The page of
    the run in whose folder that is, where it has one and is at an end, is made again with it.
    """
    more = {} if details is None else {"details": details}
    text = json.dumps({"metrics": metrics, "protocol": protocol, **more}, indent=2, allow_nan=False)
    text = LIST_OF_NUMBERS.sub(lambda found: " ".join(found[0].split()), text)  # a matrix: a line for each row
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text + "\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}; give another out=") from error
    renew(path)


def environment() -> dict[str, Any]:
    """Date and time (UTC), versions, the commit of this code, the processor and its threads, the GPU."""
    faiss = import_faiss()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda,
            "faiss": getattr(faiss, "__version__", None),
        },
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "num_processes": distributed.world_size(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str | None:
    """The processor's name; None where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
