"""Backbones: any model of timm or torchvision by name, fitted to the image size and rebuilt from a few JSON values."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import timm
import torch
from timm.layers import DropPath, PatchEmbed
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl.models import families as _families  # noqa: F401  registers what timm does not have
from ssl.models.described import check_described
from ssl.models.torchvision_models import PREFIX, TORCHVISION_ARGUMENTS, create_torchvision, is_torchvision, model_names

STEMS = ("standard", "small", "padded")  # padded: small with a padding of 2, as solo-learn builds it for CIFAR
COMMON_SIDES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 299, 384, 448, 512)
OWN_ARGUMENTS = {  # what build_backbone sets itself, and the setting to use instead
    "in_chans": "the data's channels",
    "img_size": "data.image_size",
    "patch_size": "model.patch_size",
    "drop_path_rate": "model.drop_path",
    "num_classes": "nothing: a backbone has no classifier",
    "pretrained": "nothing: pretraining starts from random weights",
    "pretrained_cfg": "nothing: pretraining starts from random weights",
    "checkpoint_path": "nothing: pretraining starts from random weights",
    "features_only": "nothing: a backbone gives one vector per image",
}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# timm raises whatever a wrong argument or image size runs into first.
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone is rebuilt from, before its weights are loaded strictly.

    `architecture` is timm's name, or torchvision's behind `torchvision/`. `model_args` are the library's own keyword
    arguments, JSON values only. Drop path is no part of it: it belongs to a training run. Dropout acts only where
    `model_args` ask for it.
    """

    architecture: str
    image_size: tuple[int, int]
    in_chans: int
    model_args: dict[str, Any]
    stem: str = "standard"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the image size as a list."""
        return {**asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackboneSpec:
        """Read what `to_dict` wrote. Raises ValueError on missing or unknown keys, and as `check_described`."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"A backbone's description needs the keys {sorted(names)}, got {sorted(values)}; "
                "the checkpoint was written by another program or version."
            )
        check_described(values)
        height, width = values["image_size"]
        return cls(**{**values, "image_size": (int(height), int(width)), "model_args": dict(values["model_args"])})


def build_backbone(
    name: str,
    *,
    image_size: tuple[int, int],
    in_chans: int = 3,
    patch_size: int | tuple[int, int] | None = None,
    stem: str = "auto",
    stem_side: int | None = None,
    drop_path: float = 0.0,
    model_args: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, BackboneSpec]:
    """Build a model without classifier for images of (height, width) pixels, and its description.

    `name` is timm's, or torchvision's behind `torchvision/`, as `model_name` writes it.

    `patch_size=None` takes the model's own from 128 pixels (16 where that does not divide the image), at most 8 from 64
    and at most 4 below; `stem="auto"` takes the small stem for ResNets up to 64 pixels. The shorter side counts, for
    the stem `stem_side`, where a method shows the backbone less than the image. Keys of the state dict are the
    library's own. Raises ValueError, saying what fits, where name, arguments and image size do not go together.
    """
    spec = describe_backbone(
        name,
        image_size=image_size,
        in_chans=in_chans,
        patch_size=patch_size,
        stem=stem,
        stem_side=stem_side,
        model_args=model_args,
    )
    return backbone_from_spec(spec, drop_path=drop_path), spec


