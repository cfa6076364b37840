"""RandAugment and AutoAugment against timm's and torchvision's, given the same numbers."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from timm.data import auto_augment as timm_policies
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from ssl.data.augment import Augment
from ssl.data.loader import Loader
from ssl.data.policies import ARGUMENTS, AUTO_POLICIES, OPERATIONS, apply_policy_, parse_policy
from ssl.data.views import View, make_views
from ssl.randomness import uniforms_by_use
from tests.image_list import ImageList, png

MAE = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
TIMM_LEVELS = {
    name: level for name, level in timm_policies.LEVEL_TO_ARG.items() if name in ARGUMENTS and level is not None
}


def draws(text: str, *, num_images: int, seed: int = 0) -> dict[str, np.ndarray]:
    return uniforms_by_use(seed, 0, np.arange(num_images), parse_policy(text).uses())


def pictures(num: int, *, channels: int = 3, side: int = 24) -> torch.Tensor:
    """Smooth pictures with edges and dark, bright and grey parts, uint8 (num, channels, side, side)."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (num, channels, 5, 5)).astype(np.float32))
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    fine[:, :, 4:9, 6:20] *= 0.3
    return fine.round().to(torch.uint8)


def as_image(crop: torch.Tensor) -> Image.Image:
    return Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())


@pytest.mark.parametrize("name", sorted(TIMM_LEVELS))
@pytest.mark.parametrize("draw", [0.25, 0.75])
def test_every_operations_argument_is_timms_at_every_level(name, draw):
    levels = np.append(np.linspace(0, 10, 41), [9.37, 11.5])
    ours = ARGUMENTS[name](levels, np.full(len(levels), draw))
    hparams = {"translate_pct": 0.45}
    if name == "GaussianBlurRand":  # timm draws inside the pixel function
        theirs = [0.1 + (2.0 * TIMM_LEVELS[name](level, hparams)[0] - 0.1) * draw for level in levels]
    else:
        with patch.object(random, "random", lambda: draw):
            theirs = [TIMM_LEVELS[name](level, hparams)[0] for level in levels]
    np.testing.assert_array_equal(ours, theirs)


def test_every_operation_of_timms_policies_is_known():
    used = {op.name for name in AUTO_POLICIES[:5] for row in timm_policies.auto_augment_policy(name) for op in row}
    used |= set(timm_policies._RAND_TRANSFORMS) | set(timm_policies._RAND_INCREASING_TRANSFORMS)
    assert used <= set(OPERATIONS)


def test_the_cifar10_policy_has_torchvisions_magnitudes():
    size, theirs = 331, AutoAugment(AutoAugmentPolicy.CIFAR10)
    space = theirs._augmentation_space(10, (size, size))
    policy = parse_policy("autoaugment-cifar10")
    assert len(policy.operation) == len(theirs.policies) == 25
    for row, expected in enumerate(theirs.policies):
        for place, (kind, chance, step) in enumerate(expected):
            ours = OPERATIONS[policy.operation[row, place]]
            assert policy.probability[row, place] == chance
            argument = ARGUMENTS[ours](policy.level[row, place, None], np.zeros(1))[0]
            magnitudes = space[kind][0]
            if step is None:
                assert ours == kind
            elif kind in ("Brightness", "Color", "Contrast", "Sharpness"):
                assert argument == pytest.approx(1 + float(magnitudes[step]))
            elif kind.startswith("Translate"):
                assert argument * size == pytest.approx(float(magnitudes[step]))
            else:
                assert argument == pytest.approx(float(magnitudes[step]))


