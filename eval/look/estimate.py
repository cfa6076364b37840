"""How long something will take, said once, when enough of it has been done to tell."""

from __future__ import annotations

import time

SOON, LONG = 2.0, 5.0
"""Seconds after which it can be told, since what is first done is slower; and from which it is worth a line."""


class Estimate:
    """Says how long `num` parts of `what` will take in all, where that is more than LONG seconds."""

    def __init__(self, what: str, num: int) -> None:
        self.what, self.num = what, num
        self.began = time.perf_counter()
        self.is_told = False

    def at(self, done: int) -> None:
        """`done` of the parts are done."""
        spent = time.perf_counter() - self.began
        if self.is_told or spent < SOON or not 0 < done < self.num:
            return
        self.is_told = True
        seconds = spent / done * self.num
        if seconds > LONG:
            print(f"{self.what}: about {seconds:.0f} s", flush=True)
