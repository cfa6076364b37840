"""Results in columns: one for each metric of each protocol, so that no two in a column were measured otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from eval.compare import Result
from eval.protocols import brief, circumstances, identity, protocol_id
from ssl.tables import FRACTIONS

DATA = ("data.name", "data.num_train", "data.num_test")
"""What a column says of its images in any case."""
MOST_WORDS = 3
"""Settings that a column's head spells out; all stand in the protocol itself."""
NOT_READ = "not read"


@dataclass(frozen=True)
class Protocol:
    """A way of measuring, and all results that were measured so."""

    id: str
    command: str
    example: Mapping[str, Any]
    """The protocol of the first of its results."""
    results: list[Result] = field(default_factory=list)

    @property
    def data(self) -> str:
        """On which images, in words."""
        data = self.example.get("data") or {}
        numbers = {split: data.get(f"num_{split}") for split in ("train", "test")}
        counts = [f"{number:,} {split}" for split, number in numbers.items() if isinstance(number, int) and number]
        return ", ".join([str(data.get("name", "no data")), *counts])

    def reads_test(self, metric: str) -> bool:
        """Whether the metric is one of the test split, on which a run is reported and must not be chosen."""
        data = self.example.get("data") or {}
        unread = data.get("test") == NOT_READ or self.example.get("test") == NOT_READ or not data.get("num_test")
        return not unread and not metric.startswith("held_out")

    def circumstances(self) -> dict[str, list[str]]:
        """What differs between its results, and may: each value once, by name."""
        found: dict[str, dict[str, None]] = {}
        for other in self.results[1:]:
            for name, (a, b) in circumstances(self.example, other.protocol).items():
                found.setdefault(name, {brief(a): None})[brief(b)] = None
        return {name: list(values) for name, values in sorted(found.items())}


@dataclass(frozen=True)
class ResultColumn:
    """A metric of a protocol."""

    protocol: Protocol
    metric: str
    told_apart: Sequence[str]
    """In which settings the protocol differs from the others of its evaluation, in words."""

    @property
    def is_share(self) -> bool:
        """Whether its values are shares of one, shown as percentages."""
        return _is_share(self.metric)

    def shown(self, value: float) -> str:
        """A value of it as a table shows it."""
        return f"{value:.1%}" if self.is_share else f"{value:.4g}"

    @property
    def lines(self) -> list[str]:
        """What its head says under the metric."""
        split = "test split" if self.protocol.reads_test(self.metric) else "not of the test split"
        return [self.protocol.data, *self.told_apart, split, f"protocol {self.protocol.id}"]


@dataclass(frozen=True)
class Score:
    """What a run, or several, has of one column: a value for each seed."""

    values: Sequence[float]
    steps: Sequence[int | None]
    """Of the checkpoints that were judged, each once."""
    results: Sequence[Result]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds, with n - 1; None for one."""
        return stdev(self.values) if len(self.values) > 1 else None


def _is_share(metric: str) -> bool:
    return metric.removeprefix("held_out_").startswith(FRACTIONS)


def by_protocol(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by the id of their protocol."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(protocol_id(result.protocol), []).append(result)
    return found


def protocols_of(runs: Iterable[Mapping[str, Sequence[Result]]]) -> list[Protocol]:
    """The protocols of runs' results by protocol, in the order of their evaluations' names and of first meeting."""
    found: dict[str, Protocol] = {}
    for results in runs:
        for key, own in results.items():
            first = own[0].protocol
            found.setdefault(key, Protocol(key, str(first["command"]), first)).results.extend(own)
    return sorted(found.values(), key=lambda protocol: protocol.command)


def result_columns(protocols: Sequence[Protocol]) -> list[ResultColumn]:
    """A column for each metric of each protocol, top1 and map before the others."""
    names = {
        protocol.id: dict.fromkeys(name for result in protocol.results for name in numbers_of(result))
        for protocol in protocols
    }
    alike: dict[tuple[str, str], list[Protocol]] = {}
    for protocol in protocols:
        for name in names[protocol.id]:
            alike.setdefault((protocol.command, name), []).append(protocol)
    told = {key: told_apart(own) for key, own in alike.items()}
    columns = []
    for protocol in protocols:
        ordered = sorted(names[protocol.id], key=lambda name: not _is_share(name))
        columns += [ResultColumn(protocol, name, told[protocol.command, name][protocol.id]) for name in ordered]
    return columns


def told_apart(protocols: Sequence[Protocol]) -> dict[str, list[str]]:
    """For each protocol of one metric the settings in which they differ, in words: `k [20]`.

    What the name and the numbers of its images say already is left out.
    """
    settings = {protocol.id: identity(protocol.example) for protocol in protocols}
    names = _differing(list(settings.values()))
    return {key: _words(own, names) for key, own in settings.items()}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for each in settings for name in each)
    first = settings[0]
    named = [name for name in names if any(each.get(name) != first.get(name) for each in settings)]
    return sorted((name for name in named if name not in DATA), key=lambda name: name.startswith("data."))


def _words(own: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    words = [f"{name} {brief(own.get(name))}" for name in names]
    more = len(words) - MOST_WORDS
    return words[:MOST_WORDS] + ([f"and {more} more settings"] if more > 0 else [])


def numbers_of(result: Result) -> dict[str, float]:
    """The metrics of a result that are numbers, finite or not."""
    return {
        name: float(value)
        for name, value in result.metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def score_of(results: Mapping[str, Sequence[Result]], column: ResultColumn) -> Score | None:
    """What a run, whose results are given by protocol, has of a column: of its latest checkpoint, for each seed of the
    evaluation the newest result.
    """
    own = [each for each in results.get(column.protocol.id, []) if column.metric in numbers_of(each)]
    if not own:
        return None
    latest = max(result.step or 0 for result in own)
    newest: dict[str, Result] = {}
    for result in sorted(own, key=lambda result: str(result.protocol.get("date") or "")):
        if (result.step or 0) == latest:
            newest[str(result.protocol.get("seed"))] = result
    kept = list(newest.values())
    return Score([numbers_of(each)[column.metric] for each in kept], [kept[0].step], kept)


def over_runs(scores: Sequence[Score | None]) -> Score | None:
    """What several runs of one recipe have of a column: a value for each run, the mean of its own."""
    found = [score for score in scores if score is not None]
    if not found:
        return None
    steps = list(dict.fromkeys(step for score in found for step in score.steps))
    return Score([score.mean for score in found], steps, [result for score in found for result in score.results])
