"""The neighbours that each search finds, against all pairs sorted; banks of few labels, in slices and on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import ssl.distributed as distributed
from eval import knn as knn_command
from eval import largest, neighbours, rows, scan
from eval.bank import FeatureStore, close_gaps, free_bytes
from eval.config import register
from eval.knn import knn
from eval.neighbours import nearest
from eval.rows import Rows
from eval.scan import bf16_scan, make_scan
from ssl.config import CONF

CPU = torch.device("cpu")
INDEXES = ["faiss", "torch", "shortlist"]


def reference(bank: Tensor, queries: Tensor, count: int, *, metric: str) -> list[list[int]]:
    """All pairs in float64, rounded to fp32, sorted by (closeness, place); `dot` is the cosine of unit lengths."""
    found = []
    for query in queries.double().numpy():
        order = []
        for place, row in enumerate(bank.double().numpy()):
            if metric == "euclidean":
                order.append((np.float32(((query - row) ** 2).sum()), place))
                continue
            length = np.sqrt(query @ query) * np.sqrt(row @ row) if metric == "cosine" else 1.0
            order.append((-np.float32(query @ row / length), place))
        found.append([place for _, place in sorted(order)[:count]])
    return found


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_small_pieces(monkeypatch, *, dim: int, block: int = 60, tile: int = 16, chunk: int = 7) -> None:
    """Many blocks, tiles and chunks from few features, each with a smaller last one."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", block * 4 * dim)
    monkeypatch.setattr(scan, "TILE", tile)
    monkeypatch.setattr(scan, "CHUNK", chunk)
    monkeypatch.setattr(neighbours, "TILE", tile)
    monkeypatch.setattr(largest, "GROUP", 4)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("index", INDEXES)
def test_every_search_finds_what_sorting_all_pairs_finds(index, metric, pieces, monkeypatch):
    bank, queries = seeded(331, 9), seeded(23, 9, seed=1)
    if pieces:
        in_small_pieces(monkeypatch, dim=9)
    for count in (1, 5, 40):
        found = nearest(Rows(bank, metric, CPU), queries, count, index=index)
        assert found.place.tolist() == reference(bank, queries, count, metric=metric)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("index", INDEXES)
def test_duplicates_zeros_and_equal_distances_go_by_their_place(index, metric, pieces, monkeypatch):
    bank, queries = seeded(300, 6).round(), seeded(20, 6, seed=1).round()  # whole numbers: many are equally close
    bank[40:90], bank[250:], bank[7], queries[3] = bank[5], bank[5], 0.0, 0.0
    queries[:3] = bank[5]
    if pieces:
        in_small_pieces(monkeypatch, dim=6)
    if metric == "cosine":  # the tie is one of the features that have been scaled, in fp32
        expected = reference(rows.unit_length(bank), rows.unit_length(queries), 30, metric="dot")
    else:
        expected = reference(bank, queries, 30, metric=metric)
    assert nearest(Rows(bank, metric, CPU), queries, 30, index=index).place.tolist() == expected
    assert expected[0][:3] == [5, 40, 41]


@pytest.mark.parametrize("index", INDEXES)
def test_features_that_are_nearly_one_point_are_still_told_apart(index):
    bank, queries = 1 + 1e-4 * seeded(400, 8), 1 + 1e-4 * seeded(9, 8, seed=1)  # a backbone close to collapse
    found = nearest(Rows(bank, "euclidean", CPU), queries, 5, index=index)
    assert found.place.tolist() == reference(bank, queries, 5, metric="euclidean")
    found = nearest(Rows(bank, "cosine", CPU), queries, 5, index=index)
    assert found.place.tolist() == reference(rows.unit_length(bank), rows.unit_length(queries), 5, metric="dot")


