"""`python -m eval.look`: what is looked at, what is refused, what is written."""

from __future__ import annotations

import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eval import finetune
from eval.config import register
from eval.finetune import FinetuneConfig
from eval.head_file import save_head
from eval.look import activations, command, estimate, feature_map, filters, neighbours, pca_tokens, pretext, views
from eval.look.drawing import captioned, colour, overlay
from eval.look.inversion import invert
from eval.look.layer_places import choose_layer
from eval.look.result import DoesNotApply, Look, write_look
from eval.look.scene import Scene
from eval.look.shortcuts import divide
from eval.look.table import LOOKS, Entry
from ssl import checkpoint
from ssl.pretrain import make_method
from ssl.tensor_files import load_tensors
from tests.run_folder import write_images
from tests.scenes import EMBEDDED, SHORT, TINY_DECODER, TINY_RESNET, TINY_VIT, compose_config, look_config, pretrained
from tests.scenes import scene as make_scene

TILE = np.full((8, 8, 3), 200, np.uint8)


@pytest.fixture(scope="module")
def mae(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("mae") / "run", "mae", "trainer.ema_decay=0.5", "optim.base_lr=0.1")


@pytest.fixture(scope="module")
def simclr(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("simclr") / "run", "simclr")


def tiny(scene: Scene) -> Look:
    """A look of one number and one picture."""
    return Look({"": TILE}, {"images": scene.shown().names}, metrics={"size": float(scene.image_size[0])})


@pytest.fixture
def tiny_look(monkeypatch) -> None:
    """`what=tiny` as a look of its own."""
    module = types.ModuleType("eval.look.tiny")
    module.look = tiny  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "eval.look.tiny", module)
    monkeypatch.setitem(LOOKS, "tiny", Entry("tiny", "one picture", ("num_images", "split", "sample")))


# ---- the scene -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_the_untrained_backbone_is_the_one_that_the_run_started_from(method, request):
    backbone = [*TINY_VIT, *TINY_DECODER] if method == "mae" else TINY_RESNET
    config = compose_config("pretrain", [f"method={method}", *backbone, *EMBEDDED, *SHORT])
    scene = make_scene(request.getfixturevalue(method))
    torch.manual_seed(0)
    start, _ = make_method(config, scene.image_size)
    found = scene.untrained().state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in start.backbone.state_dict().items())


def test_the_trained_backbone_is_another_than_the_untrained_one(simclr):
    scene = make_scene(simclr)
    before = dict(scene.untrained().named_parameters())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in scene.backbone.named_parameters())


def test_the_method_has_the_averaged_weights_that_evaluations_judge(mae):
    scene = make_scene(mae)
    average = load_tensors(scene.loaded.path / "ema.safetensors")
    last = load_tensors(scene.loaded.path / "model.safetensors")
    found = scene.method().state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in average.items())
    assert any(not torch.equal(tensor, found[f"backbone.{name}"]) for name, tensor in last.items())


def test_the_methods_backbone_is_the_scenes_backbone(mae):
    scene = make_scene(mae)
    image = scene.shown().image
    with torch.no_grad():
        assert torch.equal(scene.method().backbone(image), scene.backbone(image))


def test_features_are_those_of_the_backbone_on_the_shown_images(simclr):
    scene = make_scene(simclr, "views", "split=test", "sample=24")
    features = scene.features()
    shown = make_scene(simclr, "views", "split=test", "indices=[3,20]").shown()
    with torch.no_grad():
        expected = scene.backbone(shown.image)  # (2, D)
    place = [int(np.flatnonzero(features.index == index)[0]) for index in shown.index]
    torch.testing.assert_close(features.features[place], expected, atol=1e-5, rtol=1e-4)
    assert [features.names[each] for each in place] == shown.names
    assert (features.labels[place] == shown.labels).all()


def test_the_random_numbers_of_others_are_left_alone(simclr):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    scene = make_scene(simclr)
    scene.untrained(), scene.features(), make_scene("random", "views", "model=resnet10").backbone
    assert torch.equal(torch.rand(3), expected)


