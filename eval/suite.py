"""Several evaluations of several checkpoints on several sets of images, in one table:
`python -m eval.suite ckpt=[runs/a,runs/b] suite=[knn,linear_probe] data=[checkpoint,cifar10] ...`.
"""

from __future__ import annotations

import importlib
import itertools
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.config import register
from eval.protocols import protocol_id
from eval.subject import BASELINES, features_shared
from ssl.command import run_command
from ssl.config import CONF, Device, ModelConfig, Precision, check, plain, suggest
from ssl.tables import Table, metric_columns

USAGE = """eval.suite needs ckpt=, what is judged:
  python -m eval.suite ckpt=runs/<run>                                      kNN and a linear probe on its own images
  python -m eval.suite ckpt=[runs/a,runs/b] suite=[knn] knn.k=[20,200]
  python -m eval.suite ckpt=runs/<run> suite=[linear_probe,{name:linear_probe,protocol:mae},{name:finetune,recipe:mae}]
  python -m eval.suite ckpt=runs/<run> data=[checkpoint,{name:cifar10,root:/data/cifar10}]"""
SCHEMAS = {
    "knn": "KnnConfig",
    "linear_probe": "LinearProbeConfig",
    "finetune": "FinetuneConfig",
    "health": "HealthConfig",
}
"""The evaluations that a suite can run, modules of `eval`, and what each takes."""
MOST_METRICS = 6
SHARED = ("seed", "device", "precision", "batch_size", "threads")
ELSEWHERE = {"device": "trainer", "precision": "trainer", "threads": "loader"}
"""Where an evaluation that trains the whole model has a shared setting."""


@dataclass
class SuiteConfig:
    """What `python -m eval.suite` takes: lists, or one value each; then what all evaluations share; then settings of
    single ones, such as `knn.k=[20,200]`.
    """

    ckpt: Any = None  # one, or a list
    suite: Any = field(default_factory=lambda: ["knn", "linear_probe"])  # names, or mappings {name:knn,k:[200]}
    sets: Any = field(default_factory=lambda: ["checkpoint"])  # `data=` on the command line
    model: ModelConfig | None = None  # with ckpt=random
    seed: int | None = None  # of every evaluation; null: each one's own
    device: Device | None = None  # of every evaluation
    precision: Precision | None = None  # of every evaluation
    batch_size: int | None = None  # of every evaluation
    threads: int | None = None  # of every evaluation
    out: str | None = None  # folder of the tables and of all results; null: results beside their runs
    knn: dict[str, Any] = field(default_factory=dict)  # settings of eval.knn alone
    linear_probe: dict[str, Any] = field(default_factory=dict)  # settings of eval.linear_probe alone
    finetune: dict[str, Any] = field(default_factory=dict)  # settings of eval.finetune alone
    health: dict[str, Any] = field(default_factory=dict)  # settings of eval.health alone


@dataclass
class Cell:
    """One evaluation of one checkpoint on one set: what it was asked, then what came of it."""

    evaluation: str
    title: str
    ckpt: str
    data: str
    config: DictConfig
    result: dict[str, Any] | None = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def metrics(self) -> dict[str, Any]:
        return self.result["metrics"] if self.result else {}


def run(config: DictConfig) -> list[Cell]:
    """Run every evaluation on every set for every checkpoint, print one table and write it; returns the cells.

    A setting that no evaluation has is refused before the first one starts. An evaluation that fails is reported, and
    the others go on.
    """
    cells = make_cells(config)
    places = itertools.groupby(enumerate(cells, start=1), key=lambda each: (each[1].ckpt, each[1].data))
    for _, group in places:
        with features_shared():
            for number, cell in group:
                print(f"\n[{number}/{len(cells)}] {cell.title} of {cell.ckpt} on {cell.data}", flush=True)
                _judge(cell)
    folder = _folder(config, cells)
    for name in ("suite.csv", "suite.md"):
        one_table(cells, most=None if name == "suite.csv" else MOST_METRICS).write(folder / name)
    print(f"\n{one_table(cells, most=MOST_METRICS).text()}\n")
    for cell in cells:
        if cell.error is not None:
            print(f"failed: {cell.title} of {cell.ckpt} on {cell.data}: {cell.error}", file=sys.stderr)
    print(f"written: {folder}/suite.csv and suite.md, and a JSON for each row; equal protocols were measured alike")
    paths = [cell.result["path"] for cell in cells if cell.result]
    if paths:
        print(f"next: python -m eval.compare {shlex.join(paths)}", flush=True)
    return cells


