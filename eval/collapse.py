"""When features look collapsed, in words: what was measured, and what a run that has not collapsed has.

The bounds were set by measuring on 512 images: sound runs of the three methods (ResNet-10, vision transformers of 64
and 128 dimensions; CIFAR-10 and the embedded images; 25 to 14,000 steps) and thirteen untrained backbones, up to
ResNet-50, ConvNeXt-T and ViT-B, beside runs that were made to collapse by `python -m benchmarks.collapse` (one seed
each): a loss without repulsion on a ViT's features (a), on a ResNet's (b), on a ViT's projections (c).

| | sound | untrained | (a) | (b) | (c) |
|---|---|---|---|---|---|
| spread, feature_std * sqrt(D) | 0.15 (MAE) to 0.80 | 0.17 to 0.96 | 0.03, 0.01 | 0.65 to 0.37 | 0.79 to 0.36 |
| RankMe | 5.5 of 64 and more | 11 of 64 and more | 1.6, 1.3 of 64 | 21 to 8 of 256 | 3.6 to 2.3 of 64 |
| of RankMe untrained | 0.49 (MAE) to 4.7 | 1 | 0.14, 0.11 | 0.54 to 0.21 | 0.33 to 0.21 |

SimCLR at a learning rate five hundred times too high falls to a spread of 0.06 and 0.11 of its first rank, 43 % of its
dimensions dead, within 10 steps, and has recovered 20 steps later. A last LayerNorm can keep the spread at 0.8 while
the rank falls, and BatchNorm in the projector slows a collapse down to hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Mapping

LEAST_SPREAD = 0.05
LEAST_RANK = 4.0
LEAST_RANK_SHARE = 1 / 8
"""Of the dimensions, where they are so few that four directions are many."""
LEAST_RANK_OF_START = 1 / 3
MOST_DEAD = 0.5

ADVICE = (
    "lower optim.base_lr or lengthen schedule.warmup_epochs, see that augment= leaves images apart, and with "
    "method=simclr that method.temperature lies in 0.1 to 0.5 and the batch holds enough other images"
)


def signs_of_collapse(
    metrics: Mapping[str, float], *, dimensions: int, start: Mapping[str, float] | None = None
) -> list[str]:
    """Sentences on what looks like collapse in what `eval.spectra.health` gave for features of D `dimensions`.

    `start` is what it gave for the same images when the run began, which tells more than a bound for all backbones.
    """
    signs = []
    spread = metrics["feature_std"] * dimensions**0.5
    if spread < LEAST_SPREAD:
        signs.append(
            f"all images have nearly the same features: their spread is {spread:.2g} of what isotropic features have "
            f"(collapse: below {LEAST_SPREAD:g}), their mean cosine similarity {metrics['mean_cosine']:.4f}"
        )
    least = min(LEAST_RANK, LEAST_RANK_SHARE * dimensions)
    if metrics["rankme"] < least:
        signs.append(
            f"the features use {metrics['rankme']:.1f} of {dimensions} directions (RankMe; collapse: below {least:g})"
        )
    if start is not None and metrics["rankme"] < LEAST_RANK_OF_START * start["rankme"]:
        signs.append(
            f"RankMe has fallen to {metrics['rankme']:.1f} from {start['rankme']:.1f} at step {int(start['step'])} "
            "(collapse: below a third)"
        )
    if metrics["dead_dimensions"] >= MOST_DEAD:
        signs.append(
            f"{metrics['dead_dimensions']:.0%} of the dimensions hardly differ between images "
            f"(collapse: {MOST_DEAD:.0%} or more)"
        )
    return signs
