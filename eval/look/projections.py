"""Features in two dimensions: principal components, t-SNE and UMAP, each with how far its picture may be trusted."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.manifold import TSNE, trustworthiness
from threadpoolctl import threadpool_limits
from torch import Tensor

from eval.look.components import principal_components, principal_plane
from eval.rows import unit_length
from ssl.randomness import uniforms

PROJECTIONS = ("pca", "tsne", "umap")
TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
FIRST_COMPONENTS = 50  # that t-SNE starts from, as van der Maaten and Hinton (2008, section 4) did with 30
USUAL_PERPLEXITY, USUAL_NEIGHBOURS = 30.0, 15
SECONDS = {"pca": (0.0, 0.0), "tsne": (0.0, 5e-3), "umap": (8.0, 2e-3)}
"""Of a projection, to begin with and for each image, on a core of 2.5 GHz."""
MIN_DISTANCE = 0.1  # of UMAP, its own default
TRUSTED_NEIGHBOURS, TRUSTED_IMAGES = 12, 4000
CAUTION = {
    "pca": "Distances are true as far as the two components go; what the others tell apart lies on top of each other.",
    "tsne": "Only who is near whom means something: distances between groups, and their sizes and densities, do not.",
    "umap": "Only who is near whom means something: distances between groups, and their sizes and densities, do not.",
}


@dataclass(frozen=True)
class Projected:
    """Places (N, 2) of images, and what is to be said of how they came about."""

    place: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The facts in a few words."""
        parts = []
        if "explained_variance" in self.facts:
            first, second = self.facts["explained_variance"]
            parts.append(f"{first:.0%} and {second:.0%} of the variance")
        if "perplexity" in self.facts:
            parts.append(f"perplexity {self.facts['perplexity']:g}")
        if "neighbours" in self.facts:
            parts.append(f"{self.facts['neighbours']} neighbours")
        return ", ".join([*parts, f"trustworthiness {self.facts['trustworthiness']:.2f}"])


def project(
    features: Tensor, name: str, *, seed: int, perplexity: float | None = None, neighbours: int | None = None
) -> Projected:
    """Features (N, D), scaled to length 1 as cosine similarity sees them, in two dimensions by `pca`, `tsne` or `umap`.

    Raises ValueError for another name, for fewer than 4 images, for settings that do not fit N, and where umap-learn
    is not installed. The facts hold the trustworthiness (Venna and Kaski 2001): 1 where all that are near each other
    in the picture are so in the features.
    """
    if name not in PROJECTIONS:
        raise ValueError(f"map.projections knows {', '.join(PROJECTIONS)}, got {name!r}")
    if len(features) < 4:
        raise ValueError(f"a map needs 4 images or more, got {len(features)}; give more sample=")
    rows = unit_length(features).double().numpy()  # (N, D)
    if name == "pca":
        place, shares = principal_plane(torch.from_numpy(rows))
        found = Projected(place, {"explained_variance": shares})
    elif name == "tsne":
        found = tsne(rows, seed=seed, perplexity=perplexity)
    else:
        found = umap(rows, seed=seed, neighbours=neighbours)
    return Projected(found.place, found.facts | {"trustworthiness": trust(rows, found.place, seed=seed)})


def seconds_of(name: str, num: int, times: int) -> float:
    """About how long `times` projections of `num` images take."""
    at_first, each = SECONDS[name]
    return at_first + each * num * times


def tsne(rows: np.ndarray, *, seed: int, perplexity: float | None) -> Projected:
    """t-SNE (van der Maaten and Hinton 2008) of the first 50 principal components, begun from the first two.

    The perplexity must be less than a third of the rows: by default 30, or that third. Raises ValueError for others.
    """
    most = (len(rows) - 1) / 3
    if perplexity is not None and not 1 <= perplexity <= most:
        raise ValueError(
            f"map.perplexity must lie in 1..{most:.0f}, a third of the {len(rows)} images, got {perplexity:g}; "
            "t-SNE takes it for the number of neighbours of an image"
        )
    chosen = min(USUAL_PERPLEXITY, most) if perplexity is None else perplexity
    fewer = principal_components(torch.from_numpy(rows), FIRST_COMPONENTS).score.numpy()
    components = fewer.shape[1]
    init = np.zeros((len(rows), 2))
    init[:, :components] = fewer[:, :2]
    spread = init[:, 0].std()
    init = (1e-4 * init / spread if spread > 0 else init).astype(np.float32)  # small, as scikit-learn scales its own
    with threadpool_limits(1):  # sums by several threads differ in their last digits, from which the map grows
        place = TSNE(2, perplexity=chosen, init=init, random_state=seed).fit_transform(fewer)  # pyright: ignore
    return Projected(place.astype(np.float64), {"perplexity": round(float(chosen), 2), "components": components})


def umap(rows: np.ndarray, *, seed: int, neighbours: int | None) -> Projected:
    """UMAP (McInnes et al. 2018, arXiv:1802.03426) of rows (N, D), on one thread, so that a seed gives one map.

    Of each row's neighbours by default 15, or all others. Raises ValueError for fewer than 2 and for more than these.
    """
    neighbours = min(USUAL_NEIGHBOURS, len(rows) - 1) if neighbours is None else neighbours
    try:
        with warnings.catch_warnings(), threadpool_limits(1):  # numba's start sets the threads of torch, too
            warnings.simplefilter("ignore")  # of numba's and of TensorFlow, which is not asked for
            from umap import UMAP  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"map.projections names umap, but umap-learn cannot be imported ({error}); install it "
            "(uv sync --extra map, or pip install umap-learn), or leave umap out"
        ) from error
    if not 2 <= neighbours < len(rows):
        raise ValueError(f"map.umap_neighbours must lie in 2..{len(rows) - 1}, below the images, got {neighbours}")
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # that a seed means one thread is what is wanted
        made = UMAP(n_neighbors=neighbours, min_dist=MIN_DISTANCE, random_state=seed, n_jobs=1)
        place = np.asarray(made.fit_transform(rows.astype(np.float32)), np.float64)
    return Projected(place, {"neighbours": neighbours, "min_distance": MIN_DISTANCE})


def trust(rows: np.ndarray, place: np.ndarray, *, seed: int) -> float:
    """Trustworthiness of places (N, 2) of rows (N, D), of at most 4000 of them, seeded."""
    if len(rows) > TRUSTED_IMAGES:
        order = np.argsort(uniforms(seed, 0, np.arange(len(rows)), "trustworthiness", 1)[:, 0], kind="stable")
        chosen = np.sort(order[:TRUSTED_IMAGES])
        rows, place = rows[chosen], place[chosen]
    return float(trustworthiness(rows, place, n_neighbors=min(TRUSTED_NEIGHBOURS, (len(rows) - 1) // 2)))
