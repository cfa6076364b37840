"""A pretrained backbone as a classifier: timm's own model with its own head, which fine-tuning trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl.models.backbones import BackboneSpec, asked_dropout, backbone_from_spec, turn_off_dropout

POOLINGS = ("auto", "token", "avg")


def make_classifier(
    spec: BackboneSpec,
    *,
    num_classes: int,
    pooling: str = "auto",
    drop_path: float = 0.0,
    dropout: float = 0.0,
    head_std: float = 0.01,
) -> tuple[nn.Module, BackboneSpec]:
    """The model that a description names with a classifier for `num_classes`, and its description with the pooling.

    `pooling` of a vision transformer is its class token (`token`) or the mean of its patches behind a LayerNorm of its
    own (`avg`, as in BEiT and MAE); `auto` is what the description says. `dropout` acts before the classifier,
    whatever the rate of pretraining was; 0 is none. The classifier's weights are normal with deviation `head_std`, cut
    at two, with biases of 0. Raises ValueError for what the model does not have, or what would change nothing.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a probability below 1, got {dropout}")
    args: dict[str, Any] = dict(spec.model_args)
    if pooling != "auto":
        args["global_pool"] = pooling
    spec = replace(spec, model_args=args)
    args = {key: value for key, value in args.items() if key not in ("drop_rate", "dropout")}
    if dropout:
        args["drop_rate"] = dropout
    model: Any = backbone_from_spec(replace(spec, model_args=args), drop_path=drop_path)
    if pooling != "auto" and not isinstance(model, VisionTransformer):
        raise ValueError(f"pooling={pooling} is for vision transformers, got {spec.architecture}; set pooling=auto")
    model.reset_classifier(num_classes)
    turn_off_dropout(model, but=asked_dropout(args))  # a fresh head may bring the library's own
    modules = any(isinstance(part, nn.Dropout) and part.p == dropout for part in model.modules())
    if dropout and not modules and getattr(model, "drop_rate", 0.0) != dropout:  # some apply it without a module
        raise ValueError(f"dropout={dropout} has no effect on {spec.architecture}; set it to 0")
    for name, parameter in model.named_parameters():
        if name in head_names(model):
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=head_std, a=-2 * head_std, b=2 * head_std)
            else:
                nn.init.zeros_(parameter)
    return model, spec


def head_names(model: Any) -> set[str]:
    """Names of the classifier's own parameters."""
    heads = model.get_classifier()
    own = {id(p) for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def without_classifier(backbone: Any) -> list[nn.Parameter]:
    """The parameters before the classifier; all of a backbone that has none."""
    heads = head_names(backbone) if getattr(backbone, "num_classes", 0) else set()
    return [parameter for name, parameter in backbone.named_parameters() if name not in heads]


def pooling_name(model: Any) -> str | None:
    """How timm pools the last layer: `avg`, `token`, ...; None where it does not say."""
    pool = getattr(model, "global_pool", None)
    return pool if isinstance(pool, str) else getattr(pool, "pool_type", None)


def put_weights(model: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Put a backbone's weights into a classifier strictly; returns what starts fresh or is left out, as notes.

    Only the classifier itself and, where patches are averaged, the norm of that average may be missing; only the norm
    before the class token that this replaces may be left over. Raises ValueError that lists anything else.
    """
    own = model.state_dict()
    fresh = head_names(model) | {name for name in own if name.startswith("fc_norm.")} - set(tensors)
    replaced = {name for name in tensors if name.startswith("norm.")} if "fc_norm.weight" in own else set()
    missing = sorted(own.keys() - set(tensors) - fresh)
    left = sorted(set(tensors) - own.keys() - replaced)
    wrong = sorted(name for name in own.keys() & set(tensors) if own[name].shape != tensors[name].shape)
    if missing or left or wrong:
        listed = "; ".join(
            f"{what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("left over", left), ("of another shape", wrong))
            if names
        )
        raise ValueError(f"the backbone's weights do not fit {type(model).__name__}: {listed}")
    kept = {name: tensor for name, tensor in tensors.items() if name in own and name not in head_names(model)}
    model.load_state_dict({**own, **kept}, strict=True)
    notes = []
    norm = sorted(name for name in fresh - head_names(model) if name in own)
    if norm:
        notes.append(f"{', '.join(norm)} start fresh, as in MAE: the norm of the averaged patches is not pretrained")
    unused = sorted(replaced - own.keys())
    if unused:
        notes.append(f"{', '.join(unused)} of the checkpoint are left out: with pooling=avg the model has no such norm")
    return notes


def freeze(model: Any, train: str | int) -> list[str]:
    """Leave only the last part of a classifier to be trained; returns the names that are frozen.

    `train` is `all`, `head` (the classifier alone), or a number of last stages with it: a ResNet's stages, a vision
    transformer's blocks, by timm's own coarse grouping. Raises ValueError for a number that the model does not have.
    """
    if train == "all":
        return []
    names = [name for name, _ in model.named_parameters()]
    if train == "head":
        frozen = [name for name in names if name not in head_names(model)]
    else:
        frozen = _before_last_stages(model, names, int(train))
    chosen = set(frozen)
    for name, parameter in model.named_parameters():
        if name in chosen:
            parameter.requires_grad_(False)
    return frozen


def stages(model: Any) -> tuple[dict[str, int], list[int]]:
    """The stage of each parameter of a classifier by timm's coarse grouping, and the numbers of the stages in order.

    The last group, norms and the classifier, is none of them. Raises ValueError where timm cannot tell them apart.
    """
    from timm.models import group_parameters

    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ValueError(f"timm cannot tell the stages of {type(model).__name__} apart; give train=all or train=head")
    layers: Any = group_parameters(model, matcher(coarse=True), reverse=True)
    last = max(layers.values())  # norms and the classifier
    return layers, sorted(set(layers.values()) - {last})


def stages_behind(model: Any, module: str) -> int:
    """How many stages of a classifier lie behind `module`, a name as in timm's `feature_info`; all but the stem behind
    one without parameters, such as a ResNet's first activation.
    """
    layers, numbers = stages(model)
    own = [layers[name] for name in layers if name.startswith(f"{module}.")]
    last = max(own, default=numbers[0])
    return sum(number > last for number in numbers)


def _before_last_stages(model: Any, names: list[str], count: int) -> list[str]:
    layers, numbers = stages(model)
    if not 1 <= count < len(numbers):
        raise ValueError(
            f"train={count} must be all, head, or a number of last stages from 1 to {len(numbers) - 1}: "
            f"{type(model).__name__} has {len(numbers)} with its stem"
        )
    return [name for name in names if layers[name] in numbers[:-count]]


def set_mode(model: nn.Module, training: bool) -> None:
    """Training mode but for what is frozen: a frozen BatchNorm keeps its statistics, a frozen block drops no path."""
    model.train(training)
    if training:
        for part in model.modules():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
