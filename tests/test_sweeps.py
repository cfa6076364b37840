"""Sweeps (`-m`): the outcome of each run, the table, the objective, and what ends a sweep."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from sklearn.neighbors import KNeighborsClassifier

import ssl.pretrain as pretrain
import ssl.sweep_devices as sweep_devices
import ssl.sweeps as sweeps
from eval import knn, objective
from eval.command import start as start_evaluation
from ssl.checkpoint import steps_saved
from ssl.command import run_command
from ssl.config import CONF, register_schemas
from ssl.data.subset import split_held_out
from ssl.objective import check_objective
from ssl.sweep import Sweep
from ssl.sweep_table import report
from tests import forks
from tests.run_folder import write_images, write_run

TINY = [
    "method=mae",
    "model=vit_micro",
    "model.args={embed_dim:32,depth:2,num_heads:2}",
    "method.decoder_dim=32",
    "method.decoder_depth=1",
    "method.decoder_heads=2",
    "data.source.num_train=120",
    "data.source.num_test=36",
    "trainer.global_batch_size=16",
    "trainer.epochs=1",
    "trainer.device=cpu",
    "trainer.pictures=false",
    "trainer.log_every_steps=1",
    "wandb.mode=disabled",
    "loader.threads=1",
    "online=none",
    "launch=none",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sweep(monkeypatch, *words: str, folder: str = "swept") -> int:
    """The exit code of `python -m ssl.pretrain -m <words>`, in this process."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["ssl.pretrain.py", "-m", f"hydra.sweep.dir={folder}", *TINY, *words])
    try:
        pretrain.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def rows(folder: str | Path = "swept") -> list[dict[str, str]]:
    with (Path(folder) / "results.csv").open() as file:
        return list(csv.DictReader(file))


def outcomes(folder: str | Path = "swept") -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in Path(folder).glob("*/outcome.json")]
    return sorted(found, key=lambda each: each["run"])


def composed(*words: str) -> Any:
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("pretrain", overrides=[*TINY, *words])


# ---- the table -----------------------------------------------------------------------------------------------------


def test_a_sweep_ends_with_a_row_for_each_run_also_for_those_that_failed(monkeypatch, capsys):
    code = sweep(monkeypatch, "trainer.steps=2", "trainer.global_batch_size=999,8,16")
    assert code == 1
    table = rows()
    assert [row["trainer.global_batch_size"] for row in table] == ["999", "8", "16"]
    assert [row["state"] for row in table] == ["failed", "done", "done"]
    assert "set trainer.global_batch_size between 1 and 120" in table[0]["message"]
    for row in table[1:]:
        last = json.loads((Path(row["out"]) / "metrics.jsonl").read_text().splitlines()[-1])
        assert float(row["loss"]) == last["loss"]
        assert float(row["seconds"]) > 0
    said = capsys.readouterr()
    header = next(line for line in said.out.splitlines() if line.startswith("run  "))
    assert header.split()[:3] == ["run", "trainer.global_batch_size", "loss"]  # what differs, and what came of it
    assert "1 of the sweep's runs failed:\n  run 0, trainer.global_batch_size=999\n" in said.err


def test_the_runs_of_a_sweep_share_a_group_of_wandb_unless_one_is_given(monkeypatch):
    assert sweep(monkeypatch, "trainer.steps=1", "seed=0,1", folder="lrs") == 0
    assert sweep(monkeypatch, "trainer.steps=1", "seed=2,3", "wandb.group=mine", folder="others") == 0
    groups = [OmegaConf.load(f"{row['out']}/config.yaml").wandb.group for row in rows("lrs") + rows("others")]
    assert groups == ["lrs", "lrs", "mine", "mine"]


def test_a_run_that_was_killed_is_a_row_and_fails_the_sweep(tmp_path, capsys):
    a_sweep = Sweep(tmp_path, id="a", host="here", pid=1, on_cluster=False, direction=None, swept=("seed",))
    other = Sweep(tmp_path, id="b", host="here", pid=1, on_cluster=False, direction=None, swept=("seed",))
    for number, (owner, state) in enumerate([(a_sweep, "done"), (a_sweep, "running"), (other, "failed")]):
        write_outcome(owner, number, state)
    assert report(a_sweep) == 1
    assert [(row["run"], row["state"]) for row in rows(tmp_path)] == [("0", "done"), ("1", "lost")]
    assert "run 1, seed=1" in capsys.readouterr().err