def describe_backbone(
    name: str,
    *,
    image_size: tuple[int, int],
    in_chans: int = 3,
    patch_size: int | tuple[int, int] | None = None,
    stem: str = "auto",
    stem_side: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> BackboneSpec:
    """The description of what `build_backbone` builds, from the same settings; no memory is taken for its weights."""
    height, width = (int(side) for side in image_size)
    args = _checked_arguments(name, model_args)
    if is_torchvision(name):
        _check_without(name, patch_size=patch_size, stem=stem)
        _construct(name, in_chans=in_chans, image_size=None, model_args=args, device="meta")  # refuses wrong arguments
        spec = BackboneSpec(name, (height, width), in_chans, args)
        _check_fit(spec)
        return spec
    probe = _construct(name, in_chans=in_chans, image_size=None, model_args=args, device="meta")
    accepted = _constructor_arguments(type(probe))
    if "img_size" in accepted:
        args["img_size"] = [height, width]
    if isinstance(probe, VisionTransformer):
        args.setdefault("dynamic_img_size", True)
    if "strict_img_size" in accepted:  # timm's name for it in Swin; patches of relative location are smaller
        args.setdefault("strict_img_size", False)
    patch = _choose_patch_size(name, probe, accepted, (height, width), patch_size)
    if patch is not None:
        args["patch_size"] = patch
    spec = BackboneSpec(
        architecture=name.split(".")[0],  # a tag behind the dot names pretrained weights, which are not loaded
        image_size=(height, width),
        in_chans=in_chans,
        model_args=args,
        stem=_choose_stem(name, probe, min(height, width) if stem_side is None else stem_side, stem),
    )
    _check_fit(spec)
    return spec


def backbone_from_spec(spec: BackboneSpec, *, drop_path: float = 0.0, device: str | None = None) -> nn.Module:
    """Rebuild the model that a description names, with fresh weights.

    Dropout that the library's model has unasked is off. Raises ValueError where the model takes no drop path, or where
    the rate given would change nothing.
    """
    args = dict(spec.model_args)
    if drop_path:
        args["drop_path_rate"] = drop_path
    try:
        model = _construct(
            spec.architecture, in_chans=spec.in_chans, image_size=spec.image_size, model_args=args, device=device
        )
    except ValueError as error:
        if not drop_path or "drop_path_rate" not in str(error.__cause__):
            raise
        raise ValueError(
            f"{spec.architecture} takes no drop path, got model.drop_path={drop_path}; set it to 0."
        ) from None
    if spec.stem != "standard":
        _make_stem_small(model, padding=2 if spec.stem == "padded" else 1, device=device)
    if not drop_path:  # timm's Swin would drop at rates up to 0.1 unless told otherwise
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
    turn_off_dropout(model, but=asked_dropout(spec.model_args))
    if drop_path and not any(getattr(module, "drop_prob", 0.0) for module in model.modules()):
        raise ValueError(
            f"model.drop_path={drop_path} has no effect on {spec.architecture} with {spec.model_args}; set it to 0."
        )
    return model


def asked_dropout(model_args: Mapping[str, Any]) -> set[float]:
    """The rates of dropout that a model's arguments ask for: `drop_rate`, `dropout`, `attn_drop_rate` and the like."""
    rates = {value for key, value in model_args.items() if "drop" in key and "path" not in key}
    return {float(rate) for rate in rates if isinstance(rate, int | float)}


def turn_off_dropout(model: nn.Module, *, but: Collection[float] = ()) -> None:
    """Set every dropout of a model to 0 whose rate is not among `but`; timm's GhostNet would drop 0.2 unasked.

    Some models apply it without a module, at their `drop_rate`.
    """
    for module in model.modules():
        if isinstance(module, DROPOUTS) and module.p not in but:
            module.p = 0.0
        if isinstance(getattr(module, "drop_rate", None), float) and module.drop_rate not in but:
            module.drop_rate = 0.0  # pyright: ignore[reportArgumentType]


def model_name(model: Mapping[str, Any]) -> str:
    """The name that `build_backbone` takes, of the settings of a `model=`: torchvision's get their prefix."""
    name = str(model["name"])
    return PREFIX + name if model.get("library") == "torchvision" else name


def is_token_model(model: nn.Module) -> bool:
    """Whether the model is one of timm's plain vision transformers, whose tokens are patches of the image.

    False for convolutional patch embeddings, which let neighbouring patches leak into a token.
    """
    return (
        isinstance(model, VisionTransformer)
        and type(model).forward_features is VisionTransformer.forward_features
        and type(model.patch_embed) is PatchEmbed
    )


def pooled_features(model: nn.Module, x: Tensor) -> Tensor:
    """Return one vector per image, (B, C, H, W) to (B, D): what the model's own classifier would read."""
    return model.forward_head(model.forward_features(x), pre_logits=True)  # pyright: ignore[reportCallIssue]


def feature_dim(model: nn.Module, *, image_size: tuple[int, int], in_chans: int = 3) -> int:
    """Measure the D of `pooled_features`, without computing anything.

    timm's `num_features` is another number where layers stand between the last feature map and the classifier, as in
    MobileNetV3.
    """

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return pooled_features(self.model, x)

    pooled = Pooled()
    modes = [(module, module.training) for module in model.modules()]
    tensors = {name: t.to("meta") for name, t in [*pooled.named_parameters(), *pooled.named_buffers()]}
    try:
        pooled.eval()  # BatchNorm cannot take the statistics of a 1 x 1 map
        with torch.no_grad():
            features = torch.func.functional_call(pooled, tensors, torch.empty(1, in_chans, *image_size, device="meta"))
    finally:
        for module, training in modes:
            module.training = training
    return features.shape[-1]


def _checked_arguments(name: str, model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    _check_name(name)
    own = OWN_ARGUMENTS | (TORCHVISION_ARGUMENTS if is_torchvision(name) else {})
    for argument in model_args or {}:
        if argument in own:
            raise ValueError(f"model.args.{argument} is set elsewhere; use {own[argument]}.")
    try:
        return json.loads(json.dumps(dict(model_args or {})))
    except TypeError as error:
        raise ValueError(
            f"model.args must hold numbers, strings, lists and mappings only, got {model_args}."
        ) from error


def _check_name(name: str) -> None:
    if is_torchvision(name):
        short, known, examples = name.removeprefix(PREFIX), model_names(), ["alexnet", "googlenet"]
        if short in known:
            return
        library, listing = "torchvision", "torchvision.models.list_models()"
    else:
        if timm.is_model(name):
            return
        short, known, examples = name, timm.list_models(), ["vit_base_patch16_224", "resnet50"]
        library, listing = "timm", "timm.list_models()"
    close = difflib.get_close_matches(short, known, n=5) or examples
    elsewhere = ""
    if library == "timm" and name in model_names():
        elsewhere = f" torchvision has it: model=torchvision model.name={name}."
    raise ValueError(
        f"{library} has no model named {short!r}; close to it: {', '.join(close)}. {listing} lists all.{elsewhere}"
    )


def _check_without(name: str, *, patch_size: int | tuple[int, int] | None, stem: str) -> None:
    """Raise ValueError for settings that are for timm's models alone."""
    if patch_size is not None:
        raise ValueError(f"{name} has no patch size to set, got model.patch_size={patch_size}; set it to null.")
    if stem not in ("auto", "standard"):
        raise ValueError(f"model.stem={stem} is for timm's ResNets, and {name} is none; set model.stem=auto.")


def _construct(
    name: str,
    *,
    in_chans: int,
    image_size: tuple[int, int] | None,
    model_args: Mapping[str, Any],
    device: str | None,
) -> nn.Module:
    """The model without classifier; `image_size` is for torchvision's, timm's have it among their arguments."""
    try:
        if device is None:
            return _create(name, in_chans, image_size, model_args)
        with torch.device(device), torch.random.fork_rng(devices=[]):  # a trial must not move the weights that follow
            return _create(name, in_chans, image_size, model_args)
    except MISFITS as error:
        given = ", ".join(f"{key}={value}" for key, value in model_args.items()) or "no further arguments"
        library = "torchvision" if is_torchvision(name) else "timm"
        short = name.removeprefix(PREFIX)
        raise ValueError(f"{library} cannot build {short} with in_chans={in_chans} and {given}: {error}") from error


def _create(name: str, in_chans: int, image_size: tuple[int, int] | None, model_args: Mapping[str, Any]) -> nn.Module:
    if is_torchvision(name):
        args = dict(model_args)
        return create_torchvision(
            name.removeprefix(PREFIX),
            num_classes=0,
            in_chans=in_chans,
            image_size=image_size,
            drop_path_rate=args.pop("drop_path_rate", 0.0),
            args=args,
        )
    args: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in model_args.items()}
    return timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans, **args)


