"""The documentation site: it builds without a warning, every config key has a meaning, and nothing asks the network."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from tests.browser import DESKTOP, PHONE, overflow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs" / "hooks"))
    return importlib.import_module("config_reference")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


def test_every_key_of_every_command_has_a_type_a_default_and_a_meaning(reference):
    lacking = [
        f"{primary}: {key.name}"
        for primary in reference.COMMANDS
        for key in reference.keys(primary)
        if not (key.meaning and key.type and key.default)
    ]
    assert lacking == []


def test_every_command_of_conf_is_on_the_page_of_keys(reference):
    assert {path.stem for path in (ROOT / "conf").glob("*.yaml")} == set(reference.COMMANDS)


def test_the_page_has_every_key_of_a_composed_config(reference):
    listed = {key.name for key in reference.keys("pretrain")}
    text = (ROOT / "conf" / "method" / "mae.yaml").read_text()
    given = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "optim" / "adamw.yaml"))
    assert isinstance(given, dict)
    assert {f"optim.{key}" for key in given} <= listed
    assert {"trainer.steps", "launch.max_restarts", "wandb.mode", "method", "data.source", "seed"} <= listed
    assert "mask_ratio: 0.75" in text
    assert "mask_ratio: 0.75" in reference.page()


def test_a_default_on_the_page_is_that_of_the_yaml_where_it_sets_one(reference):
    keys = {key.name: key for key in reference.keys("knn")}
    given = OmegaConf.load(ROOT / "conf" / "knn.yaml")
    assert keys["k"].default == f"`{OmegaConf.to_container(given)['k']}`"  # pyright: ignore


def test_meanings_are_those_beside_the_fields(reference):
    found = reference._comments_in(
        "class A:\n    x: int = 1  # of x\n    y: int | None = (\n        None  # of y\n    )\n    z: int = 2\n"
    )
    assert found == {"x": "of x", "y": "of y", "z": ""}


@pytest.mark.parametrize("name", ["index.html", "look.html", "reference/config.html", "reference/python.html"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_page_opens_from_the_disk_and_asks_no_other_machine_for_anything(site, browser, name, viewport):
    visit = browser.open(site / name, viewport=viewport, dark=viewport is PHONE)
    assert visit.page.inner_text("h1").strip("¶ ")
    visit.check(site.as_uri())
    assert overflow(visit) <= 0


def test_the_search_finds_pages_that_were_opened_from_the_disk(site, browser):
    visit = browser.open(site / "index.html")
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("temperature")
    visit.page.wait_for_selector(".md-search-result__item")
    assert any("knn" in found.lower() for found in visit.page.locator(".md-search-result__item").all_inner_texts())
    visit.check(site.as_uri())


def test_commands_are_seen_whole_on_a_phone_and_copied_as_they_were_written(site, browser):
    visit = browser.open(site / "look.html", viewport=PHONE)
    block = visit.page.locator(".language-sh").first
    assert block.locator("code").evaluate("code => code.scrollWidth <= code.clientWidth")
    visit.page.evaluate("document.addEventListener('copy', () => { window.copied = document.activeElement.value })")
    block.locator("[data-clipboard-target]").evaluate("button => button.click()")
    written = re.findall(r"```sh\n(.*?)\n```", (ROOT / "docs" / "look.md").read_text(), re.DOTALL)[0]
    assert visit.page.evaluate("window.copied") == written


def test_every_page_of_the_navigation_is_built(site):
    nav = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1])
    assert nav
    assert [name for name in nav if not (site / name).with_suffix(".html").exists()] == []