def test_an_export_has_no_method_and_says_what_has(simclr, tmp_path):
    folder = checkpoint.export(checkpoint.load_backbone(simclr), tmp_path / "export")
    with pytest.raises(DoesNotApply, match="give the folder of the pretraining run"):
        make_scene(folder, "views", "data=embedded").method()


def test_a_head_of_other_weights_is_left_out_and_named(simclr, tmp_path):
    run = Path(shutil.copytree(simclr, tmp_path / "run"))
    loaded = checkpoint.load_backbone(run)
    head = {"weight": torch.randn(3, 16), "bias": torch.zeros(3), "classes": ["a", "b", "c"], "features": {}}
    head |= {"checkpoint": loaded.path, "image_size": loaded.spec.image_size}
    save_head(run / "eval" / "linear_probe.head", sha256="0" * 64, **head)
    scene = make_scene(run)
    assert scene.classifier() is None
    assert any("other weights" in note for note in scene.notes)
    save_head(run / "eval" / "linear_probe.head", sha256=loaded.hash, **head)
    scene = make_scene(run)
    found, image = scene.classifier(), scene.shown().image
    expected = scene.backbone(image) @ head["weight"].T
    torch.testing.assert_close(found.model(image), expected, atol=1e-5, rtol=1e-4)


def with_two_heads(run: Path, folder: Path) -> Path:
    run = Path(shutil.copytree(run, folder))
    loaded = checkpoint.load_backbone(run)
    for name in ("first", "second"):
        save_head(
            run / "eval" / f"{name}.head",
            sha256=loaded.hash,
            checkpoint=loaded.path,
            image_size=loaded.spec.image_size,
            weight=torch.randn(3, 16),
            bias=torch.zeros(3),
            classes=["a", "b", "c"],
            features={},
        )
    return run


def test_heads_to_choose_from_are_told_before_the_first_look(simclr, tmp_path, tiny_look, monkeypatch, capsys):
    run = with_two_heads(simclr, tmp_path / "run")
    with pytest.raises(ValueError, match="2 probed heads; give one"):
        command.run(look_config(run, "[tiny,saliency]"))
    assert not (run / "look" / "tiny.json").exists()
    for name in set(LOOKS) - {"tiny", "saliency"}:
        monkeypatch.delitem(LOOKS, name)
    command.run(look_config(run, "all"))
    told = capsys.readouterr().out
    assert told.index("saliency will be left out: ") < told.index("saliency: left out: ")
    assert "2 probed heads" in told
    assert (run / "look" / "tiny.json").exists()


def test_what_needs_no_classifier_is_made_beside_two_heads(simclr, tmp_path):
    run = with_two_heads(simclr, tmp_path / "run")
    words = ["saliency.target=contrast", "saliency.methods=[gradient]", "num_images=2"]
    command.run(look_config(run, "saliency", *words))
    assert (run / "look" / "saliency.png").exists()


def test_the_heads_of_a_method_do_not_apply_to_images_of_another_size(mae):
    with pytest.raises(DoesNotApply, match=r"data\.image_size has no effect"):
        make_scene(mae, "views", "data.image_size=48").method()


def test_random_weights_beside_a_run_are_of_its_seed_also_where_that_is_0(simclr):
    made = []
    for seed in (0, 5):
        scene = make_scene(simclr, "views", f"seed={seed}")
        scene.loaded = replace(scene.loaded, config={"seed": 0})  # as of a fine-tuned run, without a method
        made.append(dict(scene.untrained().named_parameters()))
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


def test_pooling_has_an_effect_on_all_looks_that_read_features():
    reading = {"neighbours", "map", "clusters", "outliers", "duplicates", "saliency", "guided_backprop", "occlusion"}
    reading |= {"gradcam", "gradient_ascent", "inversion"}
    assert {name for name, entry in LOOKS.items() if "pooling" in entry.reads} >= reading


def test_images_without_a_test_split_are_looked_at_in_train(simclr, tmp_path):
    write_images(tmp_path / "photos", "all", each=5)
    scene = make_scene(simclr, "views", "data=folder", f"data.root={tmp_path / 'photos'}")
    assert scene.split == "train"
    assert len(scene.shown()) == 4


