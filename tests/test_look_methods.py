"""What the looks say of the methods: a run's own views, reconstructions, relative location's answers, shortcuts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import functional as vision

from eval.look import command, pretext, reconstructions, views
from eval.look.masked import errors, flat_patches, hidden_pixels, reconstruct, usual_ratios, whole_output
from eval.look.places import accuracy, ask, commonest_mistake, confusion
from eval.look.result import DoesNotApply
from eval.look.run_views import RunViews
from eval.look.shortcut_report import Shortcuts, findings
from eval.look.shortcuts import (
    ClassProbe,
    PlaceProbe,
    divide,
    grid_cell,
    middles,
    probe_class,
    probe_place,
    random_corners,
    shifted_patches,
)
from eval.look.view_parameters import drawn_values, in_words
from ssl import checkpoint, pretrain
from ssl.data.policies import OPERATIONS
from ssl.data.views import View
from ssl.methods.mae import MAE, num_visible, random_mask
from ssl.methods.relative_location import PLACES, RelativeLocation, cut, luma
from ssl.methods.simclr import SimCLR
from ssl.methods.simmim import SimMIM
from ssl.models.backbones import build_backbone
from tests.image_list import ImageList, png
from tests.scenes import EMBEDDED, SHORT, TINY_VIT, compose_config, look_config, pretrained, scene

CLASSES = {"mae": MAE, "simclr": SimCLR, "relative_location": RelativeLocation}
WORDS = {"mae": [], "simclr": [], "relative_location": ["method.hidden_dim=32"]}
METHODS = list(CLASSES)
STD = [0.25, 0.5, 0.2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, list[dict]]]:
    """A run of two epochs of each method, and the batches that its steps were given."""
    found = {}
    for name, method in CLASSES.items():
        steps: list[dict] = []
        forward = method.forward

        def recording(self, batch, *given, forward=forward, steps=steps, **named):
            if self.training and len(batch["noise"]) == 16:
                steps.append({key: batch[key] for key in ("views", "noise", "index")})
            return forward(self, batch, *given, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(method, "forward", recording)
            folder = tmp_path_factory.mktemp(name) / "run"
            pretrained(folder, name, "trainer.steps=8", "trainer.pictures=false", *WORDS[name])
        found[name] = folder, steps[-8:]
    return found


@pytest.fixture(scope="module")
def looks(runs, tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """The views of both epochs as the command writes them: JSON and arrays."""
    found = {}
    for name, (folder, _) in runs.items():
        out = tmp_path_factory.mktemp("looks") / name
        words = [f"out={out}", "views.epochs=2", "indices=[50,3,17]"]
        command.run(look_config(folder, "views", *words))
        found[name] = json.loads((out / "views.json").read_text()), dict(np.load(out / "views.npz"))
    return found


def tiny_mae(kind: type[MAE] = MAE, *, norm: bool = True, size: tuple[int, int] = (16, 24)) -> MAE:
    torch.manual_seed(0)
    args = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    backbone, _ = build_backbone("vit_tiny_patch16_224", image_size=size, patch_size=4, model_args=args)
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return kind(backbone, image_size=size, norm_pixel_targets=norm, **decoder).eval()  # pyright: ignore


def tiny_simmim(kind: type[SimMIM] = SimMIM, *, norm: bool = False) -> SimMIM:
    torch.manual_seed(0)
    args = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20], "output_stride": 8}
    backbone, _ = build_backbone("convnext_atto", image_size=(32, 48), model_args=args)
    return kind(backbone, image_size=(32, 48), norm_pixel_targets=norm, mask_patch_size=8).eval()


def images_for(method, num: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(num, 3, *method.view_size, generator=generator)
    return image, torch.rand(num, method.num_noise, generator=generator)


class OracleMAE(MAE):
    """Predicts its targets."""

    def predict(self, image, visible, masked):
        return self.targets(image, masked)[0]


class OracleSimMIM(SimMIM):
    """Predicts its targets."""

    def predict(self, image, masked):
        return self.targets(image)[0]


class ZeroMAE(MAE):
    """Predicts nothing: zero for every pixel."""

    def predict(self, image, visible, masked):
        return torch.zeros_like(self.targets(image, masked)[0])


# ---- views ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_views_and_their_noise_are_bit_for_bit_those_that_training_was_given(method, runs, looks):
    _, steps = runs[method]
    data, arrays = looks[method]
    assert [each["index"] for each in data["data"]["images"]] == arrays["index"].tolist() == [50, 3, 17]
    for epoch in (0, 1):
        index = torch.cat([step["index"] for step in steps[4 * epoch : 4 * epoch + 4]]).tolist()
        num_views = len(steps[0]["views"])
        assert arrays["views"].shape[1:3] == (2, num_views)
        for view in range(num_views):
            given = torch.cat([step["views"][view] for step in steps[4 * epoch : 4 * epoch + 4]])
            for place, image in enumerate((50, 3, 17)):
                assert np.array_equal(arrays["views"][place, epoch, view], given[index.index(image)].numpy())
        noise = torch.cat([step["noise"] for step in steps[4 * epoch : 4 * epoch + 4]])
        for place, image in enumerate((50, 3, 17)):
            assert np.array_equal(arrays["noise"][place, epoch], noise[index.index(image)].numpy())


def by_hand(original: np.ndarray, values: dict, size: tuple[int, int]) -> np.ndarray:
    """A view in 0..1, (C, h, w), made by Pillow and torchvision from what the JSON says."""
    box = values["box"]
    image = Image.fromarray(original).crop(
        (box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"])
    )
    image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    if values["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    for name, factor in (values.get("jitter") or {}).items():
        pixels = getattr(vision, f"adjust_{name}")(pixels, factor)
    if values.get("grayscale"):
        pixels = vision.rgb_to_grayscale(pixels, num_output_channels=3)
    if values.get("blur_sigma"):
        pixels = vision.gaussian_blur(pixels, [3, 3], [values["blur_sigma"]] * 2)
    return pixels.numpy()


@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_what_the_json_says_makes_the_view_again(method, runs, looks):
    look = scene(runs[method][0])
    data, arrays = looks[method]
    mean, std = np.array(look.mean).reshape(3, 1, 1), np.array(look.std).reshape(3, 1, 1)
    done = set()
    for place, image in enumerate(data["data"]["images"]):
        original = np.asarray(look.source("train").read(image["index"]))
        for epoch, of_epoch in enumerate(image["epochs"]):
            for view, values in enumerate(of_epoch["views"]):
                expected = by_hand(original, values, (32, 32))
                found = arrays["views"][place, epoch, view] * std + mean
                assert np.abs(found - expected).max() < 0.02  # Pillow rounds to whole levels, and jitter stretches them
                done |= {key for key, value in values.items() if value}
    assert {"flip"} <= done
    assert method == "mae" or {"jitter", "grayscale", "blur_sigma"} <= done


def test_the_words_say_what_was_done_and_no_more():
    view = View(flip=0.5, jitter=0.5, hue=0.1, grayscale=0.5, policy="rand-m9-n2", erase=0.5, erase_count=2)
    drawn = view.sample(
        seed=0, epoch=0, index=np.arange(40), view=0, height=np.full(40, 50), width=np.full(40, 40), size=(32, 32)
    )
    for row in range(40):
        values = drawn_values(view, {key: value[row] for key, value in drawn.items()}, source_size=(50, 40))
        words = "\n".join(in_words(values))
        top, left, height, width = drawn["box"][row]
        assert f"crop {height}×{width} at {top}, {left}" in words
        assert values["area"] == pytest.approx(height * width / 2000)
        assert ("flipped" in words) == drawn["policy_flip"][row]
        assert ("hue" in words) == drawn["jitter"][row]
        assert ("gray" in words) == drawn["grayscale"][row]
        assert [each["operation"] for each in values["policy"]] == [
            OPERATIONS[number] for number in drawn["policy_op"][row] if number >= 0
        ]
        assert len(values["erased"]) == (drawn["erase_box"][row, :, 2:].prod(1) > 0).sum()
        assert ("erased" in words) == bool(values["erased"])


def test_an_image_that_cannot_be_decoded_names_the_one_that_stands_in():
    generator = np.random.default_rng(0)
    pictures = [png(generator.integers(0, 255, (12, 12, 3), np.uint8)) for _ in range(6)]
    source = ImageList([*pictures[:2], b"broken", *pictures[3:]])
    whole = RunViews(
        source, [View(crop="resize")], size=(12, 12), seed=3, mean=[0.5] * 3, std=[0.2] * 3, max_bad_fraction=1.0
    )
    crops = whole.drawn([2, 4])["crops"][0]
    stands_in = whole.shown_index(2)
    assert stands_in != 2
    assert whole.shown_index(4) == 4
    assert torch.equal(crops[0], whole.drawn([stands_in])["crops"][0][0])


def test_the_patches_that_views_marks_are_those_that_the_method_cuts(runs, looks):
    method = scene(runs["relative_location"][0]).method()
    assert isinstance(method, RelativeLocation)
    data, arrays = looks["relative_location"]
    marked = data["data"]["images"][1]["epochs"][1]["patches"]
    view, noise = torch.from_numpy(arrays["views"][1:2, 1, 0]), torch.from_numpy(arrays["noise"][1:2, 1])
    patches = cut(view, method.corners(noise), method.patch_size)[0]  # (9, C, h, w)
    for patch, box in zip(patches, marked, strict=True):
        rows, columns = slice(box["top"], box["top"] + box["height"]), slice(box["left"], box["left"] + box["width"])
        assert torch.equal(view[0, :, rows, columns], patch)


@pytest.mark.parametrize(("split", "said"), [("train", "is shown in epoch 0"), ("test", "would be shown of images")])
def test_the_title_says_whether_the_run_is_ever_shown_these_images(split, said, runs, monkeypatch):
    titles: list[str] = []
    draw = views.captioned
    monkeypatch.setattr(views, "captioned", lambda rows, **words: titles.append(words["title"]) or draw(rows, **words))
    views.look(scene(runs["simclr"][0], "views", f"split={split}"))
    assert said in titles[0]


def test_an_export_does_not_say_its_views_and_names_what_does(runs, tmp_path):
    folder = checkpoint.export(checkpoint.load_backbone(runs["simclr"][0]), tmp_path / "export")
    with pytest.raises(DoesNotApply, match="give the folder of the pretraining run"):
        views.look(scene(folder, "views", "data=embedded"))


def test_only_the_runs_own_images_are_said_to_be_trained_on(runs):
    folder = runs["simclr"][0]
    assert "is trained on" in views.look(scene(folder, "views", "num_images=1")).lines[0]
    for other in ("split=test", "data.limit=7", "data=embedded"):
        assert "would see" in views.look(scene(folder, "views", "num_images=1", other)).lines[0]


def test_no_epoch_to_look_at_is_refused(runs):
    with pytest.raises(ValueError, match=r"views[.]epochs=0"):
        views.look(scene(runs["mae"][0], "views", "views.epochs=0"))


# ---- reconstructions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", ["mae", "simmim"])
def test_a_model_that_predicts_its_targets_gives_the_input_back_at_every_ratio(kind, norm, ratio):
    method = tiny_mae(OracleMAE, norm=norm) if kind == "mae" else tiny_simmim(OracleSimMIM, norm=norm)
    image, noise = images_for(method)
    found = reconstruct(method, image, noise, ratio)
    torch.testing.assert_close(found.pasted, image, atol=1e-5, rtol=0)
    assert errors(method, found, STD)["model"].max() < 1e-9
    if kind == "simmim":
        torch.testing.assert_close(found.output, image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("make", [tiny_mae, tiny_simmim])
def test_all_that_is_predicted_agrees_with_the_reconstruction_where_pixels_were_hidden(make, norm):
    method = make(norm=norm)
    image, noise = images_for(method)
    found = reconstruct(method, image, noise, 0.6)
    assert found.output is not None
    hidden = found.hidden.expand_as(image)
    torch.testing.assert_close(found.output[hidden], found.pasted[hidden], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.pasted[~hidden], image[~hidden])
    assert (found.output[~hidden] - image[~hidden]).abs().mean() > 0.05


def test_looking_at_the_whole_output_leaves_no_hook_behind(monkeypatch):
    method = tiny_mae()
    image, noise = images_for(method)
    whole_output(method, image, noise, 0.5)
    assert not method.decoder_blocks._forward_hooks
    monkeypatch.setattr(method, "predict", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole_output(method, image, noise, 0.5)
    assert not method.decoder_blocks._forward_hooks


@pytest.mark.parametrize("make", [tiny_mae, tiny_simmim])
def test_hidden_pixels_are_those_that_the_method_blanks_and_gray_in_the_picture(make):
    method = make()
    image, noise = images_for(method)
    hidden = hidden_pixels(method, noise, 0.7)
    blank = (method.reconstruct(image, noise, 0.7)["masked"] == 0).all(1, keepdim=True)
    assert torch.equal(hidden, blank)
    assert hidden.float().mean().item() == pytest.approx(1 - num_visible(method.num_noise, 0.7) / method.num_noise)
    pixels = np.full((*image.shape[2:], 3), 7, np.uint8)
    pixels[:, :, 1] = 200
    gray = reconstructions.with_gray(pixels, hidden[0, 0].numpy())
    assert (gray[hidden[0, 0].numpy()] == 128).all()
    assert (gray[~hidden[0, 0].numpy()] == (7, 200, 7)).all()


def test_the_error_is_that_of_a_loop_over_hidden_pixels():
    method = tiny_mae(norm=True)
    image, noise = images_for(method)
    found = reconstruct(method, image, noise, 0.75)  # more hidden than seen: each has its own mean
    values = errors(method, found, STD)
    _, masked = random_mask(noise, num_visible(method.num_noise, 0.75))
    columns = image.shape[3] // 4
    for number in range(len(image)):
        squares: dict[str, list[float]] = {"model": [], "mean_colour": [], "patch_mean": []}
        boxes = [(patch // columns * 4, patch % columns * 4) for patch in range(method.num_noise)]
        hidden = set(masked[number].tolist())
        seen = [image[number, :, t : t + 4, x : x + 4] for place, (t, x) in enumerate(boxes) if place not in hidden]
        colour = torch.stack(seen).mean((0, 2, 3))  # (C,)
        for place in hidden:
            top, left = boxes[place]
            true = image[number, :, top : top + 4, left : left + 4]
            filled = found.pasted[number, :, top : top + 4, left : left + 4]
            for channel in range(3):
                for guess, name in (
                    (filled[channel], "model"),
                    (colour[channel], "mean_colour"),
                    (true.mean(), "patch_mean"),
                ):
                    squares[name] += ((true[channel] - guess) * STD[channel]).square().flatten().tolist()
        for name, each in squares.items():
            assert values[name][number].item() == pytest.approx(np.mean(each), rel=1e-4)


def test_a_model_that_predicts_nothing_explains_nothing_beyond_what_it_was_told():
    method = tiny_mae(ZeroMAE, norm=True)
    image, noise = images_for(method)
    found = method.reconstruct(image, noise, 0.75)["reconstruction"]
    hidden = hidden_pixels(method, noise, 0.75).expand_as(image)
    assert torch.allclose(found[hidden], flat_patches(image, (4, 4))[hidden], atol=1e-6)
    assert reconstructions.explained({"model": 0.3, "mean_colour": 0.9, "patch_mean": 0.3}) == 0
    assert reconstructions.explained({"model": 0.3, "mean_colour": 0.9}) == pytest.approx(2 / 3)


def test_the_masks_are_those_that_the_run_drew(runs, tmp_path):
    folder, steps = runs["mae"]
    words = ["split=train", "indices=[5,40]", f"out={tmp_path}", "reconstructions.masks=2", "reconstructions.sample=9"]
    command.run(look_config(folder, "reconstructions", *words))
    arrays = dict(np.load(tmp_path / "reconstructions.npz"))
    place = arrays["mask_ratio"].tolist().index(0.75)
    assert arrays["mask_ratio"].tolist() == [0.5, 0.75, 0.9]
    for mask in (0, 1):
        index = torch.cat([step["index"] for step in steps[4 * mask : 4 * mask + 4]]).tolist()
        noise = torch.cat([step["noise"] for step in steps[4 * mask : 4 * mask + 4]])
        _, masked = random_mask(noise, num_visible(noise.shape[1], 0.75))
        for image, number in enumerate((5, 40)):
            patches = arrays["hidden"][place, mask, image, 0, ::4, ::4].reshape(-1)  # patches of 4 pixels
            assert set(np.flatnonzero(patches)) == set(masked[index.index(number)].tolist())


def test_reconstructions_are_written_with_errors_and_a_flat_guess_beside_them(runs, tmp_path):
    folder, _ = runs["mae"]
    found = command.run(
        look_config(folder, "reconstructions", f"out={tmp_path}", "reconstructions.mask_ratios=[0.5,0.8]")
    )["metrics"]
    written = json.loads((tmp_path / "reconstructions.json").read_text())
    for ratio in ("50", "80"):
        model, flat = found[f"reconstructions.error_{ratio}"], found[f"reconstructions.error_patch_mean_{ratio}"]
        assert found[f"reconstructions.explained_{ratio}"] == pytest.approx(1 - model / flat)
    assert written["data"]["measured_on"] == 24  # of the 64 that were asked for, all that test has
    means = [np.mean(each["model"]) for each in written["data"]["errors"]]
    assert means == pytest.approx([found["reconstructions.error_50"], found["reconstructions.error_80"]])
    picture = np.array(Image.open(tmp_path / "reconstructions.png"))
    assert picture.shape[1] > 6 * 96  # input, and three pictures for each ratio


def test_the_title_says_what_flat_is():
    titled = scene("random", "reconstructions", *TINY_VIT, *EMBEDDED)
    assert "Flat: that of each hidden patch's own mean" in reconstructions.plain_title(titled, tiny_mae(norm=True))
    assert "Flat: that of the mean colour of what is seen" in reconstructions.plain_title(titled, tiny_mae(norm=False))


@pytest.mark.parametrize("ratios", [[0.0], [0.5, 1.0], [0.999], []])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratios):
    with pytest.raises(ValueError, match=r"reconstructions[.]mask_ratios"):
        reconstructions.checked_ratios(tiny_mae(), ratios)


def test_the_usual_ratios_leave_a_patch_of_a_small_image():
    assert usual_ratios(tiny_mae(size=(8, 8))) == [0.5, 0.75]
    assert usual_ratios(tiny_mae()) == [0.5, 0.75, 0.9]


def test_a_method_that_fills_nothing_in_is_refused_with_those_that_do(runs):
    with pytest.raises(DoesNotApply, match=r"MAE .* and SimMIM"):
        reconstructions.look(scene(runs["simclr"][0], "reconstructions"))


# ---- relative location ---------------------------------------------------------------------------------------------


def tiny_location(kind: str) -> RelativeLocation:
    torch.manual_seed(0)
    args = {
        "vit_tiny_patch16_224": {"embed_dim": 24, "depth": 2, "num_heads": 3},
        "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    }[kind]
    backbone, _ = build_backbone(kind, image_size=(48, 36), model_args=args, stem="auto")
    return RelativeLocation(backbone, image_size=(48, 36), hidden_dim=32).eval()


@pytest.mark.parametrize("kind", ["vit_tiny_patch16_224", "resnet18"])
def test_the_share_of_places_found_is_the_methods_own_accuracy(kind):
    method = tiny_location(kind)
    view, noise = images_for(method, num=16)
    with torch.no_grad():
        expected = method({"views": [view], "noise": noise})["accuracy"].item()
    answers = ask(method, view, noise)
    assert accuracy(answers.predicted)[0] == pytest.approx(expected)
    counts = confusion(answers.predicted)
    assert counts.sum(1).tolist() == [16] * 8
    assert counts.trace() / counts.sum() == pytest.approx(expected)
    torch.testing.assert_close(answers.probabilities.sum(2), torch.ones(16, 8))


class Always(nn.Module):
    """A head that gives each neighbour the place that `answers` (8,) says, whatever the patches show."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.scores = 9.0 * torch.eye(8)[answers]  # (8, 8)

    def forward(self, neighbours: Tensor, centre: Tensor) -> Tensor:
        return self.scores.expand(len(centre), 8, 8)


