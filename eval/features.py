"""Features and paths of images, in pieces: `python -m eval.features ckpt=runs/<run> out=/data/features`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from eval.command import USAGE
from eval.config import EvalConfig, register
from eval.extract import centre_view
from eval.feature_files import META, FeatureFolder, Piece, Rows, plan_pieces
from eval.images import find_images, read_views
from eval.results import environment
from eval.splits import data_settings
from eval.subject import Subject, choose_device, load, make_subject, variant, wanted_sets
from ssl.command import run_command
from ssl.config import build, check, plain
from ssl.data.augment import Augment
from ssl.data.sources import SPLITS, NoTestSplit, Source
from ssl.data.subset import limit
from ssl.trainer import choose_dtype, dtype_name

NUM_LISTED = 20


class Split(Enum):
    train = "train"
    test = "test"
    all = "all"


class Format(Enum):
    parquet = "parquet"
    npy = "npy"


@dataclass
class FeaturesConfig(EvalConfig):
    """What `python -m eval.features` takes."""

    images: Any = None  # a file, a folder, a glob, or a list of those, instead of `data`
    split: Split = Split.all
    format: Format = Format.parquet
    layers: Any = "last"
    rows_per_piece: int = 10_000
    overwrite: bool = False


def run(config: DictConfig) -> dict[str, Any]:
    """Write the features of every image that `config` names; returns what `meta.json` says.

    The same command again goes on with the pieces that are missing. Raises ValueError where the folder holds those of
    another command, where nothing could be decoded, or more images than `data.max_bad_fraction` could not.
    """
    began = time.perf_counter()
    if config.rows_per_piece < 1:
        raise ValueError(f"rows_per_piece must be at least 1, got {config.rows_per_piece}")
    if config.name is not None and config.out is not None:
        raise ValueError(f"name={config.name} has no effect with out={config.out}; leave one of them out")
    device = choose_device(config.device.name)
    dtype = choose_dtype(config.precision.name, device)
    sources, subject, about, max_bad = _open(config)
    if len(subject.sets) > 1:
        names = "; ".join(map(str, subject.sets))
        raise ValueError(f"layers={config.layers} pooling={config.pooling} are {len(subject.sets)} vectors per image "
                         f"({names}), where one is written; run the command once for each")  # fmt: skip

    recipe, protocol = _describe(config, sources, subject, about, precision=dtype_name(dtype), device=device)
    out = Path(config.out).expanduser() if config.out else subject.folder / "eval" / (config.name or about["folder"])
    folder = FeatureFolder(out, recipe=recipe, protocol=protocol, overwrite=config.overwrite)
    pieces = list(plan_pieces(sources, rows_per_piece=config.rows_per_piece, file_format=config.format.name))
    waiting = [piece for piece in pieces if not folder.has(piece)]
    if len(waiting) < len(pieces):
        print(f"{len(pieces) - len(waiting)} of {len(pieces)} pieces are there already", flush=True)

    view = centre_view(subject.image_size)
    augment = Augment([view], mean=subject.mean, std=subject.std).to(device)
    extract = subject.extract(subject.sets, device=device, dtype=dtype)
    dim = _features(extract, torch.zeros(1, subject.channels, *subject.image_size, device=device)).shape[1]
    total = sum(len(source) for source in sources.values())
    for piece in tqdm(waiting, unit="piece", leave=False, disable=not sys.stderr.isatty()):
        rows, features, failed = _read_piece(
            piece, sources[piece.split], subject, extract, augment, dim=dim, config=config, device=device
        )
        folder.write(piece, rows, features, failed)
        _check_bad(folder.meta["undecodable"], total=total, most=max_bad)
    if not folder.num_rows:
        raise ValueError(f"none of the {total} images could be decoded:\n  " + _listed(folder.meta["undecodable"]))
    folder.finish()

    bad = folder.meta["undecodable"]
    for note in about["notes"]:
        print(f"note: {note}")
    if bad:
        print(f"left out, because they cannot be decoded: {len(bad)}\n  {_listed(bad)}")
    print(
        f"{folder.num_rows:,} rows of {dim} features in {len(pieces)} pieces, {time.perf_counter() - began:.0f} s; "
        f"{subject.title}"
    )
    print(f"written: {out / META} and {out}/data")
    print(f"next: {_next(out, config.format.name)}", flush=True)
    return folder.meta


def _open(config: DictConfig) -> tuple[dict[str, Source], Subject, dict[str, Any], float]:
    """The images by split, what makes features of them, what the protocol says of the data, how many may be bad."""
    given = plain(config.data)
    sets = wanted_sets(config)
    loaded = load(config)
    if config.images is not None:
        if loaded is None:
            raise ValueError(
                f"images= needs a checkpoint, which knows its images' size and normalisation; ckpt={config.ckpt} does "
                "not. Give data=folder data.root=PATH instead"
            )
        if given["name"] != "checkpoint" or config.split != Split.all:
            raise ValueError("data= and split= have no effect with images=; leave one out")
        source = find_images(plain(config.images))
        about = {"name": "images", "root": source.name, "folder": f"features_images{variant(config)}", "notes": []}
        subject = make_subject(config, loaded, source, sets=sets, data={})
        return {"images": source}, subject, about, 1.0
    own = given["name"] == "checkpoint" and loaded is not None
    data = data_settings(given, loaded.config.get("data", {}) if loaded else None, subject=config.ckpt)
    seed = int(loaded.config.get("seed", 0)) if own and loaded else int(config.seed)
    sources, notes = _sources(data, config.split, own=own, seed=seed)
    subject = make_subject(config, loaded, next(iter(sources.values())), sets=sets, data=data)
    name = "features" if own or loaded is None else f"features_{data['name']}"
    name += ("" if config.split == Split.all else f"_{config.split.name}") + variant(config)
    about = {"name": data["name"], "root": data.get("root"), "folder": name, "notes": notes}
    return sources, subject, about, float(data["max_bad_fraction"])


def _sources(data: dict[str, Any], split: Split, *, own: bool, seed: int) -> tuple[dict[str, Source], list[str]]:
    """The images of each split that was asked for; a test split that is not there is a note with split=all."""
    within = "ssl.data." if own else None  # a checkpoint may come from anyone and names no code but ours
    sources: dict[str, Source] = {}
    notes = []
    for name in SPLITS if split == Split.all else (split.name,):
        try:
            sources[name] = build(data["source"], within=within, split=name)
        except NoTestSplit as error:
            if split != Split.all:
                raise
            notes.append(f"only train was read: {error}")
    if "train" in sources:
        sources["train"] = limit(sources["train"], data.get("limit"), seed=seed)
    return sources, notes


def _describe(
    config: DictConfig,
    sources: dict[str, Source],
    subject: Subject,
    about: dict[str, Any],
    *,
    precision: str,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What decides the numbers and the pieces, by the word that changes it; and the protocol as in results."""
    view = centre_view(subject.image_size)
    checkpoint = subject.identity["checkpoint"]
    features = {
        **subject.sets[0].to_dict(),
        "precision": "fp32" if config.ckpt == "pixels" else precision,
        "crop": view.crop,
        "crop_fraction": view.fraction,
        "interpolation": view.interpolation,
        "image_size": list(subject.image_size),
        "channels": subject.channels,
        "mean": subject.mean,
        "std": subject.std,
    }
    data = {
        "name": about["name"],
        "root": about["root"],
        "splits": {name: {"source": source.name, "num": len(source)} for name, source in sources.items()},
    }
    random = {"backbone": subject.identity["backbone"], "seed": config.seed}
    recipe = {
        "ckpt": {"sha256": checkpoint["sha256"]} if checkpoint else random,
        "features": features,
        "data": data,
        "format": config.format.name,
        "rows_per_piece": config.rows_per_piece,
    }
    protocol = {
        "command": "eval.features",
        "subject": subject.title,
        **subject.identity,
        "features": features,
        "data": data,
        "seed": config.seed,
        "device": str(device),
        **environment(),
    }
    return recipe, protocol


