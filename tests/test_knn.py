"""The weighted kNN vote against the same vote written as loops, and its rules for ties and odd sizes."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from eval.accuracy import rank_of_label
from eval.knn import in_brackets, knn, log_votes, log_weight
from eval.neighbours import merge, nearest
from eval.rows import Rows, unit_length

INDEXES = ["faiss", "torch", "shortlist"]


def reference(bank, bank_labels, queries, query_labels, *, k, temperature, num_classes) -> tuple[float, float]:
    """Wu et al.'s vote as loops: sort all by (similarity, place), add up weights, sort classes by (votes, number)."""
    top1 = top5 = 0
    for query, true in zip(queries.tolist(), query_labels.tolist()):
        similarity = []
        for place, image in enumerate(bank.tolist()):
            dot = sum(a * b for a, b in zip(query, image))
            similarity.append((-dot / (math.hypot(*query) * math.hypot(*image)), place))
        votes = dict.fromkeys(range(num_classes), 0.0)
        for negative, place in sorted(similarity)[:k]:
            votes[bank_labels[place].item()] += math.exp(-negative / temperature)
        ranked = sorted((c for c in votes if votes[c] > 0), key=lambda c: (-votes[c], c))
        top1 += true in ranked[:1]
        top5 += true in ranked[:5]
    return top1 / len(queries), top5 / len(queries)


def made(num_bank: int, num_queries: int, num_classes: int, *, dim: int = 7, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=generator)
    bank_labels = torch.randint(num_classes, (num_bank,), generator=generator)
    query_labels = torch.randint(num_classes, (num_queries,), generator=generator)
    bank = centres[bank_labels] + torch.randn(num_bank, dim, generator=generator)
    queries = centres[query_labels] + torch.randn(num_queries, dim, generator=generator)
    return bank, bank_labels, queries, query_labels


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("num_classes", [2, 9])
def test_equals_the_vote_written_as_loops(index, num_classes):
    data = made(83, 41, num_classes)
    scores = knn(*data, k=[1, 5, 20], temperature=[0.07, 0.5], num_classes=num_classes, index=index, chunk=16)
    assert [(row["k"], row["temperature"]) for row in scores.rows] == [(k, t) for k in (1, 5, 20) for t in (0.07, 0.5)]
    for row in scores.rows:
        expected = reference(*data, k=row["k"], temperature=row["temperature"], num_classes=num_classes)
        assert row["top1"] == pytest.approx(expected[0])
        if num_classes > 5:
            assert row["top5"] == pytest.approx(expected[1])
        else:
            assert "top5" not in row
    assert index in scores.index
    assert ("recall" in scores.search) == (index == "shortlist")
    assert scores.search["looked_for_again"] == 0


@pytest.mark.parametrize("num_queries", [1, 3, 17])
def test_any_number_of_queries_gives_the_same_answer_in_any_chunk(num_queries):
    data = made(50, num_queries, 4)
    rows = [knn(*data, k=[7], num_classes=4, chunk=chunk).rows for chunk in (1, 5, 1024)]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("index", INDEXES)
def test_of_equally_similar_images_the_earlier_in_the_bank_is_nearer(index):
    bank = torch.tensor([[0.0, 1.0]] + [[1.0, 0.0]] * 30)
    rows = Rows(bank, "cosine", torch.device("cpu"))
    for count in (1, 4, 29, 30):
        found = nearest(rows, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), count, index=index)
        assert found.place[0].tolist() == list(range(1, 1 + count))
        assert found.place[1].tolist() == list(range(count))
        assert found.closeness[0].tolist() == [1.0] * count


def test_neighbours_are_sorted_by_similarity_then_place():
    closeness, place = merge(torch.tensor([[0.5, 0.9, 0.5, 0.9]]), torch.tensor([[8, 7, 2, 3]]), 3)
    assert place.tolist() == [[3, 7, 2]]
    assert torch.equal(closeness, torch.tensor([[0.9, 0.9, 0.5]]))


def test_equal_votes_go_to_the_lower_class():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for true, expected in ((0, 1.0), (1, 0.0)):
        scores = knn(bank, torch.tensor([1, 0]), bank[:1], torch.tensor([true]), k=[2], num_classes=2)
        assert scores.rows[0]["top1"] == expected


def test_a_class_without_a_vote_is_no_hit_even_in_the_top_five():
    bank = torch.eye(3)
    scores = knn(bank, torch.tensor([0, 1, 2]), bank[:1], torch.tensor([5]), k=[2], num_classes=6)
    assert scores.rows[0]["top5"] == 0.0


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3])
def test_votes_neither_overflow_nor_vanish_at_any_temperature(temperature):
    similarity = torch.tensor([[0.9, 0.5, -0.8]])
    weight = log_weight(similarity, metric="cosine", vote="weighted", temperature=temperature)
    votes = log_votes(weight, torch.tensor([[2, 0, 1]]), 4)
    assert votes[0, 3] == -torch.inf
    torch.testing.assert_close(
        votes[0, [2, 0, 1]], similarity[0].double() / temperature, rtol=1e-9, atol=0
    )  # one vote per class: its log is the exponent


def test_a_class_with_one_image_can_be_found():
    bank = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(20, 1), torch.tensor([[0.0, 1.0]])])
    labels = torch.tensor([0] * 20 + [1])
    query = torch.tensor([[0.05, 1.0]])
    assert knn(bank, labels, query, torch.tensor([1]), k=[20], num_classes=2).rows[0]["top1"] == 1.0


