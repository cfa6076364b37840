"""Where a network looks in one image: the maps that fit it, in colours over the image."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor

from eval.look.attention import choose_query
from eval.look.attention_maps import read_attention, rollout, seen_by
from eval.look.drawing import colours_end, enlarged, overlay
from eval.look.gradcam import gradcam, last_map
from eval.look.layer_places import Places, find_places, token_grid
from eval.look.result import DoesNotApply
from eval.look.saliency import attribute
from eval.look.samples import Shown
from eval.look.scene import Scene
from eval.look.target import Target, head_of, make_target

NOISE_SAMPLES = 4  # of SmoothGrad: fewer than eval.look's, as a person waits
LEAST_SIDE = 224  # pixels of a map's picture


class Maps:
    """Attention where the network has it, Grad-CAM and SmoothGrad, of one image after the other.

    The latter two explain the predicted class where a head names one, else how far the features are from a blank
    image's.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.wanted = "auto"
        self._layer: Places | None = None
        self._has_layer = True
        self._read: Callable[[Tensor], list[Tensor]] | None = None
        with suppress(DoesNotApply):
            self._read = read_attention(scene.backbone, scene.image_size)  # copies the backbone, so once
        try:
            head_of(scene)
        except ValueError as error:  # the head reads images of another size
            self.wanted = "contrast"
            scene.notes.append(f"where it looks is told without the class: {error}")

    def __call__(self, shown: Shown) -> list[dict[str, Any]]:
        """Title, note and picture, uint8 (h, w, 3), of each map of the only image of `shown`."""
        target = make_target(self.scene, shown, self.wanted, setting="target", gradient=True)
        of = target.meaning + (f", {target.names[0]}" if target.names[0] else "")
        found = self._attention(shown, self._read) if self._read is not None else []
        layer = self._find_layer(target, shown.image)
        if layer is not None:
            heat = gradcam(target.network, target.score, shown.image, layer)  # (1, h, w)
            rows, columns = layer.grid_size
            note = f"What raises the {of}; on the {rows} x {columns} places of {layer.layer}."
            found.append({"title": "Grad-CAM", "note": note, "picture": over(shown, heat, smooth=True)})
        heat = attribute(target.score, shown.image, "smoothgrad", noise_samples=NOISE_SAMPLES, seed=self.scene.seed)
        note = f"Which pixels move the {of}: its gradient, mean over {NOISE_SAMPLES} noisy copies."
        found.append({"title": "SmoothGrad", "note": note, "picture": over(shown, heat, smooth=False)})
        return found

    def _attention(self, shown: Shown, read: Callable[[Tensor], list[Tensor]]) -> list[dict[str, Any]]:
        """What the last layer's heads attend to on average, and the roll-out of all layers."""
        model = self.scene.backbone
        tokens = token_grid(model, self.scene.image_size)
        assert tokens is not None  # read_attention
        grid_size, prefix = tokens
        query = choose_query(model, None)
        maps = read(shown.image)  # (1, heads, T, T) each
        given = {
            "Attention": (maps[-1].mean(1), "last layer, mean of its heads"),
            "Roll-out": (rollout(maps), "attention of all layers together"),
        }
        start = "From the class token to the patches" if query == "class" else "From all patches to each, on average"
        return [
            {
                "title": title,
                "note": f"{start}: {what}.",
                "picture": over(shown, seen_by(each, prefix, query=query).unflatten(-1, grid_size), smooth=False),
            }
            for title, (each, what) in given.items()
        ]

    def _find_layer(self, target: Target, image: Tensor) -> Places | None:
        """The network's last map on which the score depends, looked for once; None where it has none."""
        if self._layer is None and self._has_layer:
            places = find_places(target.network, image_size=self.scene.image_size, in_chans=self.scene.channels)
            try:
                self._layer = last_map(target.network, target.score, image, places)
            except DoesNotApply:
                self._has_layer = False
        return self._layer


def over(shown: Shown, heat: Tensor, *, smooth: bool) -> np.ndarray:
    """A map (1, h, w) of the only image of `shown` over that image, at 224 pixels or more."""
    pixels, values = shown.pixels[0], heat[0].float().cpu().numpy()
    pixels = enlarged(pixels, math.ceil(LEAST_SIDE / max(pixels.shape[:2])))
    bound = colours_end(values)
    return overlay(pixels, values, alpha=0.7, bounds=(0.0, bound), smooth=smooth)
