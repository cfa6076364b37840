"""Kills a run again and again, starts it again by the same command, and compares its end with an uninterrupted run's.

    python -m tests.kill --method simclr --kills 100

Every kill is a SIGKILL. Half of them come from outside at a random moment: while the run starts, or behind some step.
The others are aimed, just before a file operation in the run folder (a file opened, a folder made, renamed or removed):
in turn each of those that an uninterrupted run needs to start and to save, so that no stage of a save is missed. The
number of decoding threads changes at each start, and wandb runs in a few.

The runs are tiny, on the CPU, with accumulation, an average of the weights and evaluations. Steps are logged at another
rhythm than they are saved at.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from tests.forks import start

TINY_RESNET = ["model=resnet10", "model.args={layers:[1,1,1,1],channels:[8,8,16,16]}"]
METHODS = {
    "mae": [
        *["method=mae", "model=vit_micro", "model.args={embed_dim:32,depth:2,num_heads:2}"],
        *["method.decoder_dim=32", "method.decoder_depth=1", "method.decoder_heads=2"],
        "data.in_memory_gib=0",  # decoded for each batch; the other two hold their images
    ],
    "simclr": ["method=simclr", *TINY_RESNET],
    "relative_location": ["method=relative_location", *TINY_RESNET, "method.hidden_dim=32"],
}
SAVE_EVERY = 2
STEPS_PER_KILL = 2 * SAVE_EVERY  # that a start may do before it is killed; on average it does half of them
STEPS_PER_EPOCH = 6
COMMON = [
    *["data=embedded", "data.source.num_train=96", "data.source.num_test=12", "launch=none", "trainer.device=cpu"],
    *[
        "trainer.global_batch_size=16",
        "trainer.device_batch_size=8",
        "trainer.ema_decay=0.9",
        "trainer.clip_grad_norm=1",
    ],
    *[f"trainer.checkpoint_every_steps={SAVE_EVERY}", "trainer.log_every_steps=3", "trainer.precision=fp32"],
    *["trainer.eval_every_epochs=3", "online.health.sample=24"],
]
CLOCK = ("images_per_second", "data_wait", "mfu", "train_seconds", "versions")  # whose commit may change meanwhile
"""What a run tells of the time it took: in metrics.jsonl, and in a checkpoint's card."""
WAIT = 300.0
"""Seconds that one start may take, on a busy machine."""
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
"""Python's audit events of what changes files."""


@dataclass(frozen=True)
class Aim:
    """Where a start ends: at a file operation of its start (save 0) or of one of its saves, or at a moment."""

    save: int
    operation: int
    lines: int | None = None
    """Lines of metrics.jsonl to wait for before the moment comes; None where the operation alone ends it."""
    delay: float = 0.0
    """Seconds from there to the moment."""


@dataclass(frozen=True)
class Pace:
    """How fast a run is on this machine, in seconds."""

    start: float  # to the first logged step
    step: float


@dataclass
class Death:
    """What a kill met."""

    step: int
    """The last step in metrics.jsonl."""
    saved: int
    """The last step that was saved."""
    saving: bool
    """Whether a checkpoint was being written, put in its place, or older ones were being removed."""
    where: str
    """The file operation that it came before, or the moment."""


@dataclass
class Report:
    """What became of a run that was killed again and again."""

    method: str
    steps: int
    deaths: list[Death] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list)

    def text(self) -> str:
        saving = sum(death.saving for death in self.deaths)
        places = Counter(death.where for death in self.deaths)
        repeated = sum(max(death.step - death.saved, 0) for death in self.deaths)
        lines = [
            f"{self.method}: {len(self.deaths)} kills, {self.starts} starts, {self.steps} steps, {self.seconds:.0f} s",
            f"  {saving} of the kills during a save; {repeated} logged steps were done again",
            "  killed at step "
            + " ".join(str(death.step) + "s" * death.saving for death in self.deaths)
            + " (s: saving)",
            "  killed " + ", ".join(f"{where} {count}x" for where, count in sorted(places.items())),
        ]
        verdict = [f"  DIFFERENT: {difference}" for difference in self.differences] or [
            "  weights, average, optimizer state, card and metrics equal the uninterrupted run's bit for bit"
        ]
        return "\n".join(lines + verdict)


# ---- in the run's process --------------------------------------------------------------------------------------------


