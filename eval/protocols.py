"""When two results were measured alike: what of a protocol defines the measurement, and what may differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MEASURED = (
    "subject",
    "started_from",
    "checkpoint",
    "backbone",
    "frozen",
    "data.pretrained_on_it",
    "features.dimensions",
    "features.mean",
    "features.std",
)
"""What is judged, and what it wants its images normalised by: a table has a row for each."""

CIRCUMSTANCES = (
    "seed",
    "low_shot.seeds",
    "commit",
    "versions",
    "processor",
    "threads",
    "num_processes",
    "gpu",
    "device",
    "features.precision",
    "index",
    "recipe",
    "data.root",
    "data.train",
    "data.test",
    "data.num_undecodable",
    *(f"settings.trainer.{key}" for key in ("device", "devices", "device_batch_size", "precision", "compile")),
)
"""What a repetition may change; it is told beside the numbers. A recipe's name is one, as its settings are compared."""

UNTOLD = (
    "date",
    *(f"settings.trainer.{key}" for key in ("log_every_steps", "checkpoint_every_steps", "eval_every_epochs")),
    *(f"settings.trainer.{key}" for key in ("keep_last", "keep_every_steps", "pictures")),
)
"""What every repetition changes, or nobody would ask for. Keys that end in `seconds` belong to it too."""

OUTCOMES = ("choice", "notes", "recall", "weights", "last_metrics", "signs_of_collapse")
"""What came out of the measurement, and is written into the protocol for its reader. So is what begins with draws_."""

OUTCOMES_OF = {"eval.finetune": ("reported",)}
"""The same of one evaluation: which step early stopping chose."""

ROW_OUTCOMES = ("held_out_", "dimensions")
"""How the keys begin that are outcomes in a row of a grid, or of a list of layers."""

LONGEST = 60


def identity(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that define a measurement, by dotted names: evaluation, data and counts, k, T, layer, crop...

    All that is not known to be the judged model, a circumstance or an outcome belongs to it, so that what a later
    version adds tells results apart. A null is a setting that is not there.
    """
    without = (*MEASURED, *CIRCUMSTANCES, *UNTOLD, *OUTCOMES, *OUTCOMES_OF.get(str(protocol.get("command")), ()))
    return {
        name: _settings_of_rows(value)
        for name, value in _flat(protocol)
        if value is not None
        and not _is_within(name, without)
        and not name.startswith("draws_")
        and not name.endswith("seconds")
    }


def protocol_id(protocol: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that are the same for results that were measured alike."""
    text = json.dumps(identity(protocol), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def protocol_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that define a measurement and differ between two protocols, by dotted names; None: not there.

    Empty where the two may stand in one column.
    """
    return _difference(identity(a), identity(b))


def circumstances(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two protocols and may: seed, versions, commit, device. Not the seconds."""
    told = ({n: v for n, v in _flat(p) if v is not None and _is_within(n, CIRCUMSTANCES)} for p in (a, b))
    return _difference(*told)


def brief(value: Any) -> str:
    """A setting in a line: long lists are counted."""
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= LONGEST:
        return text
    return f"{len(value)} values" if isinstance(value, list) else text[: LONGEST - 3] + "..."


def read_result(path: Path) -> dict[str, Any]:
    """A JSON that an evaluation wrote. Raises ValueError where it is none, or cannot be read."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else f"no JSON: {error}"
        raise ValueError(
            f"{path} cannot be read ({reason}); give the JSON of an evaluation, or a run folder"
        ) from error
    metrics, protocol = (
        (result.get(key) for key in ("metrics", "protocol")) if isinstance(result, dict) else (None, None)
    )
    if not isinstance(metrics, dict) or not isinstance(protocol, dict) or "command" not in protocol:
        raise ValueError(
            f'{path} is no result of an evaluation: it lacks "metrics" or a "protocol" with its "command"; '
            "give a file such as runs/<run>/eval/knn.json, or a run folder"
        )
    return result


def find_results(given: str) -> list[Path]:
    """The results that a file, a run folder with what was fine-tuned from it, or its `eval` folder holds.

    Raises ValueError where there is none.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return [path]
    if not path.exists():
        raise ValueError(f"{given} does not exist; give the JSON of an evaluation, or a run folder")
    found = [*sorted(path.glob("eval/*.json")), *sorted(path.glob("finetune/**/eval/*.json"))]
    if not found and not (path / "state.json").exists():  # a checkpoint's own JSON are no results
        found = sorted(path.glob("*.json"))
    if found:
        return found
    raise ValueError(f"{given} holds no results (eval/*.json); python -m eval.knn ckpt={given} makes one")


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _is_within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _settings_of_rows(value: Any) -> Any:
    """A list of mappings without what came out for each; anything else as it is."""
    if not isinstance(value, list):
        return value
    return [
        {key: each for key, each in row.items() if not key.startswith(ROW_OUTCOMES)}
        if isinstance(row, Mapping)
        else row
        for row in value
    ]


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted(a.keys() | b.keys())
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
