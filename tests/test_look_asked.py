"""What is asked of `python -m eval.look`: the list comes at once, and what is shown stays few."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval import ROOT
from eval.look.asked import end_early
from eval.look.command import _folder
from eval.look.table import LOOKS
from tests.scenes import pretrained, scene


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


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("simclr") / "run", "simclr")


@pytest.mark.parametrize(
    "words", [["data=embedded", "data.source.num_test=300", "num_images=257"], [f"indices=[{','.join(['1'] * 257)}]"]]
)
def test_more_images_than_can_be_looked_at_are_refused(run, words):
    with pytest.raises(ValueError, match="257 images are too many to look at one by one, at most 256 are; give fewer"):
        scene(run, "views", *words).shown()


GRADIENT_LOOKS = {
    "saliency": ["saliency.methods=[gradient,smoothgrad]", "saliency.noise_samples=2"],
    "guided_backprop": [],
    "occlusion": ["occlusion.window=16"],
    "gradcam": [],
    "deepdream": ["deepdream.octaves=1", "deepdream.steps=2"],
    "pca_tokens": ["pca_tokens.layer=1"],
}


@pytest.mark.parametrize("what", GRADIENT_LOOKS)
def test_maps_of_images_are_the_same_in_batches_of_any_size(run, what):
    found, most = [], []
    for size in (64, 5):
        looked = scene(run, what, *GRADIENT_LOOKS[what], "num_images=12", f"batch_size={size}")
        seen: list[int] = []
        looked.backbone.conv1.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(len(given[0])))
        found.append(LOOKS[what].load()(looked))
        most.append(max(seen))
    assert most[0] >= 12
    assert most[1] <= 5
    for key, values in found[0].arrays.items():
        np.testing.assert_allclose(found[1].arrays[key], values, rtol=1e-3, atol=1e-5)
