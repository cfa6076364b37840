"""The peers' way of making views beside ours: Pillow and torchvision per sample in a DataLoader's worker processes.

    python -m benchmarks.loader --images DIR

As many worker processes as our threads. Both make the views of `conf/augment/`. Where a row says "uint8 crops", ours
leaves flip, colour, blur and normalisation to the device that the model runs on, as training does; where it says "all
on the CPU", it does them there too. Where it says "prepared", ours reads what `python -m ssl.prepare` made of the same
photos, and the peers the photos. Without --images it makes photo-sized JPEGs of its own. Our decoder is compiled, or
read from where it is kept, before anything is measured. How it is measured stands in benchmarks/compare.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.compare import ROOT, Part, Way, parser_of, run, timed
from ssl import prepare
from ssl.config import CONF
from ssl.data import jpeg_window
from ssl.data.augment import Augment
from ssl.data.folder import Folder
from ssl.data.loader import Loader
from ssl.data.parquet import Parquet
from ssl.data.sources import Source
from ssl.data.views import View, make_views

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CROP_AND_FLIP = View(scale=(0.2, 1.0), interpolation="bilinear", flip=0.5)
"""torchvision's default interpolation."""
NUM_SMALL = 10_000
"""CIFAR-size images held in memory."""


def peers_transform(view: View, size: int, *, to_float: bool) -> transforms.Compose:
    """torchvision's transforms for a view's recipe."""
    how = transforms.InterpolationMode(view.interpolation)
    steps: list[Callable] = [
        transforms.RandomResizedCrop(size, scale=view.scale, ratio=view.ratio, interpolation=how),
        transforms.RandomHorizontalFlip(view.flip),
    ]
    if view.jitter:
        jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        steps.append(transforms.RandomApply([jitter], view.jitter))
    if view.grayscale:
        steps.append(transforms.RandomGrayscale(view.grayscale))
    if view.blur:
        blur = transforms.GaussianBlur(view.blur_kernel_size((size, size)), view.blur_sigma)
        steps.append(transforms.RandomApply([blur], view.blur))
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)] if to_float else [transforms.PILToTensor()]
    return transforms.Compose(steps)


class PeersDataset(Dataset):
    """Images from files or from an array (N, H, W, C), every view made per sample."""

    def __init__(self, images: list[Path] | np.ndarray, views: list[View], size: int, num: int, *, to_float: bool):
        self.images, self.num = images, num
        self.transforms = [peers_transform(view, size, to_float=to_float) for view in views]

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        image = self.images[index % len(self.images)]
        picture = Image.open(image).convert("RGB") if isinstance(image, Path) else Image.fromarray(image)
        return [transform(picture) for transform in self.transforms]


class ArraySource:
    """An array of images as a Source."""

    def __init__(self, images: np.ndarray):
        self.images, self.name, self.classes, self.num_ignored = images, "an array", None, 0
        self.labels = np.full(len(images), -1)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"row {index}"


def peers(dataset: PeersDataset, *, batch_size: int, workers: int) -> Callable[[], None]:
    """An epoch over `dataset` in worker processes that stay alive."""
    loader = DataLoader(
        dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True
    )  # fmt: skip

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def ours(loader: Loader, *, batch_size: int, num: int) -> Callable[[], None]:
    """As many batches of our loader."""
    starts = iter(range(0, 10**9, num // batch_size))

    def epoch() -> None:
        start = next(starts)
        for _ in loader.batches(
            start_step=start, stop_step=start + num // batch_size, global_batch_size=batch_size
        ):  # fmt: skip
            pass

    return epoch


def recipe(name: str) -> list[View]:
    """The views of conf/augment/`name`.yaml."""
    return make_views(OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "augment" / f"{name}.yaml"))["views"])  # type: ignore


@dataclass(frozen=True)
class Views:
    """A part: which views of which images, and how many times faster than the peers they should be."""

    name: str
    views: Sequence[View]
    wanted: float
    is_small: bool = False
    on_cpu: bool = False
    prepared: bool = False