def test_images_of_a_person_are_shown_in_their_order(simclr, tmp_path):
    write_images(tmp_path, "a", "b", each=1)
    shown = make_scene(simclr, "views", f"images=[{tmp_path}/b/0.png,{tmp_path}/a/0.png]").shown()
    assert shown.names == [f"{tmp_path}/b/0.png", f"{tmp_path}/a/0.png"]
    assert shown.truth(0) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["indices=[99]"], "must lie in 0..23"),
        (["split=val"], "split must be one of train, test"),
        (["num_images=0"], "num_images must be at least 1"),
        (["indices=[1]", "images=a.png"], "give one"),
    ],
)
def test_a_wrong_choice_of_images_is_refused_in_words(simclr, words, message):
    with pytest.raises(ValueError, match=message):
        make_scene(simclr, "views", *words).shown()


def test_a_broken_image_of_a_person_is_named(simclr, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 not really")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        make_scene(simclr, "views", f"images={tmp_path}/broken.jpg").shown()


# ---- what a run started from ----------------------------------------------------------------------------------------


def finetuned(out: Path, *words: str) -> Path:
    """A fine-tuning run of one step; its learning rate is so small that no weight of its backbone moves."""
    register(FinetuneConfig)
    few = ["data=embedded", "data.source.num_train=32", "data.source.num_test=12", "trainer.steps=1"]
    still = ["optim.base_lr=1e-30", "optim.layer_decay=null", "schedule.warmup_epochs=0"]
    plain = ["trainer.global_batch_size=16", "trainer.device=cpu", "trainer.precision=fp32", "loader.threads=1"]
    quiet = ["wandb.mode=disabled", "trainer.pictures=false", "launch=none"]
    finetune.run(compose_config("finetune", [*few, *plain, *quiet, *still, *words]), out=out)
    return out


@pytest.fixture(scope="module")
def tuned(simclr, tmp_path_factory) -> Path:
    return finetuned(tmp_path_factory.mktemp("tuned") / "run", f"ckpt={simclr}", "recipe=simclr")


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    other = dict(two.named_parameters())
    return all(torch.allclose(tensor, other[name], rtol=0, atol=1e-20) for name, tensor in one.named_parameters())


def test_what_a_fine_tuned_run_started_from_is_the_backbone_that_it_tuned(simclr, tuned):
    scene = make_scene(tuned)
    assert scene.untrained_title == "before fine-tuning"
    assert same_weights(scene.untrained(), make_scene(simclr).backbone)
    assert "fine-tuning turned them by 0.00" in " ".join(filters.look(scene).lines)


def test_looks_call_the_weights_before_fine_tuning_by_that_name(tuned, monkeypatch):
    shown = []
    monkeypatch.setattr(pca_tokens, "captioned", lambda *_, captions, **__: shown.extend(captions) or TILE)
    monkeypatch.setattr(neighbours, "captioned", lambda *_, row_titles, **__: shown.append(row_titles) or TILE)
    scene = make_scene(tuned, "[neighbours,map,pca_tokens]", "map.projections=[pca]", "pca_tokens.layer=0")
    lines = [*neighbours.look(scene).lines, *feature_map.look(scene).lines]
    pca_tokens.look(scene)
    assert sum("before fine-tuning" in line for line in lines) == 2
    assert sum("before fine-tuning" in texts for texts in shown) == 1 + 4  # rows of neighbours, images of tokens
    assert not any("untrained" in line for line in lines)


@pytest.mark.parametrize("words", [[*TINY_RESNET, "recipe=simclr", "model.init=kaiming_normal"], [*TINY_VIT]])
def test_what_fine_tuning_from_random_weights_started_from_are_those_weights(words, tmp_path):
    pooling = [] if "recipe=simclr" in words else ["pooling=avg", "drop_path=0.1"]
    run = finetuned(tmp_path / "run", "ckpt=random", "seed=3", *words, *pooling)
    scene = make_scene(run)
    assert scene.untrained_title == "before training"
    assert same_weights(scene.untrained(), scene.backbone)


def test_a_start_that_is_gone_is_random_weights_and_nothing_is_said_of_a_change(simclr, tmp_path):
    run = Path(shutil.copytree(simclr, tmp_path / "run"))
    tuned = finetuned(run / "finetune" / "own" / "seed0", f"ckpt={run}", "recipe=simclr")
    moved = Path(shutil.move(run, tmp_path / "moved"))
    assert make_scene(moved / "finetune" / "own" / "seed0").untrained_title == "before fine-tuning"  # the run above
    alone = Path(shutil.move(moved / tuned.relative_to(run), tmp_path / "alone"))
    scene = make_scene(alone)
    found = filters.look(scene)
    assert scene.untrained_title == "random weights"
    assert any("compared with random weights" in note for note in scene.notes)
    assert "mean_change" not in found.metrics
    assert "turned" not in " ".join(found.lines)


def test_the_classifier_is_of_the_step_that_is_looked_at_though_the_run_goes_on(tuned, tmp_path):
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    scene, removed = make_scene(run), make_scene(run)
    step = scene.loaded.path
    shutil.copytree(step, step.with_name("step_00000009"))
    assert scene.classifier().title == str(step)
    shutil.rmtree(step)
    with pytest.raises(ValueError, match=f"{step.name} was removed while .* run the command again"):
        removed.classifier()


def test_a_method_whose_step_was_removed_asks_for_the_command_again(simclr, tmp_path):
    run = Path(shutil.copytree(simclr, tmp_path / "run"))
    scene = make_scene(run)
    shutil.rmtree(scene.loaded.path)
    with pytest.raises(ValueError, match="run the command again"):
        scene.method()


# ---- images that are not there, and time ---------------------------------------------------------------------------


def test_filters_need_no_images_and_are_judged_by_their_norm_then(simclr, tmp_path):
    folder = checkpoint.export(checkpoint.load_backbone(simclr), tmp_path / "export")
    scene = make_scene(folder, "filters")
    found = filters.look(scene)
    assert found.data["num_images"] == 0
    norm = scene.backbone.conv1.weight.flatten(1).norm(dim=1)
    assert found.metrics["dead_filters"] == int((norm <= 1e-3 * norm.median()).sum())
    assert "without images: " in " ".join(found.lines)
    with pytest.raises(ValueError, match="images=FILE"):
        scene.shown()
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        filters.look(make_scene(folder, "filters", f"images={tmp_path}/gone.png"))


def test_the_time_of_features_is_told_once_while_they_are_made(simclr, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "SOON", 0.0)
    monkeypatch.setattr(estimate, "LONG", -1.0)
    scene = make_scene(simclr, "map", "split=test", "batch_size=4")
    scene.features()
    scene.features()
    assert capsys.readouterr().out.count("features of 24 images of") == 1


def test_the_time_of_views_activations_and_probes_is_told_too(simclr, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "SOON", 0.0)
    monkeypatch.setattr(estimate, "LONG", -1.0)
    scene = make_scene(simclr, "[views,activations,pretext]", "batch_size=4", "sample=24")
    views.look(scene)
    activations.look(scene)
    pretext.look(scene)
    told = capsys.readouterr().out
    for what in ("views of 4 images", "activations of 24 images", "features of 96 patches", "a linear probe of 96"):
        assert what in told


def test_what_is_too_small_to_be_looked_at_does_not_apply_and_does_not_stop_the_others():
    with pytest.raises(DoesNotApply, match="needs 20 images or more, got 12"):
        divide(np.arange(12))
    with pytest.raises(DoesNotApply, match="no layer whose values have places"):
        choose_layer({}, None, model=nn.Flatten(), key="layer")
    settings = {"mean": [0.5], "std": [0.5], "steps": 1, "step_size": 0.1, "tv_weight": 0.0, "alpha_weight": 0.0}
    with pytest.raises(DoesNotApply, match="nothing but zeros"):
        invert(torch.zeros_like, torch.ones(1, 1, 4, 4), **settings)


def test_an_estimate_is_the_time_of_a_part_times_the_parts(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 4.0, 8.0])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    told = estimate.Estimate("a thing", 10)
    for done in (1, 2, 4):
        told.at(done)
    assert capsys.readouterr().out == "a thing: about 20 s\n"


