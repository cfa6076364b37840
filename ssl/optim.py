"""Parameter groups, the optimizers, and their state as a flat dict of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Any

import torch
from timm.optim import Lamb, Lars
from torch import Tensor, nn
from torch.optim.sgd import sgd

from ssl.models.backbones import is_token_model
from ssl.sharding import fill, is_cut, local, whole_norms
from ssl.tensor_stream import LazyTensor, whole

ParameterGroup = dict[str, Any]

NO_DECAY = ("pos_embed", "cls_token", "dist_token", "reg_token", "mask_token")
"""Endings of the names of tokens and positions: they have more than one dimension and are still not decayed."""

OPTIONS = {
    "adamw": {"betas", "eps", "fused"},
    "adam": {"betas", "eps", "fused"},
    "rmsprop": {"alpha", "eps", "momentum", "centered"},
    "sgd": {"momentum", "nesterov", "dampening"},
    "lars": {"momentum", "nesterov", "dampening", "trust_coeff", "trust_clip", "eps"},
    "lamb": {"betas", "eps", "trust_clip"},
}


def parameter_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    no_decay_extra: Iterable[str] = (),
    lr_scales: Mapping[str, float] = MappingProxyType({}),
) -> list[ParameterGroup]:
    """Every parameter that is trained, in exactly one group.

    A group has `params`, their `names`, `weight_decay`, `lr_scale`, `layer`, and `adapt`: whether LARS and LAMB give it
    a trust ratio, true for the decayed groups. Biases, norms, 1-d tensors, positions and tokens are not decayed, nor
    what a submodule's `no_weight_decay()` names, nor what matches a pattern of `no_decay_extra`. With `layer_decay`,
    layer i of `module.backbone` (timm's own grouping) learns at layer_decay ** (number of layers - i) of the rate,
    and everything else at the full rate (BEiT, arXiv:2106.08254). `lr_scales` are further factors, by the beginnings of
    names. `set_lr` applies both.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"optim.layer_decay must lie in (0, 1], or be null for none; got {layer_decay}")
    exempt = _exempt_names(module, tuple(no_decay_extra))
    layers, num_layers = _backbone_layers(module) if layer_decay is not None else ({}, 0)
    groups: dict[tuple[int, bool, float], ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layers.get(name, num_layers)
        decayed = name not in exempt
        scale = next((scale for start, scale in lr_scales.items() if name.startswith(start)), 1.0)
        key = (layer, decayed, scale)
        if key not in groups:
            groups[key] = {
                "params": [],
                "names": [],
                "weight_decay": float(weight_decay) if decayed else 0.0,
                "lr_scale": scale * (1.0 if layer_decay is None else layer_decay ** (num_layers - layer)),
                "adapt": decayed,
                "layer": None if layer_decay is None else layer,
            }
        groups[key]["params"].append(parameter)
        groups[key]["names"].append(name)
    if not groups:
        raise ValueError(f"{type(module).__name__} has nothing to train: none of its parameters requires a gradient")
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1], key[2]))]


def _exempt_names(module: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    """Names of the parameters that must not be decayed."""
    listed: list[str] = list(patterns)
    norms: set[str] = set()
    for prefix, part in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        own = getattr(part, "no_weight_decay", None)
        if callable(own):
            listed += [dot + str(name) for name in own()]  # pyright: ignore[reportGeneralTypeIssues]
        if "norm" in type(part).__name__.lower():
            norms |= {dot + name for name, _ in part.named_parameters(recurse=False)}
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim <= 1
        or name in norms
        or name.endswith((".bias", *NO_DECAY))
        or any(fnmatch(name, pattern) for pattern in listed)
    }


def _backbone_layers(module: nn.Module) -> tuple[dict[str, int], int]:
    """Layer number of each backbone parameter, and the number of layers, which is the heads' own number.

    A classifier within the backbone is its last layer, with the last norm, as in BEiT's and MAE's fine-tuning.
    """
    from timm.models import group_parameters

    backbone = getattr(module, "backbone", None)
    matcher = getattr(backbone, "group_matcher", None)
    if backbone is None or matcher is None:
        raise ValueError(
            "optim.layer_decay needs a backbone whose layers timm can tell apart (a `group_matcher`), got "
            f"{type(backbone if backbone is not None else module).__name__}; set optim.layer_decay=null"
        )
    layers: Any = group_parameters(backbone, matcher(coarse=False), reverse=True)
    has_classifier = getattr(backbone, "num_classes", 0) > 0
    num_layers = max(layers.values()) + (not has_classifier)
    if is_token_model(backbone):  # timm counts the norm behind the last block with that block
        layers |= {name: num_layers for name in layers if name.startswith("norm.")}
    return {f"backbone.{name}": layer for name, layer in layers.items()}, num_layers


def scaled_lr(base_lr: float, *, global_batch_size: int, scaling: str) -> float:
    """The actual rate: base_lr * G / 256 (linear, arXiv:1706.02677), base_lr * sqrt(G) (sqrt), or base_lr (none)."""
    if scaling == "linear":
        return base_lr * global_batch_size / 256
    if scaling == "sqrt":
        return base_lr * math.sqrt(global_batch_size)
    if scaling == "none":
        return base_lr
    raise ValueError(f"optim.scaling must be linear, sqrt or none; got {scaling!r}")


