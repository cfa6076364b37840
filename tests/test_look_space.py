"""`what=neighbours`, `map`, `clusters` and `outliers`: what lies near what in feature space."""

from __future__ import annotations

import base64
import io
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from eval.look import clusters, feature_map, neighbours, outliers, projections
from eval.look.clusters import agreement, cluster, label_votes
from eval.look.groups import COLOURS, REST, SYMBOLS, grouped
from eval.look.labels import agree, class_name, in_classes_of
from eval.look.map_page import Panel, at_lightness, map_page, sprite_sheet
from eval.look.neighbours import nearest_others, same_class_rate
from eval.look.outliers import mean_distance, robust_score
from eval.look.projections import Projected, project
from eval.look.result import DoesNotApply
from tests.browser import PHONE, overflow
from tests.run_folder import write_images
from tests.scenes import pretrained, scene

METHODS = ["simclr", "mae", "relative_location"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    return {method: pretrained(home / method, method) for method in METHODS}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Dark and bright pictures, 16 of each, in folders of their class, of which one bright picture lies in `dark`."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, low in (("dark", 0), ("bright", 190)):
        (root / label).mkdir()
        for number in range(16):
            pixels = rng.integers(low, low + 60, (32, 32, 3), np.uint8)
            where = root / ("dark" if (label, number) == ("bright", 7) else label)
            Image.fromarray(pixels).save(where / f"{label}_{number:02d}.png")
    return root


def blobs(num: int, *, groups: int = 3, dim: int = 8, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Features of groups that lie far apart, and which group each is of."""
    rng = np.random.default_rng(seed)
    centres = 10 * np.linalg.qr(rng.normal(size=(dim, dim)))[0][:groups]
    group = rng.permutation(np.arange(num) % groups)
    return torch.from_numpy(centres[group] + rng.normal(size=(num, dim))).float(), group


# ---- labels --------------------------------------------------------------------------------------------------------


def test_labels_of_another_split_are_numbered_as_trains():
    assert in_classes_of(np.array([0, 1, 2, -1]), ["b", "a", "x"], ["a", "b"]).tolist() == [1, 0, -1, -1]
    several = in_classes_of(np.array([[1, 0], [1, 1], [-1, -1]]), ["b", "a"], ["a", "b"])
    assert several.tolist() == [[0, 1], [1, 1], [-1, -1]]


def test_images_agree_where_they_share_a_class():
    assert agree(np.array([1, -1]), np.array([[1, 2], [-1, 1]])).tolist() == [[True, False], [False, False]]
    several = np.array([[1, 0, 1], [-1, -1, -1]])
    others = np.array([[[0, 0, 1], [0, 1, 0]], [[1, 0, 0], [-1, -1, -1]]])
    assert agree(several, others).tolist() == [[True, False], [False, False]]
    assert class_name(several[0], ["a", "b", "c"]) == "a, c"


# ---- neighbours ----------------------------------------------------------------------------------------------------


def test_nearest_others_are_those_of_scikit_learn_without_the_image_itself():
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    found = nearest_others(rows, rows, np.arange(60), 7)
    distance, place = NearestNeighbors(n_neighbors=8, metric="cosine").fit(rows.numpy()).kneighbors(rows.numpy())
    assert (found.place == place[:, 1:]).all()
    np.testing.assert_allclose(found.similarity.numpy(), 1 - distance[:, 1:], atol=1e-5)


def test_an_image_among_many_equal_ones_is_not_its_own_neighbour():
    rows = torch.cat([torch.ones(9, 4), torch.eye(4)])
    found = nearest_others(rows, rows, np.arange(13), 3)
    assert not (found.place == np.arange(13)[:, None]).any()
    assert (found.similarity[:9] > 1 - 1e-6).all()


def test_the_share_of_the_own_class_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    labels, bank = rng.integers(-1, 3, 20), rng.integers(-1, 3, 30)
    place = rng.integers(0, 30, (20, 5))
    same = [bank[n] == label for label, near in zip(labels, place) for n in near if label >= 0 and bank[n] >= 0]
    known = bank[bank >= 0]
    chance = np.mean([(known == label).mean() for label in labels if label >= 0])
    rate = same_class_rate(labels, bank, place, np.full(20, -1))
    assert rate == pytest.approx((np.mean(same), chance))


@pytest.mark.parametrize("method", METHODS)
def test_the_nearest_of_an_image_is_its_planted_copy_and_never_itself(method, runs, tmp_path):
    write_images(tmp_path, "a", each=12)
    (tmp_path / "a" / "copy.png").write_bytes((tmp_path / "a" / "5.png").read_bytes())
    words = ["data=folder", f"data.root={tmp_path}", "split=train", "neighbours.count=3"]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    found = neighbours.look(scene(runs[method], "neighbours", *words, f"indices=[{names.index('5.png')},0]"))
    for name in ("trained", "untrained"):
        near = [Path(each["image"]).name for each in found.data["images"][0]["neighbours"][name]]
        assert near[0] == "copy.png"
        assert "5.png" not in near
    assert not any(key.startswith("same_class") for key in found.metrics)


def test_a_persons_file_that_is_in_train_is_not_its_own_neighbour(runs, photos):
    image = photos / "dark" / "dark_03.png"
    words = ["data=folder", f"data.root={photos}", f"images={image}"]
    found = neighbours.look(scene(runs["simclr"], "neighbours", *words))
    assert str(image) not in [each["image"] for each in found.data["images"][0]["neighbours"]["trained"]]


def test_neighbours_share_the_class_where_the_class_is_plain_to_see(runs, photos):
    found = neighbours.look(scene(runs["mae"], "neighbours", "data=folder", f"data.root={photos}"))
    assert found.metrics["same_class_trained"] > 0.85  # one label of 32 is swapped
    assert found.metrics["same_class_by_chance"] == pytest.approx(((15 * 14 + 17 * 16) / 31) / 32)
    assert found.pictures[""].dtype == np.uint8


def test_the_image_asked_is_cut_to_a_square_as_its_neighbours_are_and_not_squashed():
    tall = np.zeros((40, 20, 3), np.uint8)
    tall[10:30] = np.arange(20, dtype=np.uint8)[:, None, None]
    assert (neighbours.square(tall, 20) == tall[10:30]).all()
    assert (neighbours.square(tall.swapaxes(0, 1), 20) == tall[10:30].swapaxes(0, 1)).all()


def test_an_untrained_network_alone_has_one_row_per_image(runs):
    words = ["model=resnet18", "data=embedded", "data.source.num_train=30", "data.source.num_test=12"]
    found = neighbours.look(scene("random", "neighbours", *words, "num_images=2"))
    assert set(found.data["images"][0]["neighbours"]) == {"untrained"}
    assert set(found.metrics) == {"same_class_untrained", "same_class_by_chance"}


# ---- clusters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [True, False])
def test_clusters_are_the_groups_that_lie_apart(spherical):
    features, group = blobs(90)
    found = cluster(features, 3, spherical=spherical, seed=0)
    assert agreement(group, found.cluster) == pytest.approx({"purity": 1.0, "nmi": 1.0, "ari": 1.0})


def test_k_means_fits_as_well_as_that_of_scikit_learn():
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    found = cluster(features, 6, spherical=False, seed=0)
    other: Any = KMeans(6, n_init=10, random_state=0).fit(features.numpy())  # pyright: ignore[reportArgumentType]
    assert -found.closeness.sum() < 1.03 * other.inertia_
    own = features - torch.from_numpy(found.centroids)[found.cluster]
    assert -found.closeness.sum() == pytest.approx(own.square().sum().item(), rel=1e-4)


def test_purity_information_and_rand_index_are_those_of_their_definitions():
    rng = np.random.default_rng(3)
    labels, group = rng.integers(0, 3, 40), rng.integers(0, 4, 40)
    found = agreement(labels, group)
    joint = np.array([[np.mean((labels == a) & (group == b)) for b in range(4)] for a in range(3)])
    one, two = joint.sum(1), joint.sum(0)
    mutual = sum(
        joint[a, b] * np.log(joint[a, b] / one[a] / two[b]) for a in range(3) for b in range(4) if joint[a, b] > 0
    )
    entropy = [-(p * np.log(p)).sum() for p in (one, two)]
    pairs = [(i, j) for i in range(40) for j in range(i)]
    both = sum(labels[i] == labels[j] and group[i] == group[j] for i, j in pairs)
    in_labels, in_group = (sum(each[i] == each[j] for i, j in pairs) for each in (labels, group))
    expected = in_labels * in_group / len(pairs)
    assert found["purity"] == pytest.approx(joint.max(0).sum())
    assert found["nmi"] == pytest.approx(mutual / np.mean(entropy))
    assert found["ari"] == pytest.approx((both - expected) / ((in_labels + in_group) / 2 - expected))


def test_a_swapped_label_stands_at_the_top_of_the_vote():
    features, group = blobs(90)
    labels = group.copy()
    labels[40] = (group[40] + 1) % 3
    votes = label_votes(features, labels, 10)
    assert votes.margin.argmax() == 40
    assert votes.rival[40] == group[40]
    assert votes.margin[40] == pytest.approx(1.0)
    assert (np.delete(votes.margin, 40) < 0).all()


def test_the_two_nearest_outvote_three_that_are_further_as_their_ranks_logarithms_say():
    angles = np.radians([0, 1, 2, 4, 8, 16])  # neighbours of the first, the nearest first
    rows = torch.from_numpy(np.c_[np.cos(angles), np.sin(angles)]).float()
    votes = label_votes(rows, np.array([0, 0, 0, 1, 1, 1]), 5)
    weight = 1 / np.log2([2, 3, 4, 5, 6])
    assert votes.margin[0] == pytest.approx((weight[2:].sum() - weight[:2].sum()) / weight.sum())
    assert votes.margin[0] < 0


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_in_the_wrong_folder_is_the_first_suspect(method, runs, photos):
    words = ["data=folder", f"data.root={photos}", "clusters.neighbours=8"]
    found = clusters.look(scene(runs[method], "clusters", *words))
    suspects = found.data["suspected_labels"]
    assert [Path(each["image"]).name for each in suspects] == ["bright_07.png"]
    assert suspects[0]["label"] == "dark"
    assert suspects[0]["neighbours_say"] == suspects[0]["cluster_is_mostly"] == "bright"
    assert found.metrics["purity"] == pytest.approx(31 / 32)
    assert set(found.pictures) == {"", "suspected_labels"}


def test_clusters_without_labels_say_what_is_left_out(runs, tmp_path):
    write_images(tmp_path, "all", each=20)
    found = clusters.look(scene(runs["simclr"], "clusters", "data=folder", f"data.root={tmp_path}"))
    assert "purity" not in found.metrics
    assert any("left out" in line for line in found.lines)
    assert len(found.data["clusters"]) == 10


def test_a_single_label_is_not_voted_on(runs, photos, monkeypatch):
    looked = scene(runs["simclr"], "clusters", "data=folder", f"data.root={photos}")
    sample = looked.features()
    labels = np.where(np.arange(len(sample)) == 3, sample.labels, -1)
    monkeypatch.setattr(looked, "features", lambda: replace(sample, labels=labels))
    found = clusters.look(looked)
    assert "one image is labelled" in found.lines[-1]
    assert "suspected_labels" not in found.metrics
    assert len(found.data["clusters"]) == 10


def test_clusters_that_nothing_falls_into_are_told(runs, tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "0.png")
    Image.new("RGB", (32, 32), (30, 30, 200)).save(tmp_path / "1.png")
    for number in range(2, 8):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / f"{number % 2}.png").read_bytes())
    words = ["data=folder", f"data.root={tmp_path}", "clusters.count=4"]
    found = clusters.look(scene(runs["simclr"], "clusters", *words))
    assert found.metrics["empty"] == sum(each["size"] == 0 for each in found.data["clusters"]) >= 2
    assert any("empty" in line for line in found.lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["clusters.count=0"], "clusters.count must lie in"), (["clusters.margin=2"], "shares of votes")],
)
def test_clusters_that_cannot_be_are_refused(runs, words, message):
    with pytest.raises(ValueError, match=message):
        clusters.look(scene(runs["simclr"], "clusters", *words))


# ---- outliers ------------------------------------------------------------------------------------------------------


def test_scores_are_robust_deviations_of_the_logarithm():
    distance = np.exp([0.0, 1.0, 2.0, 3.0, 100.0])
    assert robust_score(distance) == pytest.approx(0.6745 * np.array([-2, -1, 0, 1, 98]))
    assert (robust_score(np.full(5, 0.3)) == 0).all()


def test_images_of_one_kind_hold_no_outlier_and_a_far_one_is():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(300, 16)) + 5, -np.ones((1, 16))])
    score = robust_score(mean_distance(torch.from_numpy(rows).float(), 10))
    assert score[:300].max() < 3.5
    assert score[300] > 3.5
    assert score.argmax() == 300


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_unlike_all_others_is_ranked_first(method, runs, tmp_path):
    rng = np.random.default_rng(1)
    for number in range(24):
        Image.fromarray(rng.integers(0, 50, (32, 32, 3), np.uint8)).save(tmp_path / f"{number:02d}.png")
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::4] = (255, 220, 0)
    Image.fromarray(stripes).save(tmp_path / "odd.png")
    found = outliers.look(scene(runs[method], "outliers", "data=folder", f"data.root={tmp_path}"))
    first = found.data["ranking"][0]
    assert Path(first["image"]).name == "odd.png"
    assert first["outlier"]
    assert found.metrics["outliers"] == sum(each["outlier"] for each in found.data["ranking"])


def test_a_threshold_below_zero_is_refused(runs):
    with pytest.raises(ValueError, match=r"outliers\.threshold above 0"):
        outliers.look(scene(runs["simclr"], "outliers", "outliers.threshold=0"))


# ---- maps ----------------------------------------------------------------------------------------------------------


def test_principal_components_are_those_of_the_singular_values():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(4))
    found = project(features, "pca", seed=0)
    rows = (features / features.norm(dim=1, keepdim=True)).double().numpy()
    centred = rows - rows.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found.place), np.abs(left[:, :2] * values[:2]), atol=1e-6)
    assert found.facts["explained_variance"] == pytest.approx((values**2 / (values**2).sum())[:2])


@pytest.mark.parametrize("name", ["tsne", "umap"])
def test_groups_that_lie_apart_do_so_in_the_map_and_a_seed_makes_one_map(name, monkeypatch):
    features, group = blobs(60)
    if name == "umap":
        monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling takes ten times as long as a map of so few
        monkeypatch.setattr(pytest.importorskip("numba").config, "DISABLE_JIT", True)
        pytest.importorskip("umap")
        features, group = blobs(30, groups=2)
    found = project(features, name, seed=1, neighbours=8)
    near = NearestNeighbors(n_neighbors=2).fit(found.place).kneighbors(found.place, return_distance=False)[:, 1]
    assert (group[near] == group).mean() > 0.95
    assert found.facts["trustworthiness"] > 0.8
    assert (project(features, name, seed=1, neighbours=8).place == found.place).all()


def test_the_perplexity_fits_the_number_of_images():
    features, _ = blobs(25)
    assert project(features, "tsne", seed=0).facts["perplexity"] == 8
    with pytest.raises(ValueError, match=r"must lie in 1\.\.8"):
        project(features, "tsne", seed=0, perplexity=30)


@pytest.mark.parametrize(("num", "neighbours"), [(8, 7), (30, 15)])
def test_the_neighbours_of_umap_fit_the_number_of_images(num, neighbours, monkeypatch):
    class Umap:
        def __init__(self, **given: Any) -> None:
            assert given["n_neighbors"] == neighbours

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            return rows[:, :2]

    module = types.ModuleType("umap")
    module.UMAP = Umap  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "umap", module)
    features, _ = blobs(num)
    assert project(features[:num], "umap", seed=0).facts["neighbours"] == neighbours


def test_the_time_of_maps_is_told_before_they_are_made(runs, monkeypatch, capsys):
    def project(*_: Any, **__: Any) -> Projected:
        raise RuntimeError(capsys.readouterr().out)

    monkeypatch.setattr(feature_map, "project", project)
    monkeypatch.setitem(projections.SECONDS, "tsne", (0.0, 0.5))
    with pytest.raises(RuntimeError, match="t-SNE of 24 images, 2 times: about 24 s"):
        feature_map.look(scene(runs["simclr"], "map", "map.projections=[tsne]"))


def test_neighbours_of_umap_without_umap_are_refused(runs):
    with pytest.raises(ValueError, match=r"map\.umap_neighbours has no effect without umap"):
        feature_map.look(scene(runs["simclr"], "map", "map.umap_neighbours=5"))


def test_umap_that_is_missing_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ValueError, match="--extra map"):
        project(blobs(20)[0], "umap", seed=0)


def test_up_to_ten_classes_have_a_colour_and_of_more_the_most_frequent():
    few = grouped(np.array([2, 0, -1, 2]), ["a", "b", "c"])
    assert few.names == ["a", "c", "no label"]
    assert few.number.tolist() == [1, 0, 2, 1]
    assert [few.colour(group) for group in range(3)] == [*COLOURS[:2], REST]
    many = grouped(np.repeat(np.arange(12), np.arange(1, 13)), None)
    assert many.names == [*map(str, range(3, 12)), "3 other classes"]
    assert (many.number == 9).sum() == 1 + 2 + 3
    assert grouped(np.full(4, -1), None).names == ["images"]


@pytest.mark.parametrize("method", ["simclr", "mae"])
def test_a_map_shows_the_trained_beside_the_untrained(method, runs):
    found = feature_map.look(scene(runs[method], "map"))
    assert set(found.pictures) == {"pca", "tsne"}
    assert found.arrays["tsne_trained"].shape == found.arrays["tsne_untrained"].shape == (24, 2)
    assert set(found.data["projections"]["tsne"]) == {"untrained", "trained"}
    assert any("do not" in line for line in found.lines if line.startswith("t-SNE"))
    size = re.search(r"one file of ([\d.]+) MB", " ".join(found.lines))
    assert size is not None
    assert float(size[1]) == pytest.approx(len(found.pages[""].encode()) / 1e6, abs=0.06)


def test_a_distance_is_as_long_upwards_as_sideways_in_the_picture():
    corners = np.array([(0, 0), (10, 0), (0, 2), (10, 2)], float)
    map_of = Projected(corners, {"trustworthiness": 1.0})
    picture = feature_map._picture("4 images", "pca", {"trained": map_of}, grouped(np.full(4, -1), None))
    colour = [int(COLOURS[0][at : at + 2], 16) for at in (1, 3, 5)]
    rows, columns = np.nonzero((picture == colour).all(-1))
    dot = 7  # pixels, about: both extents hold one
    assert np.ptp(columns) - dot == pytest.approx(5 * (np.ptp(rows) - dot), rel=0.1)


def test_a_map_of_three_images_says_which_setting_gives_more(runs):
    with pytest.raises(DoesNotApply, match="give more sample="):
        feature_map.look(scene(runs["simclr"], "map", "sample=3"))


def test_projections_that_are_none_are_refused(runs):
    with pytest.raises(ValueError, match="pca, tsne, umap"):
        feature_map.look(scene(runs["simclr"], "map", "map.projections=[lda]"))
    with pytest.raises(ValueError, match=r"map\.perplexity has no effect"):
        feature_map.look(scene(runs["simclr"], "map", "map.projections=[pca]", "map.perplexity=5"))


# ---- the page ------------------------------------------------------------------------------------------------------

COLUMN = ((255, 0, 0), (0, 160, 0), (0, 0, 255))


def a_page(folder: Path) -> Path:
    """Images in a square of 3 x 3 places, whose colour is that of their column."""
    place = np.array([(x, y) for x in range(3) for y in range(3)], float)
    thumbnails = np.zeros((9, 16, 16, 3), np.uint8)
    thumbnails[:] = np.array([COLUMN[int(x)] for x, _ in place], np.uint8)[:, None, None]
    text = map_page(
        title="Map of <b>a run</b>",
        subject="9 images",
        panels=[
            Panel(name, title, place if title == "trained" else place[:, ::-1], "facts", f"about {name}")
            for name in ("PCA", "t-SNE")
            for title in ("untrained", "trained")
        ],
        thumbnails=thumbnails,
        names=[f"photo_{int(x)}{int(y)}</script><img src=x onerror=alert(1)>" for x, y in place],
        labels=[f"class {int(x)}" for x, _ in place],
        groups=["class 0", "<i>1</i>", "class 2"],
        number=place[:, 0].astype(int),
        colours=COLOURS[:3],
        symbols=SYMBOLS[:3],
    )
    (folder / "map.html").write_text(text)
    return folder / "map.html"


def test_thumbnails_stand_in_the_sheet_where_the_page_looks_for_them():

    thumbnails = np.random.default_rng(0).integers(0, 255, (7, 1, 1, 3), np.uint8).repeat(16, 1).repeat(16, 2)
    uri, columns = sprite_sheet(thumbnails)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    for number in range(7):
        row, column = divmod(number, columns)
        centre = sheet[row * 16 + 8, column * 16 + 8].astype(int)
        assert np.abs(centre - thumbnails[number, 0, 0]).max() < 12


def test_colours_are_dark_on_white_and_light_on_black_with_their_hue():
    assert at_lightness("#ff0000", most=0.25) == "#800000"
    assert at_lightness("#000080", least=0.5) == "#0000ff"
    assert at_lightness("#3f90da", least=0.1, most=0.9) == "#3f90da"


def test_arrow_keys_walk_from_image_to_image_and_ring_it_in_both_maps(browser, tmp_path):
    address = a_page(tmp_path)
    visit = browser.open(address)
    visit.page.wait_for_selector(".map-plot .scatterlayer")
    plot = visit.page.locator(".map-plot").nth(1)  # trained: x to the right
    plot.focus()
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.inner_text("#map-text").startswith("class 0: photo_00</script>")
    visit.page.keyboard.press("ArrowRight")
    visit.page.keyboard.press("ArrowUp")
    assert visit.page.inner_text("#map-text").startswith("class 1: photo_11")
    assert visit.page.get_attribute("#map-thumb", "aria-label") == "image of class class 1"
    visit.page.keyboard.press("ArrowUp")
    rings = visit.page.evaluate(
        "[...document.querySelectorAll('.map-plot')].map((p) => [p.data[1].x[0], p.data[1].y[0]])"
    )
    assert rings == [[2, 1], [1, 2]]
    shot = Image.open(io.BytesIO(visit.page.locator("#map-thumb").screenshot())).convert("RGB")
    assert np.abs(np.array(shot.getpixel((50, 50))) - COLUMN[1]).max() < 30  # pyright: ignore
    visit.page.keyboard.press("Escape")
    assert not visit.page.is_visible("#map-card")
    visit.check(address.as_uri())


def test_the_page_of_one_part_has_no_link_to_itself_and_nothing_over_the_maps_until_an_image_is_chosen(
    browser, tmp_path
):
    visit = browser.open(a_page(tmp_path))
    visit.page.wait_for_selector(".map-plot .scatterlayer")
    assert visit.page.locator("nav a").count() == 0
    assert not visit.page.is_visible("#map-card")
    visit.page.locator(".map-plot").first.focus()
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.is_visible("#map-card")


def test_a_distance_is_as_long_upwards_as_sideways_on_the_page(browser, tmp_path):
    visit = browser.open(a_page(tmp_path))
    visit.page.wait_for_selector(".map-plot .scatterlayer")
    pixels_each = visit.page.evaluate(
        "[...document.querySelectorAll('.map-plot')].flatMap((p) => ['xaxis', 'yaxis'].map((name) =>"
        " p._fullLayout[name]._length / Math.abs(p._fullLayout[name].range[1] - p._fullLayout[name].range[0])))"
    )
    assert pixels_each == pytest.approx([pixels_each[0]] * 4, rel=1e-3)


def test_the_pointer_shows_an_image_and_a_class_can_be_shown_alone(browser, tmp_path):
    address = a_page(tmp_path)
    visit = browser.open(address, viewport=PHONE, dark=True)
    visit.page.wait_for_selector(".map-plot .scatterlayer .point")
    assert overflow(visit) == 0
    visit.page.locator(".map-plot").first.scroll_into_view_if_needed()
    dot = visit.page.locator(".map-plot").first.locator(".point").nth(4)
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    visit.until("() => document.getElementById('map-text').textContent.includes('photo_11')")
    visit.page.get_by_role("button", name="class 2").click()
    opacity = visit.page.evaluate("document.querySelector('.map-plot').data[0].marker.opacity")
    assert [value > 0 for value in opacity] == [False] * 6 + [True] * 3
    assert not visit.page.is_visible("#map-card")
    assert visit.page.get_by_role("button", name="<i>1</i>").get_attribute("aria-pressed") == "false"
    visit.page.get_by_role("button", name="t-SNE").click()
    assert visit.page.inner_text("#map-caution") == "about t-SNE"
    visit.check(address.as_uri())
