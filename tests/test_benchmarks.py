"""The benchmarks' arithmetic, and that the ways they compare compute the same thing. Nothing about time."""

from __future__ import annotations

import gc
import itertools
import json
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks.__main__ as everything
from benchmarks import (
    augment,
    chip,
    knn,
    linear_probe,
    loader,
    mae_step,
    memory,
    nt_xent,
    relative_location_step,
    simclr_step,
    start,
)
from benchmarks.compare import (
    HEADER,
    Fact,
    Part,
    Sample,
    Study,
    cells,
    chosen,
    markdown,
    measure,
    rows,
    take_turns,
    timed,
)
from benchmarks.step import made_batch
from eval.heads import Heads
from ssl.data.folder import Folder


def part(amount: float = 60.0, **more) -> Part:
    return Part("a part", "images", amount, dict, **more)


# ---- the harness -----------------------------------------------------------------------------------------------------


def test_ways_take_turns_and_each_begins_a_round() -> None:
    calls: list[str] = []

    def way(name: str):
        return lambda: (calls.append(name), Sample(1.0, 1.0))[1]

    samples = take_turns({name: way(name) for name in "abc"}, rounds=4, warm_ups=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(column) for name, column in samples.items()} == dict.fromkeys("abc", 4)


def test_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians() -> None:
    theirs = [Sample(wall, 2 * wall) for wall in (2.0, 30.0, 12.0)]
    ours = [Sample(wall, wall) for wall in (1.0, 10.0, 2.0)]
    (row,) = rows(part(wanted={"peer": 2.5}), {"peer": theirs, "ours": ours})
    assert (row.ratio, row.lowest, row.highest) == (3.0, 2.0, 6.0)  # of medians it would be 12 / 2
    assert row.by_cpu == 6.0
    assert (row.peer_rate, row.our_rate) == (5.0, 30.0)
    assert (row.wanted, row.memory) == (2.5, None)


def test_each_peer_has_a_row_against_the_last_way() -> None:
    samples = {"slow": [Sample(8.0, 8.0, 300.0)], "middling": [Sample(4.0, 4.0, 60.0)], "ours": [Sample(2.0, 1.0, 6.0)]}
    slow, middling = rows(part(wanted_memory={"slow": 30}), samples)
    assert (slow.peer, slow.ratio, slow.memory) == ("slow", 4.0, 50.0)
    assert (middling.peer, middling.ratio, middling.memory) == ("middling", 2.0, 10.0)
    assert cells(slow)[-1] == "1/50.0 (wanted 1/30)"


def test_a_timed_way_waits_for_the_device_before_and_after_its_work() -> None:
    calls: list[str] = []
    sample = timed(lambda: calls.append("work"), finish=lambda: calls.append("wait"))()
    assert calls == ["wait", "work", "wait"]
    assert sample.mib is None


def test_a_study_is_measured_by_itself() -> None:
    facts = [Fact("what", "found", "wanted", ("a detail",))]
    assert measure(Study("what", lambda: facts), rounds=3) == facts


def test_parts_are_chosen_by_words_of_their_names() -> None:
    names = ["MAE step", "kNN", "SimCLR step"]
    pick = {"name": lambda name: name}
    assert list(chosen(names, [], **pick)) == names
    assert list(chosen(names, ["knn", "mae"], **pick)) == ["MAE step", "kNN"]
    with pytest.raises(ValueError, match="names no part; there are: MAE step; kNN; SimCLR step"):
        list(chosen(names, ["crop"], **pick))


def test_the_table_holds_every_result_and_where_it_was_measured() -> None:
    samples = {"peer": [Sample(3.0, 3.0)], "ours": [Sample(1.0, 1.0)]}
    results = [*rows(part(note="a note"), samples), Fact("start", "7 s", "under 12 s", ("torch 2 s",))]
    text = markdown(results, {"commit": "abc1234"})
    table = [line for line in text.splitlines() if line.startswith("| a part")]
    assert len(table) == 1
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == list(cells(results[0]))  # pyright: ignore
    assert len(HEADER) == len(cells(results[0]))  # pyright: ignore
    for words in ("- a part: a note", "| start | 7 s | under 12 s |", "- start: torch 2 s", "commit: abc1234"):
        assert words in text


# ---- the whole command -----------------------------------------------------------------------------------------------


