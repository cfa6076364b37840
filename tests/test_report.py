"""The page of a run: what it is made of, what it costs the run, and that it harms nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.nn.functional import normalize

import eval.report.refresh as refresh
import ssl.starts as starts
from eval.config import register
from eval.look.components import principal_plane
from eval.look.projections import project
from eval.pages import page as pages
from eval.pages.charts import Series, line_chart
from eval.pages.decimate import decimated
from eval.pages.pictures import data_uri
from eval.report import command, feature_pictures
from eval.report.advice import warnings_of
from eval.report.budget import Budget
from eval.report.feature_pictures import Seen, map_picture, neighbours_picture
from eval.report.gather import LOST, RUNNING, gather
from eval.report.metrics import HOLD, History, skips
from eval.report.refresh import RunReport
from eval.report.run_page import run_page
from eval.results import write_results
from ssl.checkpoint_card import CARD
from ssl.config import CONF
from ssl.online import StopRun
from ssl.pretrain import run
from ssl.run_lock import RunLock
from ssl.run_report import Moment, Reporter
from ssl.stopping import Stopped
from ssl.tracking import Tracker, duration
from tests.test_pretrain import METHODS, SHORT, assert_equal_runs, composed

BRIEF = [*SHORT, "trainer.steps=6", "trainer.checkpoint_every_steps=2", "online=none", "report.sample=16"]
HOSTILE = "</script></title><img src=x onerror=alert(1)><b>&amp;"


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tmp_path_factory) -> tuple[str, Path]:
    """A run of each method that was stopped and continued, with all pictures, whatever they take."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "allows", lambda self, seconds, **limits: True)
        for steps in (3, 6):
            run(composed(*METHODS[request.param], *BRIEF, f"trainer.steps={steps}", "seed=3"), out=out)
    return request.param, out


# ---- curves --------------------------------------------------------------------------------------------------------


def test_a_decimated_curve_keeps_its_ends_its_extremes_and_those_of_each_part():
    rng = np.random.default_rng(0)
    x, y = np.arange(50_001.0), rng.normal(size=50_001).cumsum()
    y[31_234], y[7] = 1e6, np.nan
    kept = decimated(x, y, most=200)
    assert len(kept) <= 200
    assert {0, 50_000, int(np.nanargmin(y)), 31_234} <= set(kept.tolist())
    assert (np.diff(x[kept]) > 0).all()
    for part in np.array_split(np.arange(50_001), 40):  # 99 parts of the axis: each of these has a whole one at least
        inside = y[kept[np.isin(kept, part)]]
        assert np.isfinite(inside).all()
        assert len(inside) >= 2


def test_a_short_curve_is_drawn_as_it_is():
    y = np.array([3.0, np.nan, 1.0, np.inf, 2.0])
    assert decimated(np.arange(5.0), y).tolist() == [0, 2, 4]


def write_metrics(path: Path, count: int, *, spike: int | None = None, start: int = 1) -> None:
    with path.open("a") as file:
        for step in range(start, start + count):
            loss = 1e4 if step == spike else 5 - step / 1e5
            row = {"step": step, "epoch": step / 10, "loss": loss, "lr": 0.1, "skipped_steps": float(step > 50)}
            file.write(json.dumps(row) + "\n")


def test_a_long_history_is_held_as_few_points_and_keeps_its_peak(tmp_path: Path):
    write_metrics(tmp_path / "metrics.jsonl", 30_000, spike=12_345)
    history = History()
    history.read(tmp_path / "metrics.jsonl")
    curve = history.curves["loss"]
    assert history.num_rows == curve.num_points == 30_000
    assert len(curve) < HOLD
    assert curve.steps[np.argmax(curve.values)] == 12_345
    assert (curve.steps.min(), curve.steps.max()) == (1, 30_000)
    run = gather(tmp_path, history=history)
    text = run_page(run)
    assert len(text) - len(pages.plotly_source()) < 600_000
    assert f"Of 30,000 values that were read {len(decimated(curve.steps, curve.values)):,} are drawn" in text
    assert "points at most" not in text


def test_what_was_read_piece_by_piece_is_what_is_read_at_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    pieces, whole = History(), History()
    for start in (1, 401, 801):
        write_metrics(path, 400, start=start)
        with path.open("a") as file:
            file.write('{"step": 99999, "lo')  # being written: not read until its line ends
        pieces.read(path)
        os.truncate(path, path.stat().st_size - len('{"step": 99999, "lo'))
    whole.read(path)
    for name, curve in whole.curves.items():
        assert curve.values.tolist() == pieces.curves[name].values.tolist()
    assert whole.last == pieces.last
    assert list(skips(whole.curves["skipped_steps"])) == [(51.0, 5.1, 1)]


def test_a_file_that_was_cut_is_read_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 100)
    history = History()
    history.read(path)
    path.write_text("")
    write_metrics(path, 7)
    history.read(path)
    assert history.num_rows == 7