def make_cells(config: DictConfig) -> list[Cell]:
    """What is to be run, checkpoint by checkpoint and set by set. Raises ValueError for settings that do not fit."""
    checkpoints = [str(each) for each in _as_list(config.ckpt)]
    suite = list(_entries(_as_list(config.suite), key="suite", example="{name:knn,k:[200]}"))
    entries = list(_entries(_as_list(config.sets), key="data", example="{name:folder,root:/photos}"))
    evaluations = [settings["name"] for _, settings in suite]
    unknown = [name for name in evaluations if name not in SCHEMAS]
    if unknown or not evaluations or not checkpoints or not entries:
        raise ValueError(
            f"suite={evaluations} must name one or more of {', '.join(SCHEMAS)}, and ckpt= and data= one or more each"
        )
    plainly = [each for each in _as_list(config.suite) if not isinstance(each, Mapping)]
    for name, wanted in (("ckpt", checkpoints), ("suite", plainly)):
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"{name}={wanted} names something twice")
    for name in SCHEMAS:
        if config[name] and name not in evaluations:
            raise ValueError(
                f"{name}.{next(iter(config[name]))} has no effect: suite={evaluations} does not run {name}"
            )
    if config.model is not None and not set(checkpoints) - set(BASELINES[1:]):
        raise ValueError(f"model= has no effect with ckpt={checkpoints}; leave it out, or give ckpt=random")
    cells = []
    for ckpt, (data_title, data), (title, entry) in itertools.product(checkpoints, entries, suite):
        model = _model(config, ckpt, checkpoints)
        values = _values(config, ckpt=ckpt, title=title, entry=entry, data_title=data_title, data=data)
        composed = compose_evaluation(entry["name"], values, model=model)
        cells.append(Cell(entry["name"], title, ckpt, data_title, composed))
    return cells


def compose_evaluation(name: str, values: Mapping[str, Any], *, model: Mapping[str, Any] | None = None) -> DictConfig:
    """The config of `python -m eval.<name>` with these values: an option of a config group by its name.

    Raises ValueError for what the evaluation does not take.
    """
    schema = getattr(importlib.import_module(f"eval.{name}"), SCHEMAS[name])
    register(schema)
    values = dict(values)
    data = dict(values.pop("data"))
    groups = {"data": data.pop("name")}
    groups |= {key: values.pop(key) for key in list(values) if isinstance(values[key], str) and _is_group(key)}
    words = [f"{key}={option}" for key, option in groups.items()]
    merged: dict[str, Any] = {**values, **({"data": data} if data else {}), **({"model": model} if model else {})}
    try:
        if GlobalHydra.instance().is_initialized():
            composed = compose(name, overrides=words)
        else:  # called from Python
            with initialize_config_dir(CONF, version_base="1.3"):
                composed = compose(name, overrides=words)
        hint = suggest(composed, [f"{key}=" for key in _dotted({**values, "data": data})])
        if hint:
            raise ValueError(f"{name} does not take all of this: {hint}")
        OmegaConf.set_struct(composed, False)  # the preset that model= names may have arguments of its own
        config = OmegaConf.merge(composed, merged)
        OmegaConf.set_struct(config, True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"eval.{name} cannot be set so: {error}") from error
    assert isinstance(config, DictConfig)
    try:
        check(config, schema)
    except ValueError as error:
        raise ValueError(f"eval.{name} on data={groups['data']}: {error}") from error
    return config


def one_table(cells: Sequence[Cell], *, most: int | None) -> Table:
    """A row for each cell, with the id of its protocol: equal ids were measured alike."""
    names = metric_columns((cell.metrics for cell in cells), most=most)
    columns = ["checkpoint", "data", "evaluation", "protocol", *names, "seconds", "failed"]
    rows = []
    for cell in cells:
        key = protocol_id(cell.result["protocol"]) if cell.result else None
        error = cell.error.splitlines()[0] if cell.error else None
        numbers = [cell.metrics.get(name) for name in names]
        rows.append([cell.ckpt, cell.data, cell.title, key, *numbers, round(cell.seconds, 1), error])
    if not any(cell.error for cell in cells):
        return Table(columns[:-1], [row[:-1] for row in rows])
    return Table(columns, rows)


def _judge(cell: Cell) -> None:
    """Run one evaluation; what it raises stays with its cell."""
    began = time.perf_counter()
    try:
        evaluate = importlib.import_module(f"eval.{cell.evaluation}").run
        folder = {"out": Path(cell.config.out)} if cell.evaluation == "finetune" else {}
        cell.result = evaluate(cell.config, **folder)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):  # not the user's mistake, as far as we know: show where
            traceback.print_exc()
        cell.error = str(error)
        print(f"failed: {error}", file=sys.stderr, flush=True)
    cell.seconds = time.perf_counter() - began


