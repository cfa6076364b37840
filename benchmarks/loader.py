"""The peers' way of making views beside ours: Pillow and torchvision per sample in a DataLoader's worker processes.

    python -m benchmarks.loader --images DIR

As many worker processes as our threads, the two ways in turns, `--rounds` times; a ratio is one of a round's two rates.
Both make the views of `conf/augment/`. Where a row says "uint8 crops", ours leaves flip, colour, blur and normalisation
to the device that the model runs on, as training does; where it says "all on the CPU", it does them there too. Without
--images it makes photo-sized JPEGs of its own. The ratio by processor time holds on a machine with other work, too.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ssl.data.augment import Augment
from ssl.data.folder import Folder
from ssl.data.loader import Loader
from ssl.data.threads import available_cores
from ssl.data.views import View, make_views

ROOT = Path(__file__).resolve().parents[1]
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


def parts(
    folder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, int, Callable[[], None], Callable[[], None]]]:
    """(name, images per epoch, the peers' epoch, our epoch) of each part."""
    photos = sorted(path for path in folder.rglob("*") if path.is_file())
    source = Folder("train", root=str(folder))
    small = np.random.default_rng(0).integers(0, 256, (NUM_SMALL, 32, 32, 3), dtype=np.uint8)
    workers = options.threads
    for name, views, size, on_cpu in (
        ("MAE views, JPEG to 224 px, uint8 crops", recipe("mae"), 224, False),
        ("SimCLR two views, JPEG to 224 px, uint8 crops", recipe("simclr"), 224, False),
        ("SimCLR two views, JPEG to 224 px, all on the CPU", recipe("simclr"), 224, True),
        ("SimCLR two views, 32 px from memory, all on the CPU", recipe("simclr_small"), 32, True),
        ("crop and flip, 32 px from memory, all on the CPU", [CROP_AND_FLIP], 32, True),
    ):
        if not any(part in name for part in options.parts):
            continue
        is_small = size == 32
        num = options.num_small if is_small else options.num_photos
        batch_size = min(512 if is_small else 64, num, len(small) if is_small else len(source))
        num -= num % batch_size
        dataset = PeersDataset(small if is_small else photos, views, size, num, to_float=on_cpu)
        loader = Loader(
            ArraySource(small) if is_small else source,
            views,
            size=(size, size),
            channels=3,
            seed=0,
            threads=workers,
            in_memory_gib=4.0 if is_small else 0.0,
            transform=Augment(views, mean=MEAN, std=STD) if on_cpu else None,
        )
        our_way = ours(loader, batch_size=batch_size, num=num)
        yield name, num, peers(dataset, batch_size=batch_size, workers=workers), our_way


def cpu_seconds() -> float:
    """Processor time of this process and its workers so far (on Linux; elsewhere the workers' is left out)."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        stat = Path(f"/proc/{worker.pid}/stat")
        if stat.exists():
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def rates(way: Callable[[], None], num: int) -> tuple[float, float]:
    """Images per second, and per second of processor time, of one epoch."""
    start, cpu_start = time.perf_counter(), cpu_seconds()
    way()
    return num / (time.perf_counter() - start), num / (cpu_seconds() - cpu_start)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEG photos")
    parser.add_argument("--threads", type=int, default=available_cores(), help="our threads, and their processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-photos", type=int, default=512, help="photos per round and way")
    parser.add_argument("--num-small", type=int, default=8192, help="CIFAR-size images per round and way")
    parser.add_argument("--parts", nargs="+", default=[""], help="only parts whose name holds one of these")
    options = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {options.threads} threads or processes")
    print(f"{'views':52} {'peers/s':>9} {'ours/s':>9} {'ratio':>6} {'lowest':>7} {'highest':>8} {'by CPU time':>12}")
    with tempfile.TemporaryDirectory() as made:
        folder = options.images or Path(made)
        if options.images is None:
            make_photos(folder)
        for name, num, their_way, our_way in parts(folder, options):
            their_way(), our_way()  # workers start, files are read once
            rounds = np.array([[rates(their_way, num), rates(our_way, num)] for _ in range(options.rounds)])
            (theirs, _), (mine, _) = np.median(rounds, axis=0)  # (rounds, ways, wall or CPU)
            ratios = rounds[:, 1] / rounds[:, 0]  # (rounds, wall or CPU)
            ratio, by_cpu = np.median(ratios, axis=0)
            print(
                f"{name:52} {theirs:9,.0f} {mine:9,.0f} {ratio:6.2f} {ratios[:, 0].min():7.2f} "
                f"{ratios[:, 0].max():8.2f} {by_cpu:12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
