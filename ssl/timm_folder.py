"""config.json of a folder that timm loads: `timm.create_model("local-dir:<folder>", pretrained=True)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssl.models.backbones import BackboneSpec


def timm_config(
    spec: BackboneSpec,
    *,
    mean: list[float],
    std: list[float],
    classes: Sequence[str] | None = None,
    multi_label: bool = False,
) -> dict[str, Any]:
    """config.json as timm reads it, with `classes` where the weights hold timm's classifier of them.

    `ssl_backbone` and `ssl_classifier` are ours: timm passes over them. A ResNet with a small stem is none that timm
    builds, so its architecture bears a name that timm refuses; under its own, a deep stem would load and compute
    something else.
    """
    height, width = spec.image_size
    num_classes = len(classes) if classes is not None else 0
    config = {
        "architecture": spec.architecture if spec.stem == "standard" else f"{spec.architecture}_{spec.stem}_stem",
        "num_classes": num_classes,
        "model_args": {**spec.model_args, "in_chans": spec.in_chans},
        "pretrained_cfg": {
            "input_size": [spec.in_chans, height, width],
            "mean": mean,
            "std": std,
            "interpolation": "bicubic",
            "num_classes": num_classes,
        },
        "ssl_backbone": spec.to_dict(),
    }
    if classes is not None:
        config["label_names"] = list(classes)
        config["ssl_classifier"] = {"classes": list(classes), "multi_label": multi_label}
    return config
