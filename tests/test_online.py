"""Evaluation during a run: what it finds, on how many ranks soever, and that the training does not notice."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

import ssl.distributed as distributed
from eval.knn import knn
from eval.online import SETTLED, OnlineHealth, OnlineKnn
from eval.sample import Sample
from eval.spectra import health, lidar
from ssl.checkpoint import steps_saved
from ssl.config import CONF, build, register_schemas
from ssl.data.embedded import Embedded
from ssl.data.views import View
from ssl.methods.base import Method
from ssl.models.backbones import build_backbone, pooled_features
from ssl.online import OnlineSubject, StopRun
from ssl.pretrain import run

SIZE = (16, 16)
MADE: list[weakref.ref] = []


class Pictures(Embedded):
    """The embedded images at 16 pixels, each set of which is remembered."""

    def __init__(self, split: str, num_train: int = 36, num_test: int = 11) -> None:
        super().__init__(split, size=16, num_train=num_train, num_test=num_test)
        MADE.append(weakref.ref(self))


class Unlabelled(Pictures):
    """The same without labels."""

    def __init__(self, split: str) -> None:
        super().__init__(split)
        self.labels, self.classes = np.full(len(self), -1, np.int64), None


def tiny_method() -> Method:
    """A method whose backbone has BatchNorm, in training mode but for one frozen part."""
    torch.manual_seed(0)
    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    method = Method()
    method.backbone, _ = build_backbone("resnet18", image_size=SIZE, model_args=args)
    with torch.no_grad():
        method.backbone(torch.randn(64, 3, *SIZE))  # running statistics that are nobody's initial values
    method.train()
    method.backbone.bn1.eval()  # pyright: ignore
    return method


def subject_of(
    method: Method, *, source: str = "Pictures", step: int = 100, said: list[str] | None = None, **data
) -> OnlineSubject:
    return OnlineSubject(
        method=method,
        image_size=SIZE,
        channels=3,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        data={"name": "pictures", "root": None, "source": {"_target_": f"tests.test_online.{source}"}, **data},
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
        step=step,
        last=False,
        epoch=1.0,
        threads=1,
        warn=(said if said is not None else []).append,
    )


def features_of(method: Method, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) and labels of every picture, in one batch and without loader or crop."""
    source = Pictures(split)
    pixels = torch.from_numpy(np.stack([source.read(index) for index in range(len(source))])).permute(0, 3, 1, 2)
    modes = [module.training for module in method.modules()]
    method.eval()
    with torch.no_grad():
        features = pooled_features(method.backbone, (pixels / 255 - 0.5) / 0.25)
    for module, training in zip(method.modules(), modes):
        module.training = training
    return features, torch.from_numpy(np.asarray(source.labels))


# ---- what is found -------------------------------------------------------------------------------------------------


def test_knn_is_that_of_the_offline_function_on_the_same_features():
    method = tiny_method()
    found = OnlineKnn(k=5, temperature=0.1, num_train=36, num_test=11)(subject_of(method))
    bank, queries = features_of(method, "train"), features_of(method, "test")
    scores = knn(*bank, *queries, k=[5], temperature=[0.1], num_classes=12)
    assert found == {"knn_top1": scores.first()["top1"]}


def test_health_is_that_of_the_offline_function_on_the_same_features():
    method = tiny_method()
    found = OnlineHealth(sample=36)(subject_of(method))
    assert found == pytest.approx(health(features_of(method, "train")[0]), rel=1e-4)


def test_lidar_joins_where_views_are_asked_for():
    method = tiny_method()
    found = OnlineHealth(sample=36, views=3, view_images=36)(subject_of(method))
    settings = {"image_size": SIZE, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "threads": 1}
    views = [View(scale=(0.2, 1.0), flip=0.5)] * 3
    sample = Sample(Pictures("train"), views, device=torch.device("cpu"), **settings)
    method.eval()
    seen = sample.read(lambda image: [pooled_features(method.backbone, image)], batch_size=256)
    assert found["lidar"] == pytest.approx(lidar(seen.features), rel=1e-4)


def test_samples_are_bounded_seeded_and_as_balanced_as_the_classes_allow():
    online = OnlineKnn(k=2, num_train=24, num_test=6)
    online(subject_of(tiny_method()))
    assert online._samples is not None
    train, test = online._samples
    assert (len(train), len(test)) == (24, 6)
    assert np.bincount(train.loader.source.labels).tolist() == [2] * 12


