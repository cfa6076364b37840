"""`trainer.shard=full` from the command's words to the files: whole runs on two ranks against runs that are not cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ssl.distributed as distributed
from eval import finetune
from ssl.checkpoint import steps_saved
from ssl.methods.base import Method
from ssl.pretrain import run
from ssl.sharding import blocks_of, shard
from tests.pool import Pool
from tests.test_finetune import IMAGES, PLAIN, config_of
from tests.test_pretrain import METHODS, SHORT, TINY_RESNET, composed, metrics_of

CUT = "trainer.shard=full"
SETTINGS = [
    *SHORT,
    *["trainer.precision=fp32", "trainer.ema_decay=0.5", "trainer.clip_grad_norm=1.0", "optim.base_lr=1e-3"],
    *["trainer.device_batch_size=4", "online=health", "trainer.eval_every_epochs=1", "online.health.sample=13"],
    *["data.source.num_train=48", "data.source.num_test=12", "launch=none"],
]


def together(call: Callable[[], Any]) -> Any:
    """What `call` returns on a rank of the pool, whose ranks stay joined when it ends."""
    stop = distributed.stop
    distributed.stop = lambda: None
    try:
        return call()
    finally:
        distributed.stop = stop


def pretrain(words: list[str], out: str) -> dict[str, float]:
    return together(lambda: run(composed(*words), out=Path(out)))


def files_of(out: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(steps_saved(out)[-1][1].glob("*.safetensors"))}


def assert_same_files(ours: Path, theirs: Path, tolerance: float) -> None:
    found, expected = files_of(ours), files_of(theirs)
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                found[file][name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=f"{file} {name}": f"{n}: {m}"
            )


def test_a_run_goes_on_cut_and_whole_on_two_ranks_and_on_one(two_ranks: Pool, tmp_path: Path):
    words = [*METHODS["mae"], *SETTINGS, "+optim.options.eps=1e-4"]
    run(composed(*words, "trainer.steps=10"), out=tmp_path / "whole")
    legs = [(2, []), (2, [CUT]), (1, []), (2, [CUT, "trainer.activation_checkpointing=true"]), (2, [])]
    for number, (ranks, extra) in enumerate(legs, start=1):
        leg = [*words, *extra, f"trainer.steps={2 * number}"]
        if ranks == 1:
            run(composed(*leg), out=tmp_path / "legs")
        else:
            two_ranks.run(pretrain, leg, str(tmp_path / "legs"))
        assert steps_saved(tmp_path / "legs")[-1][0] == 2 * number
    ours, theirs = metrics_of(tmp_path / "legs"), metrics_of(tmp_path / "whole")
    assert [line["step"] for line in ours] == list(range(1, 11))
    for line, other in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line.get("rankme", 0.0) == pytest.approx(other.get("rankme", 0.0), rel=1e-3)
    assert sum("rankme" in line for line in ours) == 3
    assert_same_files(tmp_path / "legs", tmp_path / "whole", tolerance=1e-4)
    assert (tmp_path / "legs" / "pictures" / "reconstructions_00000004.png").exists()


def test_averaged_weights_get_the_batchnorm_statistics_that_ddp_gives_them(two_ranks: Pool, tmp_path: Path):
    words = [
        *METHODS["simclr"],
        *SHORT,
        "trainer.epochs=2",
        "trainer.swa_start_epoch=1",
        "trainer.precision=fp32",
    ]
    words += ["trainer.device_batch_size=4", "trainer.pictures=false", "optim.base_lr=0.005"]
    for name, more in (("cut", [CUT]), ("plain", [])):
        two_ranks.run(pretrain, [*words, *more], str(tmp_path / name))
    assert "ema.safetensors" in files_of(tmp_path / "cut")
    assert_same_files(tmp_path / "cut", tmp_path / "plain", tolerance=2e-4)


def tune(words: list[str], out: str) -> dict[str, Any]:
    return together(lambda: finetune.run(config_of(*words), out=Path(out)))["metrics"]


def test_fine_tuning_with_early_stopping_keeps_the_same_best_weights(two_ranks: Pool, tmp_path: Path):
    start = ["method=simclr", *TINY_RESNET, *IMAGES, *SHORT, "data.limit=null", "trainer.steps=1"]
    run(composed(*start), out=tmp_path / "start")
    words = [
        f"ckpt={tmp_path / 'start'}",
        *PLAIN,
        "patience=1",
        "held_out=0.2",
        "trainer.epochs=4",
        "trainer.precision=fp32",
    ]
    found = {}
    for name, more in (("cut", [CUT]), ("plain", [])):
        found[name] = two_ranks.run(tune, [*words, *more], str(tmp_path / name))
    assert found["cut"] == found["plain"]
    watched = [
        json.loads((steps_saved(tmp_path / name)[-1][1] / "state.json").read_text())["evaluations"] for name in found
    ]
    for each in watched:
        del each["held_out"]["sha256"]  # of weights that are the same but for rounding
    assert watched[0] == watched[1]
    assert_same_files(tmp_path / "cut", tmp_path / "plain", tolerance=2e-4)


def test_one_process_says_that_it_has_nobody_to_share_with(tmp_path: Path, caplog):
    run(composed(*METHODS["mae"], *SHORT, CUT, "trainer.steps=1", "trainer.pictures=false"), out=tmp_path)
    assert "trainer.shard=full has no effect with one process" in caplog.text


@pytest.mark.parametrize("other", [CUT, "trainer.activation_checkpointing=true"])
def test_compilation_of_the_whole_step_is_refused_beside_it(tmp_path: Path, other: str):
    with pytest.raises(ValueError, match=r"trainer\.compile=true does not go together"):
        run(composed(*METHODS["mae"], *SHORT, "trainer.compile=true", other), out=tmp_path / "run")


def test_parameters_of_one_number_are_refused_in_words(two_ranks: Pool):
    for said in two_ranks.run(_shard_a_scale):
        assert said == (
            "trainer.shard=full cannot cut parameters of one number, as backbone.scale is; take another model=, "
            "or set trainer.shard=none"
        )


def _shard_a_scale() -> str:
    method = Method()
    method.backbone = nn.Linear(2, 2)
    method.backbone.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(ValueError, match="cannot cut") as refused:
        shard(method, torch.device("cpu"))
    return str(refused.value)


TIMM_MODELS = {
    "vit_tiny_patch16_224": ("blocks.0", 12),
    "resnet50": ("layer1.0", 16),
    "convnext_atto": ("stages.0.blocks.0", 12),
    "swin_tiny_patch4_window7_224": ("layers.0.blocks.0", 12),
    "efficientnet_b0": ("blocks.0.0", 16),
    "regnety_002": ("s1.b1", 13),
    "eva02_tiny_patch14_224": ("blocks.0", 12),
    "hiera_tiny_224": ("blocks.0", 12),
    "vgg11": ("features.0", 8),
    "inception_v3": ("Conv2d_1a_3x3", 16),
    "poolformer_s12": ("stem", 6),
}


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_blocks_of_a_timm_model_run_once_each_and_do_not_overlap(name: str):
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0).eval()
    method = Method()
    method.backbone = model
    blocks = blocks_of(method)
    names = {module: path for path, module in model.named_modules()}
    first, least = TIMM_MODELS[name]
    assert names[blocks[0]] == first
    assert len(blocks) >= least
    runs: list[str] = []
    for block in blocks:
        block.register_forward_hook(lambda module, *_: runs.append(names[module]))
    size = model.default_cfg["input_size"]
    model.forward_head(model.forward_features(torch.empty(1, *size, device="meta")), pre_logits=True)
    assert sorted(runs) == sorted(names[block] for block in blocks)
    inside = [module for block in blocks for module in block.modules()]
    assert len(inside) == len(set(inside))
