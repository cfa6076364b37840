"""`python -m ssl.prepare data=folder data.root=/my/photos out=/data/prepared`: make a data set small once.

Photos are decoded at every epoch, so most of the work of reading a large one is done again and again. This command does
it once: images of a short side that is near the size they are trained at, as JPEG, in parquet shards. The originals
are only read.
"""

from __future__ import annotations

import ssl.interrupted  # before what takes seconds
import ssl.runtime  # before torch  # noqa: F401

# isort: split
import glob
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pyarrow as pa
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig
from tqdm import tqdm

from ssl.command import run_command
from ssl.config import DataConfig, build, check
from ssl.data.bad_images import BadImages
from ssl.data.prepared import (
    Account,
    Group,
    GroupJob,
    Shard,
    Size,
    fingerprint,
    plan_shards,
    shard_schema,
    shards_in,
    write_shard,
)
from ssl.data.reader import Reader
from ssl.data.sources import SPLITS, NoTestSplit, Source, checksum
from ssl.data.subset import limit
from ssl.data.threads import available_cores, run_ahead
from ssl.prepare_report import REPORT, account_of, count, is_told, listed, make_report, size_of, summary, write_report

GROUPS_AHEAD = 2
_WITHOUT_EFFECT = ("data.image_size", "data.mean", "data.std", "data.in_memory_gib")


class Split(Enum):
    train = "train"
    test = "test"
    all = "all"


@dataclass
class PrepareConfig:
    """What `python -m ssl.prepare` takes."""

    data: DataConfig = MISSING
    out: str = MISSING
    split: Split = Split.all
    short_side: int | None = 256
    quality: int = 90
    rows_per_group: int = 128
    rows_per_shard: int = 10_000
    threads: int | None = None


def run(config: DictConfig) -> dict[str, Any]:
    """Write the images that `config.data` names as shards into `config.out`; returns what report.json says.

    The same command goes on where it was stopped. Raises ValueError for impossible settings, for a folder that holds
    what other settings made, and where more than `data.max_bad_fraction` of the images cannot be decoded.
    """
    _check_settings(config)
    threads = config.threads or available_cores()
    root = _base(config.data.root)
    out = _open_out(Path(config.out).expanduser(), config.data.root)
    size = Size(config.short_side, config.quality)

    # ---- what is to be done, and what is there ---------------------------------------------------------------------
    sources, notes = _sources(config)
    written = shards_in(out)
    recipes = {split: _recipe(config, source) for split, source in sources.items()}
    plans = {
        split: plan_shards(split, len(source), rows_per_shard=config.rows_per_shard)
        for split, source in sources.items()
    }
    _check_same(out, written, recipes)
    waiting = [shard for plan in plans.values() for shard in plan if shard.name not in written]
    total = sum(len(source) for source in sources.values())
    left = sum(shard.stop - shard.start for shard in waiting)
    if written and waiting:
        print(f"{out}: going on; there already: {count(len(written), 'shard')}", flush=True)
    for leftover in out.glob(".partial-*"):  # of a run that was killed
        leftover.unlink()

    # ---- do it -----------------------------------------------------------------------------------------------------
    accounts = {split: account_of(written, split) for split in SPLITS}
    began, done = time.perf_counter(), total - left
    bar = tqdm(total=total, initial=done, unit="image", leave=False, disable=not sys.stderr.isatty())
    with bar:
        for shard in waiting:
            source = sources[shard.split]
            schema = shard_schema(source)
            groups = _groups(shard, source, schema, size=size, root=root, config=config, threads=threads)
            counted = _counted(groups, accounts[shard.split], source, most=config.data.max_bad_fraction, bar=bar)
            write_shard(out, shard, schema, counted, recipes[shard.split])
            done += shard.stop - shard.start
            now, seconds = done - total + left, time.perf_counter() - began
            _say_written(out / shard.name, done, total, now=now, seconds=seconds)

    # ---- report ----------------------------------------------------------------------------------------------------
    for split, source in sources.items():
        if not accounts[split].stored:
            raise ValueError(f"none of the {len(source):,} images of {source.name} could be decoded:\n  "
                             + listed(accounts[split].skipped))  # fmt: skip
    seconds = time.perf_counter() - began
    report = make_report(config, shards_in(out), notes, images_now=left, seconds=seconds, threads=threads)
    if left or not is_told(out / REPORT, report):  # else the one that is there tells how long it took
        write_report(out / REPORT, report)
    print("\n".join(summary(report, out)), flush=True)
    return report


def _check_settings(config: DictConfig) -> None:
    """Raise ValueError for what cannot be done."""
    check(config, PrepareConfig)
    if config.data.channels not in (1, 3):
        raise ValueError(f"JPEG has 1 or 3 channels, got data.channels={config.data.channels}")
    if config.short_side is not None and config.short_side < 1:
        raise ValueError(f"short_side is in pixels, or null to keep every size; got {config.short_side}")
    if not 1 <= config.quality <= 100:
        raise ValueError(f"quality is JPEG's, 1 to 100; got {config.quality}")
    for name in ("rows_per_group", "rows_per_shard", "threads"):
        value = config[name]
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.rows_per_group > config.rows_per_shard:
        raise ValueError(
            f"rows_per_group={config.rows_per_group} is more than rows_per_shard={config.rows_per_shard}; lower it"
        )


