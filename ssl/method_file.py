"""The whole pretraining method of a checkpoint, with the heads that its backbone alone does not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssl.checkpoint_card import read_config, read_state, verify
from ssl.methods.base import Method, build_method
from ssl.models.backbones import BackboneSpec, backbone_from_spec
from ssl.models.initialize import initialize
from ssl.tensor_files import load_strictly, load_tensors

TRUSTED = ("ssl.methods.",)


def load_method(folder: Path, *, trust: Sequence[str] = (), average: bool = True) -> Method:
    """The method of a checkpoint's folder, in eval mode on the CPU, with the averaged weights where `average` and the
    run kept some, as evaluations have them.

    Raises ValueError for a damaged checkpoint, one that is not of a pretraining run, and a method of code that is not
    trusted: that of this package and of the packages in `trust`.
    """
    state = read_state(folder)
    verify(folder, state)
    method = described_method(folder, state, read_config(folder), trust=trust)
    if average and "ema.safetensors" in state["sha256"]:
        tensors = load_tensors(folder / "ema.safetensors")
    else:
        backbone = load_tensors(folder / "model.safetensors")
        tensors = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
        tensors |= load_tensors(folder / "method.safetensors")
    load_strictly(method, tensors, folder)
    return method.eval()


def described_method(
    folder: Path, state: Mapping[str, Any], config: Mapping[str, Any], *, trust: Sequence[str] = ()
) -> Method:
    """The method that a checkpoint's card and config describe, with fresh weights."""
    if not isinstance(config.get("method"), dict):
        raise ValueError(f"{folder} is not of a pretraining run: its run.yaml names no method")
    return _build(BackboneSpec.from_dict(state["backbone"]), config, trust)


def untrained_method(spec: BackboneSpec, config: Mapping[str, Any], *, trust: Sequence[str] = ()) -> Method:
    """The method of `config` with the weights that a run of its seed starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(config.get("seed") or 0))
        return _build(spec, config, trust).eval()


def _build(spec: BackboneSpec, config: Mapping[str, Any], trust: Sequence[str]) -> Method:
    settings = config.get("model") or {}
    backbone = backbone_from_spec(spec, drop_path=float(settings.get("drop_path") or 0.0))
    initialize(backbone, settings.get("init"))
    return build_method(
        config["method"],
        within=_trusted(config["method"], trust),
        backbone=backbone,
        image_size=spec.image_size,
        in_chans=spec.in_chans,
    )


def _trusted(node: Mapping[str, Any], trust: Sequence[str]) -> str:
    """The prefix of code that the method's config may name. Raises ValueError, saying how to trust one's own."""
    target = str(node.get("_target_"))
    prefixes = [*TRUSTED, *(f"{package.rstrip('.')}." for package in trust)]
    for prefix in prefixes:
        if target.startswith(prefix):
            return prefix
    raise ValueError(
        f"the run's method is {target}, and a config that was read from a file may only name parts of "
        f"{', '.join(prefixes)}; if that is your own code, add trust=[{target.split('.')[0]}]"
    )