def test_runs_in_a_queue_go_on_without_the_sweep_and_are_not_failures(tmp_path, capsys):
    submitted = Sweep(tmp_path, id="a", host="here", pid=1, on_cluster=True, direction=None, swept=("seed",))
    write_outcome(submitted, 0, "running", job="17_0")
    assert report(submitted) == 0
    submitted.end(130)
    assert report(submitted) == 130
    assert "scancel 17 ends them" in capsys.readouterr().err


def write_outcome(owner: Sweep, run: int, state: str, **more: Any) -> None:
    about = {"sweep": owner.id, "run": run, "overrides": [f"seed={run}"], "out": None, "objective": None, "metrics": {}}
    about |= {"job": str(run), "host": owner.host, "pid": 1, "state": state, "message": None, "seconds": 1.0, **more}
    folder = owner.folder / str(run)
    folder.mkdir()
    (folder / "outcome.json").write_text(json.dumps(about))


def test_a_sweep_of_evaluations_has_a_table_too(monkeypatch, tmp_path):
    run_dir = write_run(tmp_path / "run")
    words = [f"ckpt={run_dir}", "k=[5],[20]", "device=cpu", "threads=1", "hydra.sweep.dir=swept"]
    monkeypatch.setattr(sys, "argv", ["eval.knn.py", "-m", *words])
    GlobalHydra.instance().clear()
    start_evaluation(knn.run, knn.KnnConfig, command="eval.knn")
    for row, written in zip(rows(), ("knn_k-5.json", "knn_k-20.json")):
        assert row["out"].endswith(written)
        assert float(row["top1"]) == json.loads(Path(row["out"]).read_text())["metrics"]["top1"]


# ---- the objective -------------------------------------------------------------------------------------------------


def test_optuna_goes_on_after_failed_trials_and_names_the_best(monkeypatch, capsys):
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.direction=minimize", "objective=loss"]
    code = sweep(monkeypatch, *words, "trainer.steps=1", "data.limit=choice(10,48)")
    assert code == 1  # 10 images make no batch of 16
    table = rows()
    assert len(table) == 4
    assert {row["state"] for row in table} == {"failed", "done"}
    done = [row for row in table if row["state"] == "done"]
    assert [row["objective_value"] for row in done] == [row["loss"] for row in done]
    best = OmegaConf.load("swept/optimization_results.yaml")
    assert best.best_value == min(float(row["objective_value"]) for row in done)
    said = capsys.readouterr().out
    assert f"objective {best.best_value:.6g}: data.limit={best.best_params['data.limit']}" in said


def test_the_same_optuna_sweep_again_asks_for_the_same_trials_and_trains_none_twice(monkeypatch):
    words = ["hydra/sweeper=optuna", "objective=loss", "hydra.sweeper.direction=minimize", "trainer.steps=1"]
    words.append("optim.base_lr=tag(log,interval(1e-4,1e-2))")
    assert sweep(monkeypatch, *words, "hydra.sweeper.n_trials=2", folder="first") == 0
    made = {row["out"]: steps_saved(Path(row["out"]))[-1][1].stat().st_mtime_ns for row in rows("first")}
    assert sweep(monkeypatch, *words, "hydra.sweeper.n_trials=3", folder="again") == 0
    first, again = rows("first"), rows("again")
    assert [row["optim.base_lr"] for row in again[:2]] == [row["optim.base_lr"] for row in first]
    assert [row["objective_value"] for row in again[:2]] == [row["objective_value"] for row in first]
    assert {out: steps_saved(Path(out))[-1][1].stat().st_mtime_ns for out in made} == made
    assert again[2]["out"] not in made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "must be told what: objective="),
        (["objective=loss"], "give hydra.sweeper.direction=minimize"),
        (["objective=eval.knn", "hydra.sweeper.direction=minimize"], "give hydra.sweeper.direction=maximize"),
    ],
)
def test_a_sweep_that_would_optimize_nothing_or_the_wrong_way_does_not_begin(monkeypatch, capsys, words, message):
    assert sweep(monkeypatch, "hydra/sweeper=optuna", "optim.base_lr=interval(1e-4,1e-2)", *words) == 1
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("metrics.jsonl"))


