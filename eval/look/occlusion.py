"""`what=occlusion`: how far the score falls where a window of the image is covered (Zeiler and Fergus 2013,
arXiv:1311.2901, section 4.2), through captum.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from captum.attr import Occlusion
from torch import Tensor

from eval.look.attribution import heat_look, in_batches, rows_of, start
from eval.look.result import Look
from eval.look.target import Score, make_target

if TYPE_CHECKING:
    from eval.look.scene import Scene

NAME = "fall when covered"


def look(scene: Scene) -> Look:
    """A map for each image that is shown."""
    settings = scene.config.occlusion
    shown = scene.shown()
    window, stride = window_and_stride(settings.window, settings.stride, scene.image_size)
    target = make_target(scene, shown, settings.target, setting="occlusion.target", gradient=False)
    num = len(shown) * (num_positions(scene.image_size, window=window, stride=stride) + 1)
    batch_size = scene.config.batch_size
    start("occlusion", target.score, shown.image[:batch_size], num=num, gradient=False)
    compute = partial(occlusion_map, window=window, stride=stride, batch_size=batch_size)
    heat = in_batches(compute, target.score, shown.image, batch_size)  # (B, H, W)
    title = f"Occlusion by {window} x {window} pixels of the mean colour: fall of the {target.meaning}"
    both_ways = target.kind != "similarity"  # which can only fall
    return heat_look(
        scene,
        shown,
        target,
        {NAME: heat.cpu().numpy()},
        signed=[NAME] if both_ways else [],
        title=title + ("; blue where covering raises it" if both_ways else ""),
        data={"window": window, "stride": stride, "forwards": num},
    )


def window_and_stride(window: int | None, stride: int | None, image_size: tuple[int, int]) -> tuple[int, int]:
    """Both in pixels: by default a window of a sixth of the shorter side, moved by half of it.

    Raises ValueError for a window that is larger than the image, and for steps that skip pixels.
    """
    shorter = min(image_size)
    window = max(shorter // 6, 1) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= window < shorter:
        raise ValueError(f"occlusion.window must be 1 to {shorter - 1} pixels for images of {image_size}, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(
            f"occlusion.stride must be 1 to {window} pixels, the window's side, so that every pixel is covered once; "
            f"got {stride}"
        )
    return window, stride


def num_positions(image_size: tuple[int, int], *, window: int, stride: int) -> int:
    """How often an image is run with another window covered; the last of a row may reach beyond the border."""
    return math.prod(math.ceil((side - window) / stride) + 1 for side in image_size)


@torch.no_grad()
def occlusion_map(score: Score, image: Tensor, *, window: int, stride: int, batch_size: int = 64) -> Tensor:
    """How far the score falls where a pixel of images (B, C, H, W) is covered by the mean colour, (B, H, W).

    A pixel that several windows cover has the mean of their falls. Negative where covering raises the score.
    """
    channels = image.shape[1]
    falls = Occlusion(score).attribute(
        image,
        sliding_window_shapes=(channels, window, window),
        strides=(channels, stride, stride),
        baselines=0.0,  # normalised images: the mean colour
        additional_forward_args=(rows_of(image),),
        perturbations_per_eval=max(batch_size // len(image), 1),
    )  # (B, C, H, W), the same for all channels
    return falls[:, 0].to(image.dtype)
