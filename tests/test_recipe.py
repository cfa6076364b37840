from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from torch import nn

from ssl.config import plain
from ssl.models.backbones import build_backbone
from ssl.models.classifier import make_classifier
from ssl.optim import make_optimizer, parameter_groups
from ssl.pretrain import run
from ssl.recipe import active_parts, batch_arithmetic, effective_recipe, lr_arithmetic, parts_line, recipe_table
from ssl.schedules import make_schedule
from tests.test_finetune import config_of
from tests.test_pretrain import METHODS, SHORT, composed


def test_batch_arithmetic_reads_as_a_product():
    batches = batch_arithmetic(4096, world_size=8, device_batch_size=128)
    assert (batches.device_batch_size, batches.accumulation) == (128, 4)
    assert str(batches) == "global batch 4096 = 8 ranks x 128 images x 4 accumulation steps"
    assert str(batch_arithmetic(1, world_size=1)) == "global batch 1 = 1 rank x 1 image x 1 accumulation step"


def test_device_batch_is_the_share_unless_given_and_never_more():
    assert batch_arithmetic(256, world_size=2).device_batch_size == 128
    assert batch_arithmetic(256, world_size=4, device_batch_size=100000).device_batch_size == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 100, "world_size": 8}, "multiple of 8, such as 96 or 104"),
        ({"global_batch_size": 3, "world_size": 8}, "multiple of 8, such as 8"),
        ({"global_batch_size": 24, "world_size": 2, "device_batch_size": 5}, "12 images .*it may be 1, 2, 3, 4, 6, 12"),
        ({"global_batch_size": 0, "world_size": 1}, "at least 1, got 0"),
        ({"global_batch_size": 8, "world_size": 1, "device_batch_size": 0}, "at least 1, or null"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_what_would(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_arithmetic(arguments.pop("global_batch_size"), **arguments)


def test_lr_line_is_the_arithmetic():
    line = lr_arithmetic(1.5e-4, global_batch_size=4096, scaling="linear")
    assert line == "lr 2.4e-3 = base_lr 1.5e-4 x 4096 / 256 (linear)"
    assert lr_arithmetic(0.075, global_batch_size=4096, scaling="sqrt") == "lr 4.8 = base_lr 0.075 x sqrt(4096) (sqrt)"
    assert lr_arithmetic(0.5, global_batch_size=8, scaling="none") == "lr 0.5 = base_lr 0.5 (not scaled with the batch)"


class Finetuning(nn.Module):
    def __init__(self, drop_path: float = 0.0):
        super().__init__()
        self.backbone = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=3,
            num_heads=2,
            num_classes=0,
            drop_path_rate=drop_path,
        )
        self.head = nn.Linear(24, 10)


def rows_of(method, name="adamw", layer_decay=None):
    groups = parameter_groups(method, weight_decay=0.05, layer_decay=layer_decay)
    return effective_recipe(make_optimizer(groups, name=name, lr=1e-3), method, lr=1e-3)


def test_rows_count_every_parameter_once_and_survive_json():
    method = Finetuning(0.1)
    rows = rows_of(method, layer_decay=0.5)
    assert sum(row["parameters"] for row in rows) == sum(parameter.numel() for parameter in method.parameters())
    assert sum(row["tensors"] for row in rows) == len(list(method.parameters()))
    assert json.loads(json.dumps(rows)) == rows


def test_rows_tell_the_actual_rate_decay_and_drop_path_of_each_layer():
    rows = {(row["layer"], row["weight_decay"]): row for row in rows_of(Finetuning(0.1), layer_decay=0.5)}
    assert rows[4, 0.05]["parts"] == ["head"]
    assert rows[4, 0.05]["lr"] == pytest.approx(1e-3)
    assert rows[3, 0.05]["lr"] == pytest.approx(5e-4)
    assert rows[3, 0.05]["drop_path"] == pytest.approx([0.1, 0.1])
    assert rows[2, 0.0]["drop_path"] == pytest.approx([0.05, 0.05])
    assert rows[1, 0.0]["drop_path"] is None  # timm's first block drops nothing
    assert rows[4, 0.0]["drop_path"] is None


def test_table_shows_a_line_per_group_and_only_columns_that_say_something():
    plain = recipe_table(rows_of(Finetuning())).splitlines()
    assert len(plain) == 3
    assert "layer factor" not in plain[0]
    assert "drop path" not in plain[0]
    full = recipe_table(rows_of(Finetuning(0.1), layer_decay=0.5))
    assert "layer factor" in full
    assert "0.05" in full
    lars = recipe_table(rows_of(Finetuning(), name="lars")).splitlines()
    assert "trust ratio" in lars[0]
    assert [("yes" in line, " no" in line) for line in lars[1:]] == [(True, False), (False, True)]
    assert len({len(line) for line in full.splitlines()}) == 1


def test_dropout_is_told_for_the_groups_that_it_is_in_or_around():
    method = Finetuning()
    method.backbone.blocks[1].mlp.drop1 = nn.Dropout(0.2)
    rows = {(row["layer"], row["weight_decay"]): row for row in rows_of(method, layer_decay=0.5)}
    assert rows[2, 0.05]["dropout"] == [0.2, 0.2]
    assert rows[1, 0.05]["dropout"] is None
    assert rows[4, 0.05]["dropout"] is None
    assert "dropout" in recipe_table(list(rows.values()))
    method.backbone.head_drop = nn.Dropout(0.5)  # directly in the backbone
    rows = {(row["layer"], row["weight_decay"]): row for row in rows_of(method, layer_decay=0.5)}
    assert rows[2, 0.05]["dropout"] == [0.2, 0.5]
    assert rows[1, 0.05]["dropout"] == [0.5, 0.5]
    assert rows[4, 0.05]["dropout"] is None


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("ghostnet_100", {"drop_rate": 0.3}),  # has no module for it
        ("torchvision/squeezenet1_1", {"dropout": 0.3}),  # in a classifier without parameters
        ("torchvision/alexnet", {"dropout": 0.3}),
        ("torchvision/googlenet", {"dropout": 0.3}),
    ],
)
def test_dropout_of_the_built_backbone_is_told_and_none_where_it_has_none(name: str, args: dict):
    for given, told in ((args, 0.3), ({}, None)):
        method = nn.ModuleDict({"backbone": build_backbone(name, image_size=(64, 64), model_args=given)[0]})
        parts = parts_of(composed("method=simclr", "model=resnet18", "optim=sgd"), "sgd", module=method)
        assert parts.get("dropout") == told
        spans = [row["dropout"] for row in rows_of(method)]
        assert any(span == [0.3, 0.3] for span in spans) == bool(told)
        assert all(span in (None, [0.3, 0.3]) for span in spans)