def test_a_k_beyond_the_bank_uses_the_whole_bank_and_says_so():
    data = made(6, 5, 3)
    scores = knn(*data, k=[20, 200], temperature=[0.07], num_classes=3)
    assert [row["k"] for row in scores.rows] == [6]
    assert "k=20 is more than the bank's 6 images" in scores.notes[0]
    assert len(scores.notes) == 2


def test_centring_removes_a_common_offset():
    bank, bank_labels, queries, query_labels = made(200, 100, 5, dim=16)
    plain = knn(bank, bank_labels, queries, query_labels, num_classes=5, center=True).rows[0]["top1"]
    offset = torch.full((1, 16), 50.0)
    moved = knn(bank + offset, bank_labels, queries + offset, query_labels, num_classes=5, center=True)
    assert moved.rows[0]["top1"] == pytest.approx(plain, abs=0.011)


def test_without_faiss_torch_finds_the_same_and_the_name_says_so(monkeypatch):
    data = made(60, 30, 4)
    expected = knn(*data, k=[5], num_classes=4, index="faiss")
    monkeypatch.setattr("eval.scan.has_onednn", lambda: False)
    monkeypatch.setitem(sys.modules, "faiss", None)  # what a missing package looks like to `import`
    scores = knn(*data, k=[5], num_classes=4)
    assert scores.rows == expected.rows
    assert "faiss cannot be imported" in scores.index
    with pytest.raises(ValueError, match="index=torch"):
        knn(*data, k=[5], num_classes=4, index="faiss")


@pytest.mark.parametrize(("has", "taken"), [(True, "torch on cpu"), (False, "faiss")])
def test_the_index_by_default_is_torch_where_onednn_multiplies_and_else_faiss(monkeypatch, has, taken):
    monkeypatch.setattr("eval.scan.has_onednn", lambda: has)
    data = made(60, 30, 4)
    scores = knn(*data, k=[5], num_classes=4)
    assert scores.index.startswith(taken)
    assert scores.rows == knn(*data, k=[5], num_classes=4, index="faiss").rows


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("spread", "tells_apart"), [(1.0, True), (1e-3, False)])
def test_the_index_by_default_is_a_shortlist_where_that_is_fast_and_tells_features_apart(
    monkeypatch, fast, spread, tells_apart
):
    monkeypatch.setattr("eval.scan.has_onednn", lambda: True)
    monkeypatch.setattr("eval.neighbours.multiplies_bfloat16", lambda: fast)
    monkeypatch.setattr("eval.neighbours.SAMPLE", 2)
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(num, 32, generator=generator) for num in (600, 64))
    bank[1::2] = bank[0] + spread * bank[1::2]  # half of them around one point, where all queries lie
    rows = Rows(bank, "cosine", torch.device("cpu"))
    for num in (63, 64):  # fewer are not worth a trial
        near = bank[0] + spread * queries[:num]
        found, expected = nearest(rows, near, 5, index="auto"), nearest(rows, near, 5, index="torch")
        assert found.index.startswith("bfloat16" if fast and tells_apart and num == 64 else "torch")
        assert torch.equal(found.place, expected.place)
        assert torch.equal(found.closeness, expected.closeness)


def test_rank_counts_better_classes_and_equal_lower_ones():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0], [1.0, 3.0, 3.0, 0.0], [torch.nan, 1.0, 2.0, 0.0]])
    assert rank_of_label(scores, torch.tensor([2, 1, 0])).tolist() == [1, 0, 4]


def test_a_zero_feature_does_not_become_nan():
    assert torch.equal(unit_length(torch.zeros(1, 3)), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": [0]}, "k must name"),
        ({"k": []}, "k must name"),
        ({"temperature": [0.0]}, "temperature must name"),
        ({"temperature": []}, "temperature must name"),
        ({"metric": "manhattan"}, "allowed: cosine, euclidean"),
        ({"vote": "borda"}, "allowed: weighted, majority"),
        ({"index": "annoy"}, "allowed: auto, faiss, torch, shortlist"),
        ({"vote": "majority", "temperature": [0.1]}, "no effect with vote=majority"),
        ({"metric": "euclidean", "temperature": [0.1]}, "no effect with metric=euclidean"),
        ({"num_classes": 2}, r"must lie in 0\.\.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    data = made(30, 5, 4)
    with pytest.raises(ValueError, match=message):
        knn(*data, **{"k": [3], "num_classes": 4} | change)


def test_features_and_labels_that_do_not_fit_are_refused():
    bank, bank_labels, queries, query_labels = made(30, 5, 4)
    with pytest.raises(ValueError, match="30 features but 29 labels"):
        knn(bank, bank_labels[1:], queries, query_labels, num_classes=4)
    with pytest.raises(ValueError, match="dimensions"):
        knn(bank, bank_labels, queries[:, 1:], query_labels, num_classes=4)
    with pytest.raises(ValueError, match="not finite"):
        knn(bank, bank_labels, queries / 0, query_labels, num_classes=4)
    for scaled in ((1e18 * bank, queries), (bank, 1e19 * queries)):
        with pytest.raises(ValueError, match="divide all features by one number"):
            knn(scaled[0], bank_labels, scaled[1], query_labels, num_classes=4, metric="euclidean")
    with pytest.raises(ValueError, match="at least one"):
        knn(bank, bank_labels, queries[:0], query_labels[:0], num_classes=4)


def test_a_single_number_on_the_command_line_is_a_list_of_one():
    words = ["ckpt=a", "k=20", "temperature=0.1,0.2", "k=[5,20]", "temperature=null", "metric=cosine"]
    expected = ["ckpt=a", "k=[20]", "temperature=[0.1],[0.2]", "k=[5,20]", "temperature=null", "metric=cosine"]
    assert in_brackets(words) == expected
