"""A streamed set with its row groups read ahead beside the same set with each read when a batch first needs it.

    python -m benchmarks.stream --latency 0.05 --bandwidth 50

A local file system stands for the network: each read waits `--latency` seconds and then for its bytes at `--bandwidth`
MB/s, several reads side by side each for itself, as object storage serves them. Both ways give the same batches, MAE's
views at 224 pixels, and keep the row groups of the window; they take turns, `--rounds` times, and a ratio is one of a
round's two rates. The third row is the same set from the page cache, without a network: what decoding alone allows.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.local import LocalFileSystem

from benchmarks.loader import make_photos, rates, recipe
from ssl.data.loader import Loader
from ssl.data.parquet import Parquet
from ssl.data.threads import available_cores

SIZE = (224, 224)


class Slow(LocalFileSystem):
    """A local file system whose reads wait as those of a network do."""

    protocol: ClassVar[str] = "slow"

    def __init__(self, latency: float = 0.0, bandwidth: float = float("inf"), **options: Any) -> None:
        super().__init__(**options)
        self.latency, self.bandwidth = latency, bandwidth  # seconds, MB/s

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        data = super().cat_file(path, start=start, end=end, **options)
        time.sleep(self.latency + len(data) / 1e6 / self.bandwidth)
        return data


def write_set(folder: Path, images: list[bytes], *, num: int, rows_per_group: int) -> None:
    """`num` rows in one file, the images one after another as often as needed."""
    rows = [images[row % len(images)] for row in range(num)]
    pq.write_table(pa.table({"image": rows}), folder / "train.parquet", row_group_size=rows_per_group)


def epochs(loader: Loader, *, batch_size: int) -> Callable[[], None]:
    """A function that goes through the next epoch each time."""
    per_epoch = loader.steps_per_epoch(batch_size)
    starts = iter(range(0, 10**9, per_epoch))

    def epoch() -> None:
        start = next(starts)
        for _ in loader.batches(start_step=start, stop_step=start + per_epoch, global_batch_size=batch_size):
            pass

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEG photos; without it, made ones of about 100 kB")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that each read waits")
    parser.add_argument("--bandwidth", type=float, default=50.0, help="MB/s of each read")
    parser.add_argument("--num", type=int, default=512, help="images per epoch, way and round")
    parser.add_argument("--rows-per-group", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    fsspec.register_implementation("slow", Slow)
    machine = platform.processor() or platform.machine()
    print(
        f"{machine}, torch {torch.__version__}, {options.threads} threads; {options.latency * 1000:g} ms and "
        f"{options.bandwidth:g} MB/s per read, {options.rows_per_group} images per row group, window {options.window}"
    )
    with tempfile.TemporaryDirectory() as made:
        photos = options.images or Path(made) / "photos"
        if options.images is None:
            photos.mkdir()
            make_photos(photos)
        images = [path.read_bytes() for path in sorted(photos.rglob("*")) if path.is_file()]
        table = Path(made) / "table"
        table.mkdir()
        write_set(table, images, num=options.num, rows_per_group=options.rows_per_group)
        network = {"latency": options.latency, "bandwidth": options.bandwidth}

        def way(root: str, readers: int, storage_options: dict[str, Any] | None) -> Callable[[], None]:
            source = Parquet(root=root, window=options.window, readers=readers, storage_options=storage_options)
            settings: dict[str, Any] = {"size": SIZE, "channels": 3, "seed": 0, "threads": options.threads}
            return epochs(Loader(source, recipe("mae"), **settings), batch_size=options.batch_size)

        ways = {
            "each row group when it is needed": way(f"slow://{table}", 0, network),
            f"read ahead by {options.readers} readers": way(f"slow://{table}", options.readers, network),
            "without a network": way(f"file://{table}", options.readers, None),
        }
        for run in ways.values():
            run()  # threads start, files are read once
        rounds = np.array([[rates(run, options.num)[0] for run in ways.values()] for _ in range(options.rounds)])
        ratios = rounds / rounds[:, :1]  # (rounds, ways)
        print(f"{'row groups':36} {'images/s':>9} {'ratio':>6} {'lowest':>7} {'highest':>8}")
        for name, rate, ratio in zip(ways, rounds.T, ratios.T):
            print(f"{name:36} {np.median(rate):9,.0f} {np.median(ratio):6.2f} {ratio.min():7.2f} {ratio.max():8.2f}")


if __name__ == "__main__":
    main()
