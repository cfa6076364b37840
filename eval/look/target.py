"""What is explained of an image: a score that can be differentiated, of a class or of the features themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eval.classifier import Classifier
from eval.layers import make_extract, parse_sets, resolve_sets

if TYPE_CHECKING:
    from eval.look.samples import Shown
    from eval.look.scene import Scene

Vectors = Callable[[Tensor], Tensor]
"""From normalised images (B, C, H, W) to logits or features (B, D)."""
Score = Callable[[Tensor, Tensor], Tensor]
"""From images (N, C, H, W), and which of the shown images each is a variant of (N,), to a score each (N,)."""
TARGETS = "auto, predicted, label, the name of a class, similarity, contrast, norm, feature_<number>"
FREE = ("similarity", "contrast", "norm")
"""Targets that need no classifier, as `feature_<number>` does not."""
DIMENSION = re.compile(r"feature_(\d+)")


@dataclass(frozen=True)
class Target:
    """What is explained of some images, and the network whose layers compute it."""

    score: Score
    network: nn.Module
    run: Vectors
    """What the score is read from."""
    kind: str
    """One of TARGETS, `auto` resolved."""
    meaning: str
    """What the score is, for titles: `logit of the predicted class`."""
    names: list[str]
    """What it is of each shown image: a class, or nothing."""
    classes: list[int] | None = None
    """The number of that class."""


def class_scores(logits: Vectors, classes: Tensor) -> Score:
    """The logit of class `classes[row]`, for variants of the images that these classes (B,) belong to."""
    return lambda image, rows: logits(image).gather(1, classes[rows][:, None])[:, 0]  # (N,)


def similarity_scores(features: Vectors, image: Tensor, *, batch_size: int = 64) -> Score:
    """The cosine between an image's features and those of the image (B, C, H, W) that it is a variant of.

    How covering a region moves it shows what the features rest on, without labels, as in RELAX (Wickstrøm et al. 2022,
    arXiv:2112.10161). At the image itself it is 1, and its gradient is zero.
    """
    with torch.no_grad():
        found = torch.cat([features(part) for part in image.split(batch_size)])  # (B, D)
        whole = functional.normalize(found, dim=1)
    return lambda variant, rows: (functional.normalize(features(variant), dim=1) * whole[rows]).sum(1)  # (N,)


def contrast_scores(features: Vectors, image: Tensor) -> Score:
    """The distance between an image's features and those of an image of nothing but the mean colour.

    It needs no labels and no other image, and has a gradient where `similarity_scores` has none, also where a last norm
    fixes the length of the features, as in vision transformers.
    """
    with torch.no_grad():
        blank = features(torch.zeros_like(image[:1]))  # (1, D)
    return lambda variant, rows: torch.linalg.vector_norm(features(variant) - blank, dim=1)  # (N,)


def norm_scores(features: Vectors) -> Score:
    """The length of the features; nearly the same for every image where the last layer is a norm."""
    return lambda image, rows: torch.linalg.vector_norm(features(image), dim=1)  # (N,)


def dimension_scores(features: Vectors, dimension: int) -> Score:
    """The value of one dimension of the features."""
    return lambda image, rows: features(image)[:, dimension]  # (N,)


def features_of(scene: Scene) -> Vectors:
    """The scene's pooled features of normalised images, (B, C, H, W) to (B, D), with their gradient."""
    sets = resolve_sets(scene.backbone, parse_sets("last", scene.config.pooling))
    extract = make_extract(scene.backbone, sets, device=scene.device, dtype=torch.float32)
    return lambda image: extract(image)[0]


def head_of(scene: Scene) -> Classifier | None:
    """The scene's classifier, where it has one that reads the same images as its backbone."""
    head = scene.classifier()
    if head is None:
        return None
    theirs = (tuple(head.image_size), list(head.mean), list(head.std))
    ours = (tuple(scene.image_size), list(scene.mean), list(scene.std))
    if theirs != ours:
        raise ValueError(
            f"the classifier {head.title} reads images of size, mean and std {theirs}, the backbone {ours}; "
            "give target=contrast, or probe the backbone again at its own image size"
        )
    return head


def needs_classifier(settings: Any) -> bool:
    """Whether a look with these settings asks whether there is a classifier."""
    return not _is_free(str(settings.target)) if "target" in settings else settings.layer in (None, "logits")


