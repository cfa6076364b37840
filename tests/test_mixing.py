"""Mixup and CutMix against timm's, manifold mixup and PatchUp against the papers' loops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import nn
from torch.nn import functional

from eval.hidden_mixing import ManifoldMixup, PatchUp, keep_mask, patch_up
from eval.mixing import BetaShare, InputMixing, Mixing, box_mask, box_share, cut_box, mix, soft_targets
from ssl.models.hidden import HiddenLayer, hidden_layers, replaced_output

CLASSES = 5


def batch(num: int = 6, *, side: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.manual_seed(seed)
    return torch.randn(num, 3, side, side, generator=generator), torch.arange(num) % CLASSES


def noise(*first: float, num: int = 6) -> torch.Tensor:
    """Uniform numbers whose first row is `first`."""
    numbers = torch.rand(num, 8, generator=torch.manual_seed(1))
    numbers[0, : len(first)] = torch.tensor(first)
    return numbers


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=CLASSES).eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=(16, 24), patch_size=4, embed_dim=12, depth=3, num_heads=2,
        num_classes=CLASSES, reg_tokens=2,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8, 1.0, 1.5, 2.0, 20.0])
def test_shares_have_the_quantiles_of_the_beta_distribution(alpha):
    quantile = np.unique(np.concatenate([np.linspace(0, 1, 5001)[:-1], [1e-7, 1 - 2**-24]]))
    ours = BetaShare(alpha)(torch.from_numpy(quantile)).numpy()
    np.testing.assert_allclose(ours, scipy.stats.beta.ppf(quantile, alpha, alpha), atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 0.01, 50.0])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha of a Beta distribution must lie in 0.05..20"):
        BetaShare(alpha)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smoothed_targets_are_timms_and_torchs(smoothing):
    labels = torch.tensor([3, 0, 4, 4])
    targets = soft_targets(labels, CLASSES, smoothing=smoothing)
    torch.testing.assert_close(targets, mixup_target(labels, CLASSES, lam=1.0, smoothing=smoothing))
    logits = torch.randn(4, CLASSES, generator=torch.manual_seed(0))
    ours = Mixing(num_classes=CLASSES, smoothing=smoothing).loss(logits, targets)
    torch.testing.assert_close(ours, functional.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_many_labels_are_smoothed_towards_one_half_as_timm_does():
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    ours = Mixing(num_classes=3, smoothing=0.2, multi_label=True)
    theirs = mixup_target(labels, 3, lam=1.0, smoothing=0.2, multi_label=True)
    torch.testing.assert_close(ours.soft_targets(labels), theirs)
    logits = torch.randn(2, 3, generator=torch.manual_seed(0))
    expected = functional.binary_cross_entropy_with_logits(logits, theirs)
    torch.testing.assert_close(ours.loss(logits, theirs), expected)


class FixedDraws:
    """numpy.random's functions as timm's Mixup calls them, with given shares, choices and places."""

    def __init__(self, share, *, cut, place, mode):
        self.share, self.place, self.calls = share, place, 0
        self.cuts = np.flatnonzero(cut) if mode == "elem" else [0]
        self.uniform = [np.where(cut, 0.0, 0.9), np.zeros(len(cut))]  # the switch, then whether to mix at all
        if mode == "batch":
            self.uniform.reverse()

    def rand(self, *size):
        numbers = self.uniform.pop(0)
        return numbers[: size[0]] if size else numbers[0]

    def beta(self, *_, size=None):
        return self.share[0] if size is None else self.share[:size]

    def randint(self, low, high, size=None):
        axis = self.calls % 2
        row = self.cuts[self.calls // 2]
        self.calls += 1
        return int(np.floor(self.place[row, axis] * (high - low))) + low


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("cut", [False, True])
def test_images_and_targets_are_timms_given_the_same_numbers(mode, cut, monkeypatch):
    images, labels = batch(8, side=17)
    numbers = noise(0.3, 0.1 if cut else 0.9, num=8)
    mixing = InputMixing(num_classes=CLASSES, mixup=0.8, cutmix=1.0, mode=mode, smoothing=0.1)
    alpha = np.where(numbers[:, 1] < 0.5, 1.0, 0.8)
    share = scipy.stats.beta.ppf(numbers[:, 2].double().numpy(), alpha, alpha)
    draws = FixedDraws(share, cut=(numbers[:, 1] < 0.5).numpy(), place=numbers[:, 3:5].double().numpy(), mode=mode)
    monkeypatch.setattr("timm.data.mixup.np.random", draws)
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, label_smoothing=0.1, num_classes=CLASSES)
    expected, expected_targets = theirs(images.clone(), labels)
    monkeypatch.undo()

    mixed, own = mixing.mix(images, numbers)
    torch.testing.assert_close(mixed, expected, atol=2e-6, rtol=1e-5)
    targets = mix(mixing.soft_targets(labels), own)
    torch.testing.assert_close(targets, expected_targets.float(), atol=2e-6, rtol=1e-5)
    assert (mixed != images).any()


def test_the_label_share_of_cutmix_is_exactly_the_area_that_is_left():
    share = torch.linspace(0, 0.99, 200, dtype=torch.float64)
    place = torch.rand(200, 2, generator=torch.manual_seed(0), dtype=torch.float64)
    box = cut_box(share, place, (17, 30))
    inside = box_mask(box, (17, 30))
    torch.testing.assert_close(box_share(box, (17, 30)), 1 - inside.double().mean((1, 2, 3)))
    for (top, bottom, left, right), mask in zip(box.tolist(), inside):
        expected = torch.zeros(17, 30, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(mask[0], expected)
    assert (box_share(box, (17, 30)) >= share - 1e-12).all()  # what lies beyond the edge is not cut out


def test_mixup_and_cutmix_are_switched_and_left_out_as_often_as_asked():
    images, _ = batch(4000, side=8)
    numbers = torch.rand(4000, 5, generator=torch.manual_seed(2))
    mixing = InputMixing(num_classes=CLASSES, mode="elem", probability=0.7, switch=0.25)
    mixed, own = mixing.mix(images, numbers)
    untouched = (mixed == images).flatten(1).all(1)
    cut = ((mixed == images) | (mixed == images.flip(0))).flatten(1).all(1) & ~untouched
    assert abs(untouched.float().mean() - 0.3) < 0.04  # and the few boxes without area
    assert abs(cut.float().mean() - 0.7 * 0.25) < 0.03
    assert (own[untouched] == 1).all()
    of_mixup = own[~untouched & ~cut, 0].double().numpy()
    assert scipy.stats.kstest(of_mixup, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 0.001


def test_one_draw_holds_for_a_batch_and_follows_from_its_first_image():
    images, _ = batch(5)
    mixing = InputMixing(num_classes=CLASSES, cutmix=0)
    one, own = mixing.mix(images, noise(0.1, 0.1, 0.3, num=5))
    other = noise(0.1, 0.1, 0.3, num=5)
    other[1:] = 0
    assert torch.equal(mixing.mix(images, other)[0], one)
    assert own.shape == (1, 1)
    torch.testing.assert_close(one, images * own[0, 0] + images.flip(0) * (1 - own[0, 0]))


def test_mixing_changes_the_loss_and_its_gradient(resnet):
    images, labels = batch()
    plain = Mixing(num_classes=CLASSES)(resnet, images, labels, noise())
    torch.testing.assert_close(plain.loss, functional.cross_entropy(resnet(images), labels))
    for mixing, numbers in (
        (Mixing(num_classes=CLASSES, smoothing=0.1), noise()),
        (InputMixing(num_classes=CLASSES, cutmix=0, smoothing=0), noise(0.1, 0.1, 0.4)),
        (InputMixing(num_classes=CLASSES, mixup=0, smoothing=0), noise(0.1, 0.1, 0.4)),
        (ManifoldMixup(num_classes=CLASSES), noise(0.1, 0.5, 0.4)),
        (PatchUp(num_classes=CLASSES, kind="hard"), noise(0.1, 0.5)),
        (PatchUp(num_classes=CLASSES, kind="soft"), noise(0.1, 0.5, 0.4)),
    ):
        mixed = mixing(resnet, images, labels, numbers, layers=hidden_layers(resnet))
        factor = 2 if isinstance(mixing, PatchUp) else 1  # the paper adds two terms
        assert abs(mixed.loss / factor - plain.loss) > 1e-4
        torch.testing.assert_close(mixed.targets.sum(1), torch.ones(6))
        gradient = torch.autograd.grad(mixed.loss, resnet.conv1[0].weight)[0]
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixup": 0, "cutmix": 0}, "one or both must be above 0"),
        ({"mixup": -1}, "one or both must be above 0"),
        ({"mode": "pair"}, "choose one of batch, elem"),
        ({"probability": 0.0}, "probability must lie above 0"),
        ({"switch": 1}, "mixup has no effect with switch=1"),
        ({"switch": 0}, "cutmix has no effect with switch=0"),
        ({"smoothing": 1.0}, "smoothing is the share of the label"),
    ],
)
def test_mixing_without_effect_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        InputMixing(num_classes=CLASSES, **values)


def test_the_hidden_layers_are_stages_and_blocks_in_order(resnet, vit):
    assert [layer.name for layer in hidden_layers(resnet)] == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert [layer.name for layer in hidden_layers(vit)] == ["blocks.0", "blocks.1", "blocks.2"]
    assert hidden_layers(vit)[0].num_prefix == 3
    with pytest.raises(ValueError, match="timm lists no hidden layers of Linear"):
        hidden_layers(nn.Linear(2, 2))


def test_a_replaced_output_is_what_the_next_layer_gets_and_is_put_back(resnet):
    images, _ = batch(2)
    before = resnet(images)
    stage = resnet.layer2
    with replaced_output(stage, torch.zeros_like):
        emptied = resnet(images)
    hidden = resnet.layer4(resnet.layer3(torch.zeros(2, 128, 2, 2)))
    torch.testing.assert_close(emptied, resnet.forward_head(hidden))
    assert torch.equal(resnet(images), before)
    with pytest.raises(RuntimeError, match="ran 0 times instead of once"), replaced_output(stage, torch.zeros_like):
        pass


def by_hand_resnet(model, images, layer, change):
    out = model.act1(model.bn1(model.conv1(images)))
    out = change(out) if layer == 1 else out
    out = model.maxpool(out)
    for number, stage in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), start=2):
        out = change(stage(out)) if layer == number else stage(out)
    return model.forward_head(out)


@pytest.mark.parametrize("layer", [0, 1, 2, 4])
def test_manifold_mixup_mixes_behind_the_chosen_layer(resnet, layer):
    images, labels = batch()
    mixing = ManifoldMixup(num_classes=CLASSES, alpha=2.0, layers=[layer])
    mixed = mixing(resnet, images, labels, noise(0.2, 0.7, 0.35), layers=hidden_layers(resnet))
    share = float(scipy.stats.beta.ppf(np.float32(0.35), 2, 2))

    def change(hidden):
        return torch.stack([share * hidden[i] + (1 - share) * hidden[5 - i] for i in range(6)])

    logits = resnet(change(images)) if layer == 0 else by_hand_resnet(resnet, images, layer, change)
    torch.testing.assert_close(mixed.logits, logits, atol=1e-4, rtol=1e-4)
    loss = share * functional.cross_entropy(logits, labels) + (1 - share) * functional.cross_entropy(
        logits, labels.flip(0)
    )
    torch.testing.assert_close(mixed.loss, loss, atol=1e-4, rtol=1e-4)


def test_a_hidden_layer_is_drawn_uniformly_and_as_often_as_asked():
    mixing = ManifoldMixup(num_classes=CLASSES, layers=[3, 0, 1], probability=0.8)
    numbers = torch.rand(4000, 1, 3, generator=torch.manual_seed(0))
    chosen = [mixing.choose(row) for row in numbers]
    assert abs(chosen.count(None) / 4000 - 0.2) < 0.03
    for layer in (0, 1, 3):
        assert abs(chosen.count(layer) / 4000 - 0.8 / 3) < 0.03


def test_a_layer_that_the_backbone_lacks_is_refused(resnet):
    images, labels = batch()
    with pytest.raises(ValueError, match=r"layers=\[0, 9\] are more than the backbone's 5"):
        ManifoldMixup(num_classes=CLASSES, layers=[0, 9])(resnet, images, labels, noise(), layers=hidden_layers(resnet))
    with pytest.raises(ValueError, match="layers must name one or more of 0"):
        PatchUp(num_classes=CLASSES, layers=[-1])


@pytest.mark.parametrize("block_size", [1, 3, 7])
def test_the_mask_of_patchup_is_dropblocks_by_loops(block_size):
    height, width, gamma = 9, 12, 0.2
    uniform = torch.rand(4, height, width, generator=torch.manual_seed(0))
    expected = torch.ones(4, height, width)
    chance = gamma * height * width / (block_size**2 * (height - block_size + 1) * (width - block_size + 1))
    for c in range(4):
        for y in range(height):
            for x in range(width):
                if uniform[c, y, x] < chance:
                    reach = block_size // 2
                    expected[c, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = 0
    assert torch.equal(keep_mask(uniform, gamma=gamma, block_size=block_size), expected)
    assert 0 < expected.mean() < 1


def test_patchup_changes_about_gamma_of_a_large_layer_and_fits_a_small_one():
    uniform = torch.rand(50, 40, 40, generator=torch.manual_seed(0))
    changed = 1 - keep_mask(uniform, gamma=0.3, block_size=3).mean()
    assert 0.22 < changed < 0.31  # blocks overlap
    assert keep_mask(uniform[:, :2, :5], gamma=0.5, block_size=7).shape == (50, 2, 5)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_patchup_is_the_papers_by_loops(resnet, kind):
    images, labels = batch()
    mixing = PatchUp(num_classes=CLASSES, kind=kind, gamma=0.5, block_size=3, layers=[1], probability=1.0)
    mixed = mixing(resnet, images, labels, noise(0.2, 0.7, 0.35), layers=hidden_layers(resnet))
    share = float(scipy.stats.beta.ppf(np.float32(0.35), 2, 2)) if kind == "soft" else None
    masks = []
    with replaced_output(resnet.act1, lambda hidden: masks.append(hidden) or hidden):
        resnet(images)

    # The mask is seen in a run whose layer holds the image's number: what comes from the other image is negative.
    seen = []
    sign = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])[:, None, None, None]

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, values):
            seen.append(self.layer(sign * torch.ones_like(masks[0])))
            return resnet(values)

    probe = Probe()
    hard = PatchUp(num_classes=CLASSES, kind="hard", gamma=0.5, block_size=3, layers=[1], probability=1.0)
    hard(probe, images, labels, noise(0.2, 0.7, 0.35), layers=[HiddenLayer("layer", probe.layer)])
    kept = (seen[0] * sign > 0).float()  # (B, C, h, w)
    assert torch.equal(kept, kept[:1].expand_as(kept))  # one mask for the whole batch
    unchanged = kept[0].mean()
    assert 0.3 < unchanged < 0.8

    def change(hidden):
        rows = []
        for i in range(6):
            j = 5 - i
            other = hidden[j] if share is None else share * hidden[i] + (1 - share) * hidden[j]
            rows.append(kept[0] * hidden[i] + (1 - kept[0]) * other)
        return torch.stack(rows)

    logits = by_hand_resnet(resnet, images, 1, change)
    torch.testing.assert_close(mixed.logits, logits, atol=1e-4, rtol=1e-4)
    own = functional.one_hot(labels, CLASSES).float()
    other = own.flip(0) if share is None else share * own + (1 - share) * own.flip(0)
    reweighted = unchanged * own + (1 - unchanged) * other
    expected = (
        unchanged * functional.cross_entropy(logits, own)
        + (1 - unchanged) * functional.cross_entropy(logits, other)
        + functional.cross_entropy(logits, reweighted)
    )
    torch.testing.assert_close(mixed.loss, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed.targets, reweighted)


def test_patchup_of_tokens_keeps_the_prefix_and_the_grid(vit):
    images = torch.randn(4, 3, 16, 24, generator=torch.manual_seed(0))  # 4 x 6 patches
    layer = hidden_layers(vit)[1]
    hidden = torch.randn(4, 3 + 24, 12, generator=torch.manual_seed(1))
    grid = layer.to_grid(hidden, images)
    assert grid.shape == (4, 12, 4, 6)
    assert torch.equal(grid[1, :, 2, 3], hidden[1, 3 + 2 * 6 + 3])
    assert torch.equal(layer.from_grid(grid, hidden), hidden)
    mask = torch.ones(12, 4, 6)
    mask[:, :2] = 0
    mixed = layer.from_grid(patch_up(grid, mask, share=None), hidden)
    expected = hidden.clone()
    expected[:, 3 : 3 + 12] = hidden.flip(0)[:, 3 : 3 + 12]
    assert torch.equal(mixed, expected)
    labels = torch.arange(4)
    out = PatchUp(num_classes=CLASSES, layers=[2])(
        vit, images, labels, noise(0.1, 0.5, num=4), layers=hidden_layers(vit)
    )
    assert (out.logits - vit(images)).abs().max() > 1e-4


def test_layers_with_channels_last_are_taken_as_maps():
    layer = HiddenLayer("stage", nn.Identity(), channels_last=True)
    hidden, images = torch.randn(2, 3, 5, 4), torch.zeros(2, 3, 12, 20)
    grid = layer.to_grid(hidden, images)
    assert grid.shape == (2, 4, 3, 5)
    assert torch.equal(layer.from_grid(grid, hidden), hidden)


def test_patchup_on_the_image_is_cutmix(resnet):
    images, labels = batch()
    numbers = noise(0.1, 0.5, 0.4, 0.9, 0.9, 0.3, 0.6)
    mixing = PatchUp(num_classes=CLASSES, layers=[0])
    mixed = mixing(resnet, images, labels, numbers, layers=hidden_layers(resnet))
    box = cut_box(numbers[:1, 2].double(), numbers[:1, 5:7].double(), (16, 16))[0].tolist()  # Beta(1, 1) is uniform
    cut = images.clone()
    cut[:, :, box[0] : box[1], box[2] : box[3]] = images.flip(0)[:, :, box[0] : box[1], box[2] : box[3]]
    torch.testing.assert_close(mixed.logits, resnet(cut), atol=1e-5, rtol=1e-5)
    area = (box[1] - box[0]) * (box[3] - box[2]) / 256
    assert 0 < area < 1
    own = functional.one_hot(labels, CLASSES).float()
    torch.testing.assert_close(mixed.targets, (1 - area) * own + area * own.flip(0))
    torch.testing.assert_close(mixed.loss, 2 * functional.cross_entropy(mixed.logits, mixed.targets))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "medium"}, "choose one of hard, soft"),
        ({"gamma": 0.0}, "gamma must lie above 0"),
        ({"block_size": 4}, "block_size must be odd"),
        ({"probability": 1.5}, "probability must lie above 0"),
    ],
)
def test_impossible_patchup_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PatchUp(num_classes=CLASSES, **values)
