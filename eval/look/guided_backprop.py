"""`what=guided_backprop`: the gradient of which rectifiers let only positive parts through (Springenberg et al. 2014,
arXiv:1412.6806, section 3.4).

captum's GuidedBackprop knows modules of nn.ReLU alone, and gives the plain gradient of any other network. Here the
functions are guided, whether a module calls them or not, in place or not, as often as one likes: of a rectifier f that
is given x, a gradient g comes out as f'(x) * max(g, 0) where x > 0, and as 0 elsewhere. For ReLU that is the paper's
rule, and captum's; for GELU, SiLU and the like it is the same rule, which drops the little that they pass below 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.layers import activations
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from eval.look.attribution import image_caption, in_batches, key, rows_of, start, tested
from eval.look.drawing import captioned, colours_end
from eval.look.result import DoesNotApply, Look
from eval.look.target import Score, make_target

if TYPE_CHECKING:
    from eval.look.scene import Scene

RECTIFIERS: frozenset[Callable[..., Tensor]] = frozenset(
    {
        functional.relu,
        functional.relu6,
        functional.hardtanh,  # which nn.ReLU6 calls
        functional.gelu,
        functional.silu,
        functional.hardswish,
        functional.mish,
        functional.elu,
        functional.selu,
        functional.celu,
        functional.leaky_relu,
        functional.prelu,
        functional.softplus,
        torch.relu,
        torch.relu_,
        torch.prelu,
        Tensor.relu,
        Tensor.relu_,
    }
)
INPUTS = ("input", "self")
"""What torch calls the first argument of these, where it is named."""
WITHOUT_FUNCTION = (activations.QuickGELU, activations.HardMish, activations.Swish, activations.HardSwish)
"""timm's activations that are a product of simpler operations, which cannot be told from any other product."""
CLIP = 99.5
"""Percentile of a gradient at which its colours end."""


def look(scene: Scene) -> Look:
    """The guided gradient of each image that is shown, as a picture, and beside it the plain one."""
    settings = scene.config.guided_backprop
    shown = scene.shown()
    target = make_target(scene, shown, settings.target, setting="guided_backprop.target", gradient=True)
    check_network(target.network)
    batch_size = scene.config.batch_size
    start("guided_backprop", target.score, shown.image[:batch_size], num=2 * len(shown))
    _, num_rectifiers = guided_gradient(target.score, shown.image[:1])
    ways = {"guided": lambda score, image: guided_gradient(score, image)[0], "plain gradient": plain_gradient}
    found = {  # (B, C, H, W) each
        name: in_batches(way, target.score, shown.image, batch_size).cpu().numpy() for name, way in ways.items()
    }
    heats = {name: np.abs(each).max(1) for name, each in found.items()}  # (B, H, W)
    values, tests = tested(scene, shown, target, heats)
    rows = [[shown.pixels[i], *(as_picture(each[i]) for each in found.values())] for i in range(len(shown))]
    captions = [[image_caption(shown, target, i, values[i]), *found] for i in range(len(shown))]
    return Look(
        pictures={
            "": captioned(
                rows,
                captions=captions,
                title=f"Guided backpropagation of the {target.meaning}; gray is 0",
                min_side=160,
            )
        },
        data={
            "target": target.kind,
            "meaning": target.meaning,
            "rectifiers": num_rectifiers,
            "images": [
                {"path": name, "index": int(index), "truth": shown.truth(i), "explained": target.names[i] or None}
                for i, (name, index) in enumerate(zip(shown.names, shown.index))
            ],
        },
        arrays={key(name): each.astype(np.float32) for name, each in found.items()},
        metrics={f"{key(name)}_{part}": value for name, test in tests.items() for part, value in test.items()},
        lines=[
            f"explained: the {target.meaning}; {num_rectifiers} rectifiers were guided",
            "such pictures show edges of the image also where the weights are random (Adebayo et al. 2018, "
            "arXiv:1810.03292): compare with ckpt=random before reading much into them",
        ],
    )


def guided_gradient(score: Score, image: Tensor) -> tuple[Tensor, int]:
    """The guided gradient (B, C, H, W) of the scores of images, and how many calls of rectifiers were guided.

    Raises DoesNotApply where there was none: the gradient would be the plain one.
    """
    guide = _Guide()
    given = image.detach().clone().requires_grad_()
    with torch.enable_grad(), guide:
        value = score(given, rows_of(image)).sum()
    if not guide.calls:
        raise DoesNotApply("this network has no rectifier to guide the gradient at; what=saliency shows the plain one")
    return torch.autograd.grad(value, given)[0], guide.calls


def plain_gradient(score: Score, image: Tensor) -> Tensor:
    """The gradient (B, C, H, W) of the scores of images."""
    with torch.enable_grad():
        given = image.detach().clone().requires_grad_()
        return torch.autograd.grad(score(given, rows_of(image)).sum(), given)[0]


def check_network(network: nn.Module) -> None:
    """Raise DoesNotApply for a network with activations that cannot be guided."""
    for name, module in network.named_modules():
        if isinstance(module, WITHOUT_FUNCTION):
            raise DoesNotApply(
                f"{name} of this network is timm's {type(module).__name__}, which is no function that can be told from "
                "other products; what=saliency shows the plain gradient"
            )


def as_picture(gradient: np.ndarray) -> np.ndarray:
    """A gradient (C, H, W) as uint8 (H, W, 3), gray where it is 0."""
    colours = gradient[:3] if len(gradient) >= 3 else gradient[:1].repeat(3, axis=0)
    bound = colours_end(colours, percentile=CLIP)
    return ((np.clip(colours / bound, -1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)


class _Guide(TorchFunctionMode):
    """Calls every rectifier with hooks on what goes in and what comes out; nothing of the network is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RECTIFIERS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        named = {name: value for name, value in kwargs.items() if name not in INPUTS}
        given, *rest = args or [kwargs[name] for name in INPUTS if name in kwargs]
        if not given.requires_grad:
            return func(*args, **kwargs)
        self.calls += 1
        positive = given.detach() > 0
        entering = given.clone()
        entering.register_hook(lambda gradient: gradient * positive)
        leaving = func(entering, *rest, **named)
        leaving.register_hook(lambda gradient: gradient.clamp(min=0))
        return given.copy_(leaving) if leaving is entering else leaving  # in place, where that was asked for
