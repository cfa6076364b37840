"""Relative location against slow loops: where patches lie, what they show, which pairs are compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl import distributed
from ssl.methods.relative_location import (
    PLACES,
    RelativeLocation,
    cut,
    default_grid,
    default_patch,
    gaussian_noise,
)
from ssl.models.backbones import build_backbone, pooled_features

TINY_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
TINY_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}


def make_method(
    kind: str = "resnet", *, image_size: tuple[int, int] = (32, 32), in_chans: int = 3, **options
) -> RelativeLocation:
    torch.manual_seed(0)
    name, args = ("vit_tiny_patch16_224", TINY_VIT) if kind == "vit" else ("resnet18", TINY_RESNET)
    backbone, _ = build_backbone(name, image_size=image_size, in_chans=in_chans, model_args=args, stem="auto")
    return RelativeLocation(backbone, image_size=image_size, in_chans=in_chans, **{"hidden_dim": 32, **options})


def make_batch(method: RelativeLocation, num_images: int = 4, in_chans: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    view = torch.randn(num_images, in_chans, *method.view_size, generator=generator)
    return {"views": [view], "noise": torch.rand(num_images, method.num_noise, generator=generator)}


def patches_by_loop(method: RelativeLocation, batch: dict) -> Tensor:
    """The nine patches of every image, placed by arithmetic on one number at a time."""
    (height, width), (rows, columns) = method.patch_size, method.cell_size
    images = []
    for image, noise in zip(batch["views"][0], batch["noise"].tolist()):
        patches = []
        for cell in range(9):
            top = cell // 3 * rows + int(noise[2 * cell] * (rows - height + 1))
            left = cell % 3 * columns + int(noise[2 * cell + 1] * (columns - width + 1))
            patches.append(image[:, top : top + height, left : left + width])
        images.append(torch.stack(patches))
    return torch.stack(images)


@pytest.mark.parametrize("image_size", [(32, 32), (47, 63), (224, 160)])
def test_patches_lie_where_the_noise_says(image_size: tuple[int, int]) -> None:
    method = make_method(image_size=image_size)
    batch = make_batch(method)
    patches = cut(batch["views"][0], method.corners(batch["noise"]), method.patch_size)
    assert torch.equal(patches, patches_by_loop(method, batch))


@pytest.mark.parametrize("jitter", [None, 0, 1])
@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_no_patch_leaves_its_cell_and_jitter_keeps_the_gap(extreme: float, jitter: int | None) -> None:
    method = make_method(image_size=(40, 62), patch_size=8, jitter=jitter)
    corners = method.corners(torch.full((1, 18), extreme))[0]
    for cell, corner in enumerate(corners.tolist()):
        for axis, size in enumerate(method.cell_size):
            offset = corner[axis] - (cell // 3, cell % 3)[axis] * size
            margin = 0 if jitter is None else (size - 8 - 2 * jitter) // 2
            assert margin <= offset
            assert offset + 8 <= size - margin
            assert offset == margin or extreme > 0


def test_every_offset_is_about_equally_frequent() -> None:
    method = make_method(grid_size=33, patch_size=8)
    noise = torch.rand(4000, 18, generator=torch.Generator().manual_seed(0))
    offset = method.corners(noise)[:, 0]
    assert torch.bincount(offset[:, 0], minlength=4).sub(1000).abs().max() < 120
    assert torch.bincount(offset[:, 1], minlength=4).sub(1000).abs().max() < 120


def test_patch_i_comes_from_cell_i() -> None:
    method = make_method(grid_size=33, patch_size=8, colour="none", standardise=False)
    value = torch.arange(9.0).view(3, 3).repeat_interleave(11, 0).repeat_interleave(11, 1)
    batch = make_batch(method, 5)
    patches = cut(value.expand(5, 3, 33, 33), method.corners(batch["noise"]), (8, 8))
    assert torch.equal(patches, torch.arange(9.0).view(1, 9, 1, 1, 1).expand(5, 9, 3, 8, 8))


class MeanColour(nn.Module):
    """A backbone whose features are the patch's mean colour."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward_features(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((-2, -1))


