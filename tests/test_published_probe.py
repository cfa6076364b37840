"""`python -m eval.linear_probe protocol=mae|simclr|dinov2`: the published protocols through the training loop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from eval import linear_probe
from eval.config import register
from eval.head_file import load_head
from eval.layers import FeatureSet
from eval.probe_heads import ProbeHeads
from eval.subject import read_features
from ssl import checkpoint
from ssl.config import CONF, plain
from ssl.data.embedded import Embedded
from ssl.data.subset import split_held_out
from ssl.data.views import View, make_views
from ssl.methods.base import Method
from ssl.models.backbones import build_backbone, pooled_features
from ssl.optim import make_optimizer, parameter_groups, scaled_lr, set_lr
from ssl.schedules import Schedule, make_schedule
from ssl.trainer import total_steps
from tests.run_folder import write_run

QUICK = ["device=cpu", "threads=1", "precision=fp32", "wandb.mode=disabled", "trainer.pictures=false"]
SHORT = ["trainer.epochs=4", "trainer.global_batch_size=24", "schedule.warmup_epochs=1"]
TWO_RATES = ["head.lr=[0.01,0.1]"]
IMAGENET = 1_281_167
VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2}


def composed(*words: str) -> DictConfig:
    register(linear_probe.LinearProbeConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("linear_probe", overrides=list(words))


def call(*words: str) -> dict:
    return linear_probe.run(composed(*words, *QUICK))


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """A run folder with one checkpoint of a ResNet."""
    return write_run(tmp_path / "run")


@pytest.fixture
def a_vit(tmp_path: Path) -> Path:
    """A run folder with one checkpoint of a vision transformer."""
    torch.manual_seed(0)
    backbone, spec = build_backbone("vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, model_args=VIT)
    method = Method()
    method.backbone = backbone
    data = OmegaConf.load(f"{CONF}/data/embedded.yaml")
    data.source.num_train, data.source.num_test = 120, 36
    return checkpoint.save(
        tmp_path / "vit",
        step=3,
        method=method,
        spec=spec,
        optimizer_tensors={},
        ema=None,
        config_yaml=OmegaConf.to_yaml({"data": data, "seed": 0}),
        state={"epoch": 1.0},
        mean=list(data.mean),
        std=list(data.std),
    ).parents[1]


def last_checkpoint(out: Path) -> Path:
    return checkpoint.steps_saved(out)[-1][1]


# ---- the heads -----------------------------------------------------------------------------------------------------


def small_heads(name: str = "resnet10t", **settings) -> ProbeHeads:
    args = VIT if name.startswith("vit") else {}
    patch = {"patch_size": 8} if name.startswith("vit") else {}
    torch.manual_seed(0)
    backbone, _ = build_backbone(name, image_size=(32, 32), model_args=args, **patch)
    given = {"sets": [FeatureSet()], "num_classes": 5, "init_std": 0.01, "dtype": torch.float32} | settings
    return ProbeHeads(backbone, image_size=(32, 32), in_chans=3, device=torch.device("cpu"), **given)


def batches(count: int, size: int = 8) -> list[dict]:
    images = torch.Generator().manual_seed(1)
    return [
        {
            "views": [torch.randn(size, 3, 32, 32, generator=images)],
            "label": torch.randint(0, 5, (size,), generator=images),
        }
        for _ in range(count)
    ]


def trained(method: ProbeHeads, steps: int, lr: float, optimizer_name: str = "sgd", **options) -> ProbeHeads:
    groups = parameter_groups(method, weight_decay=0.0, lr_scales=method.lr_scales)
    optimizer = make_optimizer(groups, name=optimizer_name, lr=lr, momentum=0.9, **options)
    method.train()
    for step, batch in enumerate(batches(steps)):
        set_lr(optimizer, lr * (1 - step / steps))
        optimizer.zero_grad()
        method(batch)["loss"].backward()
        optimizer.step()
    return method


def test_the_mae_head_is_a_batchnorm_without_affine_and_a_linear_layer():
    method = small_heads(batchnorm=True, batchnorm_eps=1e-6).train()
    theirs = nn.Sequential(nn.BatchNorm1d(512, affine=False, eps=1e-6), nn.Linear(512, 5))
    linear = method.heads[0]
    assert isinstance(linear, nn.Linear)
    theirs[1].load_state_dict(linear.state_dict())  # pyright: ignore[reportArgumentType]
    for batch in batches(3):
        with torch.no_grad():
            features = pooled_features(method.backbone, batch["views"][0])
        torch.testing.assert_close(method(batch)["loss"], functional.cross_entropy(theirs(features), batch["label"]))
    weight, bias = method.folded(0)
    method.eval()
    theirs.eval()
    torch.testing.assert_close(features @ weight.T + bias, theirs(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.logits(0, features)[0], theirs(features))


def test_the_mae_head_moves_as_their_lars_moves_it():
    method = trained(small_heads(batchnorm=True, batchnorm_eps=1e-6), 5, 2.0, "lars", trust_coeff=0.001)
    features = nn.Sequential(small_heads().backbone.eval(), nn.BatchNorm1d(512, affine=False, eps=1e-6))
    weight, bias = torch.empty(5, 512).normal_(std=0.01, generator=torch.Generator().manual_seed(0)), torch.zeros(5)
    moved = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step, batch in enumerate(batches(5)):
        with torch.no_grad():
            x = features[1](features[0](batch["views"][0]))
        tensors = [each.clone().requires_grad_() for each in (weight, bias)]
        loss = functional.cross_entropy(functional.linear(x, *tensors), batch["label"])
        gradient = torch.autograd.grad(loss, tensors)
        ratio = 0.001 * weight.norm() / gradient[0].norm()  # util/lars.py: of tensors of more than one dimension
        moved = [0.9 * moved[0] + ratio * gradient[0], 0.9 * moved[1] + gradient[1]]
        weight, bias = weight - 2.0 * (1 - step / 5) * moved[0], bias - 2.0 * (1 - step / 5) * moved[1]
    linear = method.heads[0]
    torch.testing.assert_close(linear.weight.detach(), weight, rtol=1e-4, atol=1e-7)  # pyright: ignore
    torch.testing.assert_close(linear.bias.detach(), bias, rtol=1e-4, atol=1e-7)  # pyright: ignore


def test_heads_trained_together_equal_linear_layers_trained_alone_at_their_own_rates():
    rates, steps = [0.1, 2.0, 0.5], 6
    sets = [FeatureSet("last", "token"), FeatureSet("last_4", "token_patches")]
    method = trained(small_heads("vit_tiny_patch16_224", sets=sets, rates=rates), steps, lr=0.2)
    backbone = small_heads("vit_tiny_patch16_224").backbone
    for place, each in enumerate(sets):
        for number, rate in enumerate(rates):
            alone = nn.Linear(16 if each.layer == "last" else 80, 5)
            nn.init.normal_(alone.weight, std=0.01, generator=torch.Generator().manual_seed(0))
            nn.init.zeros_(alone.bias)
            optimizer = torch.optim.SGD(alone.parameters(), lr=0.2 * rate, momentum=0.9)
            for step, batch in enumerate(batches(steps)):
                optimizer.param_groups[0]["lr"] = 0.2 * rate * (1 - step / steps)
                optimizer.zero_grad()
                features = dinov2_features(backbone, batch["views"][0], each)
                functional.cross_entropy(alone(features), batch["label"]).backward()
                optimizer.step()
            weight, bias = method.folded(place * len(rates) + number)
            torch.testing.assert_close(weight, alone.weight.detach(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(bias, alone.bias.detach(), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def dinov2_features(backbone: nn.Module, image: torch.Tensor, each: FeatureSet) -> torch.Tensor:
    """As dinov2's linear evaluation concatenates them, through timm's own intermediate layers."""
    count = 1 if each.layer == "last" else 4
    outputs = backbone.get_intermediate_layers(image, n=count, norm=True, return_prefix_tokens=True)  # pyright: ignore
    tokens = torch.cat([prefix[:, 0] for _, prefix in outputs], dim=1)
    return torch.cat([tokens, outputs[-1][0].mean(1)], dim=1) if each.pooling == "token_patches" else tokens


def test_nothing_of_the_backbone_is_trained_or_moved():
    method = small_heads(batchnorm=True)
    before = {name: tensor.clone() for name, tensor in method.backbone.state_dict().items()}
    trained(method, 3, lr=1.0)
    assert all(parameter.grad is None for parameter in method.backbone.parameters())
    assert not any(module.training for module in method.backbone.modules())
    assert all(tensor.equal(before[name]) for name, tensor in method.backbone.state_dict().items())
    names = {name for group in parameter_groups(method, weight_decay=0.0) for name in group["names"]}
    assert names == {"heads.0.weight", "heads.0.bias"}


def test_how_many_images_the_backbone_takes_at_once_changes_nothing():
    losses = [small_heads(batchnorm=True, batch_size=size).train()(batches(1)[0])["loss"] for size in (3, 256)]
    torch.testing.assert_close(losses[0], losses[1])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        small_heads(batch_size=0)


# ---- the protocols' numbers ----------------------------------------------------------------------------------------


def recipe(protocol: str, *words: str) -> tuple[DictConfig, float, Schedule]:
    """A protocol's config, peak learning rate and schedule on ImageNet."""
    config = composed("ckpt=x", f"protocol={protocol}", *words)
    size = config.trainer.global_batch_size
    per_epoch = IMAGENET // size
    span, stop = total_steps(epochs=config.trainer.epochs, steps=config.trainer.steps, steps_per_epoch=per_epoch)
    schedule = make_schedule(
        config.schedule.name.name,
        steps_per_epoch=per_epoch,
        total_steps=span,
        warmup_epochs=config.schedule.warmup_epochs,
        min_factor=config.schedule.min_factor,
    )
    assert span == stop
    peak = scaled_lr(config.optim.base_lr, global_batch_size=size, scaling=config.optim.scaling.name)
    assert config.optim.weight_decay == 0
    assert config.optim.options.momentum == 0.9
    assert make_views(plain(config.augment.views)) == [
        View(crop="random_resized", scale=(0.08, 1.0), interpolation="bicubic", flip=0.5)
    ]
    return config, peak, schedule