def _constructor_arguments(model_class: type[nn.Module]) -> set[str]:
    """Return the names that a model's constructor takes, and those of the constructors it hands its `**kwargs` to."""
    names: set[str] = set()
    for ancestor in model_class.__mro__:
        if ancestor is nn.Module or "__init__" not in vars(ancestor):
            continue
        parameters = inspect.signature(ancestor.__init__).parameters.values()
        names |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


def _choose_patch_size(
    name: str,
    probe: nn.Module,
    accepted: set[str],
    image_size: tuple[int, int],
    patch_size: int | tuple[int, int] | None,
) -> int | list[int] | None:
    height, width = image_size
    embed = getattr(probe, "patch_embed", None)
    is_plain = type(embed) is PatchEmbed  # one patch, one token: the patch must divide the image
    if patch_size is not None:
        if "patch_size" not in accepted:
            raise ValueError(f"{name} has no patch size, got model.patch_size={patch_size}; set it to null.")
        sizes = [patch_size] * 2 if isinstance(patch_size, int) else [int(size) for size in patch_size]
        candidates = [(sizes[0], sizes[1])]
    elif is_plain and "patch_size" in accepted:
        own: tuple[int, int] = embed.patch_size  # pyright: ignore[reportOptionalMemberAccess, reportAssignmentType]
        side = min(height, width)
        if side >= 128:
            candidates = [own, (16, 16)]
        else:
            limit = 8 if side >= 64 else 4
            candidates = [(min(own[0], limit), min(own[1], limit))]
    else:
        return None
    for rows, columns in candidates:
        if rows < 1 or columns < 1:
            raise ValueError(f"model.patch_size must be at least 1, got {patch_size}.")
        if not is_plain or (height % rows == 0 and width % columns == 0):
            return rows if rows == columns else [rows, columns]
    fitting = [p for p in range(2, min(height, width) // 2 + 1) if height % p == 0 and width % p == 0]
    rows, columns = candidates[0]
    near = (max(height // rows, 1) * rows, max(width // columns, 1) * columns)
    choices = f"model.patch_size to one of {', '.join(map(str, fitting))}, or " if fitting else ""
    raise ValueError(
        f"{name} cannot cut images of {height} x {width} pixels into patches of {rows} x {columns}; "
        f"set {choices}data.image_size to {near[0] if near[0] == near[1] else list(near)}."
    )


def _choose_stem(name: str, probe: nn.Module, side: int, stem: str) -> str:
    if stem not in ("auto", *STEMS):
        raise ValueError(f"model.stem must be one of auto, standard, small, got {stem!r}.")
    has_stem = isinstance(probe, ResNet)
    if stem in ("small", "padded") and not has_stem:
        raise ValueError(f"model.stem={stem} is for timm's ResNets, and {name} is none; set model.stem=auto.")
    if stem == "auto":
        return "small" if has_stem and side <= 64 else "standard"
    return stem


def _make_stem_small(model: nn.Module, *, padding: int, device: str | None) -> None:
    """Let a ResNet's first layer keep the resolution: 3x3 with stride 1, no max-pool (SimCLR, appendix B.9)."""
    if not isinstance(model, ResNet):
        raise ValueError(f"A small stem is for timm's ResNets, got {type(model).__name__}.")
    if isinstance(model.conv1, nn.Sequential):  # deep stems are 3x3 already
        if padding != 1:
            raise ValueError("A padded stem is one layer of 3 x 3, and this ResNet's has three; set model.stem=small.")
        model.conv1[0].stride = (1, 1)  # pyright: ignore[reportArgumentType]
    else:
        old = model.conv1
        model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=padding, bias=False, device=device)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    for index, info in enumerate(model.feature_info):
        info["reduction"] = int(info["reduction"]) // (2 if index == 0 else 4)


def _misfit(spec: BackboneSpec) -> str | None:
    """Return why the described model does not work on its image size, None where it does. Computes shapes only."""
    model = None
    try:
        model = backbone_from_spec(spec, device="meta").eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            features = pooled_features(model, torch.empty(2, spec.in_chans, *spec.image_size, device="meta"))
    except MISFITS as error:
        return str(error).strip().split("\n")[0] or type(error).__name__
    if not isinstance(features, Tensor) or features.ndim != 2:
        return "it does not give one vector per image"
    if features.shape[1] == 0:
        return "its features are empty"
    return None


def _check_fit(spec: BackboneSpec) -> None:
    reason = _misfit(spec)
    if reason is None:
        return
    height, width = spec.image_size
    fitting = _first_fitting(spec)
    advice = f"it fits data.image_size={fitting}" if fitting else "try model=resnet18 or model=vit_s"
    raise ValueError(f"{spec.architecture} does not fit images of {height} x {width} pixels ({reason}); {advice}.")


def _first_fitting(spec: BackboneSpec) -> int | None:
    """Return the first common square size above the one given at which the model works."""
    for side in COMMON_SIDES:
        args = {key: [side, side] if key == "img_size" else value for key, value in spec.model_args.items()}
        if side > min(spec.image_size) and not _misfit(replace(spec, image_size=(side, side), model_args=args)):
            return side
    return None
