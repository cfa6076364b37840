"""Where numbers stop being finite: the first module in forward, parameter in backward, and the images at fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOST_FOUND = 8
"""Images at fault after which the search ends: then it is no matter of single images."""


@dataclass(frozen=True)
class BadModule:
    """The module whose output was the first that is not finite."""

    name: str
    kind: str
    largest_input: float
    """The largest magnitude that went into it; infinity or NaN where what came in was not finite."""

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}), of inputs up to {self.largest_input:.3g}"


class FiniteWatch:
    """While it is entered, notes the first module of `method` whose output, and the first parameter whose gradient, is
    not finite. Every output is read back from the device, which makes a step slow.
    """

    def __init__(self, method: nn.Module) -> None:
        self.method = method
        self.module: BadModule | None = None
        self.parameter: str | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> FiniteWatch:
        for name, module in self.method.named_modules():
            label = name or "the method itself"
            self._handles.append(module.register_forward_hook(self._forward_hook(label), with_kwargs=True))
        for name, parameter in self.method.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._gradient_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.module is None and not is_finite(output):
                largest = max((_largest(tensor) for tensor in floats([args, kwargs])), default=0.0)
                self.module = BadModule(name, type(module).__name__, largest)

        return note

    def _gradient_hook(self, name: str) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            if self.parameter is None and not is_finite(parameter.grad):
                self.parameter = name

        return note


def is_finite(value: Any) -> bool:
    """Whether every floating-point tensor in nested lists and dicts is finite."""
    return all(bool(tensor.isfinite().all()) for tensor in floats(value))


def floats(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested lists, tuples and dicts that are not empty."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value.detach()
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from floats(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from floats(each)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def find_at_fault(is_bad: Callable[[Tensor], bool], parts: Sequence[Tensor], *, alone: bool) -> list[int]:
    """The rows for which `is_bad(rows)` is true of every set that holds one, by halving each of `parts` (n,).

    `alone` tells whether a single row may be judged; else it is judged beside a row that is good, and counts as bad
    where none is known. Empty where no part is bad by itself; at most MOST_FOUND rows.
    """
    found: list[int] = []
    good: list[int] = []  # one row that is known to be good

    def judge(rows: Tensor) -> bool:
        if len(rows) == 1 and not alone:
            if not good:
                return True
            rows = torch.cat([rows, torch.tensor(good)])
        bad = is_bad(rows)
        if not bad:
            good[:] = [int(rows[0])]
        return bad

    def search(bad_rows: list[Tensor]) -> None:
        for rows in bad_rows:
            if len(found) >= MOST_FOUND:
                return
            if len(rows) == 1:
                found.append(int(rows))
            else:
                search([half for half in rows.tensor_split(2) if judge(half)])

    search([part for part in parts if judge(part)])
    return found
