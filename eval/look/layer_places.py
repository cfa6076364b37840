"""Layers whose values have places on the image: their names, their units, and what of the image each place sees."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from eval.look.result import DoesNotApply
from ssl.models.layer_table import Layer, layer_table
from ssl.models.receptive_field import Field

ACTIVATIONS = ("ReLU", "ReLU6", "GELU", "GELUTanh", "QuickGELU", "SiLU", "Hardswish", "Mish", "LeakyReLU", "ELU")
PASS_ON = ("Identity", "Dropout", "Dropout2d", "DropPath", "DropPath2d", "StochasticDepth")
"""Modules that hand on what they are given."""
LEAST_SIDE = 4
"""Places on the shorter side of a map that is chosen without being asked for."""


@dataclass(frozen=True)
class Places:
    """A module whose output is a map (B, C, h, w) or (B, h, w, C), or tokens (B, prefix+h*w, C)."""

    layer: str
    kind: str
    """The module's class."""
    num_units: int
    grid_size: tuple[int, int]
    num_prefix: int
    """Tokens in front that stand for no patch."""
    axis: int
    """Of the units in the output: 1, or -1."""
    is_tokens: bool
    field: Field | None
    """None where attention lets every place see the whole image."""

    def values(self, output: Tensor) -> Tensor:
        """The module's output as (B, C, h*w), places row by row."""
        units_first = output.movedim(self.axis, 1)  # (B, C, h, w) or (B, C, prefix+h*w)
        return units_first.flatten(2)[:, :, self.num_prefix :]

    def box(self, place: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The pixels (top, left, height, width) that a place sees, which may reach beyond the image.

        Behind attention the pixels that the place stands for, as every place sees all.
        """
        row, column = divmod(place, self.grid_size[1])
        if self.field is not None:
            return self.field.box(row, column)
        return self.cell(place, image_size)

    def cell(self, place: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The pixels (top, left, height, width) that a place stands for, where its grid is laid on the image."""
        row, column = divmod(place, self.grid_size[1])
        top, bottom = (row * image_size[0] // self.grid_size[0], (row + 1) * image_size[0] // self.grid_size[0])
        left, right = (column * image_size[1] // self.grid_size[1], (column + 1) * image_size[1] // self.grid_size[1])
        return top, left, max(bottom - top, 1), max(right - left, 1)


def token_grid(model: nn.Module, image_size: tuple[int, int]) -> tuple[tuple[int, int], int] | None:
    """Rows and columns of a transformer's patches, and the tokens in front of them; None for a model without tokens."""
    embed = getattr(model, "patch_embed", None)
    if hasattr(embed, "dynamic_feat_size"):  # timm's
        rows, columns = embed.dynamic_feat_size(image_size)  # pyright: ignore
        return (int(rows), int(columns)), int(getattr(model, "num_prefix_tokens", 0))
    cut = getattr(model, "conv_proj", None)  # torchvision's
    if isinstance(cut, nn.Conv2d) and hasattr(model, "class_token"):
        return (image_size[0] // int(cut.stride[0]), image_size[1] // int(cut.stride[1])), 1
    return None


def find_places(model: nn.Module, *, image_size: tuple[int, int], in_chans: int) -> dict[str, Places]:
    """The layers whose values have places on images of (height, width) pixels, by name, in the order in which they run.

    Computes shapes only. Layers inside an attention layer, whose values belong to heads, are left out, and so are
    gates that look at the whole image.
    """
    tokens = token_grid(model, image_size)
    attention = [f"{name}." for name, part in model.named_modules() if "Attention" in type(part).__name__]
    nhwc = getattr(model, "output_fmt", None) == "NHWC"
    found: dict[str, Places] = {}
    for row in layer_table(model, image_size=image_size, in_chans=in_chans):
        if not row.name or row.kind in PASS_ON or row.name.startswith(tuple(attention)):
            continue
        places = _as_map(row, image_size, nhwc=nhwc) if len(row.shape) == 3 else _as_tokens(row, tokens)
        if places is not None:
            found[row.name] = places
    return found


def large_enough(grid_sizes: Sequence[tuple[int, int]]) -> list[int]:
    """The numbers of the maps with at least 4 x 4 places, which small images lack at a network's end.

    Where none has as many those of several places, where none has these all.
    """
    for least in (LEAST_SIDE, 2):
        found = [number for number, size in enumerate(grid_sizes) if min(size) >= least]
        if found:
            return found
    return list(range(len(grid_sizes)))


def choose_layer(
    places: Mapping[str, Places], layer: str | None, *, model: nn.Module, key: str, large: bool = False
) -> Places:
    """The layer of that name; None takes the last map, of a vision transformer the hidden units of the last block.

    With `large` None takes the last map that is `large_enough`.

    Raises ValueError, naming the layers there are, for another, and DoesNotApply where there is none.
    """
    if not places:
        raise DoesNotApply(
            f"{type(model).__name__} has no layer whose values have places on the image; take another model"
        )
    if layer is None:
        return _last(places, model, large=large)
    if layer in places:
        return places[layer]
    outer = [name for name in places if name.count(".") <= 1]
    close = [name for name in difflib.get_close_matches(layer, places, n=5, cutoff=0.4) if name not in outer]
    inner = f"; inside them, close to what was given: {', '.join(close)}" if close else ""
    exists = layer in dict(model.named_modules())
    reason = "has no values with places on the image" if exists else f"is no layer of {type(model).__name__}"
    raise ValueError(f"{key}={layer} {reason}; allowed: {', '.join(outer)}{inner}")


def _last(places: Mapping[str, Places], model: nn.Module, *, large: bool) -> Places:
    every = list(places.values())
    if every[-1].is_tokens:
        hidden = [each for each in every if each.is_tokens and each.field is None and each.kind in ACTIVATIONS]
        return (hidden or every)[-1]
    stages = [str(stage["module"]) for stage in getattr(model, "feature_info", [])]
    maps = [places[name] for name in stages if name in places]
    if not maps or maps[-1].layer != stages[-1]:
        maps = [each for each in every if each.grid_size != (1, 1)] or every
    return maps[large_enough([each.grid_size for each in maps])[-1] if large else -1]


def _as_map(row: Layer, image_size: tuple[int, int], *, nhwc: bool) -> Places | None:
    """A map whose proportions are the image's, channels first or last."""
    for axis in (-1, 1) if nhwc else (1, -1):
        height, width = row.shape[1:] if axis == 1 else row.shape[:2]
        is_map = 0 < height <= image_size[0] and 0 < width <= image_size[1]
        # A layer without padding takes a little off both sides.
        if is_map and math.isclose(height / width, image_size[0] / image_size[1], rel_tol=0.25):
            if (height, width) == (1, 1) and row.field is None:
                return None
            units = row.shape[0 if axis == 1 else -1]
            return Places(row.name, row.kind, units, (height, width), 0, axis, False, row.field)
    return None


def _as_tokens(row: Layer, tokens: tuple[tuple[int, int], int] | None) -> Places | None:
    if tokens is None or len(row.shape) != 2:
        return None
    grid_size, prefix = tokens
    count, units = row.shape
    if count not in (math.prod(grid_size), math.prod(grid_size) + prefix):
        return None
    return Places(row.name, row.kind, units, grid_size, count - math.prod(grid_size), -1, True, row.field)
