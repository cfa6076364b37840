"""Which runs share a recipe but for their seed, and in which settings recipes differ."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.finetune import FinetuneConfig
from eval.report.comparison_runs import Run
from ssl.config import PretrainConfig
from ssl.same_run import defaults_of, flat, is_free

SEED = "seed"
ACTS = "acts: "
"""How the names of a recipe's parts begin, which are told apart from the settings that they come from."""
UNSAID = ("out", "wandb.name", "launch.name")
"""Free settings that every run has its own of."""


@dataclass(frozen=True)
class Recipe:
    """Runs that differ in nothing but their seed and settings that are free."""

    name: str
    runs: Sequence[Run]

    @property
    def seeds(self) -> str:
        """How many seeds it has, in words."""
        if not self.runs[0].config:
            return "not trained"
        number = len({run.config.get(SEED) for run in self.runs})
        return "one seed" if number == 1 else f"{number} seeds"


@dataclass(frozen=True)
class Setting:
    """A setting, and the value that each recipe or run has of it, as text; None where it has none."""

    key: str
    values: Sequence[str | None]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1

    def is_odd(self, value: str | None) -> bool:
        """Whether a value is not the one that most have, the first of equally many; each where all are different."""
        usual = max(dict.fromkeys(self.values), key=list(self.values).count)
        return value != usual or len(set(self.values)) == len(self.values) > 1


def complete_configs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The flat config of each run, with the defaults of settings that its version did not have and another's has."""
    trained = [run for run in runs if run.config]
    keys = {kind: {key for run in trained if _schema(run) is kind for key in run.config} for kind in _SCHEMAS}
    filled = []
    for run in runs:
        defaults = _defaults(_schema(run)) if run.config else {}
        missing = keys[_schema(run)] - run.config.keys() if run.config else set()
        filled.append({**run.config, **{key: defaults[key] for key in missing if key in defaults}})
    return filled


def recipes_of(runs: Sequence[Run]) -> list[Recipe]:
    """Runs by recipe, in the order of first meeting; a baseline, or a run without a config, is alone."""
    found: dict[str, list[Run]] = {}
    for place, (run, config) in enumerate(zip(runs, complete_configs(runs))):
        own = {key: value for key, value in config.items() if not is_free(key, config) and key != SEED}
        key = json.dumps([own, run.parts], sort_keys=True, default=str) if run.config else str(place)
        found.setdefault(key, []).append(run)
    names = _names(list(found.values()))
    return [Recipe(name, own) for name, own in zip(names, found.values())]


def recipe_settings(recipes: Sequence[Recipe]) -> list[Setting]:
    """What defines each recipe that was trained: its config without what is free, and the parts of it that act, which
    are called as in recipe.json, after ACTS. A part that the version of some run did not write is left out.
    """
    trained = [recipe.runs[0] for recipe in recipes if recipe.runs[0].config]
    configs = complete_configs(trained)
    bound = [{k: v for k, v in each.items() if not is_free(k, each) and k != SEED} for each in configs]
    told = all(run.parts for run in trained)
    whole = [
        {**own, **({f"{ACTS}{key}": value for key, value in run.parts.items()} if told else {})}
        for own, run in zip(bound, trained)
    ]
    return _settings(whole)


def free_settings(runs: Sequence[Run]) -> list[Setting]:
    """What may differ between runs of one recipe, and does: the seed first."""
    trained = [run for run in runs if run.config]
    configs = complete_configs(trained)
    free = [{k: v for k, v in each.items() if (is_free(k, each) or k == SEED) and k not in UNSAID} for each in configs]
    return sorted((each for each in _settings(free) if each.differs), key=lambda setting: setting.key != SEED)


def as_text(value: Any) -> str:
    """A setting as a person types it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


_SCHEMAS = (PretrainConfig, FinetuneConfig)


def _schema(run: Run) -> type:
    return PretrainConfig if any(key.startswith("method.") for key in run.config) else FinetuneConfig


@functools.cache
def _defaults(schema: type) -> dict[str, Any]:
    return defaults_of(schema)


def _settings(configs: Sequence[Mapping[str, Any]]) -> list[Setting]:
    configs = [dict(_spread_out(each)) for each in configs]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [Setting(key, [as_text(each[key]) if key in each else None for each in configs]) for key in keys]


def _spread_out(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings with those in a list of mappings, such as views, one by one: `augment.views.0.crop`."""
    for key, value in config.items():
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            for place, each in enumerate(value):
                yield from _spread_out(flat(each, f"{key}.{place}"))
        else:
            yield key, value


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What the names of a recipe's runs begin with, where that tells it from the others; else that of the first."""
    names = []
    for runs in groups:
        shared = os.path.commonpath([run.name for run in runs]) if len(runs) > 1 else runs[0].name
        names.append(shared)
    return [
        name if name and names.count(name) == 1 else f"{runs[0].name} and {len(runs) - 1} more"
        for name, runs in zip(names, groups)
    ]