class Watch:
    """Counts the file operations below `out`, by the save that they belong to, and ends the process before a given one.

    Each is written to the file descriptor `record`, of which a killed process loses nothing.
    """

    def __init__(self, out: str, record: int, until: tuple[int, int] | None) -> None:
        self.out, self.record, self.until = out, record, until
        self.place = (0, 0)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in OPERATIONS:
            return
        path = _path_of(event, args)
        if path is None or not path.startswith(self.out) or path.startswith(f"{self.out}/wandb"):
            return
        save, operation = self.place
        if event == "os.mkdir" and os.path.basename(path).startswith(".partial_"):
            save, operation = save + 1, 0
        name = f"{event} {_plainly(path.removeprefix(self.out))}"
        os.write(self.record, f"{save} {operation} {name}\n".encode())
        if self.until is not None and (save, operation) >= self.until:
            os.kill(os.getpid(), signal.SIGKILL)
        self.place = (save, operation + 1)


def watch(out: str, record: str, until: tuple[int, int] | None) -> None:
    """Watch this process from now on."""
    sys.addaudithook(Watch(out, os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), until))


def _path_of(event: str, args: tuple[Any, ...]) -> str | None:
    path = args[0]
    if isinstance(path, int):
        return None
    path = os.fsdecode(path)
    folder = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1  # where the path is relative to one
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path)


def _plainly(path: str) -> str:
    """A path without the numbers of steps."""
    return "".join("N" if sign.isdigit() else sign for sign in path).replace("NNNNNNNN", "*")


# ---- outside it ------------------------------------------------------------------------------------------------------


def kill_and_compare(method: str, *, kills: int, seed: int, folder: Path, offline_every: int = 10) -> Report:
    """Run `method` once in peace and once with `kills` kills, below `folder`; every `offline_every`-th start of the
    second has wandb offline.

    Raises RuntimeError where a start fails, or does not end.
    """
    began = time.monotonic()
    steps = STEPS_PER_KILL * (kills + 1)
    report = Report(method, steps)
    peace, killed = folder / "peace", folder / "killed"
    words = ["ssl.pretrain", *METHODS[method], *COMMON, f"trainer.epochs={steps / STEPS_PER_EPOCH}"]
    record, said = folder / "operations", folder / "said"
    pace = _in_peace([*words, f"out={peace}", "loader.threads=1", "wandb.mode=disabled"], peace, folder)
    aims = _aims(_operations(record), kills=kills, pace=pace, random=random.Random(seed))
    draw = random.Random(seed + 1)
    for number, aim in enumerate([*aims, None]):
        wandb = "offline" if offline_every and number % offline_every == offline_every - 1 else "disabled"
        again = [*words, f"out={killed}", f"loader.threads={draw.randint(1, 4)}", f"wandb.mode={wandb}"]
        until = None if aim is None else (aim.save, aim.operation)
        child = start(again, home=folder, said=said, before=partial(watch, str(killed), str(record), until))
        report.starts += 1
        try:
            if aim is not None and aim.lines is not None:
                _kill_at_the_moment(child, killed / "metrics.jsonl", aim)
            child.join(WAIT)
        finally:
            child.kill()
            child.join()
        if aim is None and child.exitcode == 0:
            break
        if child.exitcode != -signal.SIGKILL or aim is None:
            raise RuntimeError(
                f"start {report.starts} of the {method} run ended with exit code {child.exitcode}, wanted was "
                f"{'0' if aim is None else f'its end by {aim}'}; it said:\n{said.read_text()[-4000:]}"
            )
        report.deaths.append(_death(killed, record, aim))
        said.unlink()
    report.differences = differences(peace, killed)
    report.seconds = time.monotonic() - began
    return report


def differences(peace: Path, killed: Path) -> list[str]:
    """In words, what a run folder has that another has not, but for what the clock and wandb say."""
    found = []
    lines, others = metrics_of(peace), metrics_of(killed)
    if lines != others:
        first = next((a, b) for a, b in zip([*lines, None], [*others, None]) if a != b)
        found.append(f"metrics.jsonl: {len(lines)} and {len(others)} lines, first {first[0]} and {first[1]}")
    names = [{path.name for path in (run / "checkpoints").iterdir()} for run in (peace, killed)]
    if names[0] != names[1]:
        found.append(f"checkpoints: {sorted(names[0])} and {sorted(names[1])}")
    names = [{path.name for path in run.iterdir() if "wandb" not in path.name} for run in (peace, killed)]
    if names[0] != names[1]:
        found.append(f"files of the run: {sorted(names[0])} and {sorted(names[1])}")
    for name in sorted(path.name for path in (peace / "checkpoints").iterdir()):
        found += _different_checkpoints(peace / "checkpoints" / name, killed / "checkpoints" / name)
    return found


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [_timeless(line) for line in lines]


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _timeless(value) if isinstance(value, dict) else value for key, value in values.items() if key not in CLOCK
    }


