"""What backbones there are, and what one of them is made of.

  python -m ssl.models                                 every preset, and the methods that take it
  python -m ssl.models resnet50                        its layers: a preset, or a model of timm's or torchvision's
  python -m ssl.models torchvision/vgg16 image_size=160 num_classes=1000 in_chans=1 depth=1

Activations are counted in bytes for one image in fp32, in training: `forward` is what the layer makes, `backward` what
is kept from its forward pass for its backward pass. `sees` is the receptive field of convolutions: the pixels, padding
included, that a value of the output depends on. It is empty behind attention, of windows or of the whole image, and
behind the pooling. Squeeze-and-excitation does not count as seeing. depth=1 folds what lies deeper into one row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ssl.memory_plan import gib
from ssl.models.layer_table import Layer, folded, layer_table
from ssl.models.presets import SIDES, Answer, accepted, built, find, presets, row, source
from ssl.tables import Table, shown

HELP = ("-h", "--help")
OPTIONS = {"image_size": SIDES[0], "in_chans": 3, "num_classes": 0, "depth": 0}
WIDTHS = {"model=": 19, "source": 11, "name there": 28, "what it is": 52}
COLUMNS = ("layer", "kind", "output", "parameters", "multiply-adds", "forward", "backward", "sees")


def main(words: Sequence[str]) -> None:
    """The command line. Raises ValueError for what it does not take."""
    if not words:
        print_presets()
        return
    if any(word in HELP for word in words):
        print(str(__doc__).rstrip())
        return
    print_layers(words[0], **_options(words[1:]))


def print_presets() -> None:
    """Every preset, each as soon as it is known."""
    widths: dict[str, int] = {}
    for preset in presets().values():
        line = {name: shown(name, value) or "-" for name, value in row(preset).items()}
        if not widths:
            widths = {name: max(len(name), WIDTHS.get(name, 0)) for name in line}
            print("  ".join(name.ljust(width) for name, width in widths.items()).rstrip())
        print("  ".join(line[name].ljust(width) for name, width in widths.items()).rstrip(), flush=True)
    sides = ", ".join(map(str, SIDES))
    print(
        f"\nCounted at {SIDES[0]} pixels. Below a method's name: the smallest of {sides} pixels at which it takes the\n"
        "model, in place where SimMIM stands in for it; - where it takes it at none of them.\n"
        "The rest of each family: model=timm model.name=NAME, or model=torchvision model.name=NAME.\n"
        "next: python -m ssl.models resnet50"
    )


def print_layers(name: str, *, image_size: int, in_chans: int, num_classes: int, depth: int) -> None:
    """The layers of one model, their sums, and what the methods say of it."""
    settings = find(name)
    backbone, spec = built(settings, image_size, in_chans=in_chans)
    if num_classes:
        with torch.device("meta"):
            backbone.reset_classifier(num_classes)  # pyright: ignore[reportCallIssue]
    layers = layer_table(backbone, image_size=spec.image_size, in_chans=in_chans, logits=num_classes > 0)
    rows = [_row(layer) for layer in folded(layers, depth)]
    total = Layer("together", "")
    for share in ("parameters", "multiply_adds", "made", "kept"):
        setattr(total, share, sum(getattr(layer, share) for layer in layers))
    print(f"{name}: {spec.architecture}, {source(spec.architecture)}; image {in_chans} x {image_size} x {image_size}")
    print(Table(COLUMNS, [*rows, [*_row(total)[:-1], ""]]).text())
    if not num_classes:
        print("A backbone has no last layer; num_classes=1000 puts one on, as papers count it.")
    answers = accepted(settings, side=image_size, in_chans=in_chans, at_first=None if num_classes else (backbone, spec))
    for method, answer in sorted(answers.items()):
        print(f"method={method}: {_told(answer, image_size)}")


def _told(answer: Answer, image_size: int) -> str:
    if answer.side is None:
        return f"no: {answer.refusal}"
    taken = f"yes, at {answer.side} pixels{', with tokens masked in place, as SimMIM' if answer.in_place else ''}"
    return taken if answer.side == image_size else f"{taken}; at {image_size} no: {answer.refusal}"


def _row(layer: Layer) -> list[str | int]:
    sees = "" if layer.field is None else " x ".join(map(str, layer.field.size))
    shape = " x ".join(map(str, layer.shape))
    counts = [layer.parameters, round(layer.multiply_adds)]
    return [layer.name or "(model)", layer.kind, shape, *counts, gib(layer.made), gib(layer.kept), sees]


def _options(words: Sequence[str]) -> dict[str, int]:
    given = dict(OPTIONS)
    for word in words:
        key, _, value = word.partition("=")
        if key not in OPTIONS or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{word} is not taken; it may be {', '.join(f'{key}=NUMBER' for key in OPTIONS)}, from 1")
        given[key] = int(value)
    return given


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
