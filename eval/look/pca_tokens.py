"""What a backbone's tokens tell apart: their first three principal components as the colours red, green and blue."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from eval.layers import num_layers
from eval.look.components import Components, principal_components
from eval.look.drawing import captioned
from eval.look.layer_places import large_enough, token_grid
from eval.look.result import DoesNotApply, Look
from eval.look.scene import Scene
from ssl.models.backbones import is_token_model

SIDES = ("positive", "negative")
TAILS = (0.01, 0.99)
"""Shares of the tokens below which a component has no colour, and above which it has all."""
FLAT = 1e-4
"""Of the greatest score: a component that spreads less is what fp32 rounds off."""
BLEND = 0.6


def look(scene: Scene) -> Look:
    """The shown images' tokens in the colours of their first components, of all images together."""
    settings = scene.config.pca_tokens
    if settings.foreground is not None and settings.foreground not in SIDES:
        raise ValueError(f"pca_tokens.foreground must be positive, negative or null, got {settings.foreground!r}")
    shown = scene.shown()
    layer = usual_layer(scene.backbone, shown.image[:1]) if settings.layer is None else settings.layer
    parts = shown.image.split(scene.config.batch_size)
    tokens = torch.cat([token_map(scene.backbone, part, layer).cpu() for part in parts])  # (B, D, h, w)
    rows, columns = tokens.shape[-2:]
    if settings.without_place and len(shown) < 2:
        raise ValueError("pca_tokens.without_place=true needs two images or more to tell a place from what it shows")
    if rows * columns == 1:
        raise DoesNotApply(
            f"what=pca_tokens needs more than one token per image, and {_layer_name(layer)} of "
            f"{type(scene.backbone).__name__} is a map of 1 x 1; give an earlier pca_tokens.layer="
        )
    of_place = place_share(tokens)
    if settings.without_place:
        tokens = tokens - tokens.mean(0)
    colours, found, is_shown = token_colours(tokens, foreground=settings.foreground)  # (B, h, w, 3)
    columns_shown = [("tokens", colours)]
    if scene.loaded is not None:
        before = torch.cat([token_map(scene.untrained(), part, layer).cpu() for part in parts])
        before = before - before.mean(0) if settings.without_place else before
        columns_shown.append((scene.untrained_title, token_colours(before, foreground=settings.foreground)[0]))
    explained = [round(float(each), 4) for each in found.explained]
    shares = ", ".join(f"{each:.0%}" for each in explained)
    return Look(
        pictures={"": _picture(shown, columns_shown, title=_title(settings, layer, (rows, columns), shares))},
        data={
            "layer": layer,
            "grid_size": (rows, columns),
            "dimensions": tokens.shape[1],
            "num_tokens": len(found.score),
            "explained_variance": explained,
            "place_share": of_place,
            "without_place": settings.without_place,
            "foreground": settings.foreground,
            "foreground_share": float(is_shown.mean()),
            "images": [{"name": name, "index": int(index)} for name, index in zip(shown.names, shown.index)],
        },
        arrays={"colours": colours, "direction": found.direction.float().numpy(), "is_foreground": is_shown},
        metrics={
            **{f"explained_variance_{number}": each for number, each in enumerate(explained, start=1)},
            "place_share": of_place,
        },
        lines=[
            f"three components hold {shares} of the variance of {len(found.score):,} tokens with {tokens.shape[1]} "
            "dimensions; alike colours are alike tokens, in all images",
            *_place_in_words(of_place, settings.without_place),
            f"a token stands for {scene.image_size[0] / rows:.3g} x {scene.image_size[1] / columns:.3g} pixels "
            f"({rows} x {columns} of them)",
            *([_why_not_last(layer)] if layer != settings.layer else []),
        ],
    )


