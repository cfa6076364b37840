"""SimMIM: masked images for backbones that cannot drop tokens (Xie et al. 2021, arXiv:2111.09886)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssl.methods.base import Batch, Method
from ssl.methods.mae import num_visible, patchify, random_mask, unpatchify
from ssl.models.token_maps import TokenMap, check_token_map, last_norm

Size = tuple[int, int]


class SimMIM(Method):
    """Put a learned token in the place of masked patches, and predict their pixels linearly (section 3).

    The image is masked in squares of `mask_patch_size` pixels; of N squares ceil(mask_ratio * N) are masked, those with
    the largest noise. Each of their tokens behind the backbone's first layer is replaced by one learned token, so that
    every token keeps its place, and the backbone sees all of them. A linear layer turns each vector of the last map
    into the pixels for which it stands; the loss is the mean absolute error on masked pixels alone (equation 1).

    `mask_patch_size=None` is `default_mask_patch`. With `norm_pixel_targets`, which is MAE's and not the paper's, a
    square's target is standardised by its own mean and unbiased variance. Raises ValueError where backbone, image size
    and masking do not go together.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mask_ratio: float = 0.6,
        mask_patch_size: int | None = None,
        norm_pixel_targets: bool = False,
        image_size: Size,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        token_map = check_token_map(backbone, image_size=image_size, in_chans=in_chans, needed_by="method=simmim")
        self.backbone = backbone
        self.token_map = token_map
        self.mask_ratio = mask_ratio
        self.norm_pixel_targets = norm_pixel_targets
        self.view_size = (image_size[0], image_size[1])
        self.mask_patch = _checked_mask_patch(mask_patch_size, self.view_size, token_map)
        self.mask_grid: Size = (image_size[0] // self.mask_patch[0], image_size[1] // self.mask_patch[1])
        self.num_noise = self.mask_grid[0] * self.mask_grid[1]
        check_mask_ratio(self.num_noise, mask_ratio, self.mask_patch)

        self.mask_token = nn.Parameter(torch.empty(token_map.token_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-2.0, b=2.0)  # as the paper's code does
        self.pixels = nn.Linear(token_map.dim, token_map.cell_size[0] * token_map.cell_size[1] * in_chans)
        self._freeze_unreached()
        self.notes = self._described()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image = batch["views"][0]
        masked = self.mask(batch["noise"])  # (B, num_noise)
        target, _, _ = self.targets(image)  # (B, C, H, W)
        error = (self.predict(image, masked).float() - target).abs()  # (B, C, H, W)
        count = len(image) * image.shape[1] * self.view_size[0] * self.view_size[1] * self._share()
        return {"loss": torch.where(self.on_pixels(masked), error, 0.0).sum() / count}

    def mask(self, noise: Tensor, mask_ratio: float | None = None) -> Tensor:
        """True for the squares that noise (B, N) masks, row by row: (B, N)."""
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        _, masked = random_mask(noise, num_visible(self.num_noise, ratio))
        return torch.zeros_like(noise, dtype=torch.bool).scatter(1, masked, True)

    def on_pixels(self, masked: Tensor) -> Tensor:
        """The mask of squares (B, N) as one of pixels, (B, 1, H, W)."""
        return self._on_squares(masked, self.mask_patch)[:, None]

    def predict(self, image: Tensor, masked: Tensor) -> Tensor:
        """Predict every pixel's target from what is not masked: (B, C, H, W) and (B, N) to (B, C, H, W)."""
        with self._in_place(masked):
            features = self.backbone.forward_features(image)  # (B, D, h, w) or (B, h, w, D)  # pyright: ignore
        features = last_norm(self.backbone, self.token_map)(features)
        cells = features.movedim(self.token_map.axis, -1).flatten(1, 2)  # (B, h*w, D)
        return unpatchify(self.pixels(cells), self.token_map.cell_size, self.token_map.grid_size)

    def targets(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the targets (B, C, H, W), and the mean and deviation (B, N, 1) that were taken out of each square."""
        squares = patchify(image.float(), self.mask_patch)  # (B, N, P*P*C)
        if not self.norm_pixel_targets:
            zero = squares.new_zeros(*squares.shape[:2], 1)
            return image.float(), zero, zero + 1
        variance, mean = torch.var_mean(squares, dim=-1, correction=1, keepdim=True)
        deviation = (variance + 1e-6).sqrt()
        return unpatchify((squares - mean) / deviation, self.mask_patch, self.mask_grid), mean, deviation

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor, mask_ratio: float | None = None) -> dict[str, Tensor]:
        """Return pictures (B, C, H, W) on the images' normalised scale: `input`, `masked` and `reconstruction`.

        Masked squares are zero in `masked`, and predictions in `reconstruction`, put back on the true square's scale.
        """
        check_mask_ratio(self.num_noise, self.mask_ratio if mask_ratio is None else mask_ratio, self.mask_patch)
        masked = self.mask(noise, mask_ratio)
        _, mean, deviation = self.targets(images)
        predicted = patchify(self.predict(images, masked).float(), self.mask_patch) * deviation + mean
        pixels, where = images.float(), self.on_pixels(masked)
        return {
            "input": pixels,
            "masked": torch.where(where, 0.0, pixels),
            "reconstruction": torch.where(where, unpatchify(predicted, self.mask_patch, self.mask_grid), pixels),
        }

    @contextmanager
    def _in_place(self, masked: Tensor) -> Iterator[None]:
        """Let the backbone's first layer give the mask token in the places of masked squares.

        A hook, for this forward only: the backbone stays the library's own, with its keys and its forward.
        """
        axis = self.token_map.token_axis
        places = self._on_squares(masked, self._tokens_per_square()).unsqueeze(axis)  # (B, 1, h, w) or (B, h, w, 1)
        token = self.mask_token.view(-1, 1, 1) if axis == 1 else self.mask_token  # (D, 1, 1) or (D,)

        def replace(layer: nn.Module, given: Any, tokens: Tensor) -> Tensor:
            return torch.where(places, token.to(tokens.dtype), tokens)

        handle = getattr(self.backbone, self.token_map.first_layer).register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def _on_squares(self, masked: Tensor, size: Size) -> Tensor:
        """Each square of the mask (B, N) repeated over rows and columns of what it covers."""
        square = masked.view(-1, *self.mask_grid)  # (B, H/P, W/P)
        return square.repeat_interleave(size[0], dim=1).repeat_interleave(size[1], dim=2)

    def _tokens_per_square(self) -> Size:
        token = self.token_map.token_size
        return self.mask_patch[0] // token[0], self.mask_patch[1] // token[1]

    def _share(self) -> float:
        """The share of pixels that is masked, which rounding makes no less than the ratio."""
        return 1 - num_visible(self.num_noise, self.mask_ratio) / self.num_noise

    def _freeze_unreached(self) -> None:
        """Take parameters behind the last map out of training: without a gradient, ranks would wait for them."""
        applied = {id(parameter) for parameter in last_norm(self.backbone, self.token_map).parameters()}
        for name in self.token_map.unreached:
            parameter = self.backbone.get_parameter(name)
            parameter.requires_grad_(id(parameter) in applied)

    def _described(self) -> tuple[str, ...]:
        kind = "masked in place by a learned token, not dropped, as in SimMIM (arXiv:2111.09886)"
        grid, cell = self.token_map.grid_size, self.token_map.cell_size
        num_masked = self.num_noise - num_visible(self.num_noise, self.mask_ratio)
        said = [
            f"tokens are {kind}: {num_masked} of {self.num_noise} squares of {_times(self.mask_patch)} pixels, whose "
            f"{'normalised ' if self.norm_pixel_targets else ''}pixels a linear layer predicts from {_times(grid)} "
            f"features, each of {_times(cell)} pixels, under L1"
        ]
        if grid == (1, 1):
            said.append(
                "one vector stands for the whole image; a smaller model.patch_size or +model.args.output_stride, "
                "as far as the backbone takes them, or a larger data.image_size gives more"
            )
        frozen = [name for name in self.token_map.unreached if not self.backbone.get_parameter(name).requires_grad]
        if frozen:
            said.append(f"not trained, as they stand behind the last map: {', '.join(frozen)}")
        return tuple(said)


def default_mask_patch(image_size: Size, token_size: Size) -> Size:
    """Pixels of a masked square: 32, the paper's for images of 192 and 224, in proportion below 192.

    In detail, of the sizes that divide the image and that tokens divide, the largest that is at most 32 and at most a
    sixth of the shorter side, and one token where there is none.
    """
    limit = min(32, min(image_size) / 6)
    fitting = [size for size in mask_patches(image_size, token_size) if max(size) <= limit]
    return fitting[-1] if fitting else token_size


def mask_patches(image_size: Size, token_size: Size) -> list[Size]:
    """Squares of whole tokens that divide an image into at least two, from small to large."""
    found = []
    for count in range(1, max(image_size) // min(token_size) + 1):
        size = (token_size[0] * count, token_size[1] * count)
        divides = image_size[0] % size[0] == 0 and image_size[1] % size[1] == 0
        if divides and size != image_size:
            found.append(size)
    return found


def check_mask_ratio(num_squares: int, mask_ratio: float, mask_patch: Size) -> None:
    """Raise ValueError, with the range, where nothing or everything would be masked."""
    visible = num_visible(num_squares, mask_ratio)
    if 0 < visible < num_squares:
        return
    raise ValueError(
        f"method.mask_ratio={mask_ratio} leaves {visible} of {num_squares} squares of {_times(mask_patch)} pixels "
        "visible; at least one must be visible and one masked, so give a ratio above 0 and at most "
        f"{1 - 1 / num_squares:.4f}, or a smaller method.mask_patch_size."
    )


def _checked_mask_patch(mask_patch_size: int | None, image_size: Size, token_map: TokenMap) -> Size:
    allowed = mask_patches(image_size, token_map.token_size)
    if not allowed:
        raise ValueError(
            f"method=simmim cannot mask a part of {_times(image_size)} pixels, which the backbone takes as one token; "
            "set a smaller model.patch_size or a larger data.image_size."
        )
    if mask_patch_size is None:
        return default_mask_patch(image_size, token_map.token_size)
    if (mask_patch_size, mask_patch_size) in allowed:
        return mask_patch_size, mask_patch_size
    square = [str(size[0]) for size in allowed if size[0] == size[1]]
    raise ValueError(
        f"method.mask_patch_size={mask_patch_size} must hold whole tokens of {_times(token_map.token_size)} pixels and "
        f"divide images of {_times(image_size)}; set it to {', '.join(square) or 'null'}."
    )


def _times(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
