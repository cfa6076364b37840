"""What of a step goes otherwise where the same global batch is divided over another number of ranks."""

from __future__ import annotations

from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl.config import TrainerConfig
from ssl.methods.base import Method


def rank_dependence(method: Method, settings: TrainerConfig | DictConfig, *, then: int, now: int) -> list[str]:
    """What differs beyond rounding between steps of `method` on `then` and on `now` ranks, in words; as a rule nothing.

    `settings` are the trainer's.
    """
    found = []
    if any(isinstance(module, _BatchNorm) and module.training for module in method.modules()):
        before, after = _joint_images(settings, then), _joint_images(settings, now)
        if not settings.sync_batchnorm:
            found.append("BatchNorm's statistics are those of each rank's images (trainer.sync_batchnorm=false)")
        elif before != after:
            found.append(
                f"BatchNorm's statistics were those of {before} images and are those of {after} now, as many as all "
                f"ranks take at once (trainer.device_batch_size={settings.device_batch_size})"
            )
    if any(_drops(module) for module in method.modules()):
        found.append("dropout and drop path draw their numbers on each rank")
    if method.depends_on_ranks:
        found.append("images are mixed with others of their rank's batch")
    return found


def _joint_images(settings: TrainerConfig | DictConfig, world_size: int) -> int:
    """Images that all ranks together take at once."""
    share = settings.global_batch_size // world_size
    return world_size * min(settings.device_batch_size or share, share)


def _drops(module: nn.Module) -> bool:
    """Whether it is one of torch's dropouts (`p`), one of timm's drop paths (`drop_prob`), or a model that applies
    dropout without a module (`drop_rate`), and does something.
    """
    names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else ("drop_prob", "drop_rate")
    chances = [getattr(module, name, 0.0) for name in names]
    return any(isinstance(chance, float) and chance > 0 for chance in chances)
