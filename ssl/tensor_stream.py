"""safetensors files written and read one tensor at a time, so that neither side holds them all at once.

The format: 8 bytes of the header's length, a JSON header of names, types, shapes and places, then the raw data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TYPES = {  # torch's types by the format's names, in the order in which the format's own writer sorts them
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


class LazyTensor(Protocol):
    """A tensor that is somewhere else until it is asked for: in a file, or cut over the ranks."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def whole(self) -> Tensor:
        """All of it, on any device."""
        ...


def whole(tensor: Tensor | LazyTensor) -> Tensor:
    """The tensor itself, or what a lazy one stands for."""
    return tensor if isinstance(tensor, Tensor) else tensor.whole()


def num_bytes(tensor: Tensor | LazyTensor) -> int:
    """The size of a tensor's data, without reading it."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def write_tensors(tensors: Mapping[str, Tensor | LazyTensor], path: Path) -> None:
    """Write tensors of any device and layout to a safetensors file, byte for byte as safetensors' own writer would.

    Lazy ones are asked for one after the other, in the order of the file. Raises ValueError on a type that the format
    has no name for, OSError where the file cannot be written.
    """
    names = {dtype: name for name, dtype in TYPES.items()}
    order = list(names)
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise ValueError(
                f"{name} is of type {tensor.dtype}, which {path.name} cannot hold; it may be {list(names)}"
            )
    placed = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in placed:
        end = start + num_bytes(tensors[name])
        shape = list(tensors[name].shape)
        header[name] = {"dtype": names[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in placed:
            data = whole(tensors[name]).detach().cpu().contiguous().flatten().view(torch.uint8)
            assert data.numel() == num_bytes(tensors[name]), name
            file.write(data.numpy().data)


class StoredTensor:
    """A tensor in a safetensors file, read when it is asked for."""

    def __init__(self, file: Any, name: str, path: Path) -> None:
        self._file, self._name, self._path = file, name, path
        described = file.get_slice(name)
        self.shape = torch.Size(described.get_shape())
        self.dtype = TYPES[described.get_dtype()]

    def whole(self) -> Tensor:
        return self._read(lambda: self._file.get_tensor(self._name))

    def rows(self, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of the first dimension, and nothing else is read."""
        return self._read(lambda: self._file.get_slice(self._name)[start:stop])

    def _read(self, read: Callable[[], Tensor]) -> Tensor:
        try:
            return read()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self._path}: {self._name} cannot be read ({error})") from error


class TensorFile(Mapping[str, StoredTensor]):
    """The tensors of a safetensors file by name, none of which is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its header. Raises ValueError where it is not one."""
        try:
            file: Any = safe_open(path, framework="pt")
            self._tensors = {name: StoredTensor(file, name, path) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{path} cannot be read ({error}); it is truncated or not a safetensors file") from error

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
