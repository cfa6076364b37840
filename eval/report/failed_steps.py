"""What a folder of a step for which a run ended tells, in words."""

from __future__ import annotations

from pathlib import Path

from eval.report.gather import read_json
from ssl.failed_step import STEP_FILE

MOST_NAMED = 4


def failed_step(folder: Path) -> str:
    """The step, why it failed, and some of its images; that it cannot be read, where it cannot."""
    try:
        card = read_json(folder / STEP_FILE)
    except (OSError, ValueError) as error:
        return f"{folder / STEP_FILE} cannot be read: {error}"
    images = card.get("images")
    images = images if isinstance(images, list) else []
    some = ", ".join(str(each) for each in images[:MOST_NAMED])
    told = f"step {card.get('step')}: {card.get('reason')}"
    return told + (f"; {len(images)} images, among them {some}" if images else "")
