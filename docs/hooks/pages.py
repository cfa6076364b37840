"""What MkDocs is given beside the files in docs/: the page of config keys, and the notebooks as pages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HOOKS = Path(__file__).resolve().parent
ROOT = HOOKS.parents[1]
for folder in (HOOKS, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import eval  # noqa: E402, F401  # makes this project's ssl importable

# isort: split
import config_reference  # noqa: E402
import notebook_page  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    files.append(File.generated(config, "reference/config.md", content=config_reference.page()))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page.page(path)))
    return files
