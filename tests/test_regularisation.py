"""Moving averages of weights, dropout and stochastic depth against their definitions."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import Block
from torch import nn

from ssl.averaging import MovingAverage, averaged_copy
from ssl.models.backbones import BackboneSpec, build_backbone
from ssl.models.classifier import make_classifier
from tests.test_trainer import make_batch, make_method, make_trainer

VIT = {"embed_dim": 24, "depth": 5, "num_heads": 2}


def test_the_moving_average_is_the_sum_that_defines_it():
    """The average after n steps is decay^n of the start and (1 - decay) * decay^(n - k) of the weights of step k."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    average = MovingAverage(averaged_copy(module), 0.8)
    passed = [module.weight.detach().clone()]
    for done in range(1, 8):
        with torch.no_grad():
            module.weight += torch.randn(2, 3, dtype=torch.float64)
        passed.append(module.weight.detach().clone())
        average.update(module, done)
    expected = 0.8**7 * passed[0] + sum(0.2 * 0.8 ** (7 - step) * passed[step] for step in range(1, 8))
    torch.testing.assert_close(average.tensors["weight"], expected)


def test_drop_path_leaves_out_branches_and_scales_those_it_keeps():
    """Each image keeps a branch with probability 1 - p (arXiv:1603.09382, eq. 2), divided by it: the mean stays."""
    torch.manual_seed(0)
    model, _ = build_backbone("vit_tiny_patch16_224", image_size=(32, 32), drop_path=0.4, model_args=VIT)
    block = model.blocks[-1].train()
    tokens = torch.randn(1, 5, 24)
    attended = block.attn(block.norm1(tokens))
    block.mlp = nn.Identity()
    block.norm2 = _Zero()  # the second branch is 0: what is left is the first
    out = block(tokens.expand(4000, -1, -1)) - tokens  # (B, N, D)
    kept = out.flatten(1).abs().amax(1) > 0  # (B,)
    torch.testing.assert_close(out[kept], (attended / 0.6).expand(int(kept.sum()), -1, -1), atol=1e-5, rtol=1e-4)
    assert abs(kept.float().mean().item() - 0.6) < 0.03  # four deviations of a mean of 4000


@pytest.mark.parametrize(("name", "args"), [("vit_tiny_patch16_224", VIT), ("resnet18", {"channels": [4, 8, 8, 8]})])
def test_drop_path_grows_linearly_with_depth_to_the_rate_that_is_given(name: str, args: dict):
    """The rule of arXiv:1603.09382, eq. 4, but that the first block drops nothing."""
    model, _ = build_backbone(name, image_size=(32, 32), drop_path=0.4, model_args=args)
    blocks = [part for part in model.modules() if isinstance(part, Block | BasicBlock)]
    found = [getattr(block, "drop_path1", None) or getattr(block, "drop_path", None) for block in blocks]
    rates = [float(getattr(part, "drop_prob", 0.0)) for part in found]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.4, len(blocks)))


def test_dropout_acts_on_the_features_before_the_classifier_and_scales_the_rest():
    """Srivastava et al. 2014, section 4, with the scale in training instead of afterwards."""
    torch.manual_seed(0)
    spec = BackboneSpec("resnet18", (32, 32), 3, {"channels": [4, 8, 8, 8]}, "small")
    model, _ = make_classifier(spec, num_classes=8, dropout=0.25, head_std=1.0)
    model.eval()
    image = torch.randn(1, 3, 32, 32)
    features = model.forward_head(model.forward_features(image), pre_logits=True).detach()  # (1, D)
    model.fc.weight.data, model.fc.bias.data = torch.eye(8), torch.zeros(8)  # so that logits are what it reads
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    read = model(image.expand(4000, -1, -1, -1)).detach()  # (B, D)
    alive = features[0].abs() > 1e-3
    assert alive.sum() >= 3
    kept = read.abs() > 0
    torch.testing.assert_close(read, kept * features / 0.75, atol=1e-4, rtol=1e-4)
    shares = kept[:, alive].float().mean(0)
    assert (shares - 0.75).abs().max() < 0.03


class _Zero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def test_clipped_gradients_have_the_norm_that_is_given_and_their_direction():
    """Pascanu et al. 2013 (arXiv:1211.5063), algorithm 1, over all parameters together."""
    method = make_method("mae", norm=False)
    plain, clipped = (copy.deepcopy(method) for _ in range(2))
    moved = {}
    for name, copied, most in (("plain", plain, None), ("clipped", clipped, 0.01)):
        trainer = make_trainer(copied, clip_grad_norm=most)  # SGD at a rate of 1: weights move by the gradient
        copied.train()
        norm = trainer.step(make_batch(copied), step=0)["grad_norm"].item()
        assert norm > 0.1  # told before clipping
        pairs = zip(copied.parameters(), method.parameters(), strict=True)
        moved[name] = torch.cat([(now - before).detach().flatten() for now, before in pairs])
    assert moved["clipped"].norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(moved["clipped"], moved["plain"] * 0.01 / moved["plain"].norm(), rtol=1e-2, atol=1e-6)
