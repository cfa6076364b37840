"""Typed schemas of what the evaluation commands take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from ssl.config import Device, ModelConfig, Precision


@dataclass
class EvalDataConfig:
    """A data yaml; null: as in the checkpoint."""

    name: str = MISSING
    root: str | None = MISSING
    source: dict[str, Any] | None = None
    limit: int | None = None
    image_size: Any = None
    channels: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    max_bad_fraction: float | None = None
    in_memory_gib: float | None = None


@dataclass
class EvalConfig:
    """What every evaluation takes."""

    ckpt: str | None = None  # a run folder, a checkpoint inside it, an export, `random` or `pixels`
    model: ModelConfig | None = None  # with ckpt=random
    data: EvalDataConfig = MISSING
    seed: int = 0
    device: Device = Device.auto
    precision: Precision = Precision.auto
    pooling: str = "model"  # model: what timm's classifier would read; patches: the mean of a ViT's patch tokens
    batch_size: int = 256  # images that the backbone takes at once
    threads: int | None = None  # null: the cores that this process may use
    out: str | None = None  # folder of the JSON; null: <run folder>/eval
    name: str | None = None  # of the JSON; null: the command's, with _<data> where it is not the checkpoint's own


@dataclass
class KnnConfig(EvalConfig):
    """`python -m eval.knn`."""

    k: list[int] = field(default_factory=lambda: [20])
    temperature: list[float] = field(default_factory=lambda: [0.07])
    metric: str = "cosine"
    center: bool | None = None
    index: str = "auto"


@dataclass
class LinearProbeConfig(EvalConfig):
    """`python -m eval.linear_probe`."""

    lr: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    held_out: float = 0.1
    steps: int = 2000
    probe_batch_size: int = 512
    retrain: bool = True


def register_schemas() -> None:
    """Make the schemas known to Hydra, for `conf/knn.yaml` and `conf/linear_probe.yaml`."""
    store = ConfigStore.instance()
    store.store(name="knn_schema", node=KnnConfig)
    store.store(name="linear_probe_schema", node=LinearProbeConfig)