@pytest.mark.parametrize("size", [1e-22, 1e-20, 1e-19, 1e-17, 1e15, 1e17])
@pytest.mark.parametrize("index", INDEXES)
def test_features_whose_squares_leave_the_range_of_fp32_are_still_told_apart(index, size):
    bank, queries = size * seeded(400, 16), size * seeded(9, 16, seed=1)
    found = nearest(Rows(bank, "euclidean", CPU), queries, 5, index=index)
    assert found.place.tolist() == reference(bank, queries, 5, metric="euclidean")


@pytest.mark.parametrize("index", INDEXES)
def test_the_longest_features_that_are_not_refused_are_told_apart(index):
    bank, queries = seeded(400, 16).clamp(-1, 1), seeded(50, 16, seed=1).clamp(-1, 1)
    bank[7], queries[3] = 1.0, -1.0  # the corners that are farthest from one another
    bank, queries = 0.9999 * 2.0**59 * bank, 0.9999 * 2.0**59 * queries  # a length of 2**61 at most
    labels = torch.zeros(400, dtype=torch.int64)
    knn(bank, labels, queries, labels[:50], k=[5], num_classes=1, metric="euclidean", index=index)
    found = nearest(Rows(bank, "euclidean", CPU), queries, 5, index=index)
    assert found.place.tolist() == reference(bank, queries, 5, metric="euclidean")
    assert found.num_open < 25


@pytest.mark.parametrize("index", INDEXES)
def test_a_query_whose_error_has_no_bound_in_fp32_is_measured_against_all(index):
    bank, queries = 1e17 * seeded(400, 8), 1e17 * seeded(6, 8, seed=1)
    bank[7], queries[3] = 5e18, 6.3e18  # no two are too far from one another, but the sum of their lengths is too large
    found = nearest(Rows(bank, "euclidean", CPU), queries, 5, index=index)
    assert found.place.tolist() == reference(bank, queries, 5, metric="euclidean")
    assert found.num_open >= 1
    assert nearest(Rows(100 * bank, "euclidean", CPU), 100 * queries, 5, index=index).num_open == 6  # none is finite


def test_products_that_bfloat16_rounds_by_half_a_step_err_by_no_more_than_is_said():
    query = torch.tensor([[1.0039067268371582, 0.00390625]])  # both round up by nearly 2**-8, so does their product
    row = torch.tensor([[1.9882817268371582, 0.0159912109375]])
    bank = torch.cat([row, -row, row, -row])  # with their mean at zero
    found = bf16_scan(Rows(bank, "euclidean", CPU), query, 4)
    exact = -(query.double() - bank.double()).square().sum(1)  # (4,)
    assert ((found.closeness[0].double() - exact[found.place[0]]).abs() <= found.error.double()).all()


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("index", INDEXES)
def test_a_scan_errs_by_no_more_than_it_says_and_passes_over_nothing_closer_than_it_says(
    index, metric, pieces, monkeypatch
):
    bank, queries = 3 + seeded(500, 33), 3 + seeded(40, 33, seed=1)
    if pieces:
        in_small_pieces(monkeypatch, dim=33)
    space = Rows(bank, metric, CPU)
    prepared, wanted = space.prepare(queries), space.prepare(bank)
    found = make_scan(index, CPU)[0](space, prepared, 20)
    if metric == "cosine":
        exact = prepared.double() @ wanted.double().T  # (M, N)
    else:
        exact = -torch.cdist(prepared.double(), wanted.double()).square()
    is_candidate = found.closeness > -torch.inf  # (M, m)
    off = torch.where(is_candidate, found.closeness - exact.gather(1, found.place), 0.0).abs().amax(1)  # (M,)
    assert (off <= found.error).all()
    assert (is_candidate.sum(1) >= 20).all()
    left_out = torch.ones_like(exact, dtype=torch.bool)
    for one, places, chosen in zip(left_out, found.place, is_candidate):
        one[places[chosen]] = False
    assert (left_out.sum(1) > 300).all()
    others = exact.masked_fill(~left_out, -torch.inf).amax(1)  # (M,)
    assert (others <= found.limit).all()
    if index == "shortlist":
        assert (off > 1e-5).any()  # bfloat16 was used, so the bound had something to bound


