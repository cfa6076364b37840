"""How much of the image a value depends on, operation by operation (Araujo et al. 2019, doi:10.23915/distill.00021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution,)
PADS = (aten.constant_pad_nd, aten.reflection_pad2d, aten.replication_pad2d)
POOLS = (aten.max_pool2d_with_indices, aten.avg_pool2d)
OVER_DIMENSIONS = (aten.mean, aten.sum, aten.amax, aten.max, aten.var_mean, aten.linalg_vector_norm)
MATRIX_PRODUCTS = (aten.mm, aten.addmm)
ATTENTION = (
    aten.bmm,
    aten.baddbmm,
    aten._softmax,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
)


@dataclass(frozen=True)
class Field:
    """Rows and columns of the image that a value sees, and how many lie between two values next to each other.

    Of several branches all that they see together counts; padding counts as image.
    """

    size: tuple[int, int] = (1, 1)
    jump: tuple[int, int] = (1, 1)
    start: tuple[int, int] = (0, 0)
    """Where the field of the first value of a map begins, below 0 in the padding."""

    def through(
        self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int]
    ) -> Field:
        """Behind a window that slides over it."""
        size = tuple(s + (k - 1) * d * j for s, k, d, j in zip(self.size, kernel, dilation, self.jump, strict=True))
        jump = tuple(j * step for j, step in zip(self.jump, stride, strict=True))
        start = tuple(s - p * j for s, p, j in zip(self.start, padding, self.jump, strict=True))
        return Field((size[0], size[1]), (jump[0], jump[1]), (start[0], start[1]))

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """What the value of this place sees: (top, left, height, width), which may reach beyond the image."""
        top, left = (start + jump * place for start, jump, place in zip(self.start, self.jump, (row, column)))
        return top, left, *self.size


def after(
    operation: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Tensor,
    inputs: Sequence[tuple[Tensor, Field | None]],
    num_images: int,
) -> Field | None:
    """The field of an operation's output, of the fields of its `inputs`; None where that is the whole image.

    A gate that looks at the whole image, as squeeze-and-excitation's, is passed over where it scales a map: by
    convention the map's field is that of its windows.
    """
    if operation in ATTENTION:
        return None
    field = _largest(output, inputs)
    if field is None:
        return None
    if operation in CONVOLUTIONS:
        return _convolved(field, args)
    if operation in POOLS:
        kernel = _pair(args[1])
        stride = _pair(args[2]) if len(args) > 2 and args[2] else kernel
        padding = _pair(args[3]) if len(args) > 3 else (0, 0)
        dilated = operation is aten.max_pool2d_with_indices and len(args) > 4
        return field.through(kernel, stride, _pair(args[4]) if dilated else (1, 1), padding)
    if operation in PADS and output.ndim == 4 and len(args[1]) == 4:
        left, _, top, _ = args[1]
        return field.through((1, 1), (1, 1), (1, 1), (top, left))
    if operation is aten._adaptive_avg_pool2d:
        return field if output.shape == inputs[0][0].shape else None
    if operation in MATRIX_PRODUCTS:  # each position by itself, unless there are none left
        return field if len(output) > num_images else None
    if operation in OVER_DIMENSIONS:
        return field if _over_channels(args, kwargs, inputs[0][0]) else None
    return field


def _largest(output: Tensor, inputs: Sequence[tuple[Tensor, Field | None]]) -> Field | None:
    fields = [each for _, each in inputs if each is not None]
    widest = max(tensor.numel() for tensor, _ in inputs)
    whole = any(each is None and tensor.numel() == widest for tensor, each in inputs)
    if whole or not fields:
        return None
    jump = tuple(max(each.jump[axis] for each in fields) for axis in (0, 1))
    start = tuple(min(each.start[axis] for each in fields) for axis in (0, 1))
    stop = tuple(max(each.start[axis] + each.size[axis] for each in fields) for axis in (0, 1))
    return Field((stop[0] - start[0], stop[1] - start[1]), (jump[0], jump[1]), (start[0], start[1]))


def _convolved(field: Field, args: Sequence[Any]) -> Field | None:
    """Arguments are (input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    kernel = tuple(args[1].shape[2:])
    if len(kernel) != 2 or args[6]:
        return None
    return field.through(kernel, _pair(args[3]), _pair(args[5]), _pair(args[4]))


def _over_channels(args: Sequence[Any], kwargs: Mapping[str, Any], tensor: Tensor) -> bool:
    """Whether a reduction leaves the positions of a map (B, C, H, W) alone."""
    given = [each for each in [*args[1:], kwargs.get("dim")] if isinstance(each, int | list | tuple)]
    dims = given[0] if given and not isinstance(given[0], bool) else []
    over = {dim % tensor.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    return tensor.ndim == 4 and over == {1}


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return int(values[0]), int(values[-1])
