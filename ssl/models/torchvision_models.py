"""Any classification model of torchvision, with timm's interface and torchvision's own keys in its state dict.

torchvision's models offer `forward` alone. Its graph is read once per architecture, on torch's meta device, and cut in
front of the pooling; what is run afterwards are the model's own modules, in the order of that graph.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
import torchvision
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

PREFIX = "torchvision/"
SIDE = 224  # of the image on which a model is taken apart, where the model does not fix it
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
ADAPTIVE_FUNCTIONS = (functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d)
SIZE_ARGUMENTS = ("image_size", "input_size")  # what torchvision calls the size that a model is made for
TORCHVISION_ARGUMENTS = {  # what is set here, and the setting to use instead
    "weights": "nothing: pretraining starts from random weights",
    "progress": "nothing: nothing is downloaded",
    "aux_logits": "nothing: auxiliary heads are off, as they classify",
    "stochastic_depth_prob": "model.drop_path",
    **dict.fromkeys(SIZE_ARGUMENTS, "data.image_size"),
}


def model_names() -> list[str]:
    """The classification models that torchvision builds."""
    return torchvision.models.list_models(module=torchvision.models)


def is_torchvision(architecture: str) -> bool:
    """Whether an architecture's name says that it is torchvision's, as `torchvision/alexnet` does."""
    return architecture.startswith(PREFIX)


def takes_image_size(architecture: str) -> bool:
    """Whether it is a model of torchvision's that is built for one size of image."""
    if not is_torchvision(architecture):
        return False
    return any(name in SIZE_ARGUMENTS for name in _constructor_parameters(architecture.removeprefix(PREFIX)))


@dataclass(frozen=True)
class Stage:
    """The last module whose output has a size: its name, its channels, and how many pixels a cell stands for."""

    module: str
    num_chs: int
    reduction: int
    num_layers: int
    """Modules with weights up to here."""
    channels_last: bool
    """Whether its output is (B, h, w, C), as in Swin's blocks."""


@dataclass(frozen=True)
class Structure:
    """Where a model's parts are, and functions of (model, x) that run them."""

    features: Callable[[nn.Module, Tensor], Tensor]
    intermediates: Callable[[nn.Module, Tensor], tuple[Tensor, list[Tensor]]]
    head: Callable[[nn.Module, Tensor], Tensor]
    pooling: Callable[[nn.Module, Tensor], Tensor]
    """The head without its last layer."""
    order: tuple[str, ...]
    """Names of the modules with weights, in the order in which they run."""
    num_before_head: int
    """How many of `order` belong to the features."""
    classifier: str
    make_classifier: Callable[[int], nn.Module]
    """A fresh last layer for so many classes, of the same kind."""
    num_features: int
    """Channels of the features."""
    head_hidden_size: int
    """Values that the last layer reads."""
    stages: tuple[Stage, ...]