def test_what_the_shortlist_passed_over_is_looked_for_again():
    bank = torch.cat([seeded(1, 64).repeat(500, 1) + 1e-5 * seeded(500, 64, seed=1), seeded(100, 64, seed=2)])
    queries = bank[:500:25] + 1e-5
    found = nearest(Rows(bank, "cosine", CPU), queries, 5, index="shortlist")
    exact = nearest(Rows(bank, "cosine", CPU), queries, 5, index="torch")
    assert found.num_open == len(queries)  # 64 candidates of 500 that bfloat16 cannot tell apart
    assert torch.equal(found.place, exact.place)


def test_largest_keeps_the_largest_of_a_bank_sorted_towards_the_query():
    score = torch.arange(4000.0).repeat(3, 1) + torch.tensor([[0.0], [0.25], [0.5]])  # each tile beats all before
    best = offered(score, 10, most=40)
    assert torch.equal(best.value, score.topk(10).values)
    assert torch.equal(best.place, score.topk(10).indices)


@pytest.mark.parametrize("level", [-1000.0, -10.0, 0.0, 10.0])  # scores of either sign, and of both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 20, 300])
def test_largest_keeps_all_within_the_margin_and_leaves_out_nothing_above_its_bar(count, dtype, level):
    score = (level + seeded(5, 3000)).to(dtype)
    best = offered(score, count, most=3000, margin=0.5)
    for i, each in enumerate(score.float()):
        kept = best.place[i][best.value[i] > -torch.inf]
        assert torch.equal(each[kept], best.value[i, : len(kept)])
        assert torch.equal(best.value[i], best.value[i].sort(descending=True).values)
        assert set((each >= each.sort().values[-count]).nonzero()[:, 0].tolist()) <= set(kept.tolist())
        assert len(set(kept.tolist())) == len(kept)
        left_out = torch.ones(3000, dtype=torch.bool).index_fill(0, kept, False)
        assert each[left_out].max() <= best.bar[i]
        step = 8.0 if dtype == torch.bfloat16 and level == -1000 else 0.07  # between numbers that bfloat16 can hold
        assert each.sort().values[-count] - 0.5 - step <= best.bar[i]


def test_largest_with_little_room_says_what_did_not_fit():
    score = torch.zeros(2, 900)
    score[1] = seeded(900).clamp_max(1.0)
    best = offered(score, 4, most=16, margin=0.1)
    assert best.value.tolist() == [[0.0] * 16, [1.0] * 16]
    assert best.bar.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_lets_no_score_wait_where_all_are_equal(dtype):
    best = largest.Largest(16, 20, 80, CPU)
    for first in range(0, 6400, 640):
        best.offer(torch.ones(16, 640, dtype=dtype), first, torch.zeros_like)
        assert best.num_waiting == 0
    assert (best.value == 1).all()
    assert best.value.shape == (16, 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1])
def test_largest_keeps_the_largest_of_scores_that_all_lie_within_the_margin(spread, dtype):
    score = (1 + spread * seeded(32, 6400)).to(dtype)
    best = offered(score, 20, most=80, margin=2.0)
    assert torch.equal(best.value, score.float().topk(80).values)
    for each, bar, places in zip(score.float(), best.bar, best.place):
        assert len(set(places.tolist())) == 80
        assert each.index_fill(0, places, -torch.inf).max() <= bar <= each[places].min()


def test_largest_settles_what_waits_before_it_is_more_than_its_limit(monkeypatch):
    monkeypatch.setattr(largest, "MOST_WAIT", 50)
    score = seeded(16, 6400)
    best = largest.Largest(16, 40, 160, CPU)
    for first in range(0, 6400, 640):
        best.offer(score[:, first : first + 640], first, torch.zeros_like)
        assert best.num_waiting <= 50
    best.settle(torch.zeros_like)
    assert torch.equal(best.value[:, :40], score.topk(40).values)


