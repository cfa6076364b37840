"""What is looked at: a checkpoint, its images and their features; each part is made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from eval.classifier import HEADS, Classifier, load_classifier
from eval.extract import centre_view
from eval.head_file import is_head, load_head
from eval.images import Views, find_images, read_views
from eval.layers import make_extract, parse_sets, resolve_sets
from eval.look.estimate import Estimate
from eval.look.result import DoesNotApply
from eval.look.samples import MOST_SHOWN, SampleFeatures, Shown, sample_index
from eval.look.settings import SceneConfig
from eval.look.start_weights import BEFORE_TRAINING, RANDOM, start_weights
from eval.splits import data_settings
from eval.subject import choose_device
from eval.untrained import untrained_title
from ssl.checkpoint import LoadedBackbone, load_backbone
from ssl.config import build, plain
from ssl.data.augment import Augment
from ssl.data.image_size import as_size, choose_image_size
from ssl.data.sources import SPLITS, NoTestSplit, Source
from ssl.data.subset import Subset, limit
from ssl.loaded import is_foreign
from ssl.method_file import load_method
from ssl.methods.base import Method
from ssl.models.backbones import BackboneSpec, backbone_from_spec, build_backbone, model_name
from ssl.models.initialize import initialize
from ssl.pictures import to_uint8
from ssl.trainer import choose_dtype


class Scene:
    """A checkpoint and its images, as `SceneConfig` names them. Raises ValueError, saying what to do, where they do not
    go together.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.seed = int(config.seed)
        self.device = choose_device(config.device.name)
        self.dtype = choose_dtype(config.precision.name, self.device)
        self._sources: dict[str, Source] = {}
        self._features: dict[tuple[str, int, int], SampleFeatures] = {}
        self.notes: list[str] = []
        """What a reader of the pictures must know, for the terminal and the JSON."""
        if config.ckpt == "pixels":
            raise ValueError("ckpt=pixels has no network to look into; give a checkpoint, or ckpt=random model=...")
        if config.ckpt == "random" and config.model is None:
            raise ValueError("ckpt=random needs a backbone: give model=, such as ckpt=random model=resnet18")
        if config.indices is not None and config.images is not None:
            raise ValueError("images= and indices= both name the images to look at; give one")
        named = next((key for key in ("images", "indices") if config[key] is not None), None)
        if named is not None and config.num_images != SceneConfig.num_images:
            raise ValueError(f"num_images= has no effect beside {named}=, which names them; leave one out")
        if config.split is not None and config.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {config.split!r}")
        for key in ("num_images", "sample", "batch_size"):
            if config[key] < 1:
                raise ValueError(f"{key} must be at least 1, got {config[key]}")
        self.loaded: LoadedBackbone | None = self._load()
        given = plain(config.data)
        self._own_data = given["name"] == "checkpoint" and self.loaded is not None
        own = None if self.loaded is None else self.loaded.config.get("data", {})
        self._data: Callable[[], dict[str, Any]] = lambda: data_settings(given, own, subject=str(config.ckpt))

    # ---- the checkpoint --------------------------------------------------------------------------------------------

    def untrained(self) -> nn.Module:
        """The same architecture with the weights that the checkpoint's run started from, or with random ones."""
        return self._untrained[0]

    @property
    def untrained_title(self) -> str:
        """What the weights of `untrained` are: `before training`, `before fine-tuning`, or `random weights`."""
        return self._untrained[1]

    def called(self, which: str) -> str:
        """What `trained` and `untrained` are called where a person reads it: the latter by what it was before."""
        known = self.loaded is None or self.untrained_title == BEFORE_TRAINING
        return which if which != "untrained" or known else self.untrained_title

    @property
    def compared_with(self) -> str | None:
        """The title of `untrained` where a look has asked for it."""
        return self.untrained_title if "_untrained" in vars(self) else None

    @property
    def is_start_known(self) -> bool:
        """Whether `untrained` is what the run started from, so that the difference is what training changed."""
        return self.untrained_title != RANDOM

    def method(self) -> Method:
        """The whole pretraining method with its heads, in eval mode on the device.

        Raises DoesNotApply where the checkpoint holds no more than a backbone.
        """
        return self._method

    def classifier(self) -> Classifier | None:
        """What names classes on this checkpoint: a fine-tuned model's classifier or a probed head; None without."""
        return self._classifier

    @cached_property
    def _network(self) -> tuple[nn.Module, BackboneSpec, list[float], list[float]]:
        if self.loaded is not None:
            found = self.loaded.model, self.loaded.spec, self.loaded.mean, self.loaded.std
        else:
            data = self._data()
            size = choose_image_size(data.get("image_size"), self.source("train"))
            settings = plain(self.config.model)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)  # as ssl.pretrain does
                model, spec = build_backbone(
                    model_name(settings),
                    image_size=size,
                    in_chans=int(data["channels"]),
                    patch_size=settings["patch_size"],
                    stem=settings["stem"],
                    drop_path=settings["drop_path"],
                    model_args=settings["args"],
                )
                initialize(model, settings["init"])
            found = model, spec, [float(x) for x in data["mean"]], [float(x) for x in data["std"]]
        return self._still(found[0]), *found[1:]

    @property
    def backbone(self) -> nn.Module:
        """In eval mode, without gradients of its parameters, on the device. It is shared: copy it to change it."""
        return self._network[0]

    @property
    def spec(self) -> BackboneSpec:
        return self._network[1]

    @property
    def mean(self) -> list[float]:
        return self._network[2]

    @property
    def std(self) -> list[float]:
        return self._network[3]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.spec.image_size

    @property
    def channels(self) -> int:
        return self.spec.in_chans

    @property
    def run_config(self) -> Mapping[str, Any]:
        """What the checkpoint says of the run that made it; nothing where it does not."""
        return {} if self.loaded is None else self.loaded.config

    @property
    def run_dir(self) -> Path | None:
        """The folder of the run, or of the export."""
        return None if self.loaded is None else self.loaded.run_dir

    @property
    def title(self) -> str:
        return untrained_title(self.config) if self.loaded is None else str(self.loaded.path)

    @property
    def step(self) -> int | None:
        return None if self.loaded is None else self.loaded.step

    @property
    def method_name(self) -> str | None:
        """The class of the pretraining method, such as MAE; None where the checkpoint does not say."""
        target = str((self.run_config.get("method") or {}).get("_target_", ""))
        return target.rpartition(".")[2] or None

    @cached_property
    def _untrained(self) -> tuple[nn.Module, str]:
        if self.loaded is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                return self._still(backbone_from_spec(self.spec)), RANDOM
        network, title = start_weights(self.loaded, seed=self.seed, trust=list(self.config.trust))
        if title == RANDOM:
            self.notes.append(f"it is compared with random weights: what {self.title} started from is not known here")
        return self._still(network), title

    def _check_still_there(self) -> None:
        """Raise ValueError where the run has gone on and removed the step that is looked at."""
        if self.loaded is not None and not self.loaded.path.exists() and not is_foreign(self.config.ckpt):
            raise ValueError(
                f"{self.loaded.path} was removed while it was looked at, as a run that goes on keeps its last steps; "
                "run the command again"
            )

    @cached_property
    def _method(self) -> Method:
        if self.loaded is None:
            raise DoesNotApply(f"{self.title} is a backbone alone; this needs the checkpoint of a pretraining run")
        self._check_still_there()
        if not (self.loaded.path / "method.safetensors").exists() or "method" not in self.run_config:
            raise DoesNotApply(
                f"{self.loaded.path} holds a backbone without the heads of its pretraining method; give the folder of "
                "the pretraining run, or a checkpoint in it"
            )
        if self.config.data.image_size is not None:
            raise DoesNotApply("data.image_size has no effect on a pretraining method's own heads; leave it out")
        with torch.random.fork_rng(devices=[]):
            method = load_method(self.loaded.path, trust=list(self.config.trust))
        return self._still(method)  # pyright: ignore[reportReturnType]

    @cached_property
    def _classifier(self) -> Classifier | None:
        if self.loaded is None:
            if self.config.head is not None:
                raise ValueError("head= has no effect with ckpt=random; leave it out")
            return None
        if self.config.head is not None:
            head = Path(self.config.head).expanduser()
            if not is_head(head):
                raise ValueError(f"head={head} is no folder of a probed head; python -m eval.linear_probe writes one")
            return load_classifier(head, backbone=self.loaded.path, device=self.device)
        if self.loaded.classifier is not None:
            self._check_still_there()
            return load_classifier(self.loaded.path, device=self.device)  # the very step, whatever a run has made since
        heads = [head for head in sorted(self.loaded.run_dir.glob(HEADS)) if self._is_of_this_backbone(head)]
        named = [head for head in heads if head.name == "linear_probe.head"] or heads
        if len(named) > 1:
            listed = ", ".join(map(str, named))
            raise DoesNotApply(f"{self.title} has {len(named)} probed heads; give one of them as head=: {listed}")
        return load_classifier(named[0], backbone=self.loaded.path, device=self.device) if named else None

    def _is_of_this_backbone(self, head: Path) -> bool:
        try:
            found = load_head(head)
        except (ValueError, OSError) as error:
            self.notes.append(f"{head} is left out: {error}")
            return False
        assert self.loaded is not None
        if found.sha256 != self.loaded.hash:
            self.notes.append(f"{head} is left out: it was trained on other weights ({found.checkpoint})")
        return found.sha256 == self.loaded.hash

    # ---- images ----------------------------------------------------------------------------------------------------

    @property
    def split(self) -> str:
        """The split that is looked at: the one that was given, else test where the data have one."""
        if self.config.split is not None:
            return str(self.config.split)
        return "test" if self.has_test_split else "train"

    @cached_property
    def has_test_split(self) -> bool:
        """Whether the data have a test split of their own."""
        try:
            self.source("test")
        except NoTestSplit:
            return False
        except ValueError as error:  # labels that are missing, or files that are
            if self.config.split == "test":
                raise
            self.source("train")  # where that is gone too, it is said of the images, and not of their test split
            self.notes.append(f"the test split is left out: {error}")
            return False
        return True

    def source(self, split: str) -> Source:
        """The images of a split, labelled or not; of train those that `data.limit` leaves.

        Raises NoTestSplit where there is no test split, ValueError where the images are gone.
        """
        if split not in self._sources:
            data = self._data()
            within = "ssl.data." if self._own_data else None  # a checkpoint may come from anyone
            try:
                source: Source = build(data["source"], within=within, split=split)
            except NoTestSplit:
                raise
            except ValueError as error:
                hint = "\nThat is the data that the checkpoint names: were the images moved, give data.root="
                raise ValueError(f"{error}{hint if self._own_data else ''}") from error
            if split == "train":
                seed = int(self.run_config.get("seed") or 0) if self._own_data else self.seed
                source = limit(source, data.get("limit"), seed=seed)
            self._sources[split] = source
        return self._sources[split]

    @property
    def data_name(self) -> str:
        return str(self._data()["name"])

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes of the images; None where no image has one."""
        return self.source("train").classes

    def shown(self, num: int | None = None, split: str | None = None) -> Shown:
        """The images that a person named, else `num` of `split`, seeded and spread over its classes.

        Raises ValueError where one cannot be decoded that a person named, or none at all, and for more than 256 images
        that are to be looked at.
        """
        if self.config.images is not None:
            source: Source = find_images(plain(self.config.images))
            index, classes = np.arange(len(source)), None
        else:
            source = self._of_data(split)
            classes = source.classes
            index = self._chosen(source, num or self.config.num_images)
        named = self.config.images is not None or self.config.indices is not None
        if len(index) > MOST_SHOWN and (named or num is None):
            raise ValueError(
                f"{len(index):,} images are too many to look at one by one, at most {MOST_SHOWN} are; give fewer files "
                "in images=, fewer indices=, or a smaller num_images="
            )
        views = self.views_of(source, index)
        if views.failed and (named or not len(views.index)):
            raise ValueError(f"cannot be decoded: {'; '.join(views.failed.values())}")
        self.note_bad(views.failed)
        return self._as_shown(source, index, views, classes)

    def _of_data(self, split: str | None) -> Source:
        try:
            return self.source(split or self.split)
        except NoTestSplit:
            raise
        except ValueError as error:
            raise ValueError(f"{error}; or name some to look at: images=FILE") from error

    def _chosen(self, source: Source, num: int) -> np.ndarray:
        """Indices into the split: those given, else a seeded sample."""
        if self.config.indices is not None:
            index = np.array(plain(self.config.indices), np.int64)
            if not index.size or index.min() < 0 or index.max() >= len(source):
                raise ValueError(f"indices must lie in 0..{len(source) - 1} of {source.name}, got {index.tolist()}")
            return index
        return sample_index(source, num, self.seed)

    def _as_shown(self, source: Source, index: np.ndarray, views: Views, classes: list[str] | None) -> Shown:
        place = index[views.index]
        image = self.normalised(views)
        return Shown(
            index=place,
            image=image,
            pixels=to_uint8(image, self.mean, self.std),
            labels=np.asarray(source.labels)[place],
            names=[source.describe(int(each)) for each in place],
            classes=classes,
        )

    def views_of(self, source: Source, index: np.ndarray, size: tuple[int, int] | None = None) -> Views:
        """Central views of the images of `source` at `index`, whose own `index` counts within the given one."""
        chosen = source if len(index) == len(source) and (index == np.arange(len(source))).all() else None
        batches = read_views(
            Subset(source, index) if chosen is None else chosen,
            size=size or self.image_size,
            channels=self.channels,
            batch_size=len(index),
            threads=self.config.threads,
        )
        return next(iter(batches))

    def normalised(self, views: Views) -> Tensor:
        """Images (B, C, h, w) float32 on the device, as every evaluation sees them."""
        augment = Augment([centre_view(self.image_size)], mean=self.mean, std=self.std).to(self.device)
        return views.normalised(augment, self.device)

    def thumbnails(self, split: str, index: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
        """Small central views, uint8 (N, size, size, 3), black for what cannot be decoded."""
        index = np.asarray(index, np.int64)
        views = self.views_of(self.source(split), index, (size, size))
        pixels = np.zeros((len(index), size, size, 3), np.uint8)
        pixels[views.index] = to_uint8(views.crops.float() / 255, [0.0] * self.channels, [1.0] * self.channels)
        return pixels

    # ---- features --------------------------------------------------------------------------------------------------

    def features(
        self, split: str | None = None, model: nn.Module | None = None, num: int | None = None
    ) -> SampleFeatures:
        """Features of `num` images of a split (by default `sample`), seeded; of `model` where it is given.

        They are kept: the second look at the same images reads nothing. Raises ValueError where one is not finite.
        """
        split, num = split or self.split, int(num or self.config.sample)
        network = self.backbone if model is None else model
        key = (split, num, id(network))
        if key not in self._features:
            source = self.source(split)
            self._features[key] = self.features_of(source, sample_index(source, num, self.seed), network)
        return self._features[key]

    @torch.no_grad()
    def features_of(self, source: Source, index: np.ndarray, model: nn.Module | None = None) -> SampleFeatures:
        """Features of the images of `source` at `index`, in this order."""
        network = self.backbone if model is None else model
        extract = self.extract(network)
        features, readable, failed = [], [], {}
        for place, image in self.batches(Subset(source, index), "features", failed):
            features.append(extract(image).float().cpu())  # (B, D)
            readable.append(place)
        every, place = torch.cat(features), index[np.concatenate(readable)]  # (N, D), (N,)
        if not torch.isfinite(every).all():
            raise ValueError(f"{self.title} gives features that are not finite; it has diverged: give an earlier step")
        return SampleFeatures(
            features=every,
            index=place,
            labels=np.asarray(source.labels)[place],
            names=[source.describe(int(each)) for each in place],
            num_bad=len(failed),
        )

    def batches(self, source: Source, what: str, failed: dict[int, str]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Numbers (B,) within `source` and images (B, C, h, w), normalised, of all that can be decoded.

        Says how long the `what` of them will take. Those that cannot be decoded are noted, and told in `failed`. Raises
        ValueError where that is all of them.
        """
        name = source.source.name if isinstance(source, Subset) else source.name
        estimate = Estimate(f"{what} of {len(source):,} images of {name}", len(source))
        for views in read_views(
            source,
            size=self.image_size,
            channels=self.channels,
            batch_size=self.config.batch_size,
            threads=self.config.threads,
        ):
            failed |= views.failed
            if len(views.index):
                yield views.index, self.normalised(views)
                estimate.at(int(views.index[-1]) + 1)
        self.note_bad(failed)
        if len(failed) == len(source):
            raise ValueError(f"none of the {len(failed)} images of {name} can be decoded")

    def extract(self, model: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
        """The function from normalised images (B, C, h, w) to features (B, D), pooled as `pooling` says."""
        network = self.backbone if model is None else model
        sets = resolve_sets(network, parse_sets("last", self.config.pooling))
        if len(sets) > 1:
            raise ValueError(f"pooling={self.config.pooling} names {len(sets)} features, where one is looked at")
        read = make_extract(network, sets, device=self.device, dtype=self.dtype)
        return lambda image: read(image)[0]

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _load(self) -> LoadedBackbone | None:
        if self.config.ckpt == "random":
            return None
        data = plain(self.config.data)
        size = as_size(data["image_size"])
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
            loaded = load_backbone(self.config.ckpt, model=plain(self.config.model), image_size=size)
        self.notes += loaded.notes
        return loaded

    def _still(self, network: nn.Module) -> nn.Module:
        return network.to(self.device).eval().requires_grad_(False)

    def note_bad(self, failed: Mapping[int, str]) -> None:
        """Note that images are left out, and why: what read_views gives as `failed`."""
        for reason in failed.values():
            note = f"left out, as it cannot be decoded: {reason}"
            if note not in self.notes:
                self.notes.append(note)
