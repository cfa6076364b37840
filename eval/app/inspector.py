"""What a backbone makes of one image: neighbours, class, where it looks, reconstruction; as JSON values."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from eval.app.maps import Maps
from eval.app.own_images import Group, examples
from eval.app.uploads import Refused
from eval.images import Images
from eval.knn import TEMPERATURE, log_votes, log_weight
from eval.look.drawing import with_gray
from eval.look.labels import class_name, one_class
from eval.look.masked import errors, reconstruct
from eval.look.reconstructions import masked_method
from eval.look.result import DoesNotApply
from eval.look.samples import SampleFeatures, Shown
from eval.look.scene import Scene
from eval.neighbours import nearest
from eval.pages.pictures import address, as_png
from eval.predict import Predictor
from eval.rows import Rows
from ssl.data.sources import UNLABELLED
from ssl.methods.base import Method
from ssl.methods.mae import num_visible
from ssl.pictures import to_uint8

SAME = 1 - 1e-5
"""Cosine similarity from which two images are called the same: what fp32 leaves of 1 in batches of other sizes."""
VOTERS = 20  # neighbours, as in eval.knn


class Inspector:
    """A checkpoint with the features of a sample of its images, ready to look at one image after the other.

    One thread at a time may call `look`, `look_where` and `reconstruct`, any number `thumbnail`. Raises ValueError
    where the checkpoint and its images do not go together.
    """

    def __init__(self, scene: Scene, config: DictConfig) -> None:
        check_settings(config)
        if scene.channels not in (1, 3):
            raise ValueError(
                f"{scene.title} takes images of {scene.channels} channels, which no uploaded file has; "
                "python -m eval.look shows it on the data's own"
            )
        self.scene, self.num_neighbours = scene, config.neighbours
        self.bank: SampleFeatures = scene.features("train")
        self.rows = Rows(self.bank.features, "cosine", scene.device)
        self.groups = {"train": Group(scene.source("train"), self.bank.index), "examples": examples(scene)}
        self.extract = scene.extract()
        self.classifier = scene.classifier()
        if config.k is not None and (self.classifier is not None or not self.votes):
            why = "a trained head names the classes" if self.classifier is not None else "no image of train has a class"
            raise ValueError(f"k={config.k} has no effect: {why}; leave it out")
        self.k = config.k or VOTERS
        self.top = config.top
        self.predictor = None
        if self.classifier is not None:
            self.predictor = Predictor(self.classifier, device=scene.device, top=self.top, batch_size=1, threads=1)
        self.maps = Maps(scene)
        self.method: Method | None = None
        with contextlib.suppress(DoesNotApply):
            self.method = masked_method(scene)

    @property
    def votes(self) -> bool:
        """Whether neighbours can vote on a class: each has one, or none."""
        return one_class(self.bank.labels)

    def lines(self) -> list[str]:
        """What the page will show, for the terminal."""
        scene, bank = self.scene, self.groups["train"]
        named = " ".join(each for each in (scene.method_name, scene.spec.architecture) if each)
        if self.classifier is not None:
            class_by = f"by {self.classifier.title}"
        else:
            class_by = f"by a vote of the {self.k} nearest" if self.votes else "none, as no image has a label"
        return [
            f"{named}, images of {scene.image_size[0]}x{scene.image_size[1]} pixels",
            f"neighbours: among {len(bank):,} of {len(bank.source):,} images of {bank.source.name}",
            f"class: {class_by}",
            f"reconstruction: {'yes' if self.method is not None else 'none; method=mae and simmim have one'}",
        ]

    # ---- what the page asks ----------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What is served, for the head of the page and its controls."""
        scene = self.scene
        height, width = scene.image_size
        train = self.groups["train"]
        return {
            "title": scene.run_dir.name if scene.run_dir is not None else scene.title,
            "method": scene.method_name,
            "model": scene.spec.architecture,
            "step": scene.step,
            "size": f"{width} x {height}",
            "bank": len(train),
            "of": len(train.source),
            "data": scene.data_name,
            "examples": [
                {
                    "place": place,
                    "name": self.groups["examples"].name(place),
                    "truth": self.groups["examples"].truth(place),
                }
                for place in range(len(self.groups["examples"]))
            ],
            "reconstruction": self._ratios(),
        }

    def look(self, pixels: np.ndarray, *, known: tuple[str, int] | None = None) -> dict[str, Any]:
        """An image (H, W, C) as the model has it, its neighbours, its class; `known` is its group and place in it."""
        shown = self.shown(pixels)
        with torch.no_grad():
            feature = self.extract(shown.image).float().cpu()  # (1, D)
        if not torch.isfinite(feature).all():
            raise Refused(422, "the backbone gives features that are not finite for this image; it has diverged")
        closeness, place = self.nearest(feature, known)  # (k,), (k,)
        return {
            "seen": address(as_png(shown.pixels[0])),
            "size": f"{pixels.shape[1]:,} x {pixels.shape[0]:,}",
            "neighbours": [self._neighbour(*each) for each in list(zip(closeness, place))[: self.num_neighbours]],
            "prediction": self._predicted(pixels, closeness[: self.k], place[: self.k]),
        }

    def look_where(self, pixels: np.ndarray) -> dict[str, Any]:
        """The maps of where the network looks in an image (H, W, C)."""
        return {
            "maps": [{**each, "picture": address(as_png(each["picture"]))} for each in self.maps(self.shown(pixels))]
        }

    def reconstruct(self, pixels: np.ndarray, *, mask_ratio: float, mask: int) -> dict[str, Any]:
        """What is hidden of an image (H, W, C) and what the method makes of it; `mask` numbers the random masks."""
        method = self.method
        if method is None:
            raise Refused(404, "this checkpoint does not reconstruct images; those of method=mae and simmim do")
        num = method.num_noise
        num_hidden = num - num_visible(num, mask_ratio) if 0 <= mask_ratio <= 1 else 0
        if not 0 < num_hidden < num:
            raise Refused(400, f"ratio must hide at least one of the {num} patches and leave one, got {mask_ratio:g}")
        shown = self.shown(pixels)
        noise = torch.rand(1, num, generator=torch.Generator().manual_seed(mask)).to(shown.image.device)
        found = reconstruct(method, shown.image, noise, mask_ratio)
        error = {name: value.item() for name, value in errors(method, found, self.scene.std).items()}
        return {
            "seen": address(as_png(with_gray(shown.pixels[0], found.hidden[0, 0].cpu().numpy()))),
            "made": address(as_png(to_uint8(found.pasted, self.scene.mean, self.scene.std)[0])),
            "hidden": num_hidden,
            "of": num,
            "error": error["model"],
            "flat_error": error.get("patch_mean", error["mean_colour"]),
            "given_patch_mean": "patch_mean" in error,
        }

    def thumbnail(self, group: str, place: int) -> bytes:
        """A small picture of one of the server's images, as PNG. Raises Refused for a place that there is not."""
        return self.group(group, place).thumbnail(place, self.scene)

    def own(self, group: str, place: int) -> np.ndarray:
        """The pixels (H, W, C) of one of the server's images. Raises Refused for a place that there is not."""
        return self.group(group, place).pixels(place, self.scene.channels)

    def group(self, group: str, place: int) -> Group:
        """The group of that name, which has a place of that number. Raises Refused where there is none."""
        if group not in self.groups or not 0 <= place < len(self.groups[group]):
            raise Refused(404, "there is no such image")
        return self.groups[group]

    # ---- its parts -------------------------------------------------------------------------------------------------

    def shown(self, pixels: np.ndarray) -> Shown:
        """An image (H, W, C) in its central view, as every evaluation sees it."""
        image = self.scene.normalised(self.scene.views_of(Images([pixels], channels=self.scene.channels), np.arange(1)))
        return Shown(
            index=np.zeros(1, np.int64),
            image=image,
            pixels=to_uint8(image, self.scene.mean, self.scene.std),
            labels=np.full(1, UNLABELLED),
            names=["the image"],
            classes=None,
        )

    def nearest(self, feature: Tensor, known: tuple[str, int] | None = None) -> tuple[list[float], list[int]]:
        """Cosine similarity and place in the bank of the images nearest to a feature (1, D), itself left out."""
        itself = self._place_in_bank(known)
        count = max(self.num_neighbours, self.k) + (itself is not None)
        found = nearest(self.rows, feature, count, index="auto")
        pairs = zip(found.closeness[0].tolist(), found.place[0].tolist())
        kept = [(closeness, place) for closeness, place in pairs if place != itself]
        return [closeness for closeness, _ in kept], [place for _, place in kept]

    def _place_in_bank(self, known: tuple[str, int] | None) -> int | None:
        """Where one of the server's images stands in the bank; None for an image that does not."""
        if known is None or known[0] == "train":
            return None if known is None else known[1]
        group, place = self.groups[known[0]], known[1]
        if group.source is not self.groups["train"].source:
            return None
        where = np.flatnonzero(self.bank.index == group.index[place])
        return int(where[0]) if len(where) else None

    def _neighbour(self, closeness: float, place: int) -> dict[str, Any]:
        train = self.groups["train"]
        return {
            "place": place,
            "similarity": closeness,
            "same": closeness >= SAME,
            "name": train.name(place),
            "truth": train.truth(place),
        }

    def _predicted(self, pixels: np.ndarray, closeness: Sequence[float], place: Sequence[int]) -> dict[str, Any] | None:
        """The likeliest classes, by the head or else by a vote; None where there are no classes."""
        if self.predictor is not None and self.classifier is not None:
            (found,) = self.predictor(pixels)
            rows = [{"class": name, "score": score} for name, score in zip(found.classes, found.scores)]
            each = "a class is likely by itself" if self.classifier.multi_label else "they sum up to 1 over all classes"
            return {"by": "head", "how": f"Probabilities of the trained classifier; {each}.", "classes": rows}
        return self._voted(closeness, place) if self.votes else None

    def _voted(self, closeness: Sequence[float], place: Sequence[int]) -> dict[str, Any] | None:
        """The vote of `eval.knn` with its defaults, over those of the nearest images that have a label."""
        label = torch.from_numpy(self.bank.labels[list(place)]).long()  # (k,)
        has_label = label != UNLABELLED
        if not has_label.any():
            return None
        weight = log_weight(torch.tensor(closeness), metric="cosine", vote="weighted", temperature=TEMPERATURE)
        num_classes = int(self.bank.labels.max()) + 1
        votes = log_votes(weight[has_label][None], label[has_label][None], num_classes)[0].softmax(0)  # (classes,)
        share, best = votes.topk(min(self.top, int((votes > 0).sum())))
        names = [class_name(number, self.groups["train"].source.classes) for number in best.tolist()]
        how = (
            f"No classifier was trained on this backbone: these are shares of the vote of the {int(has_label.sum())} "
            f"nearest labelled images, each with the weight exp(similarity / {TEMPERATURE:g}), as in eval.knn. "
            "They are no probabilities."
        )
        rows = [{"class": name, "score": score} for name, score in zip(names, share.tolist())]
        return {"by": "vote", "how": how, "classes": rows}

    def _ratios(self) -> dict[str, Any] | None:
        """The mask ratios that leave a patch visible and one hidden, and the training's own."""
        if self.method is None:
            return None
        num = self.method.num_noise
        return {"least": 1 / num, "most": 1 - 1 / num, "own": getattr(self.method, "mask_ratio", None)}


def check_settings(config: DictConfig) -> None:
    """Raise ValueError for numbers without meaning."""
    for key in ("neighbours", "k", "top"):
        if config[key] is not None and config[key] < 1:
            raise ValueError(f"{key} must be at least 1, got {config[key]}")
