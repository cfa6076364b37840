"""Typed schemas of what users set, and how a `_target_` in a config becomes an object.

Values that users only set (trainer, loader, schedule, optimizer...) are dataclasses, so that a misspelt key or a wrong
type is refused before any device is touched. Parts that users add (methods, data sources) are named by `_target_`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from ssl.durations import seconds_of

CONF = str(Path(__file__).resolve().parent.parent / "conf")


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ScheduleName(Enum):
    cosine = "cosine"
    cosine_restarts = "cosine_restarts"
    step = "step"
    multi_step = "multi_step"
    exponential = "exponential"
    inverse = "inverse"
    polynomial = "polynomial"
    constant = "constant"


class Init(Enum):
    xavier_uniform = "xavier_uniform"
    xavier_normal = "xavier_normal"
    kaiming_uniform = "kaiming_uniform"
    kaiming_normal = "kaiming_normal"
    trunc_normal = "trunc_normal"


class Scaling(Enum):
    linear = "linear"
    sqrt = "sqrt"
    none = "none"


class Stem(Enum):
    auto = "auto"
    small = "small"
    standard = "standard"


class Library(Enum):
    timm = "timm"
    torchvision = "torchvision"


class Shard(Enum):
    none = "none"
    full = "full"


class LaunchMode(Enum):
    auto = "auto"
    none = "none"


class WandbMode(Enum):
    auto = "auto"
    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class ModelConfig:
    library: Library = Library.timm  # whose model `name` is; ours are registered with timm
    name: str = MISSING  # the library's own name, such as resnet18
    patch_size: int | None = None  # pixels; null: the model's own from 128 pixels, at most 8 from 64, at most 4 below
    stem: Stem = Stem.auto  # of ResNets; auto: small (3x3, no pooling) up to 64 pixels, else standard
    drop_path: float = 0.0  # rate of stochastic depth at the last block, growing from 0 at the first
    init: Init | None = None  # of convolutions and linear layers; null: the library's own
    args: dict[str, Any] = field(default_factory=dict)  # more of the library's own arguments, by their names


@dataclass
class DataConfig:
    name: str = MISSING  # in results and run folders
    root: str | None = MISSING  # of a set on disk; null for one that is made
    source: dict[str, Any] = MISSING  # what reads the images: `_target_` and its arguments
    limit: int | None = None  # use so many images, seeded and balanced over the classes; null: all
    image_size: Any = None  # pixels, or [height, width]
    channels: int = 3  # of the images; others are converted
    mean: list[float] = MISSING  # per channel, of pixels in 0..1
    std: list[float] = MISSING  # per channel, of pixels in 0..1
    max_bad_fraction: float = 0.01  # of images that cannot be decoded, beyond which the run ends
    in_memory_gib: float = 4.0  # sets that are smaller as uint8 are held in memory


@dataclass
class AugmentConfig:
    views: list[Any] = MISSING  # one entry for each view of an image


@dataclass
class OptimConfig:
    name: str = MISSING  # adamw adam sgd rmsprop lars lamb
    base_lr: float = MISSING  # learning rate before `scaling`
    scaling: Scaling = Scaling.linear  # linear: times the global batch / 256; sqrt: times its root; none
    weight_decay: float = 0.0  # none on biases, norms and positions
    layer_decay: float | None = None  # factor on the rate of each layer below the last; null: 1
    options: dict[str, Any] = field(default_factory=dict)  # more of the optimizer's own, such as betas


@dataclass
class ScheduleConfig:
    name: ScheduleName = ScheduleName.cosine  # how the rate falls after the warm-up
    warmup_epochs: float | None = None  # null: a tenth of the run
    min_factor: float = 0.0  # of the peak lr, where the cosines, polynomial and exponential end
    milestones: list[float] = field(default_factory=list)  # epochs, for `multi_step` and `step`
    every_epochs: float | None = None  # for `step` instead of milestones
    gamma: float = 0.1  # factor of each step, or the 1/t decay per epoch of `inverse`
    power: float | None = None  # of `polynomial`; null: 1
    restart_epochs: float | None = None  # first cycle of `cosine_restarts`
    restart_factor: int | None = None  # of each cycle's length on that of the one before; null: 1


@dataclass
class TrainerConfig:
    epochs: float | None = 100  # length; null: `steps` is
    steps: int | None = None  # cuts the run there; the schedule still spans `epochs`, unless that is null
    global_batch_size: int = 256  # images per step, over all devices
    device_batch_size: int | None = None  # images that a device takes at once; null: its whole share
    device: Device = Device.auto  # auto: the GPU where there is one
    devices: int | None = None  # processes on this machine; null: one per GPU that torch sees
    precision: Precision = (
        Precision.auto
    )  # auto: bf16 where the hardware computes in it, else fp16 on a GPU, fp32 on a CPU
    clip_grad_norm: float | None = None  # of all gradients together; null: none
    ema_decay: float | None = None  # exponential moving average of the weights, which evaluations then use
    swa_start_epoch: float | None = None  # from here on the plain mean of the weights (stochastic weight averaging)
    swa_every_epochs: float = 1.0  # between two weights of that mean
    swa_lr_factor: float | None = None  # of the peak lr, constant from swa_start_epoch on; null: the schedule goes on
    eval_every_epochs: float | None = 10.0  # how often what `online` names is evaluated; null: never
    sync_batchnorm: bool = True  # statistics of all ranks' images
    compile: bool = False  # torch.compile
    log_every_steps: int = 10  # a line in metrics.jsonl
    checkpoint_every_steps: int = 500  # and one at the end
    keep_last: int = 2  # newest checkpoints that stay
    keep_every_steps: int | None = None  # checkpoints at multiples of this are never removed
    profile_steps: int | None = None  # time so many steps, trace as many more: <run folder>/profile
    pictures: bool = True  # views and reconstructions, at each checkpoint
    max_time: str | None = None  # as 90m, 3h30m, 2d or 03:30:00: then the run saves, stops and exits with 124
    max_bad_steps: int = 10  # steps in a row that may be skipped, for a loss or gradient that is not finite, or a spike
    spike_deviations: float | None = None  # skip a step whose loss lies so many of them above the recent losses
    max_failed_saves: int = 3  # in a row; then the last step is saved in `fallback` and the run stops
    fallback: str | None = None  # folder for that; null: the system's folder for temporary files
    hang_timeout: float = 1200.0  # seconds after which a step that some rank does not finish ends the run
    shard: Shard = Shard.none  # full: weights, gradients and optimizer state cut over the ranks (FSDP)
    activation_checkpointing: bool = False  # compute activations again in backward instead of keeping them
    plan: bool = False  # say what the run will need and cost, and do not train
    plan_chip: str | None = None  # plan for this GPU, by its name, such as H100; null: the device here
    plan_images_per_second: float | None = (
        None  # of one device, as measured; null: measured here, or by the chip's peak
    )


@dataclass
class LaunchConfig:
    """Where a run's processes are: read by the launcher, the Slurm settings and the Kubernetes manifest alike."""

    mode: LaunchMode = LaunchMode.auto  # auto: one process per device, started here; none: this process alone
    max_restarts: int = 3  # after a process is lost, from the last checkpoint
    shutdown_seconds: int = 300  # that processes have to save and leave before they are killed
    nodes: int = 1  # machines
    devices: int | None = None  # processes per node; the groups give ${trainer.devices}
    cpus_per_device: int | None = None  # processor cores
    memory_gib: float | None = None  # per node
    time: str | None = None  # wall-clock limit of one job, as 12h or 2d; the run goes on in the next
    partition: str | None = None  # of Slurm
    account: str | None = None  # of Slurm
    container: str | None = None  # image
    setup: list[str] = field(default_factory=list)  # shell lines before the run
    name: str | None = None  # of the job
    options: dict[str, Any] = field(default_factory=dict)  # more of the scheduler's own, by its names