def test_quick_prints_the_row_of_one_part_and_writes_its_numbers(tmp_path: Path, capsys) -> None:
    words = ["--quick", "--rounds", "2", "--threads", "1", "--parts", "50 heads", "--out", str(tmp_path / "t.json")]
    before = torch.get_num_threads()
    try:
        assert everything.main(words) == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert sum(line.startswith("linear probe, 50 heads") for line in printed.splitlines()) == 1
    written = json.loads((tmp_path / "t.json").read_text())
    (row,) = written["against"]
    assert (row["part"], row["wanted"]) == ("linear probe, 50 heads, 4,096 x 128", 10)
    assert row["lowest"] <= row["ratio"] <= row["highest"]
    assert {"commit", "machine", "versions", "threads", "rounds", "command"} <= set(written["about"])


def test_a_part_that_fails_is_told_and_the_others_go_on(monkeypatch, capsys) -> None:
    def broken() -> list[Fact]:
        raise RuntimeError("no room")

    parts = [(Study("broken", broken), 1), (Study("whole", lambda: [Fact("whole", "fine")]), 1)]
    monkeypatch.setattr(everything, "all_parts", lambda given: iter(parts))
    before = torch.get_num_threads()
    assert everything.main([]) == 1
    torch.set_num_threads(before)
    said = capsys.readouterr()
    assert "broken: could not be measured: no room" in said.err
    assert "whole: fine" in said.out


def test_quick_has_every_part_in_a_smaller_size() -> None:
    given = everything.options().parse_args(["--threads", "1"])
    names = {}
    for given.quick in (False, True):
        entries = list(everything.all_parts(given))
        names[given.quick] = [entry.name for entry, _ in entries]
        assert len(set(names[given.quick])) == len(entries)
        assert all(rounds >= 1 for _, rounds in entries)
    quick, full = ([name.split(",")[0] for name in names[quick]] for quick in (True, False))
    assert list(dict.fromkeys(quick)) == list(dict.fromkeys(full))


# ---- the ways compute the same ---------------------------------------------------------------------------------------


