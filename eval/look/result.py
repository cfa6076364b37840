"""What a look gives: pictures for people, the numbers behind them for programs; and how they are written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl.pictures import save_png


class DoesNotApply(ValueError):
    """This look has nothing to show of this checkpoint or these images; the message says which has."""


@dataclass(frozen=True)
class Look:
    """Names are parts of file names: `occlusion` and the picture `heat` make `occlusion_heat.png`, the picture named
    by the empty string `occlusion.png`.
    """

    pictures: dict[str, np.ndarray]
    """uint8 (H, W, 3) each."""
    data: dict[str, Any]
    """JSON values: what stands behind the pictures."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Heat maps, embeddings and other arrays, for `<what>.npz`."""
    metrics: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    """What a person reads on the terminal, findings first."""
    pages: dict[str, str] = field(default_factory=dict)
    """HTML pages of one file each."""
    tables: dict[str, str] = field(default_factory=dict)
    """CSV texts."""


def write_look(look: Look, folder: Path, what: str, *, about: Mapping[str, Any]) -> list[Path]:
    """Write everything of `look` under `<folder>/<what>...`, the JSON last; returns the paths, pictures first.

    What an earlier look of the same name left there is removed first. Raises OSError, saying what to do, where that is
    not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in _earlier(folder, what):
            old.unlink(missing_ok=True)
        paths = []
        for name, picture in look.pictures.items():
            paths.append(_path(folder, what, name, "png"))
            save_png(picture, paths[-1])
        for suffix, texts in (("html", look.pages), ("csv", look.tables)):
            for name, text in texts.items():
                paths.append(_path(folder, what, name, suffix))
                paths[-1].write_text(text, encoding="utf-8")
        if look.arrays:
            paths.append(folder / f"{what}.npz")
            np.savez_compressed(paths[-1], **look.arrays)  # pyright: ignore[reportArgumentType]
        files = [path.name for path in paths]
        values = finite({"metrics": look.metrics, **about, "data": look.data, "files": files})
        partial = folder / f".{what}.json.{os.getpid()}"
        partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
        os.replace(partial, folder / f"{what}.json")
    except OSError as error:
        raise OSError(f"{folder} cannot be written to: {error.strerror or error}; give another out=") from error
    return [*paths, folder / f"{what}.json"]


def _earlier(folder: Path, what: str) -> list[Path]:
    """The files that the JSON of an earlier look names, and that JSON."""
    listing = folder / f"{what}.json"
    try:
        names = json.loads(listing.read_text()).get("files", [])
    except (OSError, ValueError, AttributeError):
        return []
    own = [name for name in names if isinstance(name, str) and Path(name).name == name and name.startswith(what)]
    return [*(folder / name for name in own), listing]


def _path(folder: Path, what: str, name: str, suffix: str) -> Path:
    return folder / (f"{what}_{name}.{suffix}" if name else f"{what}.{suffix}")


def finite(value: Any) -> Any:
    """Values as JSON has them: numpy's as Python's, numbers that are not finite as null, keys as text."""
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, np.ndarray | np.generic):
        return finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
