"""Features of every image once and in order, the central view, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from eval.extract import backbone_features, centre_view, extract_features, raw_pixels
from ssl.data.augment import Augment
from ssl.data.embedded import Embedded
from ssl.data.loader import Loader
from ssl.models.backbones import build_backbone, pooled_features

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
CPU = torch.device("cpu")
TINY = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


class Pixels:
    """A source of given arrays or encoded bytes."""

    name, classes, num_ignored = "made", ["a", "b"], 0

    def __init__(self, images):
        self.images = images
        self.labels = np.arange(len(images), dtype=np.int64) % 2

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return self.images[index]

    def describe(self, index):
        return f"made image {index}"


def tiny_resnet():
    torch.manual_seed(0)
    return build_backbone("resnet18", image_size=(32, 32), model_args=TINY)[0]


def read(source, extract, *, size=(32, 32), batch_size=7, max_bad_fraction=0.01):
    loader = Loader(
        source, [centre_view(size)], size=size, channels=3, seed=0, in_memory_gib=0.0, threads=2,
        max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    augment = Augment(loader.views, mean=MEAN, std=STD)
    with loader:
        return extract_features(extract, loader, augment, batch_size=batch_size, device=CPU)


def test_features_are_those_of_the_model_on_each_image_in_order():
    source = Embedded("test", num_test=23)
    model = tiny_resnet()
    found = read(source, backbone_features(model, device=CPU, dtype=torch.float32))
    images = torch.from_numpy(np.stack([source.read(i) for i in range(23)])).permute(0, 3, 1, 2) / 255
    expected = torch.cat(
        [pooled_features(model.eval(), functional.normalize(image[None], MEAN, STD)) for image in images]
    )
    torch.testing.assert_close(found.features, expected.detach(), rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == source.labels.tolist()
    assert found.index.tolist() == list(range(23))
    assert not found.features.requires_grad


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_the_batch_size_does_not_move_features_because_the_model_is_in_eval_mode(name):
    torch.manual_seed(0)
    args = TINY if name == "resnet18" else {"depth": 2, "embed_dim": 24, "num_heads": 2}
    model, _ = build_backbone(name, image_size=(32, 32), model_args=args)
    model.train()
    extract = backbone_features(model, device=CPU, dtype=torch.float32)
    source = Embedded("test", num_test=10)
    one, all_at_once = read(source, extract, batch_size=1), read(source, extract, batch_size=100)
    torch.testing.assert_close(one.features, all_at_once.features, rtol=1e-4, atol=1e-5)


def test_features_are_fp32_whatever_the_model_computes_in():
    source = Embedded("test", num_test=12)
    model = tiny_resnet()
    exact = read(source, backbone_features(model, device=CPU, dtype=torch.float32)).features
    short = read(source, backbone_features(model, device=CPU, dtype=torch.bfloat16)).features
    assert short.dtype == torch.float32
    torch.testing.assert_close(short, exact, rtol=0.1, atol=0.1)


def test_large_images_are_seen_as_resize_and_centre_crop_would_show_them():
    y, x = np.mgrid[:375, :500].astype(np.float32)
    image = np.stack([y / 375, x / 500, np.sin(x / 40) * np.cos(y / 30) / 2 + 0.5], axis=2)
    image = (image * 255).astype(np.uint8)
    found = read(Pixels([image] * 2), raw_pixels, size=(224, 224)).features[0].view(3, 224, 224)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    usual = functional.center_crop(functional.resize(tensor, 256, functional.InterpolationMode.BICUBIC), 224)
    difference = (found - functional.normalize(usual / 255, MEAN, STD)) * torch.tensor(STD).view(3, 1, 1) * 255
    assert difference.abs().mean() < 1.5  # of 255 levels; half a pixel of place is within it


def test_small_images_are_seen_whole():
    assert centre_view((32, 32)).fraction == 1.0
    assert centre_view((96, 96)).fraction == 1.0
    assert centre_view((224, 224)).fraction == 0.875


def test_raw_pixels_are_the_normalised_pixels():
    image = np.full((32, 32, 3), 51, np.uint8)
    found = read(Pixels([image] * 3), raw_pixels)
    assert found.features.shape == (3, 3 * 32 * 32)
    assert found.features[0, 0].item() == pytest.approx((0.2 - 0.5) / 0.2)


def test_images_that_cannot_be_decoded_are_left_out_not_replaced():
    images = [np.full((32, 32, 3), level, np.uint8) for level in range(0, 200, 10)]
    images[3] = b"no image at all"
    found = read(Pixels(images), raw_pixels, max_bad_fraction=0.2)
    assert found.num_bad == 1
    assert found.index.tolist() == [i for i in range(20) if i != 3]
    levels = found.features[:, 0] * STD[0] * 255 + MEAN[0] * 255
    assert levels.round().int().tolist() == [i * 10 for i in range(20) if i != 3]


def test_a_diverged_backbone_is_refused_with_the_image_named():
    images = [np.full((32, 32, 3), level, np.uint8) for level in (0, 100, 200)]

    def diverges(image):
        features = raw_pixels(image)
        features[features[:, 0] > 1] = torch.nan
        return features

    with pytest.raises(ValueError, match=r"made image 2 are not finite.*earlier checkpoint"):
        read(Pixels(images), diverges)


def test_patch_pooling_is_the_mean_of_the_tokens_behind_the_class_token():
    torch.manual_seed(0)
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    model, _ = build_backbone("vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, model_args=args)
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = backbone_features(model, device=CPU, dtype=torch.float32, pooling="patches")(image)
        expected = model.forward_features(image)[:, 1:].mean(1)
        of_model = backbone_features(model, device=CPU, dtype=torch.float32)(image)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, of_model)


def test_patch_pooling_of_a_convnet_is_refused():
    with pytest.raises(ValueError, match="pooling=patches needs a vision transformer, got ResNet"):
        backbone_features(tiny_resnet(), device=CPU, dtype=torch.float32, pooling="patches")