@dataclass
class LoaderConfig:
    threads: int | None = None  # null: the cores that this process may use
    prefetch: int = 2  # batches made ahead


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.auto  # auto: offline where no API key is configured
    project: str = "ssl"  # on wandb
    name: str | None = None  # of the run there; null: that of the run folder
    group: str | None = None  # that wandb shows runs by


@dataclass
class TrainingConfig:
    """What every run of the training loop takes, pretraining and fine-tuning alike."""

    augment: AugmentConfig = MISSING
    optim: OptimConfig = MISSING
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    online: dict[str, Any] = field(default_factory=dict)  # what is evaluated during the run, by name
    report: dict[str, Any] = field(default_factory=dict)  # what writes the run's page at its checkpoints; none: empty
    seed: int = 0  # of everything: weights, order, views, masks, dropout
    out: str | None = None  # run folder; null: runs/<method>_<model>_<data>/seed<seed>
    accept_changes: bool = False  # continue a run although its recipe was changed


@dataclass
class PretrainConfig(TrainingConfig):
    """What `python -m ssl.pretrain` takes."""

    method: Any = MISSING  # `_target_` and its arguments
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    objective: str | None = None  # what a sweep is told: a metric's name, eval.knn, eval.linear_probe or eval.health


def register_schemas() -> None:
    ConfigStore.instance().store(name="pretrain_schema", node=PretrainConfig)


