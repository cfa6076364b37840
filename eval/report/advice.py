"""What a run's numbers say is wrong, and what helps: each sign with the bound that it passed."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.collapse import ADVICE, signs_of_collapse
from eval.protocols import protocol_id
from eval.report.gather import LOST, RUNNING, RunFolder
from eval.report.metrics import Curve
from ssl.starts import COMPLETE, FAILED

MOST_WAIT = 0.10
"""Share of the time in which the device waits for data."""
ENOUGH = 20
"""Logged points of a curve below which nothing is said of its course."""
LEAST_FALL = 0.01
"""Of its first value: a loss that fell less has not fallen."""
RISEN = 0.25
"""Of its fall: a loss that has risen by so much again above its lowest, and by more than LEAST_FALL of its first value
and than the spread within a tenth.
"""
SLOWED = 0.6
FALLEN_KNN = 0.02
UNKNOWN_DIMENSIONS = 32
"""Stand for those of older runs: for so many and more, four directions are few."""


@dataclass(frozen=True)
class Warning:
    """Something that a person should look at."""

    what: str
    advice: str
    is_severe: bool = False


def warnings_of(run: RunFolder, state: str | None = None) -> list[Warning]:
    """What is worth a person's look in a run, the severe first. `state` is the run's where it is known better."""
    state = state or run.state
    checks = (_ending, _loss, _not_finite, _collapse, _accuracy, _data_wait, _throughput, _warmup, _bad_images)
    found = [warning for check in (*checks, _evaluations, _versions) for warning in _heard(check, run, state)]
    return sorted(found, key=lambda warning: not warning.is_severe)


def _heard(check: Callable[[RunFolder, str], Iterator[Warning]], run: RunFolder, state: str) -> list[Warning]:
    """What a check finds; where the folder holds something else than a run writes, that it could not be made."""
    try:
        return list(check(run, state))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        name = check.__name__.strip("_").replace("_", " ")
        said = f"{type(error).__name__}: {error}"[:200]
        return [Warning(f"The check of {name} could not be made ({said}).", "see what the files of this folder hold")]


def _ending(run: RunFolder, state: str) -> Iterator[Warning]:
    again = "the same command continues from the last checkpoint"
    if run.saved is None:
        again = "the same command begins anew, as no checkpoint was written (trainer.checkpoint_every_steps=)"
    if state == FAILED:
        hint = ""
        if run.failed:
            hint = f"; python -m ssl.replay failed={_typed(run.failed[-1])} does the failed step again and looks at it"
        yield Warning(f"The run ended with an error: {run.message or 'see its output'}", again + hint, is_severe=True)
    if state == LOST:
        yield Warning(
            "The run did not say how it ended: it was killed, or its machine went away.",
            f"{again}; where memory ran out, a smaller trainer.device_batch_size or trainer.activation_checkpointing="
            "true needs less",
            is_severe=True,
        )
    if run.hangs:
        yield Warning(
            f"A start of this run hung: {len(run.hangs)} reports of where each process stood.",
            "read the reports below; the first lines say which rank kept the others waiting",
            is_severe=state != COMPLETE,
        )


def _loss(run: RunFolder, state: str) -> Iterator[Warning]:
    curve = run.history.curves.get("loss")
    if curve is None:
        return
    warmup = _schedule(run).get("warmup_steps") or 0
    values = curve.values[np.argsort(curve.steps, kind="stable")]
    if len(values) < ENOUGH or curve.steps.max() <= warmup:
        return
    tenths = np.array_split(values, 10)
    parts = [float(np.median(tenth)) for tenth in tenths]
    first, last, lowest = parts[0], parts[-1], min(parts)
    spread = max(_spread(tenths[-1]), _spread(tenths[int(np.argmin(parts))]))
    if first - last < LEAST_FALL * abs(first):
        yield Warning(
            f"The loss has not fallen: {first:.4g} in the first tenth of the run, {last:.4g} in the last.",
            "try a higher or a lower optim.base_lr by a factor of 3; see that the pictures below are what the method "
            "should see, and that the data are more than a few images",
            is_severe=True,
        )
    elif last - lowest > max(RISEN * (first - lowest), LEAST_FALL * abs(first), spread):
        yield Warning(
            f"The loss has risen again: its lowest tenth was at {lowest:.4g}, it is at {last:.4g} now.",
            "a lower optim.base_lr, a longer schedule.warmup_epochs or trainer.clip_grad_norm=1 keep it down",
        )


def _spread(values: np.ndarray) -> float:
    """Between the lowest and the highest quarter of some values."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(high - low)


