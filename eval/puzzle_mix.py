"""PuzzleMix (Kim et al. 2020, arXiv:2009.06049): images cut along what matters in them, and moved to fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eval.mixing import BetaShare, Classify, Mixed, Mixing
from ssl.models.hidden import HiddenLayer

BLOCKS = (2, 4, 8, 16)
"""Blocks along each side of the image, one of which is drawn for each batch."""
_TINY = 1e-8


class PuzzleMix(Mixing):
    """Masks that keep the salient blocks of both images, and a transport that moves them where the mask shows them.

    alpha: of the Beta distribution of the share that is aimed at, one for the batch. num_labels: values of the mask
    between 0 and 1; label_smoothness, data_smoothness, prior: beta, gamma and eta of the paper's equation 5, in the
    units of its code; transport: cost xi of moving a block across the image, None for no transport. neighbours: side,
    in pixels, of the cells whose colours are compared across the blocks' borders. Raises ValueError.
    """

    num_noise = 2  # number of blocks, share

    def __init__(
        self,
        *,
        num_classes: int,
        alpha: float = 1.0,
        num_labels: int = 3,
        label_smoothness: float = 1.2,
        data_smoothness: float = 0.5,
        prior: float = 0.2,
        transport: float | None = 0.8,
        neighbours: int = 4,
        smoothing: float = 0.0,
        multi_label: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, smoothing=smoothing, multi_label=multi_label)
        if num_labels < 2 or neighbours < 1:
            raise ValueError(
                f"num_labels must be 2 or more and neighbours 1 or more, got {num_labels} and {neighbours}"
            )
        if min(label_smoothness, data_smoothness, prior, transport or 0.0) < 0:
            raise ValueError(
                "label_smoothness, data_smoothness, prior and transport are weights and must be 0 or more, got "
                f"{label_smoothness}, {data_smoothness}, {prior}, {transport}"
            )
        if data_smoothness and not label_smoothness:
            raise ValueError("data_smoothness is a factor of label_smoothness: it has no effect while that is 0")
        self.share = BetaShare(alpha)
        self.num_labels = num_labels
        self.label_smoothness = label_smoothness
        self.data_smoothness = data_smoothness
        self.prior = prior
        self.transport = transport
        self.neighbours = neighbours

    def forward(
        self,
        classify: Classify,
        images: Tensor,
        labels: Tensor,
        noise: Tensor,
        *,
        model: nn.Module | None = None,
        layers: Sequence[HiddenLayer] = (),
        std: Sequence[float] = (),
    ) -> Mixed:
        """As Mixing's; `std` is needed, and `model`, which is in eval mode while the saliency is found."""
        if model is None or len(std) != images.shape[1]:
            raise ValueError("PuzzleMix needs the model that classifies, and the std of each of the images' channels")
        targets = self.soft_targets(labels)
        salient = saliency(model, images, lambda values: self.loss(classify(values), targets))
        blocks, share = noise[0, :1].item(), self.share(noise[:1, 1]).item()
        allowed = fitting_blocks((images.shape[2], images.shape[3]))
        mixed, own = self.mix(images, salient, std=std, num_blocks=allowed[int(blocks * len(allowed))], share=share)
        targets = targets * own[:, None] + targets.flip(0) * (1 - own[:, None])
        logits = classify(mixed)
        return Mixed(self.loss(logits, targets), logits, targets)

    @torch.no_grad()
    def mix(
        self, images: Tensor, salient: Tensor, *, std: Sequence[float], num_blocks: int, share: float
    ) -> tuple[Tensor, Tensor]:
        """Mixed images (B, C, S, S), and the share of its own label that each keeps (B,).

        `salient` (B, S, S) is how much each pixel matters, `share` what the masks aim at.
        """
        side = images.shape[2] // num_blocks
        blocks = functional.avg_pool2d(salient[:, None], side)[:, 0]  # (B, n, n)
        blocks = blocks / blocks.sum((1, 2), keepdim=True).clamp_min(_TINY)
        scale = torch.tensor(list(std), device=images.device).view(-1, 1, 1)
        borders = border_distances(images * scale, num_blocks=num_blocks, neighbours=self.neighbours)
        weight = self.label_smoothness / num_blocks / 16  # as the paper's code scales it
        unary, down, across = grid_costs(
            blocks,
            borders,
            label_cost=weight,
            data_cost=weight * self.data_smoothness,
            prior=self.prior * share_prior(share, self.num_labels) / num_blocks**2,
        )
        labels = np.stack([cut_grid(*costs) for costs in zip(*(part.cpu().numpy() for part in (unary, down, across)))])
        mask = 1 - torch.from_numpy(labels).to(images) / (self.num_labels - 1)  # (B, n, n), 1 is the image's own
        other = images.flip(0)
        if self.transport is not None:
            images = move_blocks(images, masked_transport(blocks, mask, cost=self.transport))
            other = move_blocks(other, masked_transport(blocks.flip(0), 1 - mask, cost=self.transport))
        pixels = mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]  # (B, 1, S, S)
        return pixels * images + (1 - pixels) * other, mask.mean((1, 2))


