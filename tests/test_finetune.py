"""`python -m eval.finetune`: the whole model trained on labels, by the loop of pretraining, judged once on test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from safetensors.torch import load_file

import eval.finetune as finetune
from eval import linear_probe
from eval.config import register
from eval.extract import centre_view
from eval.finetune import FinetuneConfig, load_finetuned
from eval.finetune_start import divide
from ssl.checkpoint import load_backbone, steps_saved
from ssl.config import CONF
from ssl.data.augment import Augment
from ssl.data.embedded import Embedded
from ssl.data.loader import Loader
from ssl.pretrain import run as pretrain
from tests.test_pretrain import TINY_DECODER, TINY_RESNET, TINY_VIT, composed, metrics_of

IMAGES = ["data.source.num_train=96", "data.source.num_test=36"]
BRIEF = [
    "trainer.epochs=2",
    "schedule.warmup_epochs=0",
    "trainer.global_batch_size=24",
    "trainer.device=cpu",
    "trainer.log_every_steps=1",
    "trainer.pictures=false",
    "loader.threads=1",
    "wandb.mode=disabled",
]
PLAIN = [
    "augment=finetune_simclr",
    "mix=none",
    "label_smoothing=0",
    "drop_path=0",
    "pooling=auto",
    "optim.base_lr=1e-2",
]
PLAIN += ["optim.layer_decay=null", "head_std=0.01"]


def brief_run(out: Path, *words: str) -> Path:
    """A pretraining run of two steps."""
    settings = ["trainer.steps=2", "trainer.global_batch_size=24", "trainer.device=cpu", "loader.threads=1"]
    pretrain(composed(*IMAGES, *settings, "trainer.pictures=false", "wandb.mode=disabled", *words), out=out)
    return out


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return brief_run(tmp_path_factory.mktemp("vit") / "run", "method=mae", *TINY_VIT, *TINY_DECODER)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    return brief_run(tmp_path_factory.mktemp("resnet") / "run", "method=simclr", *TINY_RESNET)


def config_of(*words: str) -> DictConfig:
    register(FinetuneConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("finetune", overrides=[*BRIEF, *words])


def tuned(out: Path, *words: str) -> dict:
    return finetune.run(config_of(*words), out=out)


def weights(out: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(steps_saved(out)[-1][1] / file)


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() != second.keys() or any(not each.equal(second[name]) for name, each in first.items())


def central_images(image_size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """The test images as an evaluation sees them, and their labels."""
    source = Embedded("test", num_train=96, num_test=36)
    loader = Loader(source, [centre_view((image_size,) * 2)], size=(image_size,) * 2, channels=3, seed=0, threads=1)
    card = json.loads(Path(f"{CONF}/data/embedded.yaml").read_text().split("mean: ")[1].split("\n")[0])
    std = json.loads(Path(f"{CONF}/data/embedded.yaml").read_text().split("std: ")[1].split("\n")[0])
    batch = Augment(loader.views, mean=card, std=std)(next(iter(loader.sequential(batch_size=36))))
    return batch["views"][0], batch["label"]


def test_it_trains_by_maes_recipe_and_writes_what_it_did(vit: Path, tmp_path: Path, capsys):
    result = tuned(tmp_path, f"ckpt={vit}")
    written = json.loads((tmp_path / "eval" / "finetune.json").read_text())
    assert written["metrics"] == result["metrics"]
    protocol = written["protocol"]
    assert protocol["settings"]["optim"]["layer_decay"] == 0.65
    assert protocol["settings"]["mix"]["_target_"] == "eval.mixing.InputMixing"
    assert protocol["settings"]["augment"]["views"][0]["policy"] == "rand-m9-mstd0.5-inc1"
    assert protocol["pooling"] == "avg"
    assert protocol["checkpoint"]["sha256"] == load_backbone(vit).hash
    assert (protocol["data"]["num_train"], protocol["data"]["num_test"]) == (96, 36)
    assert protocol["weights"]["step"] == 8
    rows = written["details"]["confusion"]["rows"]
    assert sum(map(sum, rows)) == 36
    assert sum(rows[i][i] for i in range(12)) / 36 == pytest.approx(written["metrics"]["top1"])
    said = capsys.readouterr().out
    assert f"top-1 {written['metrics']['top1']:.1%} of 36 test images" in said
    assert f"next: python -m eval.predict ckpt={tmp_path}" in said


@pytest.mark.parametrize("pooling", ["auto", "avg"])
def test_timm_loads_the_result_and_gives_its_accuracy(vit: Path, tmp_path: Path, pooling: str):
    words = [word for word in PLAIN if not word.startswith("pooling=")]
    result = tuned(tmp_path, f"ckpt={vit}", *words, f"pooling={pooling}", "trainer.precision=fp32")
    model = timm.create_model(f"local-dir:{steps_saved(tmp_path)[-1][1]}", pretrained=True).eval()
    image, label = central_images()
    with torch.no_grad():
        logits = model(image)
    assert (logits.argmax(1) == label).float().mean().item() == pytest.approx(result["metrics"]["top1"])
    ours = load_finetuned(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours.model(image), logits)
    assert ours.classes == list(Embedded("test", num_train=96, num_test=36).classes)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_run_that_was_cut_equals_one_that_was_not(kind: str, request, tmp_path: Path):
    words = [f"ckpt={request.getfixturevalue(kind)}", "held_out=0.25", "trainer.eval_every_epochs=1"]
    words += ["recipe=mae"] if kind == "vit" else ["recipe=simclr", "trainer.ema_decay=0.9"]
    tuned(tmp_path / "whole", *words)
    tuned(tmp_path / "cut", *words, "trainer.steps=2")
    tuned(tmp_path / "cut", *words)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")
    assert not differ(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    results = [json.loads((tmp_path / name / "eval" / "finetune.json").read_text()) for name in ("whole", "cut")]
    assert results[0]["metrics"] == results[1]["metrics"]


@pytest.fixture(scope="module")
def plain(vit: Path, resnet: Path, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after plain fine-tuning, to which each setting is compared."""
    found = {}
    for name, run in (("vit", vit), ("resnet", resnet)):
        out = tmp_path_factory.mktemp("plain") / name
        tuned(out, f"ckpt={run}", *PLAIN)
        found[name] = weights(out)
    return found