def test_the_limit_of_the_run_bounds_the_samples_too():
    online = OnlineHealth(sample=30)
    online(subject_of(tiny_method(), limit=10))
    assert online._central is not None
    assert len(online._central) == 10


@pytest.mark.parametrize("online", [OnlineKnn(num_train=24, num_test=6), OnlineHealth(sample=8, views=2)])
def test_sets_are_opened_once_and_let_go(online):
    MADE.clear()
    subject = subject_of(tiny_method())
    first = online(subject)
    opened = len(MADE)
    gc.collect()
    assert opened
    assert all(reference() is None for reference in MADE)
    assert online(subject) == first
    assert len(MADE) == opened


# ---- images without labels -----------------------------------------------------------------------------------------


def test_images_without_labels_have_no_knn_and_one_warning_that_says_why():
    said: list[str] = []
    online, subject = OnlineKnn(), subject_of(tiny_method(), source="Unlabelled", said=said)
    assert [online(subject), online(subject)] == [{}, {}]
    assert len(said) == 1
    assert said[0].startswith("no kNN accuracy during this run: online kNN needs labels")


def test_images_without_labels_have_health():
    assert "rankme" in OnlineHealth(sample=20)(subject_of(tiny_method(), source="Unlabelled"))


# ---- the training does not notice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("online", [OnlineKnn(num_train=24, num_test=6), OnlineHealth(sample=8, views=2)])
def test_random_states_statistics_weights_and_modes_stay(online):
    method = tiny_method()
    drawn = []
    method.backbone.layer1.register_forward_hook(lambda *_: drawn.append(torch.rand(1)))  # pyright: ignore
    modes = [module.training for module in method.modules()]
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    online(subject_of(method))
    assert drawn
    assert torch.get_rng_state().equal(before)
    assert [module.training for module in method.modules()] == modes
    assert all(tensor.equal(state[name]) for name, tensor in method.state_dict().items())
    assert torch.is_grad_enabled()


def test_modes_are_put_back_after_an_error():
    method = tiny_method()
    modes = [module.training for module in method.modules()]
    method.backbone.layer1.register_forward_hook(lambda *_: 1 / 0)  # pyright: ignore
    with pytest.raises(ZeroDivisionError):
        OnlineHealth(sample=8)(subject_of(method))
    assert [module.training for module in method.modules()] == modes


SHORT = [
    "method=simclr",
    "model=resnet10",
    "model.args={layers:[1,1,1,1],channels:[8,8,16,16]}",
    "data.source.num_train=48",
    "data.source.num_test=12",
    "trainer.global_batch_size=16",
    "trainer.epochs=4",
    "trainer.steps=10",
    "trainer.device=cpu",
    "trainer.pictures=false",
    "wandb.mode=disabled",
    "loader.threads=1",
]