def test_an_objective_that_reads_the_test_split_or_labels_that_there_are_not_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"measured on the test split.*objective=eval\.knn"):
        check_objective(composed("online=knn", "objective=knn_top1"))
    with pytest.raises(ValueError, match=r"eval\.finetune is not known"):
        check_objective(composed("objective=eval.finetune"))
    with pytest.raises(ValueError, match="give online=health"):
        check_objective(composed("objective=rankme"))
    root = write_images(tmp_path / "photos", "all")
    with pytest.raises(ValueError, match=r"objective=eval\.knn needs labels"):
        check_objective(composed_on_folder(root, "objective=eval.knn"))
    check_objective(composed_on_folder(root, "objective=eval.health"))


def composed_on_folder(root: Path, *words: str) -> Any:
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("pretrain", overrides=["data=folder", f"data.root={root}", *words])


def test_a_metric_that_the_run_does_not_have_is_told_with_those_that_it_has(monkeypatch):
    assert sweep(monkeypatch, "trainer.steps=1", "seed=0,1", "objective=accuracy") == 1
    assert all("this run has bad_images, " in row["message"] for row in rows())
    assert sweep(monkeypatch, "trainer.steps=1", "seed=0,1", "objective=loss", folder="again") == 0
    assert [row["out"] for row in rows("again")] == [row["out"] for row in rows()]  # the runs themselves were whole


def test_a_search_ends_after_the_first_trial_that_lacks_its_objective(monkeypatch, capsys):
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "optim.base_lr=interval(1e-4,1e-2)"]
    assert sweep(monkeypatch, *words, "objective=los", "trainer.steps=1") == 1
    (row,) = rows()
    said = capsys.readouterr().err
    assert "objective=los, but this run has bad_images, " in row["message"]
    assert row["message"] in said.partition("of the sweep's runs failed:")[2]  # in full
    assert "No trials are completed" not in said  # the words of Optuna's traceback


def test_an_objective_that_no_evaluation_has_is_refused_before_the_first_trial(monkeypatch, capsys):
    words = ["hydra/sweeper=optuna", "optim.base_lr=interval(1e-4,1e-2)", "objective=eval.knm"]
    assert sweep(monkeypatch, *words) == 1
    assert "objective=eval.knm is not known; of the evaluations there are eval.knn, " in capsys.readouterr().err
    assert not Path("swept").exists()


def test_a_search_of_which_all_trials_fail_ends_in_words(monkeypatch, capsys):
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=minimize", "objective=loss"]
    assert sweep(monkeypatch, *words, "data.limit=choice(10,12)") == 1
    assert [row["state"] for row in rows()] == ["failed", "failed"]
    said = capsys.readouterr().err
    assert "error: no trial came to an end with a value of its objective\n" in said
    assert "No trials are completed" not in said  # the words of Optuna's traceback


def test_the_knn_objective_is_scikit_learns_on_images_held_out_of_train(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path / "run")
    config = composed()
    found = objective.judge("eval.knn", config, out=run_dir)
    features = {}
    read = objective.read_features
    monkeypatch.setattr(
        objective, "read_features", lambda *args, **kwargs: features.setdefault("of", read(*args, **kwargs))
    )
    objective.judge("eval.knn", config, out=run_dir)
    train = features["of"].train
    assert "test" not in features["of"].kept  # the test split is not read
    bank, queries = split_held_out(train.labels.numpy(), 0.1, 0)
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    theirs.fit(train.features[bank].double(), train.labels[bank])
    assert found == pytest.approx(theirs.score(train.features[queries].double(), train.labels[queries]))
    written = json.loads((run_dir / "eval" / "objective_knn.json").read_text())
    assert written["metrics"] == {"held_out_top1": found}
    assert written["protocol"]["test"] == "not read"


