"""The page of `eval.app` in a real browser: good and hostile images, by every way that a person may bring one."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.app.own_images import Group
from eval.app.uploads import Refused
from eval.head_file import save_head
from ssl import checkpoint
from tests.app_server import Served, png_of, serving
from tests.browser import PHONE, Browser, Visit, overflow
from tests.image_list import png
from tests.scenes import pretrained

DROP = """([name, text, kind]) => {
  const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const data = new DataTransfer();
  if (name !== null) data.items.add(new File([bytes], name, { type: "image/png" }));
  const target = document.getElementById("drop");
  if (kind === "paste") {
    document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
    return;
  }
  for (const type of ["dragenter", "dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
}"""


@pytest.fixture(scope="module")
def mae(tmp_path_factory) -> Iterator[Served]:
    run_dir = pretrained(tmp_path_factory.mktemp("mae") / "run", "mae")
    with serving(run_dir, "max_upload_mib=1") as found:
        yield found


@pytest.fixture(scope="module")
def headed(tmp_path_factory) -> Iterator[Served]:
    """A ResNet whose head names its classes in HTML."""
    run_dir = pretrained(tmp_path_factory.mktemp("simclr") / "run", "simclr")
    loaded = checkpoint.load_backbone(run_dir)
    save_head(
        run_dir / "eval" / "linear_probe.head",
        weight=torch.zeros(2, 16),
        bias=torch.tensor([2.0, 0.0]),
        classes=["<img src=x onerror=alert(1)>", "</script><b>b"],
        checkpoint=loaded.path,
        sha256=loaded.hash,
        features={"pooling": "model"},
        image_size=loaded.spec.image_size,
    )
    with serving(run_dir) as found:
        yield found


def opened(browser: Browser, served: Served, **how: Any) -> Visit:
    visit = browser.open(served.address, **how)
    visit.page.wait_for_selector("#example-list button")
    return visit


def finished(visit: Visit) -> str:
    """What is announced once an image was looked at, its reconstruction included."""
    visit.until(
        "() => /^Done/.test(document.getElementById('status').textContent) && "
        "document.getElementById('result').getAttribute('aria-busy') === 'false' && "
        "document.getElementById('maps-part').getAttribute('aria-busy') === 'false'",
    )
    return visit.page.inner_text("#status")


def complaint(visit: Visit) -> str:
    visit.page.wait_for_selector("#problem:not([hidden])")
    return visit.page.inner_text("#problem")


def choose(visit: Visit, data: bytes, name: str = "photo.png") -> None:
    visit.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})


def drop(visit: Visit, data: bytes | None, name: str = "photo.png", kind: str = "drop") -> None:
    text = base64.b64encode(data or b"").decode()
    visit.page.evaluate(DROP, [None if data is None else name, text, kind])


def train_image(served: Served, place: int) -> bytes:
    inspector = served.server.inspector
    return png(np.asarray(inspector.scene.source("train").read(int(inspector.bank.index[place]))))


def pictures_are_drawn(visit: Visit, selector: str) -> int:
    """How many pictures there are; each must have pixels."""
    visit.until(
        "(s) => [...document.querySelectorAll(s)].every((image) => image.complete && image.naturalWidth > 0)",
        arg=selector,
    )
    return visit.page.locator(selector).count()


@pytest.mark.parametrize("way", ["file", "drop", "paste"])
def test_the_copy_of_a_train_image_finds_itself_however_it_is_brought(browser, mae, way):
    visit = opened(browser, mae)
    data = train_image(mae, 3)
    choose(visit, data) if way == "file" else drop(visit, data, kind=way)
    assert "similarity 1.000" in finished(visit)
    first = visit.page.locator("#neighbours button").first
    assert "the same image" in first.get_attribute("aria-label")
    assert pictures_are_drawn(visit, "#neighbours img") == 12
    assert pictures_are_drawn(visit, "#maps img") >= 2
    assert pictures_are_drawn(visit, "#masked-part img") == 3
    visit.check(mae.address)


def test_a_neighbour_and_an_example_can_be_looked_at_by_keyboard(browser, mae):
    visit = opened(browser, mae)
    visit.page.locator("#example-list button").nth(1).focus()
    visit.page.keyboard.press("Enter")
    finished(visit)
    seen = visit.page.get_attribute("#seen", "src")
    visit.page.locator("#neighbours button").first.focus()
    visit.page.keyboard.press("Space")
    visit.until("(old) => document.getElementById('seen').src !== old", arg=seen)
    finished(visit)
    visit.page.keyboard.press("Tab")
    visit.check(mae.address)


def test_images_without_a_class_are_called_by_their_file_and_the_title_has_the_folder(browser, mae, monkeypatch):
    monkeypatch.setattr(Group, "truth", lambda self, place: None)
    monkeypatch.setattr(Group, "name", lambda self, place: f"a_folder_of_a_long_name/{place}.png")
    visit = opened(browser, mae)
    example = visit.page.locator("#example-list button").nth(1)
    assert example.inner_text() == "1.png"
    assert example.get_attribute("title") == "a_folder_of_a_long_name/1.png"
    example.click()
    assert "Done: 1.png." in finished(visit)
    first = visit.page.locator("#neighbours button").first
    named = first.locator(".truth").inner_text()
    assert re.fullmatch(r"\d+\.png", named)
    assert first.get_attribute("title") == f"a_folder_of_a_long_name/{named}"


def test_the_file_input_is_reached_by_the_tab_key_and_has_a_name(browser, mae):
    visit = opened(browser, mae)
    for _ in range(5):
        visit.page.keyboard.press("Tab")
        if visit.page.evaluate("document.activeElement.id") == "file":
            break
    assert visit.page.evaluate("document.activeElement.id") == "file"
    assert visit.page.get_by_label(re.compile("Drop an image here, or choose a file")).count() == 1
    assert visit.page.evaluate("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"


def test_the_reconstruction_follows_the_slider_and_the_button(browser, mae):
    visit = opened(browser, mae)
    visit.page.click("#example-list button")
    finished(visit)
    made = [visit.page.get_attribute("#masked", "src")]

    def changed() -> str:
        visit.until("(old) => document.getElementById('masked').src !== old", arg=made[-1])
        made.append(visit.page.get_attribute("#masked", "src"))
        return visit.page.inner_text("#masked-note")

    assert visit.page.input_value("#ratio") == "0.75"
    visit.page.focus("#ratio")
    visit.page.keyboard.press("Home")
    assert changed().startswith("2 of 64 patches hidden")
    assert visit.page.inner_text("#ratio-shown") == "2.0 %"
    visit.page.keyboard.press("End")
    assert changed().startswith("63 of 64 patches hidden")
    visit.page.click("#again")
    changed()
    assert len(set(made)) == 4
    visit.check(mae.address)


def test_a_method_without_reconstruction_shows_none(browser, headed):
    visit = opened(browser, headed)
    visit.page.click("#example-list button")
    finished(visit)
    assert not visit.page.is_visible("#masked-part")
    assert visit.page.is_visible("#maps-part")


def test_names_of_classes_are_text_whatever_they_hold(browser, headed):
    visit = opened(browser, headed)
    visit.page.on("dialog", lambda dialog: pytest.fail("a script of a class's name has run"))
    visit.page.click("#example-list button")
    assert "Class: <img src=x onerror=alert(1)>, 88 %" in finished(visit)
    assert visit.page.inner_text("#classes li >> nth=0").startswith("<img src=x onerror=alert(1)>")
    assert visit.page.locator("#classes img, #classes b").count() == 0
    visit.check(headed.address)


@pytest.mark.parametrize(
    ("way", "data", "words"),
    [
        (
            "file",
            b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
            "no JPEG, PNG, WebP, GIF or BMP image",
        ),
        ("drop", b"<!doctype html><script>alert(1)</script>", "no JPEG, PNG, WebP, GIF or BMP image"),
        ("file", b"", "No image came"),
        ("drop", bytes(2**20 + 1), "larger than the 1 MiB"),
    ],
)
def test_what_is_no_image_is_answered_in_words(browser, mae, way, data, words):
    visit = opened(browser, mae)
    name = "<img src=x onerror=alert(1)>.png"
    choose(visit, data, name) if way == "file" else drop(visit, data, name)
    assert words in complaint(visit)
    assert not visit.page.is_visible("#result")
    assert visit.errors == []
    drop(visit, train_image(mae, 1))  # and the page still works
    finished(visit)
    assert not visit.page.is_visible("#problem")


def test_a_bomb_and_a_cut_off_image_are_answered_in_words(browser, mae):
    visit = opened(browser, mae)
    choose(visit, png_of(50_000, 50_000))
    assert "more pixels than the 50 million" in complaint(visit)
    choose(visit, png(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8))[:9000])
    visit.until("() => /cut off/.test(document.getElementById('problem').textContent)")


def test_text_that_is_dropped_leaves_the_page_where_it_is(browser, mae):
    visit = opened(browser, mae)
    drop(visit, None)
    assert "no file" in complaint(visit)
    assert visit.page.url == mae.address


def test_a_name_of_a_file_is_text(browser, mae):
    visit = opened(browser, mae)
    drop(visit, train_image(mae, 1), name="<b>bold</b>.png")
    assert "<b>bold</b>.png" in finished(visit)
    visit.check(mae.address)


def test_a_busy_model_is_waited_for(browser, mae, monkeypatch):
    visit = opened(browser, mae)
    inspector, calls = mae.server.inspector, []
    whole = inspector.look

    def busy_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise Refused(503, "the model is busy", retry_after=1)
        return whole(*args, **kwargs)

    monkeypatch.setattr(inspector, "look", busy_once)
    visit.page.click("#example-list button")
    visit.until("() => /busy/.test(document.getElementById('status').textContent)")
    finished(visit)
    assert len(calls) == 2


def test_the_last_image_asked_for_is_the_one_that_is_shown(browser, mae):
    visit = opened(browser, mae)
    visit.page.evaluate("for (const each of document.querySelectorAll('#example-list button')) each.click()")
    visit.until("() => /^Done/.test(document.getElementById('status').textContent)")
    last = visit.page.locator("#example-list button span").last.inner_text()
    assert finished(visit).startswith(f"Done: {last}.")


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_can_be_read_in_both_colours(browser, mae, dark):
    visit = opened(browser, mae, viewport=PHONE, dark=dark, touch=True)
    visit.page.tap("#example-list button")
    finished(visit)
    assert overflow(visit) == 0
    back, ink = (visit.page.evaluate(f"getComputedStyle(document.body).{key}") for key in ("backgroundColor", "color"))
    assert contrast(back, ink) > 7
    visit.check(mae.address)


def contrast(*colours: str) -> float:
    """WCAG 2's contrast of two `rgb(r, g, b)`."""
    light = []
    for each in colours:
        values = [int(number) / 255 for number in re.findall(r"\d+", each)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_a_server_that_has_gone_is_told_in_words(browser, mae, tmp_path):
    run_dir = shutil.copytree(mae.server.inspector.scene.run_dir, tmp_path / "run")
    with serving(run_dir) as gone:
        visit = opened(browser, gone)
        assert pictures_are_drawn(visit, "#example-list img") == 4
    visit.page.click("#example-list button")
    assert "does not answer" in complaint(visit)


def test_a_page_of_another_site_gets_nothing(browser, mae, headed):
    """From another port, which is another origin: it can neither send an image nor read what is served."""
    visit = opened(browser, headed)
    found = visit.page.evaluate(
        """async (address) => {
          const tried = {};
          for (const [name, options] of Object.entries({
            read: {}, send: { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: "x" },
            blind: { method: "POST", mode: "no-cors", body: "x" },
          })) {
            try { tried[name] = (await fetch(address + (name === "read" ? "api/about" : "api/look"), options)).status; }
            catch (error) { tried[name] = "refused"; }
          }
          return tried;
        }""",
        mae.address,
    )
    assert found == {"read": "refused", "send": "refused", "blind": "refused"}


def test_the_run_folder_is_named_and_the_path_to_it_is_not(browser, mae):
    visit = opened(browser, mae)
    run_dir = Path(mae.server.inspector.scene.run_dir)
    assert visit.page.inner_text("#title") == f"Try {run_dir.name}"
    assert str(run_dir) not in visit.page.content()