def _not_finite(run: RunFolder, state: str) -> Iterator[Warning]:
    skipped = run.history.latest.get("skipped_steps", 0)
    steps = max(run.step, 1)
    if skipped:
        yield Warning(
            f"{skipped:,.0f} steps were skipped ({skipped / steps:.2%} of the run), as their loss or gradient was not "
            "finite or lay far above the others.",
            "a few are harmless; of many, lower optim.base_lr, lengthen schedule.warmup_epochs, set "
            "trainer.clip_grad_norm=1 or trainer.precision=fp32",
            is_severe=skipped > 0.01 * steps,
        )
    curve = run.history.curves.get("loss")
    if curve is not None and curve.num_missing:
        yield Warning(
            f"At {curve.num_missing:,} logged step{'s' if curve.num_missing > 1 else ''} the loss was not finite.",
            "look at trainer.precision (fp32 has no overflow) and at optim.base_lr",
            is_severe=True,
        )


def _collapse(run: RunFolder, state: str) -> Iterator[Warning]:
    names = ("rankme", "feature_std", "mean_cosine", "dead_dimensions")
    latest = {name: run.history.latest.get(name) for name in names}
    if None in latest.values():
        return
    ranks = run.history.curves["rankme"]
    place = int(np.argmin(ranks.steps))
    start = {"rankme": float(ranks.values[place]), "step": float(ranks.steps[place])}
    metrics: Any = latest
    dimensions = _num_features(run)
    if dimensions is None:  # then nothing can be said of their spread
        metrics, dimensions = {**latest, "feature_std": 1.0}, UNKNOWN_DIMENSIONS
    for sign in signs_of_collapse(metrics, dimensions=dimensions, start=start):
        yield Warning(f"The features look collapsed: {sign}.", ADVICE, is_severe=True)


def _accuracy(run: RunFolder, state: str) -> Iterator[Warning]:
    curve = run.history.curves.get("knn_top1")
    if curve is not None and len(curve) > 1:
        values, steps = curve.values, curve.steps
        best, last = int(np.argmax(values)), int(np.argmax(steps))
        if values[best] - values[last] > FALLEN_KNN:
            yield Warning(
                f"The kNN accuracy has fallen: {values[best]:.1%} at step {steps[best]:,.0f}, {values[last]:.1%} now.",
                "its labels are not those of the training, so that some fall is no error; where it goes on, look at "
                "the augmentation and at optim.weight_decay, and compare an earlier checkpoint "
                "(trainer.keep_every_steps keeps some)",
            )
    baselines = [each for each in run.results if each.protocol.get("subject") in ("pixels", "random")]
    for base in baselines:
        for each in run.results:
            same = each is not base and protocol_id(each.protocol) == protocol_id(base.protocol)
            ours, theirs = each.metrics.get("top1"), base.metrics.get("top1")
            if same and each not in baselines and _both(ours, theirs) and ours < theirs:  # pyright: ignore
                yield Warning(
                    f"{each.path.stem}: top-1 {ours:.1%} is below that of {base.protocol['subject']}, {theirs:.1%}.",
                    "the backbone has learned nothing that these labels ask for: train longer, or look at the views",
                    is_severe=True,
                )


def _data_wait(run: RunFolder, state: str) -> Iterator[Warning]:
    curve = run.history.curves.get("data_wait")
    if curve is None or len(curve) < 3:
        return
    wait = float(np.median(_latter_half(curve)))
    if wait > MOST_WAIT:
        yield Warning(
            f"The device waits for data {wait:.0%} of the time, by the median of the latter half; from {MOST_WAIT:.0%} "
            "on, faster reading pays.",
            "give loader.threads more cores, or prepare the images once with python -m ssl.prepare, which stores them "
            "smaller; data.in_memory_gib keeps a small set in memory",
        )