@pytest.mark.parametrize(("name", "num_train"), [("eval.linear_probe", 60), ("eval.knn", 120), ("eval.health", 120)])
def test_an_evaluation_as_objective_does_not_depend_on_the_test_split(tmp_path, name, num_train):
    found = [
        objective.judge(
            name, composed(), out=write_run(tmp_path / str(num_test), num_train=num_train, num_test=num_test)
        )
        for num_test in (36, 12)
    ]
    assert found[0] == found[1] > 0


# ---- signals -------------------------------------------------------------------------------------------------------


def test_sigterm_where_no_run_is_training_ends_the_sweep_with_its_table(monkeypatch, tmp_path):
    run_dir, judged = write_run(tmp_path / "run"), []

    def run(config):
        judged.append(config.seed)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # ended by the signal
        raise AssertionError("SIGTERM was not heard")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["eval.knn.py", "-m", f"ckpt={run_dir}", "seed=0,1", "hydra.sweep.dir=swept"])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as end:
        start_evaluation(run, knn.KnnConfig, command="eval.knn")
    assert (end.value.code, judged) == (143, [0])
    assert [row["state"] for row in rows()] == ["stopped"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_whose_time_is_up_makes_room_for_the_next(monkeypatch):
    words = ["trainer.epochs=20000", "trainer.max_time=1s", "seed=0,1"]
    assert sweep(monkeypatch, *words) == 1
    assert [row["state"] for row in rows()] == ["out of time", "out of time"]
    assert all("trainer.max_time" in row["message"] for row in rows())


def long(*words: str) -> list[str]:
    """The words of a sweep of long runs."""
    return ["ssl.pretrain", "-m", "hydra.sweep.dir=swept", *TINY, "trainer.epochs=20000", *words]


@pytest.fixture
def beside(tmp_path):
    """Starts a sweep of long runs with joblib: in an interpreter of its own, which ends joblib's processes with it."""
    children: list[subprocess.Popen[bytes]] = []

    def start(*words: str, leads_a_session: bool = False) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(forks.ROOT), "OMP_NUM_THREADS": "1"}
        typed = [sys.executable, "-m", *long("hydra/launcher=joblib", *words)]
        with (tmp_path / "said.txt").open("w") as said:
            about: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stdout": said, "stderr": said}
            children.append(subprocess.Popen(typed, **about, start_new_session=leads_a_session))
        return children[-1]

    yield start
    for child in children:
        child.terminate()
        child.wait(60)


def wait_for(condition, *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def num_trained(home: Path) -> int:
    """Runs that have logged a step."""
    return sum(path.stat().st_size > 0 for path in home.rglob("metrics.jsonl"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_and_ends_the_sweep(tmp_path, number):
    child = forks.start(long("seed=0,1,2"), home=tmp_path, said=tmp_path / "said.txt", OMP_NUM_THREADS="1")
    wait_for(lambda: num_trained(tmp_path) == 1)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == 128 + number, (tmp_path / "said.txt").read_text()
    (row,) = rows()  # the next one was not started
    assert row["state"] == "stopped"
    saved = steps_saved(Path(row["out"]))[-1][0]
    assert f"after step {saved}, which is saved" in row["message"]
    assert f"stopped by {number.name}" in (tmp_path / "said.txt").read_text()


def test_sigterm_reaches_the_runs_beside_the_sweep_which_save_before_it_ends(beside, tmp_path):
    words = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=6"]
    words += ["objective=loss", "hydra.sweeper.direction=minimize", "optim.base_lr=interval(1e-4,1e-2)"]
    child = beside(*words)
    wait_for(lambda: num_trained(tmp_path) == 2)
    workers = [each["pid"] for each in outcomes()]
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(90) == 143, (tmp_path / "said.txt").read_text()
    table = rows()
    assert [row["state"] for row in table] == ["stopped", "stopped"]
    assert all(len(steps_saved(Path(row["out"]))) == 1 for row in table)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), seconds=10)


def test_a_ctrl_c_that_reaches_the_whole_group_without_a_terminal_stops_each_run_once(beside, tmp_path):
    child = beside("seed=0,1,2", leads_a_session=True)
    wait_for(lambda: num_trained(tmp_path) == 2)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(90) == 130, (tmp_path / "said.txt").read_text()
    table = rows()
    assert [row["state"] for row in table] == ["stopped", "stopped"]
    for row in table:
        saved = steps_saved(Path(row["out"]))[-1][0]
        assert f"stopped by SIGINT after step {saved}, which is saved" in row["message"]


@pytest.mark.parametrize("obeys", [True, False])
def test_the_sweep_waits_for_runs_that_save_and_a_second_signal_does_not(tmp_path, obeys):
    a_sweep = Sweep(
        tmp_path, id="a", host=socket.gethostname(), pid=os.getpid(), on_cluster=False, direction=None, swept=("seed",)
    )
    heard = tmp_path / "heard"
    leave = f"rm {tmp_path}/0/outcome.json; exit" if obeys else ":"
    (tmp_path / "run.sh").write_text(f"trap 'echo >> {heard}; {leave}' TERM\necho > {tmp_path}/ready\n")
    with (tmp_path / "run.sh").open("a") as file:
        file.write("while :; do sleep 0.02; done\n")
    with subprocess.Popen(["sh", tmp_path / "run.sh"]) as child:
        wait_for((tmp_path / "ready").exists)
        write_outcome(a_sweep, 0, "running", pid=child.pid)
        sweeps.begin(a_sweep)

        def signals() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(heard.exists)  # the first signal was handed on, and did not end this process
            assert a_sweep.end_code == 143
            if not obeys:
                os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: False, seconds=20)

        try:
            with pytest.raises(SystemExit) as end:
                signals()
        finally:
            sweeps.finish()
            child.kill()
    assert end.value.code == 143
    assert heard.read_text() == "\n"


