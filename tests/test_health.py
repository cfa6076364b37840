"""Label-free health: each measure against its formula in numpy or a closed form; and `python -m eval.health`."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from eval import health as command
from eval.collapse import signs_of_collapse
from eval.command import start
from eval.config import register
from eval.sample import Sample
from eval.spectra import alpha_req, health, lidar, rankme
from ssl import checkpoint
from ssl.config import CONF
from ssl.data.embedded import Embedded
from ssl.data.views import View
from ssl.methods.base import Method
from ssl.models.backbones import build_backbone, pooled_features

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
VIEWS = [{"crop": "random_resized", "scale": [0.5, 1.0], "flip": 0.5, "count": 2}]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(singular: np.ndarray, *, num: int, seed: int = 0) -> torch.Tensor:
    """Centred features (num, D) float64 with these singular values."""
    generator = np.random.default_rng(seed)
    raw = generator.standard_normal((num, len(singular)))
    left, _ = np.linalg.qr(raw - raw.mean(axis=0))
    right, _ = np.linalg.qr(generator.standard_normal((len(singular), len(singular))))
    return torch.from_numpy(left * singular @ right)


# ---- RankMe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "dim"), [(40, 9), (9, 40), (2, 1)])
def test_rankme_is_the_papers_formula(num, dim):
    features = gaussian(num, dim)
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    entropy = 0.0
    for value in singular:
        p = value / np.abs(singular).sum() + 1e-7
        entropy -= p * math.log(p)
    assert rankme(features) == pytest.approx(math.exp(entropy), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_rankme_of_equally_used_directions_is_their_number(rank):
    singular = np.r_[np.full(rank, 5.0), np.zeros(12 - rank)]
    assert rankme(with_spectrum(singular, num=30)) == pytest.approx(rank, rel=1e-4)


def test_rankme_of_an_isotropic_gaussian_is_near_the_number_of_dimensions():
    assert rankme(gaussian(4000, 24)) > 23.9
    assert rankme(gaussian(24, 4000)) > 23.9


# ---- alpha-ReQ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
def test_alpha_of_a_power_law_is_recovered_wherever_its_centre_lies(alpha):
    features = with_spectrum(np.arange(1, 121) ** (-alpha / 2), num=200) + 4.0
    assert alpha_req(features) == pytest.approx(alpha, abs=1e-9)
    assert alpha_req(features.float()) == pytest.approx(alpha, abs=1e-3)


def test_alpha_is_fitted_to_eigenvalues_4_to_100_with_weights_1_over_rank():
    features = gaussian(300, 150) * torch.linspace(1, 3, 150)
    eigenvalues = np.linalg.eigvalsh(np.cov(features.double().numpy().T))[::-1]
    place = np.arange(4, 101)
    slope, _ = np.polyfit(np.log(place), np.log(eigenvalues[3:100]), 1, w=place**-0.5)  # polyfit squares its weights
    assert alpha_req(features) == pytest.approx(-slope, rel=1e-6)


def test_alpha_leaves_rounding_out_of_the_fit():
    singular = np.r_[np.arange(1, 21) ** -0.5, np.zeros(80)]
    assert alpha_req(with_spectrum(singular, num=200).float()) == pytest.approx(1.0, abs=1e-3)


def test_alpha_needs_three_eigenvalues_of_the_fit():
    assert alpha_req(gaussian(50, 5)) is None
    assert alpha_req(gaussian(50, 6)) is not None


# ---- spreads -------------------------------------------------------------------------------------------------------


def test_feature_std_is_one_over_root_d_where_isotropic_and_does_not_know_lengths():
    features = gaussian(5000, 25)
    assert health(features)["feature_std"] == pytest.approx(25**-0.5, rel=0.01)
    stretched = features * torch.rand(5000, 1, generator=torch.Generator().manual_seed(1)).mul(100).add(1e-3)
    assert health(stretched)["feature_std"] == pytest.approx(health(features)["feature_std"], rel=1e-5)


def test_mean_cosine_is_the_mean_over_all_pairs_of_two_images():
    features = gaussian(13, 4) + 0.5
    pairs = cosine_similarity(features.numpy())[~np.eye(13, dtype=bool)]
    assert health(features)["mean_cosine"] == pytest.approx(pairs.mean(), abs=1e-6)


def test_features_of_zeros_are_equal_to_each_other_and_orthogonal_to_all_else():
    features = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert health(features)["mean_cosine"] == pytest.approx(1 / 3)  # one of three pairs


def test_dead_dimensions_are_those_that_do_not_differ_between_images():
    features = gaussian(50, 8)
    features[:, 2], features[:, 5] = 0.0, 3.0
    assert health(features)["dead_dimensions"] == 2 / 8


@pytest.mark.parametrize("value", [0.0, 3.3, -1e-30, 1e30])
@pytest.mark.parametrize(("num", "dim"), [(30, 7), (7, 30), (2, 1)])
def test_features_that_are_all_the_same_have_numbers_that_say_so(value, num, dim):
    found = health(torch.full((num, dim), value))
    assert found == {
        "rankme": pytest.approx(0.0 if value == 0 else 1.0, abs=1e-3),
        "feature_std": pytest.approx(0.0, abs=1e-12),
        "mean_cosine": pytest.approx(1.0),
        "dead_dimensions": 1.0,
    }


@pytest.mark.parametrize("bad", [torch.ones(1, 4), torch.ones(0, 4), torch.ones(4), torch.ones(4, 0)])
def test_fewer_than_two_images_are_refused(bad):
    with pytest.raises(ValueError, match="two images or more"):
        health(bad)


def test_features_that_are_not_finite_are_refused_with_their_number():
    features = gaussian(6, 3)
    features[1, 0], features[4, 2] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 6 images have features that are not finite"):
        health(features)


# ---- LiDAR ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "views", "dim"), [(12, 5, 4), (5, 2, 8), (5, 2, 30)])
def test_lidar_is_the_papers_formula(num, views, dim):
    x = (gaussian(num, 1, dim) + 0.3 * gaussian(num, views, dim, seed=1)).double().numpy()
    mean = [x[i].mean(axis=0) for i in range(num)]
    centre = np.mean(mean, axis=0)
    between = sum(np.outer(mean[i] - centre, mean[i] - centre) for i in range(num)) / (num - 1)
    within = 1e-4 * np.eye(dim)
    for i in range(num):
        for j in range(views):
            within += np.outer(x[i, j] - mean[i], x[i, j] - mean[i]) / (num * (views - 1))
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(min=0)
    p = eigenvalues / eigenvalues.sum() + 1e-8
    assert lidar(torch.from_numpy(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


def test_lidar_counts_the_directions_that_tell_images_apart_where_rankme_counts_all():
    x = gaussian(400, 6, 20)  # every view anew: no direction is the image's own
    x[..., :5] = gaussian(400, 1, 5, seed=1) + 0.01 * gaussian(400, 6, 5, seed=2)
    assert lidar(x) == pytest.approx(5, abs=0.1)
    assert rankme(x.flatten(0, 1)) > 19


def test_lidar_of_images_that_are_all_alike_is_zero():
    assert lidar(torch.full((4, 3, 5), 2.0)) == 0.0


def test_lidar_needs_two_views():
    with pytest.raises(ValueError, match="two or more, got 1"):
        lidar(gaussian(10, 1, 4))


# ---- what looks like collapse --------------------------------------------------------------------------------------


def test_sound_features_show_no_sign_of_collapse():
    metrics = health(gaussian(200, 32).relu())
    assert signs_of_collapse(metrics, dimensions=32) == []
    assert signs_of_collapse(metrics, dimensions=32, start={"step": 0, **metrics}) == []


@pytest.mark.parametrize(
    ("features", "sign"),
    [
        (10 + 0.01 * gaussian(200, 64), "nearly the same features"),
        (gaussian(200, 3) @ gaussian(3, 64, seed=1), r"of 64 directions \(RankMe; collapse: below 4\)"),
        (torch.cat([gaussian(200, 30), torch.zeros(200, 34)], 1), "53% of the dimensions hardly differ"),
    ],
)
def test_each_kind_of_collapse_is_named(features, sign):
    assert any(re.search(sign, each) for each in signs_of_collapse(health(features), dimensions=64))


def test_a_fall_of_rankme_since_the_start_is_a_sign():
    before, now = health(gaussian(300, 64)), health(gaussian(300, 15) @ gaussian(15, 64, seed=1))
    assert signs_of_collapse(now, dimensions=64) == []
    (sign,) = signs_of_collapse(now, dimensions=64, start={"step": 30, **before})
    assert f"from {before['rankme']:.1f} at step 30" in sign


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Baselines write below the working directory."""
    monkeypatch.chdir(tmp_path)


