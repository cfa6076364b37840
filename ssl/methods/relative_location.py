"""Relative location: where does this patch lie, seen from the one in the centre?

Doersch et al. 2015, Unsupervised Visual Representation Learning by Context Prediction (arXiv:1505.05192), in the form
of google/revisiting-self-supervised (Kolesnikov et al. 2019, arXiv:1901.09005) and open-mmlab/mmselfsup: one 3x3 grid
per image, nine patches encoded once, all eight (neighbour, centre) pairs classified.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl.methods.base import Batch, Method
from ssl.models.backbones import feature_dim, pooled_features
from ssl.models.heads import PairClassifier

PLACES = ("top left", "top", "top right", "left", "right", "bottom left", "bottom", "bottom right")
"""The eight classes in order: the cells of the grid row by row, without the centre."""
CENTRE = 4
NEIGHBOURS = (0, 1, 2, 3, 5, 6, 7, 8)
COLOURS = ("auto", "gray", "drop", "none")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
ONE_LEVEL = 1 / 255 / 0.225
"""About one of 255 grey levels in a normalised view. A patch that varies less is flat; to stretch it shows noise."""

Size = tuple[int, int]


class RelativeLocation(Method):
    """A backbone that encodes patches one by one, and a head that tells the place of each of eight beside the centre.

    A view of `grid_size` pixels is cut into 3x3 cells; a patch of `patch_size` lies at a random place in each. What it
    leaves of its cell is room for jitter and, on average, the gap to its neighbour, so that lines which run on across
    an edge do not give the place away. `jitter` limits how far in pixels a patch strays from its cell's middle, and
    keeps a gap of at least cell - patch - 2 * jitter; null uses all the room, as mmselfsup does (85, 64: gap 0 to 42).

    `colour` closes the other shortcut, the lens' chromatic aberration, in each patch by itself.
    `gray`, with `gray_probability`, replaces all channels by their luma, or by their mean where there are not three.
    The two codes above do so for whole images, which leaves a third of the grids with colour in all nine patches.
    `drop` keeps one random channel and replaces the others by Gaussian noise around 0 with a hundredth of its standard
    deviation (section 3.1 of the paper). `auto` is `gray`, or `none` for images of one channel.

    `standardise` then gives every patch mean 0 and standard deviation 1 over all its pixels and channels, as google's
    code does: brightness and contrast cannot tell which patches were neighbours. The views come normalised by the
    data's mean and std; of that remain the balance between channels, and that a whole image has the range of a patch.

    Patches are small, so a ResNet wants a stem that keeps their resolution, as google's has: `model.stem=small`, which
    `auto` takes where `stem_size` is at most 64 pixels. Dropout in the head draws from torch's generator.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        grid_size: int | Size | None = None,
        patch_size: int | Size | None = None,
        jitter: int | None = None,
        colour: str = "auto",
        gray_probability: float = 0.66,
        standardise: bool = True,
        hidden_dim: int = 4096,
        dropout: float = 0.5,
        image_size: Size,
        in_chans: int = 3,
    ) -> None:
        """Sizes are in pixels, one or (height, width); `default_grid` and `default_patch` give what is null.

        Raises ValueError where the patch fits neither cell nor backbone, and for settings that would change nothing.
        """
        super().__init__()
        self.view_size = _pair(grid_size) if grid_size is not None else default_grid(image_size)
        self.cell_size = (self.view_size[0] // 3, self.view_size[1] // 3)
        token_size = _token_size(backbone)
        self.patch_size = _pair(patch_size) if patch_size is not None else default_patch(self.view_size, token_size)
        self.offsets = _allowed_offsets(self.view_size, self.patch_size, jitter)
        self.colour = _checked_colour(colour, gray_probability, in_chans)
        self.gray_probability = gray_probability
        self.standardise = standardise
        self.num_noise = 18 + {"none": 0, "gray": 9, "drop": 10}[self.colour]
        self.backbone = backbone
        dim = _measured_dim(backbone, self.patch_size, token_size, in_chans)
        self.classifier = PairClassifier(dim, hidden_dim=hidden_dim, dropout=dropout)
        self.register_buffer("places", torch.arange(len(PLACES)), persistent=False)
        self.places: Tensor

    @staticmethod
    def stem_size(
        image_size: Size,
        *,
        grid_size: int | Size | None = None,
        patch_size: int | Size | None = None,
        **_: object,
    ) -> int:
        """The shorter side of what the backbone takes in training, from the image size and this method's settings.

        It is what `model.stem=auto` has to look at, instead of the image.
        """
        grid = _pair(grid_size) if grid_size is not None else default_grid(image_size)
        return min(_pair(patch_size) if patch_size is not None else default_patch(grid, (1, 1)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return `loss`, cross entropy over the 8B pairs, and `accuracy`, the share of pairs whose place was found."""
        views, noise = batch["views"], batch["noise"]
        if len(views) != 1:
            raise ValueError(
                f"method=relative_location needs one view of each image, got {len(views)}; "
                "try augment=relative_location"
            )
        view = views[0]  # (B, C, H, W)
        patches = self.prepare(cut(view, self.corners(noise), self.patch_size), noise)  # (B, 9, C, h, w)
        features = pooled_features(self.backbone, patches.flatten(0, 1))  # (9B, D)
        features = features.unflatten(0, (-1, 9))  # (B, 9, D)
        scores = self.classifier(features[:, NEIGHBOURS], features[:, CENTRE]).flatten(0, 1)  # (8B, 8)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        label = self.places.repeat(len(view))  # (8B,)
        accuracy = (scores.detach().argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(scores, label), "accuracy": accuracy}

    def corners(self, noise: Tensor) -> Tensor:
        """Top left corners of the patches, (B, 9, 2) of row and column, from the first 18 of each image's numbers."""
        share = noise[:, :18].view(-1, 9, 2)
        # With Python's numbers, not tensors of them: no copy to the device, for which a step would have to wait.
        offset = torch.stack(
            [low + (part * (high - low + 1)).floor() for part, (low, high) in zip(share.unbind(-1), self.offsets)],
            dim=-1,
        )  # (B, 9, 2); at most `high`, as share < 1 has 24 bits
        cell = torch.arange(9, device=noise.device)
        origin = torch.stack([cell // 3 * self.cell_size[0], cell % 3 * self.cell_size[1]], 1)  # (9, 2)
        return origin + offset.long()

    def prepare(self, patches: Tensor, noise: Tensor) -> Tensor:
        """Take from each patch of (B, 9, C, h, w) what gives its place away: colour fringes, brightness, contrast."""
        if self.colour == "gray":
            chosen = noise[:, 18:27] < self.gray_probability  # (B, 9)
            patches = torch.where(chosen[:, :, None, None, None], luma(patches), patches)
        elif self.colour == "drop":
            kept = (noise[:, 18:27] * patches.shape[2]).long()  # (B, 9)
            patches = drop_colour(patches, kept, noise[:, 27])
        return standardised(patches) if self.standardise else patches


def default_grid(image_size: Size) -> Size:
    """The view that is cut into cells, for images of (height, width): 255 for 224, in proportion from 128 pixels.

    Below, the image itself, so that what a patch shows is as large as it will be when whole images are evaluated. Tried
    at 32 pixels: a view of twice the size costs three times as much per step, and against three times the steps it is
    ahead by no more than one seed can show (linear probe on CIFAR-10, small ResNet: 38.3 % against 37.9; embedded data,
    small ViT: 31.5 against 30.5). Where steps are the limit and not time, set grid_size=63 and patch_size=16.
    """
    scale = 255 / 224 if min(image_size) >= 128 else 1.0
    height, width = (3 * int(scale * side / 3 + 1e-9) for side in image_size)
    return height, width


def default_patch(grid_size: Size, token_size: Size = (1, 1)) -> Size:
    """Three quarters of a cell (64 of 85 pixels), rounded down to what a vision transformer can cut into tokens."""
    height, width = (round(grid // 3 * 0.75) // token * token for grid, token in zip(grid_size, token_size))
    return height, width


def cut(view: Tensor, corners: Tensor, patch_size: Size) -> Tensor:
    """Cut patches at `corners` (B, 9, 2) out of (B, C, H, W), to (B, 9, C, h, w), all at once."""
    rows = corners[..., 0, None] + torch.arange(patch_size[0], device=view.device)  # (B, 9, h)
    columns = corners[..., 1, None] + torch.arange(patch_size[1], device=view.device)  # (B, 9, w)
    image = torch.arange(len(view), device=view.device)[:, None, None, None]
    return view[image, :, rows[..., :, None], columns[..., None, :]].permute(0, 1, 4, 2, 3)


def luma(patches: Tensor) -> Tensor:
    """Every channel of (B, 9, C, h, w) replaced by the image's luma; by the channels' mean where C is not 3.

    Taken of normalised channels, whose weights thereby differ by the ratios of their standard deviations.
    """
    channels = patches.shape[2]
    if channels != 3:
        return patches.mean(2, keepdim=True).expand_as(patches)
    red, green, blue = (weight * channel for weight, channel in zip(LUMA, patches.split(1, dim=2)))
    return (red + green + blue).expand_as(patches)


def drop_colour(patches: Tensor, kept: Tensor, seed: Tensor) -> Tensor:
    """Keep channel `kept` (B, 9) of patches (B, 9, C, h, w); the others become noise that follows from `seed` (B,)."""
    channel = torch.arange(patches.shape[2], device=patches.device)
    is_kept = (channel == kept[..., None])[..., None, None]  # (B, 9, C, 1, 1)
    remaining = patches.gather(2, kept[..., None, None, None].expand(-1, -1, 1, *patches.shape[3:]))  # (B, 9, 1, h, w)
    std = remaining.std((-2, -1), correction=0, keepdim=True)
    return torch.where(is_kept, patches, gaussian_noise(seed, patches.shape[1:]).to(patches.dtype) * (std / 100))


def gaussian_noise(seed: Tensor, shape: torch.Size) -> Tensor:
    """Gaussian numbers (B, *shape), a function of each image's `seed` in [0, 1) with 24 bits and of the place alone."""
    place = torch.arange(math.prod(shape), device=seed.device)
    bits = _scramble(_scramble((seed.double() * 2**24).long())[:, None] + place)  # (B, prod(shape)), 32 bits each
    uniform = ((bits >> 8).float() + 0.5) / 2**24
    return (torch.erfinv(2 * uniform - 1) * math.sqrt(2)).unflatten(1, shape)


def standardised(patches: Tensor) -> Tensor:
    """Patches (..., C, h, w) with mean 0 and standard deviation 1 each; flat ones are divided by one grey level."""
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    std, mean = torch.std_mean(patches, (-3, -2, -1), correction=0, keepdim=True)
    return (patches - mean) / std.clamp_min(ONE_LEVEL)


def _scramble(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, in int64: every bit of `x` moves every bit of the result."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _pair(size: int | Size) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _token_size(backbone: nn.Module) -> Size:
    """The size in pixels of a vision transformer's token; 1 for other models, which take patches of any size."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    return _pair(size if isinstance(size, int) else tuple(size))


def _allowed_offsets(grid_size: Size, patch_size: Size, jitter: int | None) -> list[Size]:
    """The least and the largest distance of a patch from its cell's corner, for rows and for columns."""
    offsets = []
    for grid, patch in zip(grid_size, patch_size):
        cell = grid // 3
        room = cell - patch
        if patch < 1:
            raise ValueError(
                f"method=relative_location has cells of {cell} pixels in a grid of {_text(grid_size)}, too small for "
                "the backbone's tokens; set model.patch_size smaller, or method.grid_size or data.image_size larger"
            )
        if room < 0:
            raise ValueError(
                f"method.patch_size={_text(patch_size)} does not fit cells of {cell} pixels, a third of the grid of "
                f"{_text(grid_size)}; set it to at most {cell}, or method.grid_size to at least {3 * patch}"
            )
        if jitter is None:
            offsets.append((0, room))
            continue
        if not 0 <= 2 * jitter <= room:
            raise ValueError(
                f"method.jitter={jitter} moves patches of {_text(patch_size)} out of their cells of {cell} pixels; "
                f"set it from 0 to {room // 2}, or to null for all the room there is"
            )
        offsets.append(((room - 2 * jitter) // 2, (room - 2 * jitter) // 2 + 2 * jitter))
    return offsets


def _checked_colour(colour: str, gray_probability: float, in_chans: int) -> str:
    if colour not in COLOURS:
        raise ValueError(f"method.colour must be one of {', '.join(COLOURS)}, got {colour!r}")
    if not 0 <= gray_probability <= 1:
        raise ValueError(f"method.gray_probability must lie in [0, 1], got {gray_probability}; published is 0.66")
    if colour == "auto":
        return "gray" if in_chans > 1 else "none"
    if colour != "none" and in_chans == 1:
        raise ValueError(f"method.colour={colour} changes nothing in images of one channel; set it to auto or none")
    return colour


def _measured_dim(backbone: nn.Module, patch_size: Size, token_size: Size, in_chans: int) -> int:
    if any(patch % token for patch, token in zip(patch_size, token_size)):
        raise ValueError(
            f"method.patch_size={_text(patch_size)} cannot be cut into the backbone's tokens of {_text(token_size)} "
            "pixels; set it to a multiple, or set model.patch_size"
        )
    try:
        return feature_dim(backbone, image_size=patch_size, in_chans=in_chans)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"method=relative_location shows the backbone patches of {_text(patch_size)} pixels, which "
            f"{type(backbone).__name__} cannot take ({reason}); try model=resnet18 or model=vit_s, or a larger "
            "method.grid_size and method.patch_size"
        ) from error


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
