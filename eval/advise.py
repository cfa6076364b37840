"""Which layers of a backbone to train on new images: `python -m eval.advise ckpt=runs/<run> data=<name>`."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import ssl.distributed as distributed
from eval.collapse import signs_of_collapse
from eval.command import start
from eval.config import EvalConfig
from eval.extract import Features, extract_all
from eval.frechet import Similarity, similarity
from eval.layers import FeatureSet, as_list, num_layers
from eval.probe import hold_out
from eval.quick_probe import ERROR_RULE, WEIGHT_DECAY, Difference, K, LayerScore, difference, probe_layer
from eval.recommend import SAID, Advice, Evidence, Train, recommend, rules
from eval.results import environment, write_results
from eval.spectra import health
from eval.splits import data_settings
from eval.subject import BASELINES, Judged, Subject, load, make_loader, read_features, variant
from ssl.checkpoint import LoadedBackbone
from ssl.config import build, plain
from ssl.data.augment import Augment
from ssl.data.sources import Source, checksum
from ssl.data.subset import limit
from ssl.models.backbones import backbone_from_spec, is_token_model
from ssl.models.classifier import make_classifier, stages, stages_behind
from ssl.trainer import choose_dtype

MOST_LAYERS = 6
LEAST_SIMILARITY_IMAGES = 10
OWN = "these very images"


@dataclass
class AdviseConfig(EvalConfig):
    """What `python -m eval.advise` takes."""

    layers: Any = None
    sample: int = 5000
    similarity_sample: int = 1000
    pretraining_root: str | None = None
    folds: int = 5  # of the cross-validated probe


def run(config: DictConfig) -> dict[str, Any]:
    """Measure `config.data` with the backbone that `config.ckpt` names, and say what to train of it, with commands.

    Returns metrics, protocol and the JSON's path. Raises ValueError and OSError, with what to do, before the first
    image is read where the settings do not fit.
    """
    began = time.perf_counter()
    _check_settings(config)
    loaded = load(config)
    assert loaded is not None
    given = config.layers
    config = cast(DictConfig, OmegaConf.merge(config, {"layers": _layers(given, loaded)}))
    judged = read_features(config, command="eval.advise")
    if given is None:
        judged = replace(judged, name=judged.name.replace(variant(config), "", 1))
    subject, splits = judged.subject, judged.splits
    pretraining, known = _pretraining(config, loaded, own=bool(judged.about["data"]["pretrained_on_it"]))
    train = limit(splits.train, config.sample, seed=config.seed)
    judged = replace(judged, splits=replace(splits, train=train))
    balance = balance_of(splits.train.labels, len(splits.classes))
    if balance["largest"] < 2:
        raise ValueError("advice is taken from images that heads were not trained on, so a class needs two; got one")

    # ---- the layers, and the last one of the same backbone untrained ------------------------------------------------
    found = judged.read("train", subject.sets)
    labels, last = found[0].labels, subject.sets.index(_last(subject))
    folds = [torch.from_numpy(each) for each in hold_out(labels.numpy(), folds=config.folds, seed=config.seed)]
    untrained = _read(train, _untrained(subject, loaded, config.seed), judged, config, title="untrained")
    settings: dict[str, Any] = {"folds": folds, "num_classes": len(splits.classes), "device": judged.device}
    scores = [probe_layer(each.layer, one.features, labels, **settings) for each, one in zip(subject.sets, found)]
    start_score = probe_layer("last, untrained", untrained.features, labels, **settings)

    # ---- how near the images are to those of pretraining -------------------------------------------------------------
    features = found[last].features  # (N, D)
    near, same, known = _similarity(config, judged, features, splits.train, pretraining, known)
    metrics = health(features)
    signs = signs_of_collapse(metrics, dimensions=features.shape[1])

    # ---- the advice --------------------------------------------------------------------------------------------------
    evidence = _evidence(scores, last, start_score, folds, balance, near, signs, in_pretraining=same)
    evidence = replace(evidence, chance=float(labels.bincount().max()) / len(labels), dimensions=features.shape[1])
    advice = recommend(evidence)
    count, notes = _num_stages(loaded, subject.sets, evidence)
    commands = _commands(advice, config, loaded, evidence, count)
    protocol = {
        **judged.about,
        "data": {
            **judged.about["data"],
            "num_train": len(splits.train),
            "num_read": len(labels),
            "num_undecodable": found[0].num_bad,
            "images": {"train": checksum(splits.train)},
            "balance": balance,
            "test": "not read",
        },
        "features": {key: value for key, value in judged.about["features"].items() if key != "layer"},
        "probe": {
            "head": f"logistic regression by L-BFGS on standardised features, weight decay of {list(WEIGHT_DECAY)}",
            "folds": len(folds),
            "knn": f"k={K}, cosine, weighted",
            "error": ERROR_RULE,
        },
        "similarity": {"measured": None if near is None else asdict(near), "pretraining_images": known},
        "signs_of_collapse": signs,
        "rules": rules(),
        "advice": {
            "train": advice.train,
            "stages": count if advice.train == "stages" else None,
            "confidence": advice.confidence,
            "reasons": advice.reasons,
            "doubts": advice.doubts,
            "commands": commands,
        },
        "notes": subject.notes + splits.notes + notes,
        "seconds": round(time.perf_counter() - began, 2),
        **environment(),
    }
    result = _metrics(scores[last], scores, evidence)
    path = judged.folder / f"{judged.name}.json"
    if distributed.is_main():
        table = [_row(each) for each in [*scores, start_score]]
        write_results(path, metrics=result, protocol=protocol, details={"layers": table})
        print("\n".join([*_lines(protocol, [*scores, start_score], evidence, advice, commands), f"written: {path}"]))
    return {"metrics": result, "protocol": protocol, "path": str(path)}


def balance_of(labels: np.ndarray, num_classes: int) -> dict[str, float]:
    """How the images with labels (N,) are shared out over the classes.

    `entropy` is that of the shares over that of equal ones, 1 where all classes are equally large; `imbalance` is
    largest / smallest, the smallest counted as one image where a class has none.
    """
    count = np.bincount(labels, minlength=num_classes)  # (C,)
    share = count[count > 0] / count.sum()
    entropy = float(-(share * np.log(share)).sum())
    return {
        "images": int(count.sum()),
        "classes": num_classes,
        "per_class": float(count.mean()),
        "smallest": int(count.min()),
        "largest": int(count.max()),
        "imbalance": float(count.max() / max(count.min(), 1)),
        "entropy": entropy / math.log(num_classes),
        "effective_classes": math.exp(entropy),
    }


def _check_settings(config: DictConfig) -> None:
    if config.ckpt in BASELINES:
        raise ValueError(
            f"ckpt={config.ckpt} has no pretrained weights, so there is nothing to transfer; give a checkpoint, or "
            "timm:<name>. To train from scratch: python -m eval.finetune ckpt=random model=<preset>"
        )
    if config.sample < 2:
        raise ValueError(f"sample={config.sample} images are too few; give 2 or more, such as sample=5000")
    if config.similarity_sample < LEAST_SIMILARITY_IMAGES:
        raise ValueError(
            f"similarity_sample={config.similarity_sample} images are too few for a distance; give "
            f"{LEAST_SIMILARITY_IMAGES} or more, such as similarity_sample=1000"
        )
    if config.folds < 2:
        raise ValueError(f"folds={config.folds}: an error needs 2 folds or more, such as folds=5")
    if config.pooling != "model":
        raise ValueError(f"pooling={config.pooling}: what fine-tuning trains reads pooling=model; leave it out")
    if config.pretraining_root is not None and plain(config.data)["name"] == "checkpoint":
        raise ValueError("pretraining_root= has no effect with data=checkpoint, whose images are those of pretraining")


def _layers(given: Any, loaded: LoadedBackbone) -> list[str]:
    """The layers to look at: those given, or some evenly spaced before the last one; the last one always."""
    if given is not None:
        return [*(each for each in as_list(plain(given)) if each != "last"), "last"]
    before = num_layers(loaded.model) - 1  # a convnet's last stage, averaged, is what its `last` is
    some = np.linspace(0, before, min(MOST_LAYERS, before + 1))[:-1] if before > 0 else []
    return [*(str(round(each)) for each in some), "last"]


def _last(subject: Subject) -> FeatureSet:
    """The set that a classifier would read; a vision transformer's may be named by its number."""
    depth = str(num_layers(subject.model) - 1) if subject.model is not None else ""
    return next(each for each in reversed(subject.sets) if each.layer in ("last", depth))


