"""What Hydra's plugins for sweeps do unless told otherwise: their own settings and names, with a few other values.

A yaml in conf/ cannot do it: Hydra refuses one that bears the name of a plugin's config.
"""

from __future__ import annotations

import importlib
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import OmegaConf, open_dict

PLUGIN_DEFAULTS: dict[str, dict[str, Any]] = {
    "hydra/sweeper/optuna": {
        "direction": "maximize",  # accuracy, health; objective=loss wants minimize
        "n_jobs": 1,  # trials asked for at once: with joblib or Slurm, as many as shall run at a time
        "max_failure_rate": 1.0,  # a run that fails is a failed trial; the plugin's 0.0 would end the sweep
    },
    "hydra/sweeper/sampler/tpe": {
        "seed": 0,  # the same sweep again asks for the same runs, which go on from where they are
    },
    "hydra/launcher/joblib": {
        "n_jobs": 2,  # runs at a time, which share this machine's GPUs; the plugin's -1 is one for each core
        "pre_dispatch": "n_jobs",  # the others wait in the first process
        "batch_size": 1,
    },
}


OURS: dict[str, tuple[str, str]] = {
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher": ("ssl.slurm_launcher", "SlurmLauncher"),
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper": ("ssl.optuna_sweeper", "OptunaSweeper"),
}
"""What is done in the place of a plugin's class."""


def register_plugin_defaults() -> None:
    """Give the plugins that are installed these values and classes. Plugins register theirs when Hydra first looks for
    them.
    """
    classes = Plugins.instance().class_name_to_class
    for name in OURS.keys() & classes.keys():
        module, ours = OURS[name]
        classes[name] = getattr(importlib.import_module(module), ours)
    store = ConfigStore.instance()
    for path, values in PLUGIN_DEFAULTS.items():
        group, _, name = path.rpartition("/")
        try:
            found = store.load(f"{path}.yaml")
        except (ConfigLoadError, KeyError):  # not installed
            continue
        with open_dict(found.node):
            for key, value in values.items():
                OmegaConf.update(found.node, key, value)
        store.store(group=group, name=name, node=found.node, provider=found.provider)
