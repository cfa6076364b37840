"""Sharded training against DistributedDataParallel on the same two ranks, and against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ssl.distributed as distributed
from ssl.activation_checkpointing import checkpoint_activations
from ssl.averaging import MovingAverage, averaged_copy, weights_of
from ssl.methods.base import Method
from ssl.models.backbones import pooled_features
from ssl.optim import make_optimizer, parameter_groups, state_to_tensors, tensors_to_state
from ssl.sharding import Gathering, blocks_of, exchange, fill, gathered_weights, is_cut, local, rounded_note, shard
from ssl.tensor_stream import StoredTensor, TensorFile, write_tensors
from ssl.trainer import NotFinite, Trainer
from tests.test_trainer import GLOBAL_BATCH, make_batch, make_method, make_trainer

CPU = torch.device("cpu")
OPTIONS = {
    "adamw": {"lr": 1e-3, "eps": 1e-2},  # a large eps: else gradients that are rounding errors alone make whole steps
    "sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "lars": {"lr": 0.05, "momentum": 0.9, "trust_coeff": 0.02},
}


def assembled(name: str, *, cut: bool, optimizer: str = "sgd", recompute: bool = False, **settings: Any) -> Trainer:
    """A trainer on this rank of a small method on a ViT, or where its name says so on a ResNet."""
    method = make_method(name.split("_on_")[0], norm=name.endswith("resnet"))
    distributed.sync_batchnorm(method)
    if recompute:
        checkpoint_activations(method)
    if cut:
        shard(method, CPU)
    options = OPTIONS[optimizer]
    moving = MovingAverage(averaged_copy(method), 0.9)
    trainer = make_trainer(method, average=moving, lr=lambda step: options["lr"], **settings)
    trainer.optimizer = make_optimizer(parameter_groups(method, weight_decay=0.05), name=optimizer, **options)
    method.train()
    return trainer


def own_batch(method: Method, step: int = 0) -> dict[str, Any]:
    """This rank's half of a batch that differs from step to step."""
    share = GLOBAL_BATCH // distributed.world_size()
    rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    batch = make_batch(method, rows=rows, num_views=2 if method.couples_images else 1)
    batch["views"] = [view + 0.1 * step for view in batch["views"]]
    return batch