def offered(score: Tensor, count: int, *, most: int, margin: float = 0.0) -> largest.Largest:
    """What is kept of scores (B, N) that come in tiles of 640 and settle halfway."""
    best = largest.Largest(len(score), count, most, CPU)

    def away(least: Tensor) -> Tensor:
        return torch.full_like(least, margin)

    for first in range(0, score.shape[1], 640):
        best.offer(score[:, first : first + 640], first, away)
        if first == 1280:
            best.settle(away)
    best.settle(away)
    return best


@pytest.mark.parametrize("index", INDEXES)
def test_no_queries_have_no_neighbours(index):
    found = nearest(Rows(seeded(30, 6), "cosine", CPU), torch.empty(0, 6), 4, index=index)
    assert found.place.shape == found.closeness.shape == (0, 4)


def test_whole_numbers_sort_as_the_fp32_values_they_stand_for():
    tiny = torch.finfo(torch.float32).smallest_normal
    value = torch.tensor([-torch.inf, -3e38, -1.5, -1.0, -tiny, -tiny / 4, 0.0, tiny / 4, tiny, 1.0, 1.5, torch.inf])
    number = largest.in_order(value)
    assert (number.diff() > 0).all()
    assert torch.equal(largest.in_order(torch.tensor([-0.0])), largest.in_order(torch.tensor([0.0])))


def test_a_bank_of_one_block_is_prepared_once_for_all_that_read_it():
    calls = []

    class Watched(Rows):
        def prepare(self, features: Tensor) -> Tensor:
            calls.append(len(features))
            return super().prepare(features)

    space = Watched(seeded(211, 6), "cosine", CPU)
    for count in (3, 5):
        nearest(space, seeded(7, 6, seed=1), count, index="torch")
    assert calls.count(211) == 1


def test_whether_a_shortlist_pays_is_tried_on_the_first_block_with_few_queries(monkeypatch):
    blocks, numbers = [], []
    scanned = neighbours.bf16_scan

    def watched(space: Rows, queries: Tensor, count: int) -> scan.Candidates:
        blocks.append(len(space))
        numbers.append(len(queries))
        return scanned(space, queries, count)

    monkeypatch.setattr(neighbours, "bf16_scan", watched)
    monkeypatch.setattr(neighbours, "multiplies_bfloat16", lambda: True)
    in_small_pieces(monkeypatch, dim=6, tile=2048, chunk=2048)
    for num in (4096, 4351, 5000):
        neighbours.shortlist_pays(Rows(seeded(211, 6), "cosine", CPU), seeded(num, 6, seed=1), 5)
    assert blocks == [60] * 3
    assert numbers == [128, 128, 125]


# ---- votes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vote", ["weighted", "majority"])
@pytest.mark.parametrize("index", INDEXES)
def test_euclidean_votes_are_those_of_scikit_learn(index, vote):
    bank, labels = seeded(200, 5), torch.randint(4, (200,), generator=torch.Generator().manual_seed(2))
    queries, truth = seeded(90, 5, seed=1), torch.randint(4, (90,), generator=torch.Generator().manual_seed(3))
    queries[:5] = bank[:5]  # at distance zero
    for k in (1, 7, 30):
        weights = "distance" if vote == "weighted" else "uniform"
        theirs = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(bank.numpy(), labels.numpy())
        ours = knn(bank, labels, queries, truth, k=[k], num_classes=4, metric="euclidean", vote=vote, index=index)
        assert ours.first()["top1"] == pytest.approx(theirs.score(queries.numpy(), truth.numpy()))
        assert "temperature" not in ours.first()


