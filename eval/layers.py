"""Which vectors of a backbone are judged: of one layer or several, pooled in one way or another, from a single pass."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from ssl.models.backbones import is_token_model, pooled_features
from ssl.sharding import has_pieces

GRID_DIM = 9216
TOKEN_POOLINGS = ("model", "token", "patches", "token_patches")
MAP_POOLINGS = ("model", "grid")
POOLINGS = ("model", "token", "patches", "token_patches", "grid")

ExtractSets = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class FeatureSet:
    """One vector per image.

    `layer`: `last`; a number as in timm's `forward_intermediates` (a vision transformer's block, a convnet's stage
    with 0 the stem; negative from the end); or `last_4`, a vision transformer's last four blocks one behind another.

    `pooling` of a vision transformer: `model`, what timm's classifier would read; `token`, the class token; `patches`,
    the mean of the patch tokens; `token_patches`, class tokens and behind them the last block's mean of the patches, as
    DINOv2's linear evaluation concatenates them. Blocks pass the final norm. Of a convnet: `model`, of `last` what
    timm's classifier would read, of a stage its average; `grid`, the stage averaged over the cells of a grid so fine
    that channels times cells is about `grid_dim` (Goyal et al. 2019, arXiv:1905.01235, section 3).
    """

    layer: str = "last"
    pooling: str = "model"
    grid_dim: int = GRID_DIM

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `FeatureSet(**values)` reads them."""
        values = asdict(self)
        return values if self.pooling == "grid" else {key: values[key] for key in ("layer", "pooling")}

    def __str__(self) -> str:
        return f"layer {self.layer}, pooling {self.pooling}"


def parse_sets(layers: Any, poolings: Any, *, grid_dim: int = GRID_DIM) -> list[FeatureSet]:
    """Each layer with each pooling, from one value or a list of each. ValueError for what no backbone has."""
    chosen, pools = as_list(layers), as_list(poolings)
    for layer in chosen:
        if not re.fullmatch(r"last|all|last_[1-9]\d*|-?\d+", layer):
            raise ValueError(f"layers={layer} is not known; allowed: last, all, last_4 (the last four), or a number")
    for pooling in pools:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if not chosen or not pools:
        raise ValueError(f"layers and pooling must name one value or more; got {chosen} and {pools}")
    if grid_dim < 1:
        raise ValueError(f"grid_dim must be 1 or more dimensions, got {grid_dim}")
    if grid_dim != GRID_DIM and "grid" not in pools:
        raise ValueError(f"grid_dim={grid_dim} has no effect without pooling=[grid]; leave it out")
    pairs = itertools.product(chosen, pools)
    return [FeatureSet(layer, pooling, grid_dim if pooling == "grid" else GRID_DIM) for layer, pooling in pairs]


def as_list(value: Any) -> list[str]:
    """The texts of one value or of a list."""
    return [str(value)] if isinstance(value, str | int) else [str(each) for each in value]


def resolve_sets(model: nn.Module, sets: Sequence[FeatureSet]) -> list[FeatureSet]:
    """`sets` as this model has them: `all` written out, numbers counted from the front, each once.

    Raises ValueError for layers and poolings that the model does not have.
    """
    tokens, depth = is_token_model(model), num_layers(model)
    name, kind = type(model).__name__, "blocks" if tokens else "stages"
    resolved: dict[tuple[Any, ...], FeatureSet] = {}
    for each in sets:
        _check_pooling(model, each)
        for layer in map(str, range(depth)) if each.layer == "all" else [each.layer]:
            if layer.startswith("last_") and (not tokens or int(layer[5:]) > depth):
                raise ValueError(f"layers={layer} needs a vision transformer of that many blocks; {name} has {depth}")
            if layer[:4] != "last":
                if not -depth <= int(layer) < depth:
                    raise ValueError(f"layers={layer}: {name} has {depth} {kind}, 0..{depth - 1} or from the end -1")
                layer = str(int(layer) % depth)
            one = FeatureSet(layer, each.pooling, each.grid_dim)
            # A transformer's `last` is its last block; a convnet may have layers behind its last stage.
            place = _places(layer, depth) if tokens else [_stage(one, depth) if one.pooling == "grid" else layer]
            resolved.setdefault((one.pooling, *place), one)
    return list(resolved.values())


def num_layers(model: nn.Module) -> int:
    """A vision transformer's blocks, a convnet's stages with its stem; 0 where timm cannot take the model apart."""
    if is_token_model(model):
        return len(cast(VisionTransformer, model).blocks)
    return len(cast(Any, model).feature_info) if hasattr(model, "forward_intermediates") else 0


