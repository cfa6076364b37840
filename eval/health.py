"""How healthy a backbone's features are, without labels: `python -m eval.health ckpt=runs/<run>`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from eval.collapse import ADVICE, signs_of_collapse
from eval.command import same_subject, start
from eval.config import EvalConfig
from eval.extract import centre_view
from eval.layers import ExtractSets
from eval.results import environment, open_folder, write_results
from eval.sample import USUAL_VIEW, Sample, ViewFeatures
from eval.spectra import FIT_FROM, FIT_TO, LIDAR_DELTA, LIDAR_EPSILON, RANKME_EPSILON, health, lidar
from eval.splits import data_settings
from eval.subject import Subject, choose_device, load, make_subject, variant, wanted_sets
from ssl.config import AugmentConfig, build, plain
from ssl.data.sources import UNLABELLED, Source
from ssl.data.subset import limit
from ssl.data.views import View, make_views
from ssl.trainer import choose_dtype, dtype_name

__all__ = ["HealthConfig", "health", "lidar", "run"]

VIEW_IMAGES = 1000  # Thilak et al. 2023, section 5


@dataclass
class HealthConfig(EvalConfig):
    """What `python -m eval.health` takes."""

    augment: AugmentConfig | None = None  # LiDAR's views; null: those that the checkpoint was pretrained on
    layers: Any = "last"  # last, or the number of a layer
    sample: int = 2048
    views: int = 10
    view_images: int | None = None


def run(config: DictConfig) -> dict[str, Any]:
    """Measure what `config.ckpt` names on a seeded sample of train; returns the metrics, the protocol and the path.

    Raises ValueError and OSError, with what to do, before the first image is read where the settings do not fit.
    """
    _check_settings(config)
    device = choose_device(config.device.name)
    dtype = choose_dtype(config.precision.name, device)
    given = plain(config.data)
    sets = wanted_sets(config)
    loaded = load(config)
    own = given["name"] == "checkpoint" and loaded is not None
    data = data_settings(given, loaded.config.get("data", {}) if loaded else None, subject=config.ckpt)
    seed = int(loaded.config.get("seed", 0)) if own and loaded else int(config.seed)  # the limit picks the run's images
    source = limit(_train_images(data, own=own), data.get("limit"), seed=seed)
    subject = make_subject(config, loaded, source, sets=sets, data=data)
    if len(subject.sets) > 1:
        raise ValueError(f"layers and pooling name {len(subject.sets)} features, where one is judged; give one of each")
    folder = open_folder(Path(config.out).expanduser() if config.out else subject.folder / "eval")
    views, recipe = _views(config, loaded.config if loaded else {})

    began = time.perf_counter()
    extract = subject.extract(subject.sets, device=device, dtype=dtype)
    central = [centre_view(subject.image_size)]
    found = _read(limit(source, config.sample, seed=config.seed), central, extract, subject, config, device)
    features, num_bad = found.features[:, 0], found.num_bad  # (N, D)
    metrics = health(features)
    protocol: dict[str, Any] = {}
    if views:
        few = limit(source, config.view_images or VIEW_IMAGES, seed=config.seed)
        seen = _read(few, views, extract, subject, config, device)
        metrics["lidar"] = lidar(seen.features)
        protocol["lidar"] = {
            "images": len(seen.features),
            "views": len(views),
            "augment": recipe,
            "recipe": _told(views),
            "num_undecodable": seen.num_bad,
            "delta": LIDAR_DELTA,
            "epsilon": LIDAR_EPSILON,
        }
    dimensions = features.shape[1]
    signs = signs_of_collapse(metrics, dimensions=dimensions)
    notes = _notes(len(features), dimensions, config, len(source), num_bad, protocol.get("lidar"))
    protocol = {
        "command": "eval.health",
        "subject": subject.title,
        **subject.identity,
        "features": {
            "dimensions": dimensions,
            "layer": subject.sets[0].layer,
            "precision": "fp32" if config.ckpt == "pixels" else dtype_name(dtype),
            "crop": central[0].crop,
            "crop_fraction": central[0].fraction,
            "interpolation": central[0].interpolation,
            "image_size": list(subject.image_size),
            "channels": subject.channels,
            "mean": subject.mean,
            "std": subject.std,
        },
        "data": {
            "name": data["name"],
            "root": data.get("root"),
            "pretrained_on_it": own,
            "train": source.name,
            "num_images": len(source),
            "num_sampled": len(features),
            "num_undecodable": num_bad,
        },
        **protocol,
        "rankme_epsilon": RANKME_EPSILON,
        "alpha_req_fit": f"eigenvalues {FIT_FROM} to {FIT_TO}, weights 1 / rank",
        "signs_of_collapse": signs,
        "notes": notes,
        "seed": config.seed,
        "device": str(device),
        "seconds": round(time.perf_counter() - began, 2),
        **environment(),
    }
    other = "" if own or loaded is None else f"_{data['name']}"
    path = folder / f"{config.name or 'health' + other + variant(config)}.json"
    write_results(path, metrics=metrics, protocol=protocol)
    print("\n".join([*_lines(metrics, protocol), *(f"note: {note}" for note in notes), f"written: {path}"]))
    labelled = bool((source.labels != UNLABELLED).any())
    print(f"next: python -m eval.{'knn' if labelled else 'features'} {same_subject(config)}", flush=True)
    return {"metrics": metrics, "protocol": protocol, "path": str(path)}


def _check_settings(config: DictConfig) -> None:
    if config.sample < 2:
        raise ValueError(f"sample={config.sample} images are too few; give 2 or more, such as sample=2048")
    if config.views < 0 or config.views == 1:
        raise ValueError(f"views={config.views}: LiDAR compares 2 views of an image or more; views=0 leaves it out")
    if config.view_images is not None and config.view_images < 2:
        raise ValueError(f"view_images={config.view_images} images are too few; give 2 or more")
    unused = [key for key in ("view_images", "augment") if config.views == 0 and config[key] is not None]
    if unused:
        raise ValueError(f"{' and '.join(unused)} have no effect with views=0, which leaves LiDAR out; leave them out")


def _train_images(data: Mapping[str, Any], *, own: bool) -> Source:
    """The train images of `data`, labelled or not; `own` where a checkpoint names them and not the person who asks."""
    within = "ssl.data." if own else None  # a checkpoint may come from anyone and names no code but ours
    try:
        return build(data["source"], within=within, split="train")
    except ValueError as error:
        hint = "\nThat is the data that the checkpoint names: were the images moved, give data.root="
        raise ValueError(f"{error}{hint if own else ''}") from error


def _views(config: DictConfig, trained: Mapping[str, Any]) -> tuple[list[View], str]:
    """LiDAR's views, `config.views` of them in turn from one recipe, and what that recipe is."""
    if config.augment is not None:
        recipe, name = make_views(plain(config.augment.views)), "given"
    elif trained.get("augment"):
        recipe, name = make_views(trained["augment"]["views"]), "the checkpoint's own"
    else:
        recipe, name = [USUAL_VIEW], "random resized crop of 0.2 to 1 of the area, flip"
    return [recipe[number % len(recipe)] for number in range(config.views)], name


