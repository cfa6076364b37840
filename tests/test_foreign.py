"""Weights of other projects: read off files that are made here, under the names that those projects give them."""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from eval import knn
from eval.config import register
from ssl.checkpoint import export, load_backbone
from ssl.config import CONF
from ssl.models.backbones import pooled_features

WIDTHS = {"embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = {"name": "vit_tiny_patch16_224", "args": WIDTHS}
CHANNELS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
SMALL = ("data=embedded", "data.source.num_train=60", "data.source.num_test=24")
RESNET = {"name": "resnet18", "args": CHANNELS}
TO_MM = (  # timm's names to open-mmlab's, written independently of ssl/foreign.py
    ("patch_embed.proj", "patch_embed.projection"),
    ("blocks.", "layers."),
    ("mlp.fc1", "ffn.layers.0.0"),
    ("mlp.fc2", "ffn.layers.1"),
    ("norm1", "ln1"),
    ("norm2", "ln2"),
)


def vit(**args) -> nn.Module:
    """timm's vision transformer on 32 pixels, patches of 8, every tensor drawn at random."""
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 0, **WIDTHS, **args}
    return randomized(timm.create_model("vit_tiny_patch16_224", **sizes))


def resnet(**args) -> nn.Module:
    return randomized(timm.create_model("resnet18", **{"num_classes": 0, **CHANNELS, **args}))


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return model.eval()


def images(side: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def assert_same_features(ours: nn.Module, theirs: nn.Module, image: torch.Tensor) -> None:
    torch.testing.assert_close(pooled_features(ours, image), theirs(image), rtol=1e-5, atol=1e-6)


def mm_names(model: nn.Module) -> dict[str, torch.Tensor]:
    named = {}
    for name, tensor in model.state_dict().items():
        for old, new in TO_MM:
            name = name.replace(old, new)
        named[re.sub(r"^norm\.", "ln1.", re.sub(r"^fc_norm\.", "ln2.", name))] = tensor
    return named


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_plain_state_dict_gives_timms_features(tmp_path, suffix):
    theirs = vit()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        saved(theirs.state_dict(), path)
    else:
        save_file(theirs.state_dict(), path)
    loaded = load_backbone(path, model=VIT)
    assert_same_features(loaded.model, theirs, images())
    assert (loaded.layout, loaded.step, loaded.spec.image_size) == ("timm", None, (32, 32))
    assert loaded.spec.model_args["patch_size"] == 8
    assert loaded.mean == [0.485, 0.456, 0.406]
    assert any("ImageNet" in note for note in loaded.notes)


def test_mae_as_published_and_with_its_decoder_and_arguments_are_one_encoder(tmp_path):
    theirs = vit()
    encoder = theirs.state_dict()
    published = load_backbone(saved({"model": encoder}, tmp_path / "pretrain.pth"), model=VIT)
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_embed.weight": torch.zeros(16, 32),
        "decoder_blocks.0.attn.qkv.weight": torch.zeros(48, 16),
        "decoder_pred.bias": torch.zeros(192),
    }
    whole = {"model": {**encoder, **decoder}, "epoch": 799, "args": argparse.Namespace(lr=1e-3, model="mae_vit_base")}
    full = load_backbone(saved(whole, tmp_path / "full.pth"), model=VIT)
    for loaded in (published, full):
        assert loaded.layout == "facebookresearch/mae"
        assert_same_features(loaded.model, theirs, images())
    assert any("5 tensors that are not the backbone's were left out: decoder 5" in note for note in full.notes)


def test_a_fine_tuned_mae_is_read_with_its_norm_of_the_mean_and_without_its_head(tmp_path):
    theirs = vit(global_pool="avg", num_classes=7)
    path = saved({"model": theirs.state_dict()}, tmp_path / "finetuned.pth")
    loaded = load_backbone(path, model=VIT)
    theirs.reset_classifier(0)
    assert_same_features(loaded.model, theirs, images())
    assert any("classifier 2" in note for note in loaded.notes)


def test_mmselfsup_transformers_are_read_under_their_own_names(tmp_path):
    theirs = vit()
    named = {f"backbone.{name}": tensor for name, tensor in mm_names(theirs).items()}
    content = {
        "meta": {"epoch": 300},
        "state_dict": {
            **named,
            "neck.decoder_embed.weight": torch.zeros(4, 4),
            "data_preprocessor.mean": torch.ones(3),
        },
    }
    for path, layout_of in ((saved(content, tmp_path / "whole.pth"), named), (None, None)):
        path = path or saved({"state_dict": mm_names(theirs)}, tmp_path / "extracted.pth")
        loaded = load_backbone(path, model=VIT)
        assert loaded.layout == "mmselfsup"
        assert_same_features(loaded.model, theirs, images())
        assert any("projector 1, preprocessing 1" in note for note in loaded.notes) == (layout_of is not None)


