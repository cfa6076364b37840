"""What a checkpoint says of itself, read as if a stranger had written it: nothing is run, resolved or followed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ssl.tensor_files import sha256

FORMAT = 1
CARD, RUN = "state.json", "run.yaml"
PARTS = ("model.safetensors", "method.safetensors", "optimizer.safetensors", "config.json", RUN)
"""Files that every checkpoint has, beside its card."""
LARGEST_TEXT = 2**26
"""Bytes of a card, beyond which it is not read: the class names of the largest sets take a hundredth."""
LARGEST_CONFIG = 2**20
"""Bytes of a run's config, which has a few thousand."""
DEEPEST_CONFIG = 50


def read_state(folder: Path) -> dict[str, Any]:
    """The card of a checkpoint. Raises ValueError where it is not one of ours or is damaged."""
    path = folder / CARD
    try:
        state = json.loads(read_text(path))
    except OSError as error:
        raise ValueError(f"{folder} is not a whole checkpoint: {CARD} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not a whole checkpoint: {CARD} cannot be read ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{folder} has checkpoint format {got!r}; this version reads format {FORMAT}")
    step, digests = state.get("step"), state.get("sha256")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{folder} is damaged: {CARD} has step {step!r}, which must be a number of steps")
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(f"{folder} is damaged: {CARD} lacks the checksums of its files")
    for name in digests:
        if not is_plain_name(name):
            raise ValueError(f"{folder} is refused: {CARD} names {name!r}, which is not a file of this folder")
    absent = [name for name in PARTS if name not in digests]
    if absent:
        raise ValueError(f"{folder} is damaged: {CARD} lacks the checksum of {', '.join(absent)}")
    if not isinstance(state.get("backbone"), dict):
        raise ValueError(f"{folder} is damaged: {CARD} does not describe the backbone")
    return state


def verify(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError unless every file of the checkpoint has the content that was written."""
    for name, digest in state["sha256"].items():
        path = folder / name
        try:
            stay_inside(path)
            if not path.is_file():
                raise ValueError(f"{folder} is damaged: {name} is {'not a file' if path.exists() else 'missing'}")
            same = sha256(path) == digest
        except OSError as error:
            raise ValueError(f"{folder} is damaged: {name} cannot be read ({error.strerror})") from error
        if not same:
            raise ValueError(f"{folder} is damaged: {name} is not what was written ({path.stat().st_size:,} bytes now)")


def read_config(folder: Path, name: str = RUN) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint, as plain values.

    Raises ValueError where it is no plain YAML mapping. It was resolved when it was written; an interpolation in it,
    such as ${oc.env:...}, would read this machine's environment, and is refused.
    """
    path = folder / name
    try:
        text = read_text(path, most=LARGEST_CONFIG)
        _check_yaml(text)
        config = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} cannot be read as the config of a run: {_first_lines(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read as the config of a run: it is a {type(config).__name__}")
    for key, value in _leaves(config):
        if isinstance(value, str) and "${" in value:
            raise ValueError(
                f"{path} is refused: {key} is {value!r}; the config of a run holds values, not references to others or "
                "to the environment"
            )
    return {str(key): value for key, value in config.items()}


def read_text(path: Path, *, most: int = LARGEST_TEXT) -> str:
    """The text of a small file of a checkpoint or an export. Raises ValueError for links out of it and huge files."""
    stay_inside(path)
    if not path.is_file() and path.exists():
        raise ValueError(f"{path} is not a file")
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes; at most {most:,} are read")
    return path.read_text(encoding="utf-8")


def stay_inside(path: Path) -> None:
    """Raise ValueError where a file of a folder is a link to somewhere else."""
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise ValueError(
            f"{path} is a link to {path.readlink()}, outside of its folder, and is not followed; where you trust it, "
            "copy the folder with `cp -rL`"
        )


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file within the folder it is looked up in."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


def statistics(values: Any, *, channels: int, where: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, a finite number for each channel. Raises ValueError where they are not."""
    found = []
    for values_of in values:
        numbers = values_of if isinstance(values_of, list | tuple) else []
        fine = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)
        if not fine or len(numbers) != channels:
            raise ValueError(f"{where} has mean or std {values_of!r}; it must hold {channels} finite numbers")
        found.append([float(x) for x in numbers])
    mean, std = found
    if min(std) <= 0:
        raise ValueError(f"{where} has std {std}; it must be above 0")
    return mean, std


def _check_yaml(text: str) -> None:
    """Raise ValueError for what grows without bounds when it is read: aliases of aliases, nesting without end."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has YAML aliases, which the config of a run never has")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_CONFIG:
            raise ValueError("it is nested too deeply")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with its dotted key; keys are values too."""
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield f"{prefix}a key", key
            yield from _leaves(child, f"{prefix}{key}.")
    elif isinstance(node, list):
        for place, child in enumerate(node):
            yield from _leaves(child, f"{prefix}{place}.")
    else:
        yield prefix.rstrip("."), node


def _first_lines(error: BaseException) -> str:
    """What a parser says, without the excerpt that follows."""
    return " ".join(str(error).split("\n")[:3])[:300]