def save_run(run_dir: Path, *, data: dict, weight: float | None = None, augment: list | None = None) -> Path:
    """A run folder with one checkpoint of an untrained backbone; `weight` fills its first layer."""
    torch.manual_seed(0)
    backbone, spec = build_backbone("resnet18", image_size=(32, 32), model_args=TINY)
    method = Method()
    method.backbone = backbone
    if weight is not None:
        torch.nn.init.constant_(next(backbone.parameters()), weight)
    config = {"data": data, "seed": 0, **({} if augment is None else {"augment": {"views": augment}})}
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


def folder_data(root: Path) -> dict:
    source = {"_target_": "ssl.data.folder.Folder", "root": str(root)}
    return {"name": "folder", "root": str(root), "source": source, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}


def embedded_data(num: int) -> dict:
    source = {"_target_": "ssl.data.embedded.Embedded", "num_train": num, "num_test": 12}
    return {"name": "embedded", "root": None, "source": source, "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 20 pictures without labels, one of them broken."""
    root = tmp_path / "photos"
    root.mkdir()
    source = Embedded("train", num_train=20)
    for place in range(20):
        Image.fromarray(np.asarray(source.read(place))).save(root / f"{place:02}.png")
    (root / "07.png").write_bytes((root / "07.png").read_bytes()[:60])
    return root


def call(*overrides: str) -> dict:
    """What the command does with these words, in this process."""
    register(command.HealthConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("health", overrides=[*overrides, "device=cpu", "precision=fp32", "threads=1"])
    return command.run(config)


def test_an_unlabelled_folder_is_enough_and_broken_images_are_left_out(photos, capsys):
    run_dir = save_run(Path("runs/photos"), data=folder_data(photos), augment=VIEWS)
    result = call(f"ckpt={run_dir}", "views=3", "view_images=10")
    assert json.loads((run_dir / "eval" / "health.json").read_text()) == {
        key: result[key] for key in ("metrics", "protocol")
    }
    assert set(result["metrics"]) == {
        "rankme",
        "alpha_req",
        "feature_std",
        "mean_cosine",
        "dead_dimensions",
        "lidar",
    }
    data = result["protocol"]["data"]
    assert (data["num_images"], data["num_sampled"], data["num_undecodable"]) == (20, 19, 1)
    assert result["protocol"]["lidar"]["augment"] == "the checkpoint's own"
    assert result["protocol"]["lidar"]["recipe"] == [{"scale": [0.5, 1.0], "flip": 0.5}]
    said = capsys.readouterr().out
    assert f"RankMe {result['metrics']['rankme']:>14.1f}" in said
    assert "note: 1 images could not be decoded" in said
    assert f"next: python -m eval.features ckpt={run_dir}" in said


def test_the_command_measures_the_features_of_the_central_views():
    run_dir = save_run(Path("runs/embedded"), data=embedded_data(30))
    metrics = call(f"ckpt={run_dir}", "views=0")["metrics"]
    images = Embedded("train", num_train=30)
    pixels = torch.from_numpy(np.stack([images.read(i) for i in range(30)])).permute(0, 3, 1, 2)  # whole: 32 of 32
    with torch.no_grad():
        features = pooled_features(checkpoint.load_backbone(run_dir).model.eval(), (pixels / 255 - 0.5) / 0.25)
    assert metrics == pytest.approx(health(features), rel=1e-3)


def test_a_sample_is_seeded_and_bounded():
    run_dir = save_run(Path("runs/embedded"), data=embedded_data(60))
    few = call(f"ckpt={run_dir}", "sample=24", "views=0")
    assert few["protocol"]["data"]["num_sampled"] == 24
    assert few["metrics"] == call(f"ckpt={run_dir}", "sample=24", "views=0")["metrics"]
    assert few["metrics"] != call(f"ckpt={run_dir}", "sample=24", "views=0", "seed=1")["metrics"]


def test_a_collapsed_backbone_is_called_so_with_what_to_do(capsys):
    run_dir = save_run(Path("runs/embedded"), data=embedded_data(40), weight=0.0)
    result = call(f"ckpt={run_dir}", "views=2", "view_images=10")
    assert result["metrics"]["feature_std"] == pytest.approx(0.0, abs=1e-9)
    assert result["metrics"]["lidar"] == 0.0
    assert result["protocol"]["signs_of_collapse"]
    said = capsys.readouterr().out
    assert "looks collapsed: all images have nearly the same features" in said
    assert "what helps: lower optim.base_lr" in said


def test_raw_pixels_and_an_untrained_backbone_are_measured_too():
    small = ["data=embedded", "data.source.num_train=30", "view_images=12", "views=2"]
    assert call("ckpt=pixels", *small)["protocol"]["features"]["dimensions"] == 3 * 32 * 32
    untrained = call("ckpt=random", "model=resnet10", "model.args.channels=[8,8,16,16]", *small, "augment=simclr_small")
    assert untrained["protocol"]["lidar"]["augment"] == "given"


def test_a_diverged_backbone_is_refused_and_writes_nothing():
    run_dir = save_run(Path("runs/embedded"), data=embedded_data(30), weight=math.nan)
    with pytest.raises(ValueError, match=r"holds numbers that are not finite; the backbone has diverged"):
        call(f"ckpt={run_dir}", "views=0")
    assert not (run_dir / "eval").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample=1"], "sample=1 images are too few"),
        (["views=1"], "views=0 leaves it out"),
        (["views=0", "view_images=10"], "view_images have no effect with views=0"),
        (["views=0", "augment=mae"], "augment have no effect with views=0"),
        (["view_images=1"], "view_images=1 images are too few"),
        (["layers=[last,2]", "ckpt=random", "model=resnet10", "model.args.channels=[8,8,16,16]"], "2 features"),
    ],
)
def test_settings_that_mean_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        call("ckpt=pixels", "data=embedded", *words)


