"""Ways of doing the same thing measured in turns in one run: rates, their ratio and its spread.

Other work on a machine, its temperature and its clock move a rate by half from one minute to the next, but two ways
that are measured within the same seconds alike. So a ratio is one of a round's two times, and the median over the
rounds and the range are told. Beside it stands the ratio by processor time, which waits for nobody: it holds on a
machine with other work, too. Nothing is asserted about time; what a part should reach is told in a column.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ssl.data.threads import available_cores

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "faiss-gpu", "faiss-cpu", "scikit-learn")


@dataclass(frozen=True)
class Sample:
    """What one way took in one round: seconds on the clock and of processor time; MiB beyond what it was given."""

    wall: float
    cpu: float
    mib: float | None = None


Way = Callable[[], Sample]


@dataclass(frozen=True)
class Part:
    """Ways of doing one thing; the last is ours, the others are the peers'.

    `amount` of `unit` is what each does in a round. `ways` is called when the part's turn comes, so that what the parts
    work on need not exist at once. `wanted` and `wanted_memory` say, by the peer's name, which ratio is the goal. The
    rounds that warm up are not counted.
    """

    name: str
    unit: str
    amount: float
    ways: Callable[[], Mapping[str, Way]]
    wanted: Mapping[str, float] = field(default_factory=dict)
    wanted_memory: Mapping[str, float] = field(default_factory=dict)
    warm_ups: int = 1
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Our rate against one peer's, both in `unit` per second: medians; ratios: median, lowest and highest of rounds."""

    part: str
    peer: str
    unit: str
    peer_rate: float
    our_rate: float
    ratio: float
    lowest: float
    highest: float
    by_cpu: float
    wanted: float | None = None
    memory: float | None = None
    """The peer's MiB over ours."""
    wanted_memory: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Fact:
    """Something measured that has no peer, in words."""

    part: str
    found: str
    wanted: str = ""
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """Something to measure that has no peer."""

    name: str
    find: Callable[[], list[Fact]]


Entry = Part | Study
Result = Row | Fact


def timed(work: Callable[[], Any], *, finish: Callable[[], Any] = lambda: None) -> Way:
    """The way that does `work` in this process and its workers; `finish` waits for a device that computes on."""

    def way() -> Sample:
        finish()
        began, cpu_began = time.perf_counter(), cpu_seconds()
        work()
        finish()
        return Sample(time.perf_counter() - began, cpu_seconds() - cpu_began)

    return way


def in_fresh_process(measure: Callable[..., Sample], *given: Any) -> Way:
    """The way that is measured by `measure(*given)` in a process of its own, so that its peak memory can be told."""

    def way() -> Sample:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(measure, given)

    return way


def cpu_seconds() -> float:
    """Processor time of this process and its workers so far (on Linux; elsewhere the workers' is left out)."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        stat = Path(f"/proc/{worker.pid}/stat")
        if stat.exists():
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def take_turns(ways: Mapping[str, Way], *, rounds: int, warm_ups: int = 1) -> dict[str, list[Sample]]:
    """Every way once per round, each round beginning with another one; by the way's name, in the order of rounds."""
    names = list(ways)
    for name in names * warm_ups:
        ways[name]()
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(ways[name]())
    return samples


def rows(part: Part, samples: Mapping[str, Sequence[Sample]]) -> list[Row]:
    """One row for each peer of the part; ours is the last of the ways."""
    *peers, ours = samples
    return [_row(part, peer, samples[peer], samples[ours]) for peer in peers]


def _row(part: Part, peer: str, theirs: Sequence[Sample], ours: Sequence[Sample]) -> Row:
    ratios = [a.wall / b.wall for a, b in zip(theirs, ours, strict=True)]
    mib = [(a.mib, b.mib) for a, b in zip(theirs, ours, strict=True)]
    memory = [a / max(b, 0.1) for a, b in mib if a is not None and b is not None]
    return Row(
        part=part.name,
        peer=peer,
        unit=part.unit,
        peer_rate=part.amount / statistics.median(sample.wall for sample in theirs),
        our_rate=part.amount / statistics.median(sample.wall for sample in ours),
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        by_cpu=statistics.median(a.cpu / max(b.cpu, 1e-9) for a, b in zip(theirs, ours)),
        wanted=part.wanted.get(peer),
        memory=statistics.median(memory) if memory else None,
        wanted_memory=part.wanted_memory.get(peer),
        note=part.note,
    )


def measure(part: Entry, *, rounds: int) -> Sequence[Result]:
    """Build the part's ways and let them take turns, or do the study."""
    if isinstance(part, Study):
        return part.find()
    return rows(part, take_turns(part.ways(), rounds=rounds, warm_ups=part.warm_ups))


T = TypeVar("T")


def chosen(parts: Iterable[T], words: Sequence[str], *, name: Callable[[T], str]) -> Iterator[T]:
    """The parts whose name holds one of `words`; all where there are none. Raises ValueError where none is left."""
    names, found = [], False
    for part in parts:
        names.append(name(part))
        if not words or any(word.lower() in names[-1].lower() for word in words):
            found = True
            yield part
    if not found:
        raise ValueError(f"--parts {' '.join(words)} names no part; there are: {'; '.join(names)}")


