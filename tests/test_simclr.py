"""SimCLR as a method: views to loss, through real backbones."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from ssl import distributed
from ssl.methods.nt_xent import nt_xent
from ssl.methods.simclr import SimCLR
from ssl.models.backbones import build_backbone, pooled_features
from ssl.models.heads import Projector

TINY_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
TINY_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}


def make_simclr(kind: str, *, image_size: tuple[int, int] = (16, 16), in_chans: int = 3, **options) -> SimCLR:
    torch.manual_seed(0)
    name, args = ("vit_tiny_patch16_224", TINY_VIT) if kind == "vit" else ("resnet18", TINY_RESNET)
    backbone, _ = build_backbone(name, image_size=image_size, in_chans=in_chans, model_args=args)
    options = {"temperature": 0.2, "projection_dim": 10, **options}
    return SimCLR(backbone, image_size=image_size, in_chans=in_chans, **options)


def make_views(num_images: int, *, image_size: tuple[int, int] = (16, 16), in_chans: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_images, in_chans, *image_size, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_loss_is_nt_xent_of_the_projected_features(kind: str) -> None:
    method = make_simclr(kind).eval()
    views = make_views(5)
    output = method({"views": views})
    embeddings = [method.projector(pooled_features(method.backbone, view)) for view in views]
    expected = nt_xent(torch.stack(embeddings, 1), temperature=0.2)
    torch.testing.assert_close(output["loss"], expected)
    assert {name: value.requires_grad for name, value in output.items()} == {
        "loss": True,
        "contrastive_top1": False,
        "embedding_std": False,
    }


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_forward_is_contrast_of_embed_only(kind: str) -> None:
    method = make_simclr(kind)
    views = make_views(5)
    embeddings = copy.deepcopy(method)({"views": views}, embed_only=True)
    assert embeddings.shape == (5, 2, 10)
    torch.testing.assert_close(method.contrast(embeddings)["loss"], method({"views": views})["loss"])


@pytest.mark.parametrize("one_forward", [True, False])
def test_one_forward_gives_batchnorm_both_views(one_forward: bool) -> None:
    method = make_simclr("resnet", one_forward=one_forward)
    sizes: list[int] = []
    norm = next(module for module in method.modules() if isinstance(module, nn.BatchNorm2d))
    norm.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    method({"views": make_views(5)})
    assert sizes == ([10] if one_forward else [5, 5])


def test_view_by_view_equals_one_forward_without_batchnorm() -> None:
    method = make_simclr("vit").eval()
    expected = method({"views": make_views(5)})["loss"]
    method.one_forward = False
    torch.testing.assert_close(method({"views": make_views(5)})["loss"], expected)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize(("image_size", "in_chans"), [((16, 24), 1), ((32, 16), 5)])
def test_images_need_not_be_square_nor_have_three_channels(
    kind: str, image_size: tuple[int, int], in_chans: int
) -> None:
    method = make_simclr(kind, image_size=image_size, in_chans=in_chans)
    assert method.view_size == image_size
    output = method({"views": make_views(4, image_size=image_size, in_chans=in_chans)})
    assert torch.isfinite(output["loss"])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_gradient_reaches_every_trained_parameter(kind: str) -> None:
    method = make_simclr(kind, projection_depth=3)
    for module in method.modules():  # timm starts the last BatchNorm of a residual block at 0, which stops gradients
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    method({"views": make_views(8)})["loss"].backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []
    frozen = [name for name, parameter in method.named_parameters() if not parameter.requires_grad]
    assert frozen == ["projector.7.bias"]


def test_a_few_steps_find_the_other_view() -> None:
    method = make_simclr("resnet")
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(24, 3, 2, 2, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    outputs = []
    for _ in range(15):
        views = [image + 0.3 * torch.randn(image.shape, generator=generator) for _ in range(2)]
        outputs.append(method({"views": views}))
        optimizer.zero_grad()
        outputs[-1]["loss"].backward()
        optimizer.step()
    assert outputs[-1]["loss"] < 0.7 * outputs[0]["loss"]
    assert outputs[-1]["contrastive_top1"] > outputs[0]["contrastive_top1"]


def test_embedding_std_tells_collapse_from_spread() -> None:
    method = make_simclr("vit")
    spread = torch.randn(4000, 2, 10, generator=torch.Generator().manual_seed(0))
    assert method.contrast(spread)["embedding_std"].item() == pytest.approx(1 / math.sqrt(10), rel=0.02)
    assert method.contrast(torch.ones(50, 2, 10) + 1e-4 * spread[:50])["embedding_std"] < 1e-3


def test_projector_has_google_simclrs_layers() -> None:
    linear, norm, relu, last, last_norm = Projector(12, out_dim=5, depth=2)
    assert (linear.weight.shape, linear.bias) == ((12, 12), None)
    assert (norm.bias.requires_grad, type(relu)) == (True, nn.ReLU)
    assert (last.weight.shape, last.bias) == ((5, 12), None)
    assert not last_norm.bias.requires_grad
    assert len(Projector(12, out_dim=5, depth=1)) == 2
    assert [m.out_features for m in Projector(12, out_dim=5, hidden_dim=7, depth=3) if isinstance(m, nn.Linear)] == [
        7,
        7,
        5,
    ]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="depth of at least 1"):
        make_simclr("vit", projection_depth=0)
    with pytest.raises(ValueError, match="no hidden layer"):
        make_simclr("vit", projection_depth=1, projection_hidden_dim=8)
    with pytest.raises(ValueError, match="temperature must be positive"):
        make_simclr("vit", temperature=0)
    with pytest.raises(ValueError, match="two views"):
        make_simclr("vit")({"views": make_views(2)[:1]})


def _ddp_step(kind: str, views: list[Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and averaged gradients of this rank's share, with BatchNorm over all ranks."""
    method = make_simclr(kind).double()
    parallel = nn.parallel.DistributedDataParallel(distributed.sync_batchnorm(method))
    rank, world_size = distributed.rank(), distributed.world_size()
    loss = parallel({"views": [view.chunk(world_size)[rank].double() for view in views]})["loss"]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_two_ranks_give_one_ranks_loss_and_gradient(kind: str, two_ranks) -> None:
    views = make_views(8)
    method = make_simclr(kind).double()
    loss = method({"views": [view.double() for view in views]})["loss"]
    loss.backward()
    results = two_ranks.run(_ddp_step, kind, views)
    assert sum(other for other, _ in results) / 2 == pytest.approx(loss.item(), abs=1e-10)
    for _, gradients in results:
        for name, parameter in method.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-9, msg=name)
