"""The presets of conf/model, and which methods take which of them at which size of image."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl.config import CONF, locate
from ssl.methods.base import build_method
from ssl.models.backbones import BackboneSpec, build_backbone, model_name, pooled_features
from ssl.models.families import family_file
from ssl.models.torchvision_models import PREFIX, is_torchvision, model_names, takes_image_size
from ssl.plan import count_parameters

SIDES = (224, 256, 288, 320, 384)  # of the images that a method is tried with
FIRST_LINE = re.compile(r"# (?P<title>.+?): .*?(?P<paper>\((?P<source>[^()]+)\))?[^()]*")


@dataclass(frozen=True)
class Answer:
    """What a method says of a model: the side of the images at which it takes it, or why it does not."""

    side: int | None
    refusal: str = ""
    """At the first size that was tried."""
    in_place: bool = False
    """The method that stands in for it masks tokens in their places, as it cannot drop them."""

    @property
    def cell(self) -> int | str | None:
        """For a table."""
        return f"{self.side} in place" if self.in_place else self.side


@dataclass(frozen=True)
class Preset:
    """A file of conf/model: what it says of itself, and what it sets."""

    preset: str
    title: str
    paper: str | None
    """None where the model is of no paper."""
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """As `build_backbone` takes it."""
        return model_name(self.settings)


def presets() -> dict[str, Preset]:
    """Every preset that names a model, by its name."""
    found = {path.stem: _read(path) for path in sorted(Path(CONF, "model").glob("*.yaml"))}
    return {name: each for name, each in found.items() if each.settings["name"] != "???"}


def _read(path: Path) -> Preset:
    text = path.read_text()
    words = FIRST_LINE.fullmatch(text.split("\n")[0])
    title = words["title"] if words else path.stem
    return Preset(path.stem, title, words["source"] if words else None, yaml.safe_load(text))


def find(name: str) -> dict[str, Any]:
    """The settings of a preset, or of a model of timm or torchvision by name. Raises ValueError with names near it."""
    known = presets()
    if name in known:
        return known[name].settings
    if is_torchvision(name) or timm.is_model(name.split(".")[0]):
        return {"name": name}
    if name in model_names():
        return {"name": PREFIX + name}
    near = difflib.get_close_matches(name, [*known, *timm.list_models(), *model_names()], n=6, cutoff=0.5)
    nearest = f"; near it: {', '.join(dict.fromkeys(near))}" if near else ""
    raise ValueError(
        f"{name} is no preset of conf/model, nor a model of timm's or torchvision's{nearest}. "
        "`python -m ssl.models` lists the presets"
    )


def built(settings: Mapping[str, Any], side: int, *, in_chans: int = 3) -> tuple[nn.Module, BackboneSpec]:
    """The backbone on torch's meta device, for square images."""
    with torch.device("meta"):
        return build_backbone(
            model_name(settings),
            image_size=(side, side),
            in_chans=in_chans,
            patch_size=settings.get("patch_size"),
            stem=settings.get("stem", "auto"),
            model_args=settings.get("args"),
        )


def source(name: str) -> str:
    """Whose code builds the model: timm, torchvision, or ours."""
    if is_torchvision(name):
        return "torchvision"
    return "ours" if family_file(name) is not None else "timm"


@torch.no_grad()
def multiply_adds(backbone: nn.Module, image_size: tuple[int, int], in_chans: int) -> float:
    """Of convolutions and matrix products, for one image; `backbone` is on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        pooled_features(backbone.eval(), torch.empty(1, in_chans, *image_size))
    return counter.get_total_flops() / 2


def row(preset: Preset) -> dict[str, Any]:
    """A preset's line in a list of all: what it is, counted at SIDES[0] pixels, and where which method takes it."""
    backbone, spec = built(preset.settings, SIDES[0])
    counted = {
        "M parameters": round(count_parameters(backbone)[0] / 1e6, 2),
        "G multiply-adds": round(multiply_adds(backbone, spec.image_size, spec.in_chans) / 1e9, 2),
    }
    taken = accepted(preset.settings, at_first=(backbone, spec))
    return {
        "model=": preset.preset,
        "source": source(preset.name),
        "name there": preset.name.removeprefix(PREFIX),
        **counted,
        **{method: taken[method].cell for method in sorted(taken)},
        "what it is": preset.title,
        "paper": preset.paper or "",
    }


def methods() -> dict[str, dict[str, Any]]:
    """The settings of every method of conf/method, by its name."""
    found = sorted(Path(CONF, "method").glob("*.yaml"), reverse=True)  # simclr first, mae last: it changes backbones
    return {path.stem: yaml.safe_load(path.read_text())["method"] for path in found}


def accepted(
    settings: Mapping[str, Any],
    *,
    side: int = SIDES[0],
    in_chans: int = 3,
    at_first: tuple[nn.Module, BackboneSpec] | None = None,
) -> dict[str, Answer]:
    """What each method says of the model at images of `side` pixels, and if it refuses, at the others of SIDES.

    Found by building both on the meta device; `at_first` is what `built` gave for `side` and `in_chans`. Raises
    ValueError where the model itself does not fit images of `side` pixels.
    """
    first = at_first or built(settings, side, in_chans=in_chans)
    known = {side: first[0]}

    def at(other: int) -> nn.Module:
        if other not in known:
            known[other] = built(settings, other, in_chans=in_chans)[0] if _depends_on_size(first[1]) else first[0]
        return known[other]

    sides = (side, *(other for other in SIDES if other != side))
    return {name: _answer(method, sides, at, in_chans) for name, method in methods().items()}


def _answer(
    method: Mapping[str, Any], sides: Sequence[int], backbone_at: Callable[[int], nn.Module], in_chans: int
) -> Answer:
    """At the first of `sides` that is taken; the same refusal at two of them is taken for one at all."""
    refusals: list[str] = []
    for side in sides:
        try:
            with torch.device("meta"):
                built_method = build_method(
                    method, backbone=backbone_at(side), image_size=(side, side), in_chans=in_chans
                )
        except ValueError as error:
            if str(error) in refusals:
                break
            refusals.append(str(error))
        else:
            return Answer(side, "".join(refusals[:1]), in_place=type(built_method) is not locate(method["_target_"]))
    return Answer(None, refusals[0])


def _depends_on_size(spec: BackboneSpec) -> bool:
    return "img_size" in spec.model_args or spec.stem != "standard" or takes_image_size(spec.architecture)
