"""What is judged: a checkpoint's backbone, an untrained one or raw pixels; and its features of two splits."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from eval.bank import FeatureStore
from eval.config import EvalConfig
from eval.extract import PIXEL_SIDE, Features, centre_view, extract_all, raw_pixels
from eval.layers import GRID_DIM, ExtractSets, FeatureSet, as_list, make_extract, parse_sets, resolve_sets
from eval.results import environment, open_folder
from eval.splits import Splits, data_settings, make_splits
from eval.untrained import untrained_folder, untrained_title
from ssl.checkpoint import LoadedBackbone, load_backbone
from ssl.command import swept_words
from ssl.config import plain
from ssl.data.augment import Augment
from ssl.data.image_size import as_size, choose_image_size
from ssl.data.loader import Loader
from ssl.data.sources import SPLITS, Source
from ssl.models.backbones import build_backbone, model_name
from ssl.models.initialize import initialize
from ssl.trainer import choose_dtype, dtype_name

BASELINES = ("random", "pixels")
_shared: dict[str, tuple[dict[str, Features], dict[str, dict[str, float]]]] | None = None  # within features_shared()


@dataclass(frozen=True)
class Subject:
    """What makes features of images, and what it wants them to be."""

    model: nn.Module | None
    """The backbone; None for raw pixels."""
    sets: list[FeatureSet]
    """The vectors that `layers=` and `pooling=` name, as this backbone has them."""
    image_size: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]
    identity: dict[str, Any]
    title: str
    folder: Path
    """Where its results lie."""
    notes: list[str] = field(default_factory=list)
    """What was inferred or resampled when it was loaded."""

    def extract(self, sets: Sequence[FeatureSet], *, device: torch.device, dtype: torch.dtype) -> ExtractSets:
        """The function from normalised images to a vector of each set."""
        if self.model is None:
            return lambda image: [raw_pixels(image) for _ in sets]
        return make_extract(self.model, sets, device=device, dtype=dtype)


@dataclass(frozen=True)
class Judged:
    """What is judged on which labelled images. A split's features are read when they are first asked for, and kept.

    Labels of both splits lie in 0..len(splits.classes)-1, or are multi-hot (N, C).
    """

    splits: Splits
    subject: Subject
    folder: Path
    name: str
    device: torch.device
    about: dict[str, Any]
    """The protocol, but for what is only known when images have been read."""
    read_source: Callable[[Source, str, Sequence[FeatureSet]], list[Features]]
    data: dict[str, Any]
    """The settings of the data, without what nobody gave."""
    kept: dict[str, Features] = field(default_factory=dict)
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each split that was read: images, undecodable ones, seconds."""

    @property
    def train(self) -> Features:
        """Features of the train split, of the first set."""
        return self._first_set("train")

    @property
    def test(self) -> Features:
        """Features of the test split, of the first set."""
        return self._first_set("test")

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers must know of the data."""
        bad = [(split, int(counts["num_bad"])) for split, counts in self.counts.items()]
        lost = [f"{number} images of {split} could not be decoded and are left out" for split, number in bad if number]
        return self.subject.notes + self.splits.notes + lost

    @property
    def feature_seconds(self) -> float:
        """Time spent on reading images so far."""
        return sum(each["seconds"] for each in self.counts.values())

    @property
    def protocol(self) -> dict[str, Any]:
        """How the numbers came about, so far."""
        counts = {split: self.counts.get(split, {"num": 0, "num_bad": 0, "seconds": 0.0}) for split in SPLITS}
        data = {
            "num_train": counts["train"]["num"],
            "num_test": counts["test"]["num"],
            "num_undecodable": sum(each["num_bad"] for each in counts.values()),
            "images": self.splits.images,  # not before it is asked for: test is not touched until there is a choice
        }
        dimensions = {"dimensions": self.kept["train"].features.shape[1]} if "train" in self.kept else {}
        return {
            **self.about,
            "features": dimensions | self.about["features"],
            "data": self.about["data"] | data,
            "feature_seconds": round(self.feature_seconds, 2),
            **environment(),
        }

    def read(self, split: str, sets: Sequence[FeatureSet]) -> list[Features]:
        """Features of each set, from one pass over `train` or `test`. Only those of the first set alone are kept."""
        if list(sets) == self.subject.sets[:1] and split in self.kept:
            return [self.kept[split]]
        began = time.perf_counter()
        found = self.read_source(getattr(self.splits, split), split, sets)
        if split == "test":
            labels = self.splits.in_classes_of_train(found[0].labels)
            found = [replace(each, labels=labels) for each in found]
        seconds = self.counts.get(split, {}).get("seconds", 0.0) + time.perf_counter() - began
        self.counts[split] = {"num": len(found[0].labels), "num_bad": found[0].num_bad, "seconds": seconds}
        if list(sets) == self.subject.sets[:1]:
            self.kept[split] = found[0]
        return found

    def _first_set(self, split: str) -> Features:
        return self.read(split, self.subject.sets[:1])[0]


def read_features(config: DictConfig, *, command: str, multi_label: bool = False) -> Judged:
    """What `ckpt=` names, on the train and test split of its data or of another `data=`.

    `multi_label` tells whether the command can judge images of several classes. Raises ValueError and OSError, with
    what to do, before the first image is read where the two do not go together.
    """
    ckpt = config.ckpt
    given = plain(config.data)
    device = choose_device(config.device.name)
    dtype = choose_dtype(config.precision.name, device)
    sets = wanted_sets(config)

    loaded = load(config)
    own = given["name"] == "checkpoint" and loaded is not None
    data = data_settings(given, loaded.config.get("data", {}) if loaded else None, subject=ckpt)
    seed = int(loaded.config.get("seed", 0)) if own and loaded else int(config.seed)  # the limit picks the run's images
    splits = make_splits(data, own=own, seed=seed, command=command, multi_label=multi_label)
    subject = make_subject(config, loaded, splits.train, sets=sets, data=data)
    folder = open_folder(Path(config.out).expanduser() if config.out else subject.folder / "eval")
    other = "" if own or loaded is None else f"_{data['name']}"
    words = swept_words(without={field.name for field in fields(EvalConfig)} - {"seed", "pooling"})
    name = config.name or command.removeprefix("eval.") + other + variant(config) + (f"_{words}" if words else "")

    def read_source(source: Source, title: str, sets: Sequence[FeatureSet]) -> list[Features]:
        store = FeatureStore(folder, limit_gib=config.bank_gib) if title == "train" and "bank_gib" in config else None
        with make_loader(source, subject, data=data, config=config, device=device) as loader:
            found = extract_all(
                subject.extract(sets, device=device, dtype=dtype),
                loader,
                Augment(loader.views, mean=subject.mean, std=subject.std).to(device),
                batch_size=config.batch_size,
                device=device,
                title=title,
                limit_gib=config.get("features_gib"),
                store=store,
            )
        splits.notes.extend(store.notes if store else [])
        return found

    view = centre_view(subject.image_size)
    about = {
        "command": command,
        "subject": subject.title,
        **subject.identity,
        "features": {
            "layer": subject.sets[0].layer,
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
            "multi_label": splits.multi_label,
            "num_classes": len(splits.classes),
            "classes": splits.classes,
        },
        "seed": config.seed,
        "device": str(device),
    }
    read_by = [subject.identity, subject.title, about["features"], str(sets[0]), data, own, seed, splits.test_split]
    key = json.dumps([*read_by, config.batch_size, str(device)], default=str)
    kept, counts = ({}, {}) if _shared is None else _shared.setdefault(key, ({}, {}))
    return Judged(splits, subject, folder, name, device, about, read_source, data, kept, counts)


@contextlib.contextmanager
def features_shared() -> Iterator[None]:
    """Within it, evaluations of one subject on the same images read them once; after it, what was kept is let go."""
    global _shared
    outer, _shared = _shared, {}
    try:
        yield
    finally:
        _shared = outer


def load(config: DictConfig) -> LoadedBackbone | None:
    """The checkpoint that `ckpt=` names, for images of `data.image_size` where that is given; None for a baseline.

    Raises ValueError where `model=` does not go with it.
    """
    _check_model(config)
    if config.ckpt in BASELINES:
        return None
    data = plain(config.get("data")) or {}
    return load_backbone(config.ckpt, model=plain(config.model), image_size=as_size(data.get("image_size")))


def checkpoint_identity(loaded: LoadedBackbone) -> dict[str, Any]:
    """What a protocol says of the weights that were given: where, which, and how they were made."""
    return {
        "path": str(loaded.path),
        "sha256": loaded.hash,
        "step": loaded.step,
        "weights": loaded.weights,
        "layout": loaded.layout,
        "method": str((loaded.config.get("method") or {}).get("_target_", "")).rpartition(".")[2] or None,
        "pretraining_data": (loaded.config.get("data") or {}).get("name"),
        "pretraining_seed": loaded.config.get("seed"),
    }


def wanted_sets(config: DictConfig) -> list[FeatureSet]:
    """The vectors that `layers=` and `pooling=` name; a command without `layers` reads the last layer."""
    if config.ckpt == "pixels":
        for key in ("layers", "pooling"):
            if key in config and as_list(config[key]) not in (["last"], ["model"]):
                raise ValueError(f"{key}={config[key]} has no effect with ckpt=pixels; leave it out")
    return parse_sets(config.get("layers", "last"), config.pooling, grid_dim=config.get("grid_dim", GRID_DIM))


def variant(config: DictConfig) -> str:
    """What tells a JSON of other features, or of fewer labels, from that of the command's defaults."""
    chosen = [as_list(config.get(key, usual)) for key, usual in (("layers", "last"), ("pooling", "model"))]
    words = ["-".join(values) for values, usual in zip(chosen, ("last", "model")) if values != [usual]]
    amount = config.get("train_amount")
    if amount is not None:
        words.append(
            f"{amount}".replace(" ", "").replace("%", "percent") + ("" if "%" in str(amount) else "_per_class")
        )
    return "".join(f"_{word}" for word in words)


