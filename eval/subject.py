"""What is judged: a checkpoint's backbone, an untrained one or raw pixels; and its features of two splits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from eval.extract import PIXEL_SIDE, Extract, Features, backbone_features, centre_view, extract_features, raw_pixels
from eval.results import environment, open_folder
from eval.splits import Splits, data_settings, make_splits
from ssl.checkpoint import LoadedBackbone, load_backbone
from ssl.config import plain
from ssl.data.augment import Augment
from ssl.data.image_size import choose_image_size
from ssl.data.loader import Loader
from ssl.data.sources import Source
from ssl.models.backbones import build_backbone
from ssl.trainer import choose_dtype, dtype_name

BASELINES = ("random", "pixels")


@dataclass(frozen=True)
class Subject:
    """What makes features of images, and what it wants them to be."""

    extract: Extract
    image_size: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]
    identity: dict[str, Any]
    title: str
    folder: Path
    """Where its results lie."""


@dataclass(frozen=True)
class Judged:
    """Features of both splits with labels in 0..len(classes)-1, and the protocol so far."""

    train: Features
    test: Features
    splits: Splits
    subject: Subject
    folder: Path
    name: str
    device: torch.device
    protocol: dict[str, Any]
    notes: list[str]


def read_features(config: DictConfig, *, command: str) -> Judged:
    """Load what `ckpt=` names and read the features of its data's train and test split, or of another `data=`.

    Raises ValueError and OSError, with what to do, before the first image is read where the two do not go together.
    """
    ckpt = config.ckpt
    given = plain(config.data)
    device = choose_device(config.device.name)
    dtype = choose_dtype(config.precision.name, device)
    _check_model(config)
    _check_pooling(config)

    loaded = None if ckpt in BASELINES else load_backbone(ckpt)
    own = given["name"] == "checkpoint" and loaded is not None
    data = data_settings(given, loaded.config.get("data", {}) if loaded else None, subject=ckpt)
    seed = int(loaded.config.get("seed", 0)) if own and loaded else int(config.seed)  # the limit picks the run's images
    splits = make_splits(data, own=own, seed=seed, command=command)
    subject = make_subject(config, loaded, splits.train, data=data, device=device, dtype=dtype)
    folder = open_folder(Path(config.out).expanduser() if config.out else subject.folder / "eval")
    other = "" if own or loaded is None else f"_{data['name']}"
    if config.pooling != "model":
        other += f"_{config.pooling}"

    began = time.perf_counter()
    features = {}
    for title, source in (("train", splits.train), ("test", splits.test)):
        with make_loader(source, subject, data=data, config=config, device=device) as loader:
            augment = Augment(loader.views, mean=subject.mean, std=subject.std).to(device)
            features[title] = extract_features(
                subject.extract, loader, augment, batch_size=config.batch_size, device=device, title=title
            )
    train, test = features["train"], features["test"]
    test = Features(test.features, torch.from_numpy(splits.test_classes)[test.labels], test.index, test.num_bad)
    notes = list(splits.notes)
    for title, part in features.items():
        if part.num_bad:
            notes.append(f"{part.num_bad} images of {title} could not be decoded and are left out")

    view = centre_view(subject.image_size)
    protocol = {
        "command": command,
        "subject": subject.title,
        **subject.identity,
        "features": {
            "dimensions": train.features.shape[1],
            "precision": "fp32" if ckpt == "pixels" else dtype_name(dtype),
            "crop": view.crop,
            "crop_fraction": view.fraction,
            "interpolation": view.interpolation,
            "image_size": list(subject.image_size),
            "channels": subject.channels,
            "mean": subject.mean,
            "std": subject.std,
        },
        "data": {
            "name": data["name"],
            "root": data.get("root"),
            "pretrained_on_it": own,
            "train": splits.train.name,
            "test": splits.test.name,
            "test_split": splits.test_split,
            "num_train": len(train.features),
            "num_test": len(test.features),
            "num_undecodable": train.num_bad + test.num_bad,
            "num_classes": len(splits.classes),
            "classes": splits.classes,
        },
        "seed": config.seed,
        "device": str(device),
        "feature_seconds": round(time.perf_counter() - began, 2),
        **environment(),
    }
    name = config.name or command.removeprefix("eval.") + other
    return Judged(train, test, splits, subject, folder, name, device, protocol, notes)


def make_subject(
    config: DictConfig,
    loaded: LoadedBackbone | None,
    train: Source,
    *,
    data: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Subject:
    """The checkpoint's backbone, or the baseline that `ckpt=` names."""
    if loaded is not None:
        checkpoint = {
            "path": str(loaded.path),
            "sha256": loaded.hash,
            "step": loaded.step,
            "weights": loaded.weights,
            "method": str((loaded.config.get("method") or {}).get("_target_", "")).rpartition(".")[2] or None,
            "pretraining_data": (loaded.config.get("data") or {}).get("name"),
            "pretraining_seed": loaded.config.get("seed"),
        }
        return Subject(
            extract=backbone_features(loaded.model, device=device, dtype=dtype, pooling=config.pooling),
            image_size=loaded.spec.image_size,
            channels=loaded.spec.in_chans,
            mean=loaded.mean,
            std=loaded.std,
            identity={
                "checkpoint": checkpoint,
                "backbone": loaded.spec.to_dict(),
                "pooling": pooling(loaded.model, config.pooling),
            },
            title=str(loaded.path),
            folder=loaded.run_dir,
        )
    size = choose_image_size(data.get("image_size"), train)
    channels, mean, std = int(data["channels"]), list(data["mean"]), list(data["std"])
    runs = Path("runs")
    if config.ckpt == "pixels":
        size = (min(size[0], PIXEL_SIDE), min(size[1], PIXEL_SIDE))
        identity = {"checkpoint": None, "backbone": None, "pooling": None}
        folder = runs / f"pixels_{data['name']}"
        return Subject(raw_pixels, size, channels, mean, std, identity, f"raw pixels {size[0]}x{size[1]}", folder)
    torch.manual_seed(config.seed)  # as ssl.pretrain does, so that this is where a run of the same seed starts
    model, spec = build_backbone(
        config.model.name,
        image_size=size,
        in_chans=channels,
        patch_size=config.model.patch_size,
        stem=config.model.stem.name,
        drop_path=config.model.drop_path,
        model_args=plain(config.model.args),
    )
    return Subject(
        extract=backbone_features(model, device=device, dtype=dtype, pooling=config.pooling),
        image_size=size,
        channels=channels,
        mean=mean,
        std=std,
        identity={"checkpoint": None, "backbone": spec.to_dict(), "pooling": pooling(model, config.pooling)},
        title=f"untrained {config.model.name}",
        folder=runs / f"random_{config.model.name}_{data['name']}" / f"seed{config.seed}",
    )


