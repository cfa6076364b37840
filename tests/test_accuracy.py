"""Ranks, confusions and average precision against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.metrics import confusion_matrix as reference

from eval.accuracy import average_precision, confusion_matrix


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_that_of_scikit_learn(ties):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(57, 5, generator=generator)
    labels = (torch.rand(57, 5, generator=generator) < torch.tensor([0.5, 0.1, 0.9, 0.3, 0.02])).long()
    labels[0] = 1  # each class has an image
    if ties:
        scores = scores.round()
    expected = [average_precision_score(labels[:, c], scores[:, c]) for c in range(5)]
    assert np.allclose(average_precision(scores, labels), expected)


def test_a_class_without_images_has_no_average_precision():
    found = average_precision(torch.randn(9, 2), torch.tensor([[1, 0]] * 9))
    assert found[0].item() == 1.0
    assert found[1].isnan()


def test_rows_of_the_confusion_matrix_are_the_truth():
    generator = torch.Generator().manual_seed(0)
    truth, predicted = torch.randint(4, (2, 60), generator=generator)
    found = confusion_matrix(truth, predicted, num_classes=5)
    assert np.array_equal(found, reference(truth, predicted, labels=range(5)))