def make_optimizer(groups: Iterable[ParameterGroup], *, name: str, lr: float, **options: Any) -> torch.optim.Optimizer:
    """An optimizer over the groups of `parameter_groups`, each starting at lr * lr_scale. `lr` is the actual rate.

    `adamw` (arXiv:1711.05101), `adam` (arXiv:1412.6980), `rmsprop` (Hinton's lecture 6e, the deviation plus eps as the
    divisor) and `sgd` are torch's, the first two fused where the parameters' device has it; all but `adamw` add
    weight_decay * w to the gradient. `lars` is timm's: the trust ratio is the paper's,
    trust_coeff * |w| / (|g| + weight_decay * |w|) (arXiv:1708.03888, eq. 6), given only to the decayed groups, also
    where weight_decay is 0; the rate multiplies the momentum buffer from outside, as in torch's SGD. SimCLR's own code
    divides by |g + weight_decay * w|, nearly the same at 1e-6, and keeps the rate inside the buffer, which differs only
    while the rate changes. `lamb` is timm's too (arXiv:1904.00962, algorithm 2, with phi(z) = z), its trust ratio given
    to the same groups, without the clipping of gradients that it brings, which is trainer.clip_grad_norm here.

    Raises ValueError for what `name` does not take or has no use for, and for `lamb` over parameters that are cut.
    """
    if name not in OPTIONS:
        raise ValueError(f"optim.name must be one of {', '.join(OPTIONS)}; got {name!r}")
    unknown = sorted(set(options) - OPTIONS[name])
    if unknown:
        raise ValueError(f"optim.options of {name} may be {', '.join(sorted(OPTIONS[name]))}; got {', '.join(unknown)}")
    options = _checked(name, options)
    own = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    if name in ("adamw", "adam"):
        devices = {parameter.device.type for group in own for parameter in group["params"]}
        options = {"fused": devices <= {"cpu", "cuda"}, **options}
        return (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)(own, lr=lr, **options)
    if name == "sgd":
        return torch.optim.SGD(own, lr=lr, **options)
    if name == "rmsprop":
        return torch.optim.RMSprop(own, lr=lr, **options)
    cut = any(is_cut(parameter) for group in own for parameter in group["params"])
    own = [{**group, "always_adapt": group["adapt"]} for group in own]
    if name == "lamb":
        if cut:
            check_cut(name)
        return Lamb(own, lr=lr, max_grad_norm=None, **options)
    return (ShardedLars if cut else Lars)(own, lr=lr, **options)


def check_cut(name: str) -> None:
    """Raise ValueError for an optimizer that cannot train parameters that are cut over ranks."""
    if name == "lamb":
        raise ValueError(
            "optim.name=lamb needs the norms of whole tensors, and trainer.shard=full cuts them; set "
            "trainer.shard=none, or optim=lars, which gathers them"
        )


def _checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with betas as a tuple. Raises ValueError for values outside what the paper defines."""
    for key, value in options.items():
        if key == "betas":
            if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
                raise ValueError(f"optim.options.betas of {name} must be two numbers in [0, 1), got {value}")
        elif key in ("momentum", "alpha") and not 0 <= value < 1:
            raise ValueError(f"optim.options.{key} of {name} must lie in [0, 1), got {value}")
        elif key in ("eps", "trust_coeff") and value < 0:
            raise ValueError(f"optim.options.{key} of {name} must be at least 0, got {value}")
    for key in ("nesterov", "dampening"):
        if options.get(key) and not options.get("momentum"):
            raise ValueError(f"optim.options.{key}={options[key]} has no effect without optim.options.momentum")
    return {**options, "betas": tuple(options["betas"])} if "betas" in options else options


class ShardedLars(Lars):
    """timm's Lars over parameters that are cut over the ranks: a trust ratio needs the norms of whole tensors."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Decay and scale each gradient, then let torch's SGD, which timm's does the same as, move this rank's pieces.

        All norms take one exchange.
        """
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        adapted = [p for group, params in groups if _adapts(group) for p in params]
        pieces = [local(p.detach()) for p in adapted] + [local(p.grad) for p in adapted]
        norms = dict(zip(adapted, whole_norms(pieces).view(2, -1).t())) if adapted else {}  # each (2,)
        for group, params in groups:
            gradients = [local(p.grad) for p in params]
            if _adapts(group):
                decay = group["weight_decay"]
                torch._foreach_add_(gradients, [local(p.detach()) for p in params], alpha=decay)
                torch._foreach_mul_(gradients, [_trust_ratio(norms[p][0], norms[p][1], group) for p in params])
            self._move(group, params, gradients)

    def _move(self, group: ParameterGroup, params: list[nn.Parameter], gradients: list[Tensor]) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params] if group["momentum"] else []
        known = [None if buffer is None else local(buffer) for buffer in buffers]
        settings = {name: group[name] for name in ("lr", "momentum", "dampening", "nesterov")}
        moved = [local(p.detach()) for p in params]
        sgd(moved, gradients, known, **settings, weight_decay=0.0, maximize=False)
        for p, buffer, piece in zip(params, buffers, known):  # torch's function made those of the first step
            if buffer is None and piece is not None:
                self.state[p]["momentum_buffer"] = torch.empty_like(p, requires_grad=False)
                local(self.state[p]["momentum_buffer"]).copy_(piece)


def _adapts(group: ParameterGroup) -> bool:
    return group["weight_decay"] != 0 or group["always_adapt"]


def _trust_ratio(weight_norm: Tensor, gradient_norm: Tensor, group: ParameterGroup) -> Tensor:
    """As timm's: 1 where either norm is 0."""
    ratio = group["trust_coeff"] * weight_norm / (gradient_norm + weight_norm * group["weight_decay"] + group["eps"])
    ratio = torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)
    return (ratio / group["lr"]).clamp(max=1.0) if group["trust_clip"] else ratio


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group lr * lr_scale: the layer decay that the groups only name is applied here, at every step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


