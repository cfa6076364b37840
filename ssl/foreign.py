"""Backbones that other projects have trained, from one file of weights, told apart by their keys and loaded strictly.

    timm, torchvision       timm's own keys; torchvision's ResNets have the same
    facebookresearch/mae    timm's keys under `model`, as published or whole: decoder_*, mask_token, optimizer
    mmselfsup               `state_dict`, `backbone.*`; ResNets as torchvision's, vision transformers layers.0.ln1...
    solo-learn              `state_dict`, `backbone.*` beside classifier, projector and momentum_*

A file says what its tensors are called and what shape they have, so patch size, image size, channels and stem are read
off the shapes. Which model it is has to be given.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ssl.models.backbones import BackboneSpec, backbone_from_spec, describe_backbone, model_name
from ssl.models.described import no_larger_than
from ssl.models.torchvision_models import SIDE, is_torchvision
from ssl.tensor_files import check_fit, few, load_strictly, load_tensors

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors")
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # the average first, where both are there
WRITTEN_BY_ALL = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile

# Read as plain containers; the code that these names stand for is neither imported nor run.
HARMLESS = [
    argparse.Namespace,  # `args` of facebookresearch/mae
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),  # `hyper_parameters` of solo-learn
    (OrderedDict, "lightning.fabric.utilities.data.AttributeDict"),
]

OUTSIDE = {  # tensors that are known not to be the backbone's, where the model has none of that name
    "decoder": ("decoder", "mask_token"),
    "classifier": ("head.", "head_dist.", "fc.", "classifier.", "head_drop."),
    "projector": ("projector.", "predictor.", "neck.", "prototypes.", "queue"),
    "copy": ("momentum_", "target_", "ema_", "encoder_q.", "encoder_k.", "online_net."),
    "preprocessing": ("data_preprocessor.",),
}

MM_VISION_TRANSFORMER = (  # open-mmlab's names, and timm's
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"layers\.(\d+)\.ln1\.", r"blocks.\1.norm1."),
    (r"layers\.(\d+)\.ln2\.", r"blocks.\1.norm2."),
    (r"layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"ln1\.", "norm."),  # after the last block
    (r"ln2\.", "fc_norm."),  # after the mean of the patches
)


@dataclass(frozen=True)
class Foreign:
    """A backbone of another project in eval mode, and what was made out of its file."""

    model: nn.Module
    spec: BackboneSpec
    mean: list[float]
    std: list[float]
    layout: str
    weights: str
    notes: list[str]


def read_foreign(path: Path, *, model: Mapping[str, Any] | None, image_size: tuple[int, int] | None = None) -> Foreign:
    """The backbone whose weights the file `path` holds, built as `model` says (name, patch_size, stem, args).

    `image_size` is for models whose weights do not name one: convolutional ones. Raises ValueError where the file holds
    more than tensors and plain values, and where tensors are missing, left over or of another shape.
    """
    if model is None:
        raise ValueError(
            f"ckpt={path} holds weights and not the name of their model: give model=, such as model=vit_b or "
            "model=resnet50, or model=timm model.name=<timm's name>"
        )
    if model.get("drop_path"):
        raise ValueError(f"model.drop_path={model['drop_path']} has no effect on trained weights; leave it out")
    if model.get("init"):
        raise ValueError(f"model.init={model['init']} has no effect on trained weights; leave it out")
    content = read_file(path)
    weights, named = _unwrap(content, path)
    layout, tensors, outside = timm_names(named, content, weights=weights)
    spec, notes = _describe(tensors, model, layout=layout, image_size=image_size, path=path)
    backbone, notes_of_load = _load(spec, tensors, outside, model_name=str(model["name"]), path=path)
    mean, std = imagenet_statistics(spec.in_chans)
    notes = [
        f"the weights have {layout}'s keys{'' if weights == 'file' else f', under {weights}'}",
        *notes,
        *notes_of_load,
        "the file names no mean and standard deviation of its images; ImageNet's are used",
    ]
    return Foreign(backbone, spec, mean, std, layout, weights, notes)


def read_file(path: Path) -> dict[str, Any]:
    """What a file of weights holds. No code in it is run: ValueError where it needs some, or cannot be read."""
    if path.suffix == ".safetensors":
        return dict(load_tensors(path))
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{path} holds more than tensors and plain values{f' ({found.group(1)})' if found else ''}, and reading "
            "that would run code. Where you trust it, take the tensors out, with the package that wrote it installed:\n"
            f"  python -c \"import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
            "torch.save(c.get('state_dict', c.get('model', c)), 'weights.pth')\"\n"
            "and give ckpt=weights.pth"
        ) from None
    except (OSError, RuntimeError, EOFError, BadZipFile, LookupError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it is truncated or not a file that torch.save wrote") from (
            error
        )
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a mapping of names to tensors was expected")
    return content


def timm_names(
    named: Mapping[str, Tensor], content: Mapping[str, Any], *, weights: str
) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """The layout's name, the backbone's tensors under timm's names, and those that stand beside the backbone."""
    prefix = next((p for p in ("backbone.", "encoder.") if any(name.startswith(p) for name in named)), "")
    inside = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    outside = {name: tensor for name, tensor in named.items() if not name.startswith(prefix)}
    is_mm_transformer = any(re.match(r"layers\.\d+\.ln1\.", name) for name in inside)
    if is_mm_transformer:
        inside = {_renamed(name): tensor for name, tensor in inside.items()}
    heads = {name.split(".")[0] for name in outside}
    if is_mm_transformer or (prefix and (heads & {"neck", "head", "data_preprocessor"} or "meta" in content)):
        return "mmselfsup", inside, outside
    lightning = "pytorch-lightning_version" in content
    if prefix and (lightning or prefix == "encoder." or heads & {"classifier", "projector", "momentum_backbone"}):
        return "solo-learn", inside, outside
    if "decoder_pos_embed" in inside or (weights == "model" and "blocks.0.norm1.weight" in inside):
        return "facebookresearch/mae", inside, outside
    return "timm" if not prefix else "timm (backbone.*)", inside, outside