def test_the_confusion_of_a_perfect_head_is_diagonal():
    method = tiny_location("resnet18")
    method.classifier = Always(list(range(8)))  # pyright: ignore[reportAttributeAccessIssue]
    answers = ask(method, *images_for(method, num=5))
    assert np.array_equal(confusion(answers.predicted), 5 * np.eye(8, dtype=int))
    assert accuracy(answers.predicted) == (1.0, 0.0)


def test_rows_of_the_confusion_are_true_places_and_columns_answers():
    method = tiny_location("resnet18")
    lazy = [PLACES.index("top") if place.startswith("bottom") else PLACES.index(place) for place in PLACES]
    method.classifier = Always(lazy)  # pyright: ignore[reportAttributeAccessIssue]
    counts = confusion(ask(method, *images_for(method, num=5)).predicted)
    assert counts[PLACES.index("bottom left"), PLACES.index("top")] == 5
    assert counts[:, PLACES.index("top")].sum() == 20
    assert counts[:, PLACES.index("bottom left")].sum() == 0


def test_the_commonest_mistake_is_named_and_a_head_with_one_answer_too():
    counts = 10 * np.eye(8, dtype=int)
    assert "no place" in commonest_mistake(counts)
    counts[PLACES.index("left"), PLACES.index("right")] = 30
    assert "left for right, 75%" in commonest_mistake(counts)
    counts[:, PLACES.index("top")] += 60
    assert "top is the answer to" in commonest_mistake(counts)


