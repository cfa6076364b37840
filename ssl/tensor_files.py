"""Named tensors: written to safetensors files, read again, and loaded into a module only where every one fits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl.sharding import fill
from ssl.tensor_stream import LazyTensor, write_tensors


def save_tensors(tensors: Mapping[str, Tensor | LazyTensor], path: Path) -> None:
    """Write tensors of any device and layout to a safetensors file, as readable as its folder is."""
    write_tensors(tensors, path)
    path.chmod(path.parent.stat().st_mode & 0o666)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises ValueError where it is not one."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it is truncated or not a safetensors file") from error


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor | LazyTensor], where: str | Path, *, advice: str | None = None
) -> None:
    """Load into `module`, which may be cut over ranks, what `where` holds.

    Raises ValueError, with `advice`, where a name or a shape does not fit.
    """
    own = module.state_dict()
    check_fit(own, tensors, where, advice=advice)
    for name, tensor in tensors.items():
        fill(own[name], tensor)


def check_fit(
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor | LazyTensor],
    where: str | Path,
    *,
    advice: str | None = None,
) -> None:
    """Raise ValueError, with `advice`, where names or shapes of what `where` holds are not those of `own`."""
    match_keys(own.keys(), tensors, where, advice=advice)
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{where} does not fit: {name} is {tuple(tensor.shape)} there, {tuple(own[name].shape)} in the model"
                + (f"; {advice}" if advice else "")
            )


def match_keys(own: Iterable[str], given: Mapping[str, Any], where: str | Path, *, advice: str | None = None) -> None:
    """Raise ValueError, with names, where tensors are missing from `given` or left over."""
    missing, extra = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or extra:
        raise ValueError(
            f"{where} does not fit: {len(missing)} tensors are missing from it ({few(missing)}), "
            f"{len(extra)} are left over ({few(extra)}); {advice or 'was it made with another method or model?'}"
        )


def few(names: Sequence[str], most: int = 8) -> str:
    """The first names of many."""
    return "none" if not names else ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and values, for weights that come without a file of their own."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have the operating system write a file or folder to disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
