"""The table in which a sweep ends: its runs' overrides against what came of them, printed and as results.csv."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ssl.sweep import DONE, LOST, RUNNING, STOPPED, Sweep
from ssl.tables import Table, metric_columns

RESULTS = "results.csv"
HEADLINES = ("top1", "map", "knn_top1", "rankme", "loss")
"""Metrics that the printed table shows, where they are; the CSV has all."""
MESSAGE_WIDTH = 80
OBJECTIVE = "objective_value"
"""What a run was judged at; `objective` may be one of the settings."""


def report(sweep: Sweep) -> int:
    """Print the table of a sweep and write results.csv beside its outcomes; returns the exit code."""
    outcomes = sweep.outcomes() if sweep.on_cluster else [_settled(each) for each in sweep.outcomes()]
    code = sweep.end_code
    if not outcomes or os.environ.get("RANK", "0") != "0":
        return code
    path = sweep.folder / RESULTS
    full_table(outcomes).write(path)
    print(f"\n{short_table(outcomes, sweep.swept).text()}\n")
    best = best_of(outcomes, sweep.direction)
    if best is not None:
        words = shlex.join(_swept(best, sweep.swept))
        print(f"best: run {best['run']}, objective {best['objective']:.6g}: {words}")
    print(f"written: {path}", flush=True)
    failed = [each for each in outcomes if each["state"] not in (DONE, RUNNING, STOPPED)]
    if failed:
        lines = "\n  ".join(f"run {each['run']}, {shlex.join(_swept(each, sweep.swept))}" for each in failed)
        print(f"{len(failed)} of the sweep's runs failed:\n  {lines}", file=sys.stderr, flush=True)
        for message in _long_messages(failed):
            print(message, file=sys.stderr, flush=True)
    if code > 128 and sweep.on_cluster:
        jobs = sorted({each["job"].partition("_")[0] for each in outcomes if each["state"] == RUNNING})
        how = f"scancel {' '.join(jobs)}" if jobs else "squeue --me shows them, scancel"
        print(f"the sweep's jobs go on in the queue; {how} ends them", file=sys.stderr, flush=True)
    return code or (1 if failed else 0)


def full_table(outcomes: Sequence[Mapping[str, Any]]) -> Table:
    """Every override, metric and message of every run."""
    words = [_by_key(each["overrides"]) for each in outcomes]
    keys = list(dict.fromkeys(key for each in words for key in each))
    metrics = metric_columns(each["metrics"] for each in outcomes)
    columns = ["run", *keys, OBJECTIVE, *metrics, "state", "seconds", "out", "message"]
    rows = [
        [
            each["run"],
            *(own.get(key) for key in keys),
            each["objective"],
            *(each["metrics"].get(name) for name in metrics),
            *(each[name] for name in ("state", "seconds", "out", "message")),
        ]
        for each, own in zip(outcomes, words)
    ]
    return Table(columns, rows)


def short_table(outcomes: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> Table:
    """What differs between the runs, and what came of it, for a terminal."""
    whole = full_table(outcomes)
    values = {name: [row[place] for row in whole.rows] for place, name in enumerate(whole.columns)}
    shown = [key for key in swept if key in values]
    shown += [name for name in (OBJECTIVE, *HEADLINES) if any(value is not None for value in values.get(name, []))]
    values["message"] = [_first_line(message) for message in values["message"]]
    last = ["message"] if any(values["message"]) else []
    columns = ["run", *shown, "state", "seconds", "out", *last]
    return Table(columns, [[values[name][row] for name in columns] for row in range(len(outcomes))])


def best_of(outcomes: Sequence[Mapping[str, Any]], direction: str | None) -> Mapping[str, Any] | None:
    """The outcome that an optimizing sweeper was looking for; None where there is no direction, or no number."""
    found = [each for each in outcomes if each["objective"] is not None and math.isfinite(each["objective"])]
    if direction is None or not found:
        return None
    choose = max if direction == "maximize" else min
    return choose(found, key=lambda each: each["objective"])


def _settled(outcome: dict[str, Any]) -> dict[str, Any]:
    """An outcome as it is when all runs have ended: one that did not say how is lost."""
    if outcome["state"] != RUNNING:
        return outcome
    message = "its process was killed; out of memory? What it saved stays, and the same command continues"
    return {**outcome, "state": LOST, "message": message}


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    pairs = (word.partition("=") for word in overrides)
    return {key: value for key, _, value in pairs}


def _swept(outcome: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Of a run's overrides those that not all runs have."""
    return [word for word in outcome["overrides"] if word.partition("=")[0] in keys]


def _long_messages(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table had to cut, each message once."""
    long = [each["message"] for each in outcomes if each["message"] != _first_line(each["message"])]
    return list(dict.fromkeys(message for message in long if message))


def _first_line(message: str | None) -> str | None:
    if not message:
        return None
    line = message.splitlines()[0]
    return line if len(line) <= MESSAGE_WIDTH else f"{line[: MESSAGE_WIDTH - 3]}..."