def _different_checkpoints(first: Path, second: Path) -> list[str]:
    if not second.is_dir():
        return []  # told already
    found = []
    if (names := {path.name for path in first.iterdir()}) != {path.name for path in second.iterdir()}:
        found.append(f"{first.name} has the files {sorted(names)}, the other one {sorted(os.listdir(second))}")
    for path in sorted(first.glob("*.safetensors")):
        if path.read_bytes() != (second / path.name).read_bytes():
            found.append(f"{first.name}/{path.name} differs")
    ours, theirs = (_timeless(json.loads((folder / "state.json").read_text())) for folder in (first, second))
    for state in (ours, theirs):
        del state["sha256"]["run.yaml"]  # it names the run folder and the threads
    found += [
        f"{first.name}/state.json: {key} is {ours.get(key)} and {theirs.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    return found


def _in_peace(words: list[str], out: Path, folder: Path) -> Pace:
    """Run to the end, with all operations recorded."""
    said, record = folder / "said", folder / "operations"
    child = start(words, home=folder, said=said, before=partial(watch, str(out), str(record), None))
    try:
        _wait_until(child, record.exists)  # the first start may have to wait for the server that forks it
        began = time.monotonic()
        _wait_until(child, lambda: num_lines(out / "metrics.jsonl") > 0)
        started = time.monotonic()
        child.join(WAIT)
    finally:
        child.kill()
        child.join()
    if child.exitcode != 0:
        raise RuntimeError(f"the uninterrupted run ended with exit code {child.exitcode}:\n{said.read_text()[-4000:]}")
    said.unlink()
    last = (out / "metrics.jsonl").stat().st_mtime - time.time() + time.monotonic()
    return Pace(start=started - began, step=(last - started) / metrics_of(out)[-1]["step"])


def _operations(record: Path) -> dict[int, int]:
    """How many file operations a start has (0), and a save (1): the longest."""
    counts: Counter[int] = Counter(int(line.split()[0]) for line in record.read_text().splitlines())
    return {0: counts[0], 1: max(count for save, count in counts.items() if save)}


def _aims(operations: dict[int, int], *, kills: int, pace: Pace, random: random.Random) -> list[Aim]:
    """Half of them at moments, the others at operations: of a save, for one of a start each, in a shuffled order."""
    beyond = (STEPS_PER_KILL // SAVE_EVERY + 1, 0)  # where a start that a moment comes too late for ends
    of_start, of_save = (cycle(random.sample(range(operations[save]), operations[save])) for save in (0, 1))
    aims = []
    for number in range(kills):
        if number % 2:
            lines = random.randint(0, 1)
            delay = random.uniform(0, pace.start if lines == 0 else SAVE_EVERY * pace.step)
            aims.append(Aim(*beyond, lines=lines, delay=delay))
        elif number % 12 == 0:
            aims.append(Aim(0, next(of_start)))
        else:
            aims.append(Aim(random.randint(1, 2), next(of_save)))
    return aims


def _kill_at_the_moment(child: Any, metrics: Path, aim: Aim) -> None:
    assert aim.lines is not None
    lines = num_lines(metrics) + aim.lines
    _wait_until(child, lambda: num_lines(metrics) >= lines)
    child.join(aim.delay)
    child.kill()


def _wait_until(child: Any, condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + WAIT
    while not condition() and child.is_alive() and time.monotonic() < deadline:
        child.join(0.002)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _death(run: Path, record: Path, aim: Aim) -> Death:
    logged = [json.loads(line)["step"] for line in _whole_lines(run / "metrics.jsonl")]
    folders = [path.name for path in (run / "checkpoints").glob("*")]
    saved = [int(name.removeprefix("step_")) for name in folders if name.startswith("step_")]
    operations = record.read_text().splitlines()
    place = operations[-1].split(maxsplit=2) if operations else ["0", "0", "the first operation"]
    aimed = aim.lines is None or (int(place[0]), int(place[1])) >= (aim.save, aim.operation)
    during = aimed and int(place[0]) > 0
    return Death(
        step=max(logged, default=0),
        saved=max(saved, default=0),
        saving=during or any(name.startswith(".partial_") for name in folders),
        where=f"before {place[2]}" if aimed else "at a moment",
    )


def _whole_lines(path: Path) -> list[str]:
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    different = False
    for method in given.method:
        with tempfile.TemporaryDirectory(prefix="kill_") as folder:
            report = kill_and_compare(method, kills=given.kills, seed=given.seed, folder=Path(folder).resolve())
        print(report.text(), flush=True)
        different = different or bool(report.differences)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
