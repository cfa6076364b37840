"""The page that compares runs: what shares a column, what is one recipe, how runs stand, and what a page is made of."""

from __future__ import annotations

import html
import json
import os
import re
import statistics
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from eval import knn as knn_command
from eval.config import register
from eval.report import comparison_runs
from eval.report.comparison import write
from eval.report.comparison_curves import measured_alike
from eval.report.comparison_recipes import free_settings, recipe_settings, recipes_of
from eval.report.comparison_results import protocols_of, result_columns, score_of
from eval.report.comparison_runs import Run, read_run, read_runs
from eval.report.comparison_sweep import read_sweep
from eval.report.comparison_sweep_charts import is_logarithmic
from eval.report.comparison_tables import setting_cell
from eval.report.gather import gather
from eval.report.metric_titles import HEALTH, TRAINING, title_of
from eval.report.run_page import run_page
from eval.suite import compose_evaluation
from ssl.pretrain import run
from ssl.run_lock import RunLock, is_held
from tests.made_runs import CONFIG, changed, protocol, rows, write_results, write_run, write_sweep
from tests.test_pretrain import METHODS, SHORT, composed

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\"'&"


class Page(HTMLParser):
    """The tables of a page by id, as rows of (texts of a cell and its lines), and the elements that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._table: list[list[list[str]]] | None = None
        self._cell: list[str] | None = None
        self._id = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.elements.append((tag, own))
        if tag == "div" and "id" in own:
            self._id = own["id"] or ""
        if tag == "table":
            self._table = self.tables.setdefault(self._id, [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table is not None:
            self._cell = []
            self._table[-1].append(self._cell)

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table, self._id = None, ""
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None and data.strip():
            self._cell.append(data.strip())

    def column(self, table: str, *head: str) -> dict[str, list[str]]:
        """Of the one column whose head has all of these texts: the cell of each row, by the row's name."""
        first, *others = self.tables[table]
        places = [place for place, cell in enumerate(first) if set(head) <= set(cell)]
        assert len(places) == 1, [first[place] for place in places]
        return {row[0][0]: row[places[0]] for row in others}


def page(tmp_path: Path, *given: Path) -> Page:
    return Page(write(given, tmp_path / "comparison.html"))


def read(*given: Path) -> list[Run]:
    return read_runs(given)[0]


# ---- results in columns --------------------------------------------------------------------------------------------


def test_results_of_other_protocols_stand_in_columns_of_their_own(tmp_path):
    a = write_run(tmp_path / "a", results={"knn": ({"top1": 0.5}, protocol())})
    b = write_run(tmp_path / "b", results={"knn": ({"top1": 0.9}, protocol(k=[200]))})
    c = write_run(tmp_path / "c", results={"knn": ({"top1": 0.7}, protocol(data__num_train=60))})
    d = write_run(tmp_path / "d", results={"knn": ({"top1": 0.6}, protocol(seed=3, commit="beef", k=[20]))})
    made = page(tmp_path, a, b, c, d)
    head = made.tables["runs-table"][0]
    assert sum(cell[0] == "eval.knn top1" for cell in head) == 3
    in_20 = made.column("runs-table", "eval.knn top1", "k [20]", "embedded, 600 train, 120 test")
    assert in_20 == {"a": ["50.0%"], "b": ["–"], "c": ["–"], "d": ["60.0%"]}
    in_200 = made.column("runs-table", "eval.knn top1", "k [200]")
    assert in_200 == {"a": ["–"], "b": ["90.0%"], "c": ["–"], "d": ["–"]}
    on_less = made.column("runs-table", "eval.knn top1", "embedded, 60 train, 120 test")
    assert on_less == {"a": ["–"], "b": ["–"], "c": ["70.0%"], "d": ["–"]}


def test_what_may_differ_within_a_protocol_is_told(tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 1)):
        write_run(tmp_path / name, results={"knn": ({"top1": 0.5}, protocol(seed=seed))})
    (only,) = protocols_of(each.results for each in read(tmp_path))
    assert only.circumstances() == {"seed": ["0", "1"]}
    assert len(only.results) == 3


