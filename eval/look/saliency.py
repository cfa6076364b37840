"""`what=saliency`: which pixels move the score, by its gradient (Simonyan et al. 2013, arXiv:1312.6034, section 3).

Beside the plain gradient: SmoothGrad, its mean over noisy copies of the image (Smilkov et al. 2017, arXiv:1706.03825),
gradient times input, and integrated gradients from an image of the mean colour (Sundararajan et al. 2017,
arXiv:1703.01365). All four are captum's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor

from eval.look.attribution import heat_look, in_batches, rows_of, start
from eval.look.result import Look
from eval.look.settings import SaliencyConfig
from eval.look.target import Score, make_target

if TYPE_CHECKING:
    from eval.look.scene import Scene

METHODS = {
    "gradient": "gradient",
    "smoothgrad": "SmoothGrad",
    "input_x_gradient": "gradient x input",
    "integrated_gradients": "integrated gradients",
}
SIGNED = ("input_x_gradient", "integrated_gradients")
"""Those whose sign says whether a pixel raises or lowers the score; of the others only the size is shown."""
BATCH = 32  # images through which gradients go at once


def look(scene: Scene) -> Look:
    """A row of maps for each image that is shown."""
    settings = scene.config.saliency
    check_settings(settings)
    shown = scene.shown()
    target = make_target(scene, shown, settings.target, setting="saliency.target", gradient=True)
    passes = {"smoothgrad": settings.noise_samples, "integrated_gradients": settings.steps}
    num = len(shown) * sum(passes.get(method, 1) for method in settings.methods)
    batch_size = scene.config.batch_size
    start("saliency", target.score, shown.image[:batch_size], num=num)
    heats = {}
    for method in settings.methods:
        compute = partial(
            attribute,
            method=method,
            noise_samples=settings.noise_samples,
            noise=settings.noise,
            steps=settings.steps,
            seed=scene.seed,
        )
        heats[METHODS[method]] = in_batches(compute, target.score, shown.image, batch_size).cpu().numpy()
    signed = [METHODS[method] for method in settings.methods if method in SIGNED]
    title = f"Saliency of the {target.meaning}" + ("; red raises it, blue lowers it" if signed else "")
    return heat_look(scene, shown, target, heats, signed=signed, title=title)


def check_settings(settings: Any) -> None:
    """Raise ValueError for methods that are not known, numbers that are out of range, and those without effect."""
    methods, defaults = list(settings.methods), SaliencyConfig()
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"saliency.methods must be one or several of {', '.join(METHODS)}, got {methods}")
    if settings.noise_samples < 1 or settings.steps < 2 or settings.noise <= 0:
        raise ValueError(
            "saliency needs noise_samples of 1 or more, noise above 0 and steps of 2 or more, "
            f"got {settings.noise_samples}, {settings.noise} and {settings.steps}"
        )
    for method, names in {"smoothgrad": ("noise_samples", "noise"), "integrated_gradients": ("steps",)}.items():
        for name in names:
            if method not in methods and settings[name] != getattr(defaults, name):
                raise ValueError(
                    f"saliency.{name} has no effect without {method} among saliency.methods; add it, or leave it out"
                )


def attribute(
    score: Score,
    image: Tensor,
    method: str,
    *,
    noise_samples: int = 16,
    noise: float = 0.15,
    steps: int = 32,
    seed: int = 0,
) -> Tensor:
    """How much each pixel of images (B, C, H, W) moves the score, (B, H, W).

    Of `gradient` and `smoothgrad` the largest size over the channels, of `input_x_gradient` and `integrated_gradients`
    the sum over the channels, with its sign. `noise` is the standard deviation as a share of the image's range.
    """
    if method == "smoothgrad":
        return smooth_gradient(score, image, num_samples=noise_samples, noise=noise, seed=seed).abs().amax(1)
    rows = rows_of(image)
    given = image.detach().clone().requires_grad_()
    if method == "gradient":
        return Saliency(score).attribute(given, additional_forward_args=(rows,)).detach().amax(1)  # (B, H, W)
    if method == "input_x_gradient":
        return InputXGradient(score).attribute(given, additional_forward_args=(rows,)).detach().sum(1)
    path = IntegratedGradients(score)
    parts = [
        path.attribute(given[[row]], n_steps=steps, additional_forward_args=(rows[[row]],), internal_batch_size=BATCH)
        for row in range(len(image))
    ]
    return torch.cat(parts).detach().sum(1).to(image.dtype)  # (B, H, W)


def smooth_gradient(score: Score, image: Tensor, *, num_samples: int, noise: float, seed: int) -> Tensor:
    """The mean gradient (B, C, H, W) over noisy copies of each image, whatever images are beside it."""
    rows = rows_of(image)
    tunnel: Any = NoiseTunnel(Saliency(score))  # whose annotation leaves open what it answers
    parts = []
    devices = [image.device] if image.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for row in range(len(image)):
            torch.manual_seed(seed)
            given = image[[row]].detach().clone().requires_grad_()
            parts.append(
                tunnel.attribute(
                    given,
                    nt_type="smoothgrad",
                    nt_samples=num_samples,
                    nt_samples_batch_size=min(num_samples, BATCH),
                    stdevs=float(noise * (image[row].max() - image[row].min())),
                    abs=False,
                    additional_forward_args=(rows[[row]],),
                ).detach()
            )
    return torch.cat(parts)
