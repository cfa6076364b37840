"""Results side by side: `python -m eval.compare runs/a/eval/knn.json runs/b/eval/knn.json`, or run folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from eval.config import register
from eval.protocols import brief, circumstances, find_results, protocol_difference, protocol_id, read_result
from ssl.command import run_command
from ssl.config import check
from ssl.tables import Table, metric_columns

USAGE = """eval.compare needs results:
  python -m eval.compare runs/a/eval/knn.json runs/b/eval/knn.json
  python -m eval.compare runs/a runs/b                all results of these runs
  python -m eval.compare runs/a runs/b strict=true    an error unless all were measured alike"""
MOST_METRICS = 8
TAKE_A_VALUE = (
    "--config-dir",
    "-cd",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--package",
    "-p",
    "--info",
    "-i",
)


class Format(Enum):
    table = "table"
    markdown = "markdown"
    csv = "csv"


@dataclass
class CompareConfig:
    """What `python -m eval.compare` takes."""

    results: list[str] = field(default_factory=list)  # JSON files and run folders; words without = on the command line
    strict: bool = False
    format: Format = Format.table
    out: str | None = None  # file as well; .csv and .md are written as such


@dataclass(frozen=True)
class Result:
    """What an evaluation wrote, and how it is called in the table."""

    path: Path
    metrics: dict[str, Any]
    protocol: dict[str, Any]

    @property
    def step(self) -> int | None:
        return (self.protocol.get("checkpoint") or {}).get("step")


def run(config: DictConfig) -> dict[str, list[Result]]:
    """Print the results that `config` names, a table for each protocol; returns them by protocol.

    Raises ValueError for what is no result, and with `strict` where not all were measured alike, with the settings
    that differ.
    """
    paths = dict.fromkeys(path for given in config.results for path in find_results(given))
    results = [Result(path, **{key: read_result(path)[key] for key in ("metrics", "protocol")}) for path in paths]
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(protocol_id(result.protocol), []).append(result)
    if config.strict and len(groups) > 1:
        raise ValueError(
            f"{len(results)} results were measured in {len(groups)} ways and cannot stand in one column:\n"
            + "\n".join(_differences(groups))
            + "\nWithout strict=true each protocol gets a table of its own"
        )
    if config.format == Format.table:
        print(_as_text(groups))
    else:
        table = one_table(groups)
        print(table.markdown() if config.format == Format.markdown else table.csv())
    if config.out:
        out = Path(config.out).expanduser()
        one_table(groups).write(out)
        print(f"written: {out}", file=sys.stderr)
    return groups


def one_table(groups: dict[str, list[Result]]) -> Table:
    """All results in one table, each with the id of its protocol: equal ids were measured alike."""
    everything = [result for group in groups.values() for result in group]
    names = metric_columns(result.metrics for result in everything)
    rows = [
        [key, _evaluation(result), str(result.path), result.step, *(result.metrics.get(name) for name in names)]
        for key, group in groups.items()
        for result in group
    ]
    return Table(["protocol", "evaluation", "result", "step", *names], rows)


def _as_text(groups: dict[str, list[Result]]) -> str:
    """A table for each protocol, what tells it from the first of its evaluation, what else differs within it."""
    parts = []
    for key, group in groups.items():
        names = metric_columns((result.metrics for result in group), most=MOST_METRICS)
        rows = [[str(each.path), each.step, *(each.metrics.get(name) for name in names)] for each in group]
        table = Table(["result", "step", *names], rows).text()
        parts.append("\n".join([f"{_headline(group[0])}  [protocol {key}]", table, *_notes(group)]))
    if len(groups) > 1:
        parts.append(
            "\n".join(["Not to be compared across tables, as they were measured otherwise:", *_differences(groups)])
        )
    return "\n\n".join(parts)


def _headline(result: Result) -> str:
    data = result.protocol.get("data") or {}
    counts = [f"{data[key]:,} {word}" for key, word in (("num_train", "train"), ("num_test", "test")) if key in data]
    return f"{_evaluation(result)} on {data.get('name', 'no data')}" + (f" ({', '.join(counts)})" if counts else "")


def _notes(group: Sequence[Result]) -> list[str]:
    """What differs within a protocol, and may."""
    found: dict[str, list[str]] = {}
    for other in group[1:]:
        for name, values in circumstances(group[0].protocol, other.protocol).items():
            found.setdefault(name, [brief(values[0])]).append(brief(values[1]))
    return [f"note: {name} differs: {' | '.join(dict.fromkeys(values))}" for name, values in sorted(found.items())]


def _differences(groups: dict[str, list[Result]]) -> list[str]:
    """For each protocol after the first of its evaluation, what it does otherwise; evaluations are only named."""
    firsts: dict[str, tuple[str, Result]] = {}
    lines = []
    for key, group in groups.items():
        evaluation = _evaluation(group[0])
        if evaluation not in firsts:
            firsts[evaluation] = (key, group[0])
            continue
        first, other = firsts[evaluation]
        lines.append(f"  protocol {key} and {first}, both {evaluation}:")
        for name, (a, b) in protocol_difference(group[0].protocol, other.protocol).items():
            lines.append(f"    {name}: {brief(a)} | {brief(b)}")
    if len(firsts) > 1:
        names = ", ".join(f"{evaluation} ({key})" for evaluation, (key, _) in firsts.items())
        lines.insert(0, f"  evaluations that have nothing in common: {names}")
    return lines


def _evaluation(result: Result) -> str:
    return str(result.protocol["command"])


def spell_out(words: Sequence[str], *, key: str = "results") -> list[str]:
    """Command-line words with those that name files put into `results=[...]`, or another key, as Hydra wants them."""
    kept, results = [], []
    for before, word in zip(["", *words], words):
        is_setting = word.startswith("-") or before in TAKE_A_VALUE or ("=" in word and not os.path.exists(word))
        (kept if is_setting else results).append(word)
    if not results:
        return kept
    quoted = ("'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'" for word in results)
    return [*kept, f"{key}=[{','.join(quoted)}]"]


def main() -> None:
    """The command line. Without results it ends with exit code 2, a mistake or a refusal with 1 and a message."""
    register(CompareConfig)

    def task(config: DictConfig) -> None:
        if not config.results:
            print(USAGE, file=sys.stderr)
            raise SystemExit(2)
        check(config, CompareConfig)
        run(config)

    sys.argv[1:] = spell_out(sys.argv[1:])
    run_command(task, config_name="compare")


if __name__ == "__main__":
    main()