def test_a_majority_counts_heads_and_a_weighted_vote_does_not():
    bank = torch.tensor([[1.0, 0.0], [0.2, 1.0], [0.2, 1.0]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    for vote, expected in (("weighted", 0), ("majority", 1)):
        scores = knn(bank, labels, query, torch.tensor([expected]), k=[3], num_classes=2, vote=vote)
        assert scores.first()["top1"] == 1.0


def test_the_recall_of_a_shortlist_is_measured_and_is_one():
    bank, queries = seeded(600, 16), seeded(450, 16, seed=1)
    labels = torch.zeros(600, dtype=torch.int64)
    scores = knn(bank, labels, queries, labels[:450], k=[3, 10], num_classes=1, index="shortlist")
    assert scores.search["recall"] == 1.0
    assert scores.search["recall_queries"] == 150  # every third


# ---- ranks ---------------------------------------------------------------------------------------------------------


def _over_ranks(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, settings: dict) -> list:
    scores = knn(bank, labels, queries, truth, over_ranks=True, **settings)
    return [scores.rows, scores.index]


@pytest.mark.parametrize("num", [1, 4, 301])
def test_two_ranks_with_unequal_slices_find_what_one_process_finds(num, two_ranks):
    bank, queries = seeded(num, 6).round(), seeded(37, 6, seed=1).round()
    labels, truth = torch.arange(num) % 3, torch.arange(37) % 3
    for metric in ("cosine", "euclidean"):
        settings = {"k": [1, 20], "num_classes": 3, "metric": metric, "center": metric == "cosine"}
        alone = knn(bank, labels, queries, truth, **settings)
        for found, index in two_ranks.run(_over_ranks, bank, labels, queries, truth, settings):
            assert found == alone.rows
            assert "2 slices" in index


def call(*overrides: str) -> dict:
    register(knn_command.KnnConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("knn", overrides=[*overrides, "device=cpu", "threads=1"])
    return knn_command.run(config)


def _command(folder: str, words: list[str]) -> dict:
    os.chdir(folder)
    result = call(*words)
    return {"metrics": result["metrics"], "num": result["protocol"]["data"]["num_train"], "path": result["path"]}


@pytest.mark.parametrize("num_test", [1, 37])
def test_the_command_on_two_ranks_gives_the_numbers_of_one(num_test, two_ranks, tmp_path, monkeypatch):
    words = ["ckpt=pixels", "data=embedded", "data.source.num_train=121", f"data.source.num_test={num_test}"]
    monkeypatch.chdir(tmp_path)
    alone = call(*words, "out=alone")
    for extra in ([], ["bank_gib=0"]):
        for answer in two_ranks.run(_command, str(tmp_path), [*words, *extra, "out=both"]):
            assert answer["metrics"] == alone["metrics"]
            assert answer["num"] == 121
    assert json.loads(Path("both/knn.json").read_text())["metrics"] == alone["metrics"]
    assert os.listdir("both") == ["knn.json"]


# ---- a bank on disk ------------------------------------------------------------------------------------------------


def test_a_bank_that_memory_may_not_hold_gives_the_same_numbers_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["ckpt=pixels", "data=embedded", "data.source.num_train=120", "data.source.num_test=36"]
    in_memory, on_disk = call(*words), call(*words, "bank_gib=0", "out=disk")
    assert on_disk["metrics"] == in_memory["metrics"]
    assert "memory-mapped file in disk" in " ".join(on_disk["protocol"]["notes"])
    assert not any("memory-mapped" in note for note in in_memory["protocol"]["notes"])
    assert os.listdir("disk") == ["knn.json"]


def test_a_store_maps_what_is_larger_than_its_limit(tmp_path):
    store = FeatureStore(tmp_path, limit_gib=1000 / 2**30)
    assert store(25, 10) is None
    mapped = store(26, 10)
    assert mapped is not None
    assert mapped.shape == (26, 10)
    assert not mapped.any()
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="bank_gib must be 0 or more"):
        FeatureStore(tmp_path, limit_gib=-1)


def test_reading_a_mapped_bank_takes_no_memory_of_its_size(tmp_path):
    num, dim = 60_000, 256  # 61 MB
    bank = FeatureStore(tmp_path, limit_gib=0)(num, dim)
    assert bank is not None
    bank.copy_(seeded(num, 1).expand(num, dim))
    before = anonymous_kib()
    highest = 0

    class Watched(Rows):
        def prepare(self, features: Tensor) -> Tensor:
            nonlocal highest
            highest = max(highest, anonymous_kib())
            return super().prepare(features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK_BYTES", 2**21)
        nearest(Watched(bank, "euclidean", CPU), seeded(3, dim), 5, index="torch")
    assert highest - before < 30_000


def anonymous_kib() -> int:
    """Memory of this process that no file backs."""
    words = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return next(int(found[1]) for found in words if found[0] == "RssAnon:")


def test_gaps_are_closed_in_place(monkeypatch):
    monkeypatch.setattr("eval.bank.BLOCK_BYTES", 4 * 2 * 3)  # three rows at a time
    features = torch.arange(40.0).view(20, 2)
    kept = torch.tensor([0, 2, 3, 7, 8, 9, 15, 19])
    expected = features[kept].clone()
    closed = close_gaps(features, kept)
    assert torch.equal(closed, expected)
    assert closed.data_ptr() == features.data_ptr()


@pytest.mark.parametrize(("maximum", "expected"), [("max", 4096_000), ("3000000", 3000000 - 1000000 + 400000)])
def test_free_memory_is_the_smaller_of_the_systems_and_the_containers(tmp_path, maximum, expected):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   4000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{maximum}\n")
    (group / "memory.current").write_text("1000000\n")
    (group / "memory.stat").write_text("anon 600000\nfile 400000\n")
    assert free_bytes(tmp_path) == expected
    assert free_bytes(tmp_path / "nowhere") == float("inf")


# ---- few labels ----------------------------------------------------------------------------------------------------


def test_a_bank_of_few_images_per_class_is_drawn_several_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["ckpt=pixels", "data=embedded", "data.source.num_train=240", "data.source.num_test=60", "k=[1,3]"]
    result = call(*words, "train_amount=2", "draws=3", "seed=5")
    metrics, protocol = result["metrics"], result["protocol"]
    each = [call(*words, "train_amount=2", "draws=1", f"seed={seed}")["metrics"]["top1"] for seed in (5, 6, 7)]
    assert metrics["top1"] == pytest.approx(np.mean(each))
    assert metrics["top1_std"] == pytest.approx(np.std(each, ddof=1))
    assert metrics["top1"] == metrics["top1_k1_T0.07"]
    assert {"top1_k3_T0.07", "top1_std_k3_T0.07"} <= set(metrics)
    assert (protocol["draws"], protocol["bank"]) == (3, [24, 24, 24])
    assert result["path"].endswith("knn_2_per_class.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["draws=3"], "draws=3 has no effect"),
        (["train_amount=2", "draws=0"], "draws must be 1 or more"),
        (["vote=majority", "temperature=[0.1]"], "no effect with vote=majority"),
        (["bank_gib=-1"], "bank_gib must be 0 or more"),
    ],
)
def test_settings_of_the_command_without_meaning_are_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call("ckpt=pixels", "data=embedded", "data.source.num_train=24", "data.source.num_test=6", *words)


def test_ranks_agree_on_where_the_features_lie(two_ranks, tmp_path):
    values = two_ranks.run(_share, str(tmp_path))
    assert values == [[0.0, 0.0, 1.0, 1.0]] * 2
    assert os.listdir(tmp_path) == []


def _share(folder: str) -> list[float]:
    shared = FeatureStore(Path(folder), limit_gib=0 if distributed.is_main() else 1)(4, 1)
    assert shared is not None
    shared[2 * distributed.rank() : 2 * distributed.rank() + 2] = distributed.rank()
    distributed.barrier()
    return shared[:, 0].tolist()
