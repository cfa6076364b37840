"""The exact nearest neighbours of features by cosine similarity, with a rule for ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FAISS_GPU_NEIGHBOURS = 2048  # what faiss can select on a GPU
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def unit_length(features: Tensor) -> Tensor:
    """Features (N, D) scaled to length 1 in fp32; a feature of zeros stays zero and is equally far from all."""
    return functional.normalize(features.float(), dim=1)  # (N, D)


def make_search(bank: Tensor, *, index: str, device: torch.device) -> tuple[Search, str]:
    """The k nearest by inner product in `bank` (N, D), most similar first, and the name of what finds them."""
    if index not in ("auto", "faiss", "torch"):
        raise ValueError(f"index={index} is not known; allowed: auto, faiss, torch")
    faiss = import_faiss() if index != "torch" else None
    if faiss is None and index == "faiss":
        raise ValueError("index=faiss, but faiss cannot be imported; install it or use index=torch (the same result)")
    if faiss is None:
        find, name = torch_search(bank, device), f"torch.topk on {device.type}"
    else:
        find, name = faiss_search(faiss, bank, device)
    if index == "auto" and faiss is None:
        name += " (faiss cannot be imported)"

    def search(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        # One more than asked: where it is as similar as the last, the border runs through a tie and the rule decides.
        similarity, neighbour = find(queries, min(count + 1, len(bank)))
        if similarity.shape[1] > count:
            for row in (similarity[:, count - 1] == similarity[:, count]).nonzero()[:, 0].tolist():
                similarity[row, :count], neighbour[row, :count] = nearest_in_order(bank @ queries[row], count)
        return in_order(similarity[:, :count], neighbour[:, :count])

    return search, name


def in_order(similarity: Tensor, neighbour: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours (B, k) sorted by falling similarity, ties by their place in the bank."""
    by_place = neighbour.argsort(dim=1)
    order = by_place.gather(1, similarity.gather(1, by_place).argsort(dim=1, descending=True, stable=True))
    return similarity.gather(1, order), neighbour.gather(1, order)


def nearest_in_order(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of (N,), of equal ones those that stand first."""
    last = similarity.topk(count).values[-1]
    above = (similarity > last).nonzero()[:, 0]
    equal = (similarity == last).nonzero()[: count - len(above), 0]
    chosen = torch.cat([above, equal])  # (k,)
    return similarity[chosen], chosen


def torch_search(bank: Tensor, device: torch.device) -> Search:
    """Exact search by one matrix product and `topk`."""
    bank = bank.to(device)

    def find(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        similarity, neighbour = (queries.to(device) @ bank.T).topk(count, dim=1)  # (B, k)
        return similarity.cpu(), neighbour.cpu()

    return find


def faiss_search(faiss: Any, bank: Tensor, device: torch.device) -> tuple[Search, str]:
    """faiss's flat inner-product index, on the GPU where `device` is one and this faiss can use it."""
    flat = faiss.IndexFlatIP(bank.shape[1])
    name = f"faiss {faiss.__version__} IndexFlatIP on cpu"
    on_gpu = device.type == "cuda" and getattr(faiss, "get_num_gpus", int)() > 0
    if on_gpu:
        resources = faiss.StandardGpuResources()
        flat = faiss.index_cpu_to_gpu(resources, device.index or 0, flat)
        name = f"faiss {faiss.__version__} IndexFlatIP on cuda"
    flat.add(as_rows(bank))

    def find(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if on_gpu and count > FAISS_GPU_NEIGHBOURS:
            return torch_search(bank, device)(queries, count)
        similarity, neighbour = flat.search(as_rows(queries), count)
        return torch.from_numpy(similarity), torch.from_numpy(neighbour)

    return find, name


def as_rows(features: Tensor) -> np.ndarray:
    """The C-contiguous fp32 numpy view that faiss reads."""
    return np.ascontiguousarray(features.detach().cpu().numpy(), dtype=np.float32)


def import_faiss() -> Any:
    """faiss, or None where it cannot be imported. Late and after torch, because its wheel is built for another CUDA."""
    try:
        import faiss
    except (ImportError, OSError):  # OSError: a shared library of the GPU wheel is missing
        return None
    return faiss