def saliency(model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """How strongly each pixel moves the loss, (B, H, W): the gradient's root mean square over the channels.

    `loss` is the mean over images (B, C, H, W), and runs `model`, which is in eval mode meanwhile. The gradient goes to
    the images alone: parameters, their gradients and running statistics stay as they are.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            # The sum over the images: of the mean, half precision could lose the gradients of a large batch.
            (gradient,) = torch.autograd.grad(loss(images) * len(images), images)
    finally:
        for module in training:
            module.training = True
    return gradient.float().square().mean(1).sqrt()


def fitting_blocks(size: tuple[int, int]) -> list[int]:
    """The numbers of blocks along a side that divide a square image of `size`. Raises ValueError."""
    fitting = [number for number in BLOCKS if size[0] % number == 0]
    if size[0] != size[1] or not fitting:
        raise ValueError(f"PuzzleMix needs square images with a side that {BLOCKS} divide, one at least, got {size}")
    return fitting


def share_prior(share: float, num_labels: int) -> Tensor:
    """Minus the log of the probability of each label (L,): how many of L - 1 draws fall to the other image."""
    draws = num_labels - 1
    chance = [math.comb(draws, k) * share ** (draws - k) * (1 - share) ** k for k in range(num_labels)]
    return -torch.log(torch.tensor(chance, dtype=torch.float64) + _TINY)


def border_distances(images: Tensor, *, num_blocks: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """How much colours differ across the borders of neighbouring blocks, where each is of either image.

    Images (B, C, S, S) give (B, 2, 2, n-1, n) for each block and the one below it, and (B, 2, 2, n, n-1) for the one
    to its right: the mean absolute difference of the cells that touch, with the first block and the second block of
    image B-1-i (0) or of image i (1).
    """
    side = images.shape[2] // num_blocks
    cell = next(size for size in range(min(neighbours, side), 0, -1) if side % size == 0)
    own = functional.avg_pool2d(images, cell)  # (B, C, n k, n k)
    pair, k = (own.flip(0), own), side // cell
    down = [[_across(one, two, k) for two in pair] for one in pair]
    right = [[_across(one.mT, two.mT, k).mT for two in pair] for one in pair]
    return tuple(torch.stack([torch.stack(row, 1) for row in rows], 1) for rows in (down, right))  # type: ignore


def _across(upper: Tensor, lower: Tensor, k: int) -> Tensor:
    """Mean absolute difference, (B, n-1, n), of the last row of cells of each block and the first row of the next."""
    difference = (upper[:, :, k - 1 : -1 : k] - lower[:, :, k::k]).abs().mean(1)  # (B, n-1, n k)
    return functional.avg_pool1d(difference, k)


def grid_costs(
    salient: Tensor, borders: tuple[Tensor, Tensor], *, label_cost: float, data_cost: float, prior: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The energy of a mask as costs of each block's label, (B, n, n, L), and of each pair's: (B, n-1, n), (B, n, n-1).

    With z the mask, label l / (L - 1) away from the image's own, a pair costs its weight times (z_i - z_j)^2. A block
    costs the saliency (B, n, n) that it hides of both images, and its `prior` (L,). The costs of borders are those of
    `data_cost` times `borders` for masks of 0 and 1, less a constant, and their weights' continuation between. A pair's
    weight is at least 0, without which the cut would not be the best.
    """
    hidden = salient.double(), salient.flip(0).double()  # at z = 0 and at z = 1
    ends = [part.clone() for part in hidden]
    weights = []
    for axis, border in zip((1, 2), borders):
        border = data_cost * border.double()  # (B, 2, 2, ...)
        length = salient.shape[axis]
        for z in range(2):
            ends[z].narrow(axis, 0, length - 1).add_((border[:, z, 0] + border[:, z, 1]) / 2)
            ends[z].narrow(axis, 1, length - 1).add_((border[:, 0, z] + border[:, 1, z]) / 2)
        mixed = border[:, 1, 0] + border[:, 0, 1] - border[:, 0, 0] - border[:, 1, 1]
        weights.append((label_cost + mixed / 2).clamp_min(0))
    away = torch.linspace(0, 1, len(prior), dtype=torch.float64, device=salient.device)  # (L,)
    unary = ends[1][..., None] * (1 - away) + ends[0][..., None] * away + prior.to(salient.device)
    return unary, weights[0], weights[1]


def cut_grid(unary: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The labels (R, C) of a grid with the smallest energy, int64: a minimum cut, exact up to rounding of the costs.

    The energy is the sum of each cell's `unary` (R, C, L) cost, and of each pair's weight, `down` (R-1, C) or `across`
    (R, C-1), times ((l - m) / (L - 1))^2, where the paper's swaps only come close. A label l is l of the L - 1 nodes of
    its cell on the source's side (Ishikawa 2003); as each of their steps is 0 or 1, (l - m)^2 is the number of unequal
    pairs of nodes plus l^2 - (L - 1) l, and likewise for m.
    """
    sparse = _scipy().sparse
    rows, columns, num_labels = unary.shape
    steps = num_labels - 1
    cell = np.arange(rows * columns).reshape(rows, columns)
    first = np.concatenate((cell[:-1].ravel(), cell[:, :-1].ravel()))
    second = np.concatenate((cell[1:].ravel(), cell[:, 1:].ravel()))
    weight = np.concatenate((down.ravel(), across.ravel())) / steps**2
    label = np.arange(num_labels)
    degree = np.bincount(first, weight, rows * columns) + np.bincount(second, weight, rows * columns)
    costs = unary.reshape(-1, num_labels) + degree[:, None] * (label**2 - steps * label)
    costs = costs - costs.min(axis=1, keepdims=True)  # (cells, L)

    # Whole numbers of 32 bits are what the flow takes: all finite costs together are 2^28, a forbidden cut costs 2^29.
    scale = 2**28 / max(costs.sum() + 2 * steps**2 * weight.sum(), 1e-30)
    source, sink = rows * columns * steps, rows * columns * steps + 1
    nodes = np.arange(rows * columns * steps).reshape(-1, steps)
    chain = np.column_stack((np.full(len(nodes), source), nodes, np.full(len(nodes), sink)))  # (cells, L + 1)
    step = np.arange(steps)
    one, two = nodes[first][:, step.repeat(steps)], nodes[second][:, np.tile(step, steps)]  # (pairs, steps^2) each
    pair_cost = np.broadcast_to(weight[:, None], one.shape)
    arcs = [
        (chain[:, :-1], chain[:, 1:], costs),
        (nodes[:, 1:], nodes[:, :-1], np.full(nodes[:, 1:].shape, 2**29 / scale)),
        (one, two, pair_cost),
        (two, one, pair_cost),
    ]
    start, stop, cost = (np.concatenate([arc[part].ravel() for arc in arcs]) for part in range(3))
    capacity = np.rint(cost * scale).astype(np.int32)
    graph = sparse.coo_array((capacity, (start, stop)), shape=(sink + 1, sink + 1)).tocsr()
    residual = graph - sparse.csgraph.maximum_flow(graph, source, sink).flow
    residual.data = np.maximum(residual.data, 0)
    residual.eliminate_zeros()
    reached = np.zeros(sink + 1, bool)
    reached[sparse.csgraph.breadth_first_order(residual, source, return_predecessors=False)] = True
    return reached[nodes].sum(axis=1).reshape(rows, columns)


def masked_transport(salient: Tensor, mask: Tensor, *, cost: float) -> Tensor:
    """Where each block goes: int64 (B, n*n), a permutation, so that salient blocks come to lie where the mask is open.

    A block i in place j costs `cost` times the squared distance of i and j, a side being 1, less the block's saliency
    (B, n, n) where the `mask` (B, n, n) is not 0. The permutation is the cheapest. The paper's algorithm 1, where each
    place keeps the best of the blocks that ask for it, is an approximation: run to its end it came out dearer than
    leaving every block where it is, and took 20 times as long on a CPU for 16 x 16 blocks.
    """
    linear_sum_assignment = _scipy().optimize.linear_sum_assignment
    batch, side, _ = mask.shape
    line = torch.arange(side, device=mask.device, dtype=torch.float64) / max(side - 1, 1)
    place = torch.cartesian_prod(line, line)  # (n*n, 2)
    distance = (place[:, None] - place[None]).square().sum(2)  # (n*n, n*n)
    shown = salient.double().reshape(batch, -1, 1) * (mask > 0).double().view(batch, 1, -1)  # (B, n*n, n*n)
    costs = (cost * distance - shown).cpu().numpy()
    plans = np.stack([linear_sum_assignment(costs_of_one)[1] for costs_of_one in costs])
    return torch.from_numpy(plans).to(mask.device)


def move_blocks(images: Tensor, plan: Tensor) -> Tensor:
    """The images (B, C, S, S) with block i of each, row by row, moved to place `plan[i]` (B, n*n)."""
    num = math.isqrt(plan.shape[1])
    side = images.shape[2] // num
    blocks = functional.unfold(images, side, stride=side)  # (B, C side side, n*n)
    moved = torch.empty_like(blocks).scatter_(2, plan[:, None].expand_as(blocks), blocks)
    return functional.fold(moved, images.shape[2:], side, stride=side)


def _scipy() -> ModuleType:
    try:
        import scipy.optimize
        import scipy.sparse.csgraph
    except ImportError as error:
        raise ValueError("PuzzleMix finds its masks with scipy, which is not installed: pip install scipy") from error
    return scipy
