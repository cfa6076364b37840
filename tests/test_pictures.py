from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ssl.pictures import grid, reconstruction_panel, save_png, to_uint8, views_panel


def test_normalised_pixels_come_back_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, 5, 7, 3), dtype=np.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    normalised = (scaled - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    np.testing.assert_array_equal(to_uint8(normalised, mean, std), pixels)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_any_number_of_channels_becomes_a_colour_picture(channels):
    image = torch.full((1, channels, 3, 4), 0.5)
    pixels = to_uint8(image, [0.0] * channels, [1.0] * channels)
    assert pixels.shape == (1, 3, 4, 3)
    assert pixels[..., 0].min() == 128
    if channels == 1:
        assert (pixels == 128).all()


def test_what_is_not_a_number_or_out_of_range_still_makes_a_picture():
    image = torch.tensor([float("nan"), float("inf"), -9.0, 9.0]).view(1, 1, 2, 2)
    assert to_uint8(image, [0.0], [1.0])[0, :, :, 0].tolist() == [[0, 255], [0, 255]]


def test_grid_places_each_tile_and_leaves_the_rest_white():
    tiles = [[np.full((3, 4, 3), 10 * (2 * i + j), dtype=np.uint8) for j in range(2)] for i in range(2)]
    picture = grid([tiles[0], tiles[1][:1]], gap=1, min_side=1)
    assert picture.shape == (9, 11, 3)
    assert (picture[1:4, 1:5] == 0).all()
    assert (picture[1:4, 6:10] == 10).all()
    assert (picture[5:8, 1:5] == 20).all()
    assert (picture[5:8, 6:10] == 255).all()
    assert (picture[0] == 255).all()


def test_small_tiles_are_enlarged_pixel_by_pixel():
    tile = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    picture = grid([[tile]], gap=0, min_side=6)
    np.testing.assert_array_equal(picture[::2, ::2], tile)
    np.testing.assert_array_equal(picture[1::2, 1::2], tile)


def test_empty_grid_is_an_error():
    with pytest.raises(ValueError, match="at least one tile"):
        grid([[]])


def test_panels_have_a_column_per_image_and_a_row_per_view(tmp_path):
    generator = torch.Generator().manual_seed(0)
    views = [torch.rand(5, 3, 96, 64, generator=generator) for _ in range(2)]
    panel = views_panel(views, mean=[0, 0, 0], std=[1, 1, 1], num_images=4)
    assert panel.shape == (2 * 98 + 2, 4 * 66 + 2, 3)
    pictures = dict.fromkeys(("input", "masked", "reconstruction"), views[0])
    panel = reconstruction_panel(pictures, mean=[0, 0, 0], std=[1, 1, 1])
    assert panel.shape == (3 * 98 + 2, 5 * 66 + 2, 3)
    save_png(panel, tmp_path / "pictures" / "panel.png")
    with Image.open(tmp_path / "pictures" / "panel.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), panel)
