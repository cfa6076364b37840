"""A notebook as a page: its prose as it is, its code in blocks. Outputs are not kept in the repository."""

from __future__ import annotations

import json
from pathlib import Path


def page(path: Path) -> str:
    """The notebook in `path` as Markdown, with a link to the file itself."""
    cells = json.loads(path.read_text())["cells"]
    parts = [_cell(cell["cell_type"], "".join(cell["source"])) for cell in cells if cell["source"]]
    note = f"This page is the notebook `docs/notebooks/{path.name}`, which the tests run from top to bottom."
    return "\n\n".join([parts[0], note, *parts[1:]]) + "\n"


def _cell(kind: str, source: str) -> str:
    return source if kind == "markdown" else f"```python\n{source}\n```"
