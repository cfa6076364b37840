"""The grid of linear heads against scikit-learn, against heads trained one at a time, and its honesty."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from eval.heads import Heads, HeadScores, Standardizer, choose, score_heads, train_heads
from eval.linear_probe import linear_probe

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


def rows(*which: int) -> torch.Tensor:
    return torch.tensor(which)


def test_reaches_the_accuracy_of_logistic_regression():
    train, train_labels = made(1500)
    test, test_labels = made(2000, seed=1)
    probe = linear_probe(train, train_labels, test, test_labels, held_out=torch.arange(150), num_classes=4, steps=600)
    standardize = Standardizer.fit(train)
    x, xt = standardize(train).numpy(), standardize(test).numpy()
    best = max(
        LogisticRegression(C=c, max_iter=500).fit(x, train_labels.numpy()).score(xt, test_labels.numpy())
        for c in (1e-3, 1e-2, 1e-1, 1.0)
    )
    assert probe.metrics["top1"] == pytest.approx(best, abs=0.012)
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
    train, train_labels = made(200)
    probe = linear_probe(
        train, train_labels, train, train_labels, held_out=torch.arange(40), num_classes=4, **SHORT,
        lr=[0.01, 1e35], weight_decay=[1.0],
    )  # fmt: skip
    assert probe.grid[1]["held_out_top1"] is None
    assert probe.choice["lr"] == 0.01
    assert any("1 of the 2 heads diverged" in note for note in probe.notes)


def test_the_test_split_never_moves_the_choice():
    train, train_labels = made(400)
    test, test_labels = made(200, seed=1)
    held_out = torch.arange(60)
    honest = linear_probe(train, train_labels, test, test_labels, held_out=held_out, num_classes=4, **SHORT)
    shuffled = test_labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    other = linear_probe(train, train_labels, test, shuffled, held_out=held_out, num_classes=4, **SHORT)
    assert other.choice == honest.choice
    assert other.grid == honest.grid
    assert other.metrics != honest.metrics


def test_the_grid_never_sees_the_held_out_images():
    train, train_labels = made(300)
    held_out = torch.arange(50)
    garbled = train.clone()
    garbled[held_out] = 1e6  # would move the statistics and the heads
    setting = {"held_out": held_out, "num_classes": 4, "retrain": False, **SHORT}
    test, test_labels = made(100, seed=1)
    first = linear_probe(train, train_labels, test, test_labels, lr=[0.01], weight_decay=[0.0], **setting)
    second = linear_probe(garbled, train_labels, test, test_labels, lr=[0.01], weight_decay=[0.0], **setting)
    assert first.metrics == second.metrics
    assert first.grid != second.grid


def test_the_same_seed_gives_the_same_numbers():
    train, train_labels = made(300)
    probes = [
        linear_probe(
            train, train_labels, train, train_labels, held_out=torch.arange(50), num_classes=4, seed=5, **SHORT
        )
        for _ in range(2)
    ]
    assert probes[0] == probes[1]


def test_top_five_is_reported_beyond_five_classes():
    train, train_labels = made(300, num_classes=7)
    probe = linear_probe(train, train_labels, train, train_labels, held_out=torch.arange(50), num_classes=7, **SHORT)
    assert probe.metrics["top5"] > probe.metrics["top1"]


def test_two_images_per_class_are_enough():
    train = torch.eye(4).repeat(2, 1) * 3.0
    labels = torch.arange(4).repeat(2)
    probe = linear_probe(train, labels, train, labels, held_out=rows(0, 1), num_classes=4, **SHORT)
    assert probe.metrics["top1"] == 1.0


def test_a_class_that_train_lacks_is_counted_as_missed():
    train, labels = made(200, num_classes=3)
    test, _ = made(100, num_classes=3, seed=1)
    probe = linear_probe(train, labels, test, torch.full((100,), 3), held_out=torch.arange(30), num_classes=4, **SHORT)
    assert probe.metrics["top1"] == 0.0


def test_standardised_features_have_mean_zero_and_deviation_one():
    features, _ = made(500)
    features[:, 3] = 7.1  # never changes
    standard = Standardizer.fit(features)(features)
    expected = torch.ones(24)
    expected[3] = 0.0
    torch.testing.assert_close(standard.mean(0), torch.zeros(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(0, correction=0), expected, atol=1e-4, rtol=0)


def test_of_equal_heads_the_one_of_lower_loss_is_chosen():
    weight = torch.cat([torch.eye(2), 3 * torch.eye(2), 3 * torch.eye(2)], dim=1)
    scores = score_heads(Heads(weight, torch.zeros(6), 2), torch.eye(2), torch.tensor([0, 1]))
    assert scores.top1.tolist() == [1.0, 1.0, 1.0]
    assert choose(scores, num_images=2) == 1


def test_heads_beyond_one_standard_error_are_not_chosen_by_their_loss():
    top1 = torch.tensor([0.50, 0.47, 0.40], dtype=torch.float64)
    loss = torch.tensor([1.2, 1.1, 0.9], dtype=torch.float64)
    scores = HeadScores(top1, top1, loss, torch.tensor([True, True, True]))
    assert choose(scores, num_images=100) == 1  # a standard error is 5 points
    assert choose(scores, num_images=10_000) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": torch.arange(0)}, "held out to choose by"),
        ({"held_out": torch.arange(50)}, "held out to choose by"),
        ({"num_classes": 3}, r"must lie in 0\.\.2"),
        ({"lr": []}, "lr needs"),
        ({"weight_decay": [-1.0]}, "weight_decay none below 0"),
        ({"steps": 0}, "steps and batch_size"),
        ({"lr": [1e38], "weight_decay": [1.0]}, "every head of the grid diverged"),
    ],
)
def test_what_cannot_be_probed_is_refused(change, message):
    train, labels = made(50)
    with pytest.raises(ValueError, match=message):
        linear_probe(train, labels, train, labels, **{"held_out": torch.arange(9), "num_classes": 4, **SHORT} | change)


def test_features_and_labels_that_do_not_fit_are_refused():
    train, labels = made(50)
    held_out = torch.arange(9)
    with pytest.raises(ValueError, match="not all finite"):
        linear_probe(train / 0, labels, train, labels, held_out=held_out, num_classes=4)
    with pytest.raises(ValueError, match="dimensions"):
        linear_probe(train, labels, train[:, 1:], labels, held_out=held_out, num_classes=4)
    with pytest.raises(ValueError, match="two classes"):
        linear_probe(train, labels * 0, train, labels * 0, held_out=held_out, num_classes=4)