class TorchvisionModel(nn.Module):
    """A torchvision model whose last layer can be left out, replaced and read from, as timm's can.

    `forward_features` gives what the model pools: (B, C, h, w), or (B, N, C) tokens. `forward_head(pre_logits=True)`
    gives what the last layer with weights reads, (B, D): of AlexNet and VGG the 4096 values behind the second hidden
    layer, of a last layer that is a convolution, as SqueezeNet's, the average of its input. Dropout in front of it is
    the model's own, and off in eval mode.
    """

    def __init__(self, model: nn.Module, structure: Structure, *, name: str, num_classes: int) -> None:
        super().__init__()
        for child, module in model.named_children():
            self.add_module(child, module)
        for key, parameter in model.named_parameters(recurse=False):
            self.register_parameter(key, parameter)
        for key, buffer in model.named_buffers(recurse=False):
            self.register_buffer(key, buffer, persistent=key not in model._non_persistent_buffers_set)
        self.structure = structure
        self.num_classes = num_classes
        self.num_features = structure.num_features
        self.head_hidden_size = structure.head_hidden_size
        self.feature_info = [
            {"module": stage.module, "num_chs": stage.num_chs, "reduction": stage.reduction}
            for stage in structure.stages
        ]
        self.default_cfg = {"architecture": PREFIX + name, "classifier": structure.classifier}
        if num_classes == 0:
            self.set_submodule(structure.classifier, nn.Identity())

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to what the model pools."""
        return self.structure.features(self, x)

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> Any:
        """As timm's: (what the model pools, [the stages' maps (B, C, h, w)]), the stages that `indices` name."""
        if not self.feature_info:
            raise ValueError(f"{self.default_cfg['architecture']} has no stages of feature maps; take layers=last")
        final, maps = self.structure.intermediates(self, x)
        stages = self.structure.stages
        maps = [each.movedim(-1, 1) if stage.channels_last else each for stage, each in zip(stages, maps, strict=True)]
        chosen = maps if indices is None else [maps[index] for index in indices]
        return chosen if intermediates_only else (final, chosen)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gave to logits (B, classes), or to what the last layer would read, (B, D)."""
        return (self.structure.pooling if pre_logits else self.structure.head)(self, x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, classes); to pooled features (B, D) without a classifier."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer with weights; Identity where the model has none."""
        return self.get_submodule(self.structure.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh last layer for `num_classes` in its place, none for 0. Raises ValueError for another pooling."""
        if global_pool is not None:
            raise ValueError(f"{self.default_cfg['architecture']} pools in its own way, got global_pool={global_pool}")
        with torch.device(next(self.parameters()).device):
            last = self.structure.make_classifier(num_classes) if num_classes else nn.Identity()
        self.num_classes = num_classes
        self.set_submodule(self.structure.classifier, last)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """For timm's `group_parameters`: a parameter's name to its layer's number; to its stage's where `coarse`."""
        order, in_features = self.structure.order, self.structure.num_before_head
        ends = [stage.num_layers for stage in self.structure.stages[:-1]] + [in_features, len(order) - 1]

        def layer(name: str) -> int:
            place = next((i for i, module in enumerate(order) if name.startswith(f"{module}.")), 0)
            return sum(place >= end for end in ends) if coarse else place

        return layer


def create_torchvision(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    image_size: tuple[int, int] | None = None,
    drop_path_rate: float = 0.0,
    args: Mapping[str, Any] | None = None,
) -> TorchvisionModel:
    """Build torchvision's model with timm's interface; `num_classes=0` leaves its last layer out.

    `args` are the builder's, and `drop_rate` sets the dropout that is the model's own otherwise. `drop_path_rate` is
    that of the deepest block, those before it have the library's shares of it; drop paths are timm's layers. A first
    layer for other than three channels is drawn anew, so that its outputs have the variance of the library's.
    Auxiliary heads are off. Raises ValueError for what the model does not take.
    """
    given = builder_arguments(name, args or {}, image_size=image_size)
    structure = take_apart(name, _frozen(given))
    model = _built(name, **given, **({"num_classes": num_classes} if num_classes else {}))
    if in_chans != 3:
        _replace_first_layer(model, in_chans)
    _set_drop_path(model, name, drop_path_rate)
    return TorchvisionModel(model, structure, name=name, num_classes=num_classes)


def builder_arguments(
    name: str, args: Mapping[str, Any], *, image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The keyword arguments that torchvision's builder is called with. Raises ValueError for what it does not take."""
    takes = _constructor_parameters(name)
    given = dict(args)
    if "aux_logits" in takes:
        given["aux_logits"] = False
    if "init_weights" in takes and takes["init_weights"].default is None:
        given.setdefault("init_weights", True)  # torchvision's default, which it warns of when it is left out
    if image_size is not None and "input_size" in takes:
        given["input_size"] = image_size
    if image_size is not None and "image_size" in takes:
        if image_size[0] != image_size[1]:
            raise ValueError(f"torchvision's {name} takes square images, got {image_size[0]} x {image_size[1]} pixels")
        given["image_size"] = image_size[0]
    if "drop_rate" in given and "drop_rate" not in takes:  # timm's name for it
        if "dropout" not in takes:
            raise ValueError(f"torchvision's {name} has no dropout, got {given['drop_rate']}; set it to 0")
        given["dropout"] = given.pop("drop_rate")
    return given


def _constructor_parameters(name: str) -> Mapping[str, inspect.Parameter]:
    builder = inspect.unwrap(torchvision.models.get_model_builder(name))
    return inspect.signature(typing.get_type_hints(builder)["return"].__init__).parameters


def _frozen(value: Any) -> Any:
    """Arguments as something that can be a key of a cache."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(child)) for key, child in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


class _Modules(fx.Tracer):
    """Reads a graph of modules; only plain Sequential containers are opened."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of each tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = result.shape
        return result


@cache
def take_apart(name: str, args: tuple[tuple[str, Any], ...]) -> Structure:
    """Read torchvision's model from its graph. Raises ValueError where it cannot be cut before its pooling."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # a look must not move the weights that follow
        model = _built(name, **{key: _thawed(value) for key, value in args})
    graph = _Modules().trace(model.eval())
    whole = fx.GraphModule(model, graph)
    model.train()
    if fx.GraphModule(model, _Modules().trace(model)).code != whole.code:
        raise ValueError(f"torchvision's {name} runs other layers in training than in evaluation; take another model")
    whole.eval()
    side = next((value for key, value in args if key in SIZE_ARGUMENTS), SIDE)
    height, width = side if isinstance(side, tuple) else (side, side)
    shapes = _Shapes(whole)
    with torch.no_grad():
        shapes.run(torch.empty(1, 3, height, width, device="meta"))
    nodes = list(graph.nodes)
    modules = dict(whole.named_modules())
    weighted = [node for node in nodes if node.op == "call_module" and any(True for _ in _parameters(modules, node))]
    classifier = weighted[-1]
    cut = _before_pooling(name, nodes, shapes.found, modules, classifier)
    before = nodes[: nodes.index(cut) + 1]
    stages = _stages(before, shapes.found, cut, (height, width))
    result = cast(fx.Node, nodes[-1].args[0])
    num_features = shapes.found[cut][1 if len(shapes.found[cut]) == 4 else -1]
    make, head_hidden_size = _kind_of(name, modules[str(classifier.target)])
    return Structure(
        features=_function(whole, nodes[0], cut),
        intermediates=_function(whole, nodes[0], cut, also=list(stages)),
        head=_function(whole, cut, result),
        pooling=_function(whole, cut, result, without=classifier),
        order=tuple(str(node.target) for node in weighted),
        num_before_head=sum(node in before for node in weighted),
        classifier=str(classifier.target),
        make_classifier=make,
        num_features=num_features,
        head_hidden_size=head_hidden_size,
        stages=tuple(
            Stage(
                module=str(node.target),
                num_chs=found.num_chs,
                reduction=2 ** round(math.log2(height / found.size[0])),
                num_layers=sum(nodes.index(each) <= nodes.index(node) for each in weighted),
                channels_last=found.channels_last,
            )
            for node, found in stages.items()
        ),
    )


def _kind_of(name: str, last: nn.Module) -> tuple[Callable[[int], nn.Module], int]:
    """What makes a last layer of the same kind for a number of classes, and how many values it reads."""
    if type(last) is nn.Linear:
        return partial(nn.Linear, last.in_features, bias=last.bias is not None), last.in_features
    if type(last) is nn.Conv2d and last.kernel_size == (1, 1):
        return partial(nn.Conv2d, last.in_channels, kernel_size=1, bias=last.bias is not None), last.in_channels
    raise ValueError(f"the last layer of torchvision's {name} is no linear one; take another model")


def _thawed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _built(name: str, **args: Any) -> nn.Module:
    """torchvision's model on torch's default device."""
    try:
        return torchvision.models.get_model(name, weights=None, **args)
    except NotImplementedError:  # on the meta device, as torchvision computes RegNet's widths with tensors
        with torch.device("cpu"):
            return torchvision.models.get_model(name, weights=None, **args).to("meta")


def _parameters(modules: Mapping[str, nn.Module], node: fx.Node) -> Iterable[nn.Parameter]:
    return modules[str(node.target)].parameters()


def _before_pooling(
    name: str,
    nodes: Sequence[fx.Node],
    shapes: Mapping[fx.Node, torch.Size],
    modules: Mapping[str, nn.Module],
    classifier: fx.Node,
) -> fx.Node:
    """The step whose result is pooled: that before the first one that leaves no positions, or classifies."""

    def pools(node: fx.Node) -> bool:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        adaptive = isinstance(module, ADAPTIVE) or node.target in ADAPTIVE_FUNCTIONS
        return node is classifier or adaptive or (node in shapes and len(shapes[node]) <= 2)

    first = next(node for node in nodes if pools(node))
    cut = cast(fx.Node, first.args[0])
    while cut.op == "call_module" and isinstance(modules[str(cut.target)], nn.Dropout):
        cut = cast(fx.Node, cut.args[0])
    behind = set(nodes[nodes.index(cut) + 1 :])
    if any(each is not cut and each not in behind for node in behind for each in node.all_input_nodes):
        raise ValueError(f"torchvision's {name} has no single map in front of its pooling; take another model")
    return cut


@dataclass(frozen=True)
class _Map:
    num_chs: int
    size: tuple[int, int]
    channels_last: bool


def _as_map(shape: Sequence[int], image_size: tuple[int, int]) -> _Map | None:
    """A tensor's shape as that of a map with the image's proportions, channels first or last; None where it is none."""
    if len(shape) != 4:
        return None
    for axis in (1, 3):
        height, width = (shape[place] for place in (1, 2, 3) if place != axis)
        if math.isclose(height / width, image_size[0] / image_size[1], rel_tol=0.05):
            return _Map(shape[axis], (height, width), channels_last=axis == 3)
    return None


def _stages(
    nodes: Sequence[fx.Node], shapes: Mapping[fx.Node, torch.Size], cut: fx.Node, image_size: tuple[int, int]
) -> dict[fx.Node, _Map]:
    """The last module before each halving of the map; none where what is pooled is no map."""
    found: dict[fx.Node, _Map] = {}
    for node in nodes:
        each = _as_map(shapes.get(node, ()), image_size)
        if node.op != "call_module" or each is None:
            continue
        last = next(reversed(found), None)
        if last is not None and each.size[0] > found[last].size[0] / 1.5:  # unpadded layers take a little off
            del found[last]
        found[node] = each
    pooled = _as_map(shapes[cut], image_size)
    is_last = found and pooled is not None and list(found.values())[-1].size == pooled.size
    return found if is_last else {}


def _function(
    whole: fx.GraphModule,
    start: fx.Node,
    stop: fx.Node,
    *,
    without: fx.Node | None = None,
    also: Sequence[fx.Node] | None = None,
) -> Any:
    """A function of (model, x), x in the place of `start`'s result, that returns `stop`'s; with `also`, theirs too."""
    graph = fx.Graph()
    copies = {start: graph.placeholder("x")}
    wanted = {stop, *(also or ())}
    for node in reversed(list(whole.graph.nodes)):
        if node in wanted and node is not start:
            wanted.update(node.all_input_nodes)
    for node in whole.graph.nodes:
        if node is start or node not in wanted:
            continue
        if node is without:
            copies[node] = copies[cast(fx.Node, node.args[0])]
        else:
            copies[node] = graph.node_copy(node, lambda each: copies[each])
    graph.output(copies[stop] if also is None else (copies[stop], [copies[node] for node in also]))
    return type(fx.GraphModule(whole, graph)).forward


def _replace_first_layer(model: nn.Module, in_chans: int) -> None:
    """Let the convolution that reads the image read `in_chans` channels."""
    name, old = next((name, each) for name, each in model.named_modules() if isinstance(each, nn.Conv2d))
    new = nn.Conv2d(
        in_chans,
        old.out_channels,
        kernel_size=cast(Any, old.kernel_size),
        stride=cast(Any, old.stride),
        padding=cast(Any, old.padding),
        dilation=cast(Any, old.dilation),
        bias=old.bias is not None,
        device=old.weight.device,
    )
    with torch.no_grad():
        new.weight.normal_().mul_(old.weight.std() * math.sqrt(old.in_channels / in_chans))
        if old.bias is not None:
            cast(Tensor, new.bias).copy_(old.bias)
    model.set_submodule(name, new)


def _set_drop_path(model: nn.Module, name: str, rate: float) -> None:
    """Give the deepest block the drop path `rate`, and those before it torchvision's shares of it."""
    found = {key: module for key, module in model.named_modules() if isinstance(module, StochasticDepth)}
    most = max((module.p for module in found.values()), default=0.0)
    if rate and not most:
        raise ValueError(f"torchvision's {name} takes no drop path, got drop_path_rate={rate}; set it to 0")
    for key, module in found.items():
        model.set_submodule(key, DropPath(rate * module.p / most if most else 0.0))