# ---- the command ---------------------------------------------------------------------------------------------------


def test_a_look_is_written_beside_the_run_with_what_made_it(simclr, tmp_path, tiny_look, capsys):
    run = Path(shutil.copytree(simclr, tmp_path / "run"))
    result = command.run(look_config(run, "tiny"))
    found = json.loads((run / "look" / "tiny.json").read_text())
    assert result["metrics"] == {"tiny.size": 32.0}
    assert found["files"] == ["tiny.png"]
    assert found["checkpoint"]["step"] == 2
    assert len(found["data"]["images"]) == 4
    assert f"written: {run / 'look' / 'tiny.png'}" in capsys.readouterr().out


def test_a_name_that_is_no_look_is_refused_with_the_list(simclr):
    with pytest.raises(ValueError, match="occlusion"):
        command.run(look_config(simclr, "oclusion"))


def test_what_all_leaves_out_what_does_not_apply_and_says_so(simclr, tmp_path, tiny_look, monkeypatch, capsys):
    def refuses(scene: Scene) -> Look:
        raise DoesNotApply("nothing to show")

    for name in set(LOOKS) - {"tiny", "views"}:
        monkeypatch.delitem(LOOKS, name)
    module = types.ModuleType("eval.look.views")
    module.look = refuses  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "eval.look.views", module)
    command.run(look_config(simclr, "all", f"out={tmp_path}"))
    assert "views: left out: nothing to show" in capsys.readouterr().out
    assert (tmp_path / "tiny.json").exists()
    with pytest.raises(DoesNotApply):
        command.run(look_config(simclr, "views", f"out={tmp_path}"))