def imagenet_statistics(channels: int) -> tuple[list[float], list[float]]:
    """ImageNet's mean and standard deviation per channel; for other than three, the mean over its three."""
    mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    return (mean, std) if channels == 3 else ([sum(mean) / 3] * channels, [sum(std) / 3] * channels)


def _renamed(name: str) -> str:
    for pattern, replacement in MM_VISION_TRANSFORMER:
        if re.match(pattern, name):
            return re.sub(rf"^{pattern}", replacement, name)
    return name


def _unwrap(content: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Tensor]]:
    """The name under which the tensors stand (`file` where they stand at the top), and the tensors."""
    weights = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), "file")
    tensors = content if weights == "file" else content[weights]
    named = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    others = sorted(str(name) for name, value in tensors.items() if not isinstance(value, Tensor))
    if not named or others:
        raise ValueError(
            f"{path} holds no state dict: looked at its top and under {', '.join(WRAPPERS)} for a mapping of names to "
            f"tensors; found {len(named)} tensors and, beside them, {few(others)}"
        )
    for prefix in WRITTEN_BY_ALL:
        if all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return weights, named


def _describe(
    tensors: Mapping[str, Tensor],
    model: Mapping[str, Any],
    *,
    layout: str,
    image_size: tuple[int, int] | None,
    path: Path,
) -> tuple[BackboneSpec, list[str]]:
    """What the backbone is built from: what was given, and what the shapes of the tensors say."""
    name, args = model_name(model), dict(model.get("args") or {})
    defaults = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None  # build_backbone refuses
    patch = _patch_size(tensors)
    given_patch = model.get("patch_size")
    if patch and given_patch and (given_patch, given_patch) != patch:
        raise ValueError(
            f"model.patch_size={given_patch}, but the patches of {path} are {patch[0]} x {patch[1]}; leave it out"
        )
    if "fc_norm.weight" in tensors and "norm.weight" not in tensors:
        args.setdefault("global_pool", "avg")  # fine-tuned on the mean of the patches, not on the class token
    stem, notes = _stem(tensors, str(model.get("stem") or "auto"), layout=layout)
    size = _grid_size(tensors, patch, path)
    if size is None:
        default = tuple(defaults.input_size[1:]) if defaults and stem == "standard" else (32, 32)
        if is_torchvision(name):
            default = (SIDE, SIDE)
        size = image_size or (int(default[0]), int(default[1]))
        if image_size is None:
            notes.append(
                f"the weights name no image size; {size[0]} x {size[1]} pixels is used, data.image_size sets another"
            )
    first = defaults.first_conv if defaults else None
    first = first[0] if isinstance(first, (tuple, list)) else first
    weight = tensors.get(f"{first}.weight")
    channels = int(weight.shape[1]) if weight is not None and weight.ndim == 4 else 3
    with no_larger_than(tensors, trials=20):  # it tries other image sizes where this one does not fit
        spec = describe_backbone(
            name, image_size=size, in_chans=channels, patch_size=patch or given_patch, stem=stem, model_args=args
        )
    return spec, notes


