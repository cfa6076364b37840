"""Every family of backbones through what the toolkit does with one: pretraining steps, checkpoint, export, probe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from eval.export import ElsewhereLoaded
from eval.layers import FeatureSet, make_extract, num_layers, resolve_sets
from ssl import checkpoint
from ssl.methods.base import Method
from ssl.methods.mae import MAE
from ssl.methods.relative_location import RelativeLocation
from ssl.methods.simclr import SimCLR
from ssl.models.backbones import build_backbone, pooled_features
from tests.test_export import call

RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
DEEP_STEM = RESNET | {"stem_width": 8}
BN_INCEPTION: dict[str, Any] = {
    "stem_chs": [8, 8, 8],
    "stages": [[[4, 4, 8, 4, 8, "avg", 4]], [[0, 4, 8, 4, 8, "max", 0]], [[0, 4, 8, 4, 8, "max", 0]]],
}
CBAM: dict[str, Any] = {"channels": [128] * 4}  # gates of 8 hidden units: not all are dead
NASNET: dict[str, Any] = {"num_features": 96, "stem_size": 8}
SWIN: dict[str, Any] = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]}
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    # name, arguments, pixels of an image for SimCLR, and of one for relative location, whose patches are a ninth of it
    "AlexNet": ("torchvision/alexnet", {}, 64, 224),
    "VGG": ("vgg11_bn", {"mlp_ratio": 0.01}, 32, 128),
    "VGG without BatchNorm": ("vgg11", {"mlp_ratio": 0.01}, 32, 128),
    "GoogLeNet": ("torchvision/googlenet", {}, 64, 96),
    "Inception v2": ("bn_inception", BN_INCEPTION, 64, 96),
    "Inception v3": ("inception_v3", {}, 96, 288),
    "Inception v4": ("inception_v4", {}, 96, 288),
    "Inception-ResNet v2": ("inception_resnet_v2", {}, 96, 288),
    "ResNet": ("resnet18", RESNET, 32, 96),
    "ResNet-C": ("resnet50c", DEEP_STEM, 32, 96),
    "ResNet-D": ("resnet50d", DEEP_STEM, 32, 96),
    "SqueezeNet": ("torchvision/squeezenet1_1", {}, 64, 96),
    "Wide ResNet": ("wide_resnet50_2", RESNET, 32, 96),
    "DenseNet": ("densenet121", {"growth_rate": 8, "block_config": [2, 2, 2, 2]}, 32, 128),
    "Xception": ("legacy_xception", {}, 64, 192),
    "ResNeXt": ("resnext50_32x4d", RESNET | {"channels": [32, 32, 32, 32]}, 32, 96),
    "MobileNet v1": ("mobilenetv1_100", {}, 64, 96),
    "MobileNet v2": ("mobilenetv2_035", {}, 64, 96),
    "MobileNet v3": ("mobilenetv3_small_050", {}, 64, 96),
    "ShuffleNet v1": ("shufflenet_v1_g3_x0_25", {}, 64, 96),
    "ShuffleNet v2": ("torchvision/shufflenet_v2_x0_5", {}, 64, 96),
    "NASNet": ("nasnetalarge", NASNET, 64, 192),
    "SENet": ("legacy_senet154", {"layers": [1, 1, 1, 1]}, 32, 96),
    "SE-ResNet": ("seresnet18", RESNET, 32, 96),
    "EffNet": ("effnet", {"width": 0.25}, 32, 96),
    "CBAM": ("cbam_resnet18", CBAM, 32, 96),
    "EfficientNet": ("efficientnet_b0", {}, 64, 96),
    "HarDNet": ("hardnet39ds", {}, 64, 96),
    "ECA-Net": ("ecaresnet26t", DEEP_STEM, 32, 96),
    "GhostNet": ("ghostnet_050", {}, 64, 96),
    "ResNeSt": ("resnest14d", DEEP_STEM, 32, 96),
    "MnasNet": ("mnasnet_050", {}, 64, 96),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, 64, 192),
    "ConvNeXt": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, 64, 128),
    "ViT": ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, 32, 96),
}


def made(family: str, *, for_patches: bool = False, **settings: Any) -> tuple[nn.Module, Any]:
    """A family's tiny backbone, for images or for relative location's patches of larger ones."""
    name, args, side, patch_side = FAMILIES[family]
    size = (patch_side, patch_side) if for_patches else (side, side)
    stem_side = RelativeLocation.stem_size(size) if for_patches else None
    torch.manual_seed(0)
    return build_backbone(name, image_size=size, model_args=args, stem_side=stem_side, **settings)


def assert_trains(method: Method, batch: dict[str, Any]) -> None:
    """Also of a branch whose last scale begins at zero, which gives what lies in it none before the first step."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    loss = method(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    trained = {name: parameter.grad for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()] == []
    assert [name for name, grad in trained.items() if grad is not None and not grad.any()] == []


def saved(folder: Path, backbone: nn.Module, spec: Any, *, classes: Sequence[str] = ()) -> Path:
    """A run folder with one checkpoint of the backbone, whose statistics are not those of a fresh one."""
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape) * 0.01)
    method = Method()
    method.backbone = backbone
    state: dict[str, Any] = {"epoch": 1.0}
    if classes:
        state["classifier"] = {"classes": list(classes), "pooling": None, "multi_label": False}
    checkpoint.save(
        folder,
        step=1,
        method=method,
        spec=spec,
        optimizer_tensors={},
        ema=None,
        config_yaml="seed: 0\n",
        state=state,
        mean=[0.5] * spec.in_chans,
        std=[0.25] * spec.in_chans,
    )
    return folder


