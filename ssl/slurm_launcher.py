"""Hydra's launcher for Slurm, which says in a message and without a traceback why jobs were not submitted or lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher import submitit_launcher

from ssl.sweeps import Refused


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """As submitit's."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the runs and wait for them. Raises Refused, once it is said why, where that cannot be done."""
        try:
            return super().launch(job_overrides, initial_job_idx)
        except (RuntimeError, OSError) as error:  # what submitit raises, and where there is no sbatch
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(f"error: {_reason(error)}", file=sys.stderr, flush=True)
            raise Refused(1) from None


def _reason(error: Exception) -> str:
    refused = error.__cause__
    if not isinstance(refused, subprocess.CalledProcessError):
        return f"Slurm could not do the sweep's jobs: {error}"
    words = str(refused.stderr or refused.output or "").strip() or f"exit code {refused.returncode} without a word"
    return f"{refused.cmd[0]} did not take the sweep's jobs: {words}"
