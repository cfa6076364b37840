"""Saliency, guided backpropagation, occlusion and Grad-CAM: on networks of which it is known what they look at."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from captum.attr import GuidedBackprop, LayerGradCam
from torch import Tensor, nn
from torch.nn import functional

from eval.head_file import save_head
from eval.look import attribution, command, gradcam, guided_backprop, occlusion, saliency, target
from eval.look.layer_places import find_places
from eval.look.layer_values import read_layer
from eval.look.result import DoesNotApply
from ssl import checkpoint
from ssl.models.backbones import build_backbone, pooled_features
from tests.scenes import look_config, pretrained
from tests.scenes import scene as make_scene

PATCH, BRIGHT = 8, (2, 1)  # the side of a patch in pixels, and the row and column of the one that is bright
SIZE = (32, 32)
TINY_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
TINY_VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2}


class Convnet(nn.Module):
    """Feels patches whose mean over pixels and channels exceeds 1, wherever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 2, PATCH, stride=PATCH)
        self.act = nn.ReLU(inplace=True)
        with torch.no_grad():
            self.cells.weight.zero_()
            self.cells.weight[0] = 1 / (3 * PATCH**2)
            self.cells.bias.copy_(torch.tensor([-1.0, 0.0]))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.act(self.cells(x))  # (B, 2, 4, 4)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3))


def vision_transformer(pool: str) -> nn.Module:
    """timm's, with weights that make it feel what `Convnet` feels: the first block rectifies the brightness of each
    patch into dimension 1; the second hands the mean of all tokens to the class token, for `pool=token`.
    """
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=8,
        depth=2,
        num_heads=1,
        num_classes=0,
        global_pool=pool,
        class_token=pool == "token",
        fc_norm=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.weight[0] = 1 / (3 * PATCH**2)
        first, second = model.blocks
        for block in model.blocks:
            block.norm1, block.norm2 = nn.Identity(), nn.Identity()
        first.mlp.fc1.weight[0, 0], first.mlp.fc1.bias[0] = 4.0, -4.0
        first.mlp.fc2.weight[1, 0] = 0.25
        if pool == "token":
            second.attn.qkv.weight[17, 1] = 1.0  # the value of dimension 1; queries and keys are 0: the mean of all
            second.attn.proj.weight[1, 1] = 1.0
    model.norm = nn.Identity()
    return model.eval()


NETWORKS = {
    "convnet": Convnet,
    "vit, mean of patches": lambda: vision_transformer("avg"),
    "vit, class token": lambda: vision_transformer("token"),
}


@pytest.fixture(params=list(NETWORKS))
def network(request) -> nn.Module:
    return NETWORKS[request.param]().eval().requires_grad_(False)


def bright_image(seed: int = 0) -> Tensor:
    """Noise with one bright patch, (1, 3, 32, 32)."""
    image = 0.3 * torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    image[:, :, BRIGHT[0] * PATCH : (BRIGHT[0] + 1) * PATCH, BRIGHT[1] * PATCH : (BRIGHT[1] + 1) * PATCH] += 3
    return image


def felt(network: nn.Module) -> target.Score:
    """The dimension in which the network says how much it feels."""
    dimension = 0 if isinstance(network, Convnet) else 1
    return target.dimension_scores(lambda image: pooled_features(network, image), dimension)


def place_of_peak(heat: Tensor, size: int) -> tuple[int, int]:
    """The row and column of the patch that holds a map's peak."""
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return row // size, column // size


def resnet(**args) -> nn.Module:
    torch.manual_seed(0)
    model = build_backbone("resnet18", image_size=SIZE, model_args=TINY_RESNET | args)[0]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm's last one of a block starts at 0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval().requires_grad_(False)


def vit(**args) -> nn.Module:
    torch.manual_seed(0)
    model = build_backbone("vit_tiny_patch16_224", image_size=SIZE, patch_size=PATCH, model_args=TINY_VIT | args)[0]
    return model.eval().requires_grad_(False)


def without_in_place(network: nn.Module) -> nn.Module:
    """A copy whose ReLUs do not work in place, as captum needs it."""
    safe = copy.deepcopy(network)
    for module in safe.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return safe


