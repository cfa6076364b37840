"""Products of matrices in fp32 that take a processor's widest registers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a` (M, K) times `b` (N, K) transposed, plus `bias` (N,): (M, N).

    In fp32 on a CPU, where no gradient is wanted, oneDNN does it. Torch's own `mm` asks MKL, which leaves half of the
    registers unused on processors that are not Intel's: on an AMD EPYC with AVX-512 oneDNN is 2.3 times as fast, and as
    exact. This may go when `mm` asks it by itself.
    """
    if _LINEAR is not None and _is_for_onednn(a, b):
        dense = b.is_contiguous() or b.T.is_contiguous()
        return _LINEAR(a, b if dense else b.contiguous(), bias, "none", [], "")  # gaps between rows take it seconds
    return a @ b.T if bias is None else torch.addmm(bias, a, b.T)


def has_onednn() -> bool:
    """Whether `product` has oneDNN at hand."""
    return _LINEAR is not None


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 by itself, at twice the rate of fp32; False where torch cannot tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return has_onednn() and bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _is_for_onednn(a: Tensor, b: Tensor) -> bool:
    is_fp32_on_cpu = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    wants_gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return is_fp32_on_cpu and not wants_gradient and a.numel() > 0 and b.numel() > 0


def _linear() -> Callable[..., Tensor] | None:
    """oneDNN's linear layer as torch's compiler calls it; None in a torch that was built without it."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


_LINEAR = _linear()