def parts_of(config, name: str, module: nn.Module | None = None, **options) -> dict:
    settings = plain(config)
    shape = dict(settings["schedule"])
    schedule = make_schedule(shape.pop("name"), steps_per_epoch=10, total_steps=100, **shape)
    groups = parameter_groups(nn.Linear(2, 2), weight_decay=0.1)
    optimizer = make_optimizer(groups, name=name, lr=0.4, **options)
    return active_parts(settings, module=module or nn.Linear(2, 2), optimizer=optimizer, schedule=schedule, lr=0.4)


def test_parts_name_what_acts_in_fine_tuning_with_its_values():
    words = ["recipe=mae", "dropout=0.3", "held_out=0.1", "patience=3", "trainer.ema_decay=0.99", "train_amount=10%"]
    config = config_of("ckpt=x", *words, "trainer.clip_grad_norm=1", "schedule.warmup_epochs=5")
    _, spec = build_backbone("ghostnet_100", image_size=(64, 64))
    classifier, _ = make_classifier(spec, num_classes=2, dropout=config.dropout)
    parts = parts_of(config, "adamw", module=classifier, betas=[0.9, 0.95])
    assert parts["optimizer"]["name"] == "adamw"
    assert parts["optimizer"]["betas"] == (0.9, 0.95)
    assert parts["optimizer"]["eps"] == 1e-8  # not set: what it has
    assert parts["schedule"] == {"name": "cosine", "total_steps": 100, "warmup_steps": 50, "min_factor": 5e-4}
    assert (parts["drop_path"], parts["dropout"], parts["label_smoothing"]) == (0.1, 0.3, 0.1)
    assert parts["mixing"]["name"] == "InputMixing"
    assert (parts["mixing"]["mixup"], parts["mixing"]["cutmix"]) == (0.8, 1.0)
    assert (parts["early_stopping"], parts["held_out"]) == ({"patience": 3}, 0.1)
    assert (parts["average"], parts["clip_grad_norm"]) == ({"ema_decay": 0.99}, 1.0)
    line = parts_line(parts)
    for told in (
        "adamw (betas 0.9 and 0.95,",
        "clip_grad_norm 1.0",
        "drop_path 0.1, dropout 0.3, label_smoothing 0.1",
        "InputMixing (mixup 0.8, cutmix 1.0",
        "policy rand-m9-mstd0.5-inc1, erase 0.25",
        "early_stopping (patience 3)",
        "at most 10 bad steps in a row",
    ):
        assert told in line, told


def test_parts_that_are_off_are_not_named():
    parts = parts_of(composed("method=simclr", "model=resnet18", "optim=sgd"), "sgd", momentum=0.9)
    assert parts.keys() == {"optimizer", "lr", "weight_decay", "schedule", "augment", "bad_steps"}
    assert parts_line(parts) == "with sgd (momentum 0.9), at most 10 bad steps in a row"


def test_a_run_writes_and_prints_the_parts_that_it_has(tmp_path: Path, capsys):
    words = [
        "model.init=kaiming_normal",
        "optim=lamb",
        "schedule.name=cosine_restarts",
        "schedule.restart_epochs=1",
        "trainer.swa_start_epoch=1",
        "trainer.spike_deviations=6",
    ]
    run(composed(*METHODS["simclr"], *SHORT, *words, "trainer.steps=4", "trainer.pictures=false"), out=tmp_path)
    written = json.loads((tmp_path / "recipe.json").read_text())
    parts = written["parts"]
    assert parts["optimizer"] == {"name": "lamb", "betas": [0.9, 0.999], "eps": 1e-6, "trust_clip": False}
    assert parts["schedule"]["restart_steps"] == 3
    assert parts["init"] == "kaiming_normal"
    assert parts["average"] == {"swa_start_epoch": 1.0, "swa_every_epochs": 1.0}
    assert parts["bad_steps"] == {"most_in_a_row": 10, "spike_deviations": 6.0}
    assert {row["trust_ratio"] for row in written["groups"]} == {True, False}
    printed = capsys.readouterr().out
    assert "with lamb (betas 0.9 and 0.999, eps 1e-06), init kaiming_normal" in printed
    assert "again from the peak at steps 4, 7, 10" in printed
