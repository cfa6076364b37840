"""A model as an ONNX file with a free batch size, compared through onnxruntime before it counts."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # of the largest output: onnxruntime has kernels of its own


def check_onnx_packages() -> None:
    """Raise ValueError, naming what to install, where a package for ONNX is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"onnx=true needs {', '.join(missing)}; install with: pip install {' '.join(PACKAGES)} "
            f"(or: uv pip install {' '.join(PACKAGES)})"
        )


def write_onnx(model: nn.Module, images: Tensor, path: Path) -> float:
    """Write `model`, from images (B, C, H, W) to one row per image; returns the largest difference that onnxruntime
    makes, as a part of the largest output.

    The batch size is free: `images` are given to it at once and one by one. Raises ValueError where the outputs differ
    by more than 1e-4, or where the model cannot be written.
    """
    import onnxruntime

    model = model.eval()
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (images[:2],),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=["image"],
                output_names=["output"],
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError) as error:  # torch.onnx.errors are RuntimeErrors
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"torch cannot write this model as ONNX ({reason}); leave onnx=true out") from error
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(images)  # (B, D)
    found: list[Any] = [session.run(None, {"image": part.numpy()})[0] for part in (images, images[:1])]
    difference = max(
        float((torch.from_numpy(rows) - expected[: len(rows)]).abs().max() / expected.abs().max()) for rows in found
    )
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the export was not written: onnxruntime computes something else from model.onnx, by {difference:.1e} of "
            f"the largest output; leave onnx=true out"
        )
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports each of its stages; what matters of it is raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