# ---- what is printed and written -------------------------------------------------------------------------------------

HEADER = ("part", "peer", "unit", "peer/s", "ours/s", "ratio", "lowest", "highest", "by CPU", "wanted", "memory")


def cells(row: Row) -> tuple[str, ...]:
    """The row's numbers as text, in the order of HEADER."""
    memory = "" if row.memory is None else f"1/{row.memory:.1f}"
    if row.memory is not None and row.wanted_memory is not None:
        memory += f" (wanted 1/{row.wanted_memory:g})"
    numbers = (f"{value:.2f}" for value in (row.ratio, row.lowest, row.highest, row.by_cpu))
    wanted = "" if row.wanted is None else f"{row.wanted:g}"
    return (row.part, row.peer, row.unit, _rate(row.peer_rate), _rate(row.our_rate), *numbers, wanted, memory)


def _rate(value: float) -> str:
    """Three digits or more, so that a rate of 0.0123 is told as well as one of 12,345."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """The results as markdown: a table against the peers, then what has none, then where it was measured."""
    against = [result for result in results if isinstance(result, Row)]
    facts = [result for result in results if isinstance(result, Fact)]
    lines: list[str] = []
    if against:
        lines += [_line(HEADER), _line(["---"] * 3 + ["---:"] * (len(HEADER) - 3))]
        lines += [_line(cells(row)) for row in against]
    if facts:
        lines += ["", _line(("part", "found", "wanted")), _line(["---"] * 3)]
        lines += [_line((fact.part, fact.found, fact.wanted)) for fact in facts]
    notes = list(dict.fromkeys(f"{row.part}: {row.note}" for row in against if row.note))
    notes += [f"{fact.part}: {detail}" for fact in facts for detail in fact.details]
    lines += ["", *(f"- {note}" for note in notes), *([""] if notes else [])]
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in about.items())]) + "\n"


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


class Printer:
    """Prints results as they come, in columns."""

    widths = (52, 24, 10, 9, 9, 6, 6, 7, 6, 6, 6)

    def __init__(self) -> None:
        self._has_header = False

    def __call__(self, result: Result) -> None:
        if isinstance(result, Fact):
            wanted = f" (wanted: {result.wanted})" if result.wanted else ""
            print(f"{result.part}: {result.found}{wanted}")
            print("".join(f"    {detail}\n" for detail in result.details), end="", flush=True)
            return
        if not self._has_header:
            self._has_header = True
            print(self._columns(HEADER))
        print(self._columns(cells(result)), flush=True)
        if result.note:
            print(f"    {result.note}", flush=True)

    def _columns(self, texts: Sequence[str]) -> str:
        sides = [text.ljust(width) for text, width in zip(texts[:3], self.widths)]
        return " ".join([*sides, *(text.rjust(width) for text, width in zip(texts[3:], self.widths[3:]))])


def write(path: Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """Write the results to `path`: .md as a table, .json as objects."""
    if path.suffix == ".json":
        kinds = {Row: "against", Fact: "facts"}
        grouped: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds.values()}
        for result in results:
            grouped[kinds[type(result)]].append(asdict(result))
        text = json.dumps({"about": dict(about), **grouped}, indent=2) + "\n"
    else:
        text = markdown(results, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def about(given: argparse.Namespace) -> dict[str, Any]:
    """Where and how it was measured: command, commit, machine, versions, threads, rounds."""
    machine: dict[str, Any] = {
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": _commit(),
        "machine": f"{_processor()}, {available_cores()} cores for this process, {platform.system()}",
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    machine["threads"] = given.threads
    machine["rounds"] = given.rounds or "each part's own"
    machine["python"] = platform.python_version()
    machine["versions"] = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    return machine


def _module() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return "benchmarks" if spec is None else spec.name.removesuffix(".__main__")


def _commit() -> str:
    try:
        git = ["git", "-C", str(ROOT)]
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + (" and changes that are not committed" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- the command line ------------------------------------------------------------------------------------------------


def parser_of(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="how often every way has its turn")
    parser.add_argument("--threads", type=int, default=available_cores(), help="ours, and the peers' processes")
    parser.add_argument("--parts", nargs="+", default=[], help="only parts whose name holds one of these words")
    parser.add_argument("--out", type=Path, help="also write a table (.md) or numbers (.json) here")
    return parser


def run(parts: Iterable[Entry], given: argparse.Namespace) -> list[Result]:
    """Measure, print and write the chosen parts."""
    torch.set_num_threads(given.threads)
    for name, value in about(given).items():
        print(f"{name}: {value}")
    results: list[Result] = []
    show = Printer()
    for part in chosen(parts, given.parts, name=lambda part: part.name):
        for result in measure(part, rounds=given.rounds):
            results.append(result)
            show(result)
    if given.out:
        write(given.out, results, about(given))
        print(f"written: {given.out}")
    return results