def fails(error: Exception) -> types.ModuleType:
    def look(scene: Scene) -> Look:
        raise error

    module = types.ModuleType("eval.look.views")
    module.look = look  # pyright: ignore[reportAttributeAccessIssue]
    return module


@pytest.mark.parametrize("error", [ValueError("too small"), OSError("too small")])
@pytest.mark.parametrize("what", ["all", "[views,tiny]"])
def test_a_look_that_fails_is_named_at_the_end_and_the_others_are_made(
    what, error, simclr, tmp_path, tiny_look, monkeypatch, capsys
):
    for name in set(LOOKS) - {"tiny", "views"}:
        monkeypatch.delitem(LOOKS, name)
    monkeypatch.setitem(sys.modules, "eval.look.views", fails(error))
    with pytest.raises(ValueError, match=r"1 of 2 looks failed(.|\n)*views: too small"):
        command.run(look_config(simclr, what, f"out={tmp_path}"))
    assert "views: failed: too small" in capsys.readouterr().out
    assert (tmp_path / "tiny.json").exists()


def test_of_a_list_what_does_not_apply_is_an_error_after_the_others_were_made(simclr, tmp_path, tiny_look, monkeypatch):
    monkeypatch.setitem(sys.modules, "eval.look.views", fails(DoesNotApply("nothing to show")))
    with pytest.raises(ValueError, match="views: nothing to show"):
        command.run(look_config(simclr, "[views,tiny]", f"out={tmp_path}"))
    assert (tmp_path / "tiny.json").exists()


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_look(simclr, tmp_path, tiny_look, monkeypatch):
    made = []
    monkeypatch.setattr(sys.modules["eval.look.tiny"], "look", lambda scene: made.append(1) or Look({}, {}))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="give another out="):
        command.run(look_config(simclr, "tiny", f"out={tmp_path / 'file' / 'below'}"))
    assert not made


def test_the_precision_is_a_setting_of_looks_at_features_alone(simclr, tmp_path):
    with pytest.raises(ValueError, match="precision= has no effect on filters"):
        command.run(look_config(simclr, "filters", "precision=bf16"))
    command.run(look_config(simclr, "[filters,outliers]", "precision=bf16", f"out={tmp_path}"))
    found = {name: json.loads((tmp_path / f"{name}.json").read_text())["settings"] for name in ("filters", "outliers")}
    assert "precision" not in found["filters"]
    assert found["outliers"]["precision"] == "bf16"