def build(node: Mapping[str, Any] | DictConfig, *, within: str | None = None, **runtime: Any) -> Any:
    """Call what `_target_` names with the node's other values and `runtime`.

    `within` limits targets to one package prefix: used for configs that were read from a checkpoint, which may come
    from anyone.
    """
    container = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    assert isinstance(container, Mapping)
    values = {str(key): value for key, value in container.items()}
    target = values.pop("_target_", None)
    if target is None:
        raise ValueError(
            f"a part needs `_target_`, the dotted name of a class or function; got the keys {sorted(values)}"
        )
    if within is not None and not str(target).startswith(within):
        raise ValueError(
            f"this config comes from a file and may only name parts of {within}*, got `_target_: {target}`"
        )
    part = locate(str(target))
    if within is not None and not str(getattr(part, "__module__", "")).startswith(within):
        raise ValueError(
            f"this config comes from a file and may only name parts of {within}*; `_target_: {target}` is one of "
            f"{getattr(part, '__module__', 'another package')} that is imported there"
        )
    try:
        inspect.signature(part).bind(**values, **runtime)
    except TypeError as error:
        takes = [name for name in inspect.signature(part).parameters if name not in runtime]
        raise ValueError(f"{target}: {error}; in a config it takes {', '.join(takes)}") from error
    with wrong_types(str(target)):
        return part(**values, **runtime)


@contextlib.contextmanager
def wrong_types(what: str) -> Iterator[None]:
    """Turn what a value of a wrong type runs into, in a part without a schema, into a ValueError that names it."""
    try:
        yield
    except TypeError as error:
        raise ValueError(f"{what} was given a value of a wrong type: {error}") from error


def locate(target: str) -> Callable[..., Any]:
    """The class or function of a dotted name. Raises ValueError where there is none."""
    module_name, _, attribute = target.rpartition(".")
    try:
        part = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`_target_: {target}` cannot be found ({error}); it must be package.module.Class, importable from the "
            "folder in which the command runs or from PYTHONPATH"
        ) from error
    if not callable(part):
        raise ValueError(f"`_target_: {target}` is a {type(part).__name__}, not a class or function")
    return part


def unknown_keys(config: DictConfig, schema: type) -> Iterator[str]:
    """Keys that `+key=value` added and that nothing reads, as dotted names."""
    known = {f.name: f for f in fields(schema)}
    for key in config:
        name = str(key)
        if name not in known:
            yield name
            continue
        if OmegaConf.is_missing(config, name):
            continue
        child_schema = OmegaConf.get_type(config, name)
        child = config[name]
        if isinstance(child, DictConfig) and isinstance(child_schema, type) and is_dataclass(child_schema):
            yield from (f"{name}.{rest}" for rest in unknown_keys(child, child_schema))


def check(config: DictConfig, schema: type) -> None:
    """Raise ValueError on values that are required and missing, and on keys that nothing reads."""
    missing = sorted(missing_values(OmegaConf.to_container(config)))
    if missing:
        raise ValueError("this must be given: " + ", ".join(f"{name}=..." for name in missing))
    extra = sorted(unknown_keys(config, schema))
    if extra:
        names = sorted(f.name for f in fields(schema))
        raise ValueError(f"nothing reads {', '.join(extra)}; the keys are {', '.join(names)}")


def plain(node: Any) -> Any:
    """A config node as dicts, lists and plain values; anything else as it is."""
    return OmegaConf.to_container(node, resolve=True, enum_to_str=True) if OmegaConf.is_config(node) else node


