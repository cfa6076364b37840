"""The grid of linear heads against scikit-learn, against heads trained one at a time, and its honesty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from eval.heads import Heads, HeadScores, Standardizer, choose, score_heads, train_heads
from eval.lbfgs import solve_heads
from eval.probe import Grid, hold_out, select
from eval.scores import headline

SHORT = {"steps": 200, "batch_size": 128}


def made(num: int, *, num_classes: int = 4, dim: int = 24, seed: int = 0):
    """Overlapping classes seen through a random layer: correlated features of very different sizes."""
    problem = torch.Generator().manual_seed(99)
    centres = torch.randn(num_classes, 6, generator=problem)
    mixing = torch.randn(6, dim, generator=problem) * torch.logspace(0, 2, dim)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    hidden = centres[labels] + torch.randn(num, 6, generator=generator)
    noise = 0.3 * torch.randn(num, dim, generator=generator) * torch.logspace(0, 2, dim)
    return (hidden @ mixing).relu() + noise + 5.0, labels


def multi_hot(num: int, *, num_classes: int = 3, dim: int = 12, seed: int = 0):
    """Each class is there or not by itself, and shows in the features as a direction under noise."""
    directions = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(num, num_classes, generator=generator) < torch.tensor([0.5, 0.3, 0.1])).long()
    return labels.float() @ directions + torch.randn(num, dim, generator=generator), labels


def top1(selection, features, labels) -> float:
    return headline(selection.logits(features), labels, multi_label=False)["top1"]


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_reaches_the_accuracy_of_logistic_regression(solver):
    train, train_labels = made(1500)
    test, test_labels = made(2000, seed=1)
    grid = Grid(steps=600) if solver == "sgd" else Grid("lbfgs", weight_decay=(1e-4, 1e-3, 1e-2, 1e-1))
    selection = select([train], train_labels, held_out=[torch.arange(150)], num_classes=4, grid=grid)
    standardize = Standardizer.fit(train)
    x, xt = standardize(train).numpy(), standardize(test).numpy()
    best = max(
        LogisticRegression(C=c, max_iter=500).fit(x, train_labels.numpy()).score(xt, test_labels.numpy())
        for c in (1e-3, 1e-2, 1e-1, 1.0)
    )
    assert top1(selection, test, test_labels) == pytest.approx(best, abs=0.012)
    assert best > 0.6


def test_the_gradient_is_that_of_cross_entropy_and_weight_decay():
    features, labels = made(32)
    features = Standardizer.fit(features)(features)
    heads = train_heads(features, labels, lr=[0.1], weight_decay=[0.01], num_classes=4, steps=3, batch_size=32, seed=0)
    weight = torch.zeros(24, 4, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": 0.01}, {"params": [bias]}], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(features @ weight + bias, labels).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(heads.weight, weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(heads.bias, bias.detach(), rtol=1e-4, atol=1e-6)


def test_a_grid_trained_at_once_equals_heads_trained_one_at_a_time():
    features, labels = made(300)
    features = Standardizer.fit(features)(features)
    lr, decay = [0.01, 0.1, 0.03], [0.0, 1e-3, 0.1]
    setting = {"num_classes": 4, "seed": 3, "steps": 60, "batch_size": 64}
    together = train_heads(features, labels, lr=lr, weight_decay=decay, **setting)
    for head in range(3):
        alone = train_heads(features, labels, lr=[lr[head]], weight_decay=[decay[head]], **setting)
        torch.testing.assert_close(together.only(head).weight, alone.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.only(head).bias, alone.bias, rtol=1e-4, atol=1e-5)


def test_a_head_that_diverges_leaves_the_others_as_they_are():
    features, labels = made(300)
    features = Standardizer.fit(features)(features) * 100
    setting = {"num_classes": 4, "seed": 0, "steps": 300, "batch_size": 64}
    together = train_heads(features, labels, lr=[1e-5, 1e30], weight_decay=[0.0, 1.0], **setting)
    alone = train_heads(features, labels, lr=[1e-5], weight_decay=[0.0], **setting)
    scores = score_heads(together, features, labels)
    assert scores.finite.tolist() == [True, False]
    torch.testing.assert_close(together.only(0).weight, alone.weight, rtol=1e-4, atol=1e-6)
    assert choose(scores, num_images=300) == 0


def test_a_diverged_head_is_null_in_the_grid_and_never_chosen():
    train, labels = made(200)
    grid = Grid(lr=[0.01, 1e35], weight_decay=[1.0], **SHORT)
    selection = select([train], labels, held_out=[torch.arange(40)], num_classes=4, grid=grid)
    assert selection.grid[1]["held_out_top1"] is None
    assert selection.choice["lr"] == 0.01
    assert any("1 of the 2 heads diverged" in note for note in selection.notes)


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_the_grid_never_sees_the_held_out_images(solver):
    train, labels = made(300)
    garbled = train.clone()
    garbled[:50] = 1e6  # would move the statistics and the heads
    grid = Grid(solver, lr=[0.01], weight_decay=[0.1], **SHORT)
    setting = {"held_out": [torch.arange(50)], "num_classes": 4, "retrain": False, "grid": grid}
    test, _ = made(100, seed=1)
    first, second = select([train], labels, **setting), select([garbled], labels, **setting)
    assert torch.equal(first.logits(test), second.logits(test))
    assert first.grid != second.grid


def test_retraining_uses_the_held_out_images_too():
    train, labels = made(300)
    setting = {"held_out": [torch.arange(50)], "num_classes": 4, "grid": Grid(lr=[0.01], weight_decay=[0.1], **SHORT)}
    standardize = Standardizer.fit(train)
    alone = train_heads(
        train, labels, lr=[0.01], weight_decay=[0.1], num_classes=4, seed=0, standardize=standardize, **SHORT
    )
    torch.testing.assert_close(select([train], labels, **setting).head.weight, alone.weight)
    assert not torch.allclose(select([train], labels, **setting, retrain=False).head.weight, alone.weight)


def test_each_fold_is_scored_by_heads_that_did_not_see_it():
    train, labels = made(200)
    groups = [torch.arange(0, 200, 3), torch.arange(1, 200, 3), torch.arange(2, 200, 3)]
    grid = Grid(lr=[0.03], weight_decay=[0.1], **SHORT)
    together = select([train], labels, held_out=groups, num_classes=4, grid=grid)
    alone = [select([train], labels, held_out=[group], num_classes=4, grid=grid).grid[0] for group in groups]
    for name in ("held_out_top1", "held_out_loss"):
        expected = sum(row[name] * len(group) for row, group in zip(alone, groups)) / 200
        assert together.grid[0][name] == pytest.approx(expected)


def test_only_the_given_rows_are_learnt_from():
    train, labels = made(300)
    rows = torch.arange(0, 300, 2)
    garbled, grid = train.clone(), Grid(lr=[0.03], weight_decay=[0.1], **SHORT)
    garbled[1::2] = -7.0
    setting = {"held_out": [rows[:30]], "num_classes": 4, "grid": grid, "rows": rows}
    first, second = select([train], labels, **setting), select([garbled], labels, **setting)
    assert first.grid == second.grid
    assert torch.equal(first.head.weight, second.head.weight)


def test_the_better_layer_and_normalisation_are_chosen():
    train, labels = made(400)
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(5))
    names = [{"layer": "1"}, {"layer": "2"}]
    grid = Grid(lr=[0.03], weight_decay=[1e-3], batchnorm=[False, True], **SHORT)
    selection = select([noise, train], labels, held_out=[torch.arange(100)], num_classes=4, grid=grid, names=names)
    assert [(row["layer"], row["batchnorm"]) for row in selection.grid] == [
        ("1", False), ("1", True), ("2", False), ("2", True)
    ]  # fmt: skip
    assert (selection.place, selection.choice["layer"], selection.choice["batchnorm"]) == (1, "2", True)
    assert selection.head.weight.shape == (24, 4)


def test_without_batchnorm_features_are_read_as_they_are():
    train, labels = made(200)
    grid = Grid(lr=[1e-6], weight_decay=[0.1], batchnorm=[False], **SHORT)
    selection = select([train], labels, held_out=[torch.arange(50)], num_classes=4, grid=grid)
    alone = train_heads(train, labels, lr=[1e-6], weight_decay=[0.1], num_classes=4, seed=0, **SHORT)
    torch.testing.assert_close(selection.head.weight, alone.weight)
    torch.testing.assert_close(selection.logits(train), train @ alone.weight + alone.bias)


def test_the_same_seed_gives_the_same_numbers():
    train, labels = made(300)
    first, second = (
        select([train], labels, held_out=[torch.arange(50)], num_classes=4, seed=5, grid=Grid(**SHORT))
        for _ in range(2)
    )
    assert first.grid == second.grid
    assert torch.equal(first.head.weight, second.head.weight)


def test_top_five_is_reported_beyond_five_classes():
    train, labels = made(300, num_classes=7)
    selection = select([train], labels, held_out=[torch.arange(50)], num_classes=7, grid=Grid(**SHORT))
    metrics = headline(selection.logits(train), labels, multi_label=False)
    assert metrics["top5"] > metrics["top1"]


def test_two_images_per_class_are_enough():
    train = torch.eye(4).repeat(2, 1) * 3.0
    labels = torch.arange(4).repeat(2)
    groups = [torch.from_numpy(group) for group in hold_out(labels.numpy())]
    selection = select([train], labels, held_out=groups, num_classes=4, grid=Grid(**SHORT))
    assert top1(selection, train, labels) == 1.0


def test_one_image_per_class_and_one_head_need_no_choice():
    train, labels = torch.eye(4) * 3.0, torch.arange(4)
    grid = Grid("lbfgs", weight_decay=[0.01], batchnorm=[False])
    selection = select([train], labels, held_out=[], num_classes=4, grid=grid)
    assert top1(selection, train, labels) == 1.0
    with pytest.raises(ValueError, match="at least one class needs two images"):
        hold_out(labels.numpy())


def test_a_class_that_train_lacks_is_counted_as_missed():
    train, labels = made(200, num_classes=3)
    test, _ = made(100, num_classes=3, seed=1)
    selection = select([train], labels, held_out=[torch.arange(30)], num_classes=4, grid=Grid(**SHORT))
    assert top1(selection, test, torch.full((100,), 3)) == 0.0


# ---- what is held out ----------------------------------------------------------------------------------------------


def test_folds_are_disjoint_whole_and_hold_the_share_of_each_class():
    labels = np.repeat([0, 1, 2, 3], [50, 31, 4, 1])
    groups = hold_out(labels, folds=5, seed=3)
    assert np.array_equal(np.sort(np.concatenate(groups)), np.arange(86))
    counts = np.stack([np.bincount(labels[group], minlength=4) for group in groups])
    assert (counts.max(0) - counts.min(0) <= 1).all()
    assert np.ptp(counts.sum(1)) <= 1
    assert not all(np.array_equal(a, b) for a, b in zip(groups, hold_out(labels, folds=5, seed=4)))


def test_small_sets_are_cut_into_five_folds_and_large_ones_give_a_tenth():
    assert len(hold_out(np.arange(4999) % 7)) == 5
    (slice_,) = hold_out(np.arange(5000) % 10)
    assert len(slice_) == 500
    assert len(hold_out(np.arange(90) % 9, fraction=0.2)[0]) == 18
    assert len(hold_out(np.arange(12) % 4)) == 3  # no more folds than images in the largest class


def test_a_slice_and_folds_at_once_are_refused():
    with pytest.raises(ValueError, match=r"held_out=0.2 has no effect with folds=5"):
        hold_out(np.arange(90) % 9, folds=5, fraction=0.2)


# ---- several classes per image ---------------------------------------------------------------------------------------


def test_multi_label_heads_are_one_binary_regression_per_class():
    features, labels = multi_hot(400)
    heads, _ = solve_heads(features, labels, weight_decay=[1e-2], num_classes=3, tolerance=1e-5)
    for label in range(3):
        exact = LogisticRegression(C=1 / (400 * 1e-2), tol=1e-8, max_iter=2000).fit(features, labels[:, label])
        assert np.allclose(heads.weight[:, label], exact.coef_[0], atol=1e-3)
        assert heads.bias[label].item() == pytest.approx(exact.intercept_[0], rel=2e-3, abs=2e-3)


def test_the_multi_label_gradient_is_that_of_binary_cross_entropy():
    features, labels = multi_hot(32)
    heads = train_heads(features, labels, lr=[0.1], weight_decay=[0.01], num_classes=3, steps=3, batch_size=32, seed=0)
    weight, bias = torch.zeros(12, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": 0.01}, {"params": [bias]}], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    for _ in range(3):
        optimizer.zero_grad()
        logits = features @ weight + bias
        functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum").div(32).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(heads.weight, weight.detach(), rtol=1e-4, atol=1e-6)


def test_multi_label_heads_are_chosen_by_map():
    features, labels = multi_hot(300)
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(5))
    grid = Grid(lr=[0.03], weight_decay=[1e-3], **SHORT)
    selection = select([noise, features], labels, held_out=[torch.arange(100)], num_classes=3, grid=grid)
    first, second = (row["held_out_map"] for row in selection.grid)
    assert selection.place == 1
    assert second > first + 0.1
    assert headline(selection.logits(features), labels, multi_label=True)["map"] > 0.8


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_standardised_features_have_mean_zero_and_deviation_one():
    features, _ = made(500)
    features[:, 3] = 7.1  # never changes
    standard = Standardizer.fit(features)(features)
    expected = torch.ones(24)
    expected[3] = 0.0
    torch.testing.assert_close(standard.mean(0), torch.zeros(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(0, correction=0), expected, atol=1e-4, rtol=0)


def test_statistics_of_some_rows_are_those_of_the_rows_alone():
    features, _ = made(100)
    rows = torch.arange(0, 100, 3)
    found, expected = Standardizer.fit(features, rows), Standardizer.fit(features[rows])
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.scale, expected.scale)


def test_of_equal_heads_the_one_of_lower_loss_is_chosen():
    weight = torch.stack([torch.eye(2), 3 * torch.eye(2), 3 * torch.eye(2)], dim=2).flatten(1)
    scores = score_heads(Heads(weight, torch.zeros(6), 2), torch.eye(2), torch.tensor([0, 1]))
    assert scores.metrics["top1"].tolist() == [1.0, 1.0, 1.0]
    assert choose(scores, num_images=2) == 1


def test_heads_beyond_one_standard_error_are_not_chosen_by_their_loss():
    top1 = torch.tensor([0.50, 0.47, 0.40], dtype=torch.float64)
    loss = torch.tensor([1.2, 1.1, 0.9], dtype=torch.float64)
    scores = HeadScores({"top1": top1}, loss, torch.tensor([True, True, True]))
    assert choose(scores, num_images=100) == 1  # a standard error is 5 points
    assert choose(scores, num_images=10_000) == 0


@pytest.mark.parametrize(
    ("change", "grid", "message"),
    [
        ({"held_out": []}, {}, "held out to choose by"),
        ({"held_out": [torch.arange(50)]}, {}, "held out to choose by"),
        ({"held_out": [torch.arange(9), torch.arange(9, 18)], "retrain": False}, {}, "retrain=false has no meaning"),
        ({"num_classes": 3}, {}, r"must lie in 0\.\.2"),
        ({}, {"lr": []}, "lr needs"),
        ({}, {"weight_decay": [-1.0]}, "weight_decay none below 0"),
        ({}, {"batchnorm": []}, "batchnorm needs"),
        ({}, {"solver": "adam"}, "solver=adam is not known"),
        ({}, {"steps": 0}, "steps and batch_size"),
        ({}, {"lr": [1e38], "weight_decay": [1.0]}, "every head of the grid diverged"),
    ],
)
def test_what_cannot_be_probed_is_refused(change, grid, message):
    train, labels = made(50)
    with pytest.raises(ValueError, match=message):
        select([train], labels, grid=Grid(**SHORT | grid), **{"held_out": [torch.arange(9)], "num_classes": 4} | change)


def test_features_and_labels_that_do_not_fit_are_refused():
    train, labels = made(50)
    setting = {"held_out": [torch.arange(9)], "num_classes": 4}
    with pytest.raises(ValueError, match="not all finite"):
        select([train / 0], labels, **setting)
    with pytest.raises(ValueError, match="two classes"):
        select([train], labels * 0, **setting)
    with pytest.raises(ValueError, match="0 or 1 for each of 4 classes"):
        select([train], functional.one_hot(labels, 4) * 2, **setting)
