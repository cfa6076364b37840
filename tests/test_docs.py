"""Every command in docs/ composes: its groups, keys and types exist. Those of the README are run, in test_readme.py."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from eval.config import register
from ssl.config import CONF, check, register_schemas
from ssl.slurm_settings import register_resolvers

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCHEMAS = {
    "eval.knn": "KnnConfig",
    "eval.linear_probe": "LinearProbeConfig",
    "eval.finetune": "FinetuneConfig",
    "eval.health": "HealthConfig",
    "eval.advise": "AdviseConfig",
    "eval.predict": "PredictConfig",
    "eval.features": "FeaturesConfig",
    "eval.export": "ExportConfig",
    "eval.suite": "SuiteConfig",
    "eval.compare": "CompareConfig",
    "eval.look": "LookConfig",
    "eval.report": "ReportConfig",
    "eval.app": "AppConfig",
    "ssl.prepare": "PrepareConfig",
    "ssl.pretrain": "PretrainConfig",
}
HOMES = {"eval.look": "eval.look.settings", "eval.report": "eval.report.command", "eval.app": "eval.app.settings"}
"""Where the schema of a command is, that is a package."""


def commands() -> list[str]:
    blocks = [
        block for page in sorted(DOCS.rglob("*.md")) for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    ]
    return [line for block in blocks for line in block.splitlines() if line]


def runs_of(words: list[str]) -> list[list[str]]:
    """The words of each run that a command starts: with `-m` every combination, of an interval its first value."""
    if "-m" not in words:
        return [words]
    choices = []
    for override in OverridesParser.create().parse_overrides([word for word in words if word != "-m"]):
        if override.is_interval_sweep():
            values = [str(override.value().start)]
        elif override.is_sweep_override():
            values = list(override.sweep_string_iterator())
        else:
            values = [override.get_value_element_as_str()]
        choices.append([f"{override.get_key_element()}={value}" for value in values])
    return [list(each) for each in itertools.product(*choices)]


def composed(command: str) -> list[tuple[Any, type]]:
    words = shlex.split(command.replace("runs/<run>", "runs/a"))
    name = words[words.index("-m") + 1]
    module = importlib.import_module(HOMES.get(name, name))
    schema = getattr(module, SCHEMAS[name])
    register_schemas()
    register(schema)
    words = words[words.index(name) + 1 :]
    if hasattr(module, "spell_out"):
        words = module.spell_out(words, **({"key": "runs"} if name == "eval.report" else {}))
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return [(compose(name.split(".")[1], overrides=each), schema) for each in runs_of(words)]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_composes(command: str):
    for config, schema in composed(command):
        check(config, schema)
        assert OmegaConf.to_container(config, resolve=True)


def test_a_command_with_a_wrong_word_does_not_compose():
    with pytest.raises(Exception, match="protocl"):
        composed("python -m eval.linear_probe ckpt=runs/<run> protocl=mae")


def test_a_sweep_of_the_docs_composes_each_of_its_runs():
    sweep = composed("python -m ssl.pretrain -m method=simclr,mae seed=0,1 'optim.base_lr=interval(0.01,1)'")
    found = [(config.method._target_.split(".")[-1], config.seed, config.optim.base_lr) for config, _ in sweep]
    assert found == [("SimCLR", 0, 0.01), ("SimCLR", 1, 0.01), ("MAE", 0, 0.01), ("MAE", 1, 0.01)]


def test_files_that_the_docs_link_exist():
    made = {"config.md"} | {f"{path.stem}.md" for path in DOCS.glob("notebooks/*.ipynb")}  # when the site is built
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists() or Path(link).name in made, f"{page.name}: {link}"


def test_the_tests_that_docs_name_are_there():
    tests = DOCS.parent / "tests"
    named = {match for page in DOCS.glob("*.md") for match in re.findall(r"(test_\w+\.py)::(\w+)", page.read_text())}
    assert named
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (tests / file).read_text()]
    assert not missing
