"""Every command of the README runs, in the order in which a reader meets it, made small by more overrides."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.forks import start

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

SMALL = {
    "ssl.pretrain": "trainer.steps=1 trainer.global_batch_size=4 trainer.device=cpu wandb.mode=disabled",
    "eval.knn": "device=cpu k=[3] data.limit=40",
    "eval.linear_probe": "device=cpu lr=[0.1] weight_decay=[0.0] steps=20 data.limit=40",
    "eval.finetune": "trainer.steps=1 trainer.global_batch_size=4 trainer.device=cpu wandb.mode=disabled data.limit=40",
    "eval.health": "device=cpu sample=8 views=2 view_images=4",
    "eval.predict": "device=cpu top=1",
    "eval.features": "device=cpu",
    "eval.export": "",
    "eval.report": "",
    "eval.look": "device=cpu num_images=2",
    "ssl.prepare": "",
    "ssl.models": "",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("make ")]


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def labelled_photos(root: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cats", "dogs"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = generator.integers(0, 255, (240, 320, 3), dtype=np.uint8)
                (folder / f"{number}.jpg").write_bytes(jpeg(pixels))


def parquet_cifar(root: Path) -> None:
    """Forty images in the layout of Hugging Face's cifar10."""
    root.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        images = [
            {"bytes": jpeg(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)), "path": None} for _ in range(40)
        ]
        table = pa.table({"img": images, "label": [number % 10 for number in range(40)]})
        pq.write_table(table, root / f"{split}.parquet")


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A folder of the reader's: photos, CIFAR-10, and the parts that the README tells how to write."""
    home = tmp_path_factory.mktemp("reader")
    labelled_photos(home / "my" / "photos")
    parquet_cifar(home / "data" / "cifar10")
    (home / "my_parts.py").write_text(next(block for block in blocks("python") if block.startswith("# my_parts.py")))
    for block in blocks("yaml"):
        path = home / re.match(r"# (\S+)\n", block)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.split("\n", 1)[1])
    return home


def made_small(command: str, home: Path) -> list[str]:
    """The command with the reader's folders for the README's, this Python, fewer processes, and one small step."""
    command = command.replace("/my/photos", f"{home}/my/photos").replace("/data/", f"{home}/data/")
    command = command.replace("--nproc-per-node 8", "--nproc-per-node 2")
    words = shlex.split(command)
    module = next(word for word in words if word in SMALL)
    if words[0] == "torchrun":
        words = [str(Path(sys.executable).with_name("torchrun")), *words[1:], f"out={home}/torchrun"]
    else:
        assert words[0] == "python"
        words[0] = sys.executable
    if "data=" not in command and (module == "ssl.pretrain" or "ckpt=random" in command):
        words += ["data=embedded", "data.source.num_train=80", "data.source.num_test=60"]  # else all 7,200 images
    given = {word.split("=")[0] for word in words}
    return [*words, *(word for word in SMALL[module].split() if word.split("=")[0] not in given)]


def typed(words: list[str], home: Path) -> tuple[int | None, str]:
    """Exit code and output of `python -m <module> <words>` in the folder `home`."""
    said = home / "said.txt"
    said.unlink(missing_ok=True)
    child = start(words[words.index("-m") + 1 :], home=home, said=said)
    child.join(600)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode, said.read_text()


def run(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(home)])}
    return subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command: str, reader: Path):
    words = made_small(command, reader)
    if command == commands()[0] or "-m" not in words or words[0] != sys.executable:  # one as it is typed, and torchrun
        ended = run(words, reader)
        code, said = ended.returncode, f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    else:
        code, said = typed(words, reader)
    assert code == 0, said[-6000:]


def test_the_commands_of_the_makefile_exist():
    targets = {line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")}
    assert targets == {"demo", "test"}
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


def test_timm_alone_loads_what_the_readme_says(reader: Path):
    snippet = next(block for block in blocks("python") if "local-dir:" in block)
    assert (reader / re.search(r'local-dir:([^"]+)', snippet)[1]).is_dir(), "the command that makes it stands before"
    code = snippet + "import torch\nassert model(torch.zeros(1, 3, 32, 32)).shape == (1, 768)\n"
    ended = run([sys.executable, "-c", code], reader)
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_files_that_the_readme_links_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
