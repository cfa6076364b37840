"""The looks by name: where each is, and what it shows in a line. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.look.result import Look
    from eval.look.scene import Scene


@dataclass(frozen=True)
class Entry:
    """A look's module in eval.look, and what it shows."""

    module: str
    shows: str
    reads: tuple[str, ...]
    """Of the settings that looks share, those that have an effect on it."""

    def load(self) -> Callable[[Scene], Look]:
        """The module's function `look`."""
        return importlib.import_module(f"eval.look.{self.module}").look


SHOWN = ("images", "indices", "num_images", "split")
SAMPLE = ("sample", "split", "pooling", "precision")
SCORE = (*SHOWN, "pooling", "head")
OPTIONAL = frozenset((*SHOWN, *SAMPLE, *SCORE))
"""Settings that some looks read and others do not."""

LOOKS = {
    "views": Entry("views", "the views that the method trains on, with their parameters", SHOWN),
    "reconstructions": Entry("reconstructions", "what MAE makes of masked images, at several mask ratios", SHOWN),
    "pretext": Entry(
        "pretext", "relative location's answers and confusions; shortcuts that a single patch gives away", SHOWN
    ),
    "neighbours": Entry("neighbours", "nearest images in feature space, before and after training", (*SHOWN, *SAMPLE)),
    "map": Entry("feature_map", "PCA, t-SNE and UMAP of the features", SAMPLE),
    "clusters": Entry("clusters", "k-means with representative images, purity and suspected label errors", SAMPLE),
    "outliers": Entry("outliers", "images that are far from all others", SAMPLE),
    "duplicates": Entry("duplicates", "near-identical images, also across train and test", ("pooling", "precision")),
    "filters": Entry("filters", "filters of the first layer, or the patch embedding", SHOWN),
    "activations": Entry("activations", "the patches that activate a unit most", ("sample", "split")),
    "attention": Entry("attention", "attention maps of a vision transformer, and their roll-out", SHOWN),
    "pca_tokens": Entry("pca_tokens", "principal components of the patch tokens as colours", SHOWN),
    "saliency": Entry("saliency", "which pixels move the score, by its gradient", SCORE),
    "guided_backprop": Entry("guided_backprop", "the same, with only positive gradients let through", SCORE),
    "occlusion": Entry("occlusion", "which regions move the score when they are covered", SCORE),
    "gradcam": Entry("gradcam", "which regions of the last feature map raise the score", SCORE),
    "gradient_ascent": Entry("gradient_ascent", "images made to activate a unit", SCORE),
    "deepdream": Entry("deepdream", "images with more of what a layer sees in them", SHOWN),
    "inversion": Entry("inversion", "images made again from their features", ("images", "indices", "split", "pooling")),
}


def listing() -> str:
    """The names with what they show, a line each."""
    width = max(map(len, LOOKS))
    return "\n".join(f"  {name:<{width}}  {entry.shows}" for name, entry in LOOKS.items())