def _told(views: list[View]) -> list[dict[str, Any]]:
    """The different views as JSON values, without what is left at its default."""
    different = list(dict.fromkeys(views))
    return [
        {
            each.name: list(value) if isinstance(value, tuple) else value
            for each in fields(view)
            if (value := getattr(view, each.name)) != each.default
        }
        for view in different
    ]


def _read(
    source: Source,
    views: list[View],
    extract: ExtractSets,
    subject: Subject,
    config: DictConfig,
    device: torch.device,
) -> ViewFeatures:
    sample = Sample(
        source,
        views,
        image_size=subject.image_size,
        channels=subject.channels,
        mean=subject.mean,
        std=subject.std,
        device=device,
        seed=config.seed,
        threads=config.threads,
    )
    return sample.read(extract, batch_size=config.batch_size)


def _notes(
    num: int, dimensions: int, config: DictConfig, available: int, num_bad: int, views: Mapping[str, Any] | None
) -> list[str]:
    notes = []
    if num < dimensions:
        notes.append(f"{num} images have at most that many directions, of {dimensions}; RankMe is bounded by them")
    if config.sample > available:
        notes.append(f"sample={config.sample} is more than there are; all {available} images were used")
    if views is not None and views["images"] <= dimensions:
        notes.append(f"LiDAR of {views['images']} images is at most {views['images'] - 1}, of {dimensions} dimensions")
    if num_bad:
        notes.append(f"{num_bad} images could not be decoded and are left out")
    return notes


def _lines(metrics: Mapping[str, float], protocol: Mapping[str, Any]) -> list[str]:
    """The metrics in words, and what looks like collapse."""
    data, dimensions = protocol["data"], protocol["features"]["dimensions"]
    alpha = f"{metrics['alpha_req']:.2f}" if "alpha_req" in metrics else "none"
    rows = [
        ("RankMe", f"{metrics['rankme']:.1f}", f"directions in use, of {dimensions}"),
        ("alpha-ReQ", alpha, "how steeply the variance falls from one direction to the next; about 1 is best"),
        ("feature std", f"{metrics['feature_std']:.4f}", f"{dimensions**-0.5:.4f} if isotropic, 0 if collapsed"),
        ("mean cosine", f"{metrics['mean_cosine']:.4f}", "between two images; 1 if all have the same features"),
        ("dead", f"{metrics['dead_dimensions']:.1%}", "of the dimensions, which hardly differ between images"),
    ]
    if "lidar" in metrics:
        views = protocol["lidar"]
        rows.insert(1, ("LiDAR", f"{metrics['lidar']:.1f}", f"directions that tell {views['images']:,} images apart "
                        f"through {views['views']} views"))  # fmt: skip
    signs = protocol["signs_of_collapse"]
    verdict = [f"looks collapsed: {sign}" for sign in signs] + [f"what helps: {ADVICE}"] if signs else []
    return [
        f"health of the features of {data['num_sampled']:,} images, {data['name']} (train); {protocol['subject']}",
        *(f"  {name:<12} {value:>8}  {meaning}" for name, value, meaning in rows),
        *(verdict or ["no sign of collapse; compare with the same backbone untrained (ckpt=random model=...)"]),
    ]


if __name__ == "__main__":
    start(run, HealthConfig, command="eval.health", objective=lambda result: result["metrics"]["rankme"])
