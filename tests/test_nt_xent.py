"""NT-Xent against Algorithm 1 of SimCLR written as its loops, and the promises about memory and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl.distributed import rank
from ssl.methods.nt_xent import nt_xent, nt_xent_and_top1


def algorithm_1(embeddings: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of arXiv:2002.05709: z_{2k-1} and z_{2k} are the views of image k."""
    z = [embeddings[k, v] for k in range(len(embeddings)) for v in range(2)]

    def s(i: int, j: int) -> Tensor:
        return z[i] @ z[j] / (z[i].norm() * z[j].norm())

    def loss(i: int, j: int) -> Tensor:
        others = torch.stack([s(i, k) / temperature for k in range(len(z)) if k != i])
        return -(s(i, j) / temperature - torch.logsumexp(others, 0))

    num_images = len(embeddings)
    terms = [loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(num_images)]
    return torch.stack(terms).sum() / (2 * num_images)


def make_embeddings(num_images: int, dim: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(num_images)
    return torch.randn(num_images, 2, dim, generator=generator, dtype=dtype).mul_(3).requires_grad_()


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("num_images", [1, 2, 3, 5, 17])
def test_loss_and_gradient_equal_algorithm_1(num_images: int, temperature: float) -> None:
    embeddings = make_embeddings(num_images)
    expected = algorithm_1(embeddings, temperature)
    (expected_gradient,) = torch.autograd.grad(expected, embeddings)
    for chunk_size in (None, 1, 3, 4, 2 * num_images):
        loss = nt_xent(embeddings, temperature=temperature, chunk_size=chunk_size)
        (gradient,) = torch.autograd.grad(loss, embeddings)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_gradient_equals_finite_differences() -> None:
    embeddings = make_embeddings(4)
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, temperature=0.3, chunk_size=3), embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_embeddings_are_compared_in_fp32(dtype: torch.dtype) -> None:
    embeddings = make_embeddings(17, dtype=torch.float32).detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(embeddings, temperature=0.05)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, embeddings)
    wide = embeddings.detach().double().requires_grad_()
    expected = algorithm_1(wide, 0.05)
    (expected_gradient,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert gradient.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 100.0])
def test_extreme_temperatures_stay_finite_in_fp32(temperature: float) -> None:
    embeddings = make_embeddings(40, dtype=torch.float32)
    with torch.no_grad():
        embeddings[:10, 1] = -embeddings[:10, 0]  # opposite positives: the largest loss there can be
        embeddings[10:20, 1] = embeddings[10:20, 0]  # equal ones: the smallest
    loss = nt_xent(embeddings, temperature=temperature)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("num_images", [1, 2, 50])
def test_identical_embeddings_cost_log_of_the_number_of_others(num_images: int) -> None:
    loss, top1 = nt_xent_and_top1(torch.ones(num_images, 2, 8, dtype=torch.float64), temperature=0.1)
    assert loss.item() == pytest.approx(math.log(2 * num_images - 1), abs=1e-9)
    if num_images > 1:
        assert top1 == 0  # a collapsed encoder has not found its positives


def test_zero_embeddings_have_a_finite_gradient() -> None:
    embeddings = torch.zeros(3, 2, 4, requires_grad=True)
    nt_xent(embeddings, temperature=0.1).backward()
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()


def test_top1_counts_anchors_whose_positive_is_nearest() -> None:
    embeddings = make_embeddings(17)
    with torch.no_grad():
        embeddings[:, 1] = embeddings[:, 0] + embeddings[:, 1] * 0.6
    z = torch.nn.functional.normalize(embeddings, dim=-1).flatten(0, 1)
    similarity = (z @ z.t()).fill_diagonal_(-2)
    expected = sum(int(similarity[i].argmax()) == i ^ 1 for i in range(34)) / 34
    assert 0 < expected < 1
    for chunk_size in (None, 5):
        _, top1 = nt_xent_and_top1(embeddings, temperature=0.1, chunk_size=chunk_size)
        assert top1.item() == pytest.approx(expected)
        assert not top1.requires_grad


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest storage behind any result."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_tensor_of_all_pairs_is_ever_made() -> None:
    embeddings = make_embeddings(1024, dim=4, dtype=torch.float32)
    with LargestTensor() as whole:
        nt_xent(embeddings, temperature=0.1, chunk_size=2048).backward()
    assert whole.elements == 2048**2  # the instrument sees it
    with LargestTensor() as chunked:
        nt_xent(embeddings, temperature=0.1, chunk_size=16).backward()
    assert chunked.elements == 16 * 2048


def test_chunks_are_bounded_by_default() -> None:
    embeddings = make_embeddings(2048, dim=4, dtype=torch.float32)
    with LargestTensor() as seen:
        nt_xent(embeddings, temperature=0.1).backward()
    assert seen.elements <= 4096**2 // 4


def test_only_the_gradient_is_kept_for_backward() -> None:
    saved: list[int] = []
    embeddings = make_embeddings(64, dim=4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        nt_xent(embeddings, temperature=0.1)
    assert max(saved) <= 128 * 4


@pytest.mark.parametrize("shape", [(4, 3, 8), (4, 1, 8), (8, 8)])
def test_another_number_of_views_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="V=2"):
        nt_xent(torch.zeros(shape), temperature=0.1)


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        nt_xent(torch.zeros(4, 2, 8), temperature=temperature)


def _loss_and_ddp_gradient(weight: Tensor, images: Tensor) -> tuple[float, float, Tensor]:
    """This rank's share of `images` through one shared linear map, the gradient averaged by DistributedDataParallel."""
    model = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    with torch.no_grad():
        model.weight.copy_(weight)
    parallel = nn.parallel.DistributedDataParallel(model)
    share = images.chunk(torch.distributed.get_world_size())[rank()]
    loss, top1 = nt_xent_and_top1(parallel(share), temperature=0.2, chunk_size=3)
    loss.backward()
    assert model.weight.grad is not None
    return loss.item(), top1.item(), model.weight.grad


def test_two_ranks_equal_one_process(two_ranks) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 2, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    expected = algorithm_1(images @ weight.t(), 0.2)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    _, expected_top1 = nt_xent_and_top1(images @ weight.t(), temperature=0.2)
    results = two_ranks.run(_loss_and_ddp_gradient, weight.detach(), images)
    assert sum(loss for loss, _, _ in results) / 2 == pytest.approx(expected.item(), abs=1e-12)
    assert sum(top1 for _, top1, _ in results) / 2 == pytest.approx(expected_top1.item())
    for _, _, gradient in results:
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