def missing_values(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of what is `???`. OmegaConf.missing_keys stops at an interpolation of a missing value instead."""
    if node == MISSING:
        yield prefix
    elif isinstance(node, Mapping):
        for key, child in node.items():
            yield from missing_values(child, f"{prefix}.{key}" if prefix else str(key))


def check_trainer(trainer: TrainerConfig | DictConfig) -> None:
    """Raise ValueError on numbers that no run can have."""
    for name in ("log_every_steps", "checkpoint_every_steps", "keep_last", "keep_every_steps"):
        value = getattr(trainer, name)
        if value is not None and value < 1:
            raise ValueError(f"trainer.{name} must be at least 1, got {value}")
    if trainer.profile_steps is not None and not 1 <= trainer.profile_steps <= 100:
        raise ValueError(
            f"trainer.profile_steps must be 1 to 100, because a trace of more cannot be opened, or null for no "
            f"profile; got {trainer.profile_steps}"
        )
    if trainer.compile and (trainer.shard is not Shard.none or trainer.activation_checkpointing):
        raise ValueError(
            "trainer.compile=true does not go together with trainer.shard=full or "
            "trainer.activation_checkpointing=true, which gather weights and run layers again at moments of their own; "
            "set it to false"
        )
    if trainer.ema_decay is not None and not 0 <= trainer.ema_decay < 1:
        raise ValueError(f"trainer.ema_decay must lie in [0, 1), or be null for no average; got {trainer.ema_decay}")
    if trainer.ema_decay is not None and trainer.swa_start_epoch is not None:
        raise ValueError("trainer.ema_decay and trainer.swa_start_epoch are two averages of the weights; give one")
    if trainer.swa_start_epoch is None and (trainer.swa_lr_factor is not None or trainer.swa_every_epochs != 1):
        raise ValueError("trainer.swa_lr_factor and swa_every_epochs have no effect without trainer.swa_start_epoch")
    if trainer.max_bad_steps < 0 or trainer.max_failed_saves < 1:
        raise ValueError(
            "trainer.max_bad_steps must be at least 0 and trainer.max_failed_saves at least 1, got "
            f"{trainer.max_bad_steps} and {trainer.max_failed_saves}"
        )
    if trainer.max_time is not None:
        seconds_of(trainer.max_time, key="trainer.max_time")
    for name in ("swa_every_epochs", "swa_lr_factor", "eval_every_epochs", "spike_deviations", "hang_timeout"):
        value = getattr(trainer, name)
        if value is not None and not value > 0:
            raise ValueError(f"trainer.{name} must be above 0, got {value}")
    if not trainer.plan and (trainer.plan_chip is not None or trainer.plan_images_per_second is not None):
        raise ValueError("trainer.plan_chip and plan_images_per_second have no effect without trainer.plan=true")
    if trainer.clip_grad_norm is not None and not trainer.clip_grad_norm > 0:
        raise ValueError(f"trainer.clip_grad_norm must be positive, or null for none; got {trainer.clip_grad_norm}")


def suggest(config: DictConfig, overrides: list[str]) -> str | None:
    """For overrides whose key does not exist in `config`: the keys that do, nearest first; None where all exist."""
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if (Path(CONF) / key).is_dir():  # a group, whose options Hydra lists itself
            continue
        parts = key.split(".")
        node: Any = config
        for depth, part in enumerate(parts):
            if not isinstance(node, DictConfig):
                break
            keys = sorted(str(name) for name in node)
            if part not in keys:  # `in node` is false of a key whose value is missing
                near = difflib.get_close_matches(part, keys, n=1)
                where = ".".join(parts[:depth])
                hint = f"did you mean {'.'.join([*parts[:depth], near[0]])}? " if near else ""
                if not keys or where == "model.args":  # the library's own arguments, any of them
                    had = f"{where} has {', '.join(keys) or 'none yet'}"
                    return f"{key} is not set, and a new key needs a plus: {hint}{had}; write +{key}="
                return f"{key} is not a setting: {hint}{where or 'the top level'} takes {', '.join(keys)}"
            if OmegaConf.is_missing(node, part):
                break
            node = node[part]
    return None
