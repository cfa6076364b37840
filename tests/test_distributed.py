"""Every check compares two ranks with one process that holds the joined batch."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl import distributed
from tests.pool import Pool


def _seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _names() -> tuple[int, int, int, bool]:
    return distributed.rank(), distributed.world_size(), distributed.local_rank(), distributed.is_main()


def test_each_rank_knows_its_place(two_ranks: Pool) -> None:
    assert two_ranks.run(_names) == [(0, 2, 0, True), (1, 2, 1, False)]


def test_one_process_is_a_world_of_one() -> None:
    assert distributed.start("cpu") == torch.device("cpu")
    assert _names() == (0, 1, 0, True)
    distributed.barrier()
    x = torch.ones(3, requires_grad=True)
    assert distributed.all_gather(x) is x
    assert distributed.mean_over_ranks(x).tolist() == [1, 1, 1]
    norm = nn.BatchNorm1d(3)
    assert distributed.sync_batchnorm(norm) is norm
    distributed.stop()


def test_start_without_a_rank_says_which_variable_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"RANK, MASTER_ADDR, MASTER_PORT is not.*torchrun"):
        distributed.start("cpu")


def test_start_refuses_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=f"GPU {torch.cuda.device_count()} but torch sees {torch.cuda.device_count()}"):
        distributed.start(f"cuda:{torch.cuda.device_count()}")
    with pytest.raises(ValueError, match="choose auto, cpu or cuda"):
        distributed.start("meta")


def _files_seen_after_the_barrier(folder: Path) -> int:
    if distributed.rank() == 1:
        for number in range(50):
            (folder / str(number)).write_text("written by the rank that comes late")
    distributed.barrier()
    return len(list(folder.iterdir()))


def test_barrier_holds_the_early_rank(two_ranks: Pool, tmp_path: Path) -> None:
    assert two_ranks.run(_files_seen_after_the_barrier, tmp_path) == [50, 50]


def _reduce(values: list[list[float]]) -> tuple[list[float], list[float], bool]:
    own = torch.tensor(values[distributed.rank()], requires_grad=True)
    total, mean = distributed.sum_over_ranks(own), distributed.mean_over_ranks(own)
    return total.tolist(), mean.tolist(), own.tolist() == values[distributed.rank()] and not total.requires_grad


def test_sum_and_mean_are_the_same_on_all_ranks_and_leave_their_input(two_ranks: Pool) -> None:
    assert two_ranks.run(_reduce, [[1.0, 2.0], [5.0, -2.0]]) == [([6, 0], [3, 0], True)] * 2


def _gather_kinds() -> list[list]:
    r = distributed.rank()
    kinds = [
        torch.tensor([r]),
        torch.tensor([r == 1]),
        torch.tensor([r + 0.5], dtype=torch.bfloat16),
        torch.empty(0, 3),
    ]
    return [distributed.all_gather(x).tolist() for x in kinds]


def test_all_gather_takes_labels_masks_half_precision_and_nothing(two_ranks: Pool) -> None:
    assert two_ranks.run(_gather_kinds) == [[[0, 1], [False, True], [0.5, 1.5], []]] * 2


def _rank_loss(rank: int, own: Tensor, joined: Tensor) -> Tensor:
    """A loss that differs between ranks and couples all images."""
    return ((own @ joined.T).sigmoid() * _seeded(own.shape[0], joined.shape[0], seed=10 + rank)).sum()


def _gathered_gradient(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    r = distributed.rank()
    own = parts[r].clone().requires_grad_()
    transposed = (own * 1.0).t().contiguous().t()  # not contiguous, as a view of features may be
    joined = distributed.all_gather(transposed)
    _rank_loss(r, own, joined).backward()
    assert own.grad is not None
    return joined.detach(), own.grad


def test_all_gather_gradient_is_that_of_the_sum_of_all_ranks_losses(two_ranks: Pool) -> None:
    parts = [_seeded(3, 5, seed=1).double(), _seeded(3, 5, seed=2).double()]
    together = [part.clone().requires_grad_() for part in parts]
    joined = torch.cat(together)
    sum(_rank_loss(r, together[r], joined) for r in range(2)).backward()  # pyright: ignore
    for (gathered, gradient), expected in zip(two_ranks.run(_gathered_gradient, parts), together):
        torch.testing.assert_close(gathered, joined.detach(), rtol=0, atol=0)
        torch.testing.assert_close(gradient, expected.grad)


def _make_norm(dims: int, momentum: float | None, affine: bool = True, track: bool = True) -> nn.Module:
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[dims](
        4, momentum=momentum, affine=affine, track_running_stats=track, dtype=torch.float64
    )
    if affine:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(3))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(4))
    return norm


def _run_norm(norm: nn.Module, batches: list[Tensor], weights: list[Tensor]) -> dict[str, list[Tensor]]:
    """Train on each batch, then run the first again in eval mode; everything that can be compared."""
    out: dict[str, list[Tensor]] = {"outputs": [], "gradients": []}
    for x, weight in zip(batches, weights):
        x = x.clone().requires_grad_()
        y = norm(x)
        (y * weight).sum().backward()
        assert x.grad is not None
        out["outputs"].append(y.detach())
        out["gradients"].append(x.grad)
    out["parameters"] = [p.grad for p in norm.parameters() if p.grad is not None]
    out["buffers"] = [b.clone() for b in norm.buffers()]
    out["eval"] = [norm.eval()(batches[0]).detach()]
    return out


def _run_synchronised(settings: tuple, batches: list[list[Tensor]], weights: list[list[Tensor]]) -> dict:
    norm = _make_norm(*settings)
    keys = list(norm.state_dict())
    norm = distributed.sync_batchnorm(norm)
    assert isinstance(norm, distributed.SyncBatchNorm)
    assert list(norm.state_dict()) == keys
    r = distributed.rank()
    return _run_norm(norm, [b[r] for b in batches], [w[r] for w in weights])


@pytest.mark.parametrize(
    ("sizes", "shape", "settings"),
    [
        ((4, 4), (4, 3, 5), (2, 0.1)),
        ((5, 2), (4, 3, 2), (2, 0.1)),  # unequal batches
        ((3, 0), (4, 3, 2), (2, 0.1)),  # a rank without images
        ((3, 6), (4,), (1, 0.1)),
        ((1, 1), (4,), (1, 0.1)),  # one value per channel and rank: only the joined batch has a variance
        ((3, 4), (4, 7), (1, 0.3)),  # (B, C, L)
        ((2, 3), (4, 2, 2), (2, None)),  # cumulative average
        ((2, 3), (4, 2, 2), (2, 0.1, False)),  # no weight and bias
    ],
    ids=["2d", "unequal", "empty", "1d", "single", "sequence", "cumulative", "plain"],
)
def test_sync_batchnorm_equals_batchnorm_over_the_joined_batch(two_ranks: Pool, sizes, shape, settings) -> None:
    batches = [
        [_seeded(n, *shape, seed=20 * step + r).double() * 3 + 7 for r, n in enumerate(sizes)] for step in (0, 1)
    ]
    weights = [[_seeded(n, *shape, seed=99 + 20 * step + r).double() for r, n in enumerate(sizes)] for step in (0, 1)]
    expected = _run_norm(_make_norm(*settings), [torch.cat(b) for b in batches], [torch.cat(w) for w in weights])
    ranks = two_ranks.run(_run_synchronised, settings, batches, weights)
    for step in (0, 1):
        for what in ("outputs", "gradients"):
            torch.testing.assert_close(torch.cat([r[what][step] for r in ranks]), expected[what][step])
    for first, second, both in zip(ranks[0]["parameters"], ranks[1]["parameters"], expected["parameters"]):
        torch.testing.assert_close(first + second, both)
    torch.testing.assert_close(torch.cat([r["eval"][0] for r in ranks]), expected["eval"][0])
    for r in ranks:
        torch.testing.assert_close(r["buffers"], expected["buffers"])


def _untracked_eval(x: Tensor) -> Tensor:
    return distributed.sync_batchnorm(_make_norm(2, 0.1, True, False)).eval()(x[distributed.rank()]).detach()


def test_untracked_sync_batchnorm_uses_its_own_batch_outside_training(two_ranks: Pool) -> None:
    x = _seeded(2, 3, 4, 2, 2).double()
    for r, got in enumerate(two_ranks.run(_untracked_eval, x)):
        torch.testing.assert_close(got, _make_norm(2, 0.1, True, False).eval()(x[r]).detach())


def _half_precision(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    norm = distributed.sync_batchnorm(nn.BatchNorm2d(4))
    return norm(x[distributed.rank()]).detach(), list(norm.buffers())


def test_sync_batchnorm_keeps_half_precision_and_counts_in_fp32(two_ranks: Pool) -> None:
    x = (_seeded(2, 16, 4, 5, 5) + 3).bfloat16()
    norm = nn.BatchNorm2d(4)
    expected = norm(x.flatten(0, 1).float()).bfloat16().unflatten(0, (2, 16)).detach()
    for r, (output, buffers) in enumerate(two_ranks.run(_half_precision, x)):
        torch.testing.assert_close(output, expected[r])
        torch.testing.assert_close(buffers, list(norm.buffers()))


def _too_few() -> str:
    norm = distributed.sync_batchnorm(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        norm(torch.zeros(1 - distributed.rank(), 4))
    return str(raised.value)


def test_sync_batchnorm_refuses_a_joined_batch_of_one_on_every_rank(two_ranks: Pool) -> None:
    assert len(two_ranks.run(_too_few)) == 2


def _shared_and_fused() -> tuple[list[str], bool, Tensor]:
    from timm.layers import BatchNormAct2d

    shared = nn.BatchNorm2d(3)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Sequential(BatchNormAct2d(3), shared))
    before = set(net.state_dict())
    net = distributed.sync_batchnorm(net)
    assert set(net.state_dict()) == before
    kinds = [type(m).__name__ for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return kinds, net[1] is net[2][1], net[2][0](_seeded(4, 3, 2, 2))  # pyright: ignore


def test_sync_batchnorm_keeps_shared_layers_shared_and_fused_activations(two_ranks: Pool) -> None:
    for kinds, is_shared, output in two_ranks.run(_shared_and_fused):
        assert kinds == ["SyncBatchNorm"] * 2
        assert is_shared
        assert output.min() == 0
        assert output.max() > 0


def _make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6)
    ).double()


def _train_in_parallel(x: Tensor, target: Tensor) -> list[Tensor]:
    net = DistributedDataParallel(distributed.sync_batchnorm(_make_net()))
    r = distributed.rank()
    nn.functional.mse_loss(net(x[r]), target[r]).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def test_a_network_with_batchnorm_has_one_process_gradient_under_ddp(two_ranks: Pool) -> None:
    x, target = _seeded(2, 3, 3, 6, 6).double(), _seeded(2, 3, 6, seed=1).double()
    net = _make_net()
    nn.functional.mse_loss(net(x.flatten(0, 1)), target.flatten(0, 1)).backward()
    for gradients in two_ranks.run(_train_in_parallel, x, target):
        torch.testing.assert_close(gradients, [p.grad for p in net.parameters()])


def _fail_on_one_rank() -> None:
    if distributed.rank() == 1:
        raise RuntimeError("the reason it failed")
    distributed.barrier()


def _die() -> None:
    if distributed.rank() == 1:
        os._exit(3)
    distributed.barrier()


def test_the_pool_tells_why_a_rank_failed_and_goes_on() -> None:
    pool = Pool(2)
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 0 did not come back.*rank 1:.*the reason it failed"):
        pool.run(_fail_on_one_rank)
    assert pool.run(_names) == [(0, 2, 0, True), (1, 2, 1, False)]
    with pytest.raises(AssertionError, match="exit code 3"):
        pool.run(_die)
    assert time.monotonic() - began < 100
    pool.close()


def _last_words(words: list[str]) -> tuple[bool, float]:
    began = time.monotonic()
    return distributed.is_said_by_first(words[distributed.rank()], seconds=1.0), time.monotonic() - began


def _words_of_the_second_alone() -> bool:
    return distributed.rank() == 1 and distributed.is_said_by_first("I alone", seconds=0.2)


def test_ranks_that_end_with_the_same_words_leave_them_to_the_first(two_ranks: Pool) -> None:
    assert [said for said, _ in two_ranks.run(_last_words, ["no such file"] * 2)] == [False, True]
    assert [said for said, _ in two_ranks.run(_last_words, ["no such file", "no such GPU"])] == [False, False]
    assert two_ranks.run(_words_of_the_second_alone) == [False, False]
    assert not distributed.is_said_by_first("of one process")


def _ends_of_a_part(errors: list[Exception | None]) -> tuple[str, str]:
    error = errors[distributed.rank()]
    try:
        with distributed.fail_together():
            if error is not None:
                raise error
    except Exception as raised:
        return type(raised).__name__, str(raised)
    return "", ""


def test_what_fails_on_one_rank_fails_on_all_with_its_words(two_ranks: Pool) -> None:
    host = socket.gethostname()
    lacking = ("ValueError", f"rank 1 on {host}: no such folder")
    assert two_ranks.run(_ends_of_a_part, [None, ValueError("no such folder")]) == [lacking] * 2
    assert two_ranks.run(_ends_of_a_part, [OSError("no such folder")] * 2) == [("OSError", "no such folder")] * 2
    both = ("ValueError", f"rank 0 on {host}: a\nrank 1 on {host}: b")
    assert two_ranks.run(_ends_of_a_part, [ValueError("a"), OSError("b")]) == [both] * 2
    first, second = two_ranks.run(_ends_of_a_part, [TypeError("3"), None])
    assert first == ("TypeError", "3")  # with its traceback
    assert second == ("ValueError", f"rank 0 on {host}: TypeError: 3")
    assert two_ranks.run(_ends_of_a_part, [None, None]) == [("", "")] * 2


def test_what_fails_in_one_process_fails_as_it_is() -> None:
    with pytest.raises(OSError, match=r"^no such folder$"), distributed.fail_together():
        raise OSError("no such folder")


def _run_on_other_data(out: str, words: list[str], own: list[list[str]]) -> str:
    from ssl.pretrain import run
    from tests.test_pretrain import composed

    stop, distributed.stop = distributed.stop, lambda: None  # the pool's ranks stay together for the next test
    try:
        run(composed(*words, *own[distributed.rank()]), out=Path(out))
    except ValueError as error:
        return str(error)
    finally:
        distributed.stop = stop
    return "trained"


def test_a_rank_whose_data_is_not_there_ends_the_run_on_all_ranks(two_ranks: Pool, tmp_path: Path) -> None:
    own = [[], ["data=folder", "data.root=/nowhere"]]
    first, second = two_ranks.run(_run_on_other_data, str(tmp_path), _few_words(), own)
    assert first == second
    assert first.startswith(f"rank 1 on {socket.gethostname()}: data.root=/nowhere does not exist")


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (
            [["data.limit=48"], ["data.limit=80"]],
            r"different images: .*48 with checksum \d+, on rank 0; .* 80 with checksum",
        ),
        ([[], ["data.source.seed=7"]], r"different images"),
        ([["optim.base_lr=1e-3"], ["optim.base_lr=2e-3"]], r"optim\.base_lr: 0\.001 on rank 0; 0\.002 on rank 1"),
    ],
)
def test_ranks_that_would_train_on_different_terms_do_not_train(
    own: list[list[str]], told: str, two_ranks: Pool, tmp_path: Path
) -> None:
    first, second = two_ranks.run(_run_on_other_data, str(tmp_path), _few_words(), own)
    assert first == second
    assert re.search(told, first), first


def test_ranks_may_have_threads_of_their_own(two_ranks: Pool, tmp_path: Path) -> None:
    own = [["loader.threads=1"], ["loader.threads=2"]]
    ended = two_ranks.run(_run_on_other_data, str(tmp_path), [*_few_words(), "trainer.steps=1"], own)
    assert ended == ["trained"] * 2


def _few_words() -> list[str]:
    from tests.test_pretrain import SHORT, TINY_VIT

    return ["method=mae", *TINY_VIT, *SHORT, "online=none", "trainer.device=cpu"]