def images(num: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(num, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


# ---- what a made network looks at ----------------------------------------------------------------------------------


def test_covering_the_bright_patch_moves_the_score_most(network):
    heat = occlusion.occlusion_map(felt(network), bright_image(), window=PATCH, stride=PATCH // 2)[0]  # (32, 32)
    assert place_of_peak(heat, PATCH) == BRIGHT
    far = heat[: PATCH // 2, -PATCH:]  # no window over it reaches the bright patch
    assert heat.max() > 20 * far.abs().max() + 0.01


@pytest.mark.parametrize("method", list(saliency.METHODS))
def test_saliency_peaks_in_the_bright_patch(network, method):
    heat = saliency.attribute(felt(network), bright_image(), method)[0]  # (32, 32)
    assert place_of_peak(heat, PATCH) == BRIGHT


def test_gradcam_peaks_at_the_place_of_the_bright_patch(network):
    score, image = felt(network), bright_image()
    layer = gradcam.last_map(network, score, image, find_places(network, image_size=SIZE, in_chans=3))
    heat = gradcam.gradcam(network, score, image, layer)[0]  # (4, 4)
    assert place_of_peak(heat, 1) == BRIGHT


def test_guided_backpropagation_reaches_the_bright_patch_alone(network):
    gradient = guided_backprop.guided_gradient(felt(network), bright_image())[0][0].abs().amax(0)  # (32, 32)
    inside = gradient.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).amax((2, 3))  # (4, 4)
    assert place_of_peak(inside, 1) == BRIGHT
    inside[BRIGHT] = 0
    assert inside.max() == 0


def test_a_true_map_stands_the_test_and_a_false_one_does_not(network):
    score, image = felt(network), bright_image()
    truth = np.zeros((1, 4, 4), np.float32)
    truth[0][BRIGHT] = 1
    found = attribution.deletion(score, image, truth, share=1 / 16)
    assert found["marked"] > 2 * found["elsewhere"]
    false = attribution.deletion(score, image, np.roll(truth, 2, axis=2), share=1 / 16)
    assert false["marked"] < false["elsewhere"]


# ---- against other computations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [resnet, vit])
def test_the_gradient_is_that_of_finite_differences(make):
    network, image = make().double(), images(1).double()
    score = target.contrast_scores(lambda image: pooled_features(network, image), image)
    heat = saliency.attribute(score, image, "gradient")[0]
    for row, column in [(3, 5), (17, 30)]:
        slopes = []
        for channel in range(3):
            step = torch.zeros_like(image)
            step[0, channel, row, column] = 1e-6
            slopes.append(
                float(attribution.scores_of(score, image + step) - attribution.scores_of(score, image - step))
            )
        assert heat[row, column].item() == pytest.approx(max(map(abs, slopes)) / 2e-6, rel=1e-4)


def test_gradient_times_input_keeps_its_sign():
    network = resnet()
    score = target.norm_scores(lambda image: pooled_features(network, image))
    given = images().requires_grad_()
    (gradient,) = torch.autograd.grad(score(given, torch.arange(2)).sum(), given)
    found = saliency.attribute(score, images(), "input_x_gradient")
    torch.testing.assert_close(found, (gradient * given).sum(1).detach())
    assert found.min() < 0 < found.max()


@pytest.mark.parametrize("make", [resnet, vit])
def test_integrated_gradients_sum_up_to_the_change_of_the_score(make):
    network = make()
    score = target.contrast_scores(lambda image: pooled_features(network, image), images())
    whole, blank = (attribution.scores_of(score, each) for each in (images(), torch.zeros(2, 3, *SIZE)))
    found = saliency.attribute(score, images(), "integrated_gradients", steps=200).sum((1, 2))
    torch.testing.assert_close(found, whole - blank, rtol=0.02, atol=0.01)


def test_smoothgrad_is_the_mean_gradient_of_noisy_copies():
    network = vit()
    score = target.norm_scores(lambda image: pooled_features(network, image))
    found = saliency.smooth_gradient(score, images(), num_samples=5, noise=0.2, seed=7)
    for row, image in enumerate(images()):
        torch.manual_seed(7)
        deviation = float(0.2 * (image.max() - image.min()))
        copies = image + torch.normal(0.0, torch.full((5, 3, *SIZE), deviation))
        plain = guided_backprop.plain_gradient(score, copies)
        torch.testing.assert_close(found[row], plain.mean(0))


@pytest.mark.parametrize("make", [resnet, vit])
def test_occlusion_is_the_fall_of_every_covered_copy(make):
    network, image = make(), images()
    score = target.similarity_scores(lambda image: pooled_features(network, image), image)
    found = occlusion.occlusion_map(score, image, window=8, stride=8, batch_size=6)
    for row in range(len(image)):
        for top in range(0, 32, 8):
            for left in range(0, 32, 8):
                copy_of = image[[row]].clone()
                copy_of[:, :, top : top + 8, left : left + 8] = 0
                features = [pooled_features(network, each)[0] for each in (image[[row]], copy_of)]
                fall = 1 - functional.cosine_similarity(*features, dim=0)
                torch.testing.assert_close(
                    found[row, top : top + 8, left : left + 8], fall.expand(8, 8), atol=1e-5, rtol=0
                )


def test_occlusion_runs_as_often_as_it_says():
    runs = []

    def score(image: Tensor, rows: Tensor) -> Tensor:
        runs.append(len(image))
        return image.mean((1, 2, 3))

    for side, window, stride in [(32, 5, 2), (33, 8, 3), (31, 8, 8), (24, 6, 6)]:
        runs.clear()
        occlusion.occlusion_map(score, torch.ones(2, 3, side, side + 4), window=window, stride=stride, batch_size=8)
        positions = occlusion.num_positions((side, side + 4), window=window, stride=stride)
        assert sum(runs) == 2 * (positions + 1)


def test_gradcam_is_captums_where_channels_come_first():
    network = resnet()
    score = target.norm_scores(lambda image: pooled_features(network, image))
    places = find_places(network, image_size=SIZE, in_chans=3)
    safe = without_in_place(network)
    for layer in ("layer2", "layer3.0.conv1", "bn1"):  # what follows bn1 works in place
        theirs = LayerGradCam(lambda image: pooled_features(safe, image).norm(dim=1), safe.get_submodule(layer))
        wanted = theirs.attribute(images().requires_grad_(), relu_attributions=True)[:, 0]
        torch.testing.assert_close(gradcam.gradcam(network, score, images(), places[layer]), wanted.detach())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet10t"])
def test_gradcam_of_the_last_map_is_the_class_activation_map(name):
    """Where a linear layer reads the mean of a map, Grad-CAM is the map of Zhou et al. 2016, in each layout."""
    torch.manual_seed(0)
    args = {"img_size": 128, "window_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}
    model = timm.create_model(name, num_classes=5, **(args if "swin" in name else {})).eval().requires_grad_(False)
    if "convnext" in name:
        model.head.norm = nn.Identity()  # which stands behind the mean
    image = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    score = target.class_scores(model, torch.tensor([1, 4]))
    layer = gradcam.last_map(model, score, image, find_places(model, image_size=(128, 128), in_chans=3))
    features = model.forward_features(image)
    features = features if "swin" in name else features.permute(0, 2, 3, 1)  # (B, h, w, C)
    weight = model.get_classifier().weight[[1, 4]][:, None, None]  # (B, 1, 1, C)
    wanted = (features * weight).sum(3).clamp(min=0) / features[0, ..., 0].numel()
    assert layer.grid_size == tuple(features.shape[1:3])
    torch.testing.assert_close(gradcam.gradcam(model, score, image, layer), wanted, rtol=1e-4, atol=1e-6)


def test_maps_of_fewer_than_four_places_are_passed_over_for_larger_ones():
    network = resnet()
    score = target.norm_scores(lambda image: pooled_features(network, image))
    small = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))  # layer4 gives 2 x 2 places
    assert (
        gradcam.last_map(network, score, small, find_places(network, image_size=(16, 16), in_chans=3)).layer == "layer3"
    )
    assert (
        gradcam.last_map(network, score, images(), find_places(network, image_size=SIZE, in_chans=3)).layer == "layer4"
    )


def test_gradcam_of_a_class_token_reads_the_block_before_the_last():
    network = vit()
    assert network.global_pool == "token"
    score = target.norm_scores(lambda image: pooled_features(network, image))
    places = find_places(network, image_size=SIZE, in_chans=3)
    assert gradcam.last_map(network, score, images(), places).layer == "blocks.1"
    given = images().requires_grad_()
    final = read_layer(network, lambda image: pooled_features(network, image), "blocks.2", given)
    assert final.shape == (2, 17, 24)


# ---- guided backpropagation ----------------------------------------------------------------------------------------


def captums_guided(network: nn.Module, image: Tensor) -> Tensor:
    """captum's gradient of the sum of the features' squares."""
    safe = without_in_place(network)
    runs = nn.Module()
    runs.network = safe
    runs.forward = lambda image: pooled_features(safe, image).square().sum(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it sets hooks
        return GuidedBackprop(runs).attribute(image.clone().requires_grad_()).detach()


def squares(network: nn.Module) -> target.Score:
    return lambda image, rows: pooled_features(network, image).square().sum(1)


@pytest.mark.parametrize("name", ["resnet18", "torchvision/squeezenet1_1"])
def test_guided_backpropagation_is_captums_on_networks_of_relus(name):
    torch.manual_seed(0)
    args = TINY_RESNET if name == "resnet18" else {}
    network = build_backbone(name, image_size=(64, 64), model_args=args)[0].eval().requires_grad_(False)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    ours, calls = guided_backprop.guided_gradient(squares(network), image)
    theirs = captums_guided(network, image)
    assert calls >= 5
    torch.testing.assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=0, atol=1e-6)
    plain = guided_backprop.plain_gradient(squares(network), image)
    assert (plain - ours).abs().max() > 0.1 * plain.abs().max()


class Relus(nn.Module):
    """Two rectified convolutions, the rectifier written in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.one, self.other, self.changes = nn.ReLU(), nn.ReLU(), nn.ReLU(inplace=True)
        self.way = way

    def forward_features(self, x: Tensor) -> Tensor:
        if self.way == "modules":
            return self.other(self.second(self.one(self.first(x))))
        if self.way == "one module twice":
            return self.one(self.second(self.one(self.first(x))))
        if self.way == "functions":
            return functional.relu(self.second(torch.relu(self.first(x))))
        if self.way == "named arguments":
            return torch.relu(input=self.second(functional.relu(inplace=False, input=self.first(x))))
        if self.way == "in place":
            hidden = self.first(x)
            self.changes(hidden)  # whose answer is not looked at: the change is
            return self.second(hidden).relu_()
        return functional.relu(self.second(functional.relu(self.first(x), inplace=True)), True)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize("way", ["one module twice", "functions", "named arguments", "in place", "functions in place"])
def test_a_rectifier_is_guided_however_it_is_called(way):
    wanted = guided_backprop.guided_gradient(squares(Relus("modules")), images())
    found = guided_backprop.guided_gradient(squares(Relus(way)), images())
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    assert found[1] == wanted[1] == 2


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Hardswish, nn.ReLU6, nn.ELU, nn.LeakyReLU, nn.Mish, nn.PReLU])
def test_every_rectifier_passes_positive_gradients_at_positive_inputs_alone(act):
    given = torch.tensor([[-2.0, -0.3, 0.4, 2.5, 0.4, 2.5]])
    upstream = torch.tensor([[1.0, 1.0, 1.0, 2.0, -1.0, -2.0]])
    rectifier = act()
    found, calls = guided_backprop.guided_gradient(lambda x, rows: (rectifier(x) * upstream).sum(1), given)
    slope = torch.autograd.functional.jacobian(lambda x: rectifier(x).sum(), given)
    assert calls == 1
    torch.testing.assert_close(found, torch.where((given > 0) & (upstream > 0), slope * upstream, 0.0))


def test_what_works_in_place_works_in_place_when_it_is_guided():
    """A shortcut that reads a tensor after an in-place ReLU reads what is rectified."""

    def score(x: Tensor, rows: Tensor) -> Tensor:
        hidden = x * 1.0
        activated = functional.relu(hidden, inplace=True)
        return (3 * activated + hidden).sum(1)

    found = guided_backprop.guided_gradient(score, torch.tensor([[-1.0, 2.0]]))[0]
    assert found.tolist() == [[0.0, 4.0]]


def test_a_vision_transformer_is_guided_at_its_gelus_and_left_as_it_was():
    network = vit()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    guided, calls = guided_backprop.guided_gradient(squares(network), images())
    plain = guided_backprop.plain_gradient(squares(network), images())
    assert calls == 3
    assert not torch.allclose(guided, plain, rtol=0.05)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    torch.testing.assert_close(guided_backprop.plain_gradient(squares(network), images()), plain, rtol=0, atol=0)


def test_a_network_without_rectifiers_is_refused():
    with pytest.raises(DoesNotApply, match="no rectifier to guide"):
        guided_backprop.guided_gradient(lambda image, rows: image.tanh().sum((1, 2, 3)), images())
    with pytest.raises(DoesNotApply, match="timm's QuickGELU"):
        guided_backprop.check_network(timm.create_model("vit_base_patch16_clip_quickgelu_224", depth=1, num_classes=0))


# ---- targets -------------------------------------------------------------------------------------------------------


def test_similarity_is_one_at_the_image_and_has_no_gradient_there():
    network = resnet()
    score = target.similarity_scores(lambda image: pooled_features(network, image), images())
    torch.testing.assert_close(attribution.scores_of(score, images()), torch.ones(2))
    assert guided_backprop.plain_gradient(score, images()).abs().max() < 1e-5


@pytest.mark.parametrize("make", [resnet, vit])
def test_contrast_is_the_distance_to_a_blank_image_and_has_a_gradient(make):
    network = make()
    features = [pooled_features(network, each).numpy() for each in (images(), torch.zeros(1, 3, *SIZE))]
    score = target.contrast_scores(lambda image: pooled_features(network, image), images())
    wanted = np.sqrt(((features[0] - features[1]) ** 2).sum(1))
    np.testing.assert_allclose(attribution.scores_of(score, images()).numpy(), wanted, rtol=1e-4)
    assert guided_backprop.plain_gradient(score, images()).abs().amax((1, 2, 3)).min() > 1e-4


def test_a_class_score_follows_the_image_that_a_variant_is_of():
    score = target.class_scores(lambda image: image.flatten(1)[:, :4], torch.tensor([3, 1]))
    found = score(images(3), torch.tensor([1, 0, 1]))
    assert found.tolist() == [images(3)[i].flatten()[place].item() for i, place in enumerate([1, 3, 1])]


# ---- the looks -----------------------------------------------------------------------------------------------------

METHODS = ("mae", "simclr", "relative_location")
ALL = "[saliency,guided_backprop,occlusion,gradcam]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    return {method: pretrained(tmp_path_factory.mktemp(method) / "run", method) for method in METHODS}


@pytest.fixture(scope="module")
def probed(runs, tmp_path_factory) -> Path:
    """A head of made weights on SimCLR's backbone, with the embedded images' ten classes."""
    loaded = checkpoint.load_backbone(runs["simclr"])
    classes = make_scene(runs["simclr"]).classes
    return save_head(
        tmp_path_factory.mktemp("head") / "made.head",
        weight=torch.randn(len(classes), 16, generator=torch.Generator().manual_seed(3)),
        bias=torch.zeros(len(classes)),
        classes=classes,
        checkpoint=loaded.path,
        sha256=loaded.hash,
        features={"pooling": "model"},
        image_size=loaded.spec.image_size,
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_backbone_is_explained_without_labels(runs, method, tmp_path, capsys):
    words = ["saliency.methods=[gradient,smoothgrad,input_x_gradient,integrated_gradients]", "saliency.steps=4"]
    command.run(look_config(runs[method], ALL, f"out={tmp_path}", "num_images=2", "saliency.noise_samples=2", *words))
    said = capsys.readouterr().out
    for what in ("saliency", "guided_backprop", "occlusion", "gradcam"):
        assert (tmp_path / f"{what}.png").is_file()
        data = json.loads((tmp_path / f"{what}.json").read_text())
        assert data["data"]["target"] == ("similarity" if what == "occlusion" else "contrast")
        assert len(data["data"]["images"]) == 2
        assert all(np.isfinite(value) for value in data["metrics"].values())
        arrays = np.load(tmp_path / f"{what}.npz")
        assert all(np.abs(arrays[name]).max() > 0 for name in arrays.files)
        assert f"{what}: " in said
    assert "of one image, about" in said


def test_the_predicted_class_is_what_the_head_says(runs, probed):
    scene = make_scene(runs["simclr"], "occlusion", f"head={probed}")
    shown = scene.shown()
    found = target.make_target(scene, shown, "auto", setting="occlusion.target", gradient=False)
    logits = scene.classifier().model(shown.image)
    assert found.kind == "predicted"
    assert found.names == [scene.classes[number] for number in logits.argmax(1).tolist()]
    torch.testing.assert_close(attribution.scores_of(found.score, shown.image), logits.amax(1).detach())
    own = target.make_target(scene, shown, "label", setting="occlusion.target", gradient=True)
    assert own.names == [shown.truth(place) for place in range(len(shown))]
    named = target.make_target(scene, shown, scene.classes[2], setting="occlusion.target", gradient=True)
    torch.testing.assert_close(attribution.scores_of(named.score, shown.image), logits[:, 2].detach())
    heat = gradcam.look(make_scene(runs["simclr"], "gradcam", f"head={probed}")).arrays["grad-cam"]
    assert heat.shape[0] == 4


@pytest.mark.parametrize(
    ("wanted", "gradient", "message"),
    [
        ("similarity", True, "has no gradient.*give contrast"),
        ("predicted", True, "needs a classifier.*linear_probe"),
        ("feature_16", False, "16 dimensions, feature_0 to feature_15"),
    ],
)
def test_a_target_that_is_not_there_is_refused(runs, wanted, gradient, message):
    scene = make_scene(runs["simclr"])
    with pytest.raises(ValueError, match=message):
        target.make_target(scene, scene.shown(), wanted, setting="saliency.target", gradient=gradient)


def test_a_class_that_the_head_lacks_is_refused_with_those_it_has(runs, probed):
    scene = make_scene(runs["simclr"], "saliency", f"head={probed}")
    with pytest.raises(ValueError, match=f"saliency.target=unicorn is not known.*the classes are {scene.classes[0]}"):
        target.make_target(scene, scene.shown(), "unicorn", setting="saliency.target", gradient=True)


@pytest.mark.parametrize(
    ("what", "word", "message"),
    [
        ("occlusion", "occlusion.window=32", "must be 1 to 31 pixels"),
        ("occlusion", "occlusion.stride=9", "must be 1 to 5 pixels"),
        ("gradcam", "gradcam.layer=layer9", "gradcam.layer=layer9 .*layer1.*layer4"),
        ("saliency", "saliency.methods=[magic]", "one or several of gradient, smoothgrad"),
        ("saliency", "saliency.noise=0", "noise above 0"),
        ("saliency", "saliency.steps=64", "saliency.steps has no effect without integrated_gradients"),
    ],
)
def test_settings_that_do_not_fit_are_refused(runs, what, word, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command.run(look_config(runs["simclr"], what, word, f"out={tmp_path}"))


def test_the_backbone_is_left_without_hooks_and_unchanged(runs):
    scene = make_scene(runs["mae"], ALL, "num_images=1")
    before = {key: value.clone() for key, value in scene.backbone.state_dict().items()}
    for module in (guided_backprop, gradcam, occlusion):
        module.look(scene)
    assert all(torch.equal(value, before[key]) for key, value in scene.backbone.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in scene.backbone.modules())


def test_the_same_seed_gives_the_same_maps(runs):
    found = [
        saliency.look(make_scene(runs["mae"], "saliency", "saliency.noise_samples=2", f"seed={seed}", "indices=[0,1]"))
        for seed in (1, 1, 2)
    ]
    maps = [each.arrays["smoothgrad"] for each in found]
    assert (maps[0] == maps[1]).all()
    assert (maps[0] != maps[2]).any()