@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_relative_location_is_asked_about_a_sample_and_its_answers_are_counted(backbone, runs, tmp_path):
    folder, _ = runs["relative_location"]
    if backbone == "vit":
        words = ["method=relative_location", *WORDS["relative_location"], *TINY_VIT, *EMBEDDED, *SHORT]
        folder = tmp_path / "run"
        pretrain.run(compose_config("pretrain", words), out=folder)
    words = [f"out={tmp_path / 'look'}", "pretext.sample=64", "split=train", "indices=[60,2]"]
    metrics = command.run(look_config(folder, "pretext", *words))["metrics"]
    data = json.loads((tmp_path / "look" / "pretext.json").read_text())["data"]
    counts = np.array(data["confusion"])
    assert counts.sum(1).tolist() == [64] * 8
    assert data["chance"] == 1 / 8
    assert metrics["pretext.accuracy"] == pytest.approx(counts.trace() / counts.sum())
    assert {"trained", "untrained"} <= set(data["shortcuts"])
    assert [each["index"] for each in data["shown"]] == [60, 2]
    assert np.allclose(np.sum(data["shown"][0]["probabilities"], axis=1), 1, atol=1e-5)
    assert (tmp_path / "look" / "pretext_confusion.png").exists()


@pytest.mark.parametrize(
    ("method", "word"), [("relative_location", "pretext.patches=2"), ("simclr", "pretext.epoch=1")]
)
def test_a_setting_without_effect_on_this_method_is_refused(method, word, runs):
    with pytest.raises(ValueError, match="has no effect"):
        command.run(look_config(runs[method][0], "pretext", word))