def _untrained(subject: Subject, loaded: LoadedBackbone, seed: int) -> Subject:
    torch.manual_seed(seed)
    return replace(subject, model=backbone_from_spec(loaded.spec).eval(), sets=[FeatureSet()])


def _read(source: Source, subject: Subject, judged: Judged, config: DictConfig, *, title: str) -> Features:
    """Features of the last layer of every image of `source`."""
    dtype = choose_dtype(config.precision.name, judged.device)
    with make_loader(source, subject, data=judged.data, config=config, device=judged.device) as loader:
        return extract_all(
            subject.extract([FeatureSet()], device=judged.device, dtype=dtype),
            loader,
            Augment(loader.views, mean=subject.mean, std=subject.std).to(judged.device),
            batch_size=config.batch_size,
            device=judged.device,
            title=title,
        )[0]


def _pretraining(config: DictConfig, loaded: LoadedBackbone, *, own: bool) -> tuple[Source | None, str]:
    """The images of pretraining where they are others than those asked about and there, and what is known of them.

    Raises ValueError where `pretraining_root` is given and does not hold them.
    """
    if own:
        return None, OWN
    try:
        return _pretraining_images(config, loaded)
    except (ValueError, OSError, ImportError) as error:
        first = str(error).splitlines()[0]
        if config.pretraining_root is not None:
            raise ValueError(
                f"pretraining_root={config.pretraining_root} does not hold the images of pretraining: {first}; give "
                "the folder where they lie now, or leave it out, and the advice does without the distance from them"
            ) from error
        return None, f"not there: {first}; give pretraining_root= where they were moved"


