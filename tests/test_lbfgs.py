"""Logistic regression by L-BFGS against scikit-learn's minimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from eval.heads import Standardizer
from eval.lbfgs import solve_heads

DECAYS = [1e-3, 1e-2, 0.3]


def made(num: int = 300, dim: int = 20):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (num,), generator=generator)
    centres = torch.randn(4, dim, generator=generator)
    return centres[labels] + 1.5 * torch.randn(num, dim, generator=generator), labels


def test_the_minimum_is_that_of_scikit_learn_for_every_weight_decay():
    features, labels = made()
    heads, resting = solve_heads(features, labels, weight_decay=DECAYS, num_classes=4, tolerance=1e-6)
    assert resting.all()
    for number, decay in enumerate(DECAYS):
        exact = LogisticRegression(C=1 / (len(features) * decay), tol=1e-10, max_iter=5000).fit(features, labels)
        head = heads.only(number)
        assert np.allclose(head.weight.T, exact.coef_, atol=1e-3)
        bias = head.bias - head.bias.mean()  # the softmax leaves their sum open
        assert np.allclose(bias, exact.intercept_ - exact.intercept_.mean(), atol=3e-3)


def test_rows_and_standardisation_are_those_asked_for():
    features, labels = made()
    rows = torch.arange(0, 300, 2)
    standardize = Standardizer.fit(features, rows)
    found, _ = solve_heads(
        features * 1.0, labels, weight_decay=[0.01], num_classes=4, rows=rows, standardize=standardize
    )
    expected, _ = solve_heads(standardize(features[rows]), labels[rows], weight_decay=[0.01], num_classes=4)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-5)


def test_heads_do_not_depend_on_those_solved_beside_them():
    features, labels = made()
    together, _ = solve_heads(features, labels, weight_decay=DECAYS, num_classes=4, tolerance=1e-6)
    for number, decay in enumerate(DECAYS):
        alone, _ = solve_heads(features, labels, weight_decay=[decay], num_classes=4, tolerance=1e-6)
        torch.testing.assert_close(together.only(number).weight, alone.weight, rtol=1e-3, atol=2e-4)


def test_small_pieces_give_the_same_minimum(monkeypatch):
    features, labels = made()
    whole, _ = solve_heads(features, labels, weight_decay=DECAYS, num_classes=4, tolerance=1e-6)
    monkeypatch.setattr("eval.lbfgs.LOGITS", 1)
    monkeypatch.setattr("eval.lbfgs.KEPT_BYTES", 0)
    pieces, _ = solve_heads(features, labels, weight_decay=DECAYS, num_classes=4, tolerance=1e-6)
    torch.testing.assert_close(whole.weight, pieces.weight, rtol=1e-3, atol=2e-4)


def test_too_few_iterations_are_told():
    features, labels = made()
    _, resting = solve_heads(features, labels, weight_decay=[1e-3], num_classes=4, max_iterations=3)
    assert not resting.any()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_features_of_any_size_are_fitted(scale):
    features, labels = made()
    heads, _ = solve_heads(features * scale, labels, weight_decay=[0.0], num_classes=4, tolerance=1e-5)
    accuracy = (heads.logits(features * scale)[:, :, 0].argmax(1) == labels).double().mean()
    exact = LogisticRegression(C=1e6, max_iter=5000).fit(features, labels).score(features, labels)
    assert accuracy.item() == pytest.approx(exact, abs=0.02)