def _is_free(wanted: str) -> bool:
    """Whether a target is read from the features alone."""
    return wanted in FREE or DIMENSION.fullmatch(wanted) is not None


def make_target(scene: Scene, shown: Shown, wanted: Any, *, setting: str, gradient: bool) -> Target:
    """What `wanted`, one of TARGETS or the number of a class, means for these images.

    `auto` is the logit of the predicted class where there is a classifier, and else `contrast` where a `gradient` is
    needed and `similarity` where not. `setting` is what the user typed it as. Raises ValueError for what this
    checkpoint or these images do not have.
    """
    wanted = str(wanted)
    if _is_free(wanted):
        return _feature_target(scene, shown, wanted, setting=setting, gradient=gradient)
    head = head_of(scene)
    if head is None and wanted == "auto":
        return _feature_target(
            scene, shown, "contrast" if gradient else "similarity", setting=setting, gradient=gradient
        )
    if head is None:
        raise ValueError(
            f"{setting}={wanted} needs a classifier, and this checkpoint has none; probe it first "
            "(python -m eval.linear_probe ckpt=...), or give one of similarity, contrast, norm, feature_<number>"
        )
    with torch.no_grad():
        logits = torch.cat([head.model(part) for part in shown.image.split(scene.config.batch_size)])  # (B, classes)
        predicted = logits.argmax(1)  # (B,)
    kind = "predicted" if wanted == "auto" else wanted
    numbers = _class_numbers(kind, predicted.tolist(), shown, head.classes, setting)
    classes = torch.tensor(numbers, device=shown.image.device)  # (B,)
    words = {"predicted": "the predicted class", "label": "the true class"}.get(
        kind, f"class {head.classes[numbers[0]]}"
    )
    assert head.network is not None
    return Target(
        score=class_scores(head.model, classes),
        network=head.network,
        run=head.model,
        kind=kind,
        meaning=f"logit of {words}",
        names=[head.classes[number] for number in numbers],
        classes=numbers,
    )


def _feature_target(scene: Scene, shown: Shown, wanted: str, *, setting: str, gradient: bool) -> Target:
    features = features_of(scene)
    if wanted == "similarity":
        if gradient:
            raise ValueError(
                f"{setting}=similarity has no gradient: the features are as similar to themselves as can be; "
                f"give contrast (how far they are from those of a blank image), norm or feature_<number>"
            )
        score = similarity_scores(features, shown.image, batch_size=scene.config.batch_size)
        meaning = "cosine similarity to the features of the whole image"
    elif wanted == "contrast":
        score, meaning = contrast_scores(features, shown.image), "distance of the features from a blank image's"
    elif wanted == "norm":
        score, meaning = norm_scores(features), "length of the features"
    else:
        number = int(wanted.removeprefix("feature_"))
        with torch.no_grad():
            dim = features(shown.image[:1]).shape[1]
        if number >= dim:
            raise ValueError(f"{setting}={wanted}: the features have {dim} dimensions, feature_0 to feature_{dim - 1}")
        score, meaning = dimension_scores(features, number), f"dimension {number} of the features"
    return Target(score, scene.backbone, features, wanted, meaning, [""] * len(shown.image))


def _class_numbers(kind: str, predicted: list[int], shown: Shown, classes: list[str], setting: str) -> list[int]:
    """The class that is explained of each image."""
    if kind == "predicted":
        return predicted
    if kind == "label":
        truths = [shown.truth(number) for number in range(len(predicted))]
        missing = [shown.names[number] for number, truth in enumerate(truths) if truth not in classes]
        if missing:
            raise ValueError(
                f"{setting}=label needs the true class of every image, and {len(missing)} have none that the "
                f"classifier knows, such as {missing[0]}; give {setting}=predicted"
            )
        return [classes.index(truth) for truth in truths if truth is not None]
    if kind in classes:
        return [classes.index(kind)] * len(predicted)
    if kind.isdigit() and int(kind) < len(classes):
        return [int(kind)] * len(predicted)
    some = ", ".join(classes[:10]) + (f", ... ({len(classes)} classes)" if len(classes) > 10 else "")
    raise ValueError(f"{setting}={kind} is not known; allowed: {TARGETS}; the classes are {some}")
