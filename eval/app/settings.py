"""What `python -m eval.app` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from eval.config import EvalDataConfig
from ssl.config import Device, ModelConfig, Precision


@dataclass
class AppConfig:
    """What `python -m eval.app` takes: what the page shows, and whom it serves."""

    ckpt: str | None = None  # a run folder, a checkpoint in it, an export, timm:<name>, a file, or `random`
    model: ModelConfig | None = None  # with ckpt=random, or a file of another project's weights
    data: EvalDataConfig = MISSING
    sample: int = 2000  # images of train that neighbours are looked for among; as many as there are, or more: all
    neighbours: int = 12  # shown for an image
    k: int | None = None  # neighbours that vote on the class where no head names it; null: 20
    top: int = 5  # classes named, at most all
    head: str | None = None  # folder of a probed head; null: the checkpoint's own, where it has one
    images: Any = None  # files offered as examples instead of some of the data's: a file, a folder, a glob, or a list
    indices: list[int] | None = None  # images of `split` that are offered
    num_images: int = 8  # offered of a seeded sample of `split`, where neither images nor indices are given
    split: str | None = None  # train or test; null: test where the data have one
    host: str = "127.0.0.1"  # 0.0.0.0: whoever can reach this machine may use the page
    port: int = 8000  # 0: any that is free
    names: list[str] = field(default_factory=list)  # further names that browsers reach the server by, as of a proxy
    max_upload_mib: float = 20.0  # of an image's file
    max_megapixels: float = 50.0  # of an image, by its header
    queue: int = 8  # requests that wait for the model; more are asked to come again
    seconds: float = 60.0  # that a request may take
    trust: list[str] = field(default_factory=list)  # packages whose methods a checkpoint may name, beside ssl.methods
    seed: int = 0  # of what is drawn: the sample, masks
    device: Device = Device.auto  # auto: the GPU where there is one
    precision: Precision = Precision.fp32  # of features; gradients and maps are always of fp32
    pooling: str = "model"  # as in the evaluations
    batch_size: int = 64  # images that the backbone takes at once
    threads: int | None = None  # null: the cores that this process may use