def test_an_mm_transformer_that_averages_patches_is_read_too(tmp_path):
    theirs = vit(global_pool="avg")
    loaded = load_backbone(saved({"state_dict": mm_names(theirs)}, tmp_path / "averaged.pth"), model=VIT)
    assert_same_features(loaded.model, theirs, images())


def test_an_mmselfsup_resnet_gives_torchvisions_features(tmp_path):
    torch.manual_seed(0)
    theirs = randomized(ResNet(BasicBlock, [1, 1, 1, 1]))
    named = {f"backbone.{k}": v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    content = {"meta": {}, "state_dict": {**named, "head.fc_cls.weight": torch.zeros(8, 512)}}
    model = {"name": "resnet18", "args": {"layers": [1, 1, 1, 1]}}
    loaded = load_backbone(saved(content, tmp_path / "relative_loc.pth"), model=model, image_size=(64, 64))
    theirs.fc = nn.Identity()
    assert_same_features(loaded.model, theirs, images(64))
    assert (loaded.layout, loaded.spec.stem, loaded.spec.image_size) == ("mmselfsup", "standard", (64, 64))


@pytest.mark.parametrize(("project", "padding"), [("solo-learn", 2), ("mmselfsup", 1)])
def test_a_cifar_stem_is_padded_as_its_project_pads_it(tmp_path, project, padding):
    theirs = resnet()
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=padding, bias=False)
    theirs.maxpool = nn.Identity()
    randomized(theirs)
    named = {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}
    beside = {
        "solo-learn": {"classifier.weight": torch.zeros(10, 16), "projector.0.weight": torch.zeros(4, 16)}
        | {name.replace("backbone.", "momentum_backbone."): tensor for name, tensor in named.items()},
        "mmselfsup": {"neck.fc.weight": torch.zeros(4, 16)},
    }
    path = saved({"state_dict": {**named, **beside[project]}}, tmp_path / "cifar.ckpt")
    loaded = load_backbone(path, model=RESNET)
    assert loaded.layout == project
    assert any(f"padding {padding}" in note for note in loaded.notes)
    assert loaded.spec.image_size == (32, 32)
    assert_same_features(loaded.model, theirs, images())
    chosen = load_backbone(path, model={**RESNET, "stem": "small"})
    same = torch.allclose(pooled_features(chosen.model, images()), theirs(images()), atol=1e-4)
    assert same == (padding == 1)


def test_lightnings_hyper_parameters_are_read_as_a_plain_mapping(tmp_path, monkeypatch):
    module = type(argparse)("pytorch_lightning.utilities.parsing")
    attributes = type("AttributeDict", (dict,), {"__module__": module.__name__, "__qualname__": "AttributeDict"})
    module.AttributeDict = attributes
    theirs = resnet()
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", module.__name__):
        monkeypatch.setitem(__import__("sys").modules, name, module)
    named = {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}
    content = {"pytorch-lightning_version": "1.5", "hyper_parameters": attributes(lr=0.1), "state_dict": named}
    path = saved(content, tmp_path / "solo.ckpt")
    monkeypatch.undo()  # nothing of that name can be imported any more
    loaded = load_backbone(path, model=RESNET, image_size=(32, 32))
    assert loaded.layout == "solo-learn"
    assert_same_features(loaded.model, theirs, images())


def test_a_parallel_models_prefix_and_its_average_are_understood(tmp_path):
    older, theirs = resnet(), resnet()
    for parameter in theirs.parameters():
        parameter.data.mul_(1.5)
    content = {
        "state_dict": {f"module.{name}": tensor for name, tensor in older.state_dict().items()},
        "state_dict_ema": {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()},
    }
    loaded = load_backbone(saved(content, tmp_path / "timm.pth.tar"), model=RESNET, image_size=(32, 32))
    assert loaded.weights == "state_dict_ema"
    assert_same_features(loaded.model, theirs, images())