@torch.no_grad()
def usual_layer(model: nn.Module, image: Tensor) -> int | None:
    """The last stage whose map of images (B, C, H, W) is `large_enough`; None where this is what the model pools."""
    last = token_map(model, image).shape[-2:]
    depth = num_layers(model)
    if is_token_model(model) or not depth:
        return None
    found = cast(Any, model).forward_intermediates(image, indices=list(range(depth)), intermediates_only=True)
    sizes = [(each.shape[-2], each.shape[-1]) for each in found]
    chosen = large_enough([*sizes, (last[0], last[1])])[-1]
    return chosen if chosen < depth else None


@torch.no_grad()
def token_map(model: nn.Module, image: Tensor, layer: int | None = None) -> Tensor:
    """The patch tokens or the feature map of normalised images (B, C, H, W): (B, D, h, w) float32.

    `layer` counts a vision transformer's blocks, a convnet's stages, from 0 or from the end; None is what the model
    pools. Blocks pass the final norm. Raises ValueError for a layer that the model does not have.
    """
    if layer is None:
        return _as_map(model, cast(Any, model).forward_features(image), (image.shape[-2], image.shape[-1])).float()
    depth = num_layers(model)
    kind = "blocks" if is_token_model(model) else "stages"
    if not depth:
        raise ValueError(f"pca_tokens.layer={layer}: timm cannot take {type(model).__name__} apart; leave it out")
    if not -depth <= layer < depth:
        raise ValueError(
            f"pca_tokens.layer={layer}: {type(model).__name__} has {depth} {kind}, 0..{depth - 1} or from the end -1"
        )
    norm = {"norm": True} if is_token_model(model) else {}
    found = cast(Any, model).forward_intermediates(image, indices=[layer % depth], intermediates_only=True, **norm)
    return found[0].float()


def place_share(tokens: Tensor) -> float:
    """How much of the variance of tokens (B, D, h, w) their place alone explains, whatever the image: 0 to 1.

    What tokens of one place have in common in each two different images, so that it is 0 on average where places mean
    nothing. NaN for one image.
    """
    if len(tokens) < 2:
        return math.nan
    tokens = tokens.double()
    total = (tokens - tokens.mean((0, 2, 3), keepdim=True)).square().sum() / len(tokens)
    within = tokens - tokens.mean((2, 3), keepdim=True)  # what the whole image has is no place's
    pairs = (within.sum(0).square().sum() - within.square().sum()) / (len(tokens) * (len(tokens) - 1))
    return max(float(pairs / total), 0.0) if total > 0 else 0.0


def _place_in_words(share: float, is_removed: bool) -> list[str]:
    if math.isnan(share):
        return []
    then = "it is taken out" if is_removed else "pca_tokens.without_place=true takes it out"
    return [f"{share:.0%} of the tokens' variance is their place on the image, whatever it shows; {then}"]


def _as_map(model: nn.Module, features: Tensor, image_size: tuple[int, int]) -> Tensor:
    if features.ndim == 4:
        is_nhwc = getattr(model, "output_fmt", None) == "NHWC" or features.shape[1] != getattr(model, "num_features", 0)
        is_nhwc = is_nhwc and features.shape[-1] == getattr(model, "num_features", 0)
        return features.movedim(-1, 1) if is_nhwc else features
    found = token_grid(model, image_size)
    if found is None:
        raise DoesNotApply(
            f"what=pca_tokens needs a map of features or patch tokens, which {type(model).__name__} lacks"
        )
    grid_size, prefix = found
    return features[:, prefix:].movedim(-1, 1).unflatten(-1, grid_size)  # (B, D, h, w)


