"""What a masked image model makes of masked images, at several mask ratios: MAE's and SimMIM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.look.drawing import captioned, with_gray
from eval.look.masked import Reconstruction, errors, patch_size, reconstruct, usual_ratios
from eval.look.result import DoesNotApply, Look
from eval.look.samples import Shown
from eval.look.scene import Scene
from ssl.config import plain
from ssl.methods.base import Method
from ssl.methods.mae import num_visible
from ssl.pictures import to_uint8
from ssl.randomness import uniforms


def look(scene: Scene) -> Look:
    """Input, what the encoder saw and what the decoder made of it, at `reconstructions.mask_ratios`."""
    settings = plain(scene.config.reconstructions)
    method = masked_method(scene)
    ratios = checked_ratios(method, settings["mask_ratios"])
    if settings["masks"] < 1 or settings["sample"] < 1:
        raise ValueError(
            f"reconstructions.masks={settings['masks']} and reconstructions.sample={settings['sample']} must be at "
            "least 1"
        )
    shown = scene.shown()
    found = [
        [reconstruct(method, shown.image, run_noise(scene, method, shown.index, mask), ratio) for ratio in ratios]
        for mask in range(settings["masks"])
    ]
    judged, metrics, each = measured(scene, method, ratios, num=settings["sample"])
    told = plain_title(scene, method)
    return Look(
        pictures={"": _picture(scene, method, shown, found, title=told)},
        data={
            "split": None if scene.config.images is not None else scene.split,
            "method": type(method).__name__,
            "mask_ratio_of_the_run": getattr(method, "mask_ratio", None),
            "patch_size": patch_size(method),
            "targets_normalised_by_patch": bool(getattr(method, "norm_pixel_targets", False)),
            "unit": "mean squared error over hidden pixels and channels, of values in 0..1",
            "masks": "mask m is the one that the run draws for this image in epoch m, at the run's own ratio",
            "images": [
                {
                    "index": int(index),
                    "name": name,
                    "class": shown.truth(place),
                    "masks": [
                        [
                            {
                                "mask_ratio": one.mask_ratio,
                                **{key: value[place].item() for key, value in errors(method, one, scene.std).items()},
                            }
                            for one in of_mask
                        ]
                        for of_mask in found
                    ],
                }
                for place, (index, name) in enumerate(zip(shown.index, shown.names, strict=True))
            ],
            "measured_on": judged,
            "errors": each,
        },
        arrays=_arrays(scene, shown, found),
        metrics=metrics,
        lines=_lines(method, ratios, judged, metrics),
    )


def masked_method(scene: Scene) -> Method:
    """The checkpoint's method, which fills in what is hidden. Raises DoesNotApply for methods that do not."""
    if scene.method_name is not None and not callable(getattr(scene.method(), "reconstruct", None)):
        raise DoesNotApply(
            f"{type(scene.method()).__name__} hides nothing that it could fill in; reconstructions are of MAE "
            "(method=mae) and SimMIM (method=simmim), or any method with reconstruct(images, noise, mask_ratio)"
        )
    return scene.method()


def checked_ratios(method: Method, given: Sequence[float] | None) -> list[float]:
    """The mask ratios to look at. Raises ValueError for one that hides nothing or everything."""
    if given is None:
        return usual_ratios(method)
    wrong = [ratio for ratio in given if not 0 < num_visible(method.num_noise, ratio) < method.num_noise]
    if wrong or not given:
        least, most = 1 / method.num_noise, 1 - 1 / method.num_noise
        raise ValueError(
            f"reconstructions.mask_ratios={list(given)}: of {method.num_noise} patches one at least must be hidden and "
            f"one seen; give ratios from {least:.4f} to {most:.4f}, or null"
        )
    return [float(ratio) for ratio in dict.fromkeys(given)]


def run_noise(scene: Scene, method: Method, index: np.ndarray, epoch: int) -> Tensor:
    """The numbers that the run's masks follow from, (B, num_noise), for the images `index` in `epoch`."""
    seed = int(scene.run_config.get("seed") or 0)
    return torch.from_numpy(uniforms(seed, epoch, index, "noise", method.num_noise)).to(scene.device)


def measured(
    scene: Scene, method: Method, ratios: Sequence[float], *, num: int
) -> tuple[int, dict[str, float], list[dict[str, Any]]]:
    """(number of images, metrics, errors by ratio) over a sample of the images, or over those that a person named."""
    few = scene.shown(num)
    metrics: dict[str, float] = {}
    each = []
    for ratio in ratios:
        parts: dict[str, list[Tensor]] = {}
        for rows in torch.arange(len(few)).split(scene.config.batch_size):
            noise = run_noise(scene, method, few.index[rows.numpy()], 0)
            found = errors(method, reconstruct(method, few.image[rows.to(scene.device)], noise, ratio), scene.std)
            for name, value in found.items():
                parts.setdefault(name, []).append(value.cpu())
        values = {name: torch.cat(some) for name, some in parts.items()}  # (N,) each
        means = {name: value.mean().item() for name, value in values.items()}
        name = f"{100 * ratio:g}"
        metrics |= {f"error_{name}": means["model"], f"error_mean_colour_{name}": means["mean_colour"]}
        if "patch_mean" in means:
            metrics[f"error_patch_mean_{name}"] = means["patch_mean"]
        metrics[f"explained_{name}"] = explained(means)
        each.append({"mask_ratio": ratio, **{key: value.tolist() for key, value in values.items()}})
    return len(few), metrics, each


