from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl.tracking import Progress, Tracker

ROOT = Path(__file__).resolve().parents[1]
PICTURE = np.zeros((4, 6, 3), dtype=np.uint8)


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def disabled(run_dir: Path, **options) -> Tracker:
    return Tracker(run_dir, wandb_mode="disabled", total_steps=100, **options)


def test_each_logged_step_is_a_json_line_at_once(tmp_path):
    tracker = disabled(tmp_path)
    tracker.log(10, {"loss": torch.tensor(0.5), "lr": np.float32(0.25), "epoch": 1, "bad_images": 0})
    assert lines(tmp_path) == [{"step": 10, "loss": 0.5, "lr": 0.25, "epoch": 1, "bad_images": 0}]
    tracker.close()
    tracker.close()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    tracker = disabled(tmp_path)
    tracker.log(1, {"loss": float("nan"), "grad_norm": float("inf")})
    tracker.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_resume_drops_later_and_torn_lines_and_goes_on(tmp_path):
    tracker = disabled(tmp_path)
    for step in (10, 20, 30):
        tracker.log(step, {"loss": step / 10})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    tracker = disabled(tmp_path, resume_step=20)
    assert [row["step"] for row in lines(tmp_path)] == [10, 20]
    tracker.log(30, {"loss": 7.0})
    tracker.close()
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(10, 1.0), (20, 2.0), (30, 7.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_whole_line_torn_off_before_its_newline_is_kept_apart_from_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}')
    tracker = disabled(tmp_path, resume_step=20)
    tracker.log(30, {})
    tracker.close()
    assert [row["step"] for row in lines(tmp_path)] == [10, 20, 30]


def test_other_ranks_write_nothing(tmp_path, capsys):
    tracker = Tracker(tmp_path / "run", total_steps=10, is_main=False)
    tracker.log(1, {"loss": 1.0})
    tracker.images(1, "views", PICTURE)
    tracker.say("hello")
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_pictures_are_png_files_of_the_run(tmp_path):
    tracker = disabled(tmp_path)
    tracker.images(12, "views", PICTURE)
    tracker.close()
    with Image.open(tmp_path / "pictures" / "views_00000012.png") as saved:
        assert saved.size == (6, 4)


def test_plain_lines_tell_loss_speed_waiting_and_time_left(tmp_path, capsys):
    tracker = disabled(tmp_path)
    metrics = {"loss": 0.5, "lr": 1e-3, "images_per_second": 1234.5, "data_wait": 0.031, "epoch": 0.5}
    tracker.log(1, metrics)
    tracker.log(50, metrics)
    tracker.say("done")
    tracker.close()
    first, second, estimate, last = capsys.readouterr().out.splitlines()
    assert first == "step 1/100  epoch 0.50  loss 0.5000  lr 1.00e-03  1,234 images/s  3% waiting for data"
    assert second.startswith("step 50/100 ")
    assert second.endswith(" left")
    assert estimate.startswith("about ")
    assert estimate.endswith(" for the 50 steps to come")
    assert last == "done"


def test_time_left_is_the_pace_of_the_last_steps_times_what_remains():
    progress = Progress(100, start_step=10)
    progress._times.extend([(5.0, 20), (9.0, 40)])
    assert progress.seconds_left(40) == pytest.approx(0.2 * 60)


def test_a_terminal_gets_a_bar(tmp_path):
    script = f"""
from ssl.tracking import Tracker
tracker = Tracker({str(tmp_path)!r}, wandb_mode="disabled", total_steps=40, resume_step=10)
tracker.log(20, {{"loss": 0.5, "images_per_second": 7, "data_wait": 0.5}})
tracker.say("a sentence")
tracker.close()
"""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", script]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    subprocess.run(command, stdout=follower, stderr=follower, cwd=ROOT, env=environment, check=True)
    os.close(follower)
    shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert "20/40" in shown
    assert "loss 0.5000, 7 images/s, 50% waiting for data" in shown
    assert "a sentence" in shown


def test_lines_wait_in_memory_while_the_disk_is_full_and_are_written_in_order_when_there_is_room(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    tracker = disabled(tmp_path)
    tracker.log(1, {"loss": 1.0})
    os.rename(path, tmp_path / "kept")
    path.symlink_to("/dev/full")
    for step in (2, 3):
        tracker.log(step, {"loss": 1.0})
    path.unlink()
    os.rename(tmp_path / "kept", path)
    assert [row["step"] for row in lines(tmp_path)] == [1]
    tracker.log(4, {"loss": 1.0})
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]
    tracker.close()
    assert ["No space left" in message for message in caplog.messages] == [True, False]
    assert caplog.messages[1].endswith("is written again, and complete")


def test_lines_that_wait_for_room_are_written_by_a_flush_without_another_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = disabled(tmp_path)
    path.symlink_to("/dev/full")
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
    path.unlink()
    tracker.flush()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    tracker.close()
    Tracker(tmp_path, total_steps=2, is_main=False).flush()


def test_a_line_that_was_written_in_part_goes_on_where_it_broke_off(tmp_path):
    tracker = disabled(tmp_path)
    tracker.log(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 9, limits[1]))
    try:
        for step in (2, 3):
            tracker.log(step, {"loss": 0.5})
        assert (tmp_path / "metrics.jsonl").read_text().endswith('\n{"step": ')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]


def test_lines_that_were_never_written_are_told_at_the_end(tmp_path, caplog):
    tracker = disabled(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker.log(1, {"loss": 1.0})
    tracker.log(7, {"loss": 0.25})
    tracker.close()
    assert "2 lines up to step 7 were never written" in caplog.messages[-1]
    assert '{"step": 7, "loss": 0.25}' in caplog.messages[-1]


def test_dropping_later_lines_needs_no_room_on_the_disk(tmp_path):
    disabled(tmp_path).log(1, {})
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        disabled(tmp_path, resume_step=9).close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in lines(tmp_path)] == list(range(10))


def test_pictures_that_cannot_be_written_cost_one_warning(tmp_path, caplog):
    tracker = disabled(tmp_path)
    (tmp_path / "pictures").write_text("a file where the folder should be")
    for step in (1, 2, 3):
        tracker.images(step, "views", PICTURE)
    tracker.close()
    assert len(caplog.messages) == 1
    assert "views_00000001.png cannot be written" in caplog.text


def test_a_run_goes_on_whose_output_goes_to_a_full_disk(tmp_path, monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        tracker = disabled(tmp_path)
        for step in (1, 50):
            tracker.log(step, {"loss": 1.0})
        tracker.say("hello")
        tracker.close()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what is left in it can be written now
    assert [row["step"] for row in lines(tmp_path)] == [1, 50]