def token_colours(tokens: Tensor, *, foreground: str | None = None) -> tuple[np.ndarray, Components, np.ndarray]:
    """Maps (B, D, h, w) in colours: float (B, h, w, 3) in 0..1, their components, and which tokens (B, h, w) count.

    The components are those of all tokens of all images together (Oquab et al. 2023, arXiv:2304.07193, Fig. 1). With
    `foreground` only tokens on that side, `positive` or `negative`, of the first component count: the components are
    found anew among them, and the others are black. Raises ValueError where fewer than four are left.
    """
    batch, _, rows, columns = tokens.shape
    flat = tokens.movedim(1, -1).flatten(0, 2)  # (N, D)
    counts = torch.ones(len(flat), dtype=torch.bool)
    found = principal_components(flat)
    if foreground is not None:
        first = found.score[:, 0]
        counts = first > 0 if foreground == "positive" else first < 0
        if counts.sum() < 4:
            raise ValueError(
                f"pca_tokens.foreground={foreground} leaves {int(counts.sum())} of {len(flat)} tokens; give the other "
                "side, or more images"
            )
        found = principal_components(flat[counts])
    colours = torch.zeros(len(flat), 3, dtype=torch.float64)
    colours[counts] = _scaled(found.score)
    shape = (batch, rows, columns)
    return colours.view(*shape, 3).float().numpy(), found, counts.view(shape).numpy()


def _scaled(score: Tensor) -> Tensor:
    """Scores (N, k) as (N, 3) in 0..1; a component without variance, or that is missing, is 0.5 everywhere."""
    low, high = torch.quantile(score, torch.tensor(TAILS, dtype=score.dtype), dim=0)  # (k,) each
    spread = high - low
    is_flat = spread <= FLAT * score.abs().max().clamp_min(1e-30)
    scaled = ((score - low) / spread.where(~is_flat, torch.ones_like(spread))).clamp(0, 1)
    scaled = scaled.where(~is_flat, torch.full_like(scaled, 0.5))
    missing = torch.full((len(score), 3 - score.shape[1]), 0.5, dtype=score.dtype)
    return torch.cat([scaled, missing], dim=1)


def _picture(shown: Any, columns: list[tuple[str, np.ndarray]], *, title: str) -> np.ndarray:
    """A row per image: itself, its tokens in squares, the same smoothly over it, and other networks' tokens."""
    size = shown.pixels.shape[1:3]
    rows, captions = [], []
    for place in range(len(shown)):
        pixels = shown.pixels[place]
        own = columns[0][1][place]
        gray = pixels.astype(np.float64).mean(2, keepdims=True)
        over = (gray * (1 - BLEND) + _enlarged(own, size, "bilinear") * BLEND).round().astype(np.uint8)
        squares = [_enlarged(colours[place], size, "nearest").round().astype(np.uint8) for _, colours in columns]
        rows.append([pixels, squares[0], over, *squares[1:]])
        captions.append([shown.truth(place), columns[0][0], "over the image", *(name for name, _ in columns[1:])])
    return captioned(rows, captions=captions, title=title)


def _enlarged(colours: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Colours (h, w, 3) in 0..1 at `size`, in 0..255."""
    given = torch.from_numpy(colours).movedim(-1, 0)[None]  # (1, 3, h, w)
    smooth = {"align_corners": False} if mode == "bilinear" else {}
    return (interpolate(given, size=size, mode=mode, **smooth)[0].movedim(0, -1) * 255).numpy()  # (H, W, 3)


def _title(settings: Any, layer: int | None, grid_size: tuple[int, int], shares: str) -> str:
    which = "" if settings.foreground is None else f" of those on the {settings.foreground} side of the first"
    removed = ", without what their place explains" if settings.without_place else ""
    name = _layer_name(layer)
    return (
        f"{name[0].upper()}{name[1:]}, {grid_size[0]} x {grid_size[1]} tokens{removed}: the first three principal "
        f"components{which} as red, green and blue ({shares} of the variance)"
    )


def _why_not_last(layer: int | None) -> str:
    return (
        f"{_layer_name(layer)} is shown, as the last layer has too few tokens on images of this size; "
        "pca_tokens.layer=-1 asks for that one"
    )


def _layer_name(layer: int | None) -> str:
    return "the last layer" if layer is None else f"layer {layer}"