def test_a_column_says_whether_it_is_of_the_test_split(tmp_path):
    unread = protocol(data__test="not read", command="eval.advise")
    of_train = protocol(command="eval.health", data={"name": "embedded", "num_train": 600})
    results = {
        "probe": ({"top1": 0.5, "held_out_top1": 0.6}, protocol()),
        "advise": ({"gain": 0.4}, unread),
        "health": ({"rankme": 9.0}, of_train),
    }
    made = page(tmp_path, write_run(tmp_path / "a", results=results))
    said = {cell[0]: cell[-2] for cell in made.tables["runs-table"][0] if cell[0].startswith("eval.")}
    assert said == {
        "eval.advise gain": "not of the test split",
        "eval.health rankme": "not of the test split",
        "eval.knn top1": "test split",
        "eval.knn held_out_top1": "not of the test split",
    }


def test_the_latest_checkpoint_counts_and_not_the_best(tmp_path):
    def of_step(step: int) -> dict:
        return protocol(checkpoint={"path": "x", "step": step}, subject=f"x/{step}")

    results = {"early": ({"top1": 0.9}, of_step(20)), "late": ({"top1": 0.5}, of_step(30))}
    made = page(tmp_path, write_run(tmp_path / "a", results=results))
    assert made.column("runs-table", "eval.knn top1") == {f"{tmp_path.name}/a": ["50.0%", "of step 30"]}


def test_seeds_of_an_evaluation_are_averaged_and_of_a_repeated_one_the_newest_counts(tmp_path):
    results = {
        "s0_old": ({"top1": 0.1}, protocol(seed=0, date="2026-01-01")),
        "s0": ({"top1": 0.5}, protocol(seed=0, date="2026-01-02")),
        "s1": ({"top1": 0.6}, protocol(seed=1)),
        "s2": ({"top1": 0.8}, protocol(seed=2)),
    }
    (only,) = read(write_run(tmp_path / "a", results=results))
    (column,) = result_columns(protocols_of([only.results]))
    score = score_of(only.results, column)
    assert score is not None
    assert sorted(score.values) == [0.5, 0.6, 0.8]
    assert score.spread == pytest.approx(np.std([0.5, 0.6, 0.8], ddof=1))


def test_baselines_that_were_judged_in_a_run_are_rows_of_their_own(tmp_path):
    untrained = protocol(checkpoint=None, subject="untrained vit")
    run_dir = write_run(tmp_path / "a", results={"knn": ({"top1": 0.5}, protocol()), "no": ({"top1": 0.2}, untrained)})
    pixels = write_results(tmp_path / "pixels", {"knn": ({"top1": 0.1}, protocol(checkpoint=None, subject="pixels"))})
    made = page(tmp_path, run_dir, pixels)
    values = made.column("runs-table", "eval.knn top1")
    assert values == {"a": ["50.0%"], "untrained vit (judged in a)": ["20.0%"], "pixels": ["10.0%"]}
    assert [row[1][0] for row in made.tables["runs-table"][1:]] == ["complete", "not trained", "not trained"]


def test_the_order_of_rows_is_the_given_one_whatever_they_reach(tmp_path):
    folders = []
    for name, top1 in (("b", 0.1), ("c", 0.9), ("a", 0.5)):
        folders.append(write_run(tmp_path / name, results={"knn": ({"top1": top1}, protocol())}))
    made = page(tmp_path, *folders)
    assert list(made.column("runs-table", "eval.knn top1")) == ["b", "c", "a"]


# ---- recipes and seeds ---------------------------------------------------------------------------------------------


