"""The scalars of the steps since the last logged one: a run that is resumed logs the line that it would have logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import ssl.distributed as distributed


class UnloggedSteps:
    """One row of scalars per step, on the device, until `rows` are logged; a checkpoint keeps them as `state`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._rows: list[Tensor] = []  # (names,) each
        self._loaded = False

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """This rank's scalars of one more step; each step has the same names.

        Rows that were loaded and have others, of a run that goes on with another recipe, are dropped.
        """
        if self._loaded and set(metrics) != set(self._names):
            self.clear()
        self._loaded = False
        if not self._rows:
            self._names = list(metrics)
        self._rows.append(torch.stack([metrics[name].float() for name in self._names]))

    def over_ranks(self) -> tuple[list[str], Tensor]:
        """Names, and the rows averaged over ranks (steps, names); every rank calls it. Nothing is waited for."""
        return self._names, distributed.mean_over_ranks(torch.stack(self._rows))

    def settle(self) -> None:
        """Average over ranks what is here, so that the first rank's `state` is that of all; every rank calls it."""
        if self._rows:
            self._rows = list(self.over_ranks()[1])

    def clear(self) -> None:
        """Forget the rows: they are logged."""
        self._rows.clear()

    def state(self) -> list[dict[str, float | str]]:
        """What a checkpoint keeps, exact; numbers that JSON has not stand by their names. Waits for the device."""
        rows = [row.tolist() for row in self._rows]
        return [
            {name: number if math.isfinite(number) else str(number) for name, number in zip(self._names, row)}
            for row in rows
        ]

    def load(self, state: Sequence[Mapping[str, float | str]]) -> None:
        """Go on from `state`."""
        self.clear()
        for row in state:
            self.add({name: torch.tensor(float(number), device=self._device) for name, number in row.items()})
        self._loaded = True