def test_counters_that_old_files_lack_start_at_zero_with_a_note(tmp_path):
    theirs = resnet()
    old = {name: tensor for name, tensor in theirs.state_dict().items() if "num_batches_tracked" not in name}
    loaded = load_backbone(saved(OrderedDict(old), tmp_path / "old.pth"), model=RESNET, image_size=(32, 32))
    assert_same_features(loaded.model, theirs, images())
    assert any("counters of BatchNorm" in note for note in loaded.notes)


def test_channels_follow_the_first_layer(tmp_path):
    theirs = resnet(in_chans=5)
    loaded = load_backbone(saved(theirs.state_dict(), tmp_path / "five.pth"), model=RESNET, image_size=(32, 32))
    assert loaded.spec.in_chans == len(loaded.mean) == len(loaded.std) == 5
    assert_same_features(loaded.model, theirs, images(channels=5))


def test_missing_and_left_over_tensors_are_listed_by_name(tmp_path):
    tensors = vit().state_dict()
    del tensors["blocks.1.attn.qkv.bias"]
    tensors["blocks.1.extra.weight"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"missing from it \(blocks\.1\.attn\.qkv\.bias\).*\(blocks\.1\.extra\.weight\)"
    ):
        load_backbone(saved(tensors, tmp_path / "broken.pth"), model=VIT)


def test_another_models_weights_are_refused_with_what_to_set(tmp_path):
    path = saved(vit().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=r"blocks\.2.*is it vit_tiny_patch16_224\? model="):
        load_backbone(path, model={**VIT, "args": {**WIDTHS, "depth": 3}})
    with pytest.raises(ValueError, match=r"is \(1, 1, 32\) there, \(1, 1, 192\) in the model; is it"):
        load_backbone(path, model={**VIT, "args": {"depth": 2}})
    with pytest.raises(ValueError, match="give model=, such as"):
        load_backbone(path)
    with pytest.raises(ValueError, match=r"patches of .* are 8 x 8"):
        load_backbone(path, model={**VIT, "patch_size": 16})
    with pytest.raises(ValueError, match=r"drop_path=0\.1 has no effect"):
        load_backbone(path, model={**VIT, "drop_path": 0.1})


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = saved({"state_dict": resnet().state_dict(), "callbacks": Payload()}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match=r"(?s)would run code.*weights_only=False"):
        load_backbone(path, model=RESNET)
    assert not (tmp_path / "ran").exists()


def test_files_without_a_state_dict_are_refused_in_words(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"not torch's")
    with pytest.raises(ValueError, match=r"junk\.pth"):
        load_backbone(tmp_path / "junk.pth", model=RESNET)
    with pytest.raises(ValueError, match="holds no state dict"):
        load_backbone(saved({"epoch": 3}, tmp_path / "empty.pth"), model=RESNET)
    with pytest.raises(ValueError, match="holds a list"):
        load_backbone(saved([torch.ones(2)], tmp_path / "list.pth"), model=RESNET)


def test_another_image_size_resamples_positions_as_timm_does_and_says_so(tmp_path):
    theirs = vit(dynamic_img_size=True)  # timm resamples in each forward
    loaded = load_backbone(saved(theirs.state_dict(), tmp_path / "vit.pth"), model=VIT, image_size=(48, 64))
    assert_same_features(loaded.model, theirs, torch.randn(2, 3, 48, 64))
    assert loaded.spec.image_size == (48, 64)
    assert any("resampled from 4x4 to 6x8 patches" in note for note in loaded.notes)
    same = load_backbone(tmp_path / "vit.pth", model=VIT, image_size=(32, 32))
    assert torch.equal(same.model.pos_embed, theirs.pos_embed)
    assert not any("resampled" in note for note in same.notes)


def test_a_size_that_the_patches_do_not_divide_is_refused(tmp_path):
    path = saved(vit().state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="cannot cut images of 30 x 30"):
        load_backbone(path, model=VIT, image_size=(30, 30))


def test_a_folder_that_timm_has_written_is_read_without_model(tmp_path):
    from timm.models import save_for_hf

    theirs = timm.create_model("test_vit", num_classes=5, img_size=32)
    randomized(theirs)
    save_for_hf(theirs, tmp_path / "timm", safe_serialization=True)
    loaded = load_backbone(tmp_path / "timm")
    theirs.reset_classifier(0)
    assert loaded.layout == "timm folder"
    assert loaded.mean == list(theirs.pretrained_cfg["mean"])
    assert_same_features(loaded.model, theirs, images())


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no hub to be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def test_timms_hub_out_of_reach_is_one_message_within_seconds(hub_cache):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"(?s)needs http://127\.0\.0\.1:9.*not in the cache.*ckpt=PATH model=timm"):
        load_backbone("timm:test_vit.r160_in1k")
    assert time.monotonic() - began < 10


