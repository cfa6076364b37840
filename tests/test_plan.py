"""`trainer.plan=true`, against what the same settings really make."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from eval.config import register
from eval.finetune import FinetuneConfig
from eval.finetune_start import check_settings
from ssl.activation_checkpointing import checkpoint_activations
from ssl.chips import MEMORY, PEAKS, memory_gib
from ssl.config import CONF, check_trainer, plain
from ssl.data.views import make_views
from ssl.methods.base import Batch, Method
from ssl.models.attention import attend_by_matmul
from ssl.optim import make_optimizer, parameter_groups, state_to_tensors
from ssl.plan import flops_per_image
from ssl.pretrain import main, make_method, run
from ssl.run_plan import ASSUMED_MFU, RunPlan, plan_run
from tests.test_pretrain import METHODS, SHORT, composed

FEW = ["data.source.num_train=120", "data.source.num_test=36"]
VIT_B = ["experiment=mae_imagenet", "data.root=/nowhere", "data.limit=1281167", "trainer.plan=true"]
CLUSTER = [*VIT_B, "launch.nodes=8", "trainer.devices=8", "trainer.plan_chip=H100"]


def plan_of(*words: str, out: Path = Path("runs/none")) -> RunPlan:
    return plan_run(composed(*words), out=out, make_method=make_method)


def small(method: str, *words: str) -> list[str]:
    return [*METHODS[method], *SHORT, *FEW, "trainer.plan=true", "trainer.plan_images_per_second=10", *words]


def real_method(config: DictConfig) -> Method:
    torch.manual_seed(0)
    return make_method(config, (32, 32))[0].train()


def real_batch(config: DictConfig, method: Method, num_images: int) -> Batch:
    views = len(make_views(plain(config.augment.views)))
    return {
        "views": [torch.randn(num_images, 3, *method.view_size) for _ in range(views)],
        "noise": torch.rand(num_images, method.num_noise),
        "index": torch.arange(num_images),
        "label": torch.zeros(num_images, dtype=torch.int64),
    }


def kept_by_a_real_step(method: Method, batch: Batch, dtype: torch.dtype) -> int:
    """Bytes of the distinct memory that autograd holds after a forward pass, beside weights and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*method.parameters(), *method.buffers()]}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        method(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_those_of_the_method_part_by_part(name):
    method = real_method(composed(*small(name)))
    plan = plan_of(*small(name))
    assert sum(plan.parameters.values()) == sum(parameter.numel() for parameter in method.parameters())
    assert plan.parameters["backbone"] == sum(parameter.numel() for parameter in method.backbone.parameters())
    assert plan.trained == sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    for part, number in plan.parameters.items():
        whole = method.get_parameter(part) if part == "mask_token" else None
        counted = (
            whole.numel() if whole is not None else sum(p.numel() for p in method.get_submodule(part).parameters())
        )
        assert number == counted


@pytest.mark.parametrize("name", METHODS)
def test_operations_are_those_that_a_run_announces(name):
    config = composed(*small(name))
    method = real_method(config)
    announced = flops_per_image(method, nn.Identity(), real_batch(config, method, 8))
    assert plan_of(*small(name)).flops == announced


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_activations_are_the_bytes_that_autograd_holds_in_a_real_step(name, precision, recomputed):
    words = small(name, f"trainer.precision={precision}", f"trainer.activation_checkpointing={recomputed}")
    plan = plan_of(*words)
    method = real_method(composed(*words))
    if precision == "bf16":
        attend_by_matmul(method)  # as a run on a CPU does
    if recomputed:
        checkpoint_activations(method)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    held = kept_by_a_real_step(method, real_batch(composed(*words), method, 16), dtype)
    parts = plan.memory.parts
    planned = parts["weights rounded by autocast, and the like"]
    planned += sum(size for part, size in parts.items() if part.startswith("activations"))
    assert planned == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize("optim", ["adamw", "sgd", "lars"])
def test_optimizer_bytes_are_those_of_its_state_after_a_step(optim):
    words = small("mae", f"optim={optim}")
    config = composed(*words)
    method = real_method(config)
    groups = parameter_groups(method, weight_decay=config.optim.weight_decay)
    optimizer = make_optimizer(groups, name=optim, lr=0.1, **plain(config.optim.options))
    method(real_batch(config, method, 2))["loss"].backward()
    optimizer.step()
    assert plan_of(*words).memory.parts["optimizer"] == size_of(state_to_tensors(optimizer).values())


@pytest.mark.parametrize("name", ["mae", "simclr"])
def test_files_of_a_checkpoint_have_the_planned_sizes_and_so_many_are_kept(name, tmp_path):
    words = ["trainer.steps=5", "trainer.ema_decay=0.9", "trainer.checkpoint_every_steps=1", "trainer.pictures=false"]
    words += ["trainer.keep_every_steps=2", "trainer.keep_last=1"]
    plan = plan_of(*small(name, *words))
    run(composed(*METHODS[name], *SHORT, *FEW, *words), out=tmp_path)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    for file in ("model", "method", "optimizer", "ema"):
        assert plan.checkpoint_files[file] == pytest.approx(
            (folders[-1] / f"{file}.safetensors").stat().st_size, rel=0.01
        )
    assert plan.checkpoint == pytest.approx(sum(path.stat().st_size for path in folders[-1].iterdir()), rel=0.02)
    assert plan.num_kept == len(folders) == 3


def test_a_vit_h_on_64_gpus_is_planned_without_its_weights():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_of(*CLUSTER, "model=vit_h")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30  # the weights have 2.4 GiB
    assert plan.parameters["backbone"] == pytest.approx(632e6, rel=0.01)  # Dosovitskiy et al. 2020, table 1
    assert (plan.batch.world_size, plan.batch.device_batch_size, plan.steps_per_epoch) == (64, 64, 312)
    assert plan.start_to_stop == 1600 * 312
    weights = sum(plan.parameters.values()) * 4
    assert plan.memory.parts["weights"] == pytest.approx(weights, rel=1e-3)
    assert plan.memory.parts["gradients"] == plan.trained * 4
    assert plan.checkpoint == pytest.approx(3 * weights, rel=0.01)  # with Adam's two moments
    assert plan.warnings == [warning for warning in plan.warnings if "run folder" in warning]
    said = plan.describe()
    for words in (
        "8 x 8 devices (H100), bf16",
        "64 ranks x 64 images",
        "1600 epochs",
        "device hours",
        "estimated: 35%",
    ):
        assert words in said


def test_sharding_cuts_weights_gradients_optimizer_and_average_and_checkpointing_the_activations():
    whole = plan_of(*CLUSTER, "trainer.ema_decay=0.999").memory.parts
    cut = plan_of(*CLUSTER, "trainer.ema_decay=0.999", "trainer.shard=full", "trainer.activation_checkpointing=true")
    parts = cut.memory.parts
    for part in ("weights", "gradients", "optimizer", "average of the weights"):
        assert parts[part] == pytest.approx(whole[part] / 64, rel=0.1)  # buffers stay whole
    assert parts["weights of two blocks, gathered"] == pytest.approx(2 * 12 * 768**2 * 4, rel=0.1)
    kept = [sum(v for k, v in each.items() if k.startswith("activations")) for each in (whole, parts)]
    assert kept[1] < kept[0] / 10


def test_what_does_not_fit_is_warned_of_and_the_advice_fits():
    words = [*VIT_B, "trainer.plan_chip=RTX 4090"]
    plan = plan_of(*words)
    assert "do not fit RTX 4090" in plan.warnings[0]
    advised = next(word for word in plan.warnings[0].split() if word.startswith("trainer.device_batch_size="))
    assert plan_of(*words, advised).memory.total < 24 * 2**30
    size = int(advised.split("=")[1])
    assert plan_of(*words, f"trainer.device_batch_size={2 * size}").warnings


def test_a_disk_that_is_too_small_is_warned_of(tmp_path):
    plan = plan_of(*CLUSTER, "trainer.keep_every_steps=1", "trainer.checkpoint_every_steps=1", out=tmp_path / "a" / "b")
    assert f"and {tmp_path} has " in plan.warnings[-1]
    assert "trainer.keep_every_steps" in plan.warnings[-1]


def test_hours_follow_from_the_speed_that_is_given_on_each_device():
    plan = plan_of(*CLUSTER, "trainer.plan_images_per_second=500")
    seconds = plan.start_to_stop * 4096 / (500 * 64)
    assert plan.speed.images_per_second == 500 * 64
    assert f"about {seconds / 3600:.1f} h" in plan.describe()


def test_without_a_speed_a_share_of_the_chips_peak_is_taken_and_said():
    plan = plan_of(*CLUSTER)
    assert plan.speed.images_per_second == pytest.approx(ASSUMED_MFU["tokens"] * 989.4e12 / plan.flops * 64)
    assert "35% of H100's 989.4 TFLOP/s" in plan.speed.source


def test_a_small_model_is_timed_on_the_cpu_at_hand_and_a_large_one_is_not():
    timed = plan_of(*METHODS["mae"], *SHORT, *FEW, "trainer.plan=true")
    assert timed.speed.images_per_second is not None
    assert "measured over a few steps" in timed.describe()
    large = plan_of(*VIT_B, "trainer.device=cpu", "trainer.device_batch_size=16")
    assert "give trainer.plan_images_per_second=" in large.describe()


def test_the_command_prints_the_plan_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssl.pretrain", *small("mae")])
    main()
    said = capsys.readouterr().out
    assert said.startswith("a plan, nothing is trained: 1 x 1 devices (cpu)")
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_not_here_need_their_number():
    with pytest.raises(ValueError, match=r"nowhere[\s\S]*data.limit=1281167, for example"):
        plan_of("data=imagenet", "data.root=/nowhere", "trainer.plan=true")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.plan_chip=H100"], "have no effect without trainer.plan=true"),
        (["trainer.plan_images_per_second=3"], "have no effect without trainer.plan=true"),
    ],
)
def test_settings_of_a_plan_are_refused_without_one(words, message):
    with pytest.raises(ValueError, match=message):
        check_trainer(composed(*METHODS["mae"], *words).trainer)