def _throughput(run: RunFolder, state: str) -> Iterator[Warning]:
    curve = run.history.curves.get("images_per_second")
    if curve is None or len(curve) < ENOUGH:
        return
    order = np.argsort(curve.steps, kind="stable")
    values = curve.values[order]
    early, late = float(np.median(values[: len(values) // 2])), float(np.median(values[-len(values) // 5 :]))
    if late < SLOWED * early:
        yield Warning(
            f"Training has become slower: {late:,.0f} images/s in the last fifth, {early:,.0f} in the first half.",
            "see whether other processes share the machine or its disk, and whether the device is throttled",
        )


def _warmup(run: RunFolder, state: str) -> Iterator[Warning]:
    schedule = _schedule(run)
    warmup, total = schedule.get("warmup_steps"), run.stop_step
    if not warmup or not total:
        return
    if state != RUNNING and run.step <= warmup:
        yield Warning(
            f"The run ended at step {run.step:,}, within the warm-up of {warmup:,} steps: the learning rate never "
            "reached its peak.",
            "train longer, or set a shorter schedule.warmup_epochs",
            is_severe=True,
        )
    elif warmup > total / 2:
        yield Warning(
            f"The warm-up takes {warmup:,} of the run's {total:,} steps.",
            "train longer, or set a shorter schedule.warmup_epochs",
        )


def _bad_images(run: RunFolder, state: str) -> Iterator[Warning]:
    count = len(run.saved.card.get("bad_images") or {}) if run.saved else 0
    if count:
        yield Warning(
            f"{count:,} image{'s' if count > 1 else ''} could not be read; others stood in for them.",
            "the list below names them: mend or remove these files",
        )


def _evaluations(run: RunFolder, state: str) -> Iterator[Warning]:
    if run.saved is None or state == RUNNING:
        return
    older = [
        each
        for each in run.results
        if (step := (each.protocol.get("checkpoint") or {}).get("step")) is not None
        and step < run.saved.step
        and each.path.parent.parent == run.path
        and each.protocol.get("command") != "eval.finetune"
    ]
    for each in older:
        yield Warning(
            f"{each.path.stem} judges step {each.protocol['checkpoint']['step']:,}; the last checkpoint is of step "
            f"{run.saved.step:,}.",
            f"python -m {each.protocol['command']} ckpt={_typed(run.path)} measures it again",
        )
    if not run.results and not run.saved.card.get("classifier"):
        yield Warning(
            "No evaluation has judged this backbone yet.",
            f"python -m eval.knn ckpt={_typed(run.path)} takes a minute on a small set",
        )


def _versions(run: RunFolder, state: str) -> Iterator[Warning]:
    kept = [start.about.get("versions") for start in run.starts]
    told = [each for each in kept if isinstance(each, dict)]
    names = sorted({name for each in told for name in each})
    changed = {name: list(dict.fromkeys(str(each.get(name)) for each in told)) for name in names}
    said = [f"{name} {' -> '.join(values)}" for name, values in changed.items() if len(values) > 1]
    if said:
        yield Warning(
            f"The starts of this run had different versions: {'; '.join(said)}.",
            "to repeat the run, keep to one",
        )


def _schedule(run: RunFolder) -> dict[str, Any]:
    parts = run.recipe.get("parts")
    schedule = parts.get("schedule") if isinstance(parts, dict) else None
    return schedule if isinstance(schedule, dict) else {}


def _num_features(run: RunFolder) -> int | None:
    """The dimensions of the backbone's features, as the run's last start noted them."""
    number = run.starts[-1].about.get("num_features") if run.starts else None
    return number if isinstance(number, int) and number > 0 else None


def _latter_half(curve: Curve) -> np.ndarray:
    return curve.values[curve.steps >= np.median(curve.steps)]


def _both(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _typed(path: Path) -> str:
    return shlex.quote(str(path))