@pytest.mark.parametrize("word", ["images=a.png", "indices=[1]"])
def test_a_number_of_images_beside_named_images_is_refused(simclr, word):
    with pytest.raises(ValueError, match="num_images= has no effect beside"):
        make_scene(simclr, "filters", word, "num_images=5")


def test_a_split_beside_named_images_is_refused_where_nothing_else_reads_it(simclr, tmp_path):
    write_images(tmp_path, "a", each=2)
    words = [f"images={tmp_path}/a/0.png", "split=test"]
    with pytest.raises(ValueError, match="split= has no effect beside images="):
        command.run(look_config(simclr, "filters", *words, f"out={tmp_path}"))
    command.run(look_config(simclr, "neighbours", *words, f"out={tmp_path}"))


def test_a_setting_of_a_look_that_is_not_made_is_refused(simclr):
    with pytest.raises(ValueError, match=r"occlusion\.window has no effect without what=occlusion"):
        command.run(look_config(simclr, "filters", "occlusion.window=7"))


@pytest.mark.parametrize(
    ("what", "word"), [("map", "indices=[1]"), ("duplicates", "split=test"), ("filters", "sample=9")]
)
def test_a_shared_setting_that_the_look_does_not_read_is_refused(simclr, what, word):
    key = word.split("=")[0]
    config = look_config(simclr, what, word)
    with pytest.raises(ValueError, match=f"{key}= has no effect on {what}"):
        command.run(config)


# ---- files and drawings --------------------------------------------------------------------------------------------


def test_files_of_an_earlier_look_do_not_stay_beside_the_new_ones(tmp_path):
    (tmp_path / "map_of_mine.png").write_bytes(b"a person's")
    write_look(Look({"pca": TILE, "tsne": TILE}, {}), tmp_path, "map", about={})
    write_look(Look({"pca": TILE}, {}), tmp_path, "map", about={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.json", "map_of_mine.png", "map_pca.png"]


def test_numbers_that_are_not_finite_are_null_and_numpys_are_plain(tmp_path):
    data = {"score": float("nan"), "count": np.int64(3), "rows": np.eye(2), 4: [float("inf")]}
    write_look(Look({}, data), tmp_path, "made", about={})
    found = json.loads((tmp_path / "made.json").read_text())["data"]
    assert found == {"score": None, "count": 3, "rows": [[1.0, 0.0], [0.0, 1.0]], "4": [None]}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="give another out="):
        write_look(Look({}, {}), tmp_path / "file", "made", about={})


def test_tiles_keep_their_pixels_and_captions_grow_the_picture():
    tiles = [np.random.default_rng(number).integers(0, 255, (100, 120, 3), np.uint8) for number in range(2)]
    plain = captioned([tiles])
    told = captioned([tiles], captions=[["one", "a longer caption that needs several lines of text"]], title="two")
    assert plain.shape[0] < told.shape[0]
    for tile in tiles:
        assert any(
            (plain[y : y + 100, x : x + 120] == tile).all()
            for y in range(plain.shape[0] - 99)
            for x in range(plain.shape[1] - 119)
        )


def test_a_map_is_coloured_between_its_bounds_and_zero_is_white_between_signs():
    ends = colour(np.array([[-1.0, 0.0, 1.0]]), symmetric=True)
    assert ends[0, 1].min() > 240
    assert ends[0, 0, 2] > ends[0, 0, 0]  # blue below 0
    assert ends[0, 2, 0] > ends[0, 2, 2]  # red above
    assert (colour(np.zeros((2, 2))) == colour(np.zeros((2, 2)))[0, 0]).all()


def test_an_overlay_has_the_images_size_and_shows_its_heat_where_it_is():
    heat = np.zeros((2, 2))
    heat[0, 0] = 1
    shown = overlay(np.zeros((32, 48, 3), np.uint8), heat, smooth=False)
    assert shown.shape == (32, 48, 3)
    assert (shown[:16, :24] == shown[0, 0]).all()
    assert not (shown[20, 30] == shown[0, 0]).all()
