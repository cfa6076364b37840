"""What a command line asks to look at. Nothing slow is imported here: a list of the looks comes at once."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from eval.look.table import LOOKS, listing
from ssl.config import plain

USAGE = """eval.look needs ckpt= and what=:
  python -m eval.look ckpt=runs/<run> what=neighbours
  python -m eval.look ckpt=runs/<run> what=[views,map,clusters] num_images=12
  python -m eval.look ckpt=runs/<run> what=occlusion images=photo.jpg
  python -m eval.look ckpt=random model=resnet18 what=filters      an untrained backbone
  python -m eval.look ckpt=runs/<run> what=all                     all that apply
what= is one of these, or a list:
"""
NAMES = re.compile(r"\w+|\[\w+(,\w+)*\]")
"""What `what=` may be, where no sweep is asked for."""


def wanted(what: Any) -> list[str]:
    """The names that `what=` gives, each once. Raises ValueError with the list of them for one that is none."""
    given = plain(what)
    if given == "all":
        return list(LOOKS)
    names = list(dict.fromkeys([given] if isinstance(given, str) else given))
    unknown = [name for name in names if name not in LOOKS]
    if unknown or not names:
        raise ValueError(f"what={given} is no look; it is all, or one or several of\n{listing()}")
    return names


def end_early(words: Sequence[str]) -> None:
    """End the command, as it would later, where its words lack `ckpt` or `what` or name no look; flags are Hydra's."""
    if any(word.startswith("-") for word in words):
        return
    values = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in words)}
    if not {"ckpt", "what"} <= set(values):
        print(USAGE + listing(), file=sys.stderr)
        raise SystemExit(2)
    what = values["what"]
    if NAMES.fullmatch(what):
        try:
            wanted(what.strip("[]").split(",") if what.startswith("[") else what)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