def make_extract(
    model: nn.Module, sets: Sequence[FeatureSet], *, device: torch.device, dtype: torch.dtype
) -> ExtractSets:
    """The function from normalised images (B, C, H, W) to a vector per image of each set, (B, D_i) float32.

    The model is put in eval mode on `device`, where one that is cut over ranks already is, and runs once for all sets.
    `sets` are those that `resolve_sets` gave.
    """
    model.eval()
    tokens = is_token_model(model)
    if not has_pieces(model):  # else it is the one that trains
        model.to(device)
        if not tokens:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    as_classifier = all(each == FeatureSet() for each in sets)

    def extract(image: Tensor) -> list[Tensor]:
        if not tokens:
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if as_classifier:
                return [pooled_features(model, image).float() for _ in sets]  # (B, D)
            read = _read_blocks if tokens else _read_stages
            return [features.float() for features in read(cast(Any, model), image, sets)]  # (B, D_i) each

    return extract


def _read_blocks(model: VisionTransformer, image: Tensor, sets: Sequence[FeatureSet]) -> list[Tensor]:
    """Every set of a plain vision transformer, (B, D_i) each."""
    depth = len(model.blocks)
    wanted = sorted({place for each in sets for place in _places(each.layer, depth)})
    found = model.forward_intermediates(
        image, indices=wanted, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    prefix = model.num_prefix_tokens
    tokens = {  # (B, prefix+N, D) each
        place: torch.cat([each[1], each[0]], dim=1) if prefix else each for place, each in zip(wanted, cast(Any, found))
    }

    def pool(layer: str, pooling: str) -> Tensor:
        chosen = [tokens[place] for place in _places(layer, depth)]
        if pooling == "model":
            parts = [cast(Tensor, model.forward_head(x, pre_logits=True)) for x in chosen]
        elif pooling == "patches":
            parts = [x[:, prefix:].mean(1) for x in chosen]
        else:
            parts = [x[:, 0] for x in chosen]
        if pooling == "token_patches":
            parts.append(chosen[-1][:, prefix:].mean(1))
        return torch.cat(parts, dim=1)

    return [pool(each.layer, each.pooling) for each in sets]


def _read_stages(model: Any, image: Tensor, sets: Sequence[FeatureSet]) -> list[Tensor]:
    """Every set of a model that gives feature maps, (B, D_i) each."""
    depth = num_layers(model)
    wanted = sorted({_stage(each, depth) for each in sets})
    final, found = model.forward_intermediates(image, indices=wanted)
    maps = dict(zip(wanted, found))  # (B, C, H, W) each

    def pool(each: FeatureSet) -> Tensor:
        if each == FeatureSet():
            return model.forward_head(final, pre_logits=True)
        stage = maps[_stage(each, depth)]
        if each.pooling == "model":
            return stage.mean((2, 3))
        return functional.adaptive_avg_pool2d(stage, grid_cells(stage.shape, each.grid_dim)).flatten(1)

    return [pool(each) for each in sets]


def grid_cells(shape: Sequence[int], grid_dim: int) -> tuple[int, int]:
    """Rows and columns that bring a map (B, C, H, W) near `grid_dim` dimensions, no more than it has.

    For ResNet-50 and 9216 these are the 12, 6, 4, 3 and 2 of mmselfsup's layer-wise protocol.
    """
    side = max(1, round(math.sqrt(grid_dim / shape[1])))
    return min(side, shape[2]), min(side, shape[3])


def _places(layer: str, depth: int) -> list[int]:
    """The blocks of a layer's name, counted from 0."""
    if layer[:4] == "last":
        return list(range(depth - int(layer[5:] or 1), depth))
    return [int(layer)]


def _stage(each: FeatureSet, depth: int) -> int:
    return depth - 1 if each.layer == "last" else int(each.layer)


def _check_pooling(model: nn.Module, each: FeatureSet) -> None:
    name = type(model).__name__
    if is_token_model(model):
        if each.pooling not in TOKEN_POOLINGS:
            raise ValueError(f"pooling={each.pooling} needs the feature maps of a convnet, got {name}")
        if each.pooling.startswith("token") and not cast(VisionTransformer, model).has_class_token:
            raise ValueError(f"pooling={each.pooling} needs a class token, and this {name} has none; try patches")
        return
    if each.pooling not in MAP_POOLINGS:
        raise ValueError(f"pooling={each.pooling} needs a vision transformer, got {name}; leave it at model")
    if (each.layer, each.pooling) != ("last", "model") and not num_layers(model):
        raise ValueError(f"{each}: timm cannot take {name} apart; leave layers at last and pooling at model")
