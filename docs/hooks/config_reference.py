"""The page of all config keys, from the typed schemas and the yaml files: nothing is written down twice."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"
COMMANDS = {
    "pretrain": ("ssl.pretrain", "ssl.config", "PretrainConfig"),
    "prepare": ("ssl.prepare", "ssl.prepare", "PrepareConfig"),
    "replay": ("ssl.replay", "ssl.replay", "ReplayConfig"),
    "knn": ("eval.knn", "eval.knn", "KnnConfig"),
    "linear_probe": ("eval.linear_probe", "eval.linear_probe", "LinearProbeConfig"),
    "finetune": ("eval.finetune", "eval.finetune", "FinetuneConfig"),
    "health": ("eval.health", "eval.health", "HealthConfig"),
    "advise": ("eval.advise", "eval.advise", "AdviseConfig"),
    "suite": ("eval.suite", "eval.suite", "SuiteConfig"),
    "compare": ("eval.compare", "eval.compare", "CompareConfig"),
    "look": ("eval.look", "eval.look.settings", "LookConfig"),
    "report": ("eval.report", "eval.report.command", "ReportConfig"),
    "app": ("eval.app", "eval.app.settings", "AppConfig"),
    "predict": ("eval.predict", "eval.predict", "PredictConfig"),
    "features": ("eval.features", "eval.features", "FeaturesConfig"),
    "export": ("eval.export", "eval.export", "ExportConfig"),
}
"""Primary file in conf/ to (command, module of the schema, schema)."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A row of the page."""

    name: str
    type: str
    default: str
    meaning: str


def page() -> str:
    """The whole page, in Markdown."""
    parts = [
        "# Config keys",
        "Every key is given on the command line as `key=value`. Types and defaults are those of the typed schemas, "
        "which refuse a misspelt key or a wrong type before anything is done; `null` means none, or that it follows "
        "from something else, as its meaning says. Keys of a group (`method=`, `model=`, `data=`...) are those of the "
        "file that was chosen, listed [below](#groups). `python -m <command> --cfg job` prints what a command line "
        "comes to.",
    ]
    parts += [command_section(primary) for primary in COMMANDS]
    parts += ["## Groups", "A group's name takes the name of one of its files: `optim=lars`."]
    parts += [group_section(group) for group in groups()]
    return "\n\n".join(parts) + "\n"


def command_section(primary: str) -> str:
    """A command's keys as a table, nested ones by their dotted names."""
    command, *_ = COMMANDS[primary]
    lines = [f"## {command}", f"`python -m {command}`", "| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    rows = [f"| `{key.name}` | {key.type} | {key.default} | {key.meaning} |" for key in keys(primary)]
    return "\n\n".join([*lines[:2], "\n".join([*lines[2:], *rows])])


def keys(primary: str) -> list[Key]:
    """The keys of a command with the defaults that its yaml gives them."""
    _, module, name = COMMANDS[primary]
    schema = getattr(importlib.import_module(module), name)
    text = (CONF / f"{primary}.yaml").read_text()
    given = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    assert isinstance(given, dict)
    return list(_keys(schema, given, yaml_comments(text), prefix=""))


def _keys(schema: type, given: dict[str, Any], comments: dict[str, str], *, prefix: str) -> Iterator[Key]:
    hints, told = typing.get_type_hints(schema), field_comments(schema)
    for field in dataclasses.fields(schema):
        name, hint = prefix + field.name, hints[field.name]
        nested = _dataclass_of(hint)
        own = given.get(field.name)
        meaning = told.get(field.name) or comments.get(name) or ""
        if nested is None:
            default = own if field.name in given else _default(field)
            yield Key(name, _type(hint), _shown(default, name), _cell(meaning))
            continue
        if meaning or (CONF / field.name).is_dir():
            group = f"a file of [conf/{field.name}](#{field.name})" if (CONF / field.name).is_dir() else "a group"
            yield Key(
                name, group, _chosen(primary_default(given, field.name)), _cell(meaning or "the group as a whole")
            )
        yield from _keys(nested, own if isinstance(own, dict) else {}, comments, prefix=f"{name}.")


def primary_default(given: dict[str, Any], group: str) -> Any:
    """The file of a group that the primary's defaults list takes; None where they leave it open."""
    for entry in given.get("defaults", []):
        if isinstance(entry, dict) and group in entry:
            return entry[group]
    return None


def field_comments(schema: type) -> dict[str, str]:
    """The comments beside a dataclass's fields, its parents' included."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if dataclasses.is_dataclass(owner):
            found |= _comments_in(textwrap.dedent(inspect.getsource(owner)))
    return found


def _comments_in(source: str) -> dict[str, str]:
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found


def yaml_comments(text: str) -> dict[str, str]:
    """The comment beside each key of a yaml file, by dotted name."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = re.match(r"^(\s*)([\w./@]+):(?:\s+(.*))?$", line)
        if match is None:
            continue
        indent, key, rest = len(match[1]), match[2], match[3] or ""
        path = [entry for entry in path if entry[0] < indent] + [(indent, key)]
        comment = re.search(r"(?:^|\s)#\s*(.*)$", rest)
        found[".".join(name for _, name in path)] = comment[1].strip() if comment else ""
    return found


def groups() -> list[str]:
    """The folders of conf/ that a command line chooses from."""
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")


def group_section(group: str) -> str:
    """Every file of a group: what it is, in its own opening words, and what it sets."""
    parts = [f"### {group}"]
    for path in sorted((CONF / group).glob("*.yaml")):
        text = path.read_text()
        parts.append(f"#### `{group}={path.stem}`")
        head = opening(text)
        if head:
            parts.append(head)
        parts.append("```yaml\n" + "\n".join(body(text)) + "\n```")
    return "\n\n".join(parts)


def opening(text: str) -> str:
    """The comment at the head of a yaml file, without what Hydra reads in it."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# ").strip())
    return _prose(" ".join(lines))


def body(text: str) -> list[str]:
    """What follows that comment."""
    lines = text.splitlines()
    while lines and (lines[0].startswith("#") or not lines[0].strip()):
        lines.pop(0)
    return lines


def _dataclass_of(hint: Any) -> type | None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    found = [each for each in options if dataclasses.is_dataclass(each)]
    return typing.cast("type", found[0]) if found else None


def _type(hint: Any) -> str:
    if hint is Any:
        return "any"
    if isinstance(hint, types.UnionType):
        named = [_type(each) for each in typing.get_args(hint) if each is not type(None)]
        return " or ".join([*named, "null"]) if type(None) in typing.get_args(hint) else " or ".join(named)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " ".join(f"`{member.name}`" for member in hint)
    origin = typing.get_origin(hint)
    if origin is list:
        return f"list of {_type(typing.get_args(hint)[0])}"
    if origin is dict:
        return "mapping"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "`true` or `false`"}.get(
        hint.__name__, hint.__name__
    )


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else MISSING


def _shown(value: Any, name: str) -> str:
    group = name.split(".")[0]
    if value == MISSING:
        return f"of the file of `{group}=`" if (CONF / group).is_dir() else "must be given"
    if isinstance(value, Enum):
        value = value.name
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    return f"`{value}`"


def _chosen(option: Any) -> str:
    return "`null`" if option is None else f"`{option}`"


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|")


def _prose(text: str) -> str:
    """Text in which Markdown sees no emphasis, tags or links that nobody meant; what stands in backticks stays."""
    parts = text.split("`")
    return "`".join(
        re.sub(r"([*<>\[\]])", r"\\\1", part) if place % 2 == 0 else part for place, part in enumerate(parts)
    )