def test_lightlys_form_of_nt_xent_has_our_loss_and_gradient() -> None:
    embeddings = nt_xent.made_embeddings(34, 6).double()
    results = []
    for way in (nt_xent.whole_matrix, nt_xent.in_chunks):
        given = embeddings.clone().requires_grad_()
        loss = way(given, 0.1)
        results.append((loss.detach(), *torch.autograd.grad(loss, given)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_every_knn_finds_the_same_accuracy() -> None:
    data = (*knn.made_features(600, 512, seed=1), *knn.made_features(100, 512, seed=2))
    found = [way(*data) for way in (knn.scikit_learn, knn.dino, knn.ours("auto"), knn.ours("shortlist"))]
    assert 0.15 < found[0] < 1
    assert found == pytest.approx([found[0]] * 4)


def test_heads_trained_one_at_a_time_equal_those_trained_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 5, generator=generator), torch.randint(3, (64,), generator=generator)
    grid = list(itertools.product((0.01, 0.5), (0.0, 0.1)))
    setting = {"num_classes": 3, "steps": 4, "batch_size": 16}
    alone = linear_probe.one_at_a_time(*data, grid, **setting)
    together: Heads = linear_probe.all_at_once(*data, grid, **setting)
    for number, weight in enumerate(alone):
        torch.testing.assert_close(together.only(number).weight.T, weight, rtol=1e-5, atol=1e-6)


def small(module, *words: str):
    return module.options().parse_args([*module.QUICK, "--threads", "1", "--batch-size", "2", *words])


def test_the_references_mae_step_has_our_loss() -> None:
    given = small(mae_step)
    method = mae_step.build(given.model, 32)
    batch = made_batch(2, (32, 32), views=1, num_noise=method.num_noise, device="cpu")
    torch.testing.assert_close(method(batch)["loss"], mae_step.reference_loss(method, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("module", "size"), [(simclr_step, (64, 64)), (relative_location_step, None)])
def test_the_peers_step_has_the_loss_of_ours_in_fp32(module, size) -> None:
    words = ["--two-forwards"] if module is simclr_step else []
    given = small(module, *words)
    if size is None:
        method = module.build(given.model, given.image_size)
        batch = made_batch(2, method.view_size, views=1, num_noise=method.num_noise, device="cpu")
    else:
        batch = made_batch(2, size, views=2, num_noise=0, device="cpu")
    losses = [[float(step(batch)) for _ in range(2)] for step in module.peers_and_ours(given, torch.float32).values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # another memory layout rounds in another way
    assert losses[0][0] != losses[0][1]  # both have moved


def test_blur_of_the_peers_equals_ours() -> None:
    view = augment.View(blur=1.0, blur_sigma=(1.0, 1.0))
    crops = augment.pictures(2, 32)
    given = {name: torch.from_numpy(values) for name, values in view.sample(
        seed=0, epoch=0, index=np.arange(2), view=0, height=np.full(2, 32), width=np.full(2, 32), size=(32, 32)
    ).items()}  # fmt: skip
    ours = augment.Augment([view], mean=augment.MEAN, std=augment.STD)({"crops": [crops], "parameters": [given]})
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.MEAN, augment.STD))
    theirs = (torch.stack([augment.peers_transform(view, 32)(crop / 255) for crop in crops]) - mean) / std
    torch.testing.assert_close(ours["views"][0], theirs, rtol=1e-4, atol=1e-4)


def test_loaders_of_both_ways_give_the_same_whole_images(tmp_path: Path) -> None:
    view = loader.View(crop="resize", interpolation="bicubic")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    our_loader = loader.Loader(loader.ArraySource(pixels), [view], size=(32, 32), channels=3, seed=0, threads=1)
    ours = next(iter(our_loader.sequential(batch_size=4)))["crops"][0]
    whole = loader.View(scale=(1.0, 1.0), ratio=(1.0, 1.0), interpolation="bicubic")
    dataset = loader.PeersDataset(pixels, [whole], 32, 4, to_float=False)
    assert torch.equal(ours, torch.stack([dataset[row][0] for row in range(4)]))


def test_prepared_photos_are_the_folders_photos_made_small(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    loader.make_photos(photos, num=3)
    source = loader.prepare_photos(photos, tmp_path / "prepared")
    assert len(source) == len(Folder("train", root=str(photos))) == 3
    sizes = {loader.Loader(source, [loader.View()], size=(8, 8), channels=3, seed=0, threads=1).reader.open(0)[1]}
    assert sizes == {(256, 341)}
    with Image.open(photos / "000.jpg") as photo:
        assert photo.size == (500, 375)


# ---- start and memory ------------------------------------------------------------------------------------------------


def test_import_time_is_summed_by_package() -> None:
    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:      1000 |       1000 |   torch._C",
        "import time:      2000 |       3000 | torch",
        "import time:       500 |        500 | numpy",
        "another line",
    ]
    assert start.import_seconds(lines) == pytest.approx({"torch": 0.003, "numpy": 0.0005})


def test_growth_compares_the_second_tenth_of_the_steps_with_the_last() -> None:
    points = [(1, 50.0), (10, 100.0), (15, 101.0), (20, 102.0), (50, 500.0), (90, 110.0), (95, 111.0), (100, 112.0)]
    assert memory.early_and_late(points, 100) == (101.0, 111.0)
    with pytest.raises(ValueError, match="give more --steps"):
        memory.early_and_late([(100, 1.0)], 100)


def pages(mib: int) -> mmap.mmap:
    """So much memory from the system itself, touched; what an allocator holds free would hide it."""
    held = mmap.mmap(-1, mib * 2**20)
    for place in range(0, len(held), mmap.PAGESIZE):
        held[place] = 1
    return held


def test_resident_memory_follows_what_is_held() -> None:
    gc.collect()
    before, peak_before = memory.resident("self")
    if not before:
        pytest.skip("needs /proc")
    with pages(128):
        now, peak = memory.resident("self")
    assert peak_before > 0
    assert now - before == pytest.approx(128, abs=32)
    assert peak >= now - 1


def test_only_whole_lines_of_metrics_are_read(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert memory.last_step(metrics) == 0
    metrics.write_text('{"step": 5}\n{"step": 10}\n{"st')
    assert memory.last_step(metrics) == 10


def test_the_peak_of_memory_is_counted_from_what_is_held_when_it_restarts() -> None:
    gc.collect()
    if not memory.resident("self")[0]:
        pytest.skip("needs /proc")
    cpu = torch.device("cpu")
    with pages(256):
        high = nt_xent._peak(cpu)
    before = nt_xent._restart_peak(cpu)
    assert before < high - 128
    with pages(128):
        pass
    assert nt_xent._peak(cpu) - before == pytest.approx(128, abs=32)


# ---- what a GPU is for -----------------------------------------------------------------------------------------------


def test_a_whole_run_from_prepared_photos_is_timed(tmp_path: Path):
    photos, made = tmp_path / "photos", tmp_path / "made"
    photos.mkdir()
    made.mkdir()
    loader.make_photos(photos, num=5)
    given = chip.options().parse_args([*chip.QUICK, "--images", str(photos), "--threads", "1"])
    entries = list(chip.parts(given))
    assert [type(entry) for entry in entries] == [Part] * 5 + [Study] * 4
    [fact] = chip.study(chip.RUNS[0], given, made)
    assert "images/s" in fact.found
    assert "5,000" in fact.wanted
    assert len(list((made / "repeated-32").iterdir())) == 7  # of 5 photos, for 32


def test_without_a_gpu_its_table_is_refused(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("sys.argv", ["chip"])
    with pytest.raises(SystemExit, match="sees no GPU"):
        chip.main()
