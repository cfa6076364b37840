"""Debian's Chromium, driven by playwright: it notes what a page says on its console, its errors and its requests."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}


@dataclass
class Visit:
    """A page that was opened, and what it did meanwhile."""

    page: Any
    console: list[str] = field(default_factory=list)
    """Warnings and errors."""
    errors: list[str] = field(default_factory=list)
    """Exceptions that no script caught."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for, but for `data:` and `blob:`, which leave the browser not."""

    def until(self, script: str, arg: Any = None) -> None:
        """Wait until the function is true in the page. Playwright's own way evaluates text, which our policy bars."""
        last = time.monotonic() + 60
        while not self.page.evaluate(script, arg):
            assert time.monotonic() < last, script
            self.page.wait_for_timeout(20)

    def check(self, *own: str) -> None:
        """Assert that nothing went wrong, and that nothing but the addresses that begin with `own` was asked for."""
        assert self.errors == []
        assert self.console == []
        strange = [url for url in self.requests if not url.startswith(own)]
        assert own, "name the addresses that the page may ask for"
        assert strange == []


class Browser:
    """Opens pages, each in a context of its own; `close` ends them all."""

    def __init__(self, chromium: Any) -> None:
        self.chromium = chromium

    def open(
        self,
        address: Path | str,
        *,
        viewport: dict[str, int] | None = None,
        dark: bool = False,
        reduced_motion: bool = False,
        touch: bool = False,
    ) -> Visit:
        """Open a file or an address and wait until it is loaded."""
        context = self.chromium.new_context(
            viewport=viewport or DESKTOP,
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce" if reduced_motion else "no-preference",
            has_touch=touch,
        )
        context.set_default_timeout(60_000)
        visit = Visit(context.new_page())
        visit.page.on(
            "console", lambda said: visit.console.append(said.text) if said.type in ("error", "warning") else None
        )
        visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
        visit.page.on(
            "request",
            lambda asked: None if asked.url.startswith(("data:", "blob:")) else visit.requests.append(asked.url),
        )
        visit.page.goto(address.resolve().as_uri() if isinstance(address, Path) else address, wait_until="load")
        return visit


def overflow(visit: Visit) -> int:
    """Pixels by which a page is wider than its window."""
    return visit.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@contextlib.contextmanager
def opened() -> Iterator[Browser]:
    """Chromium; skips the test that asks, with a reason, where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield Browser(chromium)
        chromium.close()
