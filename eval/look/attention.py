"""Where a vision transformer looks: attention maps of its heads, their roll-out, and how far each head looks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from eval.look.attention_maps import check_attention, head_distance, head_entropy, read_attention, rollout, seen_by
from eval.look.drawing import captioned, colour, figure_pixels, overlay, plot, resized
from eval.look.layer_places import token_grid
from eval.look.result import Look
from eval.look.scene import Scene

QUERIES = ("class", "mean")
HEADS_SHOWN = 6


def look(scene: Scene) -> Look:
    """Attention maps of one layer on the shown images, the roll-out of all, and every head's reach and spread."""
    settings = scene.config.attention
    names = list(check_attention(scene.backbone, scene.image_size))
    layer = choose_block(settings.layer, len(names))
    found = token_grid(scene.backbone, scene.image_size)
    assert found is not None
    grid_size, prefix = found
    query = choose_query(scene.backbone, settings.query)
    shown = scene.shown()
    read = read_attention(scene.backbone, scene.image_size)
    heads, rolled, distances, entropies = [], [], [], []
    for image in shown.image.split(1):  # one at a time: all maps of many images together may not fit
        maps = read(image)  # (1, heads, T, T) each
        heads.append(seen_by(maps[layer], prefix, query=query)[0].cpu())  # (heads, N)
        joint = rollout(maps, fusion=settings.fusion, discard=settings.discard)  # (1, T, T)
        rolled.append(seen_by(joint, prefix, query=query)[0].cpu())  # (N,)
        distances.append([head_distance(each, grid_size, scene.image_size).cpu() for each in maps])
        entropies.append([head_entropy(each).cpu() for each in maps])
    of_heads = torch.stack(heads).unflatten(-1, grid_size).numpy()  # (B, heads, h, w)
    of_rollout = torch.stack(rolled).unflatten(-1, grid_size).numpy()  # (B, h, w)
    distance, entropy = _averaged(distances), _averaged(entropies)  # [layer][head]
    meaning = _meaning(scene.backbone, query)
    return Look(
        pictures={
            "": _maps_picture(
                shown,
                of_heads,
                of_rollout,
                title=f"{names[layer]}, {meaning}. Dark is 0, bright each map's greatest weight; below: how many times "
                "the map's mean that is",
            ),
            "heads": _heads_picture(distance, entropy, _even_distance(grid_size, scene.image_size), scene.image_size),
        },
        data={
            "layer": names[layer],
            "layers": names,
            "query": query,
            "query_meaning": meaning,
            "grid_size": grid_size,
            "num_prefix": prefix,
            "fusion": settings.fusion,
            "discard": settings.discard,
            "distance_pixels": distance,
            "entropy": entropy,
            "images": [
                {"name": name, "index": int(index), "on_patches": heads_of_one.sum((1, 2)).tolist()}
                for name, index, heads_of_one in zip(shown.names, shown.index, of_heads)
            ],
        },
        arrays={"heads": of_heads, "rollout": of_rollout},
        metrics={
            "mean_entropy": float(np.mean(entropy[layer])),
            "mean_distance_pixels": float(np.mean(distance[layer])),
            "first_mean_distance_pixels": float(np.mean(distance[0])),
        },
        lines=[
            f"heads of {names[layer]} look {min(distance[layer]):.1f} to {max(distance[layer]):.1f} pixels far, those "
            f"of {names[0]} {min(distance[0]):.1f} to {max(distance[0]):.1f}; evenly over the image would be "
            f"{_even_distance(grid_size, scene.image_size):.1f}",
            f"their entropy is {np.mean(entropy[layer]):.2f} of the greatest possible: 1 is evenly over all tokens",
            f"shown: {meaning}",
        ],
    )


def choose_block(layer: int | None, depth: int) -> int:
    """A block's number from the front. Raises ValueError for one that is not there."""
    if layer is None:
        return depth - 1
    if not -depth <= layer < depth:
        raise ValueError(f"attention.layer={layer}: there are {depth} blocks, 0..{depth - 1} or from the end -1")
    return layer % depth


