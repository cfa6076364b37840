"""`what=duplicates`: copies are found however they were made, and photos of one class are not."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance

from eval.look import duplicates
from eval.look.aligned import COLOURS, FLAT, SCALES, WINDOW, align, colour_agreement, structure
from eval.look.duplicate_list import groups
from eval.look.duplicate_pairs import compare, read_small
from eval.look.duplicate_search import candidates, worn
from ssl.data.folder import Folder
from tests.image_list import ImageList, png
from tests.scenes import pretrained, scene

CLASSES = ("disk", "ring")
ALL = "duplicates.neighbours=30"  # two steps of training place few copies next to their originals
PLANTED = {  # copy in test: of which image of train, and how it was made
    "jpeg": 0,
    "bright": 1,
    "cropped": 2,
    "exact": 3,
    "half": 4,
    "mirrored": 5,
}


def copy_of(image: Image.Image, how: str) -> Image.Image:
    """A copy as people and pipelines make them; none of it is this project's code."""
    side = image.width
    if how == "jpeg":
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=50)
        return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")
    if how == "bright":
        return ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.2)).enhance(0.8)
    if how == "cropped":
        return image.crop((2, 2, side - 2, side - 2)).resize((side, side), Image.Resampling.BICUBIC)
    if how == "half":
        return image.resize((side // 2, side // 2), Image.Resampling.BICUBIC).resize((side, side))
    if how == "mirrored":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def pictures(num: int, split: str = "train") -> list[Image.Image]:
    """Images of two classes in turn: a coarse pattern of its class, and finer structure of its own."""
    rng = np.random.default_rng(["train", "test"].index(split))
    coarse = [np.random.default_rng(10 + label).uniform(0, 255, (3, 3, 3)).astype(np.uint8) for label in range(2)]
    made = []
    for number in range(num):
        ground = np.asarray(Image.fromarray(coarse[number % 2]).resize((32, 32), Image.Resampling.BICUBIC), float)
        own = rng.uniform(0, 255, (16, 16, 3)).astype(np.uint8)
        detail = np.asarray(Image.fromarray(own).resize((32, 32), Image.Resampling.BICUBIC), float)
        made.append(Image.fromarray((0.6 * ground + 0.4 * detail).astype(np.uint8)))
    return made


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """24 images of train, 12 of test, and in test a copy of each kind; the brightened one in another class's folder."""
    root = tmp_path_factory.mktemp("planted")
    for split, num in (("train", 24), ("test", 12)):
        for label in CLASSES:
            (root / split / label).mkdir(parents=True)
        for number, image in enumerate(pictures(num, split)):
            image.save(root / split / CLASSES[number % 2] / f"{number:02d}.png")
    for how, number in PLANTED.items():
        name = CLASSES[number % 2]
        original = Image.open(root / "train" / name / f"{number:02d}.png").convert("RGB")
        folder = CLASSES[(number + 1) % 2] if how == "bright" else name
        copy_of(original, how).save(root / "test" / folder / f"{how}.png")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    return {method: pretrained(home / method, method) for method in ("simclr", "mae", "relative_location")}


def pairs_found(look) -> set[tuple[str, str]]:
    return {(row["image_a"], row["image_b"]) for row in csv.DictReader(io.StringIO(look.tables[""]))}


# ---- what is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simclr", "mae", "relative_location"])
def test_planted_copies_are_found_across_splits_and_images_of_one_class_are_not(method, runs, planted):
    found = duplicates.look(scene(runs[method], "duplicates", ALL, "data=folder", f"data.root={planted}"))
    expected = set()
    for how, number in PLANTED.items():
        name = CLASSES[number % 2]
        folder = CLASSES[(number + 1) % 2] if how == "bright" else name
        expected.add((f"{planted}/train/{name}/{number:02d}.png", f"{planted}/test/{folder}/{how}.png"))
    assert pairs_found(found) == expected
    assert found.metrics["pairs_across"] == found.metrics["groups"] == 6
    assert found.metrics["pairs_exact"] == 1
    assert found.metrics["test_share_with_twin_in_train"] == pytest.approx(6 / 18)
    assert found.metrics["pairs_with_other_label"] == 1
    kinds = {Path(row["image_b"]).stem: row["kind"] for row in csv.DictReader(io.StringIO(found.tables[""]))}
    assert kinds == {"exact": "exact", "mirrored": "mirrored"} | dict.fromkeys(
        ("jpeg", "bright", "cropped", "half"), "near"
    )


def test_mirror_images_count_only_where_they_are_asked_for(runs, planted):
    words = [ALL, "data=folder", f"data.root={planted}", "duplicates.flip=false"]
    found = duplicates.look(scene(runs["simclr"], "duplicates", *words))
    assert "mirrored" not in found.tables[""]
    assert found.metrics["pairs_across"] == 5


def test_copies_within_train_form_one_group_without_labels_or_a_test_split(runs, tmp_path):
    for number, image in enumerate(pictures(12)):
        image.save(tmp_path / f"{number:02d}.png")
    first = Image.open(tmp_path / "00.png").convert("RGB")
    for how in ("jpeg", "bright", "half"):
        copy_of(first, how).save(tmp_path / f"copy_{how}.png")
    found = duplicates.look(scene(runs["simclr"], "duplicates", "data=folder", f"data.root={tmp_path}"))
    (group,) = found.data["groups"]
    names = {Path(each["image"]).name for each in group["images"]}
    assert names == {"00.png", "copy_jpeg.png", "copy_bright.png", "copy_half.png"}
    assert all(each["label"] is None for each in group["images"])
    assert found.metrics["groups"] == 1
    assert not {"pairs_across", "pairs_with_other_label"} & set(found.metrics)


def test_a_set_without_copies_gives_no_pair_and_no_picture(runs, planted, tmp_path):
    shutil.copytree(planted / "train", tmp_path / "train")
    found = duplicates.look(scene(runs["mae"], "duplicates", "data=folder", f"data.root={tmp_path}/train"))
    assert found.metrics["pairs"] == 0
    assert found.pictures == {}
    assert found.tables[""].count("\n") == 1


def test_an_image_that_cannot_be_decoded_is_left_out(runs, planted, tmp_path):
    shutil.copytree(planted, tmp_path / "set")
    (tmp_path / "set" / "train" / "disk" / "broken.png").write_bytes(b"no image")
    made = scene(runs["simclr"], "duplicates", ALL, "data=folder", f"data.root={tmp_path}/set")
    assert duplicates.look(made).metrics["pairs_across"] == 6
    assert any("broken.png" in note for note in made.notes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["duplicates.neighbours=0"], "duplicates.neighbours must be at least 1"),
        (["duplicates.images=0"], "duplicates.images must be at least 1"),
        (["duplicates.correlation=1.5"], "must lie in"),
        (["duplicates.similarity=2"], "a cosine"),
    ],
)
def test_settings_that_make_no_sense_are_refused(runs, words, message):
    with pytest.raises(ValueError, match=message):
        duplicates.look(scene(runs["simclr"], "duplicates", *words))


