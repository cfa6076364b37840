"""The families that no maintained library has; importing this module registers them with timm."""

from __future__ import annotations

import sys
from pathlib import Path

import timm

from ssl.models import bn_inception, cbam_resnet, effnet, hardnet, shufflenet_v1

__all__ = ["bn_inception", "cbam_resnet", "effnet", "hardnet", "shufflenet_v1"]


def family_file(architecture: str) -> Path | None:
    """The file of ours that builds an architecture, which needs torch and timm alone; None where timm builds it."""
    if not timm.is_model(architecture):
        return None
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    is_ours = module.__name__.rpartition(".")[0] == __package__
    return Path(str(module.__file__)) if is_ours else None
