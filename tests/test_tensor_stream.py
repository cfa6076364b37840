"""safetensors files written and read one tensor at a time, against safetensors' own writer and reader."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl.tensor_stream import TensorFile, write_tensors


def of_every_type() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(5, 3, generator=generator)
    return {
        "b/step": torch.tensor(3.0),
        "weight": random,
        'é"\\': random[0].bfloat16(),
        "half": random.half().t(),
        "count": torch.tensor(7),
        "empty": torch.empty(0),
        "no rows": torch.empty(0, 3),
        "mask": random[0] > 0,
        "double": random.double(),
        "int32": torch.arange(3, dtype=torch.int32),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "channels_last": torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last),
    }


def test_written_file_is_byte_for_byte_that_of_safetensors(tmp_path: Path):
    tensors = of_every_type()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tensors, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_stored_tensors_are_read_whole_or_by_rows(tmp_path: Path):
    write_tensors(of_every_type(), tmp_path / "file")
    stored = TensorFile(tmp_path / "file")
    for name, tensor in of_every_type().items():
        assert stored[name].whole().equal(tensor)
        assert (stored[name].shape, stored[name].dtype) == (tensor.shape, tensor.dtype)
    weight = of_every_type()["weight"]
    assert stored["weight"].rows(1, 3).equal(weight[1:3])
    assert stored["weight"].rows(5, 5).shape == (0, 3)


def test_a_type_without_a_name_in_the_format_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"z is of type torch\.complex64"):
        write_tensors({"z": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "file")
    (tmp_path / "broken").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(ValueError, match="broken cannot be read"):
        TensorFile(tmp_path / "broken")


class Counted:
    """A lazy tensor that knows whether one made earlier is still held by somebody."""

    shape, dtype = torch.Size([1000]), torch.float32
    made: list[weakref.ref[Tensor]]

    def __init__(self, made: list[weakref.ref[Tensor]]) -> None:
        self.made = made

    def whole(self) -> Tensor:
        assert not [ref for ref in self.made if ref() is not None], "an earlier tensor is still held"
        tensor = torch.full((1000,), float(len(self.made)))
        self.made.append(weakref.ref(tensor))
        return tensor


def test_lazy_tensors_are_held_one_at_a_time_while_they_are_written(tmp_path: Path):
    made: list[weakref.ref[Tensor]] = []
    write_tensors({f"t{number}": Counted(made) for number in range(4)}, tmp_path / "file")
    assert [tensor[0].item() for tensor in load_file(tmp_path / "file").values()] == [0, 1, 2, 3]