def _patch_size(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    weight = tensors.get("patch_embed.proj.weight")  # (D, C, P, P)
    return None if weight is None or weight.ndim != 4 else (int(weight.shape[2]), int(weight.shape[3]))


def _grid_size(tensors: Mapping[str, Tensor], patch: tuple[int, int] | None, path: Path) -> tuple[int, int] | None:
    """The image size (height, width) that learnt position embeddings stand for; None where there are none."""
    embedding = tensors.get("pos_embed")
    if embedding is None or embedding.ndim != 3 or patch is None:
        return None
    prefix = sum(int(tensors[key].shape[1]) for key in ("cls_token", "reg_token", "dist_token") if key in tensors)
    for patches in (embedding.shape[1] - prefix, embedding.shape[1]):
        side = round(patches**0.5)
        if side * side == patches:
            return side * patch[0], side * patch[1]
    raise ValueError(
        f"{path} has {embedding.shape[1]} position embeddings, which with {prefix} tokens in front are no square of "
        "patches; only backbones of square images are read"
    )


def _stem(tensors: Mapping[str, Tensor], given: str, *, layout: str) -> tuple[str, list[str]]:
    """Which stem a ResNet's first layer belongs to, and a note where that is not the standard one."""
    weight = tensors.get("conv1.weight")
    if weight is None or "layer1.0.conv1.weight" not in tensors or weight.shape[-1] != 3:
        return "standard" if given == "auto" else given, []
    if given == "standard":
        raise ValueError(f"model.stem=standard, but conv1 is {tuple(weight.shape)}: a small stem; leave model.stem out")
    stem = "padded" if layout == "solo-learn" and given == "auto" else "small"
    padding = 2 if stem == "padded" else 1
    return stem, [f"conv1 is 3x3: built as a small stem, stride 1, padding {padding}, no max-pool"]


def _load(
    spec: BackboneSpec,
    tensors: Mapping[str, Tensor],
    outside: Mapping[str, Tensor],
    *,
    model_name: str,
    path: Path,
) -> tuple[nn.Module, list[str]]:
    """The described model with the weights, in eval mode, and notes on what was left out or filled in."""
    with no_larger_than(tensors):
        own = backbone_from_spec(spec, device="meta").state_dict()
    kinds = {name: _kind(name) for name in [*outside, *tensors] if name in outside or name not in own}
    kept = {name: tensor for name, tensor in tensors.items() if kinds.get(name) is None}
    kept |= {f"{name} (beside the backbone)": outside[name] for name in outside if kinds[name] is None}
    dropped, notes = Counter(kind for kind in kinds.values() if kind is not None), []
    if dropped:
        counts = ", ".join(f"{kind} {count}" for kind, count in dropped.items())
        notes.append(f"{dropped.total()} tensors that are not the backbone's were left out: {counts}")
    counters = [name for name in own if name.endswith(".num_batches_tracked") and name not in kept]
    if counters:  # older than torch 0.4.1, which counts them; evaluation does not read them
        kept |= {name: torch.zeros_like(own[name], device="cpu") for name in counters}
        notes.append(f"{len(counters)} counters of BatchNorm that the file lacks start at 0")
    advice = f"is it {model_name}? model= must name what the weights were made with, model.args.* its arguments"
    check_fit(own, kept, path, advice=advice)  # before memory is taken for it
    backbone = backbone_from_spec(spec)
    load_strictly(backbone, kept, path, advice=advice)
    return backbone.eval(), notes


def _kind(name: str) -> str | None:
    return next((kind for kind, prefixes in OUTSIDE.items() if name.startswith(prefixes)), None)
