"""A page that shows maps of images: each is seen where it lies, by pointer, touch or keyboard. One file, offline."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eval.pages.page import Section, as_json, page, plotly_source, render
from eval.pages.pictures import address

HERE = Path(__file__).resolve().parent
QUALITY = 80
LIGHTEST, DARKEST = 0.62, 0.45
"""Lightness (of HLS) that colours have at least on dark ground and at most on light ground."""
BODY = """
<p class="soft" id="map-caution"></p>
<div class="controls" role="group" aria-label="Projection" id="map-projections"></div>
<div class="controls" role="group" aria-label="Classes shown" id="map-classes"></div>
<p class="soft small">Point at a dot, touch it, or focus a map (Tab) and walk with the arrow keys: the image appears
below, and its place in the other map is ringed. A click or Enter keeps it, Escape lets it go. Drag a box to enlarge a
part; a double click shows all again.</p>
<div class="map-grid" id="map-panels"></div>
<div class="map-card" id="map-card" aria-live="polite">
<div id="map-thumb" role="img" aria-label=""></div><p id="map-text"></p></div>
<img id="map-sprite" alt="" hidden src="{{ sprite }}">
"""
STYLE = """
.map-grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .75rem;
  padding: 1px; }
.map-grid figure { margin: 0; min-width: 0; }
.map-grid figcaption { font-size: .9rem; min-height: 2.6em; }
.map-plot { height: clamp(15rem, 55vh, 34rem); background: var(--back); box-shadow: 0 0 0 1px var(--line); }
.map-card.chosen { display: flex; gap: 1rem; align-items: center; position: sticky; bottom: 0;
  background: var(--back); border-top: 1px solid var(--line); padding: .5rem 0; min-height: 7.5rem; z-index: 2; }
.map-card:not(.chosen) > * { display: none; }
.map-card p { margin: 0; overflow-wrap: anywhere; min-width: 0; }
#map-thumb { flex: none; width: 6.5rem; height: 6.5rem; background-color: var(--panel); background-repeat: no-repeat;
  image-rendering: pixelated; }
#map-classes button { font-size: .9rem; padding: .1rem .6rem; min-height: 2rem; }
#map-classes svg { width: .9rem; height: .9rem; vertical-align: -.1rem; margin-right: .35rem; }
"""


@dataclass(frozen=True)
class Panel:
    """One map: its projection, of what, places (N, 2), what is said of it, and what it must not be read for."""

    projection: str
    title: str
    place: np.ndarray
    summary: str
    caution: str


def map_page(
    *,
    title: str,
    subject: str,
    panels: Sequence[Panel],
    thumbnails: np.ndarray,
    names: Sequence[str],
    labels: Sequence[str | None],
    groups: Sequence[str],
    number: np.ndarray,
    colours: Sequence[str],
    symbols: Sequence[str],
) -> str:
    """The page's HTML; thumbnails uint8 (N, t, t, 3); `number` (N,) is each image's group, with a colour each."""
    sprite, columns = sprite_sheet(thumbnails)
    values = {
        "panels": [
            {
                "projection": each.projection,
                "title": each.title,
                "x": each.place[:, 0],
                "y": each.place[:, 1],
                "summary": each.summary,
                "caution": each.caution,
            }
            for each in panels
        ],
        "names": list(names),
        "labels": list(labels),
        "groups": list(groups),
        "number": number,
        "light": [at_lightness(each, most=DARKEST) for each in colours],
        "dark": [at_lightness(each, least=LIGHTEST) for each in colours],
        "symbols": list(symbols),
        "columns": columns,
        "rows": math.ceil(len(thumbnails) / columns),
    }
    body = render(BODY, sprite=sprite) + as_json(values, "map-data")
    lead = render("<p>{{ subject }}.</p>", subject=subject)
    script = (HERE / "map_page.js").read_text(encoding="utf-8")
    return page(
        title, [Section("map", "Map", body)], lead=lead, scripts=[plotly_source(), script], styles=[STYLE], charts=False
    )


def sprite_sheet(thumbnails: np.ndarray) -> tuple[str, int]:
    """Thumbnails (N, t, t, 3) as one JPEG, row by row, as a data address; and how many stand in a row."""
    num, side = thumbnails.shape[:2]
    columns = math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    sheet = np.zeros((rows * columns, side, side, 3), np.uint8)
    sheet[:num] = thumbnails
    sheet = sheet.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "JPEG", quality=QUALITY)
    return address(stream.getvalue(), "image/jpeg"), columns


def at_lightness(colour: str, *, least: float = 0.0, most: float = 1.0) -> str:
    """A colour (#rrggbb) no darker than `least` and no lighter than `most`, of the same hue."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    changed = colorsys.hls_to_rgb(hue, min(max(lightness, least), most), saturation)
    return "#" + "".join(f"{round(255 * value):02x}" for value in changed)
