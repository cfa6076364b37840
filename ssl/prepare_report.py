"""What `python -m ssl.prepare` tells at its end: report.json, and the same in words."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from omegaconf import DictConfig

from ssl.data.bad_images import NUM_LISTED
from ssl.data.parquet import Parquet
from ssl.data.prepared import KINDS, Account
from ssl.data.sources import SPLITS

REPORT = "report.json"


def account_of(written: dict[str, dict[str, Any]], split: str) -> Account:
    """What became of a split's images in the shards that are there."""
    total = Account()
    for record in written.values():
        if record["shard"]["split"] == split:
            total.add(Account(**record["account"]))
    return total


def make_report(
    config: DictConfig,
    written: dict[str, dict[str, Any]],
    notes: list[str],
    *,
    images_now: int,
    seconds: float,
    threads: int,
) -> dict[str, Any]:
    """What report.json says: settings, and per split what became of the images, over all starts of this command."""
    splits: dict[str, Any] = {}
    for split in SPLITS:
        records = [record for record in written.values() if record["shard"]["split"] == split]
        if not records:
            continue
        account = account_of(written, split)
        counts = {name: getattr(account, name) for name in ("stored", *KINDS, "bytes_before", "bytes_after")}
        splits[split] = {"shards": len(records), **counts, "skipped": account.skipped}
    return {
        "command": "ssl.prepare",
        "data": {"name": config.data.name, "root": config.data.root, "channels": config.data.channels},
        "short_side": config.short_side,
        "quality": config.quality,
        "rows_per_group": config.rows_per_group,
        "rows_per_shard": config.rows_per_shard,
        "splits": splits,
        "notes": notes,
        "images_now": images_now,
        "seconds": round(seconds, 3),
        "images_per_second": round(images_now / seconds, 1) if images_now else None,
        "threads": threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"pyarrow": pa.__version__},
    }


def is_told(path: Path, report: dict[str, Any]) -> bool:
    """Whether a report that is there already says what became of the same images."""
    try:
        return json.loads(path.read_text())["splits"] == report["splits"]
    except (OSError, ValueError, KeyError):
        return False


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write it whole or not at all. Raises OSError that says what to do."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path} cannot be written: {error.strerror}; make room and run the same command again"
        ) from error


def summary(report: dict[str, Any], out: Path) -> Iterator[str]:
    """The lines that end the command."""
    side = report["short_side"]
    for split, found in report["splits"].items():
        done = {
            "shrunk": f"{found['shrunk']:,} shrunk to a short side of {side}",
            "copied": f"{found['copied']:,} copied byte for byte",
            "converted": f"{found['converted']:,} made JPEG at their own size",
        }
        parts = ", ".join(text for name, text in done.items() if found[name])
        yield (
            f"{split}: {found['stored']:,} images in {count(found['shards'], 'shard')}: {parts}; "
            f"{size_of(found['bytes_before'])} before, {size_of(found['bytes_after'])} after"
        )
    for note in report["notes"]:
        yield f"note: {note}"
    skipped = [each for found in report["splits"].values() for each in found["skipped"]]
    if skipped:
        yield f"skipped, because they cannot be decoded: {len(skipped)}\n  {listed(skipped)}"
    if report["images_now"]:
        threads = count(report["threads"], "thread")
        pace = f"{report['images_per_second']:,.0f} images/s"
        yield f"{report['images_now']:,} images in {report['seconds']:,.1f} s with {threads}: {pace}"
    else:
        yield "everything was there already"
    yield f"written: {out / REPORT}"
    yield f"next: {next_command(report, out)}"


def next_command(report: dict[str, Any], out: Path) -> str:
    """How to train on what is prepared. A set that is not held in memory whole is streamed: to read single images of
    its row groups in random order would be slow.
    """
    held_gib = inspect.signature(Parquet).parameters["held_gib"].default
    largest = max(found["bytes_after"] for found in report["splits"].values())
    stream = " data.source.stream=true" if largest > held_gib * 2**30 else ""
    return f"python -m ssl.pretrain data=parquet data.root={out}{stream}"


def count(number: int, what: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def size_of(num_bytes: int) -> str:
    """In MiB or GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def listed(skipped: list[list[str]]) -> str:
    """The first images with their reasons, a line each."""
    lines = [f"{path}: {reason}" for path, reason in skipped[:NUM_LISTED]]
    more = [f"... and {len(skipped) - NUM_LISTED} more, see {REPORT}"] if len(skipped) > NUM_LISTED else []
    return "\n  ".join([*lines, *more])
