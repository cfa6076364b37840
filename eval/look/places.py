"""Relative location's own question put to it: its patches, its answers, and which places it takes for which."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl.methods.relative_location import CENTRE, NEIGHBOURS, PLACES, RelativeLocation, cut
from ssl.models.backbones import pooled_features


@dataclass(frozen=True)
class Answers:
    """Of B images: where their nine patches were cut, what the backbone was shown, and the scores of the head."""

    corners: Tensor
    """int64 (B, 9, 2): rows and columns of the top left corners in the view."""
    patches: Tensor
    """(B, 9, C, h, w): as the method prepares them, colour dropped and standardised."""
    probabilities: Tensor
    """float32 (B, 8, 8): of each neighbour, in the order of PLACES, the probability of each place."""

    @property
    def predicted(self) -> Tensor:
        """The place that each of the eight neighbours is taken for, int64 (B, 8)."""
        return self.probabilities.argmax(2)


@torch.no_grad()
def ask(method: RelativeLocation, view: Tensor, noise: Tensor) -> Answers:
    """Put the question of `method`, in eval mode, about views (B, C, H, W), cut as `noise` (B, num_noise) says."""
    corners = method.corners(noise)
    patches = method.prepare(cut(view, corners, method.patch_size), noise)  # (B, 9, C, h, w)
    features = pooled_features(method.backbone, patches.flatten(0, 1)).unflatten(0, (-1, 9))  # (B, 9, D)
    scores = method.classifier(features[:, NEIGHBOURS], features[:, CENTRE])  # (B, 8, 8)
    return Answers(corners, patches, scores.float().softmax(2))


def confusion(predicted: Tensor) -> np.ndarray:
    """How often a neighbour in the place of the row was taken for one in that of the column: `predicted` (B, 8) to
    int64 (8, 8).
    """
    counts = np.zeros((len(PLACES), len(PLACES)), np.int64)
    np.add.at(counts, (np.arange(len(PLACES))[None, :].repeat(len(predicted), 0), predicted.cpu().numpy()), 1)
    return counts


def accuracy(predicted: Tensor) -> tuple[float, float]:
    """The share of neighbours whose place was found, of `predicted` (B, 8), and its standard error.

    The error is taken over images, because the eight answers about one image share its centre patch.
    """
    hits = (predicted == torch.arange(len(PLACES), device=predicted.device)).double().mean(1)  # (B,)
    error = hits.std().item() / len(hits) ** 0.5 if len(hits) > 1 else float("nan")
    return hits.mean().item(), error


def commonest_mistake(counts: np.ndarray) -> str:
    """In words, which place is taken for which most often, or which answer is given whatever is asked."""
    answer = int(counts.sum(0).argmax())
    share = counts[:, answer].sum() / counts.sum()
    if share > 0.5:
        return (
            f"{PLACES[answer]} is the answer to {share:.0%} of the questions: the head does not tell places apart yet"
        )
    wrong = np.where(np.eye(len(PLACES), dtype=bool), 0, counts)
    if not wrong.any():
        return "no place is taken for another"
    true, taken = (int(place) for place in np.unravel_index(wrong.argmax(), wrong.shape))
    share = counts[true, taken] / counts[true].sum()
    return (
        f"taken for another most often: {PLACES[true]} for {PLACES[taken]}, {share:.0%} of those at the {PLACES[true]}"
    )
