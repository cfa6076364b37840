"""`python -m eval.export`: a folder that timm loads by itself, with the outputs that we have."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import Tensor, nn

from eval import export, knn
from eval.config import register
from ssl import checkpoint
from ssl.config import CONF
from ssl.methods.base import Method
from ssl.models.backbones import build_backbone, pooled_features

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
VIT = ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, "auto")
CHANNELS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
RESNET = ("resnet18", CHANNELS, "standard")
SMALL_STEM = ("resnet18", CHANNELS, "small")
DEEP_SMALL_STEM = ("resnet18d", {**CHANNELS, "stem_width": 8}, "small")
CLASSES = ["cat", "dog", "owl"]
SECRET = "/srv/private_photos"


def make_run(folder: Path, model: tuple, *, classifier: dict | None = None, pooling: str | None = None) -> Path:
    """A run folder with one checkpoint; with `classifier` one of a fine-tuned model."""
    name, args, stem = model
    torch.manual_seed(0)
    extra = {"global_pool": pooling} if pooling else {}
    backbone, spec = build_backbone(name, image_size=(32, 32), stem=stem, model_args={**args, **extra})
    if classifier:
        backbone.reset_classifier(len(classifier["classes"]))
    for tensor in backbone.state_dict().values():  # fresh weights are 0 and 1 in too many places
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape) * 0.1)
    method = Method()
    method.backbone = backbone
    data = OmegaConf.load(f"{CONF}/data/embedded.yaml")
    data.source.num_train, data.source.num_test = 24, 12
    config = {
        "method": {"_target_": "ssl.methods.simclr.SimCLR", "temperature": 0.2},
        "data": data,
        "trainer": {"epochs": 60.0},
        "seed": 7,
        "out": SECRET,
    }
    checkpoint.save(
        folder,
        step=12,
        method=method,
        spec=spec,
        optimizer_tensors={},
        ema=None,
        config_yaml=OmegaConf.to_yaml(config),
        state={"epoch": 1.0, **({"classifier": classifier} if classifier else {})},
        mean=MEAN,
        std=STD,
    )
    return folder


def call(*overrides: str) -> dict:
    """What the command does with these words, in this process."""
    register(export.ExportConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return export.run(compose("export", overrides=list(overrides)))


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def load_from(folder: Path) -> nn.Module:
    """load.py of an export, imported as a person would."""
    spec = importlib.util.spec_from_file_location("load_of_export", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


@torch.no_grad()
def assert_outputs(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(model.eval()(images()), expected.eval()(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [VIT, RESNET], ids=["vit", "resnet"])
def test_timm_loads_an_export_both_ways_with_equal_features(tmp_path, model, capsys):
    run = make_run(tmp_path / "run", model)
    out = tmp_path / "export"
    result = call(f"ckpt={run}", f"out={out}")
    loaded = checkpoint.load_backbone(run)
    ours = export.Pooled(loaded.model)
    card = json.loads((out / "config.json").read_text())
    assert_outputs(timm.create_model(f"local-dir:{out}", pretrained=True), ours)
    args = {key: tuple(v) if isinstance(v, list) else v for key, v in card["model_args"].items()}
    weights = str(out / "model.safetensors")
    assert_outputs(timm.create_model(card["architecture"], checkpoint_path=weights, num_classes=0, **args), ours)
    assert set(result["differences"].values()) == {0.0}
    assert "written:" in capsys.readouterr().out
    again = checkpoint.load_backbone(out)
    assert (again.spec, again.mean, again.layout) == (loaded.spec, MEAN, "export")


@pytest.mark.parametrize("name", ["embedded", "a set of ours"])
def test_the_next_command_of_an_export_can_be_typed(tmp_path, name, monkeypatch, capsys):
    run = make_run(tmp_path / "run", RESNET)
    own = export.load_backbone

    def load(*args, **kwargs):
        found = own(*args, **kwargs)
        found.config["data"]["name"] = name
        return found

    monkeypatch.setattr(export, "load_backbone", load)
    call(f"ckpt={run}", f"out={tmp_path / 'export'}")
    said = capsys.readouterr().out.splitlines()[-1].removeprefix("next: python -m eval.knn ")
    few = ["data.source.num_train=24", "data.source.num_test=12", "device=cpu", "threads=1", f"out={tmp_path}"]
    register(knn.KnnConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        assert 0 <= knn.run(compose("knn", overrides=[*shlex.split(said), *few]))["metrics"]["top1"] <= 1


def test_an_export_loads_where_this_package_is_not(tmp_path):
    run = make_run(tmp_path / "run", VIT)
    out = tmp_path / "export"
    call(f"ckpt={run}", f"out={out}")
    torch.save(images(), tmp_path / "images.pt")
    code = (
        "import sys, timm, torch; "
        f"model = timm.create_model('local-dir:{out}', pretrained=True).eval(); "
        f"torch.save(model(torch.load('{tmp_path}/images.pt')).detach(), '{tmp_path}/features.pt'); "
        "assert not hasattr(sys.modules['ssl'], '__path__')"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path, env=env, timeout=120)
    with torch.no_grad():
        ours = pooled_features(checkpoint.load_backbone(run).model, images())
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), ours)


@pytest.mark.parametrize("model", [SMALL_STEM, DEEP_SMALL_STEM], ids=["one_layer", "deep"])
def test_a_small_stem_brings_what_loads_it_and_timm_refuses_the_rest(tmp_path, model):
    run = make_run(tmp_path / "run", model)
    out = tmp_path / "export"
    call(f"ckpt={run}", f"out={out}")
    assert_outputs(load_from(out), export.Pooled(checkpoint.load_backbone(run).model))
    assert "ssl" not in (out / "load.py").read_text()
    with pytest.raises(RuntimeError, match="Unknown model"):  # a deep stem would load and compute something else
        timm.create_model(f"local-dir:{out}", pretrained=True)
    assert "from load import load" in (out / "README.md").read_text()


def test_solo_learns_padded_stem_leaves_as_it_came(tmp_path):
    backbone, _ = build_backbone("resnet18", image_size=(32, 32), stem="padded", model_args=CHANNELS)
    named = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    torch.save({"state_dict": {**named, "classifier.weight": torch.zeros(2, 16)}}, tmp_path / "solo.ckpt")
    out = tmp_path / "export"
    call(
        f"ckpt={tmp_path}/solo.ckpt",
        f"out={out}",
        "model=resnet10",
        "model.args.channels=[8,8,16,16]",
    )
    assert_outputs(load_from(out), export.Pooled(backbone))
    assert_outputs(export.Pooled(checkpoint.load_backbone(out).model), export.Pooled(backbone))


@pytest.mark.parametrize(
    ("model", "pooling"), [(VIT, "token"), (VIT, "avg"), (RESNET, None), (SMALL_STEM, None)], ids=str
)
def test_a_fine_tuned_model_takes_its_classifier_and_its_labels_along(tmp_path, model, pooling):
    card = {"classes": CLASSES, "pooling": pooling, "multi_label": False}
    run = make_run(tmp_path / "run", model, classifier=card, pooling=pooling)
    out = tmp_path / "export"
    call(f"ckpt={run}", f"out={out}")
    loaded = checkpoint.load_backbone(run)
    ours = checkpoint.classifier_model(loaded)
    assert loaded.classifier is not None
    theirs = load_from(out) if model is SMALL_STEM else timm.create_model(f"local-dir:{out}", pretrained=True)
    assert theirs.eval()(images()).shape == (3, 3)
    assert_outputs(theirs, ours)
    with torch.no_grad():
        torch.testing.assert_close(pooled_features(loaded.model, images()), pooled_features(theirs, images()))
    config = json.loads((out / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (3, CLASSES)
    again = checkpoint.load_backbone(out)
    assert again.classifier is not None
    assert (again.classifier.classes, again.classifier.multi_label) == (CLASSES, False)
    assert_outputs(checkpoint.classifier_model(again), ours)


def test_timm_also_loads_the_checkpoint_of_a_fine_tuned_model(tmp_path):
    card = {"classes": CLASSES, "pooling": "avg", "multi_label": False}
    run = make_run(tmp_path / "run", VIT, classifier=card, pooling="avg")
    theirs = timm.create_model(f"local-dir:{run}/checkpoints/step_00000012", pretrained=True)
    assert_outputs(theirs, checkpoint.classifier_model(checkpoint.load_backbone(run)))
    assert list(theirs.pretrained_cfg["label_names"]) == CLASSES


def test_what_timm_computes_otherwise_is_not_written(tmp_path):
    run = make_run(tmp_path / "run", RESNET)
    loaded = checkpoint.load_backbone(run)
    folder = checkpoint.export(loaded, tmp_path / "export")
    assert set(export.compare(loaded, folder, images()).values()) == {0.0}
    with torch.no_grad():
        loaded.model.layer1[0].conv1.weight.mul_(1.001)
    with pytest.raises(ValueError, match=r"not written: loaded by timm.*computes something else"):
        export.compare(loaded, folder, images())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "resnet50"}))
    with pytest.raises(ValueError, match="cannot be loaded by timm"):
        export.compare(loaded, folder, images())


def test_a_refused_export_leaves_the_earlier_one_as_it_was(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", RESNET)
    out = tmp_path / "export"
    call(f"ckpt={run}", f"out={out}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="not written"):
        call(f"ckpt={run}", f"out={out}")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".partial")] == []


def test_exporting_again_replaces_its_own_files_and_keeps_results_beside_them(tmp_path):
    out = tmp_path / "export"
    call(f"ckpt={make_run(tmp_path / 'small', SMALL_STEM)}", f"out={out}")
    (out / "eval").mkdir()
    (out / "eval" / "knn.json").write_text("{}")
    run = make_run(tmp_path / "run", RESNET)
    call(f"ckpt={run}", f"out={out}")
    assert not (out / "load.py").exists()
    assert (out / "eval" / "knn.json").exists()
    assert_outputs(
        timm.create_model(f"local-dir:{out}", pretrained=True), export.Pooled(checkpoint.load_backbone(run).model)
    )


def test_the_card_tells_recipe_and_the_results_of_these_weights_without_private_paths(tmp_path):
    run = make_run(tmp_path / "run", VIT)
    digest = checkpoint.load_backbone(run).hash
    (run / "eval").mkdir()
    for name, sha256, top1 in (("knn", digest, 0.4321), ("knn_older", "0" * 64, 0.1234)):
        protocol = {
            "checkpoint": {"sha256": sha256, "path": SECRET},
            "data": {"name": "embedded", "root": SECRET, "num_test": 12},
            "metric": "cosine",
            "k": [20],
        }
        content = {"metrics": {"top1": top1}, "protocol": protocol}
        (run / "eval" / f"{name}.json").write_text(json.dumps(content))
    (run / "eval" / "other.json").write_text("[]")
    call(f"ckpt={run}", f"out={tmp_path / 'my_backbone'}")
    card = (tmp_path / "my_backbone" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    front = OmegaConf.create(card.split("---")[1])
    assert "license" not in front
    for words in ("# my_backbone", "SimCLR on embedded, seed 7, step 12", "temperature: 0.2", "top1 0.4321", digest):
        assert words in card
    assert "| knn | embedded | 12 | top1 0.4321 | metric cosine |" in card
    assert "0.1234" not in card
    assert "1 evaluations beside the run were made from other weights" in card
    assert SECRET not in card
    assert str(tmp_path) not in card


def test_the_cards_three_lines_load_the_export(tmp_path, monkeypatch):
    out = tmp_path / "export"
    call(f"ckpt={make_run(tmp_path / 'run', VIT)}", f"out={out}")
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code.replace("path/to/this/folder", str(out)), scope)
    assert scope["features"].shape == (1, 32)
    assert len(code.strip().splitlines()) == 3


def test_images_that_are_gone_are_replaced_by_the_embedded_ones_with_a_note(tmp_path, capsys):
    run = make_run(tmp_path / "run", RESNET)
    exported = tmp_path / "export"
    call(f"ckpt={run}", f"out={exported}")
    call(f"ckpt={exported}", f"out={tmp_path / 'again'}")  # an export names no data
    assert "note: compared on the embedded images" in capsys.readouterr().out
    card = (tmp_path / "again" / "README.md").read_text()
    assert "4 images of the embedded set and 4 random ones" in card
    assert str(tmp_path) not in card
    with pytest.raises(ValueError, match="nowhere"):  # images that were asked for are not replaced
        call(f"ckpt={run}", f"out={tmp_path / 'other'}", "data=folder", f"data.root={tmp_path / 'nowhere'}")


def test_an_export_at_another_image_size_is_compared_and_described_at_it(tmp_path):
    run = make_run(tmp_path / "run", VIT)
    out = tmp_path / "export"
    call(f"ckpt={run}", f"out={out}", "data=embedded", "data.image_size=48")
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert theirs.patch_embed.grid_size == (12, 12)
    assert checkpoint.load_backbone(out).spec.image_size == (48, 48)


@pytest.mark.parametrize("model", [VIT, RESNET], ids=["vit", "resnet"])
def test_onnx_gives_the_features_at_any_batch_size(tmp_path, model):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="pip install onnx onnxruntime onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime onnxscript")
    run = make_run(tmp_path / "run", model)
    out = tmp_path / "export"
    call(f"ckpt={run}", f"out={out}", "onnx=true")
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    loaded = checkpoint.load_backbone(run)
    for count in (1, 2, 3):
        with torch.no_grad():
            expected = pooled_features(loaded.model, images()[:count])
        (found,) = session.run(None, {"image": images()[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_missing_packages_for_onnx_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.onnx_file.PACKAGES", ("onnx_that_nobody_has", "torch"))
    with pytest.raises(ValueError, match="onnx=true needs onnx_that_nobody_has; install with: pip install"):
        call(f"ckpt={tmp_path}", f"out={tmp_path / 'export'}", "onnx=true")


def test_a_push_without_name_token_or_network_ends_before_any_work(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    words = [f"ckpt={tmp_path}", f"out={tmp_path / 'export'}"]
    with pytest.raises(ValueError, match="push=nameless is no repository"):
        call(*words, "push=nameless")
    with pytest.raises(ValueError, match="needs a token"):
        call(*words, "push=someone/backbone")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(ValueError, match=r"push=someone/backbone needs http://127\.0\.0\.1:9: .*refused"):
        call(*words, "push=someone/backbone")
    assert not (tmp_path / "export").exists()


def test_what_cannot_be_exported_is_refused_in_words(tmp_path):
    run = make_run(tmp_path / "run", RESNET)
    with pytest.raises(ValueError, match="out= is missing"):
        call(f"ckpt={run}")
    with pytest.raises(ValueError, match="ckpt=pixels is a baseline"):
        call("ckpt=pixels", f"out={tmp_path / 'export'}")
    with pytest.raises(ValueError, match="holds other files than an export"):
        call(f"ckpt={run}", f"out={run}")
    with pytest.raises(ValueError, match="holds other files than an export"):
        call(f"ckpt={run}", f"out={run}/checkpoints/step_00000012")
    with pytest.raises(ValueError, match="is a file"):
        call(f"ckpt={run}", f"out={run}/checkpoints/step_00000012/state.json")
    with pytest.raises(ValueError, match="model= has no effect"):
        call(f"ckpt={run}", f"out={tmp_path / 'export'}", "model=resnet18")