def make_subject(
    config: DictConfig,
    loaded: LoadedBackbone | None,
    train: Source,
    *,
    sets: Sequence[FeatureSet],
    data: dict[str, Any],
) -> Subject:
    """The checkpoint's backbone, or the baseline that `ckpt=` names."""
    if loaded is not None:
        return Subject(
            model=loaded.model,
            sets=resolve_sets(loaded.model, sets),
            image_size=loaded.spec.image_size,
            channels=loaded.spec.in_chans,
            mean=loaded.mean,
            std=loaded.std,
            identity={
                "checkpoint": checkpoint_identity(loaded),
                "backbone": loaded.spec.to_dict(),
                "pooling": pooling(loaded.model, sets),
            },
            title=str(loaded.path),
            folder=loaded.run_dir,
            notes=loaded.notes,
        )
    size = choose_image_size(data.get("image_size"), train)
    channels, mean, std = int(data["channels"]), list(data["mean"]), list(data["std"])
    if config.ckpt == "pixels":
        size = (min(size[0], PIXEL_SIDE), min(size[1], PIXEL_SIDE))
        identity = {"checkpoint": None, "backbone": None, "pooling": None}
        folder = Path("runs") / f"pixels_{data['name']}"
        return Subject(
            None, [FeatureSet()], size, channels, mean, std, identity, f"raw pixels {size[0]}x{size[1]}", folder
        )
    torch.manual_seed(config.seed)  # as ssl.pretrain does, so that this is where a run of the same seed starts
    model, spec = build_backbone(
        model_name(plain(config.model)),
        image_size=size,
        in_chans=channels,
        patch_size=config.model.patch_size,
        stem=config.model.stem.name,
        drop_path=config.model.drop_path,
        model_args=plain(config.model.args),
    )
    initialize(model, plain(config.model)["init"])
    return Subject(
        model=model,
        sets=resolve_sets(model, sets),
        image_size=size,
        channels=channels,
        mean=mean,
        std=std,
        identity={"checkpoint": None, "backbone": spec.to_dict(), "pooling": pooling(model, sets)},
        title=untrained_title(config),
        folder=untrained_folder(config, data=data["name"]),
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


def pooling(model: nn.Module, sets: Sequence[FeatureSet]) -> str | None:
    """How the last layer is pooled: what was chosen, for `model` what timm does (`avg`, `token`...)."""
    if sets[0].pooling != "model":
        return sets[0].pooling
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
    if config.ckpt == "pixels" and config.model is not None:
        raise ValueError("model= has no effect with ckpt=pixels; leave it out, or give ckpt=random")
