"""Checkpoints that describe themselves and run no code.

A checkpoint is a folder, `checkpoints/step_00001234/`:

    model.safetensors      the backbone, under timm's own keys; of a fine-tuned model with timm's classifier
    config.json            timm's own description: `timm.create_model("local-dir:<folder>", pretrained=True)` loads it,
                           but for a ResNet with a small stem, which timm has no arguments for (see eval.export)
    method.safetensors     what only pretraining needs: projector, decoder, head
    ema.safetensors        the moving average of both, where the run keeps one
    optimizer.safetensors  its state, by parameter name
    run.yaml               the resolved config of the run
    state.json             step, epoch, data card, and the SHA-256 of every other file

It is written under a temporary name, synced to disk, then renamed: a folder with its final name is whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import ssl.distributed as distributed
from ssl.checkpoint_card import CARD, FORMAT, read_config, read_state, statistics, verify
from ssl.loaded import LoadedBackbone, is_foreign, load_export, load_foreign, load_model
from ssl.models.backbones import BackboneSpec, backbone_from_spec
from ssl.models.image_size import at_image_size
from ssl.sharding import fill, local
from ssl.tensor_files import check_fit, load_strictly, load_tensors, save_tensors, sha256, sync
from ssl.tensor_stream import LazyTensor, TensorFile, num_bytes
from ssl.timm_folder import timm_config
from ssl.version import changed_versions, versions

FOLDER = re.compile(r"step_(\d{8,})")
LEFTOVERS = (".partial_step_*", ".removed_step_*")  # of a save, or of a removal, that was killed


class NoRoom(OSError):
    """A checkpoint was not begun, because the disk has less room than it needs."""


def folder_name(step: int) -> str:
    """The name of a step's checkpoint, in the folder `checkpoints` of its run."""
    return f"step_{step:08d}"