def choose_query(model: nn.Module, query: str | None) -> str:
    """Whose attention is shown: the class token's where the model has one, else the mean of the patches'."""
    has_class = _has_class_token(model)
    if query is None:
        return "class" if has_class else "mean"
    if query not in QUERIES:
        raise ValueError(f"attention.query must be one of {', '.join(QUERIES)}, got {query!r}")
    if query == "class" and not has_class:
        raise ValueError(
            f"attention.query=class needs a class token, and this {type(model).__name__} has none; "
            "give attention.query=mean"
        )
    return query


def _has_class_token(model: nn.Module) -> bool:
    tokens = (getattr(model, name, None) for name in ("cls_token", "class_token"))
    return any(isinstance(token, Tensor) for token in tokens)


def _meaning(model: nn.Module, query: str) -> str:
    if query == "class":
        return "from the class token to the patches"
    why = "" if _has_class_token(model) else ", as there is no class token"
    return f"from all patches to each, on average{why}"


def _averaged(values: list[list[Tensor]]) -> list[list[float]]:
    """Of each image a value per layer and head, to the mean over the images."""
    return [torch.stack(of_layer).mean(0).tolist() for of_layer in zip(*values)]


def _even_distance(grid_size: tuple[int, int], image_size: tuple[int, int]) -> float:
    num = grid_size[0] * grid_size[1]
    return float(head_distance(torch.full((1, 1, num, num), 1 / num), grid_size, image_size)[0])


def _maps_picture(shown: Any, heads: np.ndarray, rolled: np.ndarray, *, title: str) -> np.ndarray:
    """A row per image: itself, its heads' maps, their mean and the roll-out on it; all from 0 to their greatest."""
    num = min(heads.shape[1], HEADS_SHOWN)
    if num < heads.shape[1]:
        title += f"; the first {num} of {heads.shape[1]} heads"
    size = shown.pixels.shape[1:3]
    rows, captions = [], []
    for place in range(len(shown)):
        maps = [*heads[place, :num], heads[place].mean(0), rolled[place]]  # (h, w) each
        bounds = [(0.0, float(each.max())) for each in maps]
        row = [shown.pixels[place]]
        row += [colour(resized(each, size, smooth=False), bounds=ends) for each, ends in zip(maps, bounds[:num])]
        row += [
            overlay(shown.pixels[place], each, smooth=False, bounds=ends)
            for each, ends in zip(maps[num:], bounds[num:])
        ]
        rows.append(row)
        names = [*(f"head {head}" for head in range(num)), "mean", "roll-out"]
        peaks = [f"{name}: {each.max() / max(each.mean(), 1e-12):.1f} x" for name, each in zip(names, maps)]
        captions.append([shown.truth(place), *peaks])
    return captioned(rows, captions=captions, title=title)


def _heads_picture(
    distance: list[list[float]], entropy: list[list[float]], even: float, image_size: tuple[int, int]
) -> np.ndarray:
    """Two plots over the layers, a point per head: how far it looks, how evenly it spreads."""
    figure = plot(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    for axes, values, label in (
        (left, distance, "mean attention distance (pixels)"),
        (right, entropy, "entropy / log(tokens)"),
    ):
        depth = np.repeat(np.arange(len(values)), [len(each) for each in values])
        axes.scatter(depth, np.concatenate(values), color="#0072B2", alpha=0.7, label="a head")
        axes.plot(np.arange(len(values)), [np.mean(each) for each in values], color="#D55E00", label="mean")
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    left.axhline(even, color="#666666", linestyle="--", label="evenly over the image")
    left.set_ylim(0, None)
    right.set_ylim(0, 1.02)
    left.set_title(f"How far heads look ({image_size[0]} x {image_size[1]} pixels)", fontsize=10)
    right.set_title("How evenly heads look: 1 is over all tokens alike", fontsize=10)
    left.legend(fontsize=8)
    return figure_pixels(figure)