def test_seeds_of_one_recipe_are_one_row_with_mean_spread_and_number(tmp_path):
    scores = [0.50, 0.60, 0.65]
    for seed, top1 in enumerate(scores):
        how = protocol(checkpoint={"path": "x", "step": 40}, seed=seed)
        write_run(tmp_path / "mae" / f"seed{seed}", {"seed": seed}, results={"knn": ({"top1": top1}, how)})
    how = protocol(checkpoint={"path": "y", "step": 40})
    write_run(tmp_path / "other", {"optim.base_lr": 0.1}, results={"knn": ({"top1": 0.4}, how)})
    made = page(tmp_path, tmp_path)
    values = made.column("recipes-table", "eval.knn top1")
    mean, spread = statistics.mean(scores), 100 * statistics.stdev(scores)
    assert values == {"mae": [f"{mean:.1%}", f"± {spread:.2g}, 3 seeds"], "other": ["40.0%", "one seed"]}
    assert made.column("recipes-table", "seeds") == {"mae": ["3 seeds"], "other": ["one seed"]}


def test_repetitions_of_one_seed_are_not_called_seeds(tmp_path):
    for name, top1 in (("a", 0.5), ("b", 0.6)):
        write_run(tmp_path / name, results={"knn": ({"top1": top1}, protocol())})
    (cell,) = page(tmp_path, tmp_path).column("recipes-table", "eval.knn top1").values()
    assert cell[1].endswith("2 runs of one seed")


def test_settings_that_are_free_do_not_make_a_recipe_and_others_do(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", {"seed": 1, "loader.threads": 8, "trainer.log_every_steps": 1})
    write_run(tmp_path / "c", {"augment.views": [{"count": 1, "crop": "random_resized", "flip": 0.0}]})
    write_run(tmp_path / "d", parts={"optimizer": {"name": "adamw", "momentum": 0.9}})
    runs = read(tmp_path)
    recipes = recipes_of(runs)
    assert [[each.name for each in recipe.runs] for recipe in recipes] == [["a", "b"], ["c"], ["d"]]
    differing = {each.key: list(each.values) for each in recipe_settings(recipes) if each.differs}
    assert differing == {"augment.views.0.flip": ["0.5", "0.0", "0.5"], "acts: optimizer.momentum": [None, None, "0.9"]}
    free = {each.key: list(each.values) for each in free_settings(runs)}
    assert free == {
        "seed": ["0", "1", "0", "0"],
        "loader.threads": ["1", "8", "1", "1"],
        "trainer.log_every_steps": ["10", "1", "10", "10"],
    }


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(tmp_path):
    write_run(tmp_path / "old")
    write_run(tmp_path / "new", {"seed": 1, "trainer.clip_grad_norm": None})
    write_run(tmp_path / "clipped", {"trainer.clip_grad_norm": 1.0})
    recipes = recipes_of(read(tmp_path / "old", tmp_path / "new", tmp_path / "clipped"))
    assert [len(recipe.runs) for recipe in recipes] == [2, 1]
    assert [each.key for each in recipe_settings(recipes) if each.differs] == ["trainer.clip_grad_norm"]


def test_a_value_is_marked_where_most_recipes_have_another_or_all_differ(tmp_path):
    for name, lr in (("a", 0.001), ("b", 0.1), ("c", 0.001)):
        write_run(tmp_path / name, {"optim.base_lr": lr, "model.name": f"net_{name}"})
    text = write([tmp_path], tmp_path / "comparison.html").read_text()
    row = text[text.index('<th scope="row">optim.base_lr</th>') :].partition("</tr>")[0]
    assert [part.partition("</td>")[0] for part in row.split("<td")[1:]] == [">0.001", ' class="marked">0.1', ">0.001"]
    row = text[text.index('<th scope="row">model.name</th>') :].partition("</tr>")[0]
    assert row.count('class="marked"') == 3


def test_recipes_that_are_many_are_listed_by_value(tmp_path):
    for place in range(20):
        write_run(tmp_path / f"run{place}", {"optim.base_lr": 0.1 if place < 15 else 0.2, "model.args.depth": place})
    text = write([tmp_path], tmp_path / "comparison.html").read_text()
    row = text[text.index('<th scope="row">optim.base_lr</th>') :].partition("</tr>")[0]
    assert "<b>0.1</b>" in row
    assert "15: run0, run1, run2, ..." in row
    assert "<b>0.2</b>" in row


# ---- how runs stand ------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_failed_or_stopped_says_so(tmp_path):
    write_run(tmp_path / "complete")
    write_run(tmp_path / "stopped", lines=rows(20), saved=20)
    failed = write_run(tmp_path / "failed", lines=rows(20), saved=20)
    step = failed / "failed" / "checkpoints" / "step_00000029" / "step.json"
    step.parent.mkdir(parents=True)
    step.write_text(json.dumps({"step": 30, "reason": "the loss is nan"}))
    running = write_run(tmp_path / "running", lines=rows(20), saved=20)
    with RunLock(running):
        states = {each.name: each.state for each in read(tmp_path)}
    assert {name: state.word for name, state in states.items()} == {
        "complete": "complete",
        "failed": "failed",
        "running": "running",
        "stopped": "stopped",
    }
    assert states["failed"].why == "step 30: the loss is nan"
    assert "step 20" in states["running"].why


def test_a_folder_is_held_for_as_long_as_a_run_is_at_work_in_it(tmp_path):
    assert not is_held(tmp_path)
    with RunLock(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)


def test_a_folder_held_on_another_machine_is_one_while_its_record_is_rewritten(tmp_path):
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"machine": ["elsewhere"], "pid": 1, "began": "1"}))
    assert is_held(tmp_path)
    os.utime(lock, (1, 1))
    assert not is_held(tmp_path)


