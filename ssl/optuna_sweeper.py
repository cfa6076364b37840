"""Hydra's sweeper for Optuna, which ends when the sweep is ended, and in a message where no trial could be judged."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_optuna_sweeper import optuna_sweeper
from omegaconf import DictConfig

import ssl.sweeps as sweeps


class OptunaSweeper(optuna_sweeper.OptunaSweeper):
    """As the plugin's."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        launcher = self.sweeper.launcher
        assert launcher is not None  # made by setup
        self.sweeper.launcher = _UntilEnded(launcher)

    def sweep(self, arguments: list[str]) -> None:
        """Search. Raises Refused, once it is said, where no trial has a value: Optuna then has no best one."""
        try:
            super().sweep(arguments)
        except ValueError:
            sweep = sweeps.begun()
            if sweep is None or not sweep.outcomes() or sweep.has_objective():
                raise
            print("error: no trial came to an end with a value of its objective", file=sys.stderr, flush=True)
            raise sweeps.Refused(1) from None


class _UntilEnded(Launcher):
    """A launcher that starts no more trials once the sweep is ended, of which Optuna knows nothing."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def setup(self, **kwargs: Any) -> None:
        self._launcher.setup(**kwargs)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        returned = self._launcher.launch(job_overrides, initial_job_idx)
        sweep = sweeps.begun()
        if sweep is not None and sweep.end_code:
            raise sweeps.Refused(sweep.end_code)
        return returned
