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

    def load(self) -> Callable[[Scene], Look]:
        """The module's function `look`."""
        return importlib.import_module(f"eval.look.{self.module}").look


LOOKS = {
    "views": Entry("views", "the views that the method trains on, with their parameters"),
    "reconstructions": Entry("reconstructions", "what MAE makes of masked images, at several mask ratios"),
    "pretext": Entry("pretext", "relative location's answers and confusions; shortcuts that a single patch gives away"),
    "neighbours": Entry("neighbours", "nearest images in feature space, before and after training"),
    "map": Entry("feature_map", "PCA, t-SNE and UMAP of the features"),
    "clusters": Entry("clusters", "k-means with representative images, purity and suspected label errors"),
    "outliers": Entry("outliers", "images that are far from all others"),
    "duplicates": Entry("duplicates", "near-identical images, also across train and test"),
    "filters": Entry("filters", "filters of the first layer, or the patch embedding"),
    "activations": Entry("activations", "the patches that activate a unit most"),
    "attention": Entry("attention", "attention maps of a vision transformer, and their roll-out"),
    "pca_tokens": Entry("pca_tokens", "principal components of the patch tokens as colours"),
    "saliency": Entry("saliency", "which pixels move the score, by its gradient"),
    "guided_backprop": Entry("guided_backprop", "the same, with only positive gradients let through"),
    "occlusion": Entry("occlusion", "which regions move the score when they are covered"),
    "gradcam": Entry("gradcam", "which regions of the last feature map raise the score"),
    "gradient_ascent": Entry("gradient_ascent", "images made to activate a unit"),
    "deepdream": Entry("deepdream", "images with more of what a layer sees in them"),
    "inversion": Entry("inversion", "images made again from their features"),
}


def listing() -> str:
    """The names with what they show, a line each."""
    width = max(map(len, LOOKS))
    return "\n".join(f"  {name:<{width}}  {entry.shows}" for name, entry in LOOKS.items())