def test_a_run_with_damaged_files_is_told_and_costs_no_other_its_row(tmp_path):
    write_run(tmp_path / "a", results={"knn": ({"top1": 0.5}, protocol())})
    damaged = write_run(tmp_path / "b")
    (damaged / "config.yaml").write_text("trainer: [1, 2")
    (damaged / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n[1]\nno json\n{"step": 2, "lo')
    odd = write_run(tmp_path / "c")
    (odd / "config.yaml").write_text("trainer: 3\n")
    (odd / "eval" / "broken.json").write_text("{")
    strange = {"list": {"data": [1]}, "step": {"checkpoint": {"step": "x"}}, "many": {"data.num_train": "9"}}
    write_results(
        tmp_path / "a", {name: ({"top1": 0.1}, changed(protocol(k=name), each)) for name, each in strange.items()}
    )
    endless = write_run(tmp_path / "d")
    (endless / "metrics.jsonl").write_text('{"step": 1e999, "loss": 1}\n')
    made = page(tmp_path, tmp_path)
    assert made.column("runs-table", "eval.knn top1") == {"a": ["50.0%"], "b": ["–"], "c": ["–"], "d": ["–"]}
    assert [row[1][0] for row in made.tables["runs-table"][1:]] == ["complete", "stopped", "stopped", "stopped"]
    text = (tmp_path / "comparison.html").read_text()
    assert "Not everything could be read" in text
    assert "config.yaml" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gone", "gone does not exist"),
        ("file.json", "file.json is a file"),
        ("empty", "empty is no run, no sweep, and has none in it"),
    ],
)
def test_what_holds_no_run_is_refused_with_what_to_give(tmp_path, given, message):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        write([tmp_path / given], tmp_path / "comparison.html")


def test_runs_are_found_in_folders_and_named_without_what_they_share(tmp_path):
    for name in ("x/mae/seed0", "x/mae/seed1", "x/simclr/seed0"):
        write_run(tmp_path / name)
    assert [each.name for each in read(tmp_path / "x")] == ["mae/seed0", "mae/seed1", "simclr/seed0"]
    assert [each.name for each in read(tmp_path / "x/mae/seed0", tmp_path / "x/mae/seed0")] == ["mae/seed0"]


# ---- curves --------------------------------------------------------------------------------------------------------