def test_fine_tuning_refuses_to_be_planned():
    register(FinetuneConfig)
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("finetune", overrides=["ckpt=random", "model=vit_t", "data=embedded", "trainer.plan=true"])
    with pytest.raises(ValueError, match=r"trainer.plan=true has no effect on fine-tuning"):
        check_settings(config)


def test_a_chip_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"trainer.plan_chip=H10 is not .* H100"):
        plan_of(*VIT_B, "trainer.plan_chip=H10")
    with pytest.raises(ValueError, match=r"plan_chip=H100 has no effect with trainer.device=cpu"):
        plan_of(*VIT_B, "trainer.plan_chip=H100", "trainer.device=cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_here_is_not_taken_for_the_cpu():
    with pytest.raises(ValueError, match=r"trainer.device=cuda asks for a GPU .* trainer.plan_chip=H100"):
        plan_of(*small("mae", "trainer.device=cuda"))


def test_what_a_cut_run_refuses_its_plan_refuses():
    words = ["optim=lamb", "trainer.shard=full", "trainer.device=cuda", "trainer.plan_chip=A100-SXM4-80GB"]
    words += ["trainer.global_batch_size=24"]
    assert plan_of(*small("mae", *words)).batch.device_batch_size == 24  # one process cuts nothing
    with pytest.raises(ValueError, match=r"optim.name=lamb needs the norms of whole tensors"):
        plan_of(*small("mae", *words, "trainer.devices=2"))


def test_every_gpu_whose_peak_is_known_has_its_memory():
    """By its name as torch says it, one for each pattern."""
    names = ["H100 80GB HBM3", "GH200 480GB", "A100-SXM4-80GB", "A800-SXM4-80GB", "V100-SXM2-32GB", "V100-PCIE-16GB"]
    names += ["GH200 144G HBM3e", *(pattern for pattern in PEAKS if "(" not in pattern and "." not in pattern)]
    assert {name for name in names if memory_gib(f"NVIDIA {name}") is None} == set()
    assert memory_gib("Tesla V100-SXM2-32GB-LS") == 32
    assert memory_gib("A100-PCIE-40GB") == 40
    assert memory_gib("Some Other 80GB") is None
    assert set(MEMORY.values()) <= {10, 16, 24, 32, 48, 80, 94, 96, 141, 144, 180, 185, 192}
