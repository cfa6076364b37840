"""`python -m eval.app`: what it says of an image, and what it does with requests that are not its page's."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import eval.app.server as app_server_module
import eval.app.uploads as uploads
from eval.app import connections
from eval.app.command import check_packages, main, run
from eval.app.guard import host_of, names_of
from eval.app.server import listen
from eval.app.uploads import Refused, decode_upload, read_body
from eval.app.worker import Worker
from eval.head_file import save_head
from eval.look import attention_maps
from eval.look.scene import Scene
from eval.predict import load_predictor
from ssl import checkpoint, pretrain
from tests.app_server import Served, app_config, png_of, serving
from tests.image_list import jpeg, png
from tests.scenes import EMBEDDED, SHORT, TINY_RESNET, compose_config, pretrained

CLASSES = ["ant", "bee", "<b>cat</b>"]
TINY_CONVNEXT = ["model=convnext_t", "+model.args.depths=[1,1,1,1]", "+model.args.dims=[8,8,16,16]"]
SMALL_LIMITS = ["max_upload_mib=1", "max_megapixels=2"]


@pytest.fixture(scope="module")
def simclr(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("simclr") / "run", "simclr")


@pytest.fixture(scope="module")
def mae(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("mae") / "run", "mae")


@pytest.fixture(scope="module")
def served(simclr) -> Iterator[Served]:
    with serving(simclr, *SMALL_LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def served_mae(mae) -> Iterator[Served]:
    with serving(mae) as found:
        yield found


def scene_of(served: Served) -> Scene:
    return served.server.inspector.scene


def train_image(served: Served, place: int) -> np.ndarray:
    """One of the images among which neighbours are looked for, (H, W, 3)."""
    inspector = served.server.inspector
    return np.asarray(inspector.scene.source("train").read(int(inspector.bank.index[place])))


def similarities(served: Served, image: np.ndarray) -> torch.Tensor:
    """Cosine similarity (N,) of an image to each of the bank, by the backbone and the definition alone."""
    scene, inspector = scene_of(served), served.server.inspector
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (scene.mean, scene.std))

    def normalised(pixels: np.ndarray) -> torch.Tensor:
        return (torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255 - mean) / std

    every = torch.stack([normalised(train_image(served, place)) for place in range(len(inspector.bank))])
    with torch.no_grad():
        bank = scene.backbone(every)  # (N, D)
        own = scene.backbone(normalised(image)[None])  # (1, D)
    return torch.cosine_similarity(own, bank)


def picture(url: str) -> np.ndarray:
    """The pixels of a data: URL."""
    head, _, text = url.partition(",")
    assert head == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))))


def noisy(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


# ---- what is said of an image --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["served", "served_mae"])
def test_the_copy_of_a_train_image_finds_that_image_first(which, request):
    served = request.getfixturevalue(which)
    for place in (0, 7):
        first = served.post("/api/look", png(train_image(served, place))).values["neighbours"][0]
        assert (first["place"], first["same"]) == (place, True)
        assert first["similarity"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("which", ["served", "served_mae"])
def test_neighbours_are_the_most_similar_images_in_order(which, request):
    served = request.getfixturevalue(which)
    image = noisy()
    found = served.post("/api/look", png(image)).values["neighbours"]
    expected = similarities(served, image)
    assert len(found) == 12
    best = expected.topk(12).values
    torch.testing.assert_close(torch.tensor([each["similarity"] for each in found]), best, atol=1e-5, rtol=1e-4)
    own = expected[[each["place"] for each in found]]  # places of equal similarity may change theirs
    torch.testing.assert_close(own, best, atol=1e-5, rtol=1e-4)


def test_a_train_image_that_is_picked_is_not_its_own_neighbour(served):
    path = "/api/look?group=train&place=5"
    picked = served.post(path).values
    uploaded = served.post("/api/look", png(train_image(served, 5))).values
    assert picked["seen"] == uploaded["seen"]
    assert 5 not in [each["place"] for each in picked["neighbours"]]
    assert uploaded["neighbours"][0]["place"] == 5
    assert len(picked["neighbours"]) == len(uploaded["neighbours"])


def test_an_example_from_train_is_not_its_own_neighbour_either(simclr):
    with serving(simclr, "split=train", "sample=64", "indices=[9]") as found:
        neighbours = found.post("/api/look?group=examples&place=0").values["neighbours"]
    assert 9 not in [each["place"] for each in neighbours]  # all 64 are in the bank, so a place is an index


def test_without_a_head_the_class_is_a_vote_and_is_called_one(served):
    image = noisy(seed=3)
    found = served.post("/api/look", png(image)).values["prediction"]
    closeness, place = similarities(served, image).topk(20)
    labels = served.server.inspector.bank.labels
    votes: dict[str, float] = {}
    for value, index in zip(closeness.tolist(), place.tolist()):
        name = scene_of(served).classes[labels[index]]
        votes[name] = votes.get(name, 0.0) + np.exp(value / 0.07)
    expected = {name: value / sum(votes.values()) for name, value in votes.items()}
    assert found["by"] == "vote"
    assert "no probabilities" in found["how"]
    for each in found["classes"]:
        assert each["score"] == pytest.approx(expected[each["class"]], abs=1e-4)
    assert found["classes"][0]["class"] == max(expected, key=expected.get)


def test_with_a_head_the_class_is_that_of_eval_predict(simclr, tmp_path):
    run_dir = shutil.copytree(simclr, tmp_path / "run")
    loaded = checkpoint.load_backbone(run_dir)
    generator = torch.Generator().manual_seed(3)
    save_head(
        run_dir / "eval" / "linear_probe.head",
        weight=torch.randn(3, 16, generator=generator),
        bias=torch.randn(3, generator=generator),
        classes=CLASSES,
        checkpoint=loaded.path,
        sha256=loaded.hash,
        features={"pooling": "model"},
        image_size=loaded.spec.image_size,
    )
    (tmp_path / "one.png").write_bytes(png(noisy(50, 40)))
    (expected,) = load_predictor(run_dir, device="cpu", precision="fp32", threads=1)([tmp_path / "one.png"])
    with serving(run_dir) as found:
        said = found.post("/api/look", png(noisy(50, 40))).values["prediction"]
    assert said["by"] == "head"
    assert [each["class"] for each in said["classes"]] == expected.classes
    assert [each["score"] for each in said["classes"]] == pytest.approx(expected.scores, abs=1e-5)


def test_a_convnet_shows_its_gradients_and_a_vision_transformer_its_attention_too(served, served_mae):
    for each, titles in (
        (served, ["Grad-CAM", "SmoothGrad"]),
        (served_mae, ["Attention", "Roll-out", "Grad-CAM", "SmoothGrad"]),
    ):
        maps = each.post("/api/maps", png(noisy())).values["maps"]
        assert [found["title"] for found in maps] == titles
        for found in maps:
            pixels = picture(found["picture"])
            assert min(pixels.shape[:2]) >= 224
            assert np.ptp(pixels.mean(-1)) > 20


def test_the_attention_that_is_shown_is_brightest_where_the_class_token_looks(served_mae):
    """The bluest patch, of viridis' dark end, is the least, the yellowest the most of what timm's layer computes."""
    image = noisy(seed=5)
    scene = scene_of(served_mae)
    shown = served_mae.server.inspector.shown(image)
    kept = []
    block = scene.backbone.blocks[-1].attn
    handle = block.qkv.register_forward_hook(lambda module, given, output: kept.append(output))
    try:
        with torch.no_grad():
            scene.backbone(shown.image)
    finally:
        handle.remove()
    query, key, _ = kept[0].reshape(1, -1, 3, block.num_heads, block.head_dim).permute(2, 0, 3, 1, 4)
    attention = (query @ key.transpose(-2, -1) * block.head_dim**-0.5).softmax(-1).mean(1)[0, 0, 1:]  # (N,)
    (found,) = [
        each for each in served_mae.post("/api/maps", png(image)).values["maps"] if each["title"] == "Attention"
    ]
    pixels = picture(found["picture"]).astype(float)
    grid = int(len(attention) ** 0.5)
    side = pixels.shape[0] // grid
    yellow = pixels[:, :, 0] - pixels[:, :, 2]  # the gray image beneath adds to both alike
    cells = yellow.reshape(grid, side, grid, side).mean((1, 3)).reshape(-1)
    assert np.corrcoef(cells, attention.numpy())[0, 1] > 0.8
    assert cells.argmax() == int(attention.argmax())


def test_the_reconstruction_keeps_what_is_seen_and_makes_the_rest(served_mae):
    image = train_image(served_mae, 2)
    found = served_mae.post("/api/reconstruct?ratio=0.5&mask=1", png(image)).values
    made, seen = picture(found["made"]), picture(found["seen"])
    grid = served_mae.server.inspector.method.grid_size
    assert (found["hidden"], found["of"]) == (grid[0] * grid[1] // 2, grid[0] * grid[1])
    visible = (seen == image).all(-1)
    assert visible.mean() == pytest.approx(0.5, abs=0.05)
    assert (made[visible] == image[visible]).all()
    assert (made[~visible] != image[~visible]).any()


def test_masks_follow_from_their_number_and_the_ratio(served_mae):
    image = png(train_image(served_mae, 2))

    def seen(ratio: float, mask: int) -> str:
        return served_mae.post(f"/api/reconstruct?ratio={ratio}&mask={mask}", image).values["seen"]

    assert seen(0.5, 1) == seen(0.5, 1)
    assert len({seen(0.5, 1), seen(0.5, 2), seen(0.75, 1)}) == 3


def test_the_error_of_a_reconstruction_is_over_hidden_pixels_in_units_of_0_to_1(served_mae):
    image = train_image(served_mae, 2)
    found = served_mae.post("/api/reconstruct?ratio=0.75&mask=4", png(image)).values
    seen, made = picture(found["seen"]), picture(found["made"])
    hidden = (seen == 128).all(-1)
    difference = (made[hidden].astype(float) - image[hidden]) / 255
    # The picture is cut off at 0 and 1 and rounded; the error is not.
    assert found["error"] == pytest.approx(np.square(difference).mean(), rel=0.2)


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "0.999", "nan", "inf", "many", "1e999"])
def test_a_ratio_that_hides_nothing_or_all_is_refused(served_mae, ratio):
    answer = served_mae.post(f"/api/reconstruct?ratio={ratio}&mask=0", png(noisy()))
    assert answer.status == 400
    assert "ratio must" in answer.values["error"]


def test_a_method_that_hides_nothing_has_no_reconstruction(served):
    assert served.get("/api/about").values["reconstruction"] is None
    assert served.post("/api/reconstruct?ratio=0.5&mask=0", png(noisy())).status == 404


@pytest.mark.parametrize("method", ["simmim", "relative_location"])
def test_checkpoints_of_the_other_methods_are_served(tmp_path, method):
    """SimMIM, which hides squares of a ConvNeXt's image; relative location, which hides nothing."""
    backbone = TINY_CONVNEXT if method == "simmim" else [*TINY_RESNET, "method.hidden_dim=32"]
    pretrain.run(compose_config("pretrain", [f"method={method}", *backbone, *EMBEDDED, *SHORT]), out=tmp_path / "run")
    with serving(tmp_path / "run") as found:
        assert len(found.post("/api/look", png(noisy())).values["neighbours"]) == 12
        answer = found.post("/api/reconstruct?ratio=0.5&mask=0", png(noisy()))
        if method == "simmim":
            hidden = (picture(answer.values["seen"]) == 128).all(-1)
            assert hidden.mean() == pytest.approx(answer.values["hidden"] / answer.values["of"], abs=0.02)
        else:
            assert answer.status == 404