def steps(trainer: Trainer, count: int, start: int = 0) -> list[tuple[float, float]]:
    """Loss over all ranks and gradient norm of each step."""
    seen = []
    for step in range(start, start + count):
        metrics = trainer.step(own_batch(trainer.method, step), step)
        seen.append((distributed.mean_over_ranks(metrics["loss"]).item(), metrics["grad_norm"].item()))
    return seen


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and optimizer state as whole tensors."""
    assert trainer.average is not None
    found = {f"weights/{name}": tensor for name, tensor in trainer.method.state_dict().items()}
    found |= {f"average/{name}": tensor for name, tensor in trainer.average.tensors.items()}
    found |= {f"optimizer/{name}": tensor for name, tensor in state_to_tensors(trainer.optimizer).items()}
    return {name: (t.full_tensor() if is_cut(t) else t).detach().clone() for name, t in found.items()}  # pyright: ignore


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(tensor.abs().max().item(), 1e-3) if tensor.numel() else 1.0
        torch.testing.assert_close(
            got[name], tensor, rtol=0, atol=tolerance * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )


CASES = {
    "mae adamw": {"name": "mae", "optimizer": "adamw"},
    "mae adamw, accumulated and clipped": {
        "name": "mae",
        "optimizer": "adamw",
        "accumulation": 2,
        "clip_grad_norm": 0.5,
    },
    "simclr on a ResNet, lars": {"name": "simclr_on_resnet", "optimizer": "lars"},
    "simclr on a ResNet, sgd, accumulated": {"name": "simclr_on_resnet", "accumulation": 2, "clip_grad_norm": 1.0},
    "simclr on a ViT, lars, clipped": {"name": "simclr", "optimizer": "lars", "clip_grad_norm": 0.1},
    "simclr on a ViT, adamw, accumulated": {"name": "simclr", "optimizer": "adamw", "accumulation": 2},
    "relative location on a ResNet, lars, accumulated": {
        "name": "relative_location_on_resnet",
        "optimizer": "lars",
        "accumulation": 2,
    },
    "relative location on a ViT, sgd": {"name": "relative_location"},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_weights_averages_and_optimizer_are_those_of_ddp(two_ranks, case: str):
    for (plain_losses, plain), (cut_losses, cut) in two_ranks.run(_plain_and_cut, CASES[case]):
        assert cut_losses == pytest.approx(plain_losses, rel=1e-4)
        assert_close(cut, plain)


def _plain_and_cut(case: dict[str, Any]) -> list[tuple[list[float], dict[str, Tensor]]]:
    results = []
    for cut in (False, True):
        trainer = assembled(**case, cut=cut)
        losses = [number for pair in steps(trainer, 4) for number in pair]
        results.append((losses, everything(trainer)))
    return results


def test_bf16_losses_are_those_of_ddp(two_ranks):
    for plain, cut in two_ranks.run(_losses_in_bf16):
        assert cut == pytest.approx(plain, rel=1e-3)


def _losses_in_bf16() -> list[list[float]]:
    trainers = [assembled("mae", cut=cut, optimizer="adamw", dtype=torch.bfloat16) for cut in (False, True)]
    return [[loss for loss, _ in steps(trainer, 4)] for trainer in trainers]


def test_whole_weights_outlast_their_blocks_forward_pass_only_where_they_are_rounded(two_ranks):
    for kept, announced in two_ranks.run(_whole_weights_kept):
        assert kept["fp32"] == 0
        assert kept["bf16, computed again"] == 0
        assert 0 < kept["bf16"] <= announced["bf16"]  # which has the layers outside of blocks too
        assert [name for name, size in announced.items() if size] == ["bf16"]


def _whole_weights_kept() -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of whole weights of blocks that autograd holds when a forward pass is over, and those that are told of."""
    kept, announced = {}, {}
    for name, dtype, recompute in (
        ("fp32", torch.float32, False),
        ("bf16", torch.bfloat16, False),
        ("bf16, computed again", torch.bfloat16, True),
    ):
        trainer = assembled("mae", cut=True, optimizer="adamw", recompute=recompute, dtype=dtype)
        inside = {weight for block in blocks_of(trainer.method) for weight in block.parameters()}
        outside = {weight.shape for weight in trainer.method.parameters() if weight not in inside}
        shapes = {weight.shape for weight in inside if weight.ndim == 2} - outside
        held: dict[int, Tensor] = {}

        def pack(tensor: Tensor, held: dict[int, Tensor] = held) -> Tensor:
            held[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), trainer.autocast():
            loss = trainer.method(own_batch(trainer.method))["loss"]
        whole = [tensor for tensor in held.values() if {tensor.shape, tensor.shape[::-1]} & shapes]
        kept[name] = sum(tensor.untyped_storage().nbytes() for tensor in whole)
        note = rounded_note(trainer.method, dtype, recomputed=recompute)
        announced[name] = 0.0 if note is None else float(note.split(" MiB")[0].split()[-1]) * 2**20
        loss.backward()
    return kept, announced


def test_each_rank_keeps_half_of_weights_gradients_averages_and_optimizer_state(two_ranks):
    for total, kept in two_ranks.run(_kept_numbers):
        assert set(kept) == {"weights", "gradients", "average", "exp_avg", "exp_avg_sq"}
        for name, number in kept.items():
            assert number < 0.56 * total, name  # tokens and positions of one row stay on the first rank


def _kept_numbers() -> tuple[int, dict[str, int]]:
    trainer = assembled("mae", cut=True, optimizer="adamw")
    steps(trainer, 1)
    trainer.backward(own_batch(trainer.method), 1)
    assert trainer.average is not None
    trained = [p for p in trainer.method.parameters() if p.requires_grad]
    names = {name for name, p in trainer.method.named_parameters() if p.requires_grad}
    state = [trainer.optimizer.state[p] for p in trained]
    pieces = {
        "weights": trained,
        "gradients": [p.grad for p in trained],
        "average": [tensor for name, tensor in trainer.average.tensors.items() if name in names],
        "exp_avg": [each["exp_avg"] for each in state],
        "exp_avg_sq": [each["exp_avg_sq"] for each in state],
    }
    return sum(p.numel() for p in trained), {n: sum(local(t).numel() for t in ts) for n, ts in pieces.items()}


