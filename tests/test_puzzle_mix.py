"""PuzzleMix: its cut against brute force, its energy against the paper's sums, its transport against loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from eval.puzzle_mix import (
    PuzzleMix,
    border_distances,
    cut_grid,
    fitting_blocks,
    grid_costs,
    masked_transport,
    move_blocks,
    saliency,
    share_prior,
)

CLASSES = 4


def energy(labels, unary, down, across) -> float:
    rows, columns, num_labels = unary.shape
    total = sum(unary[r, c, labels[r, c]] for r in range(rows) for c in range(columns))
    for r, c in itertools.product(range(rows), range(columns)):
        if r + 1 < rows:
            total += down[r, c] * ((labels[r, c] - labels[r + 1, c]) / (num_labels - 1)) ** 2
        if c + 1 < columns:
            total += across[r, c] * ((labels[r, c] - labels[r, c + 1]) / (num_labels - 1)) ** 2
    return total


@pytest.mark.parametrize(("rows", "columns", "num_labels"), [(3, 3, 2), (2, 3, 3), (3, 2, 4), (1, 4, 5), (2, 2, 2)])
@pytest.mark.parametrize("weight", [0.0, 0.3, 3.0])
def test_the_cut_is_the_best_of_all_masks(rows, columns, num_labels, weight):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        unary = rng.normal(size=(rows, columns, num_labels))
        down, across = weight * rng.random((rows - 1, columns)), weight * rng.random((rows, columns - 1))
        labels = cut_grid(unary, down, across)
        every = itertools.product(range(num_labels), repeat=rows * columns)
        best = min(energy(np.reshape(other, (rows, columns)), unary, down, across) for other in every)
        assert energy(labels, unary, down, across) == pytest.approx(best, abs=1e-6)


def test_a_large_cut_is_better_than_every_change_of_one_block():
    rng = np.random.default_rng(0)
    unary, down, across = rng.random((16, 16, 3)), rng.random((15, 16)), rng.random((16, 15))
    labels = cut_grid(unary, down, across)
    assert len(np.unique(labels)) == 3
    best = energy(labels, unary, down, across)
    for r, c, label in itertools.product(range(16), range(16), range(3)):
        other = labels.copy()
        other[r, c] = label
        assert energy(other, unary, down, across) >= best - 1e-6


def made(num: int = 4, *, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.manual_seed(0)
    return torch.randn(num, 3, side, side, generator=generator), torch.rand(num, side, side, generator=generator)


def test_border_distances_are_means_over_the_cells_that_touch():
    images, _ = made()
    down, right = border_distances(images, num_blocks=3, neighbours=2)
    assert down.shape == (4, 2, 2, 2, 3)
    assert right.shape == (4, 2, 2, 3, 2)
    cells = functional.avg_pool2d(images, 2)  # (4, 3, 6, 6)
    for i, z, w in itertools.product(range(4), range(2), range(2)):
        one, two = (cells[i] if which else cells[3 - i] for which in (z, w))
        for r, c in itertools.product(range(2), range(3)):
            touching = [(one[:, 2 * r + 1, x] - two[:, 2 * r + 2, x]).abs().mean() for x in (2 * c, 2 * c + 1)]
            assert down[i, z, w, r, c] == pytest.approx(float(sum(touching) / 2), abs=1e-5)
            touching = [(one[:, y, 2 * r + 1] - two[:, y, 2 * r + 2]).abs().mean() for y in (2 * c, 2 * c + 1)]
            assert right[i, z, w, c, r] == pytest.approx(float(sum(touching) / 2), abs=1e-5)


def test_cells_are_cut_to_what_divides_a_block():
    images, _ = made(2, side=14)
    one, other = (border_distances(images, num_blocks=2, neighbours=size) for size in (4, 1))
    assert torch.equal(one[0], other[0])  # blocks of 7 pixels have cells of 1 or 7


def test_the_energy_of_a_mask_of_two_values_is_the_papers_sum():
    images, salient = made(2)
    salient = functional.avg_pool2d(salient[:, None], 4)[:, 0].double()
    salient = salient / salient.sum((1, 2), keepdim=True)
    borders = border_distances(images.double(), num_blocks=3, neighbours=2)
    prior = 0.1 * share_prior(0.3, 2) / 9
    label_cost, data_cost = 0.9, 0.3
    unary, down, across = grid_costs(salient, borders, label_cost=label_cost, data_cost=data_cost, prior=prior)
    assert (down > 0).all()
    assert (across > 0).all()
    differences = []
    for labels in itertools.product(range(2), repeat=9):
        z = 1 - np.reshape(labels, (3, 3))  # the mask: 1 shows the image's own block
        expected = 0.0
        for r, c in itertools.product(range(3), range(3)):
            expected -= float(salient[0 if z[r, c] else 1, r, c])  # what is shown counts, of either image
            expected -= 0.1 / 9 * math.log((0.3 if z[r, c] else 0.7) + 1e-8)
            if r < 2:
                expected += label_cost * (z[r, c] != z[r + 1, c])
                expected += data_cost * float(borders[0][0, z[r, c], z[r + 1, c], r, c])
            if c < 2:
                expected += label_cost * (z[r, c] != z[r, c + 1])
                expected += data_cost * float(borders[1][0, z[r, c], z[r, c + 1], r, c])
        ours = energy(np.reshape(labels, (3, 3)), unary[0].numpy(), down[0].numpy(), across[0].numpy())
        differences.append(ours - expected)
    assert np.ptp(differences) < 1e-6


def test_the_prior_is_the_binomial_distribution():
    chances = torch.exp(-share_prior(0.7, 3))
    torch.testing.assert_close(chances, torch.tensor([0.49, 0.42, 0.09], dtype=torch.float64), atol=1e-6, rtol=0)


def transport_costs(salient, mask, cost: float) -> np.ndarray:
    side = len(mask)
    costs = np.zeros((side**2, side**2))
    for i, j in itertools.product(range(side**2), repeat=2):
        distance = ((i // side - j // side) ** 2 + (i % side - j % side) ** 2) / (side - 1) ** 2
        costs[i, j] = cost * distance - float(salient.flatten()[i]) * float(mask.flatten()[j] > 0)
    return costs


def papers_iteration(costs: np.ndarray) -> list[int]:
    """Each block asks for its best place, the place keeps the best block that asks, the others ask on."""
    refused = np.zeros_like(costs)
    while True:
        wanted = np.argmin(costs + refused, axis=1)
        kept = {place: min(np.flatnonzero(wanted == place), key=lambda i: costs[i, place]) for place in set(wanted)}
        lost = [i for i, place in enumerate(wanted) if kept[place] != i]
        if not lost:
            return wanted.tolist()
        refused[lost, wanted[lost]] = np.inf


@pytest.mark.parametrize("cost", [0.001, 0.02, 0.8])
@pytest.mark.parametrize("side", [2, 4])
def test_the_transport_is_the_cheapest_permutation(cost, side):
    rng = np.random.default_rng(0)
    salient = torch.from_numpy(rng.random((5, side, side)) ** 3)
    salient = salient / salient.sum((1, 2), keepdim=True)
    mask = torch.from_numpy(rng.integers(0, 3, (5, side, side)) / 2)
    plan = masked_transport(salient, mask, cost=cost)
    assert (plan.sort(1).values == torch.arange(side**2)).all()  # every place is taken once
    for image in range(5):
        costs = transport_costs(salient[image], mask[image], cost)
        rows = np.arange(side**2)
        total = costs[rows, plan[image].numpy()].sum()
        if side == 2:
            best = min(costs[rows, list(order)].sum() for order in itertools.permutations(range(4)))
            assert total == pytest.approx(best)
        else:
            assert total <= min(costs.trace(), costs[rows, papers_iteration(costs)].sum()) + 1e-12


def test_a_salient_block_moves_to_where_the_mask_is_open():
    salient, mask = torch.full((1, 4, 4), 0.001), torch.zeros(1, 4, 4)
    salient[0, 0, 0], mask[0, 0, 1] = 1.0, 1.0
    assert masked_transport(salient, mask, cost=0.8)[0, 0] == 1
    assert masked_transport(salient, mask, cost=1e4)[0].tolist() == list(range(16))


def test_blocks_are_moved_whole():
    images = torch.randn(2, 3, 12, 12, generator=torch.manual_seed(0))
    plan = torch.stack([torch.randperm(9, generator=torch.manual_seed(seed)) for seed in range(2)])
    moved = move_blocks(images, plan)
    for image, block in itertools.product(range(2), range(9)):
        (r, c), (y, x) = divmod(block, 3), divmod(int(plan[image, block]), 3)
        expected = images[image, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
        assert torch.equal(moved[image, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4], expected)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=CLASSES)


def test_saliency_is_the_gradient_of_each_images_loss_and_leaves_no_trace(resnet):
    images, _ = made(side=16)
    labels = torch.arange(4)
    resnet.train()
    resnet.layer1.eval()  # as a frozen stage is
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    ours = saliency(resnet, images, lambda values: functional.cross_entropy(resnet(values), labels))
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())
    assert all(parameter.grad is None for parameter in resnet.parameters())
    assert resnet.training
    assert resnet.layer2.training
    assert not resnet.layer1.training
    assert not any(module.training for module in resnet.layer1.modules())
    resnet.eval()
    for i in range(4):
        image = images[i : i + 1].clone().requires_grad_()
        functional.cross_entropy(resnet(image), labels[i : i + 1]).backward()
        torch.testing.assert_close(ours[i], image.grad[0].square().mean(0).sqrt(), atol=1e-5, rtol=1e-4)
    resnet.zero_grad(set_to_none=True)


STD = (0.2, 0.25, 0.3)


@pytest.mark.parametrize("transport", [None, 0.8])
def test_mixed_images_are_blocks_of_both_and_labels_have_the_masks_share(transport):
    images, salient = made(6, side=16)
    mixing = PuzzleMix(num_classes=CLASSES, transport=transport, num_labels=2)
    mixed, own = mixing.mix(images, salient, std=STD, num_blocks=4, share=0.5)
    for i in range(6):
        blocks = [functional.unfold(x[None], 4, stride=4)[0].T for x in (mixed[i], images[i], images[5 - i])]
        from_own = (blocks[0][:, None] == blocks[1][None]).all(2)  # (16, 16): place, block
        from_other = (blocks[0][:, None] == blocks[2][None]).all(2)
        assert (from_own.any(1) ^ from_other.any(1)).all()
        assert from_own.any(1).float().mean() == pytest.approx(float(own[i]))
        if transport is None:
            assert (from_own | from_other).diagonal().all()
    assert 0 < own.mean() < 1


def test_masks_show_what_is_salient_in_each():
    images, salient = torch.zeros(2, 3, 16, 16), torch.full((2, 16, 16), 0.01)
    salient[0, :, :8], salient[1, :, 8:] = 1.0, 1.0
    images[0], images[1] = 1.0, -1.0
    mixing = PuzzleMix(num_classes=CLASSES, transport=None)
    mixed, own = mixing.mix(images, salient, std=STD, num_blocks=4, share=0.5)
    assert (mixed[0, :, :, :8] == 1).all()
    assert (mixed[0, :, :, 8:] == -1).all()
    assert torch.equal(own, torch.tensor([0.5, 0.5]))
    assert (mixed[1] == mixed[0]).all()  # of the pair, each keeps its own half


def test_the_share_that_is_aimed_at_moves_the_masks():
    images, salient = made(8, side=16)
    mixing = PuzzleMix(num_classes=CLASSES)
    shares = [
        float(mixing.mix(images, salient, std=STD, num_blocks=4, share=share)[1].mean()) for share in (0.01, 0.5, 0.99)
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert shares[2] > 0.7


@pytest.mark.parametrize(
    "values",
    [{"num_labels": 2}, {"label_smoothness": 0.2}, {"data_smoothness": 0.0}, {"prior": 1.0}, {"neighbours": 1}],
)
def test_each_weight_of_the_energy_changes_the_mask(values):
    images, salient = made(8, side=16)
    arguments = {"std": STD, "num_blocks": 8, "share": 0.4}
    plain = PuzzleMix(num_classes=CLASSES).mix(images, salient, **arguments)[0]
    assert not torch.equal(PuzzleMix(num_classes=CLASSES, **values).mix(images, salient, **arguments)[0], plain)


@pytest.mark.parametrize("cost", [None, 0.1])
def test_transport_shows_a_salient_block_that_the_other_image_would_cover(cost):
    images, _ = made(2, side=16)
    salient = torch.full((2, 16, 16), 0.05)
    salient[0, :, :8], salient[1, :, 8:] = 1.0, 1.0  # the first image is shown on the left
    salient[0, 4:8, 8:12], salient[1, 4:8, 8:12] = 2.0, 4.0  # both have something just right of the middle
    mixed, own = PuzzleMix(num_classes=CLASSES, transport=cost).mix(images, salient, std=STD, num_blocks=4, share=0.5)
    assert own[0] == 0.5
    assert torch.equal(mixed[0, :, 4:8, 8:12], images[1, :, 4:8, 8:12])
    moved = torch.equal(mixed[0, :, 4:8, 4:8], images[0, :, 4:8, 8:12])  # one block to the left, where it is seen
    assert moved == (cost is not None)


def test_puzzlemix_trains_on_soft_labels_of_its_masks(resnet):
    images, _ = made(6, side=32)
    labels, noise = torch.arange(6) % CLASSES, torch.rand(6, 2, generator=torch.manual_seed(0))
    resnet.train()
    mixing = PuzzleMix(num_classes=CLASSES, smoothing=0.1)
    one, two = (mixing(resnet, images, labels, noise, model=resnet, std=STD) for _ in range(2))
    assert torch.equal(one.targets, two.targets)
    torch.testing.assert_close(one.loss, functional.cross_entropy(one.logits, one.targets))
    torch.testing.assert_close(one.targets.sum(1), torch.ones(6))
    one.loss.backward()
    assert resnet.conv1[0].weight.grad.abs().sum() > 0
    other = mixing(resnet, images, labels, torch.rand(6, 2, generator=torch.manual_seed(3)), model=resnet, std=STD)
    assert not torch.equal(other.targets, one.targets)


def test_what_puzzlemix_cannot_do_is_refused(resnet):
    images, _ = made(side=16)
    assert fitting_blocks((32, 32)) == [2, 4, 8, 16]
    assert fitting_blocks((28, 28)) == [2, 4]
    for size in ((16, 32), (15, 15)):
        with pytest.raises(ValueError, match="needs square images"):
            fitting_blocks(size)
    with pytest.raises(ValueError, match="the std of each of the images' channels"):
        PuzzleMix(num_classes=CLASSES)(resnet, images, torch.arange(4), torch.rand(4, 2))
    for values, message in (
        ({"num_labels": 1}, "num_labels must be 2 or more"),
        ({"prior": -1.0}, "must be 0 or more"),
        ({"label_smoothness": 0.0}, "data_smoothness is a factor of label_smoothness"),
    ):
        with pytest.raises(ValueError, match=message):
            PuzzleMix(num_classes=CLASSES, **values)
