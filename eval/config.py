"""Typed schemas of what the evaluation commands take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ssl.config import Device, ModelConfig, Precision


@dataclass
class EvalDataConfig:
    """A data yaml; null: as in the checkpoint."""

    name: str = MISSING  # a file of conf/data; checkpoint: what it was pretrained on
    root: str | None = MISSING  # where it lies now
    source: dict[str, Any] | None = None  # what reads the images: `_target_` and its arguments
    limit: int | None = None  # use so many images of train
    image_size: Any = None  # pixels, or [height, width]; null: the checkpoint's
    channels: int | None = None  # of the images; others are converted
    mean: list[float] | None = None  # per channel; a checkpoint brings its own
    std: list[float] | None = None  # per channel; a checkpoint brings its own
    max_bad_fraction: float | None = None  # of images that cannot be decoded, beyond which it ends
    in_memory_gib: float | None = None  # sets that are smaller as uint8 are held in memory


@dataclass
class EvalConfig:
    """What every evaluation takes."""

    ckpt: str | None = None  # a run folder, a checkpoint in it, an export, timm:<name>, a file, `random` or `pixels`
    model: ModelConfig | None = None  # with ckpt=random, or a file of another project's weights
    data: EvalDataConfig = MISSING
    seed: int = 0  # of what is drawn: samples, held-out images, first weights
    device: Device = Device.auto  # auto: the GPU where there is one
    precision: Precision = (
        Precision.auto
    )  # of the backbone; auto: bf16 where the hardware computes in it, else fp16 on a GPU, fp32 on a CPU
    pooling: str = "model"  # what timm's classifier would read; token patches token_patches (ViT), grid (convnet)
    batch_size: int = 256  # images that the backbone takes at once
    threads: int | None = None  # null: the cores that this process may use
    out: str | None = None  # folder of the JSON; null: <run folder>/eval
    name: str | None = None  # of the JSON; null: the command's, with _<data> where it is not the checkpoint's own


def register(schema: type) -> None:
    """Make a command's schema known to Hydra, under the name that its yaml's defaults begin with: `KnnConfig` is
    `knn_schema`.
    """
    name = "".join("_" + c.lower() if c.isupper() else c for c in schema.__name__.removesuffix("Config")).strip("_")
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