def test_the_command_line_reports_rankme_to_a_sweep(monkeypatch, capsys):
    GlobalHydra.instance().clear()
    words = ["ckpt=pixels", "data=embedded", "data.source.num_train=30", "views=0", "threads=1"]
    monkeypatch.setattr(sys, "argv", ["eval.health.py", *words])
    told = {"objective": lambda result: result["metrics"]["rankme"]}
    start(command.run, command.HealthConfig, command="eval.health", **told)
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: python -m eval.knn ckpt=pixels")


# ---- the sample ----------------------------------------------------------------------------------------------------


def read_sample(num_views: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels as features, read twice."""
    sample = Sample(
        Embedded("train", num_train=6),
        [View(scale=(0.3, 1.0), flip=0.5)] * num_views,
        image_size=(16, 16),
        channels=3,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        device=torch.device("cpu"),
        seed=seed,
        threads=1,
    )
    first, again = (sample.read(lambda image: [image.flatten(1)], batch_size=batch_size) for batch_size in (256, 4))
    return first.features, again.features


def test_views_of_a_sample_differ_from_each_other_and_not_from_reading_to_reading():
    first, again = read_sample(3)  # (6, 3, D)
    assert first.equal(again)
    assert not first[:, 0].equal(first[:, 1])
    assert not first.equal(read_sample(3, seed=1)[0])


def test_an_image_that_cannot_be_read_is_left_out_and_not_replaced():
    class Broken(Embedded):
        def read(self, index):
            if index == 2:
                raise OSError("gone")
            return super().read(index)

    settings = {"image_size": (32, 32), "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "threads": 1}
    samples = [
        Sample(source("train", num_train=6), [View(crop="center")], device=torch.device("cpu"), **settings)
        for source in (Broken, Embedded)
    ]
    broken, whole = (sample.read(lambda image: [image.flatten(1)], batch_size=4) for sample in samples)
    kept = [0, 1, 3, 4, 5]
    assert broken.num_bad == 1
    assert broken.features.equal(whole.features[kept])
    assert broken.labels.equal(whole.labels[kept])
