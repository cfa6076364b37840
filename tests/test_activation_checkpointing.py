"""Activations that are computed again: the same step as without, and less is kept for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import ssl.distributed as distributed
from ssl.activation_checkpointing import checkpoint_activations
from ssl.methods.base import Method
from ssl.methods.relative_location import RelativeLocation
from ssl.models.backbones import build_backbone
from ssl.models.hidden import hidden_layers, replaced_output
from ssl.sharding import blocks_of, shard
from tests.test_pretrain import METHODS, SHORT, composed, metrics_of
from tests.test_trainer import SIZE, make_batch, make_method

KINDS = [("mae", False), ("simclr", False), ("simclr", True), ("relative_location", False), ("relative_location", True)]


def with_drop_path(method: Method) -> Method:
    """Random numbers in every block of a ViT."""
    for block in method.modules():
        if isinstance(getattr(block, "drop_path1", None), nn.Module):
            block.drop_path1, block.drop_path2 = DropPath(0.3), DropPath(0.3)  # pyright: ignore
    return method


def one_step(kind: str, *, norm: bool, recompute: bool) -> tuple[dict[str, Tensor], int]:
    """Loss, gradients and buffers of one step, and how many bytes its forward pass kept for the backward pass."""
    method = with_drop_path(make_method(kind, norm=norm)).train()
    if recompute:
        checkpoint_activations(method)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss: Tensor = method(make_batch(method, num_views=2 if kind == "simclr" else 1))["loss"]
        bytes_kept = sum(kept.values())
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in method.named_buffers()}
    return found, bytes_kept


@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_loss_gradients_and_running_statistics_are_the_same_bit_for_bit_and_less_is_kept(kind: str, norm: bool):
    expected, bytes_before = one_step(kind, norm=norm, recompute=False)
    found, bytes_after = one_step(kind, norm=norm, recompute=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name
    assert bytes_after < (0.8 if norm else 0.5) * bytes_before  # the small ResNet's stem is its widest layer


def test_the_decoder_of_mae_computes_again_too():
    method = make_method("mae", norm=False)
    assert set(method.decoder_blocks) <= set(blocks_of(method))  # pyright: ignore
    encoder_only = make_method("mae", norm=False).train()
    encoder_only.backbone.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
    runs: list[str] = []
    for name, each in (("all", method.train()), ("timm's switch", encoder_only)):
        if name == "all":
            checkpoint_activations(each)
        each.decoder_blocks[0].attn.register_forward_hook(lambda *_, n=name: runs.append(n))  # pyright: ignore
        each(make_batch(each))["loss"].backward()
    assert runs.count("all") == 2
    assert runs.count("timm's switch") == 1


def test_a_hook_that_changes_a_layers_output_runs_once():
    method = make_method("simclr", norm=False).train()
    checkpoint_activations(method)
    layer = hidden_layers(method.backbone)[0]
    with replaced_output(layer.module, lambda hidden: hidden * 2):
        method(make_batch(method, num_views=2))["loss"].backward()


def test_nothing_is_computed_twice_without_gradients():
    method = make_method("simclr", norm=True).train()
    checkpoint_activations(method)
    runs: list[int] = []
    method.backbone.layer1[0].conv1.register_forward_hook(lambda *_: runs.append(1))  # pyright: ignore
    with torch.no_grad():
        method(make_batch(method, num_views=2))
    assert len(runs) == 1


def test_a_backbone_without_blocks_is_refused():
    method = Method()
    method.backbone = nn.Identity()
    with pytest.raises(ValueError, match=r"activation_checkpointing=true has no effect on Identity.*false"):
        checkpoint_activations(method)


def test_a_run_computes_the_same_metrics(tmp_path):
    from ssl.pretrain import run

    words = [*METHODS["simclr"], *SHORT, "trainer.steps=3", "trainer.device_batch_size=8", "trainer.pictures=false"]
    run(composed(*words), out=tmp_path / "kept")
    run(composed(*words, "trainer.activation_checkpointing=true"), out=tmp_path / "again")
    assert metrics_of(tmp_path / "again") == metrics_of(tmp_path / "kept")


def test_pieces_of_two_ranks_compute_again_what_one_process_computes(two_ranks):
    for kind in ("mae", "relative_location"):
        for found, expected in two_ranks.run(_recompute_cut, kind):
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def _recompute_cut(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of one method on two ranks that see the same images, cut and computed again, and neither."""
    found: list[dict[str, Any]] = []
    for again in (True, False):
        method = with_drop_path(make_method(kind, norm=False)).train()
        if again:
            checkpoint_activations(method)
            shard(method, torch.device("cpu"))
        torch.manual_seed(3)
        method(make_batch(method))["loss"].backward()
        gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        found.append({n: g.full_tensor() if again else g for n, g in gradients.items()})  # pyright: ignore
    distributed.barrier()
    return found[0], found[1]


def test_dropout_in_the_head_draws_its_numbers_once():
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    losses = []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone, _ = build_backbone("vit_tiny_patch16_224", image_size=SIZE, patch_size=4, model_args=args)
        method = RelativeLocation(backbone, image_size=SIZE, in_chans=3, hidden_dim=32, dropout=0.5).train()
        if recompute:
            checkpoint_activations(method)
        torch.manual_seed(1)
        loss = method(make_batch(method))["loss"]
        loss.backward()
        losses.append((loss.item(), torch.rand(()).item()))
    assert losses[0] == losses[1]