def _values(
    config: DictConfig,
    *,
    ckpt: str,
    title: str,
    entry: Mapping[str, Any],
    data_title: str,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """What one evaluation is told: what all share, what this one is set to, where its results go."""
    evaluation = str(entry["name"])
    values: dict[str, Any] = {"ckpt": ckpt, "data": dict(data)}
    whole_model = evaluation == "finetune"
    for key in SHARED:
        value = plain(config)[key]
        if value is None:
            continue
        if not whole_model or key == "seed":
            values[key] = value
        elif key in ELSEWHERE:
            values.setdefault(ELSEWHERE[key], {})[key] = value
    own = {**plain(config[evaluation]), **{key: value for key, value in entry.items() if key != "name"}}
    for key, value in own.items():
        if key in ("ckpt", "data", "out", "name", "model"):
            raise ValueError(f"{evaluation}.{key} has no effect: {key} is told to the whole suite")
        nested = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = {**values[key], **value} if nested else value
    folder = Path(config.out or "runs/suites").expanduser() / _slug(ckpt)
    if whole_model:  # a run folder: the same suite again continues it
        recipe = "" if "recipe" in entry else f"_{own.get('recipe', 'own')}"
        values["out"] = str(folder / f"{title}{recipe}_{data_title}" / f"seed{values.get('seed', 0)}")
    elif config.out:
        values["out"] = str(folder)
    if (title, data_title) != (evaluation, data["name"]) and not whole_model:
        values["name"] = title if data_title == "checkpoint" else f"{title}_{data_title}"
    return values


def _model(config: DictConfig, ckpt: str, checkpoints: Sequence[str]) -> Mapping[str, Any] | None:
    """`model=` is for the untrained one; where none is judged, for weights that do not say what they are of."""
    if config.model is None or (ckpt != "random" and "random" in checkpoints) or ckpt == "pixels":
        return None
    return plain(config.model)


def _entries(given: Sequence[Any], *, key: str, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(title, settings) of each entry of a list; an evaluation's title has the words that it is set to, such as
    linear_probe_mae, and entries of one title are numbered from the second on.
    """
    seen: dict[str, int] = {}
    for entry in given:
        settings = dict(entry) if isinstance(entry, Mapping) else {"name": str(entry)}
        if "name" not in settings:
            raise ValueError(f"an entry of {key}= needs its name, such as {example}; got {settings}")
        words = [str(settings["name"])]
        if key == "suite":
            words += [value for name, value in settings.items() if isinstance(value, str) and name != "name"]
        title = "_".join(words).replace("/", "_")  # it names files
        seen[title] = seen.get(title, 0) + 1
        yield (title if seen[title] == 1 else f"{title}_{seen[title]}"), settings


def _as_list(value: Any) -> list[Any]:
    value = plain(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_group(key: str) -> bool:
    return (Path(CONF) / key).is_dir()


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        yield from _dotted(value, f"{name}.") if isinstance(value, Mapping) and value else [name]


def _slug(ckpt: str) -> str:
    """A checkpoint's name as a folder's: its last parts, without `checkpoints`."""
    parts = [part for part in Path(ckpt).parts if part not in ("/", "..", "checkpoints", "runs")]
    return "_".join(parts[-3:]).replace(":", "_") or "ckpt"


def _folder(config: DictConfig, cells: Sequence[Cell]) -> Path:
    """Where the tables go: `out`; the folder of the results, where they share one; else a new one in `runs`."""
    if config.out:
        return Path(config.out).expanduser()
    folders = {Path(cell.result["path"]).parent for cell in cells if cell.result}
    return folders.pop() if len(folders) == 1 else Path("runs/suites") / time.strftime("%Y-%m-%d_%H-%M-%S")


def spell_out(words: Sequence[str]) -> list[str]:
    """Command-line words as Hydra wants them: `data=[...]` is `sets=[...]`, because a config group bears that name, and
    `knn.k=...` is `++knn.k=...`, which says that it need not be there before.
    """
    spelled = []
    for word in words:
        key, sign, value = word.partition("=")
        if key == "data":
            word = f"sets={value}"
        elif sign and key.split(".")[0] in SCHEMAS:
            word = f"++{word}"
        spelled.append(word)
    return spelled


def main() -> None:
    """The command line. A missing `ckpt` ends it with exit code 2, a failed evaluation or a mistake with 1."""
    register(SuiteConfig)

    def task(config: DictConfig) -> None:
        if config.ckpt is None:
            print(USAGE, file=sys.stderr)
            raise SystemExit(2)
        check(config, SuiteConfig)
        cells = run(config)
        failed = [cell for cell in cells if cell.error is not None]
        if failed:
            raise ValueError(f"{len(failed)} of {len(cells)} evaluations failed (above)")

    sys.argv[1:] = spell_out(sys.argv[1:])
    run_command(task, config_name="suite")


if __name__ == "__main__":
    main()
