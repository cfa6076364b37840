"""What each layer of a model gives, computes, holds and sees, counted on tensors without values."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ssl.memory_plan import storage_of
from ssl.models.backbones import pooled_features
from ssl.models.receptive_field import Field, after


@dataclass
class Layer:
    """A module's own share, without that of modules inside it that have a share."""

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    """Of the output for one image, without the batch's dimension."""
    parameters: int = 0
    multiply_adds: float = 0.0
    made: float = 0.0
    """Bytes of the tensors that the forward pass makes, for one image in fp32."""
    kept: float = 0.0
    """Bytes of those, and of its inputs, that are kept for the backward pass; each counts where it is kept first."""
    field: Field | None = None
    """What a value of the output sees of the image; None where attention decides, and where it is everything."""

    @property
    def is_empty(self) -> bool:
        """Whether it has no share in anything, as a container of others."""
        return not (self.parameters or self.multiply_adds or self.made or self.kept)


def layer_table(
    model: nn.Module, *, image_size: tuple[int, int], in_chans: int = 3, logits: bool = False
) -> list[Layer]:
    """A row for each module that runs, in the order in which they first do something.

    The parameters of a module that is not called itself, as attention reads its weights, are with the nearest module
    around it that is, so that all rows together have the model's.

    The model goes through its pooled features, or with `logits` through its classifier too, in training mode, on two
    images and on four: what grows with the batch counts. It is left as it was. Multiply-adds are those of
    convolutions and matrix products, as in papers. Activation checkpointing and autocast are off.
    """
    few, more = (_count(model, number, image_size, in_chans, logits=logits) for number in (2, 4))
    for name, layer in few.items():
        for share in ("multiply_adds", "made", "kept"):
            setattr(layer, share, (getattr(more[name], share) - getattr(layer, share)) / 2)
    _place_parameters(model, few)
    return list(few.values())


def _place_parameters(model: nn.Module, rows: dict[str, Layer]) -> None:
    placed: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = set(module.parameters(recurse=False)) - placed
        while own and name and name not in rows:
            name = name.rpartition(".")[0]
        if own:
            row = rows.setdefault(name, Layer(name, type(model).__name__))  # a new row is the model's own
            row.parameters += sum(parameter.numel() for parameter in own)
            placed |= own


def folded(layers: Iterable[Layer], depth: int = 0) -> list[Layer]:
    """The rows that have a share; with `depth` those of modules inside a module of this depth as one, with its output.

    A list of modules, which does not run as one, has its last module's output.
    """
    rows: dict[str, Layer] = {}
    whole: set[str] = set()
    for layer in layers:
        name = ".".join(layer.name.split(".")[:depth]) if depth else layer.name
        row = rows.setdefault(name, Layer(name, ""))
        if name == layer.name and layer.shape:
            whole.add(name)
        if name == layer.name:
            row.kind = layer.kind
        if name == layer.name or name not in whole:
            row.shape, row.field = layer.shape or row.shape, layer.field
        for share in ("parameters", "multiply_adds", "made", "kept"):
            setattr(row, share, getattr(row, share) + getattr(layer, share))
    return [row for row in rows.values() if not row.is_empty]


def _count(
    model: nn.Module, num_images: int, image_size: tuple[int, int], in_chans: int, *, logits: bool
) -> dict[str, Layer]:
    modes = [(module, module.training) for module in model.modules()]
    with FakeTensorMode(), torch.random.fork_rng(devices=[]), ExitStack() as stack:
        stack.callback(lambda: [setattr(module, "training", training) for module, training in modes])
        model.train()
        own = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        image = torch.empty(num_images, in_chans, *image_size)
        counting = _Counting(model, image, {storage_of(tensor) for tensor in own.values()})
        for hook in counting.hooks():
            stack.callback(hook.remove)
        with counting, torch.autograd.graph.saved_tensors_hooks(counting.keep, lambda tensor: tensor):
            torch.func.functional_call(
                _Runs(model, logits=logits), {f"model.{name}": each for name, each in own.items()}, (image,)
            )
    return counting.layers


class _Runs(nn.Module):
    def __init__(self, model: nn.Module, *, logits: bool) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.logits else pooled_features(self.model, x)


class _Counting(TorchDispatchMode):
    """Notes what every operation does, on the row of the innermost module that runs."""

    def __init__(self, model: nn.Module, image: Tensor, weights: set[int]) -> None:
        super().__init__()
        self.model, self.weights, self.num_images = model, weights, len(image)
        self.running = [""]
        self.layers: dict[str, Layer] = {}
        self.fields: dict[int, Field | None] = {storage_of(image): Field()}
        self.held: list[Any] = [image]  # so that no other tensor takes a place in memory that is known
        self.seen_kept: set[int] = set()

    def hooks(self) -> Iterable[Any]:
        for name, module in self.model.named_modules():
            if name:
                yield module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name))
                yield module.register_forward_hook(self._leave)

    def _leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        layer = self._row(self.running.pop(), module)
        if isinstance(output, Tensor):
            layer.shape, layer.field = tuple(output.shape[1:]), self.fields.get(storage_of(output))

    def _row(self, name: str, module: nn.Module | None = None) -> Layer:
        if name not in self.layers:
            module = module or self.model.get_submodule(name)
            self.layers[name] = Layer(name, type(module).__name__)
        return self.layers[name]

    def keep(self, tensor: Tensor) -> Tensor:
        place = storage_of(tensor)
        if place not in self.weights and place not in self.seen_kept:
            self.seen_kept.add(place)
            self.held.append(tensor)
            self._row(self.running[-1]).kept += tensor.untyped_storage().nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        places = {storage_of(each) for each in inputs}
        result = func(*args, **kwargs)
        layer = self._row(self.running[-1])
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            layer.multiply_adds += count(*args, **kwargs, out_val=result) / 2
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        known = [(each, self.fields[storage_of(each)]) for each in inputs if storage_of(each) in self.fields]
        for output in outputs:
            place = storage_of(output)
            if place not in places and place not in self.weights:
                layer.made += output.untyped_storage().nbytes()
                self.held.append(output)
            if known:
                self.fields[place] = after(func.overloadpacket, args, kwargs, output, known, self.num_images)
        return result