def test_a_step_is_as_many_images_epochs_and_hours_as_the_batch_and_the_speed_say(tmp_path):
    lines = [
        {"step": 10, "epoch": 1.0, "loss": 3.0, "images_per_second": 32.0},
        {"step": 20, "epoch": 2.0, "loss": 2.0, "images_per_second": 64.0},
        {"step": 40, "epoch": 4.0, "loss": 1.0, "images_per_second": 16.0},
    ]
    (only,) = read(write_run(tmp_path / "a", lines=lines))
    axes = only.curves.axes(np.array([10.0, 20.0, 40.0]))
    assert axes["images"].tolist() == [320.0, 640.0, 1280.0]
    assert axes["epoch"].tolist() == [1.0, 2.0, 4.0]
    seconds = [10 * 32 / 32, 10 * 32 / 32 + 10 * 32 / 64, 10 * 32 / 32 + 10 * 32 / 64 + 20 * 32 / 16]
    assert axes["hours"] * 3600 == pytest.approx(np.array(seconds))


def test_hours_and_median_speed_are_of_all_steps_however_few_points_are_kept(tmp_path, monkeypatch):
    speeds = [4.0 if step % 100 == 50 else 320.0 for step in range(1, 12_001)]
    lines = [{"step": step, "epoch": step / 100, "images_per_second": speed} for step, speed in enumerate(speeds, 1)]
    path = write_run(tmp_path / "a", lines=lines)
    monkeypatch.setattr(comparison_runs, "MOST_BYTES", 10**9)
    (only,) = read_run(path, name="a", most=50)
    assert len(only.curves.metrics["images_per_second"]) <= 50
    hours = only.curves.axes(np.array([12_000.0]))["hours"][0]
    assert hours == pytest.approx(sum(32 / speed for speed in speeds) / 3600, rel=1e-6)
    assert only.curves.median_speed == 320.0


def test_of_a_long_run_a_sample_is_read_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_runs, "MOST_BYTES", 300_000)
    text = "".join(json.dumps(line) + "\n" for line in rows(20_000, every=1))
    folders = [write_run(tmp_path / name, lines=[]) for name in ("long", "short")]
    (folders[0] / "metrics.jsonl").write_text(text)
    (folders[1] / "metrics.jsonl").write_text(text[: text.index("\n", 1000) + 1])
    long, short = read(*folders)
    assert len(text) > 5 * (len(text) - long.curves.history.skipped_bytes)
    assert (long.curves.last_step, short.curves.history.skipped_bytes) == (20_000, 0)
    assert "Of 1 run a sample of metrics.jsonl" in write(folders, tmp_path / "comparison.html").read_text()
    assert "a sample of metrics.jsonl" not in write(folders[1:], tmp_path / "comparison.html").read_text()


def test_the_more_runs_there_are_the_fewer_points_of_each_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_runs, "MOST_IN_ALL", 400)
    for name in ("a", "b", "c", "d"):
        write_run(tmp_path / name, lines=rows(1000, every=1))
    runs = read(tmp_path)
    assert all(len(curve) <= 100 for run in runs for curve in run.curves.metrics.values())
    assert [run.curves.metrics["loss"].values[[0, -1]].tolist() for run in runs] == [[2.0, 1.001]] * 4
    text = write([tmp_path], tmp_path / "comparison.html").read_text()
    assert "Of 1,000 points at most 50 are drawn" in text  # two charts of four curves


def test_reading_many_runs_says_how_far_it_is(tmp_path, capsys):
    for number in range(21):
        write_run(tmp_path / f"run{number}", lines=rows(10))
    read(tmp_path)
    assert capsys.readouterr().out.splitlines() == ["10 of 21 runs are read", "20 of 21 runs are read"]


