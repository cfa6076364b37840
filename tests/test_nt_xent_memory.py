"""What NT-Xent saves memory by: a normalisation with its own backward, one gradient where anchors are the keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ssl.methods.nt_xent import _NTXent, normalise, nt_xent


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normalisation_and_its_gradient_equal_torchs_also_of_vanishing_vectors(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 2, 5, generator=generator, dtype=torch.float64)
    start *= torch.tensor([0.0, 1e-13, 1e-6, 1.0, 2.0, 1e3, 1e6], dtype=torch.float64)[:, None, None]
    gradient = torch.randn(7, 2, 5, generator=generator, dtype=torch.float64).to(dtype)
    found = []
    for function in (normalise, lambda x: normalize(x, dim=-1)):
        given = start.clone().to(dtype).requires_grad_()
        result = function(given)
        found.append((result.detach(), *torch.autograd.grad(result, given, gradient)))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[0][0], found[1][0], rtol=tolerance, atol=0)
    size = found[1][1].abs().amax(-1, keepdim=True)  # of 1 / length
    torch.testing.assert_close(found[0][1] / size, found[1][1] / size, rtol=0, atol=tolerance)


def test_anchors_that_are_the_keys_have_the_sum_of_both_gradients() -> None:
    z = normalise(torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).flatten(0, 1)
    gradients = []
    for others in (None, z.clone().requires_grad_()):
        anchors = z.clone().requires_grad_()
        loss, _ = _NTXent.apply(anchors, others, 0, 0.2, 5)  # pyright: ignore[reportGeneralTypeIssues]
        gradients.append(sum(torch.autograd.grad(loss, [x for x in (anchors, others) if x is not None])))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


def test_backward_can_run_again_over_the_same_graph() -> None:
    embeddings = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = nt_xent(embeddings, temperature=0.1)
    first: Tensor
    (first,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, embeddings)
    assert torch.equal(first, kept)
    assert torch.equal(second, kept)


def test_a_scaled_loss_has_a_scaled_gradient() -> None:
    embeddings = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    (plain,) = torch.autograd.grad(nt_xent(embeddings, temperature=0.1), embeddings)
    for factor in (1.0, 0.25, -3.0):
        (scaled,) = torch.autograd.grad(factor * nt_xent(embeddings, temperature=0.1), embeddings)
        torch.testing.assert_close(scaled, factor * plain, rtol=1e-12, atol=0)