def timms_result(crop, operations, arguments, resample=Image.Resampling.BICUBIC):
    """timm's own AugmentOp, with the level's randomness replaced by the argument that is given."""
    image = as_image(crop)
    for number, argument in zip(operations, arguments):
        if number < 0:
            continue
        name = OPERATIONS[number]
        if "Posterize" in name and argument == 0:  # black, but Pillow 13 refuses to keep no bit
            image = Image.new("RGB", image.size)
            continue
        op = timm_policies.AugmentOp(name, prob=1.0, magnitude=9, hparams={"img_mean": FILL, "interpolation": resample})
        if op.level_fn is not None:
            op.level_fn = lambda *_, value=argument, name=name: (
                int(value) if "Posterize" in name or name == "SolarizeAdd" else value,
            )
        image = op(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("text", [MAE, "rand-m5-n3-p1", "autoaugment-original", "autoaugment-v0"])
def test_pixels_are_those_of_timms_operations(text):
    crops = pictures(60)
    parameters = parse_policy(text).sample(draws(text, num_images=60))
    parameters["policy_flip"] = np.arange(60) % 3 == 0
    expected = torch.where(torch.from_numpy(parameters["policy_flip"])[:, None, None, None], crops.flip(-1), crops)
    expected = torch.stack(
        [
            timms_result(crop, operations, arguments)
            for crop, operations, arguments in zip(
                expected, parameters["policy_op"], parameters["policy_argument"].tolist()
            )
        ]
    )
    ours = crops.clone()
    apply_policy_(ours, parameters, interpolation="bicubic", fill=[value / 255 for value in FILL])
    assert torch.equal(ours, expected)
    changed = (ours != crops).flatten(1).any(1).numpy()
    assert not changed[(parameters["policy_op"] < 0).all(1) & ~parameters["policy_flip"]].any()
    assert changed.mean() > 0.5


def test_randaugment_draws_as_timm_does():
    """Frequency of each operation in each place, and the spread of a level, over many of timm's own draws."""
    number = 20_000
    parameters = parse_policy(MAE).sample(draws(MAE, num_images=number))
    operation, argument = parameters["policy_op"], parameters["policy_argument"]
    names = timm_policies._RAND_INCREASING_TRANSFORMS
    assert set(np.unique(operation)) == {-1, *(OPERATIONS.index(name) for name in names)}
    assert abs((operation < 0).mean() - 0.5) < 0.01
    for name in names:
        for place in range(2):
            assert abs((operation[:, place] == OPERATIONS.index(name)).mean() - 0.5 / 15) < 0.004
    assert abs(np.corrcoef(operation[:, 0], operation[:, 1])[0, 1]) < 0.03

    seen = []
    theirs = timm_policies.rand_augment_transform(MAE, {"img_mean": FILL}).ops[names.index("Rotate")]
    theirs.aug_fn, theirs.prob = (lambda image, degrees, **_: seen.append(degrees)), 1.0
    random.seed(0)
    for _ in range(4000):
        theirs(None)
    ours = argument[operation == OPERATIONS.index("Rotate")]
    assert abs((ours > 0).mean() - 0.5) < 0.06
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert abs(np.quantile(abs(ours), quantile) - np.quantile(np.abs(seen), quantile)) < 0.3  # degrees


@pytest.mark.parametrize("text", ["autoaugment-original", "autoaugment-cifar10"])
def test_autoaugment_draws_each_pair_of_operations_equally_often(text):
    number, policy = 25_000, parse_policy(text)
    operation = policy.sample(draws(text, num_images=number))["policy_op"]
    assert operation.shape == (number, 2)
    for kind in range(len(OPERATIONS)):
        for place in range(2):
            expected = policy.probability[policy.operation[:, place] == kind, place].sum() / 25
            assert abs((operation[:, place] == kind).mean() - expected) < 0.012
    together = ((operation[:, 0] >= 0) & (operation[:, 1] >= 0)).mean()
    assert abs(together - (policy.probability[:, 0] * policy.probability[:, 1]).mean()) < 0.012


def test_weighted_operations_are_drawn_without_replacement_as_numpy_does():
    text, number = "rand-n2-p1-tweights", 20_000
    operation = parse_policy(text).sample(draws(text, num_images=number))["policy_op"]
    assert (operation[:, 0] != operation[:, 1]).all()
    names, weights = timm_policies._get_weighted_transforms(timm_policies._RAND_WEIGHTED_0)
    rng = np.random.default_rng(0)
    theirs = np.array([rng.choice(len(names), 2, replace=False, p=weights) for _ in range(number)])
    for place in range(2):
        for row, name in enumerate(names):
            assert abs((operation[:, place] == OPERATIONS.index(name)).mean() - (theirs[:, place] == row).mean()) < 0.02


@pytest.mark.parametrize(
    ("text", "low", "high", "spread"),
    [("rand-m6-p1", 6, 6, 0), ("rand-m6-mstdinf-p1", 0, 6, 6 / 12**0.5), ("rand-m9-mstd3-p1", 0, 10, None)],
)
def test_levels_are_spread_and_cut_as_timm_says(text, low, high, spread):
    parameters = parse_policy(text).sample(draws(text, num_images=8000))
    chosen = parameters["policy_op"] == OPERATIONS.index("ShearX")
    levels = abs(parameters["policy_argument"][chosen]) / 0.3 * 10
    assert low - 1e-9 <= levels.min()
    assert levels.max() <= high + 1e-9
    if spread is None:  # what is above 10 is cut: P(N(9, 3) > 10)
        assert abs((levels > 10 - 1e-9).mean() - 0.3694) < 0.05
    else:
        assert abs(levels.std() - spread) < 0.12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("randaugment", "policy='randaugment' is not known; give rand-m9-mstd0.5-inc1"),
        ("autoaugment", "is not known"),
        ("autoaugment-v7", "one of autoaugment-original"),
        ("rand-m9-x3", "'x3' is no setting that it takes"),
        ("rand-m9-m8", "'m8' is no setting that it takes"),
        ("rand-m9.5", "whole numbers"),
        ("rand-m11", r"m is a magnitude and must lie in 0..10"),
        ("rand-p1.5", "p is a probability"),
        ("rand-n0", "n is how many operations"),
        ("rand-inc2", "inc must be 0 or 1"),
        ("rand-tsome", "one of weights, 3a, 3aw"),
        ("rand-inc1-t3a", "inc has no effect"),
        ("rand-n16-tweights", "only 15 operations"),
        ("autoaugment-v0-m9", "takes mstd alone, got also m"),
        (9, "policy must be text"),
    ],
)
def test_a_policy_that_is_not_known_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        View(policy=text)