# ---- pictures ------------------------------------------------------------------------------------------------------


def small(image: Image.Image) -> torch.Tensor:
    gray = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    return structure(torch.from_numpy(gray)[None] / 255)


@pytest.mark.parametrize("how", ["jpeg", "bright", "cropped", "half", "exact"])
def test_copies_correlate_and_their_neighbours_do_not(how):
    images = pictures(24)
    own = torch.cat([small(image) for image in images])
    copies = torch.cat([small(copy_of(image, how)) for image in images])
    same = align(own, copies, flip=True)
    other = align(own, copies.roll(2, 0), flip=True)  # of the same class: they take turns
    assert same.correlation.min() > 0.9
    assert not same.mirrored.any()
    assert other.correlation.max() < 0.8


def test_the_correlation_is_that_of_the_best_shift_by_numpy():
    rng = torch.Generator().manual_seed(0)
    first = torch.randn(1, 32, 32, generator=rng)
    second = first.roll((2, -3), (1, 2)) + 0.5 * torch.randn(1, 32, 32, generator=rng)
    found = align(first, second, flip=False)
    assert 32 in SCALES
    window = first[0, 4:28, 4:28].numpy().ravel()
    best = max(
        np.corrcoef(window, second[0, y : y + WINDOW, x : x + WINDOW].numpy().ravel())[0, 1]
        for y in range(9)
        for x in range(9)
    )
    assert found.correlation.item() == pytest.approx(best, abs=1e-5)
    assert (found.side.item(), found.top.item(), found.left.item()) == (32, 6, 1)


def test_a_flat_picture_is_a_copy_of_nothing():
    flat = structure(torch.full((1, 32, 32), 0.5))
    found = align(flat, flat, flip=True)
    assert flat.std() < FLAT
    assert found.correlation.item() == 0


def test_exact_copies_are_known_by_their_pixels_whatever_the_file():
    image = pictures(1)[0]
    other = np.array(image)
    other[0, 0, 0] ^= 1
    source: Any = ImageList([png(np.array(image)), np.array(image), other])
    found = read_small(source, np.arange(3), channels=3)
    assert found.digest[0] == found.digest[1] != found.digest[2]
    assert (found.pixels[0] == found.pixels[1]).all()


def test_copies_for_the_threshold_differ_from_their_originals_but_little():
    crops = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in pictures(8)])
    copies = worn(crops)
    assert copies.shape == crops.shape
    for crop, copy in zip(crops, copies):
        assert not torch.equal(crop, copy)
        assert copy.float().mean() < 0.9 * crop.float().mean()
        pair = [small(Image.fromarray(each.permute(1, 2, 0).numpy())) for each in (crop, copy)]
        assert align(*pair, flip=False).correlation.item() > 0.9


