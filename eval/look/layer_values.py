"""The values that a layer gives for images, with their gradient, read while a network runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from eval.look.layer_places import Places

Run = Callable[[Tensor], Tensor]
"""From normalised images (B, C, H, W) to whatever the network ends with."""


def main_maps(places: Mapping[str, Places]) -> list[Places]:
    """The layers of more than one place that stand at most one level inside another: a network's stages and blocks."""
    return [each for name, each in places.items() if name.count(".") <= 1 and math.prod(each.grid_size) > 1]


class _Reached(Exception):
    """The layer that was asked for has given its output: what follows need not run."""


def read_layer(network: nn.Module, run: Run, layer: str, image: Tensor) -> Tensor:
    """What the module `layer` gives, the first time that it runs, for images (B, C, H, W); nothing behind it runs."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, given: Any, output: Tensor) -> None:
        outputs.append(output)
        raise _Reached

    with hooked([network.get_submodule(layer)], keep):
        try:
            run(image)
        except _Reached:
            return outputs[0]
    raise ValueError(f"{layer} does not run when the network does; give another layer")


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Let `hook` see the outputs of `modules`, and replace those for which it returns something, inside the block."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