def make_loader(
    source: Source, subject: Subject, *, data: dict[str, Any], config: DictConfig, device: torch.device
) -> Loader:
    """The central view of every image of `source`, sized as the subject wants it."""
    return Loader(
        source,
        [centre_view(subject.image_size)],
        size=subject.image_size,
        channels=subject.channels,
        seed=0,  # the central view draws nothing
        threads=config.threads,
        in_memory_gib=0.0,  # each image is read once
        max_bad_fraction=data["max_bad_fraction"],
        pin_memory=device.type == "cuda",
    )


def pooling(model: torch.nn.Module, chosen: str) -> str | None:
    """`patches` where that was chosen, else how timm pools the last layer: `avg`, `token`..."""
    if chosen != "model":
        return chosen
    pool = getattr(model, "global_pool", None)
    return pool if isinstance(pool, str) else getattr(pool, "pool_type", None)


def choose_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU here; give device=cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _check_model(config: DictConfig) -> None:
    if config.ckpt == "random" and config.model is None:
        raise ValueError("ckpt=random needs a backbone: give model=, such as ckpt=random model=resnet18")
    if config.ckpt != "random" and config.model is not None:
        raise ValueError(
            f"model= has no effect with ckpt={config.ckpt}, which brings its own; leave it out, or give ckpt=random"
        )


def _check_pooling(config: DictConfig) -> None:
    if config.ckpt == "pixels" and config.pooling != "model":
        raise ValueError(f"pooling={config.pooling} has no effect with ckpt=pixels; leave it out")
