"""Commands as forks of one process that has torch loaded: each starts in 0.2 s where an interpreter takes 4 s.

    child = start(["ssl.pretrain", "method=mae", "out=runs/a"], home=tmp_path, said=tmp_path / "said.txt")
    child.join()

Nothing heavy is imported at the top: the server imports this file before anything else.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["torch", "timm", "faiss", "ssl.pretrain"]
PRELOADED += [f"eval.{name}" for name in ("finetune", "health", "predict", "features", "export")]
"""What the commands import, once."""


def start(
    words: list[str], *, home: Path, said: Path, before: Callable[[], None] | None = None, **environment: str
) -> BaseProcess:
    """The process of `python -m <words>` in the folder `home`, started; all that it prints is added to the file `said`.

    `before`, which must be importable by its name or a partial of what is, is called in it first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=as_main, args=(words, str(home), str(said), before, environment))
    child.start()
    return child


def as_main(
    words: list[str], home: str, said: str, before: Callable[[], None] | None, environment: dict[str, str]
) -> None:
    """What an interpreter does with `-m`, with all that is printed in a file."""
    with open(said, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    os.chdir(home)
    sys.path[:0] = [str(ROOT), home]
    sys.argv = words
    if before is not None:
        before()
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