def test_mae_takes_lars_at_6_4_for_90_epochs_with_10_of_warmup():
    config, peak, schedule = recipe("mae")
    assert (config.optim.name, config.optim.options.trust_coeff) == ("lars", 0.001)
    assert peak == pytest.approx(6.4)
    per_epoch = IMAGENET // 16384
    assert schedule.total_steps == 90 * per_epoch
    for epoch in (10, 37, 89.5):  # lr_sched.py of facebookresearch/mae
        theirs = 6.4 * 0.5 * (1 + math.cos(math.pi * (epoch - 10) / (90 - 10)))
        assert peak * schedule.factor(int(epoch * per_epoch)) == pytest.approx(theirs, rel=1e-9)
    assert peak * schedule.factor(5 * per_epoch) == pytest.approx(3.2, rel=2e-3)
    assert (config.head.batchnorm, config.head.batchnorm_eps, config.head.init_std) == (True, 1e-6, 0.01)
    assert (config.layers, config.pooling) == ("last", "token")


def test_simclr_takes_nesterov_at_1_6_for_90_epochs_without_warmup():
    config, peak, schedule = recipe("simclr")
    assert (config.optim.name, config.optim.options.nesterov) == ("sgd", True)
    assert peak == pytest.approx(1.6)
    assert schedule.total_steps == 90 * (IMAGENET // 4096)
    assert schedule.factor(0) == 1.0
    assert schedule.factor(45 * (IMAGENET // 4096)) == pytest.approx(0.5)
    assert (config.head.batchnorm, config.head.init_std) == (False, 0.0)


def test_dinov2_takes_13_rates_over_12500_steps_that_end_at_0():
    config, peak, schedule = recipe("dinov2")
    assert [peak * rate for rate in config.head.lr] == pytest.approx(
        [4 * rate for rate in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)]
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12500, eta_min=0)
    for step in range(12500):
        if step % 500 == 0 or step == 12499:
            assert schedule.factor(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()
    assert (list(config.layers), list(config.pooling)) == (["last", "last_4"], ["token", "token_patches"])
    assert config.optim.options.nesterov is False


# ---- the command ---------------------------------------------------------------------------------------------------


def test_simclr_writes_what_was_done_and_a_head_that_scores_it(a_run: Path):
    result = call(f"ckpt={a_run}", "protocol=simclr", *SHORT)
    written = json.loads((a_run / "eval" / "linear_probe_simclr.json").read_text())
    assert (written["metrics"], written["protocol"]) == (result["metrics"], result["protocol"])
    protocol = written["protocol"]
    assert protocol["departures"] == {
        "schedule.warmup_epochs": [0, 1.0],
        "trainer.epochs": [90, 4.0],
        "trainer.global_batch_size": [4096, 24],
    }
    assert protocol["choice"]["lr"] == pytest.approx(0.1 * 24 / 256)
    assert (protocol["data"]["num_train"], protocol["data"]["num_test"]) == (120, 36)
    assert protocol["features"]["layer"] == "last"
    assert "num_held_out" not in protocol
    assert np.sum(written["details"]["confusion"]["rows"]) == 36

    head = load_head(a_run / "eval" / "linear_probe_simclr.head")
    judged = read_features(composed(f"ckpt={a_run}", *QUICK), command="eval.linear_probe")
    right = head.logits(judged.test.features).argmax(1) == judged.test.labels
    assert right.double().mean().item() == written["metrics"]["top1"]


def test_the_run_ends_with_the_backbone_that_it_began_with(a_run: Path):
    call(f"ckpt={a_run}", "protocol=mae", *SHORT)
    ours, theirs = (load_file(last_checkpoint(out) / "model.safetensors") for out in (probe_of(a_run, "mae"), a_run))
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())  # BatchNorm's statistics among them


def probe_of(run: Path, protocol: str) -> Path:
    return run / "eval" / f"linear_probe_{protocol}"


def test_a_cut_and_resumed_probe_equals_an_uncut_one(a_run: Path):
    words = [f"ckpt={a_run}", "protocol=mae", *SHORT]
    call(*words, "trainer.steps=7", "name=cut")
    cut = call(*words, "name=cut")
    uncut = call(*words, "name=uncut")
    assert cut["metrics"] == uncut["metrics"]
    ours, theirs = (load_file(a_run / "eval" / f"{name}.head" / "head.safetensors") for name in ("cut", "uncut"))
    assert all(ours[name].equal(theirs[name]) for name in ("weight", "bias"))


def test_dinov2_chooses_among_its_heads_on_images_that_are_not_trained_on(a_vit: Path):
    protocol = call(f"ckpt={a_vit}", "protocol=dinov2", *SHORT, *TWO_RATES, "trainer.steps=6")["protocol"]
    assert [(row["layer"], row["pooling"], row["base_lr"]) for row in protocol["grid"]] == [
        (layer, pooling, rate)
        for layer in ("last", "last_4")
        for pooling in ("token", "token_patches")
        for rate in (0.01, 0.1)
    ]
    assert protocol["choice"] in protocol["grid"]
    assert (protocol["num_held_out"], protocol["data"]["num_train"]) == (12, 108)
    assert [each["dimensions"] for each in protocol["features"]["sets"]] == [16, 32, 64, 80]
    head = load_head(a_vit / "eval" / "linear_probe_dinov2.head")
    assert head.features == {name: protocol["choice"][name] for name in ("layer", "pooling")}


def test_the_grid_s_scores_are_those_of_the_saved_heads_on_the_held_out_images(a_vit: Path):
    protocol = call(f"ckpt={a_vit}", "protocol=dinov2", *SHORT, "head.lr=[0.05]", "held_out=0.3")["protocol"]
    tensors = load_file(last_checkpoint(probe_of(a_vit, "dinov2")) / "method.safetensors")
    words = [f"ckpt={a_vit}", "layers=[last,last_4]", "pooling=[token,token_patches]", *QUICK]
    judged = read_features(composed(*words), command="eval.linear_probe")
    _, rows = split_held_out(judged.splits.train.labels, 0.3, 0)
    read = judged.read("train", judged.subject.sets)
    for number, (row, each) in enumerate(zip(protocol["grid"], read)):
        logits = each.features[rows] @ tensors[f"heads.{number}.weight"].T + tensors[f"heads.{number}.bias"]
        label = each.labels[rows]
        assert row["held_out_top1"] == pytest.approx((logits.argmax(1) == label).double().mean().item())
        assert row["held_out_loss"] == pytest.approx(functional.cross_entropy(logits, label).item(), rel=1e-5)


def test_a_convnet_under_dinov2_is_read_at_its_pooled_last_stage_and_the_note_says_so(a_run: Path):
    protocol = call(f"ckpt={a_run}", "protocol=dinov2", *SHORT, *TWO_RATES)["protocol"]
    assert [(row["layer"], row["pooling"]) for row in protocol["grid"]] == [("last", "model")] * 2
    assert "ResNet has no tokens as protocol=dinov2 reads" in protocol["notes"][0]
    with pytest.raises(ValueError, match="pooling=patches needs a vision transformer"):
        call(f"ckpt={a_run}", "protocol=dinov2", *SHORT, "pooling=[patches]")


class Colours(Embedded):
    """Images of one colour and noise, which an untrained network can tell apart."""

    def read(self, index: int) -> np.ndarray:
        colour = np.random.default_rng(int(self.labels[index])).integers(40, 215, 3)
        noise = np.random.default_rng(1000 + index).integers(-20, 20, (32, 32, 3))
        return (colour + noise).astype(np.uint8)


def test_a_probe_learns_and_an_untrained_backbone_leaves_no_head(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ["ckpt=random", "model=resnet10", "model.args.channels=[8,8,16,64]", "head.batchnorm=true"]
    images = ["data=embedded", "data.source.num_train=240", "data.source.num_test=120"]
    source = "data.source._target_=tests.test_published_probe.Colours"
    length = ["trainer.epochs=8", "trainer.global_batch_size=24"]
    result = call(*model, *images, source, "protocol=simclr", *length)
    assert result["metrics"]["top1"] > 0.6  # chance: 1 in 12
    assert list(tmp_path.rglob("linear_probe_simclr.json"))
    assert not list(tmp_path.rglob("*.head"))


def test_a_batch_of_more_images_than_there_are_is_taken_down_and_the_rate_follows(a_run: Path):
    protocol = call(f"ckpt={a_run}", "protocol=mae", "trainer.epochs=11")["protocol"]
    assert protocol["global_batch_size"] == 120
    assert protocol["choice"]["lr"] == pytest.approx(0.1 * 120 / 256)
    assert protocol["departures"]["trainer.global_batch_size"] == [16384, 120]
    assert any("the batch is 120 images instead of 16,384" in note for note in protocol["notes"])


class Watched(Embedded):
    """Embedded images that write down which of them were read."""

    reads: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, split: str, **settings) -> None:
        super().__init__(split, **settings)
        self.split = split

    def read(self, index: int):
        self.reads.append((self.split, index))
        return super().read(index)


def test_no_test_image_is_opened_before_the_choice_is_made(a_vit: Path, monkeypatch):
    monkeypatch.setattr(Watched, "reads", [])
    source = "data.source._target_=tests.test_published_probe.Watched"
    images = ["data=embedded", "data.source.num_train=60", "data.source.num_test=24", source]
    call(f"ckpt={a_vit}", *images, "protocol=dinov2", *SHORT, *TWO_RATES)
    splits = [split for split, _ in Watched.reads]
    first = splits.index("test")
    assert splits[first:].count("train") <= 8  # the checksum of the set, in the protocol
    assert {index for split, index in Watched.reads[first:] if split == "test"} == set(range(24))


def test_a_probe_is_continued_however_its_checkpoint_is_spelled(a_run: Path, monkeypatch):
    words = ["protocol=simclr", *SHORT]
    before = call(f"ckpt={a_run}", *words)
    monkeypatch.chdir(a_run.parent)
    again = call("ckpt=run/checkpoints/step_00000012", *words, "batch_size=7")
    assert again["metrics"] == before["metrics"]
    with pytest.raises(ValueError, match=r"another recipe:\n  optim.base_lr: 0.1 -> 0.2"):
        call("ckpt=run", *words, "optim.base_lr=0.2")


def test_other_features_than_the_protocol_s_have_a_name_of_their_own(a_vit: Path):
    protocol = call(f"ckpt={a_vit}", "protocol=mae", *SHORT, "pooling=patches")["protocol"]
    assert protocol["departures"]["pooling"] == ["token", "patches"]
    assert protocol["pooling"] == "patches"
    assert (a_vit / "eval" / "linear_probe_mae_patches.json").is_file()
    assert load_head(a_vit / "eval" / "linear_probe_mae_patches.head").features["pooling"] == "patches"


def test_another_backbone_is_not_judged_by_heads_that_are_there(a_run: Path):
    call(f"ckpt={a_run}", "protocol=simclr", *SHORT)
    write_run(a_run, seed=1, step=24)
    with pytest.raises(ValueError, match="holds heads on another backbone"):
        call(f"ckpt={a_run}", "protocol=simclr", *SHORT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protocol=mae", "lr=[0.1]"], "lr has no effect with protocol=mae"),
        (["protocol=simclr", "train_amount=10%"], "train_amount has no effect with protocol=simclr"),
        (["protocol=dinov2", "solver=lbfgs"], "solver has no effect with protocol=dinov2"),
        (["protocol=mae", "held_out=0.2"], "one head, and nothing to choose"),
        (["protocol=mae", "trainer.device=cpu"], "trainer.device has no effect on a linear probe: give device="),
        (["protocol=mae", "trainer.ema_decay=0.9"], "the weights of the last step are reported"),
        (["protocol=mae", "optim.layer_decay=0.7"], "the backbone is frozen"),
        (["protocol=simclr", "head.batchnorm_eps=1e-3"], "no effect without head.batchnorm=true"),
        (["protocol=dinov2", "trainer.clip_grad_norm=1"], "clip all heads by their joint gradient"),
        (["protocol=dinov2", "head.lr=[0.1,0]"], "head.lr must be above"),
        (["protocol=mae", "augment=simclr"], "one view of an image, augment gives 2"),
        (["trainer.epochs=3"], r"trainer.epochs.* has no effect with protocol=cached"),
        (
            ["head.batchnorm=true", "+augment=probe"],
            r"head.batchnorm, augment.views.* has no effect with protocol=cached",
        ),
    ],
)
def test_settings_that_a_protocol_does_not_read_are_refused(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        call("ckpt=nowhere", *words)


def test_raw_pixels_have_no_backbone_to_train_on():
    with pytest.raises(ValueError, match="ckpt=pixels has none: protocol=cached"):
        call("ckpt=pixels", "protocol=simclr", "data=embedded", "data.source.num_train=24", "data.source.num_test=12")


def _probe(words: list[str]) -> dict:
    return call(*words)["protocol"]


def test_two_ranks_train_the_heads_of_one(two_ranks, a_run: Path):
    words = [f"ckpt={a_run}", "protocol=mae", *SHORT]
    alone = call(*words, "name=one")
    first, second = two_ranks.run(_probe, [*words, "name=two"])
    assert first["choice"] == second["choice"] == alone["protocol"]["choice"]
    ours, theirs = (load_file(a_run / "eval" / f"{name}.head" / "head.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)