def images(family: str, number: int = 2) -> Tensor:
    side = FAMILIES[family][2]
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_simclr_step_gives_every_parameter_a_gradient(family: str) -> None:
    backbone, spec = made(family)
    method = SimCLR(backbone, temperature=0.2, image_size=spec.image_size)
    assert_trains(method, {"views": [images(family, 4), images(family, 4).flip(3)]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_relative_location_step_gives_every_parameter_a_gradient(family: str) -> None:
    backbone, spec = made(family, for_patches=True)
    method = RelativeLocation(backbone, hidden_dim=16, image_size=spec.image_size)
    view = torch.randn(2, 3, *method.view_size, generator=torch.Generator().manual_seed(3))
    noise = torch.rand(2, method.num_noise, generator=torch.Generator().manual_seed(4))
    assert_trains(method, {"views": [view], "noise": noise})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_equal_from_a_checkpoint_and_from_its_export(family: str, tmp_path: Path) -> None:
    backbone, spec = made(family)
    run = saved(tmp_path / "run", backbone, spec)
    expected = pooled_features(backbone.eval(), images(family))
    loaded = checkpoint.load_backbone(run)
    assert torch.equal(pooled_features(loaded.model, images(family)), expected)
    again = checkpoint.load_backbone(checkpoint.export(loaded, tmp_path / "export"))
    assert torch.equal(pooled_features(again.model, images(family)), expected)
    assert again.spec == spec


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_probe_reads_the_stages_that_hooks_see(family: str) -> None:
    backbone, _ = made(family)
    depth = num_layers(backbone.eval())
    assert depth >= 2
    sets = resolve_sets(backbone, [FeatureSet(str(place)) for place in range(depth)] + [FeatureSet()])
    found = make_extract(backbone, sets, device=torch.device("cpu"), dtype=torch.float32)(images(family))
    torch.testing.assert_close(found[-1], pooled_features(backbone, images(family)))
    info: Any = backbone.feature_info
    if family == "ViT":
        return  # tests/test_layers.py compares its blocks
    caught: dict[str, Tensor] = {}
    for row in info:
        module = backbone.get_submodule(row["module"])
        module.register_forward_hook(lambda *passed, name=row["module"]: caught.update({name: passed[2]}))
    backbone(images(family))
    for row, features in zip(info, found):
        seen = caught[row["module"]]
        if family != "NASNet":  # timm's table has the channels of its full size
            assert features.shape == (2, row["num_chs"])
        if family == "Swin":
            seen = seen.permute(0, 3, 1, 2)  # channels last
        torch.testing.assert_close(features, seen.mean((2, 3)))


@pytest.mark.parametrize("name", ["torchvision/alexnet", "vgg11", "hardnet39ds", "resnet18"])
def test_mae_names_what_fits_where_a_family_has_no_tokens(name: str) -> None:
    with torch.device("meta"):
        backbone, spec = build_backbone(name, image_size=(64, 64))
    with pytest.raises(ValueError, match=rf"got {name}; try model=vit_b"):
        MAE(backbone, image_size=spec.image_size)


def test_a_mae_step_gives_every_parameter_of_a_vit_a_gradient() -> None:
    backbone, spec = made("ViT")
    method = MAE(backbone, decoder_dim=32, decoder_depth=1, decoder_heads=2, image_size=spec.image_size)
    noise = torch.rand(2, method.num_noise, generator=torch.Generator().manual_seed(4))
    assert_trains(method, {"views": [images("ViT")], "noise": noise})


@pytest.mark.parametrize(
    ("name", "side", "in_chans", "classes"),
    [
        ("torchvision/squeezenet1_1", 64, 3, []),
        ("torchvision/mnasnet0_5", 64, 3, []),  # refuses weights without a version
        ("torchvision/shufflenet_v2_x0_5", 32, 1, ["cat", "dog"]),
        ("hardnet39ds", 64, 3, []),
        ("bn_inception", 64, 3, []),
    ],
)
def test_an_export_brings_what_loads_it_where_this_package_is_not(
    name: str, side: int, in_chans: int, classes: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    backbone, spec = build_backbone(name, image_size=(side, side), in_chans=in_chans)
    model: Any = backbone
    if classes:
        model.reset_classifier(len(classes))
    run = saved(tmp_path / "run", backbone, spec, classes=classes)
    out = tmp_path / "export"
    pixels = np.random.default_rng(0).integers(0, 256, (4, side, side), dtype=np.uint8)
    for number, grey in enumerate(pixels):
        path = tmp_path / "photos" / "train" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(path)
    data = ["data=folder", f"data.root={tmp_path}/photos/train", f"data.channels={in_chans}"]
    result = call(f"ckpt={run}", f"out={out}", *data)
    assert list(result["differences"]) == ["load.py"]
    batch = torch.randn(2, in_chans, side, side, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(ElsewhereLoaded(out)(batch), backbone.eval()(batch))
    assert "ssl" not in (out / "load.py").read_text()
    library = "torchvision" if name.startswith("torchvision/") else "timm"
    assert f"torch, {library} and safetensors" in (out / "README.md").read_text()
    with pytest.raises(RuntimeError, match="Unknown model") if library == "torchvision" else nullcontext():
        timm.create_model(f"local-dir:{out}", pretrained=True)
