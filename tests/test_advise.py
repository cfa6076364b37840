"""Transfer advice: each measure against a closed form or another library, the choices in cases with a known answer."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from scipy.linalg import sqrtm
from sklearn.linear_model import LogisticRegression

from eval import advise, finetune, linear_probe
from eval.config import register
from eval.frechet import frechet_distance, similarity
from eval.quick_probe import Difference, LayerScore, difference, probe_layer
from eval.recommend import Evidence, recommend
from ssl import checkpoint
from ssl.config import CONF, register_schemas
from ssl.data.embedded import Embedded
from ssl.methods.base import Method
from ssl.models.backbones import build_backbone
from ssl.models.classifier import freeze, stages_behind

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the Frechet distance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "other", "dim"), [(60, 50, 7), (9, 12, 5), (30, 8, 12), (40, 40, 1)])
def test_the_frechet_distance_is_the_papers_formula(num, other, dim):
    a, b = gaussian(num, dim) @ gaussian(dim, dim, seed=1), 0.5 + 2 * gaussian(other, dim, seed=2)
    x, y = a.double().numpy(), b.double().numpy()
    first, second = np.cov(x.T).reshape(dim, dim), np.cov(y.T).reshape(dim, dim)
    root = np.trace(np.atleast_2d(sqrtm(first @ second + 1e-14 * np.eye(dim)))).real
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = shift + np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_the_frechet_distance_of_diagonal_gaussians_is_that_of_means_and_deviations():
    raw = gaussian(400, 4).double()
    white = torch.linalg.qr(raw - raw.mean(0)).Q * math.sqrt(399)  # covariance exactly 1, mean 0
    one, two = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 2.0, 1.5, 0.0]).double()
    shift = torch.tensor([0.0, 1.0, -2.0, 0.5]).double()
    expected = (shift.square().sum() + (one - two).square().sum()).item()
    assert frechet_distance(white * one, white * two + shift) == pytest.approx(expected, rel=1e-9)


def test_features_are_at_no_distance_from_themselves_fewer_than_dimensions_or_not():
    for shape in ((100, 6), (6, 100)):
        assert frechet_distance(gaussian(*shape), gaussian(*shape)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("bad", [torch.ones(1, 3), torch.ones(5, 4), torch.full((5, 3), math.nan)])
def test_features_without_a_distance_are_refused(bad):
    with pytest.raises(ValueError, match="Frechet distance"):
        frechet_distance(gaussian(5, 3), bad)


def test_the_place_between_pretraining_and_random_pixels_is_0_for_the_same_source_and_1_for_random_pixels():
    pretraining, random = gaussian(400, 5), 4 + 2 * gaussian(300, 5, seed=1)
    same = similarity(pretraining, gaussian(250, 5, seed=2), random)
    other = similarity(pretraining, 4 + 2 * gaussian(250, 5, seed=3), random)
    assert same is not None
    assert other is not None
    assert same.num_images == 200
    assert same.relative == pytest.approx(0.0, abs=0.01)
    assert other.relative == pytest.approx(1.0, abs=0.1)
    assert other.relative == pytest.approx((other.new - other.floor) / (other.ceiling - other.floor), abs=0.02)


def test_features_that_do_not_tell_random_pixels_apart_give_no_place():
    assert similarity(torch.ones(40, 3), torch.ones(20, 3), torch.ones(20, 3)) is None


# ---- balance -------------------------------------------------------------------------------------------------------


def test_balance_is_counted_and_its_entropy_that_of_the_shares():
    found = advise.balance_of(np.array([0] * 6 + [1] * 3 + [2] * 3), 4)
    nats = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert found == {
        "images": 12,
        "classes": 4,
        "per_class": 3.0,
        "smallest": 0,
        "largest": 6,
        "imbalance": 6.0,
        "entropy": pytest.approx(nats / math.log(4)),
        "effective_classes": pytest.approx(2**1.5),
    }
    assert advise.balance_of(np.arange(30) % 5, 5)["entropy"] == pytest.approx(1.0)


# ---- the quick probe -----------------------------------------------------------------------------------------------


def test_the_probe_scores_images_that_its_heads_were_not_trained_on_as_sklearn_does():
    labels = torch.arange(90) % 3
    features = gaussian(90, 6) + 1.2 * torch.nn.functional.one_hot(labels, 6)
    folds = [torch.cat([torch.arange(s, s + 3) for s in range(start, 90, 9)]) for start in (0, 3, 6)]
    found = probe_layer("last", features, labels, folds=folds, num_classes=3)
    right = np.zeros(90, bool)
    for fold in folds:
        fitted = np.setdiff1d(np.arange(90), fold)
        mean, std = features[fitted].mean(0), features[fitted].std(0, correction=0)
        scaled = ((features - mean) / std).double().numpy()
        head = LogisticRegression(C=1 / (len(fitted) * found.weight_decay), tol=1e-8, max_iter=1000)
        head.fit(scaled[fitted], labels[fitted])
        right[fold] = head.predict(scaled[fold]) == labels[fold].numpy()
    assert found.top1 == pytest.approx(right.mean(), abs=1 / 90)
    assert (found.hit.numpy() == right).mean() >= 88 / 90
    assert found.train_top1 >= found.top1


def score(hit: torch.Tensor) -> LayerScore:
    return LayerScore("0", 1, hit.double().mean().item(), 1.0, 0.0, 1.0, hit.bool())


def test_a_difference_has_the_error_of_its_images_or_of_its_folds_whichever_is_larger():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(200, generator=generator) < 0.7, torch.rand(200, generator=generator) < 0.5
    each = a.double().numpy() - b.double().numpy()
    folds = list(torch.arange(200).chunk(5))
    by_fold = np.array([each[fold.numpy()].mean() for fold in folds])
    found = difference(score(a), score(b), folds)
    of_images, of_folds = each.std(ddof=1) / math.sqrt(200), by_fold.std(ddof=1) * math.sqrt(1 / 5 + 1 / 4)
    assert found.value == pytest.approx(each.mean())
    assert found.error == pytest.approx(max(of_images, of_folds))
    sorted_by_fold = torch.arange(200) < 80  # all of the difference lies in two folds
    apart = difference(score(sorted_by_fold), score(torch.zeros(200)), folds)
    assert apart.error == pytest.approx(np.std([1, 1, 0, 0, 0], ddof=1) * math.sqrt(0.45))


# ---- the choice ----------------------------------------------------------------------------------------------------

SURE = Evidence(
    images_per_class=1000.0,
    smallest=1000,
    largest=1000,
    last=Difference(0.8, 0.005),
    train_top1=0.85,
    gain=Difference(0.3, 0.01),
    distance=Difference(0.01, 0.002),
    best_earlier=Difference(-0.1, 0.01),
    earlier_layer="3",
)
FAR = Difference(0.6, 0.02)
BETWEEN = Difference(0.15, 0.01)


@pytest.mark.parametrize(
    ("changed", "train", "confidence"),
    [
        ({"images_per_class": 20.0}, "head", "high"),
        ({"images_per_class": 20.0, "distance": BETWEEN}, "head", "high"),
        ({"images_per_class": 20.0, "distance": FAR}, "stages", "low"),
        ({"images_per_class": 250.0}, "stages", "high"),
        ({"images_per_class": 250.0, "distance": FAR}, "all", "high"),
        ({}, "all", "high"),
        ({"distance": FAR}, "all", "high"),
        ({"last": Difference(0.995, 0.001), "images_per_class": 5000.0}, "head", "high"),
        ({"images_per_class": 20.0, "distance": None, "in_pretraining": True}, "head", "high"),
        ({"images_per_class": 20.0, "distance": None}, "head", "medium"),
        ({"images_per_class": 250.0, "distance": None, "gain": Difference(0.01, 0.01)}, "all", "medium"),
        ({"images_per_class": 20.0, "best_earlier": Difference(0.1, 0.01)}, "stages", "low"),
        ({"images_per_class": 20.0, "signs_of_collapse": ["flat"]}, "stages", "low"),
        ({"train_top1": 1.0, "last": Difference(0.6, 0.01)}, "all", "medium"),
        ({"smallest": 3}, "all", "medium"),
        ({"images_per_class": 250.0, "gain": Difference(-0.05, 0.02)}, "all", "low"),
        ({"images_per_class": 250.0, "gain": Difference(-0.05, 0.03)}, "stages", "medium"),
        ({"images_per_class": 250.0, "last": Difference(0.105, 0.005), "chance": 0.1}, "all", "medium"),
        ({"images_per_class": 20.0, "distance_images": 60, "dimensions": 64}, "head", "medium"),
        ({"images_per_class": 20.0, "distance_images": 64, "dimensions": 64}, "head", "high"),
    ],
)
def test_what_to_train_follows_from_size_and_similarity(changed: dict[str, Any], train: str, confidence: str):
    found = recommend(replace(SURE, **changed))
    assert (found.train, found.confidence) == (train, confidence), found
    assert found.reasons


def test_a_size_near_its_bound_is_a_close_call_with_the_other_choice():
    found = recommend(replace(SURE, images_per_class=90.0))
    assert (found.train, found.else_, found.confidence) == ("head", "stages", "medium")
    assert any("with 1.5 times the images, it would be the last stages" in each for each in found.doubts)


def test_a_distance_whose_noise_reaches_its_bound_is_a_close_call():
    near_far = replace(SURE, images_per_class=20.0, distance=Difference(0.23, 0.02))
    assert recommend(near_far).else_ == "stages"
    assert recommend(replace(near_far, distance=Difference(0.23, 0.001))).else_ is None


def test_an_earlier_layer_that_is_better_within_the_noise_is_a_doubt_and_not_a_reason():
    found = recommend(replace(SURE, images_per_class=20.0, best_earlier=Difference(0.03, 0.02)))
    assert (found.train, found.else_, found.confidence) == ("head", "stages", "medium")
    assert any("were layer 3 really better (+3.0 +- 2.0 points)" in each for each in found.doubts)


def test_a_backbone_that_does_harm_is_said_to_even_on_its_own_images():
    found = recommend(replace(SURE, distance=None, in_pretraining=True, gain=Difference(-0.05, 0.02)))
    assert any("pretraining does harm: -5.0 +- 2.0 points" in each for each in found.reasons)
    assert any("ckpt=random" in each for each in found.doubts)
    assert not any("no difference" in each for each in found.reasons + found.doubts)


def test_a_gain_within_the_noise_is_no_difference_whatever_its_sign():
    for gain in (Difference(-0.01, 0.02), Difference(0.01, 0.02)):
        found = recommend(replace(SURE, gain=gain))
        assert any("makes no difference here that counts" in each for each in found.doubts)
        assert not any("harm" in each for each in found.reasons + found.doubts)


# ---- the stages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "behind"),
    [
        ("resnet18", "act1", 4),
        ("resnet18", "layer2", 2),
        ("resnet18", "layer4", 0),
        ("vit_tiny_patch16_224", "blocks.8", 3),
        ("mobilenetv2_100", "blocks.4", 2),
    ],
)
def test_training_the_stages_behind_a_layer_freezes_it_and_nothing_behind_it(name, module, behind):
    model = timm.create_model(name)
    assert stages_behind(model, module) == behind
    if behind:
        frozen = freeze(model, behind)
        own = [each for each, _ in model.named_parameters() if each.startswith(f"{module}.")]
        assert set(own) <= set(frozen)
        following = [each for each, _ in model.named_parameters()][len(frozen) :]
        assert all(model.get_parameter(each).requires_grad for each in following)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Scrambled(Embedded):
    """Two of the embedded shapes, with the pixels of each image in another order: edges and places are gone.

    Its test split must not be read.
    """

    def __init__(self, split: str = "train", *, num_train: int = 1200, num_test: int = 24) -> None:
        super().__init__(split, num_train=num_train, num_test=num_test)
        self.classes = ["one", "two"]
        self.labels = np.arange(len(self.labels), dtype=np.int64) % 2
        self.order = np.random.default_rng(0).permutation(32 * 32)

    def read(self, index: int) -> np.ndarray:
        if self.split == "test":
            raise AssertionError("the test split was read")
        pixels = super().read(index).reshape(-1, 3)[self.order].reshape(32, 32, 3)
        return (255 * (pixels > 128)).astype(np.uint8)


def save_run(run_dir: Path, *, num_train: int = 150, data: dict | None = None) -> Path:
    """A run folder with one checkpoint of an untrained tiny ResNet that names the embedded images."""
    torch.manual_seed(0)
    backbone, spec = build_backbone("resnet18", image_size=(32, 32), model_args=TINY)
    method = Method()
    method.backbone = backbone
    source = {"_target_": "ssl.data.embedded.Embedded", "num_train": num_train, "num_test": 24}
    own = {"name": "embedded", "root": None, "source": source, "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"data": own if data is None else data, "seed": 0}
    checkpoint.save(
        run_dir,
        step=3,
        method=method,
        spec=spec,
        optimizer_tensors={},
        ema=None,
        config_yaml=OmegaConf.to_yaml(config),
        state={"epoch": 1.0},
        mean=[0.5] * 3,
        std=[0.25] * 3,
    )
    return run_dir


def composed(command: Any, schema: type, name: str, words: list[str]) -> Any:
    register_schemas()
    register(schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(name, overrides=words)


def call(*words: str) -> dict[str, Any]:
    """What the command does with these words, in this process."""
    small = ["device=cpu", "precision=fp32", "threads=1", "similarity_sample=60", "folds=3"]
    return advise.run(composed(advise, advise.AdviseConfig, "advise", [*small, *words]))


def scrambled(num: int) -> list[str]:
    """The words that name `num` scrambled images."""
    source = "data.source._target_=tests.test_advise.Scrambled"
    without = ["~data.source.size", "~data.source.seed", "data.source.num_test=24"]
    return ["data=embedded", "data.name=scrambled", source, f"data.source.num_train={num}", *without]


def advice_of(result: dict[str, Any]) -> tuple[str, str]:
    advice = result["protocol"]["advice"]
    return advice["train"], advice["confidence"]


def test_few_images_of_pretraining_ask_for_the_last_layer(capsys, monkeypatch):
    def probed(name: str, features: torch.Tensor, labels: torch.Tensor, **settings: Any) -> LayerScore:
        hit = torch.arange(len(labels)) % 10 < (7 if name == "last" else 2)  # as after training
        return LayerScore(name, features.shape[1], hit.double().mean().item(), 0.8, 0.6, 0.1, hit)

    monkeypatch.setattr(advise, "probe_layer", probed)
    run_dir = save_run(Path("runs/own"))
    result = call(f"ckpt={run_dir}", "data.limit=120")
    train, _ = advice_of(result)
    protocol = result["protocol"]
    assert train == "head"
    assert protocol["data"]["pretrained_on_it"]
    assert protocol["data"]["balance"]["per_class"] == 10
    assert json.loads((run_dir / "eval" / "advise.json").read_text())["protocol"] == protocol
    said = capsys.readouterr().out
    assert "train the last layer" in said
    assert "because: the images are those of pretraining" in said
    assert f"next: python -m eval.linear_probe ckpt={run_dir} data.limit=120" in said


def test_features_at_chance_on_few_images_of_pretraining_do_not_ask_for_the_last_layer():
    result = call(f"ckpt={save_run(Path('runs/own'))}", "data.limit=120")  # untrained, 12 classes
    assert result["metrics"]["held_out_top1"] < 0.12
    assert advice_of(result) == ("stages", "low")
    assert "no better than chance: the largest class has 8.3%" in " ".join(result["protocol"]["advice"]["reasons"])


def test_many_images_that_the_features_do_not_fit_ask_for_everything_without_the_test_split_read():
    result = call(f"ckpt={save_run(Path('runs/far'))}", *scrambled(1600), "sample=200", "layers=[2]")
    assert result["metrics"]["relative_distance"] > 0.25
    assert advice_of(result)[0] == "all"
    data = result["protocol"]["data"]
    assert (data["num_train"], data["num_read"], data["test"]) == (1600, 200, "not read")
    assert data["balance"]["per_class"] == 800


def test_few_images_that_the_features_do_not_fit_ask_for_the_last_stages_with_little_confidence():
    result = call(f"ckpt={save_run(Path('runs/far'))}", *scrambled(60), "layers=[2]")
    assert advice_of(result) == ("stages", "low")
    assert result["protocol"]["advice"]["stages"] in (1, 2, 3, 4)
    assert len(result["protocol"]["advice"]["commands"]) >= 2


def test_the_same_images_under_another_name_are_known_as_those_of_pretraining():
    result = call(f"ckpt={save_run(Path('runs/own'))}", "data=embedded", "data.source.num_train=150", "layers=[2]")
    assert result["protocol"]["similarity"]["pretraining_images"].endswith("these very images")


def test_pretraining_images_that_are_gone_are_named_and_make_the_advice_less_sure():
    source = {"_target_": "ssl.data.folder.Folder", "root": "/nowhere/photos"}
    data = {"name": "folder", "root": "/nowhere/photos", "source": source, "mean": [0.5] * 3, "std": [0.25] * 3}
    result = call(
        f"ckpt={save_run(Path('runs/gone'), data=data)}", "data=embedded", "data.source.num_train=60", "layers=[2]"
    )
    protocol = result["protocol"]
    assert protocol["similarity"]["measured"] is None
    assert "not there" in protocol["similarity"]["pretraining_images"]
    assert "/nowhere/photos" in protocol["similarity"]["pretraining_images"]
    assert any("could not be measured" in each for each in protocol["advice"]["doubts"])
    assert protocol["advice"]["confidence"] != "high"


def test_a_root_without_the_images_of_pretraining_is_an_error():
    source = {"_target_": "ssl.data.folder.Folder", "root": "/nowhere/photos"}
    data = {"name": "folder", "root": "/nowhere/photos", "source": source, "mean": [0.5] * 3, "std": [0.25] * 3}
    run_dir = save_run(Path("runs/gone"), data=data)
    with pytest.raises(ValueError, match="pretraining_root=/nope does not hold the images of pretraining"):
        call(f"ckpt={run_dir}", "pretraining_root=/nope", "data=embedded", "data.source.num_train=60", "layers=[2]")


def test_a_root_of_pretraining_has_no_effect_on_images_that_were_never_in_a_folder():
    with pytest.raises(ValueError, match=r"pretraining_root=/nope .*is not read from a folder"):
        call(f"ckpt={save_run(Path('runs/own'))}", "pretraining_root=/nope", *scrambled(60), "layers=[2]")


def test_the_commands_of_an_advice_compose_and_freeze_what_they_say():
    run_dir = save_run(Path("runs/far"))
    advice = call(f"ckpt={run_dir}", "data=embedded", "data.limit=60", "layers=[0,2]")["protocol"]["advice"]
    modules = {"eval.finetune": (finetune, "FinetuneConfig"), "eval.linear_probe": (linear_probe, "LinearProbeConfig")}
    for command in advice["commands"]:
        name, *words = shlex.split(command)[2:]
        module, schema = modules[name]
        config = composed(module, getattr(module, schema), name.removeprefix("eval."), words)
        assert (config.ckpt, config.data.name, config.data.limit) == (str(run_dir), "embedded", 60)
        if name == "eval.finetune":
            finetune.check_settings(config)
            assert freeze(timm.create_model("resnet18"), config.train) or config.train == "all"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt=random", "model=resnet18"], "nothing to transfer"),
        (["ckpt=pixels"], "nothing to transfer"),
        (["ckpt=a", "sample=1"], "sample=1 images are too few"),
        (["ckpt=a", "folds=1"], "2 folds or more"),
        (["ckpt=a", "pooling=patches"], "leave it out"),
        (["ckpt=a", "pretraining_root=/data"], "has no effect with data=checkpoint"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(words, message):
    with pytest.raises(ValueError, match=message):
        call(*words)
