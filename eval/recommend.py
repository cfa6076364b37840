"""Which layers of a pretrained backbone to train on new images: from what was measured to a choice with reasons.

The table is that of the notes on transfer learning of Stanford's CS231n (size of the set against similarity to the
pretraining data); they give no numbers. The bounds here are choices, named where they are used in every answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eval.quick_probe import Difference

Train = Literal["head", "stages", "all"]
Distance = Literal["near", "between", "far"]
Size = Literal["few", "some", "many"]

FEW, MANY = 100, 500
"""Images per class."""
NEAR, FAR = 0.05, 0.25
"""Of the way from the pretraining images to random pixels."""
ERRORS = 2.0
"""A difference counts from so many standard errors on."""
LEAST_DIFFERENCE = 0.01
"""And from so much top-1 on."""
CEILING = 0.98
MARGIN = 1.5
"""A size within this factor of a bound is a close call."""
IMBALANCE = 10.0

TABLE: dict[Distance, dict[Size, Train]] = {
    "near": {"few": "head", "some": "stages", "many": "all"},
    "between": {"few": "head", "some": "stages", "many": "all"},
    "far": {"few": "stages", "some": "all", "many": "all"},
}
SAID: dict[Train, str] = {"head": "the last layer", "stages": "the last stages", "all": "everything"}


@dataclass(frozen=True)
class Evidence:
    """What was measured. `distance` and its error are None where the pretraining images are not known or not there.

    `last` is the held-out top-1 of the last layer with its error, `best_earlier` how much more the best earlier layer
    `earlier_layer` gets right than it, `gain` how much more the last layer gets right than that of the same backbone
    untrained. `in_pretraining`: the images are the very ones of pretraining. `chance` is the share of the largest class
    in what was read, `dimensions` those of the last layer, `distance_images` what the distance was taken between.
    """

    images_per_class: float
    smallest: int
    largest: int
    last: Difference
    train_top1: float
    gain: Difference
    distance: Difference | None = None
    in_pretraining: bool = False
    best_earlier: Difference | None = None
    earlier_layer: str | None = None
    signs_of_collapse: list[str] = field(default_factory=list)
    chance: float = 0.0
    dimensions: int = 0
    distance_images: int = 0


@dataclass(frozen=True)
class Advice:
    """What to train, how sure that is (`high`, `medium` or `low`), why, and what speaks for doubt.

    `else_` is what comes next where it is a close call.
    """

    train: Train
    confidence: str
    reasons: list[str]
    doubts: list[str]
    else_: Train | None = None


def recommend(evidence: Evidence) -> Advice:
    """The choice for `evidence`; the same for every choice of a bound within the noise, or it is called close."""
    where, why = _place(evidence)
    if evidence.last.value - evidence.last.error >= CEILING:
        chosen: Train = "head"
        why = [f"a linear head on the last layer names {evidence.last.value:.1%} of held-out images right already"]
        others: list[tuple[Train, str]] = []
    else:
        chosen = TABLE[where][_size(evidence.images_per_class)]
        why = [_said_size(evidence), *why]
        others = [each for each in _neighbours(evidence, where) if each[0] != chosen]
    doubts = [f"close call: {text}, it would be {SAID[other]}" for other, text in others] + _doubts(evidence, where)
    confidence = ("high", "medium", "low")[min(len(doubts), 2)]
    return Advice(chosen, confidence, why, doubts, others[0][0] if others else None)


def rules() -> dict[str, float]:
    """The bounds, for the protocol."""
    return {
        "few_below_per_class": FEW,
        "many_from_per_class": MANY,
        "near_below": NEAR,
        "far_from": FAR,
        "standard_errors": ERRORS,
        "least_difference": LEAST_DIFFERENCE,
        "ceiling": CEILING,
        "close_call_factor": MARGIN,
        "imbalance": IMBALANCE,
    }


def _size(images_per_class: float) -> Size:
    return "few" if images_per_class < FEW else ("many" if images_per_class >= MANY else "some")


def _said_size(evidence: Evidence) -> str:
    size = _size(evidence.images_per_class)
    bound = {"few": f"below {FEW}", "some": f"{FEW} to {MANY}", "many": f"{MANY} or more"}[size]
    return f"{size} images: {evidence.images_per_class:,.0f} per class ({size}: {bound})"


def _place(evidence: Evidence) -> tuple[Distance, list[str]]:
    """How near the images are to those of pretraining for what is asked of them, and why."""
    spoilt = _spoilt(evidence)
    if spoilt is not None:
        return "far", [spoilt]
    if evidence.in_pretraining:
        return "near", ["the images are those of pretraining"]
    if evidence.distance is None:
        if _stands_out(evidence.gain):
            return "between", [f"pretraining helps: {_points(evidence.gain)} above the same backbone untrained"]
        return "far", [_no_gain(evidence.gain)]
    at = max(evidence.distance.value, 0.0)  # below: nearer than two halves, as where images are shared
    said = f"{at:.0%} of the way from the pretraining images to random pixels"
    if at < NEAR:
        return "near", [f"near: {said} (near: below {NEAR:.0%})"]
    if at < FAR:
        return "between", [f"neither near nor far: {said} (near: below {NEAR:.0%}, far: from {FAR:.0%})"]
    return "far", [f"far: {said} (far: from {FAR:.0%})"]


def _spoilt(evidence: Evidence) -> str | None:
    """Why the last layer is not made for the images, however near they are to those of pretraining."""
    if evidence.signs_of_collapse:
        return f"the last layer looks collapsed: {evidence.signs_of_collapse[0]}"
    if _harmful(evidence):
        return f"pretraining does harm: {_points(evidence.gain)} beside the same backbone untrained"
    above = Difference(evidence.last.value - evidence.chance, evidence.last.error)
    if not _stands_out(above):
        return (
            f"the last layer names {evidence.last.value:.1%} of held-out images right, which is no better than chance: "
            f"the largest class has {evidence.chance:.1%}"
        )
    if _stands_out(evidence.best_earlier):
        return (
            f"layer {evidence.earlier_layer} serves better than the last one, by {_points(evidence.best_earlier)}: "
            "what lies behind it is made for something else"
        )
    return None


def _harmful(evidence: Evidence) -> bool:
    """Whether the same backbone untrained gets more right, beyond noise."""
    return _stands_out(Difference(-evidence.gain.value, evidence.gain.error))


def _no_gain(gain: Difference) -> str:
    return f"pretraining makes no difference here that counts: {_points(gain)} beside the same backbone untrained"


def _neighbours(evidence: Evidence, where: Distance) -> list[tuple[Train, str]]:
    """What the choice would be with a bound passed within the noise, and which."""
    size = _size(evidence.images_per_class)
    others: list[tuple[Train, str]] = [
        (TABLE[where][_size(evidence.images_per_class * factor)], text)
        for factor, text in (
            (MARGIN, f"with {MARGIN} times the images"),
            (1 / MARGIN, f"with {1 / MARGIN:.0%} of them"),
        )
    ]
    distance = evidence.distance
    if distance is not None and _placed_by_distance(evidence):
        for sign, text in ((1, "further away"), (-1, "nearer")):
            at = distance.value + sign * ERRORS * distance.error
            place: Distance = "near" if at < NEAR else ("between" if at < FAR else "far")
            others.append((TABLE[place][size], f"were the images {text} by the noise of that distance"))
    best = evidence.best_earlier
    if best is not None and where != "far" and best.value > max(best.error, LEAST_DIFFERENCE):
        others.append((TABLE["far"][size], f"were layer {evidence.earlier_layer} really better ({_points(best)})"))
    return others


def _placed_by_distance(evidence: Evidence) -> bool:
    return evidence.distance is not None and not evidence.in_pretraining and _spoilt(evidence) is None


def _doubts(evidence: Evidence, where: Distance) -> list[str]:
    doubts = []
    if evidence.distance is None and not evidence.in_pretraining:
        doubts.append("how near the images are to those of pretraining could not be measured")
    if _placed_by_distance(evidence) and evidence.distance_images < evidence.dimensions:
        doubts.append(
            f"a Frechet distance between {evidence.distance_images:,} images in {evidence.dimensions:,} dimensions is "
            f"biased: where there are more images, give similarity_sample={evidence.dimensions} or more"
        )
    if where == "far" and _size(evidence.images_per_class) == "few":
        doubts += [
            "few images far from pretraining: too few to train much of the backbone",
            "and its last layers, which few images would do for, were not made for them",
        ]
    if evidence.last.error > 0.03:
        doubts.append(f"the held-out top-1 is known to +- {100 * evidence.last.error:.1f} points only")
    if evidence.largest > IMBALANCE * max(evidence.smallest, 1):
        doubts.append(
            f"the largest class has {evidence.largest:,} images, the smallest {evidence.smallest:,}: mean and "
            "top-1 say little of the small ones"
        )
    if evidence.signs_of_collapse:
        doubts.append("a collapsed backbone is a poor start for any of the three: see python -m eval.health")
    near = evidence.in_pretraining or (evidence.distance is not None and evidence.distance.value < NEAR)
    if near and where == "far":
        doubts.append("the images are near those of pretraining, and yet the last layer serves them badly")
    if _harmful(evidence):
        doubts.append("untrained weights may be the better start: python -m eval.finetune ckpt=random model=<preset>")
    elif where != "far" and not _stands_out(evidence.gain):
        doubts.append(_no_gain(evidence.gain))
    if _size(evidence.images_per_class) == "many" and evidence.train_top1 - evidence.last.value > 0.2:
        doubts.append(
            f"even a linear head knows {evidence.train_top1:.0%} of what it was trained on and "
            f"{evidence.last.value:.0%} of the rest: labels are scarcer than their number says"
        )
    return doubts


def _stands_out(difference: Difference | None) -> bool:
    """Whether it is beyond noise, and large enough to matter."""
    return difference is not None and difference.value > max(ERRORS * difference.error, LEAST_DIFFERENCE)


def _points(difference: Difference | None) -> str:
    assert difference is not None
    return f"{100 * difference.value:+.1f} +- {100 * difference.error:.1f} points"