def test_keeping_no_bit_gives_black_on_every_pillow():
    crops = pictures(1)
    parameters = {
        "policy_flip": np.zeros(1, bool),
        "policy_op": np.array([[OPERATIONS.index("PosterizeIncreasing")]]),
        "policy_argument": np.array([[0.0]]),  # m9-mstd0.5 reaches level 10 for one image in 44
    }
    apply_policy_(crops, parameters, interpolation="bicubic")
    assert (crops == 0).all()


def test_all_the_named_policies_make_pictures_of_one_and_three_channels():
    for text in (*(f"autoaugment-{name}-mstd0.5" for name in AUTO_POLICIES), "rand-n4-p1", "rand-n4-p1-inc1-mmax12"):
        parameters = parse_policy(text).sample(draws(text, num_images=40))
        parameters["policy_flip"] = np.zeros(40, bool)
        for channels in (1, 3):
            crops = pictures(40, channels=channels, side=9)
            before = crops.clone()
            apply_policy_(crops, parameters, interpolation="bilinear")
            assert crops.shape == before.shape
            assert (crops != before).any()


def test_a_policy_moves_no_other_number_of_the_view():
    sizes = {"height": np.full(50, 40), "width": np.full(50, 30), "size": (16, 16)}
    arguments = {"seed": 1, "epoch": 2, "index": np.arange(50), "view": 0} | sizes
    plain = View(flip=0.5, jitter=0.5, hue=0.1).sample(**arguments)
    with_policy = View(flip=0.5, jitter=0.5, hue=0.1, policy=MAE).sample(**arguments)
    assert set(with_policy) - set(plain) == {"policy_op", "policy_argument", "policy_flip"}
    np.testing.assert_array_equal(with_policy["policy_flip"], plain["flip"])
    assert not with_policy["flip"].any()
    for name in set(plain) - {"flip"}:
        np.testing.assert_array_equal(with_policy[name], plain[name])


