from __future__ import annotations

import json
import logging
import os
import pty
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


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """No key, no mode and no network settings of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "wandb"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


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


def test_without_a_key_wandb_is_offline_in_the_run_folder_and_keeps_its_id(tmp_path):
    for start in (0, 10):
        tracker = Tracker(tmp_path, config={"seed": 0}, wandb_name="a", total_steps=20, resume_step=start)
        assert tracker._wandb.mode == "offline"
        assert os.environ["WANDB_DATA_DIR"].startswith(str(tmp_path))
        tracker.log(start + 10, {"loss": 0.5})
        tracker.images(start + 10, "views", PICTURE)
        assert tracker._wandb.run is not None
        assert tracker._wandb.run.id == (tmp_path / "wandb_id").read_text().strip()
        tracker.close()
    import wandb

    wandb.teardown()  # as at the end of a process: until then the service may still hold rows in memory
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1
    assert all(b"loss" in path.read_bytes() for path in files)
    assert [row["step"] for row in lines(tmp_path)] == [10, 20]
    assert "WANDB_DATA_DIR" not in os.environ
    assert not list((tmp_path / "home").rglob("artifacts"))


def test_wandb_mode_of_the_environment_is_followed_and_the_setting_beats_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(tmp_path / "a", total_steps=1)
    tracker.close()
    assert not (tmp_path / "a" / "wandb").exists()
    tracker = Tracker(tmp_path / "b", wandb_mode="offline", total_steps=1)
    tracker.close()
    assert (tmp_path / "b" / "wandb").exists()


def test_online_without_a_key_goes_offline_with_a_warning_and_no_prompt(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(tmp_path, wandb_mode="online", total_steps=1)
    assert tracker._wandb.mode == "offline"
    assert "no API key" in caplog.text
    tracker.close()


def test_a_key_without_a_network_goes_offline_with_one_warning(tmp_path):
    script = f"""
from ssl import tracking
tracking.INIT_SECONDS = 1
tracker = tracking.Tracker({str(tmp_path)!r}, total_steps=1)
tracker.log(1, {{"loss": 1.0}})
print(tracker._wandb.mode, tracker._wandb.run is not None)
tracker.close()
"""
    environment = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "offline True"
    assert [line for line in done.stderr.splitlines() if "wandb" in line] == done.stderr.splitlines()
    assert done.stderr.count("going on offline") == 1
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_failing_wandb_is_left_with_one_warning_and_the_run_goes_on(tmp_path, caplog):
    tracker = Tracker(tmp_path, wandb_mode="offline", total_steps=3)
    tracker._wandb.run.finish()  # as when its service has died: later calls raise
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 1.0})
        tracker.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    assert sum("goes on without it" in message for message in caplog.messages) == 1
