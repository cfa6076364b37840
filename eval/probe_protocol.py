"""What a linear probe through the training loop is set by, and which settings each protocol reads."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eval.config import EvalConfig
from ssl.config import (
    CONF,
    AugmentConfig,
    LaunchConfig,
    LoaderConfig,
    OptimConfig,
    ScheduleConfig,
    TrainerConfig,
    WandbConfig,
    plain,
)
from ssl.data.views import make_views
from ssl.same_run import flat

CACHED = "cached"
TRAINING = ("head", "augment", "optim", "schedule", "trainer", "loader", "launch", "wandb", "accept_changes")
"""What the training loop and its heads read; nothing of it acts on features that were read once."""
FEATURES = ("layers", "pooling", "grid_dim", "features_gib")
LAST_STEP = "the weights of the last step are reported"
ELSEWHERE = {
    "trainer.device": "give device=",
    "trainer.precision": "give precision=",
    "loader.threads": "give threads=",
    "trainer.eval_every_epochs": "nothing is evaluated before the last step",
    "trainer.ema_decay": LAST_STEP,
    "trainer.swa_start_epoch": LAST_STEP,
    "trainer.swa_every_epochs": LAST_STEP,
    "trainer.swa_lr_factor": LAST_STEP,
    "optim.layer_decay": "the backbone is frozen",
}
"""Settings of the training loop that a linear probe does not read, and why."""


@dataclass
class HeadConfig:
    """The linear heads of a published protocol."""

    batchnorm: bool = False  # without affine, between the features and the linear layer
    batchnorm_eps: float = 1e-5  # of that BatchNorm
    init_std: float = 0.0  # of the linear layer's weights; its biases begin at 0
    lr: list[float] = field(default_factory=list)  # a head each, times optim.base_lr; empty: one head at optim.base_lr


@dataclass
class ProtocolConfig(EvalConfig):
    """What every evaluation takes, and what a file in conf/protocol sets."""

    protocol: str = CACHED  # cached: features are read once; else a published one, a file of conf/protocol
    layers: Any = "last"
    pooling: Any = "model"  # pyright: ignore[reportIncompatibleVariableOverride]
    head: HeadConfig = field(default_factory=HeadConfig)
    augment: AugmentConfig | None = None
    optim: OptimConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    accept_changes: bool = False  # continue a run although its recipe was changed


def check_cached(config: DictConfig) -> None:
    """Raise ValueError on a setting of the training loop, which protocol=cached does not run."""
    before = flat(plain(OmegaConf.structured(ProtocolConfig)))
    given = flat({name: plain(config[name]) for name in TRAINING})
    changed = [key for key, value in given.items() if value is not None and value != before.get(key)]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} has no effect with protocol=cached, which reads the features once and trains heads "
            "on them by lr, weight_decay and steps; leave it out, or give protocol=mae, simclr or dinov2"
        )


def check_published(config: DictConfig, schema: type) -> None:
    """Raise ValueError on a setting that a protocol through the training loop does not read, and on ones that do not go
    together.
    """
    name = config.protocol
    if config.augment is None or config.optim is None:
        raise ValueError(f"protocol={name} must set augment and optim; see conf/protocol/mae.yaml")
    usual, choosing = usual_settings(schema), has_choice(config)
    read = {*(each.name for each in fields(EvalConfig)), "protocol", *TRAINING, *FEATURES}
    unread = [str(key) for key in config if key not in read and plain(config[key]) != usual.get(str(key))]
    if "held_out" in unread and not choosing:
        raise ValueError(f"held_out has no effect with protocol={name}: it has one head, and nothing to choose")
    unread = [key for key in unread if key != "held_out"]
    if unread:
        raise ValueError(
            f"{', '.join(unread)} has no effect with protocol={name}, which goes by optim, schedule, trainer, augment "
            "and head; leave it out, or give protocol=cached"
        )
    own = flat(plain(OmegaConf.structured(ProtocolConfig)))
    given = flat(plain(config))
    for key, reason in ELSEWHERE.items():
        if given.get(key) != own.get(key):
            raise ValueError(f"{key} has no effect on a linear probe: {reason}; leave it out")
    _check_heads(config.head)
    if config.trainer.clip_grad_norm is not None and choosing:
        raise ValueError("trainer.clip_grad_norm would clip all heads by their joint gradient; leave it out")
    views = make_views(plain(config.augment.views))
    if len(views) != 1:
        raise ValueError(
            f"a linear probe looks at one view of an image, augment gives {len(views)}; give augment=probe"
        )


def has_choice(config: DictConfig) -> bool:
    """Whether there may be several heads to choose from."""
    given = [plain(config[key]) for key in ("layers", "pooling")]
    several = any(isinstance(each, list) and len(each) > 1 for each in given)
    return several or given[0] == "all" or len(config.head.lr) > 1


def departures(config: DictConfig) -> dict[str, list[Any]]:
    """Settings that this run has otherwise than its protocol's file: the name to [in the file, here].

    Empty for a protocol that lies elsewhere than in conf/protocol.
    """
    path = Path(CONF) / "protocol" / f"{config.protocol}.yaml"
    if not path.is_file():
        return {}
    published: Any = OmegaConf.to_container(OmegaConf.load(path))
    for group in published.pop("defaults", []):
        for name, option in group.items():
            published[name.strip("/")] = OmegaConf.to_container(OmegaConf.load(f"{CONF}{name}/{option}.yaml"))
    here = flat(plain(config))
    return {key: [value, here.get(key)] for key, value in flat(published).items() if here.get(key) != value}


def usual_settings(schema: type) -> dict[str, Any]:
    """The values of a linear probe that nobody has changed: those of conf/linear_probe.yaml and of its schema."""
    values: Any = OmegaConf.load(f"{CONF}/linear_probe.yaml")
    own = {key: value for key, value in values.items() if key not in ("defaults", "hydra")}
    return plain(OmegaConf.merge(OmegaConf.structured(schema), own))


def _check_heads(head: HeadConfig) -> None:
    if head.init_std < 0 or any(not rate > 0 for rate in head.lr):
        raise ValueError(
            f"head.init_std must not be below 0 and head.lr must be above it; got {head.init_std:g} and {list(head.lr)}"
        )
    if not head.batchnorm and head.batchnorm_eps != HeadConfig.batchnorm_eps:
        raise ValueError("head.batchnorm_eps has no effect without head.batchnorm=true; leave it out")