UNTOUCHED = "untouched"
"""Stands for the state of a parameter that has had no gradient yet, so that a missing entry is always an error."""


def state_to_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state keyed "<parameter name>/<state key>", that of cut parameters cut like them.

    LAMB counts the steps of a group, which are stored with each of its parameters. The tensors may share memory with
    the live state.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter, group in _named(optimizer):
        state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if value is not None}
        if state and "step" in group:
            state["step"] = group["step"].clone()
        for key, value in state.items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().contiguous()
        if not state:
            tensors[f"{name}/{UNTOUCHED}"] = group["step"].clone() if "step" in group else torch.empty(0)
    return tensors


def tensors_to_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor | LazyTensor]) -> None:
    """Put back what `state_to_tensors` gave, whole tensors here, of which cut parameters take their rows.

    Raises ValueError that names what is missing, left over or misshapen.
    """
    by_name: dict[str, dict[str, Tensor | LazyTensor]] = {}
    for key, value in tensors.items():
        name, _, state_key = key.rpartition("/")
        by_name.setdefault(name, {})[state_key] = value
    problems: list[str] = []
    states: list[tuple[nn.Parameter, dict[str, Tensor]]] = []
    counts: list[tuple[ParameterGroup, Tensor]] = []
    for name, parameter, group in _named(optimizer):
        given = by_name.pop(name, {})
        if isinstance(optimizer, Lamb) and (count := given.get("step", given.get(UNTOUCHED))) is not None:
            counts.append((group, whole(count).detach().clone()))
        if set(given) == {UNTOUCHED}:
            states.append((parameter, {}))
            continue
        expected = _state_keys(optimizer, group)
        problems += [f"{name}/{key} is missing" for key in sorted(expected - set(given))]
        problems += [f"{name}/{key} is left over" for key in sorted(set(given) - expected)]
        problems += [
            f"{name}/{key} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
            for key, value in given.items()
            if key in expected and key != "step" and value.shape != parameter.shape
        ]
        states.append((parameter, {} if problems else _placed_all(given, parameter, group, optimizer)))
    problems += [f"{name}/{key} is left over" for name, given in by_name.items() for key in sorted(given)]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"the saved state is not of this {type(optimizer).__name__} over these parameters: "
            f"{'; '.join(problems[:8])}{more}"
        )
    for parameter, state in states:
        optimizer.state.pop(parameter, None)
        if state:
            optimizer.state[parameter] = state
    for group, count in counts:
        group.pop("step", None)
        if count.numel():
            group["step"] = count.cpu().reshape(())


def _named(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, nn.Parameter, ParameterGroup]]:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            yield name, parameter, group


def _state_keys(optimizer: torch.optim.Optimizer, group: ParameterGroup) -> set[str]:
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | Lamb):
        return {"step", "exp_avg", "exp_avg_sq"}
    if isinstance(optimizer, torch.optim.RMSprop):
        moments = {"momentum_buffer"} if group["momentum"] else set()
        return {"step", "square_avg", *moments, *({"grad_avg"} if group["centered"] else ())}
    return {"momentum_buffer"} if group["momentum"] else set()


def _placed_all(
    given: Mapping[str, Tensor | LazyTensor],
    parameter: nn.Parameter,
    group: ParameterGroup,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    own = {key: value for key, value in given.items() if not (key == "step" and isinstance(optimizer, Lamb))}
    return {key: _placed(key, value, parameter, group) for key, value in own.items()}


def _placed(key: str, value: Tensor | LazyTensor, parameter: nn.Parameter, group: ParameterGroup) -> Tensor:
    """A copy where and as the optimizer keeps it."""
    if key == "step":  # the fused kernel counts on the device, the others on the CPU
        return whole(value).detach().clone().to(parameter.device if group.get("fused") else "cpu")
    # The fused kernels walk memory, so the state must be laid out as its parameter is (channels_last).
    placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    fill(placed, value)
    return placed
