"""Pictures in a page: their bytes are part of it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from eval.pages.page import render

MOST_BYTES = 600_000
"""Of a picture's file; a larger one is made smaller, as a page holds many."""
MOST_PIXELS = 40_000_000
WIDE = 640
"""Pixels from which on a picture has a row of its own; a phone does not make it as narrow but moves it in its box."""
FIGURE = """\
<figure class="picture{% if size[0] > WIDE %} wide{% endif %}">
<div class="scroll"{% if size[0] > WIDE %} tabindex="0"{% endif %}>
<img src="{{ uri }}" alt="{{ alt }}" width="{{ size[0] }}"
 height="{{ size[1] }}"></div>
{% if caption or note %}<figcaption>{{ caption }}{{ note }}</figcaption>{% endif %}</figure>
""".replace("WIDE", str(WIDE))
KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


def embedded(picture: Path | np.ndarray, alt: str, *, caption: str = "", most_bytes: int = MOST_BYTES) -> Markup:
    """A figure of a picture file (PNG or JPEG) or of uint8 (H, W, 3) pixels, with what it shows in words.

    Pictures of more than `most_bytes` become JPEGs of at most 1600 pixels a side, which the caption says. Raises
    ValueError for a file that is no picture, OSError where it cannot be read.
    """
    uri, size, note = data_uri(picture, most_bytes=most_bytes)
    return render(FIGURE, uri=uri, alt=alt, size=size, caption=caption, note=note)


def data_uri(picture: Path | np.ndarray, *, most_bytes: int = MOST_BYTES) -> tuple[str, tuple[int, int], str]:
    """(`data:` address, (width, height), note on what was made smaller) of a picture."""
    if isinstance(picture, Path):
        data = picture.read_bytes()
    else:
        data = as_png(picture)
    kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            size = image.size
            if size[0] * size[1] > MOST_PIXELS:
                raise ValueError(f"a picture of {size[0]} x {size[1]} pixels is too large for a page: {picture}")
            image.load()
            smaller = None
            if len(data) > most_bytes:
                smaller = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture if isinstance(picture, Path) else 'pixels'} is no picture: {error}") from error
    note = ""
    if smaller is not None:
        smaller.thumbnail((1600, 1600))
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=85)
        data, kind, size = buffer.getvalue(), "image/jpeg", smaller.size
        note = " (made smaller for this page)"
    return address(data, str(kind)), size, note


def as_png(pixels: np.ndarray) -> bytes:
    """An uint8 picture (H, W, 3) as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def address(data: bytes, kind: str = "image/png") -> str:
    """The `data:` address of a picture's file, of a type such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
