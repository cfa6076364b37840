"""The main job on the embedded images in minutes: `make demo`, or `python -m eval.demo`.

Pretrains with the command that a person would type, then scores raw pixels, the untrained and the trained backbone with
the code of `eval.knn` and `eval.linear_probe`, prints a table and draws one picture.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from eval import ROOT, knn, linear_probe, neighbours
from eval.command import report
from eval.config import register
from eval.demo_picture import Neighbours, draw
from eval.rows import Rows
from eval.subject import Judged, read_features
from ssl.config import CONF

OUT = Path("runs/demo")
NUM_QUERIES, NUM_NEIGHBOURS = 5, 6
PROBE_STEPS = 500
CLEARLY = 0.2
SUBJECTS = {"raw pixels": "pixels", "untrained": "random", "trained": "the run"}


@dataclass(frozen=True)
class Row:
    """One line of the table: top-1 as fractions."""

    subject: str
    knn: float
    linear: float


def run(out: Path, overrides: Sequence[str] = ()) -> list[Row]:
    """Pretrain in `out`, score the three subjects, write `out/demo.png`; returns the table's rows.

    A second call finds the run complete and goes on to the scores. `overrides` are passed on to `ssl.pretrain`.
    """
    began = time.perf_counter()
    pretrain(out, overrides)
    minutes = (time.perf_counter() - began) / 60
    rows, judged = [], {}
    for title, ckpt in SUBJECTS.items():
        print(f"\n{title}", flush=True)
        configs = scoring_configs(out, ckpt)
        judged[title] = read_features(configs["knn"], command="eval.knn")
        top1 = {}
        for name, score in (("knn", knn.score), ("linear_probe", linear_probe.score)):
            one = named(judged[title], f"{name}_{title.replace(' ', '_')}" if ckpt in ("pixels", "random") else name)
            top1[name] = report(configs[name], one, score)["metrics"]["top1"]
        rows.append(Row(title, top1["knn"], top1["linear_probe"]))
    picture = out / "demo.png"
    draw(
        picture,
        loss=read_losses(out / "metrics.jsonl"),
        rows=[(row.subject, row.knn, row.linear) for row in rows],
        before=nearest(judged["untrained"]),
        after=nearest(judged["trained"]),
        num_images=judged["trained"].protocol["data"]["num_train"],
    )
    print(f"\n{table(rows)}\n")
    print(f"pretraining took {minutes:.1f} minutes, all of it {(time.perf_counter() - began) / 60:.1f}")
    print(f"look at: {picture}; the run, its checkpoint and its scores: {out}")
    print("next, on your own images: python -m ssl.pretrain method=simclr model=resnet18 data=folder data.root=PATH")
    return rows


def pretrain(out: Path, overrides: Sequence[str]) -> None:
    """Run the command that a person would type, its output passed through. Ends with its exit code where it fails."""
    words = ["-m", "ssl.pretrain", "experiment=demo", f"out={out}", "wandb.mode=disabled", *overrides]
    print(f"$ python {shlex.join(words)}", flush=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen([sys.executable, *words], env={**os.environ, "PYTHONPATH": path})
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.wait()  # the terminal has interrupted it too; it says what it saved
        raise SystemExit(130) from None
    if code:
        print("pretraining did not end well (above); make demo again continues from what was saved", file=sys.stderr)
        raise SystemExit(code)


def scoring_configs(out: Path, ckpt: str) -> dict[str, DictConfig]:
    """What `eval.knn` and `eval.linear_probe` compose, for the run or for a baseline on the images of the run."""
    register(knn.KnnConfig)
    register(linear_probe.LinearProbeConfig)
    baseline = ckpt in ("pixels", "random")
    words = [f"ckpt={ckpt if baseline else out}", f"out={out / 'eval'}"]
    words += ["data=embedded"] if baseline else []
    words += ["model=resnet10"] if ckpt == "random" else []
    with initialize_config_dir(CONF, version_base="1.3"):
        configs = {
            "knn": compose("knn", overrides=words),
            "linear_probe": compose("linear_probe", overrides=[*words, f"steps={PROBE_STEPS}"]),
        }
    if baseline:
        of_run = OmegaConf.load(out / "config.yaml")
        for config in configs.values():
            config.data = OmegaConf.merge(config.data, of_run.data)
            config.seed = of_run.seed
            if ckpt == "random":
                config.model = OmegaConf.merge(config.model, of_run.model)
    return configs


def named(judged: Judged, name: str) -> Judged:
    """The same features, for a JSON of another name."""
    return replace(judged, name=name, about={**judged.about, "command": "eval.demo"})


def nearest(judged: Judged) -> Neighbours:
    """The first test images, not chosen ones, and the train images that are nearest to each."""
    rows = Rows(judged.train.features, "cosine", judged.device)
    found = neighbours.nearest(rows, judged.test.features[:NUM_QUERIES], NUM_NEIGHBOURS, index="auto").place  # (Q, k)
    train, test, classes = judged.splits.train, judged.splits.test, judged.splits.classes
    queries = judged.test.index[:NUM_QUERIES].tolist()
    return Neighbours(
        queries=[test.read(index) for index in queries],  # pyright: ignore[reportArgumentType]  # embedded: pixels
        names=[classes[label] for label in judged.test.labels[:NUM_QUERIES].tolist()],
        images=[[train.read(int(judged.train.index[place])) for place in row] for row in found.tolist()],  # pyright: ignore
        right=(judged.train.labels[found] == judged.test.labels[:NUM_QUERIES, None]).tolist(),
    )


def read_losses(path: Path) -> list[tuple[float, float]]:
    """(epoch, loss) of each logged step."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["epoch"], line["loss"]) for line in lines if "loss" in line]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, accuracies in percent."""
    lines = [f"{'top-1 on test':<16}{'kNN':>10}{'linear probe':>16}"]
    lines += [f"{row.subject:<16}{row.knn:>10.1%}{row.linear:>16.1%}" for row in rows]
    return "\n".join(lines)


def check_won(rows: Sequence[Row]) -> None:
    """Raise ValueError unless the trained backbone beats the untrained one by `CLEARLY` in both scores."""
    untrained, trained = rows[1], rows[2]
    if min(trained.knn - untrained.knn, trained.linear - untrained.linear) < CLEARLY:
        raise ValueError(f"the trained backbone does not win clearly (by {CLEARLY:.0%}); something is wrong here")


def main() -> None:
    """The command line: words like `trainer.epochs=10` go to `ssl.pretrain`, `out=` names the folder."""
    given = [word for word in sys.argv[1:] if word.startswith("out=")]
    try:
        check_won(run(Path(given[-1][4:]) if given else OUT, [word for word in sys.argv[1:] if word not in given]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