def test_a_patch_as_large_as_the_image_has_one_place_and_is_refused(runs):
    made = scene(runs["simclr"][0], "pretext", "pretext.patch_size=32")
    assert made.image_size == (32, 32)
    with pytest.raises(ValueError, match="one place; give less than 32"):
        pretext.look(made)


def test_files_are_too_few_to_ask_about_and_that_is_said(runs, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    with pytest.raises(DoesNotApply, match="data=folder"):
        pretext.look(scene(runs["relative_location"][0], "pretext", f"images={tmp_path / 'one.png'}"))


# ---- shortcuts -----------------------------------------------------------------------------------------------------


def textures(num: int, *, size: tuple[int, int] = (24, 24), seed: int = 0) -> Tensor:
    """Gray images (N, 3, H, W) of noise: all channels alike, so that a displaced one shows."""
    gray = torch.randn(num, 1, *size, generator=torch.Generator().manual_seed(seed))
    return gray.expand(-1, 3, -1, -1).contiguous()


def between_channels(patches: Tensor) -> Tensor:
    """How far each pair of channels is apart, (B, P, 3) of patches (B, P, 3, h, w)."""
    red, green, blue = patches.unbind(2)
    pairs = ((red, green), (green, blue), (blue, red))
    return torch.stack([(a - b).abs().mean((2, 3)) for a, b in pairs], 2)


@pytest.mark.parametrize("closed", [False, True])
def test_a_displaced_channel_is_told_unless_labels_are_shuffled_or_colour_is_taken_away(closed):
    image = textures(150)
    corners = random_corners(np.arange(150), 4, image_size=(24, 24), patch_size=(8, 8))
    channel = torch.randint(-1, 3, (150, 4), generator=torch.Generator().manual_seed(2))
    patches = shifted_patches(image, corners, (8, 8), channel, shift=2)
    features = between_channels(luma(patches) if closed else patches).flatten(0, 1)
    found = probe_class(features, channel.flatten() + 1, np.arange(150).repeat(4), num_classes=4)
    assert found.chance == 0.25
    assert abs(found.shuffled - 0.25) < 0.12
    assert found.top1 > 0.95 if not closed else found.top1 < 0.4


@pytest.mark.parametrize("axis", ["x", "y"])
def test_the_place_is_told_where_brightness_gives_it_away_and_along_that_axis_only(axis):
    slope = torch.linspace(0, 1, 32).view((1, 1, 1, 32) if axis == "x" else (1, 1, 32, 1))
    image = 0.01 * textures(80, size=(32, 32)) + slope
    corners = random_corners(np.arange(80), 4, image_size=(32, 32), patch_size=(8, 8))
    place = middles(corners, image_size=(32, 32), patch_size=(8, 8))
    features = cut(image, corners, (8, 8)).mean((3, 4)).flatten(0, 1)  # (B*P, 3)
    found = probe_place(features, place.flatten(0, 1), np.arange(80).repeat(4))
    told, other = (found.r2_x, found.r2_y) if axis == "x" else (found.r2_y, found.r2_x)
    assert told > 0.99
    assert other < 0.1
    assert max(found.shuffled_x, found.shuffled_y) < 0.15


def test_the_error_of_r2_is_what_samples_of_images_differ_by():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(40):
        place = torch.rand(60, 4, 2, generator=generator)
        noise = 0.5 * torch.randn(60, 1, 2, generator=generator) + 0.2 * torch.randn(60, 4, 2, generator=generator)
        found.append(probe_place((place + noise).flatten(0, 1), place.flatten(0, 1), np.arange(60).repeat(4)))
    spread = np.std([each.r2_x for each in found], ddof=1)
    assert 0.5 < np.mean([each.error_x for each in found]) / spread < 1.6


def test_patches_of_one_image_are_never_on_two_sides_of_a_probe():
    image = np.random.default_rng(0).permutation(np.arange(50).repeat(3))
    parts = divide(image, seed=1)
    sets = [set(image[rows.numpy()]) for rows in (parts.fitted, parts.chosen_on, parts.judged)]
    assert [len(each) for each in sets] == [30, 10, 10]
    assert len(set.union(*sets)) == 50
    assert sum(len(rows) for rows in (parts.fitted, parts.chosen_on, parts.judged)) == 150


def test_too_few_images_for_a_probe_are_refused():
    with pytest.raises(ValueError, match=r"pretext[.]sample"):
        divide(np.arange(10))


def test_one_channel_moves_to_the_right_and_the_others_stay():
    image = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    corners = torch.tensor([[[0, 0], [3, 4]], [[2, 1], [4, 6]]])
    channel = torch.tensor([[1, -1], [2, 0]])
    found = shifted_patches(image, corners, (5, 5), channel, shift=2)
    for number in range(2):
        for patch in range(2):
            top, left = corners[number, patch].tolist()
            for place in range(3):
                moved = 2 if place == channel[number, patch] else 0
                for column in range(5):
                    expected = image[number, place, top : top + 5, max(left + column - moved, 0)]
                    assert torch.equal(found[number, patch, place, :, column], expected)


def test_random_patches_lie_within_the_image_and_reach_its_edges():
    corners = random_corners(np.arange(4000), 2, image_size=(10, 20), patch_size=(4, 6))
    assert corners.amin((0, 1)).tolist() == [0, 0]
    assert corners.amax((0, 1)).tolist() == [6, 14]
    place = middles(corners, image_size=(10, 20), patch_size=(4, 6))
    assert place.amin().item() == 0
    assert place.amax().item() == 1
    counts = torch.bincount(grid_cell(place.flatten(0, 1)), minlength=9)
    assert len(counts) == 9
    assert counts.min() > 300


@pytest.mark.parametrize("backbone", ["resnet10", "vit_micro"])
def test_a_vignette_that_all_photos_share_is_found_from_the_command_line(backbone, tmp_path):
    generator = np.random.default_rng(0)
    dark = np.linspace(0.1, 1, 32)[None, :, None]
    for number in range(60):
        noise = generator.normal(0, 12, (32, 32, 3))
        picture = (dark * 200 + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).filter(ImageFilter.BoxBlur(1)).save(tmp_path / f"{number:02d}.png")
    words = [f"model={backbone}", "data=folder", f"data.root={tmp_path}", f"out={tmp_path / 'out'}", "split=train"]
    metrics = command.run(look_config("random", "pretext", *words, "pretext.sample=60"))["metrics"]
    assert metrics["pretext.place_r2_x"] > 0.8
    assert metrics["pretext.place_r2_y"] < 0.2


@pytest.mark.parametrize("kind", ["mae", "export"])
def test_any_backbone_is_probed_beside_itself_untrained(kind, runs, tmp_path):
    folder = runs["simclr" if kind == "export" else kind][0]
    words = [
        f"out={tmp_path / 'out'}",
        "split=train",
        "pretext.sample=60",
        "pretext.patches=2",
        "pretext.patch_size=12",
    ]
    if kind == "export":
        folder = checkpoint.export(checkpoint.load_backbone(folder), tmp_path / "export")
        words += ["data=embedded", "data.source.num_train=60"]
    metrics = command.run(look_config(folder, "pretext", *words))["metrics"]
    data = json.loads((tmp_path / "out" / "pretext.json").read_text())["data"]["shortcuts"]
    assert data["patches"] == 120
    assert data["patch_size"] == [12, 12]
    assert "pretext.accuracy" not in metrics
    for name in ("cell_top1", "place_r2_x", "place_r2_y", "channel_top1"):
        assert {f"pretext.{name}", f"pretext.{name}_untrained"} <= set(metrics)
    assert metrics["pretext.cell_top1"] == data["trained"]["cell"]["top1"]


def test_images_of_one_channel_have_no_channel_to_displace(tmp_path):
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    data = ["data=folder", f"data.root={tmp_path}", "data.channels=1", "data.mean=[0.5]", "data.std=[0.25]"]
    words = ["model=resnet10", *data, f"out={tmp_path / 'out'}", "split=train", "pretext.sample=30"]
    metrics = command.run(look_config("random", "pretext", *words))["metrics"]
    assert set(metrics) == {"pretext.cell_top1", "pretext.place_r2_x", "pretext.place_r2_y"}


def shortcuts_of(*, x: float, y: float, channel: float) -> Shortcuts:
    """Probes that found as much, with small errors."""
    cell = ClassProbe(0.2, 0.01, 1 / 9, 0.11, 0.01, 100, 50)
    return Shortcuts(cell, PlaceProbe(x, y, 0.01, 0.01, 0.0, 0.0), ClassProbe(channel, 0.01, 0.25, 0.25, 0.01, 100, 50))


def test_what_is_said_follows_what_training_has_changed():
    before = shortcuts_of(x=0.1, y=0.1, channel=0.3)

    def said(**after: float) -> str:
        return " ".join(findings(shortcuts_of(**after), before, relative=True))

    assert "from left to right too" in said(x=0.2, y=0.1, channel=0.3)
    assert "how high" in said(x=0.1, y=0.2, channel=0.3)
    assert "method.colour=drop" in said(x=0.1, y=0.1, channel=0.4)
    assert "no sign" in said(x=0.12, y=0.09, channel=0.31)
