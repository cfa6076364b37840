"""Random weights of a backbone by a named rule, instead of its library's own."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

TRUNC_STD = 0.02
RULES = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "trunc_normal")


@torch.no_grad()
def initialize(model: nn.Module, rule: str | None, *, leave: Collection[str] = ()) -> None:
    """Give each convolution and linear layer of `model` weights by `rule`, None for those it has, and zero biases.

    Norms, positions and tokens stay as they are, and the layers whose
    weights are named in `leave`. With fan_in the inputs that one output reads
    and fan_out the outputs that read one input, the variance is 2 / (fan_in + fan_out) for `xavier` (Glorot and Bengio
    2010, eq. 12 and 16), 2 / fan_in for `kaiming` (arXiv:1502.01852, eq. 10), as a uniform or a normal distribution.
    `trunc_normal` is a normal distribution of deviation 0.02 cut at two deviations, as BERT's and ViT's code has it.
    Raises ValueError on another rule, and where the model has no such layer.
    """
    if rule is None:
        return
    if rule not in RULES:
        raise ValueError(f"model.init must be null or one of {', '.join(RULES)}; got {rule!r}")
    layers = [(weight, bias, groups) for name, weight, bias, groups in _layers(model) if name not in leave]
    if not layers:
        raise ValueError(f"model.init={rule} has no effect on {type(model).__name__}: no convolution or linear layer")
    for weight, bias, groups in layers:
        _draw(weight, rule, groups)
        if bias is not None:
            bias.zero_()


def _layers(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None, int]]:
    """(name of the weight, weight, bias, groups) of each layer."""
    for name, part in model.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(part, _ConvNd):
            yield dot + "weight", part.weight, part.bias, part.groups
        elif isinstance(part, nn.Linear):
            yield dot + "weight", part.weight, part.bias, 1
        elif isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            yield dot + "in_proj_weight", part.in_proj_weight, part.in_proj_bias, 1


def _draw(weight: Tensor, rule: str, groups: int) -> None:
    if rule == "trunc_normal":
        nn.init.trunc_normal_(weight, std=TRUNC_STD, a=-2 * TRUNC_STD, b=2 * TRUNC_STD)
        return
    field = weight[0, 0].numel()
    fan_in, fan_out = weight.shape[1] * field, weight.shape[0] // groups * field  # torch's own forgets the groups
    variance = 2 / (fan_in + fan_out) if rule.startswith("xavier") else 2 / fan_in
    if rule.endswith("uniform"):
        bound = math.sqrt(3 * variance)
        weight.uniform_(-bound, bound)
    else:
        weight.normal_(0, math.sqrt(variance))


def same_weights(given: Tensor, now: Tensor) -> bool:
    """Whether two tensors are equal; on the meta device, which holds no numbers, they are."""
    return given.shape == now.shape and (given.is_meta or given.equal(now))
