"""What the curves of metrics.jsonl are called on every page, and which of them are shares of one."""

from __future__ import annotations

TRAINING = {
    "loss": "Training loss",
    "lr": "Learning rate",
    "images_per_second": "Throughput, images per second",
    "data_wait": "Share of time waiting for data",
    "grad_norm": "Gradient norm, before clipping",
}
HEALTH = {
    "knn_top1": "kNN top-1 accuracy during the run",
    "rankme": "RankMe: directions that the features use",
    "alpha_req": "alpha-ReQ: decay of the features' spectrum",
    "feature_std": "Standard deviation of normalised features",
    "mean_cosine": "Mean cosine similarity of two images",
    "dead_dimensions": "Share of dimensions that hardly differ",
    "lidar": "LiDAR",
}
SHARES = ("data_wait", "dead_dimensions", "accuracy", "mfu")


def title_of(metric: str) -> str:
    """A metric's title; its own name where it has none."""
    return TRAINING.get(metric) or HEALTH.get(metric) or metric


def is_share(metric: str) -> bool:
    """Whether a metric is a share of one, and is drawn in percent."""
    return metric in SHARES or metric.endswith("top1")