def test_a_bad_step_of_one_rank_moves_nothing_on_any(two_ranks):
    for before, after, skipped in two_ranks.run(_nan_on_the_second_rank):
        assert skipped == [1.0, 1.0]
        for name, tensor in before.items():
            assert tensor.equal(after[name]), name


def _nan_on_the_second_rank():
    trainer = assembled("mae", cut=True, optimizer="adamw")
    steps(trainer, 1)
    before = everything(trainer)
    batch = own_batch(trainer.method)
    if distributed.rank() == 1:
        batch["views"][0][0] = float("nan")
    skipped = [trainer.step(batch, 1)["skipped"].item()]
    trainer.decides_on_device = True  # as the fused kernel does on a GPU
    skipped.append(trainer.step(batch, 2)["skipped"].item())
    after = everything(trainer)
    steps(trainer, 1, start=3)
    assert not everything(trainer)["weights/decoder_embed.weight"].equal(after["weights/decoder_embed.weight"])
    return before, after, skipped


def test_weights_spoiled_on_one_rank_are_noticed_by_all(two_ranks):
    assert two_ranks.run(_spoil_a_piece) == ["the weights are not finite after step 1"] * 2


def _spoil_a_piece() -> str:
    trainer = assembled("mae", cut=True)
    if distributed.rank() == 1:
        with torch.no_grad():
            local(trainer.method.decoder_pred.weight).fill_(torch.inf)  # pyright: ignore
    with pytest.raises(NotFinite) as refused:
        trainer._check_weights(1)
    return str(refused.value).split(";")[0]


# ---- evaluations ---------------------------------------------------------------------------------------------------


def test_a_rank_may_use_gathered_weights_alone_and_training_goes_on(two_ranks):
    for name in ("mae", "simclr_on_resnet"):
        (undisturbed, _, own), (_, disturbed, _) = two_ranks.run(_evaluate_between_steps, name)
        assert disturbed == undisturbed
        assert own


def _evaluate_between_steps(name: str):
    """Steps without and with an evaluation between them that each rank does another number of times."""
    trainers = [assembled(name, cut=True) for _ in range(2)]
    undisturbed = steps(trainers[0], 3)
    disturbed = steps(trainers[1], 1)
    method = trainers[1].method
    image = make_batch(method)["views"][0]
    method.eval()
    with torch.no_grad(), gathered_weights(method):
        seen = [pooled_features(method.backbone, image) for _ in range(1 + 2 * distributed.rank())]
    method.train()
    disturbed += steps(trainers[1], 2, start=1)
    alone = assembled(name, cut=False)
    steps(alone, 1)
    alone.method.eval()
    with torch.no_grad():
        expected = pooled_features(alone.method.backbone, image)
    return undisturbed, disturbed, all(torch.allclose(each, expected, atol=1e-5) for each in seen)


def test_evaluations_see_the_average_and_the_weights_come_back_exactly(two_ranks):
    for name in ("mae", "simclr_on_resnet"):
        for averaged, by_hand, unchanged in two_ranks.run(_evaluate_average, name):
            torch.testing.assert_close(averaged, by_hand, rtol=1e-4, atol=1e-5)
            assert unchanged


def _evaluate_average(name: str):
    features, states = [], []
    for cut in (True, False):
        trainer = assembled(name, cut=cut)
        steps(trainer, 2)
        assert trainer.average is not None
        method = trainer.method.eval()
        states.append(everything(trainer))
        with torch.no_grad(), weights_of(method, trainer.average.tensors), gathered_weights(method):
            features.append(pooled_features(method.backbone, make_batch(method)["views"][0]))
        states.append(everything(trainer))
    before, after = states[:2]
    return *features, all(tensor.equal(after[name]) for name, tensor in before.items())