def test_the_fine_tuning_recipe_of_mae_is_its_papers():
    path = Path(__file__).resolve().parents[1] / "conf" / "augment" / "finetune_mae.yaml"
    (view,) = make_views(OmegaConf.load(path).views)
    assert view == View(
        scale=(0.08, 1.0), interpolation="bicubic", flip=0.5, policy=MAE, erase=0.25, erase_mode="pixel"
    )


VIEWS = [View(crop="resize", flip=0.5, policy="rand-m9-n3-mstd0.5-inc1"), View(crop="resize", flip=0.5)]


def loader(*, held: bool, encode=png, threads: int = 2, **settings) -> Loader:
    source = ImageList([encode(as_image_array(k)) for k in range(40)])
    settings = {"size": (16, 16), "channels": 3, "seed": 4, "threads": threads} | settings
    return Loader(source, settings.pop("views", VIEWS), in_memory_gib=4.0 if held else 0.0, **settings)


def as_image_array(number: int) -> np.ndarray:
    return pictures(40, side=16)[number].permute(1, 2, 0).contiguous().numpy()


@pytest.mark.parametrize("held", [True, False])
def test_the_loader_does_the_policy_after_the_flip_and_before_the_rest(held):
    one = loader(held=held, fill=[value / 255 for value in FILL])
    assert one.in_memory == held
    batch = next(one.batches(start_step=0, stop_step=1, global_batch_size=40))
    parameters = {name: value.numpy() for name, value in batch["parameters"][0].items()}
    expected = pictures(40, side=16)[batch["index"]]
    apply_policy_(expected, parameters, interpolation="bicubic", fill=[value / 255 for value in FILL])
    assert torch.equal(batch["crops"][0], expected)
    plain = {name: value.numpy() for name, value in batch["parameters"][1].items()}
    assert torch.equal(batch["crops"][1], pictures(40, side=16)[batch["index"]])
    assert plain["flip"].any()
    assert (batch["crops"][0] != batch["crops"][1]).flatten(1).any(1).float().mean() > 0.6
    views = Augment(VIEWS, mean=(0, 0, 0), std=(1, 1, 1))(batch)["views"]
    torch.testing.assert_close(views[0], expected / 255)


def test_policies_do_not_depend_on_threads_ranks_or_storage():
    arguments = {"start_step": 1, "stop_step": 3, "global_batch_size": 20}
    reference = [batch["crops"][0] for batch in loader(held=False, threads=1).batches(**arguments)]
    for other in (loader(held=True, threads=3), loader(held=False, threads=4)):
        assert all(torch.equal(one, batch["crops"][0]) for one, batch in zip(reference, other.batches(**arguments)))
    ranks = [list(loader(held=False).batches(**arguments, rank=rank, world_size=2)) for rank in range(2)]
    for step, whole in enumerate(reference):
        assert torch.equal(torch.cat([share[step]["crops"][0] for share in ranks]), whole)


def test_the_fill_is_what_moves_in_from_beyond_the_edge():
    crops = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    parameters = {
        "policy_flip": np.zeros(1, bool),
        "policy_op": np.array([[OPERATIONS.index("TranslateXRel")]]),
        "policy_argument": np.array([[0.25]]),
    }
    apply_policy_(crops, parameters, interpolation="bilinear", fill=[0.2, 0.4, 0.6])
    assert crops[0, :, 0, -1].tolist() == [51, 102, 153]
    assert (crops[0, :, :, :12] == 255).all()


def test_a_policy_on_data_that_is_no_picture_is_refused():
    arrays = [np.zeros((8, 8, 4), np.uint8)] * 4
    with pytest.raises(ValueError, match=r"works on grey or RGB images, the data has 4 channels"):
        Loader(ImageList(arrays), VIEWS, size=(8, 8), channels=4, seed=0)
    with pytest.raises(ValueError, match="fill needs one number per channel"):
        loader(held=True, fill=[0.5])