def test_a_metric_has_one_title_and_one_scale_on_the_pages_of_one_run_and_of_several(tmp_path):
    folder = write_run(tmp_path / "a", lines=rows(**dict.fromkeys([*TRAINING, *HEALTH, "contrastive_top1"], 0.5)))
    pages = [run_page(gather(folder)), write([folder], tmp_path / "comparison.html").read_text()]
    charts = [
        {
            title: json.loads(data)["percent"]
            for title, data in re.findall(
                r'<figcaption><b>(.*?)</b>.*?type="application/json".*?>(.*?)</script>', text, re.S
            )
        }
        for text in pages
    ]
    assert charts[0] == charts[1]
    assert len(charts[0]) == len(TRAINING) + len(HEALTH) + 1
    shares = {title for title, percent in charts[0].items() if percent}
    names = ("data_wait", "knn_top1", "dead_dimensions", "contrastive_top1")
    assert shares == {html.escape(title_of(name), quote=False) for name in names}


def test_metrics_that_were_measured_otherwise_during_a_run_do_not_share_a_chart(tmp_path):
    write_run(tmp_path / "a", lines=rows(knn_top1=0.5))
    write_run(tmp_path / "b", {"seed": 1}, lines=rows(knn_top1=0.5))
    write_run(tmp_path / "c", {"online.knn.k": 5}, lines=rows(knn_top1=0.5))
    runs = read(tmp_path)
    found = [([each.name for each in own], words) for _, own, words in measured_alike("knn_top1", runs)]
    assert found == [(["a", "b"], "online.knn.k 20"), (["c"], "online.knn.k 5")]
    assert [len(own) for _, own, _ in measured_alike("loss", runs)] == [3]


# ---- sweeps --------------------------------------------------------------------------------------------------------


def made_sweep(tmp_path: Path, **more) -> Path:
    jobs = []
    for number, (lr, depth) in enumerate([("1e-4", "2"), ("0.01", "2"), ("1e-4", "4")]):
        out = write_run(
            tmp_path / "runs" / f"run{number}", {"optim.base_lr": float(lr), "model.args.depth": int(depth)}
        )
        words = [f"optim.base_lr={lr}", f"+model.args.depth={depth}", "method=mae", "objective=eval.knn"]
        jobs.append({"overrides": words, "out": str(out.relative_to(tmp_path)), "objective": 0.1 * (number + 1)})
    jobs.append({"overrides": ["optim.base_lr=1e9"], "state": "failed", "message": "error: too large\nby far"})
    return write_sweep(tmp_path / "swept", jobs, **more)


def test_swept_settings_are_the_first_columns_and_a_failed_run_is_a_row(tmp_path):
    made = page(tmp_path, made_sweep(tmp_path))
    heads = [cell[0] for cell in made.tables["runs-table"][0]]
    assert heads[:5] == ["run", "state", "optim.base_lr", "model.args.depth", "objective (eval.knn)"]
    table = [[cell[0] for cell in row[1:5]] for row in made.tables["runs-table"][1:]]
    assert table == [
        ["complete", "1e-4", "2", "0.1"],
        ["complete", "0.01", "2", "0.2"],
        ["complete", "1e-4", "4", "0.3"],
        ["failed", "1e9", "–", "–"],
    ]
    assert made.tables["runs-table"][4][1][1].startswith("error: too large")
    charts = [own["id"] for tag, own in made.elements if tag == "figure" and own.get("data-kind") == "scatter"]
    assert charts == ["sweep-0-0", "sweep-0-1"]


def test_outcomes_of_an_earlier_sweep_in_the_folder_are_left_out(tmp_path):
    write_sweep(tmp_path / "swept", [{"overrides": ["a=0"]}] * 3, id="old")
    time.sleep(0.02)
    write_sweep(tmp_path / "swept", [{"overrides": ["a=1"]}, {"overrides": ["a=2"]}], id="new")
    sweep = read_sweep(tmp_path / "swept")
    assert sweep is not None
    assert [job.overrides for job in sweep.jobs] == [{"a": "1"}, {"a": "2"}]
    assert (sweep.others, sweep.swept) == (1, ["a"])