def explained(means: Mapping[str, float]) -> float:
    """The share of the best flat guess's error that the model takes away: 1 all of it, 0 none, less where it adds.

    The guess is each patch's own mean where the model was given that too, else the mean colour of what was seen.
    """
    flat = means.get("patch_mean", means["mean_colour"])
    return 1.0 - means["model"] / flat if flat > 0 else 0.0


def plain_title(scene: Scene, method: Method) -> str:
    """What the picture shows, and what stands in it that the model was not asked for."""
    step = "" if scene.step is None else f", step {scene.step}"
    title = f"{type(method).__name__}{step}: what it is given, and what it makes of it."
    is_given_means = bool(getattr(method, "norm_pixel_targets", False))
    if is_given_means:
        title += (
            " Its targets have each patch's mean and deviation taken out; they are put back here from the input: the "
            "brightness and contrast of a patch are given, not predicted."
        )
    return f"{title} Error: mean squared, of hidden pixels in 0..1. Flat: that of {_flat(is_given_means)}."


def _flat(is_given_means: bool) -> str:
    """The guess that the model's error is set against."""
    return "each hidden patch's own mean, which it is given" if is_given_means else "the mean colour of what is seen"


def _picture(
    scene: Scene, method: Method, shown: Shown, found: Sequence[Sequence[Reconstruction]], *, title: str
) -> np.ndarray:
    rows: list[list[np.ndarray | None]] = []
    captions: list[list[str | None]] = []
    for place in range(len(shown)):
        for mask, of_mask in enumerate(found):
            row: list[np.ndarray | None] = [shown.pixels[place]]
            text: list[str | None] = [shown.truth(place) or f"image {shown.index[place]}"]
            for one in of_mask:
                error = errors(method, one, scene.std)
                flat = "patch_mean" if "patch_mean" in error else "mean_colour"
                hidden = one.hidden[place, 0].cpu().numpy()
                row += [with_gray(shown.pixels[place], hidden), _tile(scene, one.pasted, place)]
                number = f", mask {mask}" if len(found) > 1 else ""
                text += [
                    f"{one.mask_ratio:.0%} hidden{number}",
                    f"filled in: error {error['model'][place].item():.4f}, flat {error[flat][place].item():.4f}",
                ]
                if one.output is not None:
                    row.append(_tile(scene, one.output, place))
                    text.append("all that is predicted")
            rows.append(row)
            captions.append(text)
    return captioned(rows, captions=captions, title=title, min_side=112)


def _tile(scene: Scene, picture: Tensor, place: int) -> np.ndarray:
    return to_uint8(picture[place : place + 1], scene.mean, scene.std)[0]


def _arrays(scene: Scene, shown: Shown, found: Sequence[Sequence[Reconstruction]]) -> dict[str, np.ndarray]:
    """Pictures on the scale of 0..1, not cut off there: R ratios, M masks, B images."""
    mean, std = (shown.image.new_tensor(values).view(-1, 1, 1) for values in (scene.mean, scene.std))

    def stacked(name: str) -> np.ndarray:
        each = [torch.stack([getattr(one, name) for one in of_mask]) for of_mask in found]  # (R, B, ...) each
        return torch.stack(each, 1).cpu().numpy()  # (R, M, B, ...)

    arrays = {
        "index": shown.index,
        "mask_ratio": np.array([one.mask_ratio for one in found[0]]),
        "input": (shown.image * std + mean).cpu().numpy(),  # (B, C, H, W)
        "hidden": stacked("hidden"),
        "filled_in": stacked("pasted") * std.cpu().numpy() + mean.cpu().numpy(),
    }
    if found[0][0].output is not None:
        arrays["predicted"] = stacked("output") * std.cpu().numpy() + mean.cpu().numpy()
    return arrays


def _lines(method: Method, ratios: Sequence[float], num: int, metrics: Mapping[str, float]) -> list[str]:
    against = _flat("error_patch_mean_" in "".join(metrics))
    lines = []
    for ratio in ratios:
        name = f"{100 * ratio:g}"
        flat = metrics.get(f"error_patch_mean_{name}", metrics[f"error_mean_colour_{name}"])
        share = metrics[f"explained_{name}"]
        verdict = f"{share:.0%} of it is explained" if share > 0 else "no better than flat patches"
        own = " (the run's own ratio)" if ratio == getattr(method, "mask_ratio", None) else ""
        lines.append(f"{ratio:.0%} hidden{own}: error {metrics[f'error_{name}']:.4f}, flat {flat:.4f}: {verdict}")
    return [*lines, f"flat is {against}; mean squared error on hidden pixels of {num} images, values in 0..1"]