def test_labels_are_the_eight_places_row_by_row() -> None:
    # Red tells a cell's row and green its column, so a head that reads the neighbour's colour knows its place.
    method = RelativeLocation(
        MeanColour(), grid_size=30, patch_size=8, colour="none", standardise=False, image_size=(30, 30)
    ).eval()
    place = torch.arange(3.0).repeat_interleave(10)
    view = torch.zeros(2, 3, 30, 30)
    view[:, 0], view[:, 1] = place[:, None], place

    def told_by_colour(neighbours: Tensor, centre: Tensor) -> Tensor:
        names = [["top left", "top", "top right"], ["left", "", "right"], ["bottom left", "bottom", "bottom right"]]
        assert torch.allclose(centre[:, :2], torch.ones(2, 2))
        found = [[names[round(r)][round(c)] for r, c, _ in image] for image in neighbours.tolist()]
        return F.one_hot(torch.tensor([[PLACES.index(name) for name in image] for image in found]), 8) * 50.0

    method.classifier.forward = told_by_colour
    output = method({"views": [view], "noise": torch.rand(2, 18)})
    assert output["accuracy"] == 1
    assert output["loss"] < 1e-6


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_loss_equals_a_loop_over_pairs(kind: str) -> None:
    method = make_method(kind, colour="none").eval()
    batch = make_batch(method)
    patches = patches_by_loop(method, batch)
    classifier, losses, hits = method.classifier, [], []
    for image in patches:
        image = torch.stack([(patch - patch.mean()) / patch.std(correction=0) for patch in image])
        for label, cell in enumerate([0, 1, 2, 3, 5, 6, 7, 8]):
            neighbour = pooled_features(method.backbone, image[cell : cell + 1])
            centre = pooled_features(method.backbone, image[4:5])
            hidden = F.relu(classifier.norm(classifier.pair(torch.cat([neighbour, centre], 1))))
            score = classifier.places(hidden)
            losses.append(F.cross_entropy(score, torch.tensor([label])))
            hits.append(float(score.argmax() == label))
    output = method(batch)
    torch.testing.assert_close(output["loss"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    assert output["accuracy"].item() == pytest.approx(sum(hits) / len(hits))
    assert not output["accuracy"].requires_grad


def test_each_patch_is_encoded_once() -> None:
    method = make_method()
    seen: list[int] = []
    method.backbone.conv1.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    method(make_batch(method, 3))
    assert seen == [27]


def test_gray_is_drawn_for_each_patch() -> None:
    method = make_method(colour="gray", standardise=False)
    batch = make_batch(method, 50)
    before = patches_by_loop(method, batch)
    after = method.prepare(before, batch["noise"])
    is_gray = (after == after[:, :, :1]).flatten(2).all(2)
    assert torch.equal(is_gray, batch["noise"][:, 18:27] < 0.66)
    assert torch.equal(after[~is_gray], before[~is_gray])
    red, green, blue = before[is_gray].unbind(1)
    torch.testing.assert_close(after[is_gray][:, 0], 0.299 * red + 0.587 * green + 0.114 * blue)
    assert 0.6 < is_gray.float().mean() < 0.72
    assert len({tuple(row) for row in is_gray.tolist()}) > 40


def test_dropped_channels_are_faint_noise_around_zero() -> None:
    method = make_method(colour="drop", standardise=False, image_size=(96, 96))
    batch = make_batch(method, 30)
    before = patches_by_loop(method, batch)
    after = method.prepare(before, batch["noise"])
    kept = (batch["noise"][:, 18:27] * 3).long()
    assert set(kept.flatten().tolist()) == {0, 1, 2}
    for image in range(30):
        for cell in range(9):
            channel = int(kept[image, cell])
            assert torch.equal(after[image, cell, channel], before[image, cell, channel])
            others = [c for c in range(3) if c != channel]
            ratio = after[image, cell, others].std() / before[image, cell, channel].std()
            assert 0.009 < ratio < 0.011
            assert after[image, cell, others].mean().abs() < 1e-3
    assert torch.equal(after, method.prepare(before, batch["noise"]))
    assert torch.equal(after[3:5], method.prepare(before[3:5], batch["noise"][3:5]))


def test_gaussian_noise_is_gaussian_and_differs_between_images() -> None:
    seed = torch.tensor([0.0, 1 / 2**24, 0.5, 1 - 1 / 2**24])
    noise = gaussian_noise(seed, torch.Size([9, 3, 40, 40])).double()
    assert noise.mean((1, 2, 3, 4)).abs().max() < 0.02
    assert (noise.std((1, 2, 3, 4)) - 1).abs().max() < 0.02
    assert (noise.pow(4).mean((1, 2, 3, 4)) - 3).abs().max() < 0.2
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(4)
    assert correlation.abs().max() < 0.02
    flat = noise.flatten(1)
    assert (flat[:, 1:] * flat[:, :-1]).mean(1).abs().max() < 0.02


@pytest.mark.parametrize("colour", ["gray", "drop", "none"])
def test_standardised_patches_have_mean_0_and_deviation_1(colour: str) -> None:
    method = make_method(colour=colour)
    batch = make_batch(method)
    batch["views"][0] = batch["views"][0] * 5 + 7
    patches = method.prepare(patches_by_loop(method, batch), batch["noise"])
    torch.testing.assert_close(patches.mean((2, 3, 4)), torch.zeros(4, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.std((2, 3, 4), correction=0), torch.ones(4, 9), atol=1e-5, rtol=0)


def test_flat_patches_stay_flat_and_finite() -> None:
    method = make_method(colour="drop")
    output = method.prepare(torch.full((2, 9, 3, 8, 8), 0.3), torch.rand(2, 28))
    assert torch.isfinite(output).all()
    no_colour = make_method(colour="none").prepare(torch.full((2, 9, 3, 8, 8), 0.3), torch.rand(2, 18))
    assert no_colour.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("image_size", "grid", "patch", "patch_in_tokens"),
    [
        ((224, 224), (255, 255), (64, 64), ((16, 16), (64, 64))),
        ((128, 192), (144, 216), (36, 54), ((16, 16), (32, 48))),
        ((96, 96), (96, 96), (24, 24), ((8, 8), (24, 24))),
        ((32, 32), (30, 30), (8, 8), ((4, 4), (8, 8))),
    ],
)
def test_default_sizes(image_size, grid, patch, patch_in_tokens) -> None:
    assert default_grid(image_size) == grid
    assert default_patch(grid) == patch
    tokens, expected = patch_in_tokens
    assert default_patch(grid, tokens) == expected
    assert RelativeLocation.stem_size(image_size) == min(patch)
    assert RelativeLocation.stem_size(image_size, patch_size=20, colour="gray") == 20


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize(("image_size", "in_chans"), [((32, 48), 1), ((64, 32), 5), ((128, 128), 3)])
def test_images_need_not_be_square_nor_have_three_channels(kind, image_size, in_chans) -> None:
    method = make_method(kind, image_size=image_size, in_chans=in_chans)
    assert torch.isfinite(method(make_batch(method, 3, in_chans))["loss"])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_gradient_reaches_every_parameter(kind: str) -> None:
    method = make_method(kind)
    for module in method.modules():  # timm starts the last BatchNorm of a residual block at 0, which stops gradients
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    method(make_batch(method, 8))["loss"].backward()
    assert [n for n, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_few_steps_learn_an_easy_set(kind: str) -> None:
    method = make_method(kind, dropout=0.0)
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(3, 10, 10, generator=generator).repeat_interleave(3, 1).repeat_interleave(3, 2)
    outputs = []
    for _ in range(40):
        view = pattern + 0.05 * torch.randn(8, 3, 30, 30, generator=generator)
        output = method({"views": [view], "noise": torch.rand(8, method.num_noise, generator=generator)})
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        outputs.append(output)
    assert outputs[0]["accuracy"] < 0.3  # chance is 0.125
    assert outputs[-1]["accuracy"] > 0.55


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit cells of 10 pixels"):
        make_method(patch_size=11)
    with pytest.raises(ValueError, match="out of their cells"):
        make_method(patch_size=8, jitter=2)
    with pytest.raises(ValueError, match=r"tokens of 4x4 pixels"):
        make_method("vit", patch_size=10)
    with pytest.raises(ValueError, match="one of auto, gray, drop, none"):
        make_method(colour="grey")
    with pytest.raises(ValueError, match="changes nothing in images of one channel"):
        make_method(colour="gray", in_chans=1)
    with pytest.raises(ValueError, match="gray_probability"):
        make_method(gray_probability=66)
    with pytest.raises(ValueError, match="one view"):
        make_method()({"views": [torch.zeros(2, 3, 30, 30)] * 2, "noise": torch.rand(2, 27)})
    torch.manual_seed(0)
    wide_tokens, _ = build_backbone("vit_tiny_patch16_224", image_size=(32, 32), patch_size=16, model_args=TINY_VIT)
    with pytest.raises(ValueError, match="too small for the backbone's tokens"):
        RelativeLocation(wide_tokens, image_size=(32, 32))
    strict = {"strict_img_size": True}
    windows, _ = build_backbone("swin_tiny_patch4_window7_224", image_size=(224, 224), model_args=strict)
    with pytest.raises(ValueError, match=r"patches of 64x64 pixels, which SwinTransformer cannot take"):
        RelativeLocation(windows, image_size=(224, 224))


def _ddp_step(kind: str, batch: dict) -> tuple[float, dict[str, Tensor]]:
    method = make_method(kind, dropout=0.0).double()
    parallel = nn.parallel.DistributedDataParallel(distributed.sync_batchnorm(method))
    rank, world_size = distributed.rank(), distributed.world_size()
    share = {"views": [batch["views"][0].chunk(world_size)[rank]], "noise": batch["noise"].chunk(world_size)[rank]}
    loss = parallel(share)["loss"]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_two_ranks_give_one_ranks_loss_and_gradient(kind: str, two_ranks) -> None:
    method = make_method(kind, dropout=0.0).double()
    batch = make_batch(method, 6)
    batch["views"] = [batch["views"][0].double()]
    loss = method(batch)["loss"]
    loss.backward()
    results = two_ranks.run(_ddp_step, kind, batch)
    assert sum(other for other, _ in results) / 2 == pytest.approx(loss.item(), abs=1e-6)
    for _, gradients in results:
        for name, parameter in method.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