def _read_piece(
    piece: Piece,
    source: Source,
    subject: Subject,
    extract: Any,
    augment: Augment,
    *,
    dim: int,
    config: DictConfig,
    device: torch.device,
) -> tuple[Rows, np.ndarray, list[str]]:
    """Rows and features (n, D) of a piece's images that could be decoded, and what was wrong with the others."""
    rows, failed = Rows(), []
    features = np.empty((piece.stop - piece.start, dim), np.float32)
    batches = read_views(
        source,
        size=subject.image_size,
        channels=subject.channels,
        batch_size=config.batch_size,
        threads=config.threads,
        start=piece.start,
        stop=piece.stop,
    )
    for views in batches:
        failed += views.failed.values()
        if not len(views.index):
            continue
        found = _features(extract, views.normalised(augment, device))  # (B, D)
        finite = np.isfinite(found).all(1)
        if not finite.all():
            where = source.describe(int(views.index[~finite][0]))
            raise ValueError(f"the features of {where} are not finite; the backbone has diverged. Give an earlier "
                             "checkpoint, or precision=fp32")  # fmt: skip
        features[len(rows.index) : len(rows.index) + len(found)] = found
        rows.add(source, piece.split, views.index)
    return rows, features[: len(rows.index)], failed


@torch.no_grad()
def _features(extract: Any, image: torch.Tensor) -> np.ndarray:
    return extract(image)[0].float().cpu().numpy()  # (B, D)


def _check_bad(bad: list[str], *, total: int, most: float) -> None:
    if len(bad) > most * total:
        raise ValueError(
            f"{len(bad)} of {total} images could not be decoded, more than data.max_bad_fraction={most:g} allows; mend "
            f"or remove these files, or raise data.max_bad_fraction:\n  {_listed(bad)}"
        )


def _listed(messages: list[str]) -> str:
    more = [f"... and {len(messages) - NUM_LISTED} more"] if len(messages) > NUM_LISTED else []
    return "\n  ".join([*messages[:NUM_LISTED], *more])


def _next(out: Path, file_format: str) -> str:
    """One command that looks at what was written."""
    if file_format == "parquet":
        return f"python -c \"import pyarrow.parquet as pq; print(pq.read_table('{out}/data').slice(0, 3))\""
    return f"python -c \"import numpy as np, glob; print(np.load(sorted(glob.glob('{out}/data/*.npy'))[0]).shape)\""


def main() -> None:
    """The command line. A missing `ckpt` ends it with exit code 2, another mistake with 1 and a message."""
    register(FeaturesConfig)

    def task(config: DictConfig) -> None:
        if config.ckpt is None:
            print(USAGE.format(command="eval.features"), file=sys.stderr)
            raise SystemExit(2)
        check(config, FeaturesConfig)
        run(config)

    run_command(task, config_name="features")


if __name__ == "__main__":
    main()