def test_an_offline_machine_is_told_that_it_is(hub_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"not in the cache .*hub: HF_HUB_OFFLINE is set"):
        load_backbone("timm:test_vit.r160_in1k")


def test_cached_weights_of_an_address_that_is_no_hub_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    theirs = timm.create_model("legacy_seresnet18")
    url = timm.get_pretrained_cfg("legacy_seresnet18.in1k").url
    (tmp_path / "checkpoints").mkdir()
    saved(theirs.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    loaded = load_backbone("timm:legacy_seresnet18.in1k")
    theirs.reset_classifier(0)
    assert_same_features(loaded.model, theirs.eval(), images(64))


def test_weights_that_timm_does_not_have_are_named_with_those_it_has(hub_cache):
    with pytest.raises(ValueError, match=r"no pretrained weights 'resnet18\.mine': it has .*resnet18\.a1_in1k"):
        load_backbone("timm:resnet18.mine")
    with pytest.raises(ValueError, match=r"no model named 'resnet18x'; close to it: .*resnet18"):
        load_backbone("timm:resnet18x")
    with pytest.raises(ValueError, match="model= has no effect"):
        load_backbone("timm:resnet18", model=RESNET)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_cached_weights_of_timms_hub_need_no_network(hub_cache, name):
    theirs = randomized(timm.create_model(name))
    repository = hub_cache / f"models--timm--{name}.r160_in1k"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    save_file(theirs.state_dict(), snapshot / "model.safetensors")
    loaded = load_backbone(f"timm:{name}.r160_in1k")
    theirs.reset_classifier(0)
    assert_same_features(loaded.model, theirs, images(160))
    assert (loaded.spec.image_size, loaded.mean) == ((160, 160), list(theirs.pretrained_cfg["mean"]))
    assert str(loaded.path) == f"timm:{name}.r160_in1k"


def evaluate(*overrides: str) -> dict:
    """What `python -m eval.knn` does with these words on a few embedded images, in this process."""
    register(knn.KnnConfig)
    GlobalHydra.instance().clear()
    few = [] if "data=checkpoint" in overrides else [*SMALL]
    with initialize_config_dir(CONF, version_base="1.3"):
        return knn.run(compose("knn", overrides=[*few, *overrides, "device=cpu", "threads=1"]))


def test_an_evaluation_of_a_foreign_file_says_whose_it_is_and_what_was_inferred(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = saved({"model": vit().state_dict()}, tmp_path / "mae_tiny.pth")
    words = [
        f"ckpt={path}",
        "model=vit_micro",
        "model.args.embed_dim=32",
        "model.args.depth=2",
        "model.args.num_heads=2",
    ]
    result = evaluate(*words)
    protocol = result["protocol"]
    assert protocol["checkpoint"]["layout"] == "facebookresearch/mae"
    assert protocol["checkpoint"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert protocol["checkpoint"]["step"] is None
    assert protocol["features"]["mean"] == [0.485, 0.456, 0.406]
    assert any("ImageNet's are used" in note for note in protocol["notes"])
    assert "note: the weights have facebookresearch/mae's keys" in capsys.readouterr().out
    assert Path(result["path"]).parent == Path("runs/mae_tiny/eval")
    larger = evaluate(*words, "data.image_size=48")["protocol"]
    assert larger["features"]["image_size"] == [48, 48]
    assert any("resampled from 4x4 to 6x6" in note for note in larger["notes"])
    with pytest.raises(ValueError, match=r"does not say which images.*give data="):
        evaluate(*words, "data=checkpoint")


def test_a_run_of_ours_at_another_image_size_says_so_and_refuses_model(tmp_path):
    path = saved(vit().state_dict(), tmp_path / "vit.pth")
    exported = export(load_backbone(path, model=VIT), tmp_path / "export")
    protocol = evaluate(f"ckpt={exported}", "data.image_size=64")["protocol"]
    assert protocol["features"]["image_size"] == [64, 64]
    assert any("made for 32" in note for note in protocol["notes"])
    with pytest.raises(ValueError, match="model= has no effect with ckpt"):
        evaluate(f"ckpt={exported}", "model=resnet18")