def all_views() -> list[Views]:
    """Every part, in order."""
    mae, simclr, small = recipe("mae"), recipe("simclr"), recipe("simclr_small")
    return [
        Views("MAE views, JPEG to 224 px, uint8 crops", mae, 2.5),
        Views("MAE views, prepared JPEG to 224 px, uint8 crops", mae, 5, prepared=True),
        Views("SimCLR two views, JPEG to 224 px, uint8 crops", simclr, 7),
        Views("SimCLR two views, prepared JPEG to 224 px, uint8 crops", simclr, 8, prepared=True),
        Views("SimCLR two views, JPEG to 224 px, all on the CPU", simclr, 1.25, on_cpu=True),
        Views("SimCLR two views, 32 px from memory, all on the CPU", small, 5, is_small=True, on_cpu=True),
        Views("crop and flip, 32 px from memory, all on the CPU", [CROP_AND_FLIP], 10, is_small=True, on_cpu=True),
    ]


PEER = "Pillow, torchvision"


def parts(given: argparse.Namespace) -> Iterator[Part]:
    """A part for each of `all_views`."""
    if not jpeg_window.compile_decoder():
        print("without numba: JPEGs are decoded by libjpeg-turbo alone")
    with tempfile.TemporaryDirectory() as made:
        folder = given.images or Path(made) / "photos"
        if given.images is None:
            folder.mkdir()
            make_photos(folder)
        prepared = cache(partial(prepare_photos, folder, Path(made) / "prepared"))
        small = np.random.default_rng(0).integers(0, 256, (NUM_SMALL, 32, 32, 3), dtype=np.uint8)
        for each in all_views():
            wanted = {PEER: each.wanted}
            num, batch_size = given.num_photos, min(64, given.num_photos)
            if each.is_small:
                num, batch_size = given.num_small, min(512, given.num_small)
            else:
                batch_size = min(batch_size, len(Folder("train", root=str(folder))))
            num -= num % batch_size
            sizes = {"num": num, "batch_size": batch_size, "threads": given.threads}
            ways = partial(ways_of, each, folder, small, prepared, **sizes)
            yield Part(each.name, "images", num, ways, wanted)


def ways_of(
    each: Views,
    folder: Path,
    small: np.ndarray,
    prepared: Callable[[], Source],
    *,
    num: int,
    batch_size: int,
    threads: int,
) -> dict[str, Way]:
    """The peers' epoch and ours, each of `num` images."""
    size = 32 if each.is_small else 224
    photos = sorted(path for path in folder.rglob("*") if path.is_file())
    dataset = PeersDataset(small if each.is_small else photos, list(each.views), size, num, to_float=each.on_cpu)
    if each.is_small:
        source: Source = ArraySource(small)
    else:
        source = prepared() if each.prepared else Folder("train", root=str(folder))
    loader = Loader(
        source,
        each.views,
        size=(size, size),
        channels=3,
        seed=0,
        threads=threads,
        in_memory_gib=4.0 if each.is_small else 0.0,
        transform=Augment(each.views, mean=MEAN, std=STD) if each.on_cpu else None,
    )
    their_way = peers(dataset, batch_size=batch_size, workers=threads)
    return {PEER: timed(their_way), "ours": timed(ours(loader, batch_size=batch_size, num=num))}


def prepare_photos(folder: Path, out: Path) -> Source:
    """What `python -m ssl.prepare` makes of the photos, as it comes."""
    prepare.register()
    settings = ["data=folder", f"data.root={folder}", f"out={out}"]
    with initialize_config_dir(CONF, version_base="1.3"), contextlib.redirect_stdout(io.StringIO()):
        prepare.run(compose("prepare", overrides=settings))
    return Parquet("train", root=str(out))


def rates(way: Callable[[], None], num: int) -> tuple[float, float]:
    """Images per second, and per second of processor time, of one epoch."""
    sample = timed(way)()
    return num / sample.wall, num / sample.cpu


def make_photos(folder: Path, num: int = 64) -> None:
    """500 x 375 JPEGs of noise at every scale, about 100 kB each."""
    generator = np.random.default_rng(0)
    for number in range(num):
        image = np.zeros((375, 500, 3))
        for side in (3, 12, 48, 192):
            noise = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            image += np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)) / 4
        stream = io.BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        (folder / f"{number:03d}.jpg").write_bytes(stream.getvalue())


QUICK = ["--num-photos", "64", "--num-small", "2048"]


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--images", type=Path, help="a folder of JPEG photos")
    parser.add_argument("--num-photos", type=int, default=512, help="photos per round and way")
    parser.add_argument("--num-small", type=int, default=51_200, help="CIFAR-size images per round and way")
    return parser


def main() -> None:
    given = options().parse_args()
    run(parts(given), given)


if __name__ == "__main__":
    main()
