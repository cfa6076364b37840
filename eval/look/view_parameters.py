"""What was done to an image to make a view of it: the drawn parameters as JSON values, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ssl.data.policies import OPERATIONS
from ssl.data.views import JITTER_OPERATIONS, View

Box = tuple[int, int, int, int]
"""Top, left, height, width."""


def drawn_values(view: View, drawn: Mapping[str, np.ndarray], *, source_size: tuple[int, int]) -> dict[str, Any]:
    """One image's row of what `View.sample` drew, as JSON values, in the order in which it is done.

    `box` and `area`, its share of the image of `source_size` (h, w), and `flip` are always there; the other parts where
    the view has them, null where this image was left out. Of colour jitter the factors stand in the order of use.
    """
    top, left, height, width = (int(side) for side in drawn["box"])
    values: dict[str, Any] = {
        "box": {"top": top, "left": left, "height": height, "width": width},
        "area": height * width / (source_size[0] * source_size[1]),
        "flip": bool(drawn["flip"]) or bool(drawn.get("policy_flip", False)),
    }
    if view.policy is not None:
        values["policy"] = [
            {"operation": OPERATIONS[int(operation)], "argument": float(argument)}
            for operation, argument in zip(drawn["policy_op"], drawn["policy_argument"])
            if operation >= 0
        ]
    if view.jitter:
        names = [JITTER_OPERATIONS[int(place)] for place in drawn["jitter_order"]]
        factors = {name: float(drawn[name]) for name in names if name in drawn}
        values["jitter"] = factors if bool(drawn["jitter"]) else None
    if view.grayscale:
        values["grayscale"] = bool(drawn["grayscale"])
    if view.blur:
        values["blur_sigma"] = float(drawn["blur_sigma"]) if bool(drawn["blur"]) else None
    if view.solarize:
        values["solarize_threshold"] = float(view.solarize_threshold) if bool(drawn["solarize"]) else None
    if view.erase:
        boxes = [[int(side) for side in box] for box in drawn["erase_box"]]
        values["erased"] = [box for box in boxes if box[2] * box[3]]
    return values


def in_words(values: Mapping[str, Any]) -> list[str]:
    """What `drawn_values` returned, a part per entry: the crop always, the others where they were done."""
    box = values["box"]
    said = [f"crop {box['height']}×{box['width']} at {box['top']}, {box['left']}: {values['area']:.0%} of it"]
    if values["flip"]:
        said.append("flipped")
    if values.get("policy"):
        said.append(", ".join(f"{each['operation']} {each['argument']:.3g}" for each in values["policy"]))
    if values.get("jitter"):
        said.append(", ".join(_factor(name, factor) for name, factor in values["jitter"].items()))
    if values.get("grayscale"):
        said.append("gray")
    if values.get("blur_sigma") is not None:
        said.append(f"blur of {values['blur_sigma']:.2f} pixels")
    if values.get("solarize_threshold") is not None:
        said.append(f"inverted from {values['solarize_threshold']:.0f} on")
    if values.get("erased"):
        count = len(values["erased"])
        said.append(f"{count} box{'es' * (count > 1)} erased")
    return said


def _factor(name: str, factor: float) -> str:
    return f"hue {factor:+.2f}" if name == "hue" else f"{name} ×{factor:.2f}"