SETTINGS = {
    "label_smoothing": ["label_smoothing=0.1"],
    "mixup": ["mix=mixup_cutmix", "mix.cutmix=0"],
    "cutmix": ["mix=mixup_cutmix", "mix.mixup=0"],
    "manifold mixup": ["mix=manifold_mixup"],
    "patchup, hard": ["mix=patchup"],
    "patchup, soft": ["mix=patchup", "mix.kind=soft"],
    "PuzzleMix": ["mix=puzzle_mix"],
    "drop_path": ["drop_path=0.5"],
    "dropout": ["dropout=0.5"],
    "layer_decay": ["optim.layer_decay=0.5"],
    "RandAugment": ["augment.views=[{crop: random_resized, flip: 0.5, policy: rand-m9-mstd0.5-inc1}]"],
    "AutoAugment": ["augment.views=[{crop: random_resized, flip: 0.5, policy: autoaugment-original}]"],
    "random erasing": ["augment.views=[{crop: random_resized, flip: 0.5, erase: 0.9}]"],
    "head": ["train=head"],
    "stages": ["train=1"],
    "head_std": ["head_std=0.1"],
    "amount": ["train_amount=4"],
    "held_out": ["held_out=0.25"],
    "weight_decay": ["optim.weight_decay=0.3"],
    "clip": ["trainer.clip_grad_norm=0.01"],
    "image_size": ["data.image_size=40"],
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_each_setting_changes_what_is_trained(setting: str, kind: str, plain, request, tmp_path: Path):
    words = SETTINGS[setting]
    given = {word.split("=")[0] for word in words}
    rest = [
        word
        for word in PLAIN
        if word.split("=")[0] not in given and not (word[:7] == "augment" and "augment.views" in given)
    ]
    tuned(tmp_path, f"ckpt={request.getfixturevalue(kind)}", *rest, *words)
    assert differ(weights(tmp_path), plain[kind])


@pytest.mark.parametrize("words", [["trainer.ema_decay=0.9"], ["trainer.swa_start_epoch=1"]])
def test_an_average_of_the_weights_is_what_is_judged(resnet: Path, tmp_path: Path, words: list[str]):
    tuned(tmp_path, f"ckpt={resnet}", *PLAIN, *words)
    average = {name.removeprefix("backbone."): each for name, each in weights(tmp_path, "ema.safetensors").items()}
    assert differ(average, weights(tmp_path))
    judged = load_finetuned(tmp_path).model.state_dict()
    assert not differ({name: judged[name] for name in average}, average)


def test_training_learns(resnet: Path, tmp_path: Path):
    tuned(
        tmp_path, f"ckpt={resnet}", *PLAIN, "augment.views=[{crop: center}]", "optim.base_lr=0.1", "trainer.epochs=40"
    )
    losses = [line["loss"] for line in metrics_of(tmp_path)]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_held_out_images_are_of_train_and_not_trained_on(vit: Path):
    config = config_of(f"ckpt={vit}", "held_out=0.25", "train_amount=4")
    splits = finetune.make_splits(load_backbone(vit).config["data"], own=True, seed=0, command="test")
    source, held_out = divide(config, splits)
    drawn = set(source.source.indices.tolist())
    assert len(drawn) == 48  # four of each class are all the labels that are used, watching included
    kept, watched = (set(part.source.indices[part.indices].tolist()) for part in (source, held_out))
    assert (len(kept), len(watched)) == (36, 12)
    assert kept | watched == drawn
    assert not kept & watched


def test_early_stopping_ends_and_keeps_the_best_weights(resnet: Path, tmp_path: Path, monkeypatch):
    scores = iter([0.2, 0.5, 0.4, 0.3, 0.9, 0.9])
    monkeypatch.setattr("eval.held_out.headline", lambda *_, **__: {"top1": next(scores)})
    words = [f"ckpt={resnet}", *PLAIN, "held_out=0.25", "patience=2", "trainer.epochs=9", "trainer.eval_every_epochs=1"]
    words += ["trainer.checkpoint_every_steps=3", "trainer.keep_last=9"]
    result = tuned(tmp_path, *words)
    saved = dict(steps_saved(tmp_path))
    assert max(saved) == 12  # four epochs of three steps
    assert not differ(weights(tmp_path), load_file(saved[6] / "model.safetensors"))
    assert result["protocol"]["reported"] == "the weights of step 6, the best on held-out images"
    assert (result["protocol"]["weights"]["step"], result["protocol"]["weights"]["held_out"]) == (6, 0.5)
    again = tuned(tmp_path, *words)  # the same command does not go on, and reads no new score
    assert again["metrics"] == result["metrics"]


def test_a_run_with_patience_that_was_cut_equals_one_that_was_not(resnet: Path, tmp_path: Path):
    words = [f"ckpt={resnet}", *PLAIN, "held_out=0.25", "patience=1", "trainer.epochs=6", "trainer.eval_every_epochs=1"]
    words += ["trainer.checkpoint_every_steps=2"]
    tuned(tmp_path / "whole", *words)
    tuned(tmp_path / "cut", *words, "trainer.steps=4")
    tuned(tmp_path / "cut", *words)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")
    assert not differ(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_short_run_is_watched_at_its_end(resnet: Path, tmp_path: Path):
    result = tuned(tmp_path, f"ckpt={resnet}", *PLAIN, "held_out=0.25")  # two epochs; every ten by default
    assert 0 <= result["protocol"]["last_metrics"]["held_out_top1"] <= 1


def test_a_run_from_an_earlier_step_of_the_checkpoint_is_not_taken_for_one_from_the_last(tmp_path: Path):
    words = ["method=simclr", *TINY_RESNET]
    brief_run(tmp_path / "run", *words)
    tuned(tmp_path / "tuned", f"ckpt={tmp_path / 'run'}", *PLAIN)
    brief_run(tmp_path / "run", *words, "trainer.steps=3")
    with pytest.raises(ValueError, match="started from other weights"):
        tuned(tmp_path / "tuned", f"ckpt={tmp_path / 'run'}", *PLAIN)


def test_frozen_batchnorm_keeps_its_statistics_in_a_weight_average(resnet: Path, tmp_path: Path):
    tuned(tmp_path, f"ckpt={resnet}", *PLAIN, "train=head", "trainer.swa_start_epoch=1")
    average, start = weights(tmp_path, "ema.safetensors"), load_backbone(resnet).model.state_dict()
    for name, tensor in start.items():
        if "running" in name:
            torch.testing.assert_close(average[f"backbone.{name}"], tensor)


def test_with_patience_the_best_weights_are_kept_also_at_the_end(resnet: Path, tmp_path: Path, monkeypatch):
    scores = iter([0.7, 0.5])
    monkeypatch.setattr("eval.held_out.headline", lambda *_, **__: {"top1": next(scores)})
    words = [f"ckpt={resnet}", *PLAIN, "held_out=0.25", "patience=5", "trainer.eval_every_epochs=1"]
    tuned(tmp_path, *words, "trainer.checkpoint_every_steps=3", "trainer.keep_last=9")
    saved = dict(steps_saved(tmp_path))
    assert not differ(weights(tmp_path), load_file(saved[3] / "model.safetensors"))


def test_best_weights_that_cannot_be_written_are_warned_of_and_the_next_better_ones_are_kept(
    resnet: Path, tmp_path: Path, monkeypatch, caplog
):
    scores = iter([0.2, 0.9, 0.5, 0.3])
    monkeypatch.setattr("eval.held_out.headline", lambda *_, **__: {"top1": next(scores)})
    for number in range(10):  # a folder stands where the weights of the second evaluation are to be
        (tmp_path / "best_00000006.safetensors" / str(number)).mkdir(parents=True)
    words = [f"ckpt={resnet}", *PLAIN, "held_out=0.25", "patience=5", "trainer.epochs=4", "trainer.eval_every_epochs=1"]
    result = tuned(tmp_path, *words, "trainer.checkpoint_every_steps=3", "trainer.keep_last=9")
    assert next(message for message in caplog.messages if "best weights" in message).endswith("step 3 stay the best")
    saved = dict(steps_saved(tmp_path))
    assert not differ(weights(tmp_path), load_file(saved[9] / "model.safetensors"))
    assert result["protocol"]["reported"] == "the weights of step 9, the best on held-out images"


def test_best_weights_that_were_damaged_are_refused(resnet: Path, tmp_path: Path, monkeypatch):
    def damage(*_: object, **__: object) -> dict[str, float]:
        for path in tmp_path.glob("best_*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        return {"top1": next(scores)}

    scores = iter([0.7, 0.5])
    monkeypatch.setattr("eval.held_out.headline", damage)
    words = [f"ckpt={resnet}", *PLAIN, "held_out=0.25", "patience=5", "trainer.eval_every_epochs=1"]
    with pytest.raises(ValueError, match=r"best_00000003\.safetensors, .* is missing or damaged: its SHA-256"):
        tuned(tmp_path, *words, "trainer.checkpoint_every_steps=3")


def test_the_test_split_is_read_once_and_after_training(vit: Path, tmp_path: Path, monkeypatch):
    read = []
    original = Embedded.read

    def noted(self, index):
        read.append((self.name, index))
        return original(self, index)

    monkeypatch.setattr(Embedded, "read", noted)
    shown = []
    original_classify = finetune.classify
    monkeypatch.setattr(finetune, "classify", lambda *a, **k: shown.append(k["title"]) or original_classify(*a, **k))
    tuned(tmp_path, f"ckpt={vit}", *PLAIN, "held_out=0.25", "trainer.eval_every_epochs=1")
    assert shown == ["test"]
    first = next(place for place, (name, _) in enumerate(read) if "test" in name)
    assert {name for name, _ in read[:first]} == {Embedded("train", num_train=96, num_test=36).name}
    assert len([name for name, _ in read[first:] if "train" in name]) <= 8  # a checksum of what it was trained on


def test_a_probed_head_is_where_training_starts(resnet: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(resnet, run)
    register(linear_probe.LinearProbeConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        words = ["device=cpu", "threads=1", "precision=fp32", "lr=[0.1]", "weight_decay=[0.0]", "steps=50"]
        probe = linear_probe.run(compose("linear_probe", overrides=[f"ckpt={run}", *words]))
    words = [word for word in PLAIN if not word.startswith("head_std")]
    frozen = [
        *words,
        "head=probe",
        "train=head",
        "optim.base_lr=1e-12",
        "trainer.precision=fp32",
        "optim.weight_decay=0",
    ]
    result = tuned(tmp_path / "tuned", f"ckpt={run}", *frozen)
    assert result["metrics"]["top1"] == pytest.approx(probe["metrics"]["top1"])


def test_another_image_size_resamples_position_embeddings(vit: Path, tmp_path: Path):
    result = tuned(tmp_path, f"ckpt={vit}", *PLAIN, "data.image_size=40", "trainer.steps=1")
    assert weights(tmp_path)["pos_embed"].shape[1] == 1 + 100
    assert any("resampled from 8x8 to 10x10" in note for note in result["protocol"]["notes"])


def test_from_scratch_is_the_same_command(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["ckpt=random", *TINY_RESNET, "data=embedded", *IMAGES, "recipe=scratch_resnet"]
    config = config_of(*words)
    result = finetune.run(config)
    assert result["protocol"]["checkpoint"] is None
    assert result["protocol"]["subject"].endswith("from random weights")
    folder = Path(result["path"]).relative_to("runs").parts[0]
    assert folder.startswith("supervised_resnet18_args.")  # a changed resnet18, not a folder that all of them share
    assert folder.endswith("_embedded_scratch_resnet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["patience=3"], "patience needs images to watch"),
        (["patience=3", "held_out=0.1", "trainer.swa_start_epoch=1"], "averages over many; give one"),
        (["head=probe", "train_amount=1%"], "they would leak"),
        (["held_out=0.1", "trainer.eval_every_epochs=null"], "no effect with trainer.eval_every_epochs=null"),
        (["train=head", "drop_path=0.1"], "no effect with train=head"),
        (["train=17", "optim.layer_decay=null"], "a number of last stages from 1 to"),
        (["train=some"], "train must be all, head"),
        (["head=probe"], "make it by python -m eval.linear_probe"),
        (["schedule.warmup_epochs=5"], "shorter than the run"),
        (["mix=mixup_cutmix", "mix.switch=0"], "cutmix has no effect with switch=0"),
        (["mix=manifold_mixup", "mix.layers=[9]"], "more than the backbone's"),
    ],
)
def test_bad_settings_are_refused_in_words(vit: Path, tmp_path: Path, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        tuned(tmp_path, f"ckpt={vit}", *words)
    assert not (tmp_path / "eval" / "finetune.json").exists()


def test_maes_recipe_on_a_resnet_names_the_one_that_fits(resnet: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="recipe=mae is for vision transformers, got resnet18; give recipe=simclr"):
        tuned(tmp_path, f"ckpt={resnet}", "recipe=mae")
    assert not (tmp_path / "config.yaml").exists()


def test_what_was_fine_tuned_is_judged_and_tuned_like_any_checkpoint(vit: Path, tmp_path: Path):
    tuned(tmp_path / "first", f"ckpt={vit}", *PLAIN)
    result = tuned(tmp_path / "second", f"ckpt={tmp_path / 'first'}", *PLAIN)
    assert result["protocol"]["data"]["name"] == "embedded"
    assert result["protocol"]["started_from"] == load_backbone(tmp_path / "first").hash
    assert result["protocol"]["weights"]["sha256"] == load_backbone(tmp_path / "second").hash


def test_a_recipe_whose_batch_is_larger_than_the_set_takes_what_there_is(vit: Path, tmp_path: Path):
    result = tuned(tmp_path, f"ckpt={vit}", *PLAIN, "train_amount=1", "trainer.global_batch_size=1024")
    assert result["protocol"]["settings"]["trainer"]["global_batch_size"] == 12
    assert any("instead of 1,024" in note for note in result["protocol"]["notes"])