def save(
    run_dir: Path,
    *,
    step: int,
    method: nn.Module | Mapping[str, Tensor | LazyTensor],
    spec: BackboneSpec,
    optimizer_tensors: Mapping[str, Tensor | LazyTensor],
    ema: Mapping[str, Tensor | LazyTensor] | None,
    config_yaml: str,
    state: Mapping[str, Any],
    mean: list[float],
    std: list[float],
) -> Path:
    """Write the checkpoint of `step` whole or not at all; returns its folder. Earlier ones are not touched.

    `method` may be given by its state dict. Tensors are read one at a time, while they are written.

    Raises OSError where it cannot, with what it needs and what is free, and NoRoom, before anything is written, where
    that is too little.
    """
    final = run_dir / "checkpoints" / folder_name(step)
    partial = final.with_name(f".partial_{final.name}")
    backbone, rest = split_backbone(method.state_dict() if isinstance(method, nn.Module) else method)
    needed = bytes_on_disk(backbone, rest, optimizer_tensors, ema or {})
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(run_dir)
        if (free := _free_bytes(final.parent)) is not None and free < needed:
            raise NoRoom(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir()
        save_tensors(backbone, partial / "model.safetensors")
        save_tensors(rest, partial / "method.safetensors")
        save_tensors(optimizer_tensors, partial / "optimizer.safetensors")
        if ema is not None:
            save_tensors(ema, partial / "ema.safetensors")
        (partial / "run.yaml").write_text(config_yaml)
        head = state.get("classifier") or {"classes": None, "multi_label": False}
        config = timm_config(spec, mean=mean, std=std, classes=head["classes"], multi_label=head["multi_label"])
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        hashes = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        card = {
            "format": FORMAT,
            "step": step,
            **state,
            "versions": versions(),
            "backbone": spec.to_dict(),
            "mean": mean,
            "std": std,
            "sha256": hashes,
        }
        (partial / "state.json").write_text(json.dumps(card, indent=2) + "\n")
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        if final.exists():  # the same step again, after a resume from an older one
            os.replace(final, _doomed(final))
        os.replace(partial, final)
        sync(final.parent)
        shutil.rmtree(_doomed(final), ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = _free_bytes(run_dir)
        text = (
            f"the checkpoint of step {step} could not be written to {final.parent}: {_reason(error)} "
            f"({needed / 2**20:,.1f} MiB needed, {'?' if free is None else f'{free / 2**20:,.1f}'} MiB free there)"
        )
        raise (NoRoom if isinstance(error, NoRoom) else OSError)(text) from error
    return final


def bytes_on_disk(*tensors: Mapping[str, Tensor | LazyTensor]) -> int:
    """What a checkpoint of these tensors takes, with its small files, in bytes; some more than it will be."""
    every = [tensor for each in tensors for tensor in each.values()]
    return sum(num_bytes(tensor) + 256 for tensor in every) + 2**16


def prune(run_dir: Path, *, newest: int, keep_last: int, keep_every_steps: int | None) -> None:
    """Remove all but the last `keep_last` checkpoints and those at multiples of `keep_every_steps`.

    `newest` is the step just saved: a later one is damaged, was passed over, and does not count.
    """
    folders = [(step, folder) for step, folder in steps_saved(run_dir) if step <= newest]
    for step, folder in folders[: max(len(folders) - keep_last, 0)]:
        if not (keep_every_steps and step % keep_every_steps == 0):
            _remove(folder)


def make_room(run_dir: Path, *, newest: int, keep_last: int, keep_every_steps: int | None) -> list[Path]:
    """Remove ahead of the save of step `newest` what `prune` would remove after it, but for the newest whole one.

    Returns what was removed: nothing where no checkpoint is whole.
    """
    folders = [(step, folder) for step, folder in steps_saved(run_dir) if step < newest]
    surplus = [
        folder
        for step, folder in folders[: max(len(folders) + 1 - keep_last, 0)]
        if not (keep_every_steps and step % keep_every_steps == 0)
    ]
    whole = next((folder for _, folder in reversed(folders) if surplus and is_whole(folder)), None)
    gone = [folder for folder in surplus if whole is not None and folder != whole]
    for folder in gone:
        _remove(folder)
    return gone


def steps_saved(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint in a run folder, oldest first."""
    return [(step, folder) for step, folder in _entries(run_dir) if folder.is_dir()]


def last_saved(run_dir: Path) -> str:
    """The last checkpoint of a run folder, for a message: its folder, `none`, or that the folder cannot be listed."""
    try:
        saved = steps_saved(run_dir)
    except ValueError as error:
        return f"not known ({error})"
    return str(saved[-1][1]) if saved else "none"


def _entries(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that has a checkpoint's name, oldest first.

    Raises ValueError where the folder is there and cannot be listed: no checkpoint is not the same as none in sight.
    """
    parent = run_dir / "checkpoints"
    try:
        names = os.listdir(parent)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{parent} should hold the run's checkpoints, and cannot be read: {error.strerror}") from error
    matches = [match for name in names if (match := FOLDER.fullmatch(name))]
    return sorted((int(match.group(1)), parent / match.group()) for match in matches)


def find(path: str | Path) -> Path:
    """The checkpoint folder that `ckpt=path` means: the last one of a run folder, or the folder itself.

    Raises ValueError where there is none, saying what was looked for.
    """
    path = Path(path).expanduser()
    if path.is_file():
        path = path.parent
    if not path.exists():
        raise ValueError(f"ckpt={path} does not exist; give a run folder (runs/...), or a checkpoint inside it")
    if (path / "state.json").exists():
        return path
    run_dir = path.parent if path.name == "checkpoints" else path
    saved = steps_saved(run_dir)
    if saved:
        return saved[-1][1]
    if (path / "config.json").exists() and (path / "model.safetensors").exists():
        return path  # an export, or a timm folder
    raise ValueError(
        f"ckpt={path} holds no checkpoint: looked for checkpoints/step_*/ and for model.safetensors with config.json; "
        "give a run folder that python -m ssl.pretrain has written"
    )


def resume(
    run_dir: Path,
    *,
    method: nn.Module,
    ema: dict[str, Tensor] | None,
    check: Callable[[Path], None],
    warn: Callable[[str], None],
) -> tuple[dict[str, Any], TensorFile] | None:
    """Load the newest whole checkpoint of a run into `method` and `ema`; returns its card and the optimizer's tensors,
    which are read when they are asked for. Of what is cut over ranks each rank reads its own part.

    Every rank calls it, and all take the same one. A damaged one is skipped, named through `warn`, for the one before.
    None where the run has no checkpoint at all; ValueError where it has some and none is whole: a run never starts
    again from step 0 in silence. `check` may refuse a checkpoint's recipe.
    """
    folder = _chosen(run_dir, warn)
    if folder is None:
        return None
    state = read_state(folder)
    if distributed.is_main() and (changed := changed_versions(state.get("versions") or {}, versions())):
        warn(f"{folder} was written by another version, and numbers may differ from here on: {changed}")
    check(folder)
    backbone = TensorFile(folder / "model.safetensors")
    rest = TensorFile(folder / "method.safetensors")
    load_strictly(method, {**{f"backbone.{k}": v for k, v in backbone.items()}, **rest}, folder)
    if ema is not None and "ema.safetensors" in state["sha256"]:
        averages = TensorFile(folder / "ema.safetensors")
        check_fit(ema, averages, folder)
        for name, tensor in averages.items():
            fill(ema[name], tensor)
    elif ema is not None:  # the run kept none until now: the average starts here
        for name, tensor in method.state_dict().items():
            local(ema[name]).copy_(local(tensor))
    return state, TensorFile(folder / "optimizer.safetensors")


def _chosen(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, the same on every rank: the first one looks and tells the others."""
    name, refusal = None, None
    if distributed.is_main():
        try:
            found = _newest_whole(run_dir, warn)
            name = None if found is None else found.name
        except ValueError as error:
            refusal = str(error)
    name, refusal = distributed.from_main((name, refusal))
    if refusal is not None:
        raise ValueError(refusal)
    folder = None if name is None else run_dir / "checkpoints" / name
    agrees = folder.is_dir() if folder is not None else not (run_dir / "checkpoints").is_dir() or not _entries(run_dir)
    others = [rank for rank, fine in enumerate(distributed.from_every(agrees)) if not fine]
    if others:
        raise ValueError(
            f"out={run_dir} must be one folder that all ranks share: rank 0 finds {name or 'no checkpoint'} there, and "
            f"rank {', '.join(map(str, others))} finds something else"
        )
    return folder


def _newest_whole(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    problems = []
    for step, folder in reversed(_entries(run_dir)):
        try:
            state = read_state(folder)
            verify(folder, state)
            if state["step"] != step:
                raise ValueError(f"{folder} is damaged: its card says step {state['step']}")
        except ValueError as error:
            if isinstance(error.__cause__, PermissionError):
                raise ValueError(
                    f"{error}; make it readable for this user, or move it elsewhere to go on from the one before"
                ) from error
            problems.append(str(error))
            warn(f"skipping a checkpoint: {error}")
            continue
        return folder
    if problems:
        raise ValueError(
            f"{run_dir} has checkpoints, and none is whole:\n  "
            + "\n  ".join(problems)
            + "\nTo start again, give another out= or remove it"
        )
    return None


def load_backbone(
    ckpt: str | Path, *, model: Mapping[str, Any] | None = None, image_size: tuple[int, int] | None = None
) -> LoadedBackbone:
    """The backbone that `ckpt` names, in eval mode on the CPU, without a classifier that it may have.

    `ckpt` is a run folder, a checkpoint in it, an export, a timm folder, a file of another project's weights, which
    needs `model` (name, patch_size, stem, args), or `timm:<name>`. `image_size` (height, width) rebuilds the backbone
    for images of another size. Raises ValueError where there is none, where it is damaged, where tensors are missing or
    left over, and where `model` is given to one that brings its own.
    """
    if is_foreign(ckpt):
        loaded = load_foreign(str(ckpt), model=model, image_size=image_size)
    elif model is not None:
        raise ValueError(f"model= has no effect with ckpt={ckpt}, which brings its own; leave it out")
    else:
        folder = find(ckpt)
        loaded = _load_checkpoint(folder) if (folder / "state.json").exists() else load_export(folder)
    if image_size is not None and tuple(image_size) != loaded.spec.image_size:
        loaded.model, loaded.spec, done = at_image_size(loaded.model, loaded.spec, image_size)
        loaded.notes.append(done)
    _check_finite(loaded)
    return loaded


def classifier_model(loaded: LoadedBackbone) -> nn.Module:
    """timm's model with the classifier that was fine-tuned with it: images (B, C, H, W) to logits (B, classes).

    Raises ValueError for a backbone that has none.
    """
    if loaded.classifier is None:
        raise ValueError(f"{loaded.path} holds no classifier; fine-tune it with python -m eval.finetune")
    model: Any = backbone_from_spec(loaded.spec)
    model.reset_classifier(len(loaded.classifier.classes))
    load_strictly(model, {**loaded.model.state_dict(), **loaded.classifier.tensors}, loaded.path)
    return model.eval()


def export(loaded: LoadedBackbone, out: Path) -> Path:
    """Write a folder that timm loads with no trace of this package: model.safetensors and config.json.

    A fine-tuned model takes its classifier with it.
    """
    out.mkdir(parents=True, exist_ok=True)
    head = loaded.classifier
    save_tensors({**loaded.model.state_dict(), **(head.tensors if head else {})}, out / "model.safetensors")
    card = timm_config(
        loaded.spec,
        mean=loaded.mean,
        std=loaded.std,
        classes=head.classes if head else None,
        multi_label=bool(head and head.multi_label),
    )
    (out / "config.json").write_text(json.dumps(card, indent=2) + "\n")
    return out


def _load_checkpoint(folder: Path) -> LoadedBackbone:
    state = read_state(folder)
    verify(folder, state)
    weights = "ema" if "ema.safetensors" in state["sha256"] else "model"
    if weights == "ema":
        tensors, _ = split_backbone(load_tensors(folder / "ema.safetensors"))
    else:
        tensors = load_tensors(folder / "model.safetensors")
    spec = BackboneSpec.from_dict(state["backbone"])
    mean, std = statistics((state.get("mean"), state.get("std")), channels=spec.in_chans, where=folder / CARD)
    model, classifier = load_model(spec, tensors, state.get("classifier"), folder)
    return LoadedBackbone(
        model=model,
        spec=spec,
        config=read_config(folder),
        step=state["step"],
        hash=state["sha256"][f"{weights}.safetensors"],
        path=folder,
        mean=mean,
        std=std,
        run_dir=folder.parent.parent,
        weights=weights,
        classifier=classifier,
    )


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has all of the content that was written."""
    try:
        verify(folder, read_state(folder))
    except ValueError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove a checkpoint as a whole: one that is killed half-way leaves none that looks like one."""
    doomed = _doomed(folder)
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
    except OSError:  # it stays, and the next save tries again
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _doomed(folder: Path) -> Path:
    return folder.with_name(f".removed_{folder.name}")


def _remove_leftovers(run_dir: Path) -> None:
    for pattern in LEFTOVERS:
        for leftover in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _free_bytes(folder: Path) -> int | None:
    """What this user may still write there; None where the file system does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def _reason(error: OSError) -> str:
    """What the system said, and where that is not plain, what to look at."""
    advice = {errno.EDQUOT: "; see `quota -s`", errno.EROFS: "; it was mounted so, or after an error of the disk"}
    return f"{error.strerror or error}{advice.get(error.errno or 0, '')}"


def split_backbone(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method's tensors as (the backbone's under timm's keys, all others)."""
    prefix = "backbone."
    backbone = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return backbone, {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def _check_finite(loaded: LoadedBackbone) -> None:
    """Raise ValueError where a weight is NaN or infinite: whatever is computed with it would be too."""
    for name, tensor in loaded.model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{loaded.path}: {name} holds numbers that are not finite; the backbone has diverged. Take an earlier "
                "checkpoint"
            )
