"""What is asked of `python -m eval.look`: the list comes at once, and what is shown stays few."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from eval import ROOT
from eval.look.asked import end_early
from eval.look.command import _folder
from eval.look.table import LOOKS
from tests.scenes import scene


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [([], 2, "needs ckpt= and what="), (["ckpt=runs/x", "what=[views,oclusion]"], 1, "what=.*is no look")],
)
def test_the_list_of_looks_comes_before_torch_does(words, code, told):
    script = "import runpy, sys\ntry:\n    runpy.run_module('eval.look', run_name='__main__')\n"
    script += "finally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (code, "False\n")
    assert re.search(told, done.stderr)
    assert all(f"  {name} " in done.stderr for name in LOOKS)


@pytest.mark.parametrize("words", [["--help"], ["-m", "ckpt=a", "what=views,map"], ["ckpt=a", "++what=[views]"]])
def test_words_that_may_be_right_are_left_to_the_command(words):
    end_early(words)


def test_an_untrained_backbone_is_looked_at_under_its_whole_name():
    small, great = (scene("random", "views", f"model={model}") for model in ("resnet10", "resnet18"))
    assert small.title != great.title
    assert len({_folder(small.config, small), _folder(great.config, great)}) == 2
    assert _folder(great.config, great).parts == ("runs", "random_resnet18_embedded", "seed0", "look")
