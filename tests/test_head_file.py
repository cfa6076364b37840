"""`eval.head_file`: a linear head that is saved, and read again as what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from eval.head_file import Head, fold, is_head, load_head, save_head
from eval.heads import Standardizer


def made(seed: int = 0, classes: int = 3, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(classes, dim, generator=generator), torch.randn(classes, generator=generator)


def save(folder: Path, seed: int = 0, **changes) -> Path:
    weight, bias = made(seed)
    settings = {
        "classes": ["ant", "bee", "cat"],
        "checkpoint": "runs/a",
        "sha256": "f00d",
        "features": {"pooling": "p"},
    }
    settings["image_size"] = (8, 9)
    return save_head(folder, **{"weight": weight, "bias": bias, **settings, **changes})


def test_a_head_is_read_as_it_was_saved(tmp_path):
    weight, bias = made()
    head = load_head(save(tmp_path / "a.head", multi_label=True))
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert (head.classes, head.multi_label) == (["ant", "bee", "cat"], True)
    assert (head.checkpoint, head.sha256, head.features) == ("runs/a", "f00d", {"pooling": "p"})
    assert head.image_size == (8, 9)


def test_its_logits_are_those_of_a_linear_layer(tmp_path):
    weight, bias = made()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(load_head(save(tmp_path / "a.head")).logits(x), functional.linear(x, weight, bias))


def test_a_folded_head_gives_for_raw_features_what_it_gave_for_standardised_ones():
    weight, bias = made()
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(2)) * torch.tensor([1, 9, 0.1, 3, 0]) + 4
    standardize = Standardizer.fit(features)
    expected = functional.linear(standardize(features), weight, bias)
    folded = Head(*fold(weight, bias, standardize), ["a", "b", "c"], False, "", "", {}, (8, 9))
    torch.testing.assert_close(folded.logits(features), expected, atol=1e-4, rtol=1e-4)
    assert (folded.weight[:, 4] == 0).all()  # a dimension that never moved


def test_a_second_head_takes_the_place_of_the_first_and_leaves_nothing_beside_it(tmp_path):
    save(tmp_path / "a.head")
    save(tmp_path / "a.head", seed=1)
    assert torch.equal(load_head(tmp_path / "a.head").weight, made(1)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["a.head"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["ant", "bee"]}, r"\(3, 5\), \(3,\) and 2 names"),
        ({"bias": torch.zeros(4)}, r"\(3, 5\), \(4,\) and 3 names"),
        ({"bias": torch.tensor([0.0, torch.nan, 0.0])}, "not finite"),
    ],
)
def test_what_no_classifier_can_be_is_not_saved(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "a.head", **changes)
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_no_json_leave_nothing_half_written(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        save(tmp_path / "a.head", features={"layer": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_head_is_refused(tmp_path):
    folder = save(tmp_path / "a.head")
    weights = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"is damaged: head\.safetensors"):
        load_head(folder)


def test_a_head_of_another_format_or_without_a_key_is_refused(tmp_path):
    folder = save(tmp_path / "a.head")
    card = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps({**card, "format": 99}))
    with pytest.raises(ValueError, match="format and kind"):
        load_head(folder)
    (folder / "head.json").write_text(json.dumps({key: card[key] for key in card if key != "sha256"}))
    with pytest.raises(ValueError, match="lacks sha256"):
        load_head(folder)


def test_a_folder_without_head_is_none(tmp_path):
    assert not is_head(tmp_path)
    assert is_head(save(tmp_path / "a.head"))
    with pytest.raises(ValueError, match="holds no head"):
        load_head(tmp_path)
