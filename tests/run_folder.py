"""A run folder with one checkpoint, as pretraining writes it, for tests; and image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from ssl import checkpoint
from ssl.config import CONF
from ssl.data.embedded import Embedded
from ssl.methods.base import Method
from ssl.models.backbones import build_backbone


def write_run(
    run_dir: Path,
    *,
    seed: int = 0,
    step: int = 12,
    image_size: tuple[int, int] = (32, 32),
    num_train: int = 120,
    num_test: int = 36,
) -> Path:
    """An untrained ResNet of 16 features, of which a run on the embedded images says that it made it."""
    torch.manual_seed(seed)
    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    backbone, spec = build_backbone("resnet18", image_size=image_size, model_args=args)
    method = Method()
    method.backbone = backbone
    data = OmegaConf.load(f"{CONF}/data/embedded.yaml")
    data.source.num_train, data.source.num_test = num_train, num_test
    checkpoint.save(
        run_dir,
        step=step,
        method=method,
        spec=spec,
        optimizer_tensors={},
        ema=None,
        config_yaml=OmegaConf.to_yaml({"data": data, "seed": 0, "method": {"_target_": "ssl.methods.simclr.SimCLR"}}),
        state={"epoch": 1.0},
        mean=list(data.mean),
        std=list(data.std),
    )
    return run_dir


def write_images(root: Path, *folders: str, each: int = 3, size: int = 32) -> Path:
    """`each` PNG files of embedded pictures in each of `folders` below `root`."""
    source = Embedded("train", size=size, num_train=each * len(folders))
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for place in range(each):
            Image.fromarray(np.asarray(source.read(number * each + place))).save(root / folder / f"{place}.png")
    return root