def test_exchange_swaps_in_place():
    first, second = torch.zeros(3), torch.ones(3)
    view = first.view(3)
    exchange(first, second)
    assert (view.tolist(), second.tolist()) == ([1, 1, 1], [0, 0, 0])


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_rank_reads_its_own_rows_only(two_ranks, tmp_path: Path):
    whole = {"even": torch.arange(24.0).view(6, 4), "odd": torch.arange(15.0).view(5, 3), "one": torch.ones(1, 2)}
    write_tensors(whole, tmp_path / "file")
    first, second = two_ranks.run(_fill_from, str(tmp_path / "file"))
    assert [first[1], second[1]] == [
        {"even": (0, 3), "odd": (0, 3), "one": (0, 1)},
        {"even": (3, 6), "odd": (3, 5), "one": (1, 1)},
    ]
    for name, tensor in whole.items():
        assert first[0][name].equal(tensor)
        assert second[0][name].equal(tensor)


def _fill_from(path: str):
    module = nn.ParameterDict({"even": torch.zeros(6, 4), "odd": torch.zeros(5, 3), "one": torch.zeros(1, 2)})
    method = Method()
    method.backbone = nn.Identity()
    method.rest = module
    shard(method, CPU)
    read: dict[str, tuple[int, int]] = {}

    class Noted(StoredTensor):
        def whole(self) -> Tensor:
            raise AssertionError("a whole tensor was read")

        def rows(self, start: int, stop: int) -> Tensor:
            read[self._name] = (start, stop)
            return super().rows(start, stop)

    for name, stored in TensorFile(Path(path)).items():
        stored.__class__ = Noted
        fill(method.state_dict()[f"rest.{name}"], stored)
    return {name: method.state_dict()[f"rest.{name}"].full_tensor() for name in module}, read


def test_the_first_rank_may_fail_while_it_reads_and_nobody_waits(two_ranks, tmp_path: Path):
    assert two_ranks.run(_gather_and_fail, str(tmp_path)) == ["the disk is full", "nothing"]
    got = load_file(tmp_path / "second try")
    expected = dict(make_method("mae", norm=False).state_dict().items())
    assert got.keys() == expected.keys()
    assert all(got[name].equal(tensor) for name, tensor in expected.items())


def _gather_and_fail(folder: str) -> str:
    method = make_method("mae", norm=False)
    shard(method, CPU)
    said = "nothing"
    try:
        with Gathering() as gathering:
            weights = gathering.of(method.state_dict())
            if distributed.is_main():
                list(weights.values())[3].whole()  # pyright: ignore[reportAttributeAccessIssue]
                raise OSError("the disk is full")
    except OSError as error:
        said = str(error)
    with Gathering() as gathering:
        weights = gathering.of(method.state_dict())
        if distributed.is_main():
            write_tensors(weights, Path(folder) / "second try")
    return said


def test_optimizer_state_of_two_ranks_is_that_of_one_process_and_back(two_ranks):
    for optimizer in OPTIONS:
        for whole, again in two_ranks.run(_state_there_and_back, optimizer):
            assert whole.keys() == again.keys()
            assert all(tensor.equal(again[name]) for name, tensor in whole.items())


def _state_there_and_back(optimizer: str):
    cut = assembled("mae", cut=True, optimizer=optimizer)
    steps(cut, 2)
    whole = {name.removeprefix("optimizer/"): t for name, t in everything(cut).items() if name.startswith("optimizer/")}
    plain = assembled("mae", cut=False, optimizer=optimizer)
    tensors_to_state(plain.optimizer, whole)
    assert all(tensor.equal(whole[name]) for name, tensor in state_to_tensors(plain.optimizer).items())
    fresh = assembled("mae", cut=True, optimizer=optimizer)
    tensors_to_state(fresh.optimizer, state_to_tensors(plain.optimizer))
    again = {n.removeprefix("optimizer/"): t for n, t in everything(fresh).items() if n.startswith("optimizer/")}
    return whole, again