def test_a_run_that_is_killed_beside_others_fails_alone(beside, tmp_path):
    child = beside("launch=auto", "launch.max_restarts=0", "seed=0,1", "trainer.epochs=30")
    wait_for(lambda: num_trained(tmp_path) > 0)
    (out,) = [path.parent for path in tmp_path.rglob("metrics.jsonl") if path.stat().st_size > 0][:1]
    (worker,) = [each["pid"] for each in outcomes() if tmp_path / each["out"] == out]
    (process,) = [
        int(each) for path in Path(f"/proc/{worker}/task").glob("*/children") for each in path.read_text().split()
    ]
    os.kill(process, signal.SIGKILL)
    assert child.wait(120) == 1, (tmp_path / "said.txt").read_text()
    states = {row["out"]: row["state"] for row in rows()}
    assert states.pop(str(out.relative_to(tmp_path))) == "failed"
    assert list(states.values()) == ["done"]


# ---- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "at_once"), [(8, 2), (8, 3), (4, 4), (2, 5), (1, 3)])
def test_processes_beside_each_other_share_all_devices_evenly(num, at_once):
    devices = [f"GPU-{number}" for number in range(num)]
    shares = [sweep_devices.share_of(devices, slot, at_once) for slot in range(at_once)]
    assert sorted({each for share in shares for each in share}) == devices
    times = [sum(device in share for share in shares) for device in devices]
    assert max(times) - min(times) <= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_keeps_its_share_of_the_devices_and_no_other_takes_it(tmp_path, monkeypatch):
    a_sweep = Sweep(tmp_path, id="a", host="here", pid=1, on_cluster=False, direction=None, swept=("seed",))
    shares = []
    for _ in range(2):  # as two processes: each has its own lock
        monkeypatch.setattr(sweep_devices, "_share", None)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
        sweep_devices.take_devices(a_sweep, at_once=2)
        sweep_devices.take_devices(a_sweep, at_once=2)  # its next run
        assert sweep_devices._share is not None
        shares.append((os.environ["CUDA_VISIBLE_DEVICES"], sweep_devices._share))
    assert [each for each, _ in shares] == ["0,2", "1,3"]
    for _, lock in shares:
        lock.close()


def test_a_usage_error_ends_the_sweep_at_once(monkeypatch):
    asked = []

    def task(config):
        asked.append(config)
        raise SystemExit(2)

    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["ssl.pretrain.py", "-m", "seed=0,1", "hydra.sweep.dir=swept"])
    register_schemas()
    with pytest.raises(SystemExit) as end:
        run_command(task, config_name="pretrain")
    assert (end.value.code, len(asked)) == (2, 1)