def _base(root: str | None) -> str:
    """The folder that the originals lie below, or their url; "" where they lie in none."""
    if root is None or "://" in root:
        return root or ""
    path = Path(root).expanduser()
    if path.is_dir():
        return str(path)
    there = path.exists() or glob.has_magic(root)  # a file, or several; anything else the source refuses
    return str(next((each for each in path.parents if each.is_dir()), "")) if there else ""


def _open_out(out: Path, root: str | None) -> Path:
    """Make `out`. Raises ValueError where it and the originals lie in each other, OSError where it cannot be made."""
    ours, theirs = out.resolve(), Path(root).expanduser().resolve() if root and "://" not in root else None
    if theirs is not None and (ours == theirs or theirs in ours.parents or ours in theirs.parents):
        raise ValueError(f"out={out} and the originals in {root} lie in each other; give an out= beside them")
    probe = out / f".writable-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"out={out} cannot be written to: {error.strerror}; give another out=") from error
    return out


def _sources(config: DictConfig) -> tuple[dict[str, Source], list[str]]:
    """The images of each split, and a note where there is no test split; `data.limit` is that of train."""
    sources: dict[str, Source] = {}
    notes = []
    for split in SPLITS if config.split == Split.all else (config.split.name,):
        try:
            sources[split] = build(config.data.source, split=split)
        except NoTestSplit as error:
            if config.split != Split.all:
                raise
            notes.append(f"only train was prepared: {error}")
    if "train" in sources:
        sources["train"] = limit(sources["train"], config.data.limit)
    elif config.data.limit is not None:
        raise ValueError("data.limit counts images of train and has no effect with split=test; leave it out")
    return sources, notes


def _recipe(config: DictConfig, source: Source) -> dict[str, Any]:
    """What decides the bytes of a split's shards. Where the originals lie does not."""
    settings = {name: config[name] for name in ("short_side", "quality", "rows_per_group", "rows_per_shard")}
    return {
        **settings,
        "data.channels": config.data.channels,
        "num_images": len(source),
        "images": checksum(source),
        "labels": fingerprint(source),
    }


def _check_same(out: Path, written: dict[str, dict[str, Any]], recipes: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError with the differences where a shard was made by other settings or from other images."""
    for name, record in written.items():
        before: dict[str, Any] = record["recipe"]
        now = recipes.get(record["shard"]["split"], before)
        changed = [f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"{out / name} was made with other settings or from other images:\n  "
                + "\n  ".join(changed)
                + f"\nGive another out=, or remove {out}"
            )


def _groups(
    shard: Shard, source: Source, schema: pa.Schema, *, size: Size, root: str, config: DictConfig, threads: int
) -> Iterator[Group]:
    """The row groups of a shard, made by threads a few ahead."""
    reader = Reader(source, channels=config.data.channels)
    rows = config.rows_per_group
    jobs = (
        GroupJob(reader, start, min(start + rows, shard.stop), root=root, schema=schema, size=size, threads=threads)
        for start in range(shard.start, shard.stop, rows)
    )
    return run_ahead(jobs, num_threads=threads, ahead=GROUPS_AHEAD)


def _counted(groups: Iterator[Group], account: Account, source: Source, *, most: float, bar: tqdm) -> Iterator[Group]:
    """The groups, each counted. Raises BadImages when more than `most` of the source could not be read."""
    for group in groups:
        account.add(group.account)
        bar.update(group.account.stored + len(group.account.skipped))
        if len(account.skipped) > most * len(source):
            raise BadImages(
                f"{len(account.skipped)} of {len(source)} images of {source.name} could not be decoded, more than "
                f"data.max_bad_fraction={most:g} allows; mend or remove these files, or raise data.max_bad_fraction:\n"
                f"  {listed(account.skipped)}"
            )
        yield group


def _say_written(path: Path, done: int, total: int, *, now: int, seconds: float) -> None:
    size, pace = size_of(path.stat().st_size), now / max(seconds, 1e-9)
    tqdm.write(f"{path.name}: {size}; {done:,} of {total:,} images, {pace:,.0f} images/s", file=sys.stdout)
    sys.stdout.flush()


def _check_overrides(overrides: list[str]) -> None:
    """Raise ValueError for settings of the data that only training reads."""
    named = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    idle = [name for name in _WITHOUT_EFFECT if name in named]
    if idle:
        raise ValueError(
            f"{', '.join(idle)}: without effect here, because images are stored as they look and as large as "
            "short_side= says; give it to the run that trains on them"
        )


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)


def main() -> None:
    """The command line."""
    register()

    def task(config: DictConfig) -> None:
        _check_overrides(list(HydraConfig.get().overrides.task))
        run(config)

    run_command(task, config_name="prepare")


if __name__ == "__main__":
    main()