def test_of_a_huge_file_a_sample_is_read_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, 40_000)
    size, added = path.stat().st_size, []
    monkeypatch.setattr(
        History, "_add", lambda self, line, add=History._add: (added.append(len(line)), add(self, line))
    )
    history = History()
    history.read(path, most_bytes=400_000)
    assert sum(added) < 450_000 < size / 5
    assert history.num_torn == 0
    steps = history.curves["loss"].steps
    assert (steps.min(), steps.max()) == (1, 40_000)
    assert np.diff(np.sort(steps)).max() < 40_000 / 30  # from all over the file
    assert f"{1 - history.skipped_bytes / size:.0%} of metrics.jsonl" in history.describe()
    assert abs(sum(added) / size - (1 - history.skipped_bytes / size)) < 0.02
    write_metrics(path, 5, start=40_001)
    history.read(path, most_bytes=400_000)  # what is new is little: all of it
    assert history.last["step"] == 40_005


def test_lines_that_are_torn_or_no_numbers_leave_the_others(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\nnonsense\n[1]\n{"loss": 3}\n{"step": 2, "loss": null, "name": "x"}\n')
    history = History()
    history.read(path)
    assert history.num_torn == 3
    assert history.curves["loss"].num_missing == 1
    assert history.curves["loss"].values.tolist() == [2.0]


# ---- starts --------------------------------------------------------------------------------------------------------


def test_each_start_is_noted_with_where_it_went_on_from_and_how_it_ended(finished: tuple[str, Path]):
    _, out = finished
    first, second = starts.read_starts(out)
    assert (first.step, first.stop_step, second.step, second.stop_step) == (0, 3, 3, 6)
    assert first.end is not None
    assert second.end is not None
    assert (second.end["how"], second.end["step"]) == (starts.COMPLETE, 6)
    assert second.about["versions"]["torch"] == torch.__version__
    assert gather(out).state == starts.COMPLETE


def test_what_was_typed_is_noted_for_its_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(starts.TYPED, "")
    monkeypatch.setattr("sys.argv", ["ssl/pretrain.py", "method=mae", "data.root=/my photos"])
    starts.note_command("ssl.pretrain", tmp_path / "a")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        starts.note_start(tmp_path / name, step=0, stop_step=5, device="cpu", world_size=1, num_features=8)
    (mine,), (other,) = (starts.read_starts(tmp_path / name) for name in ("a", "b"))
    assert mine.command == ["python", "-m", "ssl.pretrain", "method=mae", "data.root=/my photos"]
    assert other.command is None
    (tmp_path / "a" / "config.yaml").write_text("seed: 0\n")
    assert "python -m ssl.pretrain method=mae &#39;data.root=/my photos&#39;" in run_page(gather(tmp_path / "a"))


def test_the_command_of_a_run_is_that_of_its_last_start(tmp_path: Path):
    rows = [
        {"event": "start", "step": step, "stop_step": 9, "command": words}
        for step, words in ((0, ["first", "trainer.epochs=1"]), (4, ["last", "trainer.epochs=2"]), (6, None))
    ]
    (tmp_path / starts.NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = run_page(gather(tmp_path))
    assert '<pre id="command">last trainer.epochs=2</pre>' in text
    assert "were typed in 2 ways" in text
    (tmp_path / starts.NAME).write_text(json.dumps(rows[1]) + "\n" + json.dumps(rows[1] | {"step": 5}) + "\n")
    assert "ways, of which" not in run_page(gather(tmp_path))


def test_a_torn_line_costs_that_line(tmp_path: Path):
    (tmp_path / starts.NAME).write_text('{"event": "start", "st')
    starts.note_start(tmp_path, step=4, stop_step=5, device="cpu", world_size=2, num_features=None)
    starts.note_end(tmp_path, step=5, how=starts.FAILED, message="boom")
    (start,) = starts.read_starts(tmp_path)
    assert (start.step, start.about["world_size"]) == (4, 2)
    assert start.end is not None
    assert start.end["message"] == "boom"


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        starts.note_end(tmp_path / "gone", step=1, how=starts.COMPLETE)
    assert "the run goes on without" in caplog.text


# ---- the training is not touched -----------------------------------------------------------------------------------


def test_a_run_is_the_same_bit_for_bit_with_and_without_its_report(finished: tuple[str, Path], tmp_path: Path):
    method, out = finished
    for steps in (3, 6):
        words = [*METHODS[method], *SHORT, "trainer.checkpoint_every_steps=2", "online=none", f"trainer.steps={steps}"]
        run(composed(*words, "report=none", "seed=3"), out=tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
    assert (out / "pictures" / "neighbours_00000006.png").exists()
    assert_equal_runs(out, tmp_path / "run")


def test_the_page_of_each_method_shows_its_curves_and_pictures(finished: tuple[str, Path]):
    method, out = finished
    text = (out / "report.html").read_text()
    assert 'class="state state-complete"' in text
    assert "could not be made (" not in text
    for name in ("loss", "lr", "images_per_second", "data_wait", "grad_norm"):
        assert f'id="chart-{name.replace("_", "-5f-")}"' in text
    assert "continued at step 3" in text
    own = {"mae": {"reconstructions"}, "relative_location": {"pretext"}}
    kinds = {"views", "neighbours", "map"} | own.get(method, set())
    for kind in kinds:
        newest = max((out / "pictures").glob(f"{kind}_*.png"))
        assert data_uri(newest)[0] in text, kind


@pytest.mark.parametrize("where", ["gather", "run_page", "write_page"])
def test_what_goes_wrong_in_a_report_is_one_warning(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: Any, **__: Any) -> Any:
        raise {"gather": MemoryError(), "run_page": RecursionError("deep"), "write_page": OSError(28, "No space")}[
            where
        ]

    monkeypatch.setattr(refresh, where, fail)
    monkeypatch.setattr(Budget, "allows", lambda self, seconds, **limits: True)
    reporter = make_reporter(tmp_path, RunReport(sample=0))
    with caplog.at_level(logging.WARNING), reporter:
        for step in (1, 2, 3):
            reporter.saved(step, final=step == 3)
    assert caplog.text.count("the run goes on without") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_run_whose_report_fails_in_every_part_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("planted")

    monkeypatch.setattr(Budget, "allows", lambda self, seconds, **limits: True)
    monkeypatch.setattr("eval.report.feature_pictures.FeatureSample.read", fail)
    out = tmp_path / "run"
    out.mkdir()
    (out / "report.html").mkdir()  # cannot be replaced by a file
    (out / "starts.jsonl").mkdir()
    (out / "report.json").mkdir()
    with caplog.at_level(logging.WARNING):
        metrics = run(composed(*METHODS["mae"], *BRIEF, "trainer.steps=4"), out=out)
    assert np.isfinite(metrics["loss"])
    assert caplog.text.count("the run's report could not be made") == 1


def test_pictures_that_failed_once_are_not_tried_again_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    report = RunReport(max_share=1.0, sample=16)
    moment = Moment(tmp_path, 5, 10, 1e6, RUNNING)
    assert report.wants_pictures(moment, images_per_second=1e6)
    monkeypatch.setattr("eval.report.feature_pictures.FeatureSample.__init__", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.pictures(moment, subject=None, source=None, tracker=None)  # pyright: ignore[reportArgumentType]
    assert not report.wants_pictures(moment, images_per_second=1e6)
    report.write(moment)
    assert "ZeroDivisionError" in (tmp_path / "report.html").read_text()


def make_reporter(out: Path, report: RunReport | None) -> Reporter:
    method: Any = torch.nn.Module()
    method.backbone = torch.nn.Identity()
    subject: Any = SimpleNamespace(device=torch.device("cpu"))
    return Reporter(
        report,
        out=out,
        stop_step=3,
        start_step=0,
        tracker=None,  # pyright: ignore[reportArgumentType]
        method=method,
        source=None,  # pyright: ignore[reportArgumentType]
        subject=lambda step: subject,
        average=lambda step: None,
        train_seconds=lambda: 100.0,
        images_per_second=lambda: None,
    )


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (None, starts.STOPPED),
        (Stopped(1, 15), starts.STOPPED),
        (StopRun("enough"), starts.ENDED),
        (ValueError("the loss is not finite"), starts.FAILED),
    ],
)
def test_the_page_tells_how_a_run_ended(error: Exception | None, how: str, tmp_path: Path):
    with contextlib.suppress(Exception), make_reporter(tmp_path, RunReport(max_share=0.0)) as reporter:
        reporter.saved(1, final=False)
        if error is not None:
            raise error
    text = (tmp_path / "report.html").read_text()
    assert f'class="state state-{how}"' in text
    assert error is None or str(error) in text
    assert gather(tmp_path).state == how


def test_a_run_that_holds_its_lock_is_running_and_one_without_an_end_is_lost(tmp_path: Path):
    starts.note_start(tmp_path, step=0, stop_step=5, device="cpu", world_size=1, num_features=None)
    with RunLock(tmp_path):
        assert gather(tmp_path).state == RUNNING
    assert gather(tmp_path).state == LOST


def test_what_is_left_is_reckoned_from_the_step_whose_time_is_known(tmp_path: Path):
    metrics_run(tmp_path)  # 100 steps are logged
    starts.note_start(tmp_path, step=0, stop_step=200, device="cpu", world_size=1, num_features=None)
    checkpoint = tmp_path / "checkpoints" / "step_00000050"
    checkpoint.mkdir(parents=True)
    (checkpoint / CARD).write_text(json.dumps({"train_seconds": 3000.0}))
    with RunLock(tmp_path):
        run = gather(tmp_path)
        assert (run.step, run.saved and run.saved.step) == (100, 50)
        text = run_page(run)
    assert f"<b>{duration(6000.0)}</b>left, at this pace" in text
    assert "training time up to step 50" in text


def test_a_run_that_failed_says_the_last_step_that_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(self: Tracker, step: int, metrics: dict[str, float], log: Any = Tracker.log) -> None:
        if step == 3:
            raise RuntimeError("planted")
        log(self, step, metrics)

    monkeypatch.setattr(Tracker, "log", fails)
    with pytest.raises(RuntimeError, match="planted"):
        run(composed(*METHODS["simclr"], *BRIEF, "trainer.checkpoint_every_steps=100"), out=tmp_path / "run")
    (start,) = starts.read_starts(tmp_path / "run")
    assert start.end is not None
    assert start.end["step"] == 2
    (warning,) = [each for each in warnings_of(gather(tmp_path / "run")) if "ended with an error" in each.what]
    assert "begins anew, as no checkpoint was written" in warning.advice


# ---- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.4, 3.0])  # of a page: less than it is taken to need at first, and more
def test_all_refreshes_together_stay_within_their_share_over_resumes(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock, made = [0.0], []

    def slow_page(*_: Any, **__: Any) -> str:
        clock[0] += seconds
        made.append(clock[0])
        return "page"

    monkeypatch.setattr(refresh.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(refresh, "run_page", slow_page)
    trained = 0.0
    for _ in range(4):  # starts of one run
        report = RunReport(max_share=0.02, sample=0)
        for _ in range(100):
            trained += 10.0
            clock[0] += 10.0
            report.write(Moment(tmp_path, 1, 2, trained, RUNNING))
            assert seconds * len(made) <= 0.02 * trained + 1e-9 or len(made) == 1
    assert seconds * len(made) <= 0.02 * trained + 1e-9
    assert seconds * (len(made) + 1) > 0.02 * trained - 1e-9  # and what there is, is used
    assert Budget.of(tmp_path).seconds == pytest.approx(seconds * len(made))
    report.write(Moment(tmp_path, 2, 2, trained, starts.COMPLETE))  # the last one in any case
    assert clock[0] == made[-1]


def test_a_disk_that_is_nearly_full_is_left_to_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refresh.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000_000))
    report = RunReport(sample=0)
    report.write(Moment(tmp_path, 1, 2, 1e6, RUNNING))
    assert not (tmp_path / "report.html").exists()
    report.write(Moment(tmp_path, 2, 2, 1e6, starts.COMPLETE))
    assert "for want of time or room" in (tmp_path / "report.html").read_text()


def test_pictures_wait_until_there_is_time_for_them(tmp_path: Path):
    report = RunReport(max_share=0.02, sample=500)
    moments = [Moment(tmp_path, 1, 2, seconds, RUNNING) for seconds in (100.0, 10_000.0)]
    wants = [report.wants_pictures(moment, images_per_second=50.0) for moment in moments]
    assert wants == [False, True]
    assert report._budget is not None
    report._budget.add_pictures(250.0)  # slower than was thought
    assert not report.wants_pictures(moments[1], images_per_second=50.0)


@pytest.mark.parametrize(("settings", "said"), [({"max_share": 1.5}, "max_share"), ({"sample": 3}, "sample")])
def test_settings_that_make_no_sense_are_refused(settings: dict, said: str):
    with pytest.raises(ValueError, match=f"report.{said} must"):
        RunReport(**settings)


# ---- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_the_old_page_stands_until_the_new_one_is_whole(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, seen = tmp_path / "report.html", []
    pages.write_page(path, "old")

    def killed(*_: Any) -> None:
        seen.append(path.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        pages.write_page(path, "new" * 1000)
    assert seen == ["old"]
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


class Elements(HTMLParser):
    """Counts the elements of a page and collects the text outside of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def hostile_run(path: Path) -> Path:
    """A run folder in which every text that somebody else chose tries to be a part of the page."""
    run_dir = path / "run" / HOSTILE.replace("/", "")
    for name in ("eval", "checkpoints/step_00000002", "hang", "failed/step_00000003", "pictures"):
        (run_dir / name).mkdir(parents=True)
    (run_dir / "config.yaml").write_text(json.dumps({"seed": 0, "data": {"name": HOSTILE}, HOSTILE: HOSTILE}))
    group = {"parts": [HOSTILE], "layer": None, "tensors": 1, "parameters": 2, "lr": 0.1, "weight_decay": 0.0}
    recipe = {"parts": {HOSTILE: {"name": HOSTILE}}, "notes": [HOSTILE], "groups": [group]}
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    rows = [{"step": s, "epoch": s / 2, "loss": 1.0 / s, HOSTILE: float(s), "skipped_steps": s - 1.0} for s in (1, 2)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"event": "start", "step": 0, "stop_step": 2, "command": ["python", HOSTILE], "host": HOSTILE}
    end = {"event": "end", "how": "failed", "step": 2, "message": HOSTILE}
    (run_dir / "starts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (start, start | {"step": 1}, end)))
    card = {"bad_images": {"1": HOSTILE}, "num_images": 5, "backbone": {"architecture": HOSTILE}}
    (run_dir / "checkpoints/step_00000002/state.json").write_text(json.dumps(card))
    (run_dir / "hang/rank0.txt").write_text(HOSTILE)
    (run_dir / "failed/step_00000003/step.json").write_text(
        json.dumps({"step": 3, "reason": HOSTILE, "images": [HOSTILE]})
    )
    confusion = {"classes": [HOSTILE, "b"], "rows": [[1, 2], [0, 3]]}
    result = {
        "metrics": {"top1": 0.5, HOSTILE: 0.1},
        "protocol": {"command": HOSTILE, "data": {"name": HOSTILE}, "notes": [HOSTILE], HOSTILE: HOSTILE},
        "details": {"per_class": {HOSTILE: 0.3, "b": 0.9}, "confusion": confusion},
    }
    (run_dir / "eval/knn.json").write_text(json.dumps(result))
    return run_dir


def test_no_text_of_others_becomes_a_part_of_the_page(tmp_path: Path):
    hostile = hostile_run(tmp_path)
    text = run_page(gather(hostile))
    found = Elements(text)
    assert "img" not in found.tags
    assert "b" not in {name for name, _ in found.attributes}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert found.tags["title"] == 1
    assert found.tags["script"] == 3 + text.count('<script type="application/json"')
    assert found.text.count(HOSTILE) == found.text.count(HOSTILE.removesuffix("amp;")) > 15  # shown as it is
    assert "could not be made (" not in text


def test_data_in_a_page_is_what_was_put_in():
    value = {"names": [HOSTILE, "\u2028<!--"], "y": [1.5, None, -3]}
    element = pages.as_json({**value, "z": float("nan")}, "data")
    assert element.count("<") == 2
    assert json.loads(element[element.index(">") + 1 : element.rindex("<")]) == {**value, "z": None}


@pytest.mark.parametrize(("steps", "said"), [((0,), "never resumed"), ((0, 4), "resumed once (the dashed line)")])
def test_how_often_a_run_was_resumed_is_said_in_words(steps: tuple[int, ...], said: str, tmp_path: Path):
    metrics_run(tmp_path)
    for step in steps:
        starts.note_start(tmp_path, step=step, stop_step=100, device="cpu", world_size=1, num_features=None)
    assert said in run_page(gather(tmp_path))


def test_a_chart_says_in_words_what_it_shows():
    chart = Elements(line_chart("c", [Series("loss", [4, 1, 2], {"step": [0, 5, 9]})], x={"step": "step"}, y="loss"))
    (words,) = [value for name, value in chart.attributes if name == "aria-label" and value and "line chart" in value]
    assert "from 4 at step 0 to 2 at step 9, lowest 1 at 5, highest 4 at 0" in words


@pytest.mark.parametrize("name", ["config.yaml", "recipe.json", "metrics.jsonl", "starts.jsonl", "eval/knn.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe{[", b"[]", b"null", b"{}"])
def test_a_part_that_is_broken_leaves_the_others(name: str, content: bytes, tmp_path: Path):
    run_dir = hostile_run(tmp_path)
    (run_dir / name).write_bytes(content)
    text = run_page(gather(run_dir))
    for section in ("recipe", "training", "pictures", "evaluations", "data", "environment", "about"):
        assert f'<section id="{section}"' in text
    assert text.count("could not be made (") <= 1


def test_a_picture_that_is_none_is_named(tmp_path: Path):
    run_dir = hostile_run(tmp_path)
    (run_dir / "pictures" / "views_00000002.png").write_bytes(b"nothing")
    assert "is no picture" in run_page(gather(run_dir))


@pytest.mark.parametrize("protocol", [{"data": 5}, {"checkpoint": {"step": "x"}}, {"weights": []}, {"notes": 3}])
def test_a_result_that_no_evaluation_writes_is_named_and_costs_no_other(protocol: dict, tmp_path: Path):
    metrics_run(tmp_path, data_wait=lambda step: 0.3)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "odd.json").write_text(result_of(protocol, 0.1))
    (tmp_path / "eval" / "sound.json").write_text(result_of({}, 0.4321))
    text = run_page(gather(tmp_path))
    assert "odd.json has a protocol that no evaluation writes" in text
    assert "43.21%" in text
    assert "The device waits for data 30%" in text
    assert "could not be made (" not in text


def test_details_that_no_evaluation_writes_cost_their_own_table_alone(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "eval").mkdir()
    odd = {"metrics": {}, "protocol": {"command": "a"}, "details": {"per_class": {"b": 0.5}, "confusion": {"rows": 7}}}
    (tmp_path / "eval" / "odd.json").write_text(json.dumps(odd))
    (tmp_path / "eval" / "sound.json").write_text(result_of({}, 0.4321))
    text = run_page(gather(tmp_path))
    assert "eval/odd.json cannot be shown" in text
    assert "43.21%" in text


ODD = ['"step": NaN', '"step": "12"', '"step": true', '"step": 4, "epoch": "x"', f'"step": {10**400}', '"epoch": 1']


@pytest.mark.parametrize("row", ODD)
def test_a_row_whose_step_or_epoch_is_no_number_is_left_out(row: str, tmp_path: Path):
    metrics_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f'{{{row}, "loss": 1e9, "images_per_second": {10**400}}}\n')
        file.write(f'{{"step": 101, "epoch": 10.1, "loss": 1.5, "odd": {10**400}}}\n')
    found = gather(tmp_path)
    assert (found.history.num_torn, found.history.num_rows, found.step) == (1, 101, 101)
    assert found.history.latest["loss"] == 1.5
    text = run_page(found)
    assert "could not be made" not in text
    assert "101 of 100" in text


@pytest.mark.parametrize(
    "config", ["trainer: 5", "trainer: {steps: x, epochs: [1]}", "optim: a", "data: [1]", "model: b"]
)
def test_settings_that_are_no_groups_cost_no_part_of_the_page(config: str, tmp_path: Path):
    metrics_run(tmp_path)
    (tmp_path / "config.yaml").write_text(config + "\n")
    found = gather(tmp_path)
    assert "could not be made" not in run_page(found)
    assert found.state == starts.STOPPED
    assert any("no group of settings" in said for said in found.problems) == ("steps" not in config)


# ---- what it says --------------------------------------------------------------------------------------------------


def metrics_run(path: Path, **curves: Callable[[int], float | None]) -> Path:
    """A run of 100 logged steps whose metrics are functions of the step."""
    sound = {"loss": lambda s: 5 - s / 30, "data_wait": lambda s: 0.01, "images_per_second": lambda s: 100.0}
    rows = [{"step": s, "epoch": s / 10} | {n: f(s) for n, f in {**sound, **curves}.items()} for s in range(1, 101)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "recipe.json").write_text(json.dumps({"parts": {"schedule": {"warmup_steps": 10}}}))
    (path / "config.yaml").write_text("trainer: {epochs: 10}\n")
    return path


HEALTHY: dict[str, Callable[[int], float | None]] = {
    "rankme": lambda s: 20.0,
    "feature_std": lambda s: 0.1,
    "mean_cosine": lambda s: 0.3,
    "dead_dimensions": lambda s: 0.0,
}


def test_a_sound_run_is_given_no_advice(tmp_path: Path):
    assert warnings_of(gather(metrics_run(tmp_path, **HEALTHY)), RUNNING) == []


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: 2.08 - 0.034 * min(s / 50, 1) + (0.009 if s > 90 else 0.0),  # rises by less than 1 % of the first
        lambda s: 5 - 0.4 * min(s / 50, 1) + 0.3 * (s % 2) + (0.12 if s > 90 else 0.0),  # by less than its noise
    ],
)
def test_a_loss_that_rises_within_its_noise_is_no_sign_of_trouble(loss: Callable[[int], float], tmp_path: Path):
    assert warnings_of(gather(metrics_run(tmp_path, loss=loss)), RUNNING) == []


def test_a_wait_that_is_just_told_does_not_contradict_its_bound(tmp_path: Path):
    (warning,) = warnings_of(gather(metrics_run(tmp_path, data_wait=lambda step: 0.104)), RUNNING)
    assert "waits for data 10% of the time, by the median of the latter half; from 10% on" in warning.what


def test_a_pretext_picture_that_is_missing_is_asked_of_the_page(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("method: {_target_: ssl.methods.relative_location.RelativeLocation}\n")
    part = run_page(gather(tmp_path)).split('<h3 id="picture-pretext">')[1].split("<h3")[0]
    assert f"python -m eval.report {tmp_path} makes it" in part


def test_a_check_that_meets_something_odd_is_named_and_the_others_are_made(tmp_path: Path):
    metrics_run(tmp_path, data_wait=lambda step: 0.3)
    (tmp_path / "recipe.json").write_text(json.dumps({"parts": {"schedule": {"warmup_steps": "x"}}}))
    said = [warning.what for warning in warnings_of(gather(tmp_path), RUNNING)]
    assert any("The check of warmup could not be made (TypeError" in each for each in said)
    assert any("The device waits for data 30%" in each for each in said)


@pytest.mark.parametrize(
    ("curves", "said"),
    [
        ({"loss": lambda s: 5 + 0.001 * (s % 3)}, "The loss has not fallen"),
        ({"loss": lambda s: 5 - s / 30 if s < 60 else 4.5}, "The loss has risen again"),
        ({"loss": lambda s: None if s == 50 else 5 - s / 30}, "At 1 logged step the loss was not finite"),
        ({"skipped_steps": lambda s: float(s > 20) * 3}, "3 steps were skipped (3.00% of the run)"),
        ({"data_wait": lambda s: 0.3}, "The device waits for data 30% of the time"),
        ({"images_per_second": lambda s: 100.0 if s < 70 else 30.0}, "Training has become slower: 30 images/s"),
        ({**HEALTHY, "rankme": lambda s: 30.0 if s < 50 else 6.0}, "RankMe has fallen to 6.0 from 30.0"),
        ({**HEALTHY, "dead_dimensions": lambda s: 0.9}, "90% of the dimensions"),
        ({"knn_top1": lambda s: 0.6 if s < 50 else 0.4}, "The kNN accuracy has fallen: 60.0% at step"),
    ],
)
def test_a_sign_of_trouble_is_told_with_what_helps(curves: dict, said: str, tmp_path: Path):
    (warning,) = warnings_of(gather(metrics_run(tmp_path, **curves)), RUNNING)
    assert said in warning.what
    assert warning.advice
    assert said.replace("'", "&#39;") in run_page(gather(tmp_path))


def test_a_run_that_ended_in_its_warmup_is_told(tmp_path: Path):
    metrics_run(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({"parts": {"schedule": {"warmup_steps": 100}}}))
    assert "within the warm-up of 100 steps" in warnings_of(gather(tmp_path), starts.STOPPED)[0].what


def result_of(protocol: dict, top1: float) -> str:
    return json.dumps({"metrics": {"top1": top1}, "protocol": {"command": "eval.knn", **protocol}})


def test_an_evaluation_of_an_older_checkpoint_is_told(finished: tuple[str, Path], tmp_path: Path):
    _, out = finished
    (tmp_path / "eval").mkdir()
    (tmp_path / "checkpoints").symlink_to(out / "checkpoints")
    (tmp_path / "eval" / "knn.json").write_text(result_of({"checkpoint": {"step": 4}}, 0.3))
    told = [warning for warning in warnings_of(gather(tmp_path), starts.COMPLETE) if "judges step 4" in warning.what]
    assert len(told) == 1
    assert "python -m eval.knn" in told[0].advice


def test_results_of_two_protocols_stand_in_two_tables_and_one_says_what_fails(tmp_path: Path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    for name, k, top1 in (("a", 20, 0.111), ("b", 20, 0.222), ("c", 5, 0.333)):
        (tmp_path / "eval" / f"{name}.json").write_text(result_of({"k": k, "seed": ord(name)}, top1))
    text = run_page(gather(tmp_path))
    tables = [part.split("</table>")[0] for part in text.split("<table>")[1:]]
    (first,) = [table for table in tables if "11.10%" in table]
    assert "22.20%" in first
    assert "33.30%" not in first
    assert len([table for table in tables if "33.30%" in table]) == 1


def test_a_baseline_that_is_better_is_told(tmp_path: Path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "pixels.json").write_text(result_of({"subject": "pixels"}, 0.4))
    (tmp_path / "eval" / "knn.json").write_text(result_of({"subject": "runs/x"}, 0.3))
    told = [warning.what for warning in warnings_of(gather(tmp_path), starts.STOPPED)]
    assert any("30.0% is below that of pixels, 40.0%" in what for what in told)


# ---- pictures of features ------------------------------------------------------------------------------------------


def test_the_plane_is_that_of_the_covariance_and_its_shares_are_its_eigenvalues():
    torch.manual_seed(0)
    features = torch.randn(60, 12) * torch.linspace(3, 0.1, 12) + 5
    points, shares = principal_plane(features)
    values, vectors = np.linalg.eigh(np.cov(features.numpy().T.astype(np.float64)))
    assert np.allclose(shares, values[::-1][:2] / values.sum(), atol=1e-6)
    expected = (features.numpy() - features.numpy().mean(0)) @ vectors[:, ::-1][:, :2]
    for ours, theirs in zip(points.T, expected.T, strict=True):
        assert np.allclose(ours, theirs, atol=1e-4) or np.allclose(ours, -theirs, atol=1e-4)


def test_images_of_several_classes_agree_where_one_is_in_common_and_the_map_is_of_one_colour(monkeypatch):
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]])
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    seen = Seen(features, np.zeros((4, 8, 8, 3), np.uint8), labels, ["cat", "dog", "sofa"], step=1)
    told = []
    monkeypatch.setattr(feature_pictures, "captioned", lambda rows, **words: told.append(words["captions"]))
    neighbours_picture(seen)
    first = next(row for row in told[0] if row[0] == "cat, sofa")
    assert [text[-1] for text in first[1:3]] == ["=", "\u00d7"]
    monkeypatch.setattr(feature_pictures, "scatter", lambda axis, place, groups, size: told.append(groups.names))
    map_picture(seen)
    assert told[-1] == ["images"]


def test_the_map_of_a_run_is_that_of_the_look_whatever_the_length_of_its_features(monkeypatch):
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 30)[:, None]
    seen = Seen(features, np.zeros((30, 8, 8, 3), np.uint8), np.arange(30) % 3, None, step=1)
    drawn = []
    monkeypatch.setattr(feature_pictures, "scatter", lambda axis, place, groups, size: drawn.append(place))
    monkeypatch.setattr(feature_pictures, "legend", lambda axis, groups: ([], []))
    map_picture(seen)
    assert np.allclose(drawn[0], project(features, "pca", seed=0).place, atol=1e-6)


def test_the_nearest_image_stands_beside_the_one_asked_for():
    torch.manual_seed(0)
    features = normalize(torch.randn(20, 8))
    features[13] = features[0] + 0.01  # the nearest of the first image, by far
    pixels = np.zeros((20, 8, 8, 3), np.uint8)
    pixels[13] = (250, 0, 250)
    seen = Seen(features, pixels, np.full(20, -1), None, step=1)
    picture = neighbours_picture(seen)
    top = np.argwhere((picture == (250, 0, 250)).all(-1))
    height, width = top.max(0) - top.min(0) + 1
    first_row = top[top[:, 0] < top[0, 0] + 90]
    assert first_row[:, 1].min() < picture.shape[1] / 4  # the second column of eight
    assert height >= 90
    assert width >= 90


# ---- the command ---------------------------------------------------------------------------------------------------


def report(*overrides: str) -> Path:
    register(command.ReportConfig)
    with initialize_config_dir(CONF, version_base="1.3"):
        return command.run(compose("report", overrides=list(overrides)))


def test_the_command_makes_the_page_from_the_folder_with_the_features(finished: tuple[str, Path], tmp_path: Path):
    _, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    made = report(f"runs=[{out}]", f"out={tmp_path / 'page.html'}", "looks=[neighbours]", "sample=24", "threads=1")
    text = made.read_text()
    assert "Step 6, the last checkpoint" in text
    assert "could not be made (" not in text
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_several_runs_are_compared(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        metrics_run(tmp_path / name)
    made = report(f"runs=[{tmp_path / 'a'},{tmp_path / 'b'}]")
    assert made == tmp_path / "comparison.html"
    assert "Comparison of 2 runs" in made.read_text()
    assert report(f"runs=[{tmp_path}]", f"out={tmp_path / 'c.html'}").read_text().count("Comparison of 2 runs") >= 1
    with pytest.raises(ValueError, match="sample has no effect on the comparison"):
        report(f"runs=[{tmp_path}]", "sample=5")


def test_a_path_that_is_no_run_is_refused_in_words(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist; give a run folder"):
        report(f"runs=[{tmp_path / 'nothing'}]")
    with pytest.raises(ValueError, match="is no run folder"):
        report(f"runs=[{tmp_path}]")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give the run's folder"):
        report(f"runs=[{tmp_path / 'file'}]")
    metrics_run(tmp_path)
    with pytest.raises(ValueError, match="is no look; there are"):
        report(f"runs=[{tmp_path}]", "looks=[nonsense]")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["looks=[]", "sample=500"], "sample has no effect with looks="),
        (["looks=[]", "threads=1"], "threads has no effect with looks="),
        (["looks=[]", "data.root=/photos"], "data.root has no effect with looks="),
        (["looks=[views]", "sample=500"], "sample has no effect on looks="),
        (["sample=-1"], "sample must be 1 image or more, got -1"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(words: list[str], said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        report(f"runs=[{metrics_run(tmp_path)}]", *words)


@pytest.mark.parametrize("count", [1, 2])
def test_where_the_page_goes_is_looked_at_before_anything_is_made(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = [tmp_path / name for name in "ab"[:count]]
    for path in paths:
        path.mkdir()
        metrics_run(path)
    monkeypatch.setattr(command, "_page_of", lambda *_: pytest.fail("made"))
    monkeypatch.setattr(command.comparison, "write", lambda *_: pytest.fail("made"))
    runs = f"runs=[{','.join(map(str, paths))}]"
    with pytest.raises(ValueError, match="is a folder; give a file, such as"):
        report(runs, f"out={tmp_path}")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written: .*; give another out="):
        report(runs, f"out={tmp_path / 'file' / 'page.html'}")


def test_what_keeps_a_picture_from_being_made_is_said_in_its_place(finished: tuple[str, Path], tmp_path: Path):
    made = report(f"runs=[{finished[1]}]", f"out={tmp_path / 'page.html'}", "sample=3", "threads=1")
    part = made.read_text().split('<h3 id="picture-map">')[1].split("<h3")[0]
    assert "Left out: " in part
    assert "It was not asked for" not in part


def test_a_folder_that_has_only_checkpoints_is_a_run(finished: tuple[str, Path], tmp_path: Path):
    (tmp_path / "checkpoints").symlink_to(finished[1] / "checkpoints")
    assert "<b>6</b>step" in report(f"runs=[{tmp_path}]", "looks=[]").read_text()


def test_a_page_is_made_again_where_there_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    protocol = {"command": "eval.finetune", "checkpoint": {"step": 600}, "weights": {"step": 8}}
    metrics_run(tmp_path)
    for folder in (tmp_path / "eval", tmp_path / "finetune" / "a" / "eval"):
        folder.mkdir(parents=True)
    write_results(tmp_path / "eval" / "knn.json", metrics={"top1": 0.1234}, protocol={"command": "eval.knn"})
    assert not (tmp_path / "report.html").exists()
    report(f"runs=[{tmp_path}]")
    write_results(tmp_path / "finetune" / "a" / "eval" / "finetune.json", metrics={"top1": 0.4321}, protocol=protocol)
    text = (tmp_path / "report.html").read_text()
    assert "43.21%" in text
    (row,) = [row for row in text.split("<tr>") if "finetune/a/eval/finetune.json</td>" in row and "43.21%" in row]
    assert '<td class="number">8</td>' in row  # of the model that was fine-tuned, not of the one before
    assert "when a result was added" in text
    with RunLock(tmp_path):
        write_results(tmp_path / "eval" / "knn.json", metrics={"top1": 0.9876}, protocol={"command": "eval.knn"})
        assert (tmp_path / "report.html").read_text() == text  # the run makes it
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    write_results(tmp_path / "eval" / "knn.json", metrics={"top1": 0.1}, protocol={"command": "eval.knn"})
    assert "could not be made again" in caplog.text


def test_a_page_that_is_made_again_keeps_the_pictures_that_were_made_for_it(finished: tuple[str, Path], tmp_path: Path):
    shutil.copytree(finished[1], tmp_path / "run")
    page = report(f"runs=[{tmp_path / 'run'}]", "looks=[neighbours]", "sample=24", "threads=1")
    before = page.read_text()
    result = tmp_path / "run" / "eval" / "knn.json"
    result.parent.mkdir()
    write_results(result, metrics={"top1": 0.4321}, protocol={"command": "eval.knn"})
    after = page.read_text()
    pictures = [text.split('<section id="pictures"')[1].split("</section>")[0] for text in (before, after)]
    assert "Step 6, the last checkpoint" in pictures[0]
    assert pictures[0] == pictures[1]
    assert "43.21%" in after
    assert "43.21%" not in before


def test_a_run_without_metrics_or_checkpoint_has_a_page_that_says_so(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    text = report(f"runs=[{tmp_path}]").read_text()
    assert "No step has been logged yet" in text
    assert "the run has written no checkpoint yet" in text