def _similarity(
    config: DictConfig, judged: Judged, features: Tensor, train: Source, source: Source | None, name: str
) -> tuple[Similarity | None, bool, str]:
    """(where the images lie, whether they are those of pretraining, what is known of the images of pretraining)."""
    if source is None:
        return None, name == OWN, name
    if len(source) == len(train) and checksum(source) == checksum(train):
        return None, True, f"{name}, {OWN}"
    few = limit(source, 2 * config.similarity_sample, seed=config.seed)
    seen = _read(few, judged.subject, judged, config, title="pretraining")
    random = _random_pixels(judged, config, num=config.similarity_sample)
    num = min(len(seen.features) // 2, len(features))
    if num < LEAST_SIMILARITY_IMAGES:
        return None, False, f"{name}; a distance between {num} images says nothing"
    found = similarity(seen.features, features, random, most=config.similarity_sample, seed=config.seed)
    unfit = "" if found else "; the backbone does not tell them from random pixels"
    return found, False, f"{name}, {len(seen.features)} of {len(source)} read{unfit}"


def _pretraining_images(config: DictConfig, loaded: LoadedBackbone) -> tuple[Source, str]:
    """The train images that the checkpoint names. Raises ValueError or OSError where they cannot be had."""
    given = {"name": "checkpoint", **({"root": config.pretraining_root} if config.pretraining_root else {})}
    data = data_settings(given, loaded.config.get("data", {}), subject=config.ckpt)
    # A checkpoint may come from anyone and names no code but ours.
    source: Source = build(data["source"], within="ssl.data.", split="train")
    return limit(source, data.get("limit"), seed=int(loaded.config.get("seed", 0))), str(data["name"])


@torch.no_grad()
def _random_pixels(judged: Judged, config: DictConfig, *, num: int) -> Tensor:
    """Features (N, D) of `num` images whose pixels are drawn alone, with the mean and deviation of pretraining."""
    subject, device = judged.subject, judged.device
    extract = subject.extract([FeatureSet()], device=device, dtype=choose_dtype(config.precision.name, device))
    generator = torch.Generator().manual_seed(config.seed)
    shape = (subject.channels, *subject.image_size)
    sizes = [min(config.batch_size, num - first) for first in range(0, num, config.batch_size)]
    parts = [extract(torch.randn(size, *shape, generator=generator).to(device))[0].float().cpu() for size in sizes]
    return torch.cat(parts)


def _evidence(
    scores: Sequence[LayerScore],
    last: int,
    untrained: LayerScore,
    folds: Sequence[Tensor],
    balance: dict[str, float],
    near: Similarity | None,
    signs: list[str],
    *,
    in_pretraining: bool,
) -> Evidence:
    final = scores[last]
    earlier = max((each for each in scores if each is not final), key=lambda each: each.top1, default=None)
    num = len(final.hit)
    error = math.sqrt(max(final.top1 * (1 - final.top1), 1 / num) / num)  # of a share; never quite 0
    return Evidence(
        images_per_class=balance["per_class"],
        smallest=int(balance["smallest"]),
        largest=int(balance["largest"]),
        last=Difference(final.top1, error),
        train_top1=final.train_top1,
        gain=difference(final, untrained, folds),
        distance=None if near is None else Difference(near.relative, near.error),
        in_pretraining=in_pretraining,
        best_earlier=None if earlier is None else difference(earlier, final, folds),
        earlier_layer=None if earlier is None else earlier.layer,
        signs_of_collapse=signs,
        distance_images=0 if near is None else near.num_images,
    )


def _num_stages(loaded: LoadedBackbone, sets: Sequence[FeatureSet], evidence: Evidence) -> tuple[int | None, list[str]]:
    """How many last stages `train=` should name, and notes; None where timm cannot tell them apart.

    Those behind the best layer where that is not the last one, else a third of all.
    """
    model: Any = make_classifier(loaded.spec, num_classes=2)[0]
    try:
        most = len(stages(model)[1]) - 1
    except ValueError as error:
        return None, [f"{error}; the command for the last stages trains everything"]
    if most < 1:
        return None, [
            f"{type(model).__name__} is one stage for timm; the command for the last stages trains everything"
        ]
    layer = evidence.earlier_layer
    if evidence.best_earlier is None or evidence.best_earlier.value <= 0 or layer is None or not layer.isdecimal():
        return max(most // 3, 1), []
    behind = stages_behind(model, model.feature_info[int(layer)]["module"])
    return min(max(behind, 1), most), []


def _commands(
    advice: Advice, config: DictConfig, loaded: LoadedBackbone, evidence: Evidence, count: int | None
) -> list[str]:
    """The command for what is advised, and where that is not certain others to compare it with."""
    words = _same_images(config)
    recipe = "mae" if is_token_model(loaded.model) else "simclr"

    def command(train: Train) -> str:
        if train == "head":
            return f"python -m eval.linear_probe {words}"
        chosen = f" train={count}" if train == "stages" and count is not None else ""
        return f"python -m eval.finetune {words} recipe={recipe}{chosen}"

    found = [command(advice.train)]
    if advice.confidence != "high":
        other = advice.else_ or ("stages" if advice.train == "head" else "head")
        found.append(command(other))
    if (
        advice.train == "stages"
        and evidence.earlier_layer
        and evidence.best_earlier
        and evidence.best_earlier.value > 0
    ):
        found.append(f"python -m eval.linear_probe {words} layers={evidence.earlier_layer}")
    watched = " held_out=0.1" if len(found) > 1 else ""  # for the comparison; the test split decides nothing
    return list(dict.fromkeys(each + (watched if "finetune" in each else "") for each in found))


def _same_images(config: DictConfig) -> str:
    """The words of the command line that name the same backbone and images for another command."""
    typed = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None
    if typed is not None:
        words = [word for word in typed if word.split("=")[0].split(".")[0] in ("ckpt", "model", "data", "seed")]
        return shlex.join(words)
    data = plain(config.data)
    words = [f"ckpt={config.ckpt}"]
    if data["name"] != "checkpoint":
        words.append(f"data={data['name']}")
    return shlex.join(words + [f"data.{key}={data[key]}" for key in ("root", "limit") if data.get(key) is not None])


def _metrics(last: LayerScore, scores: Sequence[LayerScore], evidence: Evidence) -> dict[str, float]:
    distance = {} if evidence.distance is None else {"relative_distance": evidence.distance.value}
    return {
        "held_out_top1": last.top1,
        "held_out_knn_top1": last.knn_top1,
        "held_out_top1_best_layer": max(each.top1 for each in scores),
        "gain_over_untrained": evidence.gain.value,
        **distance,
    }


def _row(score: LayerScore) -> dict[str, Any]:
    names = ("layer", "dimensions", "top1", "train_top1", "knn_top1", "weight_decay")
    return {name: getattr(score, name) for name in names}


def _lines(
    protocol: dict[str, Any], scores: Sequence[LayerScore], evidence: Evidence, advice: Advice, commands: list[str]
) -> list[str]:
    """What was measured, what to do and why, as a person reads it."""
    data, balance = protocol["data"], protocol["data"]["balance"]
    found = protocol["similarity"]["measured"]
    where = "not measured"
    if found is not None:
        where = (
            f"{max(found['relative'], 0.0):.0%} +- {found['error']:.0%} of the way from pretraining images to random "
            f"pixels (Frechet distances of {found['num_images']} images: {found['new']:.4g}, between halves of "
            f"pretraining {found['floor']:.4g}, random pixels {found['ceiling']:.4g})"
        )
    stages_said = advice.train == "stages" and protocol["advice"]["stages"]
    return [
        f"{data['name']} (train, {data['num_read']:,} of {data['num_train']:,} images read); {protocol['subject']}",
        f"  size         {balance['images']:,} images, {balance['classes']} classes, {balance['per_class']:,.1f} each",
        f"  balance      smallest {balance['smallest']:,}, largest {balance['largest']:,}, entropy "
        f"{balance['entropy']:.3f} of equal classes",
        f"  similarity   {where}",
        f"  pretraining  {protocol['similarity']['pretraining_images']}",
        f"  {'layer':<16} {'probe':>7} {'on train':>9} {'kNN':>7}  top-1, {protocol['probe']['folds']} folds of train",
        *(f"  {each.layer:<16} {each.top1:>7.1%} {each.train_top1:>9.1%} {each.knn_top1:>7.1%}" for each in scores),
        f"train {SAID[advice.train]}{f' ({stages_said})' if stages_said else ''}, confidence {advice.confidence}",
        *(f"  because: {each}" for each in advice.reasons),
        *(f"  doubt: {each}" for each in advice.doubts),
        *(f"note: {note}" for note in protocol["notes"]),
        f"next: {commands[0]}",
        *(f"compare: {each}" for each in commands[1:]),
    ]


if __name__ == "__main__":
    start(run, AdviseConfig, command="eval.advise", objective=lambda result: result["metrics"]["held_out_top1"])