def pretrained(out: Path, *words: str) -> tuple[dict, list[dict]]:
    """The weights that a run of ten steps ends with, and its log."""
    register_schemas()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("pretrain", overrides=[*SHORT, *words])
    run(config, out=out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(steps_saved(out)[-1][1] / "method.safetensors"), lines


def test_ten_steps_are_the_same_bit_for_bit_with_and_without_evaluation(tmp_path):
    online = ["online=knn", "online.knn.num_train=24", "online.health.views=2", "trainer.eval_every_epochs=1"]
    plain, _ = pretrained(tmp_path / "plain")
    watched, lines = pretrained(tmp_path / "watched", *online)
    assert plain.keys() == watched.keys()
    assert all(tensor.equal(watched[name]) for name, tensor in plain.items())
    found = [line for line in lines if "knn_top1" in line]
    assert [line["step"] for line in found] == [3, 6, 9]
    assert all({"rankme", "feature_std", "lidar"} <= line.keys() for line in found)


@pytest.mark.parametrize("choice", ["none", "health", "knn"])
def test_each_choice_of_the_group_builds_as_it_is(choice):
    register_schemas()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("pretrain", overrides=[f"online={choice}"])
    built = {name: build(node) for name, node in config.online.items()}
    kinds = {"none": {}, "health": {"health": OnlineHealth}, "knn": {"health": OnlineHealth, "knn": OnlineKnn}}
    assert {name: type(part) for name, part in built.items()} == kinds[choice]


# ---- collapse ------------------------------------------------------------------------------------------------------


def collapsed(method: Method) -> Method:
    """The same features for every image, as where a loss has drawn all images together."""
    last = method.backbone.layer4[-1].bn2  # pyright: ignore
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.ones_(last.bias)
    shortcut = method.backbone.layer4[-1].downsample  # pyright: ignore
    torch.nn.init.zeros_(shortcut[1].weight)
    return method


def test_a_collapse_is_said_once_when_it_begins():
    said: list[str] = []
    online = OnlineHealth(sample=36)
    for method in (tiny_method(), collapsed(tiny_method()), collapsed(tiny_method()), tiny_method()):
        online(subject_of(method, said=said))
    assert len(said) == 1
    assert said[0].startswith("step 100: the features look collapsed: all images have nearly the same features")
    assert "lower optim.base_lr" in said[0]


def test_a_collapse_that_the_next_evaluation_confirms_ends_the_run_where_asked_for():
    said: list[str] = []
    online = OnlineHealth(sample=36, stop_on_collapse=True)
    online(subject_of(collapsed(tiny_method()), said=said))
    assert "the run ends" in said[0]
    with pytest.raises(StopRun, match="Ended by stop_on_collapse") as end:
        online(subject_of(collapsed(tiny_method())))
    assert end.value.metrics["mean_cosine"] == pytest.approx(1.0)


def test_a_run_that_recovers_goes_on():
    online = OnlineHealth(sample=36, stop_on_collapse=True)
    for _ in range(2):
        online(subject_of(collapsed(tiny_method())))
        assert online(subject_of(tiny_method()))["mean_cosine"] < 1


def test_nothing_is_called_a_collapse_before_running_statistics_have_settled():
    said: list[str] = []
    OnlineHealth(sample=36)(subject_of(collapsed(tiny_method()), step=SETTLED - 1, said=said))
    assert said == []
    OnlineHealth(sample=36)(subject_of(collapsed(tiny_method()), step=SETTLED, said=said))
    assert len(said) == 1


def test_later_evaluations_are_compared_with_the_first_also_after_a_resume():
    said: list[str] = []
    before = OnlineHealth(sample=36)
    before(subject_of(tiny_method(), step=60))
    state = json.loads(json.dumps(before.state()))
    state["start"]["rankme"] *= 10
    after = OnlineHealth(sample=36)
    after.load(state)
    after(subject_of(tiny_method(), said=said))
    assert "RankMe has fallen" in said[0]
    assert "at step 60" in said[0]
    assert after.state()["num_collapsed"] == 1


def test_features_that_are_not_finite_warn_and_end_the_run_where_asked_for():
    method = tiny_method()
    torch.nn.init.constant_(next(method.backbone.parameters()), math.nan)
    said: list[str] = []
    assert OnlineKnn(num_train=24)(subject_of(method, said=said)) == {}
    online = OnlineHealth(sample=8, stop_on_collapse=True)
    assert online(subject_of(method, said=said)) == {}
    assert all("not finite" in each for each in said)
    with pytest.raises(StopRun, match="8 of the 8 images"):
        online(subject_of(method))


# ---- ranks ---------------------------------------------------------------------------------------------------------


def evaluate_on_a_rank(sample: int) -> tuple[dict, dict]:
    assert distributed.world_size() == 2
    return evaluate(sample)


def evaluate(sample: int) -> tuple[dict, dict]:
    method = tiny_method()
    knn_of = OnlineKnn(k=1, num_train=35, num_test=sample)(subject_of(method))
    return knn_of, OnlineHealth(sample=sample + 1, views=2, view_images=35)(subject_of(method))


@pytest.mark.parametrize("sample", [1, 10])
def test_two_ranks_find_together_what_one_finds(two_ranks, sample):
    """Also where one of them has no image."""
    first, second = two_ranks.run(evaluate_on_a_rank, sample)
    assert first == second
    for ours, alone in zip(first, evaluate(sample)):
        assert ours == pytest.approx(alone, rel=1e-4)


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (OnlineKnn, {"k": 0}, "k must be 1 or more, got 0"),
        (OnlineKnn, {"k": 50, "num_train": 20}, "num_train=20 images have no k=50 neighbours"),
        (OnlineKnn, {"temperature": 0.0}, "temperature must be above 0"),
        (OnlineKnn, {"pooling": "median"}, "pooling must be one of"),
        (OnlineHealth, {"sample": 1}, "sample must be 2 or more, got 1"),
        (OnlineHealth, {"views": 1}, "views=0 leaves it out"),
        (OnlineHealth, {"view_images": 9}, "view_images=9 has no effect with views=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused_before_the_run(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