def test_attention_is_read_from_one_copy_of_the_backbone(served_mae, monkeypatch):
    monkeypatch.setattr(attention_maps.copy, "deepcopy", lambda model: pytest.fail("it was copied for a request"))
    assert served_mae.post("/api/maps", png(noisy())).status == 200


@pytest.mark.parametrize("model", ["vit_micro", "resnet10"])
def test_an_untrained_backbone_is_served(model):
    with serving("random", f"model={model}", *EMBEDDED) as found:
        answer = found.post("/api/look", png(noisy())).values
    assert answer["prediction"]["by"] == "vote"
    assert len(answer["neighbours"]) == 12


# ---- formats -------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_each_format_is_decoded_to_its_pixels(kind):
    image = Image.fromarray(np.full((20, 30, 3), (200, 90, 30), np.uint8))
    pixels, notes = decode_upload(
        encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})), channels=3, max_pixels=600
    )
    assert np.abs(pixels.astype(int) - np.array(image)).max() <= (2 if kind == "JPEG" else 0)
    assert notes == []


def test_an_animation_is_its_first_frame_and_that_is_said():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (255, 0)]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        pixels, notes = decode_upload(data, channels=3, max_pixels=64)
        assert (pixels == 255).all()
        assert "first frame" in notes[0]