def test_a_sweep_that_was_moved_finds_its_runs(tmp_path, monkeypatch):
    made_sweep(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir("/")
    runs, (sweep,) = read_runs([tmp_path / "after" / "swept"])
    assert [job.out for job in sweep.jobs] == [*(tmp_path / "after" / "runs" / f"run{n}" for n in range(3)), None]
    assert [each.state.word for each in runs] == ["complete"] * 3 + ["failed"]


def test_a_sweep_of_evaluations_has_a_row_for_each_result(tmp_path):
    run_dir = write_run(tmp_path / "a", results={f"knn_{k}": ({"top1": k / 10}, protocol(k=[k])) for k in (1, 5)})
    jobs = [{"overrides": [f"k=[{k}]"], "out": str(run_dir / "eval" / f"knn_{k}.json")} for k in (1, 5)]
    made = page(tmp_path, write_sweep(tmp_path / "swept", jobs))
    assert made.column("runs-table", "eval.knn top1", "k [1]") == {"knn_1.json": ["10.0%"], "knn_5.json": ["–"]}
    assert made.column("runs-table", "eval.knn top1", "k [5]") == {"knn_1.json": ["–"], "knn_5.json": ["50.0%"]}


def test_a_sweep_that_optimizes_names_what_it_found_by_its_objective(tmp_path):
    for direction, number in (("maximize", 2), ("minimize", 0)):
        folder = made_sweep(tmp_path / direction, direction=direction)
        text = write([folder], tmp_path / "comparison.html").read_text()
        assert f"it found run {number}, {0.1 * (number + 1):.6g}" in text
    assert "it found" not in write([made_sweep(tmp_path / "grid")], tmp_path / "comparison.html").read_text()


def test_what_two_sweeps_judged_their_runs_by_stands_in_two_columns(tmp_path):
    folders = []
    for name, objective in (("one", 0.5), ("two", 0.9)):
        out = write_run(tmp_path / "runs" / name, {"seed": len(folders)})
        jobs = [{"overrides": [f"lr={objective}", "objective=eval.knn"], "out": str(out), "objective": objective}]
        folders.append(write_sweep(tmp_path / name, jobs, id=name))
    made = page(tmp_path, *folders)
    assert made.column("runs-table", "what one judged its runs by") == {"one": ["0.5"], "two": ["–"]}
    assert made.column("runs-table", "what two judged its runs by") == {"one": ["–"], "two": ["0.9"]}


def test_a_long_number_is_shown_in_six_digits_and_sorted_by_all():
    cells = [setting_cell(text) for text in ("0.026000000000000002", "0.1234567891", "cosine", "1e-3")]
    assert [cell.text for cell in cells] == ["0.026", "0.123457", "cosine", "1e-3"]
    assert [cell.value for cell in cells] == [0.026000000000000002, 0.1234567891, "cosine", 0.001]


def test_an_axis_is_logarithmic_where_positive_settings_span_decades():
    assert is_logarithmic([1e-4, 1e-2])
    assert not is_logarithmic([0.5, 0.75])
    assert not is_logarithmic([0.0, 100.0])
    assert not is_logarithmic([])


# ---- the page ------------------------------------------------------------------------------------------------------


def test_names_settings_and_results_cannot_bring_elements_into_the_page(tmp_path):
    name = HOSTILE.replace("/", "")
    how = protocol(data__name=HOSTILE, k=HOSTILE, subject=HOSTILE)
    plain = page(tmp_path, write_run(tmp_path / "plain", results={"knn": ({"top1": 0.5}, protocol())}))
    a = write_run(
        tmp_path / name,
        {"optim.name": HOSTILE, "seed": 1, f"model.args.{name}": HOSTILE},
        lines=rows(**{HOSTILE: 1.0}),
        results={"knn": ({HOSTILE: 0.5, "top1": 0.5}, how)},
    )
    (a / "eval" / "no.json").write_text(HOSTILE)
    jobs = [
        {"overrides": [f"optim.name={HOSTILE}", f"{name}=1"], "out": str(a), "objective": 0.5},
        {"overrides": ["optim.name=x"], "state": "failed", "message": HOSTILE, "objective": 0.1},
    ]
    made = page(tmp_path, write_sweep(tmp_path / "swept", jobs), tmp_path / "plain")
    assert "img" not in [tag for tag, _ in made.elements]
    scripts = [own for tag, own in made.elements if tag == "script" and "type" not in own]
    assert scripts == [own for tag, own in plain.elements if tag == "script" and "type" not in own]
    assert not [own for _, own in made.elements if any(key.startswith("on") for key in own)]
    assert any(name in row[0][0] for row in made.tables["runs-table"])


def test_a_page_of_200_runs_is_made_in_seconds_and_has_a_few_megabytes(tmp_path):
    lines = [
        {**line, **{f"metric{i}": float(np.sin(line["step"] * (i + 1))) for i in range(8)}}
        for line in rows(3000, every=10)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for place in range(200):
        how = protocol(k=[place % 3], checkpoint={"path": "x", "step": 3000})
        settings = {"seed": place % 4, "optim.base_lr": 0.001 * (1 + place // 4), "trainer.epochs": 300.0}
        folder = write_run(
            tmp_path / "runs" / f"run{place}", settings, lines=[], results={"knn": ({"top1": 0.5}, how)}, saved=3000
        )
        (folder / "metrics.jsonl").write_text(text)
    began = time.process_time()
    path = write([tmp_path / "runs"], tmp_path / "comparison.html")
    assert time.process_time() - began < 60  # 8 on a quiet core
    assert path.stat().st_size < 12e6  # of which plotly has 4.8
    made = Page(path)
    assert len(made.tables["runs-table"]) == 201
    assert len(made.tables["recipes-table"]) == 51


def test_runs_of_every_method_are_compared_with_their_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SHORT, "data.limit=null", "data.source.num_train=36", "data.source.num_test=24"]  # pictures take longest
    words += ["trainer.epochs=1", "trainer.pictures=false", "online=none"]
    swin = "{embed_dim:16,depths:[1,1],num_heads:[2,2],window_size:4}"
    simmim = ["method=simmim", "model=swin_t", "model.patch_size=2", f"+model.args={swin}", "schedule.warmup_epochs=0"]
    methods = {**METHODS, "simmim": simmim}
    register(knn_command.KnnConfig)
    for name, own in methods.items():
        run(composed(*own, *words), out=tmp_path / "runs" / name)
        values = {"ckpt": str(tmp_path / "runs" / name), "device": "cpu", "threads": 1, "data": {"name": "checkpoint"}}
        knn_command.run(compose_evaluation("knn", values))
    made = page(tmp_path, tmp_path / "runs")
    assert {row[0][0]: row[1][0] for row in made.tables["runs-table"][1:]} == dict.fromkeys(sorted(methods), "complete")
    told = made.column("runs-table", "method")
    assert {name: cell[0] for name, cell in told.items()} == {
        "mae": "MAE",
        "relative_location": "RelativeLocation",
        "simclr": "SimCLR",
        "simmim": "SimMIM",
    }
    columns = [place for place, cell in enumerate(made.tables["runs-table"][0]) if cell[0] == "eval.knn top1"]
    for row in made.tables["runs-table"][1:]:
        written = json.loads((tmp_path / "runs" / row[0][0] / "eval" / "knn.json").read_text())["metrics"]["top1"]
        assert [row[place][0] for place in columns if row[place][0] != "–"] == [f"{written:.1%}"]


def test_the_made_config_is_changed_by_dotted_keys():
    assert changed(CONFIG, {"optim.base_lr": 7})["optim"] == {"name": "adamw", "base_lr": 7, "weight_decay": 0.05}
    assert CONFIG["optim"]["base_lr"] == 0.001
