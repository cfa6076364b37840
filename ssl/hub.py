"""Backbones of timm's hub: `timm:<name>`, from this machine's cache or over the network."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import constants
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssl.foreign import Foreign, imagenet_statistics
from ssl.models.backbones import MISFITS, build_backbone
from ssl.tensor_files import load_strictly

PREFIX = "timm:"
SECONDS = 10.0  # after which a hub that does not answer is taken for absent; its own client tries for most of a minute


def read_hub(ckpt: str) -> Foreign:
    """The backbone that `timm:<name>` names, with its pretrained weights, its classifier left out.

    Raises ValueError where timm has no such weights, or where they are neither in the cache nor within reach.
    """
    name = ckpt.removeprefix(PREFIX)
    settings = _settings(name)
    cached = _cached(settings)
    if cached is None:
        _check_reachable(ckpt, name, settings)
    overlay = {"file": str(cached), "custom_load": False} if cached else None
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except (OSError, *MISFITS) as error:
        raise ValueError(
            f"ckpt={ckpt}: the weights could not be had from {settings.hf_hub_id or settings.url}: {error}"
        ) from error
    height, width = settings.input_size[1:]
    backbone, spec = build_backbone(
        name,
        image_size=(height, width),
        in_chans=settings.input_size[0],
        patch_size=_patch_size(model),
        stem="standard",
    )
    own, tensors = backbone.state_dict(), model.state_dict()
    classifier = _classifier(settings)
    kept = {key: tensor for key, tensor in tensors.items() if key in own or not key.startswith(classifier)}
    load_strictly(backbone, kept, ckpt, advice="timm's model with a classifier is not this one without; take another")
    notes = [f"the weights are timm's {settings.architecture}.{settings.tag}, licence {settings.license or 'not said'}"]
    if len(kept) < len(tensors):
        notes.append(f"{len(tensors) - len(kept)} tensors that are not the backbone's were left out: classifier")
    if spec.in_chans != len(settings.mean):
        mean, std = imagenet_statistics(spec.in_chans)
    else:
        mean, std = list(settings.mean), list(settings.std)
    return Foreign(backbone.eval(), spec, mean, std, "timm", "hub", notes)


def _settings(name: str) -> Any:
    """timm's description of the weights `name`, tag included."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        build_backbone(architecture, image_size=(224, 224))  # raises, with the names that are close
    tags = [other.partition(".")[2] for other in timm.list_pretrained(f"{architecture}.*")]
    settings = timm.get_pretrained_cfg(name) if tag in ("", *tags) else None
    if settings is None or not settings.has_weights:
        known = f"it has {', '.join(f'{architecture}.{t}' for t in tags)}" if tags else "it has none of that model"
        raise ValueError(f"timm has no pretrained weights {name!r}: {known}; timm.list_pretrained() lists all")
    return settings


def _cached(settings: Any) -> Path | None:
    """Where an earlier download of the weights lies; None where there is none."""
    if not settings.hf_hub_id:
        path = Path(torch.hub.get_dir()) / "checkpoints" / settings.url.rpartition("/")[2]
        return path if path.is_file() else None
    repository, _, revision = settings.hf_hub_id.partition("@")
    for file in (settings.hf_hub_filename or "model.safetensors", "pytorch_model.bin"):
        path = huggingface_hub.try_to_load_from_cache(
            repository, file, revision=revision or None, cache_dir=constants.HF_HUB_CACHE
        )
        if isinstance(path, str):
            return Path(path)
    return None


def _check_reachable(ckpt: str, name: str, settings: Any) -> None:
    """Raise ValueError, within seconds, where what serves the weights cannot be reached."""
    if settings.hf_hub_id:
        place, cache = constants.ENDPOINT, Path(constants.HF_HUB_CACHE)
    else:  # the few that timm has not moved to the hub
        place, cache = settings.url, Path(torch.hub.get_dir()) / "checkpoints"
    offline = bool(settings.hf_hub_id) and constants.HF_HUB_OFFLINE
    reason = "HF_HUB_OFFLINE is set" if offline else unreachable(place)
    if reason:
        raise ValueError(
            f"ckpt={ckpt} needs {place}, and the weights are not in the cache {cache}: {reason}. Where there is a "
            f"network, run\n  python -c \"import timm; timm.create_model('{name}', pretrained=True)\"\n"
            f"and copy that folder here, or give the file of the weights: ckpt=PATH model=timm model.name={name}"
        )


def unreachable(endpoint: str) -> str | None:
    """Why an address does not answer within seconds; None where it does."""
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError:  # it answered
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    if not isinstance(model, VisionTransformer):
        return None
    rows, columns = model.patch_embed.patch_size  # pyright: ignore
    return int(rows), int(columns)


def _classifier(settings: Any) -> tuple[str, ...]:
    """How names begin that are the classifier's, unless the model without one has them too (a norm before it)."""
    names = settings.classifier or ()
    return tuple(f"{name.split('.')[0]}." for name in ((names,) if isinstance(names, str) else names))