def test_a_photo_that_a_phone_has_turned_is_upright():
    image = Image.fromarray(np.zeros((10, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels, _ = decode_upload(encoded(image, "JPEG", exif=exif), channels=3, max_pixels=400)
    assert pixels.shape == (40, 10, 3)


def test_cmyk_and_16_bit_images_have_their_colours():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    pixels, _ = decode_upload(encoded(cmyk, "JPEG"), channels=3, max_pixels=64)
    assert np.abs(pixels[0, 0].astype(int) - np.array(cmyk.convert("RGB"))[0, 0]).max() <= 4
    white = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    assert (decode_upload(encoded(white, "PNG"), channels=3, max_pixels=64)[0] == 255).all()


# ---- hostile images ------------------------------------------------------------------------------------------------


def webp_of(width: int, height: int) -> bytes:
    """A WebP file whose extended header promises so many pixels."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose frame header was changed to promise so many pixels."""
    data = bytearray(jpeg(noisy(16, 16)))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (4, 4)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


BOMBS = {
    "png": png_of(50_000, 50_000),
    "png a little above the limit": png_of(2001, 1000),
    "webp": webp_of(16_000, 16_000),
    "jpeg": jpeg_of(65_000, 65_000),
    "gif": gif_of(65_000, 65_000),
    "bmp": bmp_of(60_000, 60_000),
}


@pytest.mark.parametrize("bomb", list(BOMBS))
def test_too_many_pixels_are_refused_from_the_header_alone(served, monkeypatch, bomb):
    Image.init()  # some plugins load an image of their own when they are imported
    monkeypatch.setattr(uploads, "decode", lambda *a, **k: pytest.fail("it was decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda *a, **k: pytest.fail("it was loaded"))
    answer = served.post("/api/look", BOMBS[bomb])
    assert answer.status == 413
    assert "million" in answer.values["error"]


def test_a_webp_canvas_is_measured_before_pillow_makes_it(monkeypatch):
    monkeypatch.setattr(uploads.Image, "open", lambda *a, **k: pytest.fail("Pillow has opened it"))
    for data in (webp_of(16_000, 16_000), _webp_body(b"VP8L"), _webp_body(b"VP8 ")):
        with pytest.raises(Refused, match="16,000 x 16,000 pixels, more than the 2 million"):
            decode_upload(data, channels=3, max_pixels=2_000_000)


def _webp_body(kind: bytes) -> bytes:
    """The first bytes of a WebP file of 16,000 x 16,000 pixels, after RFC 9649."""
    if kind == b"VP8L":
        bits = 15_999 | 15_999 << 14
        body = b"\x2f" + struct.pack("<I", bits)
    else:
        body = b"\x00\x00\x00\x9d\x01\x2a" + struct.pack("<HH", 16_000, 16_000)
    body = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("size", [(1, 1), (300, 200), (200, 300)])
def test_the_webp_header_is_read_as_pillow_reads_it(size):
    image = Image.new("RGB", size)
    alpha = Image.new("RGBA", size, (1, 2, 3, 4))
    for data in (encoded(image, "WEBP"), encoded(image, "WEBP", lossless=True), encoded(alpha, "WEBP")):
        assert uploads.webp_size(data) == size


def test_a_jpeg_of_endless_scans_is_refused(served):
    data = encoded(Image.fromarray(noisy(64, 64)), "JPEG", progressive=True)
    assert served.post("/api/look", data).status == 200
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    answer = served.post("/api/look", data[:end] + data[start:end] * 200 + data[end:])
    assert (answer.status, "scans" in answer.values["error"]) == (422, True)


def test_a_photo_with_a_second_view_is_a_jpeg_of_as_few_scans_and_not_animated():
    """Phones write a preview behind the photo, found by an MPF segment."""
    views = [Image.fromarray(noisy(64, 64, seed)) for seed in (0, 1)]
    data = encoded(views[0], "MPO", save_all=True, append_images=views[1:], progressive=True)
    pixels, notes = decode_upload(data, channels=3, max_pixels=64 * 64)
    assert np.corrcoef(pixels.reshape(-1), noisy(64, 64, 0).reshape(-1))[0, 1] > 0.5
    assert notes == []
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    with pytest.raises(Refused, match="scans"):
        decode_upload(data[:second] + data[first:second] * 200 + data[second:], channels=3, max_pixels=64 * 64)


@pytest.mark.parametrize(
    "data",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b'<?xml version="1.0"?><svg/>',
        b"<!doctype html><script>alert(1)</script>",
        b"%PDF-1.7 %\xe2\xe3",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00",
        b"no image at all",
        bytes(1000),
    ],
)
def test_what_is_no_photo_is_refused_by_its_content(served, data):
    answer = served.ask("POST", "/api/look", data, {"Content-Type": "image/png"})
    assert answer.status == 415
    assert "no JPEG, PNG, WebP, GIF or BMP image" in answer.values["error"]


def test_a_tiff_is_refused_although_pillow_reads_it(served):
    assert served.post("/api/look", encoded(Image.new("RGB", (8, 8)), "TIFF")).status == 415


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_an_image_that_is_cut_off_is_refused_in_words(served, kind):
    whole = encoded(Image.fromarray(noisy(200, 200)), kind)
    for share in (0.5, 0.01):
        answer = served.post("/api/look", whole[: int(len(whole) * share)])
        assert answer.status in (415, 422)
        words = answer.values["error"]
        assert "Traceback" not in words
        assert "0x" not in words


def test_no_image_is_an_error_in_words(served):
    answer = served.post("/api/look")
    assert (answer.status, answer.values["error"]) == (400, "no image came with the request; choose one")


# ---- too many bytes ------------------------------------------------------------------------------------------------


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(served):
    with served.connect() as connection:
        connection.sendall(head("Content-Length: 1000000000000"))
        assert b"413 " in connection.recv(100)


def test_a_body_without_a_length_is_refused_when_the_limit_is_passed(served):
    """An endless one is given up with at most the limit in memory, and what the network holds on its way."""
    chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
    sent = 0
    with served.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        try:
            while sent < 2**28:
                connection.sendall(chunk)
                sent += 2**16
        except OSError:
            pass
    assert 2**20 <= sent < 2**27
    assert served.post("/api/look", png(noisy())).status == 200


def test_reading_a_body_stops_with_the_piece_that_passes_the_limit():
    asked = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal asked
        while True:
            asked += 1
            yield bytes(100)

    with pytest.raises(Refused, match="larger than"):
        asyncio.run(read_body(pieces(), declared="50", limit=1000))  # the header lies
    assert asked == 11


def test_a_body_of_exactly_the_limit_is_read():
    async def pieces() -> AsyncIterator[bytes]:
        yield b"ab"
        yield b"cd"

    assert asyncio.run(read_body(pieces(), declared=None, limit=4)) == b"abcd"
    with pytest.raises(Refused):
        asyncio.run(read_body(pieces(), declared=None, limit=3))


def test_a_length_that_is_too_short_cuts_the_image_off(served):
    data = png(noisy(64, 64))
    with served.connect() as connection:
        connection.sendall(head(f"Content-Length: {len(data) // 2}") + data)
        assert b" 422 " in connection.recv(100)


def test_a_body_that_does_not_come_is_given_up(served, monkeypatch):
    monkeypatch.setattr(app_server_module, "BODY_SECONDS", 0.1)
    with served.connect() as connection:
        connection.sendall(head("Content-Length: 1000") + b"some")
        assert b" 408 " in connection.recv(100)
    assert served.post("/api/look", png(noisy())).status == 200


def test_a_sender_that_hangs_up_costs_nothing(served):
    for _ in range(20):  # more than the places there are for bodies
        with served.connect() as connection:
            connection.sendall(head("Content-Length: 1000") + b"some")
    last = time.monotonic() + 20  # when a connection is gone is the network's to say; bodies are waited for longer
    while served.post("/api/look", png(noisy())).status == 503:
        assert time.monotonic() < last


def head(*lines: str) -> bytes:
    given = ["POST /api/look HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/octet-stream", *lines]
    return "\r\n".join([*given, "", ""]).encode()


def test_connections_without_a_whole_head_do_not_keep_others_out_for_long(served, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1.0)
    with contextlib.ExitStack() as held:
        idle = [held.enter_context(served.connect()) for _ in range(80)]
        for place, connection in enumerate(idle):
            connection.sendall(b"GET / HTTP/1.1\r\nHost"[: place % 40])
        assert served.get("/").status == 503
        for connection in idle:
            assert connection.recv(1) == b""
    assert served.get("/").status == 200


def test_a_body_that_nobody_asked_for_keeps_no_connection_by_trickling(served, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    last = time.monotonic() + 10
    with served.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(1 << 20).startswith(b"HTTP/1.1 200")
        while not select.select([connection], [], [], 0.05)[0] or connection.recv(1 << 20):
            connection.sendall(b"x")
            assert time.monotonic() < last


def test_an_answer_may_take_longer_than_a_head(served, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    never, look = threading.Event(), served.server.inspector.look

    def slow(*args, **kwargs):
        never.wait(0.6)
        return look(*args, **kwargs)

    monkeypatch.setattr(served.server.inspector, "look", slow)
    assert served.post("/api/look?group=train&place=0").status == 200


def test_nothing_is_written_while_images_come(served, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_dir = scene_of(served).run_dir
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    created = []
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "SpooledTemporaryFile", lambda *a, **k: created.append(a))
        patched.setattr(tempfile, "NamedTemporaryFile", lambda *a, **k: created.append(a))
        assert served.post("/api/look", png(noisy(550, 600))).status == 200  # nearly 1 MiB
        with served.connect() as connection:  # only announced: what is not read may break the pipe of who sends it
            connection.sendall(head(f"Content-Length: {2**20 + 1}"))
            assert b" 413 " in connection.recv(100)
    assert created == []
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


# ---- who may ask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "a@localhost", "", "[::1"]
)
def test_a_name_that_is_not_the_servers_is_refused(served, host):
    for path in ("/", "/api/about"):
        assert served.get(path, Host=host).status == 400
    assert served.post("/api/look", png(noisy()), Host=host).status == 400


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000"])
def test_the_servers_own_names_are_answered(served, host):
    assert served.get("/", Host=host).status == 200


def test_a_server_on_all_interfaces_has_every_address_but_no_other_name():
    names = names_of("0.0.0.0", ["proxy.example"])
    assert "192.168.0.7:8000" in names
    assert "[fe80::1]:80" in names
    assert "proxy.example" in names
    assert "evil.example" not in names
    assert "192.168.0.7.evil.example" not in names
    assert host_of("host:port") == ""


@pytest.mark.parametrize("header", ["", "host:port", "[::1", "a@localhost"])
def test_a_malformed_name_is_no_name_of_a_server_that_has_none(header):
    names = names_of("")  # on all interfaces, IPv6's too
    assert header not in names
    assert "192.168.0.7:8000" in names


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://[", "Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_another_page_cannot_send_images(served, headers):
    answer = served.post("/api/look", png(noisy()), **headers)
    assert answer.status == 403
    assert "only the page of this server" in answer.values["error"]


def test_the_own_page_can_send_images(served):
    origin = served.address.rstrip("/")
    answer = served.post("/api/look", png(noisy()), Origin=origin, Sec_Fetch_Site="same-origin")
    assert answer.status == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""]
)
def test_what_a_form_of_another_page_could_send_is_refused(served, kind):
    assert served.ask("POST", "/api/look", png(noisy()), {"Content-Type": kind}).status == 415


def test_every_answer_has_the_headers_of_a_closed_page(served):
    answers = [
        served.get("/"),
        served.get("/app.js"),
        served.get("/api/picture/train/0"),
        served.get("/none"),
        served.get("/", Host="evil.example"),
        served.post("/api/look", b"x"),
        served.post("/api/look", bytes(2**20 + 1)),
        served.post("/api/look", b"", Origin="null"),
        served.ask("OPTIONS", "/api/look", headers={"Origin": "http://evil.example"}),
    ]
    assert [each.status for each in answers] == [200, 200, 200, 404, 400, 415, 413, 403, 405]
    for each in answers:
        policy = each.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert each.headers["x-content-type-options"] == "nosniff"
        assert each.headers["cache-control"] == "no-store"
        assert not any(name.startswith("access-control") for name in each.headers)
        assert "server" not in each.headers
        if each.status >= 400:
            assert each.headers["content-type"] == "application/json"
            assert set(each.values) == {"error"}


def test_the_page_names_nothing_outside_the_server(served):
    for path in ("/", "/app.css", "/app.js"):
        text = served.get(path).body.decode()
        assert not re.search(r"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text, re.I)
        assert "innerHTML" not in text


# ---- what is the server's own --------------------------------------------------------------------------------------


def test_a_picture_is_that_of_the_image_at_its_place(served):
    found = np.array(Image.open(io.BytesIO(served.get("/api/picture/train/4").body)))
    large = Image.fromarray(train_image(served, 4)).resize((96, 96), Image.Resampling.BICUBIC)
    assert np.abs(found.astype(int) - np.array(large)).mean() < 1


@pytest.mark.parametrize(
    "path",
    [
        *["/api/picture/train/48", "/api/picture/train/-1", "/api/picture/train/99999999999999999999"],
        *["/api/picture/other/0", "/api/picture/train/0.5", "/api/picture/examples/4", "/api/picture/../page.html"],
        *["/../../../../etc/passwd", "/..%2f..%2f..%2fetc%2fpasswd", "/app.js/../../../pyproject.toml", "/page.html"],
    ],
)
def test_nothing_else_than_the_servers_images_can_be_asked_for(served, path):
    answer = served.get(path)
    assert answer.status == 404
    assert b"root:" not in answer.body


@pytest.mark.parametrize("query", ["group=train&place=48", "group=train&place=-1", "group=x&place=0", "place=0"])
def test_an_image_that_there_is_not_cannot_be_looked_at(served, query):
    assert served.post(f"/api/look?{query}").status == 404


def test_an_image_by_its_name_and_another_in_the_body_is_refused(served):
    assert served.post("/api/look?group=train&place=0", png(noisy())).status == 400


def test_names_of_images_do_not_tell_where_they_lie(simclr, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_bytes(png(noisy()))
    with serving(simclr, f"images={tmp_path}/photos") as found:
        (example,) = found.get("/api/about").values["examples"]
        assert found.post("/api/look?group=examples&place=0").status == 200
        assert str(tmp_path) not in found.get("/api/about").body.decode()
    assert example["name"] == "photos/one.png"


def test_a_mistake_of_ours_is_told_without_its_details(served, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("in /a/secret.py")

    monkeypatch.setattr(served.server.inspector, "look", broken)
    answer = served.post("/api/look", png(noisy()))
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert b"Traceback" not in answer.body
    monkeypatch.undo()
    assert served.post("/api/look", png(noisy())).status == 200


# ---- one thread ----------------------------------------------------------------------------------------------------


def test_more_jobs_than_have_a_place_are_sent_away():
    async def crowd() -> list:
        worker, begun, end = Worker(queue=1, seconds=20), threading.Event(), threading.Event()

        def slow() -> str:
            begun.set()
            end.wait(20)
            return "done"

        first = asyncio.create_task(worker.run(slow))
        await asyncio.to_thread(begun.wait, 20)
        second = asyncio.create_task(worker.run(lambda: "second"))
        await asyncio.wait({second}, timeout=0.01)
        with pytest.raises(Refused) as sent_away:
            await worker.run(lambda: "third")
        end.set()
        found = [sent_away.value.status, sent_away.value.retry_after, await first, await second]
        return [*found, await worker.run(lambda: "later")]

    assert asyncio.run(crowd()) == [503, 2, "done", "second", "later"]


def test_a_job_that_takes_too_long_is_given_up_and_keeps_its_place_until_it_ends():
    async def wait() -> list:
        worker, end = Worker(queue=0, seconds=0.05), threading.Event()
        found = []
        for _ in range(2):
            with pytest.raises(Refused) as error:
                await worker.run(end.wait, 20)
            found.append(str(error.value)[:15])
        assert not worker.is_idle
        end.set()
        return found

    assert asyncio.run(wait()) == ["this took longe", "the model is bu"]


def test_who_waits_when_the_server_stops_is_told_so():
    async def stop() -> list:
        worker, end, begun = Worker(queue=1, seconds=20), threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            end.wait(20)

        waiting = [asyncio.create_task(worker.run(job)) for job in (slow, slow)]
        await asyncio.to_thread(begun.wait, 20)
        worker.close()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        end.set()
        with pytest.raises(Refused, match="being stopped"):
            await worker.run(slow)
        return [(type(each), str(each)) for each in found]

    assert asyncio.run(stop()) == [(Refused, "the server is being stopped")] * 2


def test_jobs_run_one_at_a_time():
    at_once, most = 0, 0

    def job() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        threading.Event().wait(0.005)
        at_once -= 1

    async def many() -> None:
        worker = Worker(queue=8, seconds=20)
        await asyncio.gather(*(worker.run(job) for _ in range(6)))

    asyncio.run(many())
    assert most == 1


def test_a_busy_server_says_when_to_come_again(served, monkeypatch):
    monkeypatch.setattr(served.server, "worker", Worker(queue=0, seconds=20))
    end, begun = threading.Event(), threading.Event()

    def slow(*args, **kwargs) -> dict:
        begun.set()
        end.wait(20)
        return {}

    monkeypatch.setattr(served.server.inspector, "look", slow)
    waiting = threading.Thread(target=served.post, args=("/api/look", png(noisy())))
    waiting.start()
    begun.wait(20)
    try:
        answer = served.post("/api/look", png(noisy()))
    finally:
        end.set()
        waiting.join(20)
    assert (answer.status, answer.headers["retry-after"]) == (503, "2")


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["port=70000"], "port must lie in 0..65535"),
        (["max_upload_mib=0"], "max_upload_mib must be above 0"),
        (["queue=-1"], "queue must be 0 or more"),
        (["neighbours=0"], "neighbours must be at least 1"),
        (["sample=0"], "sample must be at least 1"),
        (["images=gone.png"], "gone.png does not exist"),
        (["indices=[24]"], "indices must lie in 0..23"),
    ],
)
def test_settings_that_make_no_sense_are_refused(simclr, words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(app_config(simclr, "port=0", *words))


def test_voters_without_a_vote_are_refused(simclr, tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(3):
        (tmp_path / "train" / f"{number}.png").write_bytes(png(noisy(seed=number)))
    with pytest.raises(ValueError, match="k=5 has no effect: no image of train has a class"):
        run(app_config(simclr, "port=0", "k=5", "data=folder", f"data.root={tmp_path}/train"))


def test_a_port_that_is_taken_is_said_before_images_are_read(simclr):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on host=127.0.0.1 port={port}: .*give another port="):
            run(app_config(simclr, f"port={port}"))


def test_a_package_that_is_missing_is_named_with_how_to_install_it():
    with pytest.raises(ValueError, match=r"eval\.app needs no_such_package, .*uv sync --extra app"):
        check_packages(("uvicorn", "no_such_package"))


def test_the_command_serves_until_it_is_interrupted(simclr, monkeypatch, capsys):
    """In this process, of which Ctrl-C reaches the main thread, as it does of a command's own."""
    places: list[socket.socket] = []

    def listening(host: str, port: int) -> socket.socket:
        places.append(listen(host, port))
        return places[-1]

    monkeypatch.setattr(app_server_module, "listen", listening)
    before = signal.getsignal(signal.SIGINT)
    answered, returned = [], threading.Event()

    def ask_and_interrupt() -> None:
        try:
            while not places and not returned.wait(0.01):
                pass
            address = f"http://127.0.0.1:{places[0].getsockname()[1]}/api/about"
            with urllib.request.urlopen(address, timeout=20) as answer:  # waits until it serves
                answered.append(answer.status)
        finally:
            if not returned.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=ask_and_interrupt)
    asking.start()
    words = [f"ckpt={simclr}", "port=0", "device=cpu", "threads=1", "sample=16", "num_images=2"]
    monkeypatch.setattr(sys, "argv", ["eval.app", *words])
    GlobalHydra.instance().clear()
    try:
        main()  # another exit code than 0 is a SystemExit
    finally:
        returned.set()
        asking.join(20)
    said = capsys.readouterr()
    assert answered == [200]
    assert said.out.strip().endswith("stopped")
    assert "serving on http://127.0.0.1:" in said.out
    assert "Traceback" not in said.err
    assert signal.getsignal(signal.SIGINT) is before