def coloured(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1).float() / 255 for each in images])


@pytest.mark.parametrize("how", [*PLANTED, "worn"])
def test_the_colours_of_copies_agree_and_those_of_a_drawing_in_other_colours_do_not(how):
    images = pictures(24)
    own = torch.cat([small(each) for each in images])
    if how == "worn":
        bytes_of = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in images])
        copies = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in worn(bytes_of)]
    else:
        copies = [copy_of(each, how) for each in images]
    found = align(own, torch.cat([small(each) for each in copies]), flip=True)
    assert found.correlation.min() > 0.9
    assert colour_agreement(coloured(*images), coloured(*copies), found).min() > COLOURS


def test_a_shape_of_the_same_outline_in_other_colours_is_no_copy():
    drawn = []
    for ground, ink in (
        ((200, 40, 30), (20, 60, 200)),
        ((60, 200, 40), (40, 60, 120)),
        ((201, 43, 30), (25, 60, 195)),
    ):
        image = Image.new("RGB", (32, 32), ground)
        ImageDraw.Draw(image).regular_polygon((16, 16, 9), 3, fill=ink)
        drawn.append(np.array(image))
    source: Any = ImageList(drawn)
    correlation, colours, _, _ = compare(
        read_small(source, np.arange(3), channels=3), np.array([0, 0]), np.array([1, 2]), flip=False
    )
    assert correlation.min() > 0.9
    assert colours[0] < COLOURS < colours[1]


def test_a_set_of_one_outline_in_other_colours_has_one_pair_the_copy(runs, tmp_path):
    inks = {
        "a": ((200, 40, 30), (20, 60, 200)),
        "b": ((60, 200, 40), (40, 60, 120)),
        "c": ((201, 43, 30), (25, 60, 195)),
    }
    for name, (ground, ink) in inks.items():
        image = Image.new("RGB", (32, 32), ground)
        ImageDraw.Draw(image).regular_polygon((16, 16, 9), 3, fill=ink)
        image.save(tmp_path / f"{name}.png")
    words = ["data=folder", f"data.root={tmp_path}", "duplicates.similarity=-1"]
    found = duplicates.look(scene(runs["simclr"], "duplicates", *words))
    assert pairs_found(found) == {(f"{tmp_path}/a.png", f"{tmp_path}/c.png")}


# ---- pairs and groups ----------------------------------------------------------------------------------------------


def test_candidates_are_the_close_pairs_that_brute_force_finds():
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(40, 4)), rng.normal(size=(15, 4))
    every = np.concatenate([train, test])
    unit = every / np.linalg.norm(every, axis=1, keepdims=True)
    cosine = unit @ unit.T
    first, second, similarity = candidates([torch.from_numpy(x).float() for x in (train, test)], 54, 0.8)
    expected = {(a, b) for a in range(55) for b in range(a + 1, 55) if cosine[a, b] >= 0.8}
    assert set(zip(first.tolist(), second.tolist())) == expected
    np.testing.assert_allclose(similarity, cosine[first, second], atol=1e-5)


def test_many_copies_in_train_of_one_test_image_are_all_candidates():
    rng = np.random.default_rng(2)
    one = torch.from_numpy(rng.normal(size=(1, 6))).float()
    copies = one + 1e-3 * torch.from_numpy(rng.normal(size=(8, 6))).float()
    first, second, _ = candidates([copies, one], 5, 0.99)
    across = {int(a) for a, b in zip(first, second) if b == 8}
    assert across == set(range(8))


def test_groups_join_what_is_linked_through_others():
    number = groups(7, np.array([0, 2, 4]), np.array([2, 5, 6]))
    assert number.tolist() == [0, 1, 0, 3, 4, 0, 4]


def test_images_are_read_in_the_order_that_is_asked_for(planted):
    source = Folder("train", root=planted)
    all_of_them = read_small(source, np.arange(len(source)), channels=3)
    some = read_small(source, np.array([1, 5, 20]), channels=3)
    assert some.digest == [all_of_them.digest[place] for place in (1, 5, 20)]


def test_among_all_looks_a_part_is_searched_and_said_unless_a_number_is_given(runs, planted, monkeypatch, capsys):
    monkeypatch.setattr(duplicates, "MOST_OF_ALL", 5)
    searched = {}
    for what, *words in (["duplicates"], ["all"], ["all", "duplicates.images=7"]):
        found = duplicates.look(scene(runs["simclr"], what, "data=folder", f"data.root={planted}", *words))
        searched[(what, *words)] = max(found.data["searched"]["images"].values())
    assert searched[("duplicates",)] > 7
    assert (searched[("all",)], searched[("all", "duplicates.images=7")]) == (5, 7)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("duplicates: reads")]
    assert "duplicates: reads 5 of " in told[1]
    assert told[1].endswith("duplicates.images= takes more")
