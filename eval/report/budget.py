"""What a run spends on its page: measured each time, kept over all its starts, and held under a share of its time."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from eval.report.gather import read_json

NAME = "report.json"
FIRST_PAGE = 0.5
"""Seconds that a page is taken to need before one was made. Measured on 2 cores: 0.1 to 0.3."""
FIRST_PICTURES = 3.0
"""Seconds that pictures of features are taken to need, beside those for the features, before any were made."""


@dataclass
class Budget:
    """Seconds that the refreshes of a run's page took, all starts of the run together."""

    seconds: float = 0.0
    page_seconds: float | None = None
    """Of the last page."""
    picture_seconds: float | None = None
    """Of the last pictures of features."""
    num_pages: int = 0
    num_pictures: int = 0
    num_left_out: int = 0
    """Refreshes that were left out as there was no time for them."""
    pictures_left_out: int = 0

    @classmethod
    def of(cls, run_dir: Path) -> Budget:
        """What earlier starts have spent; nothing where that cannot be read."""
        with contextlib.suppress(OSError, ValueError):
            kept = read_json(run_dir / NAME)
            names = {field.name for field in fields(cls)}
            good: dict[str, Any] = {
                k: v for k, v in kept.items() if k in names and isinstance(v, int | float) and v >= 0
            }
            return cls(**good)
        return cls()

    def keep(self, run_dir: Path) -> None:
        """Write it for the next start. Raises OSError where that is not possible."""
        partial = run_dir / f".{NAME}.{os.getpid()}"
        try:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
            os.replace(partial, run_dir / NAME)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def allows(self, seconds: float, *, train_seconds: float, max_share: float) -> bool:
        """Whether so many seconds more would still be within the share of the training time until now."""
        return self.seconds + seconds <= max_share * train_seconds

    def expected_page(self) -> float:
        """Seconds that the next page will take."""
        return FIRST_PAGE if self.page_seconds is None else self.page_seconds

    def expected_pictures(self, num_images: int, images_per_second: float | None) -> float:
        """Seconds that pictures of the features of so many images will take, training being as fast as that."""
        if self.picture_seconds is not None:
            return self.picture_seconds
        return FIRST_PICTURES + (num_images / images_per_second if images_per_second else FIRST_PICTURES)

    def add_page(self, seconds: float) -> None:
        """Count a page that was made."""
        self.seconds += seconds
        self.page_seconds = seconds
        self.num_pages += 1

    def add_pictures(self, seconds: float) -> None:
        """Count pictures that were made, or tried."""
        self.seconds += seconds
        self.picture_seconds = seconds
        self.num_pictures += 1
