"""`python -m eval.suite`: which evaluations run, what the table says, and what happens when one fails."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from eval import knn, linear_probe, suite
from eval.config import register
from eval.protocols import protocol_id
from ssl.config import CONF
from tests.run_folder import write_images, write_run

QUICK = ["device=cpu", "precision=fp32", "threads=1"]
PROBE = ["linear_probe.lr=[0.1]", "linear_probe.weight_decay=[0.0,0.01]", "linear_probe.steps=20"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Baselines and tables of several folders are written below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_run(home / "a", num_train=120)
    write_run(home / "b", seed=1, num_train=120)
    write_images(home / "photos", "cats", "dogs", each=10)
    return home


@pytest.fixture
def home(runs, tmp_path) -> Path:
    """Two runs, a and b, and photos of cats and dogs."""
    shutil.copytree(runs, tmp_path / "home")
    return tmp_path / "home"


def config_of(name: str, schema: type, *words: str):
    register(schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(name, overrides=[*words, *QUICK])


def call(*words: str) -> list[suite.Cell]:
    """What the command does with these words, in this process."""
    return suite.run(config_of("suite", suite.SuiteConfig, *suite.spell_out(words)))


def command(monkeypatch, capsys, *words: str, code: int = 0) -> tuple[str, str]:
    """What the command prints on both streams, ending with `code`."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["eval.suite.py", *words, *QUICK])
    if code:
        with pytest.raises(SystemExit) as end:
            suite.main()
        assert end.value.code == code
    else:
        suite.main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.out, said.err


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- what is run ---------------------------------------------------------------------------------------------------


def test_each_row_is_what_the_evaluations_own_command_gives(home):
    cells = call(f"ckpt={home}/a", "suite=[knn,linear_probe]", "knn.k=[3,5]", *PROBE)
    own_knn = knn.run(config_of("knn", knn.KnnConfig, f"ckpt={home}/a", "k=[3,5]", "name=alone"))
    words = [word.removeprefix("linear_probe.") for word in PROBE]
    own_probe = linear_probe.run(
        config_of("linear_probe", linear_probe.LinearProbeConfig, f"ckpt={home}/a", *words, "name=alone_probe")
    )
    for cell, own in zip(cells, (own_knn, own_probe), strict=True):
        assert cell.result["metrics"] == own["metrics"]
        assert protocol_id(cell.result["protocol"]) == protocol_id(own["protocol"])


def test_checkpoints_times_sets_times_evaluations(home):
    photos = f"{{name:folder,root:{home}/photos}}"
    cells = call(f"ckpt=[{home}/a,{home}/b]", "suite=[knn]", f"data=[checkpoint,{photos}]", "knn.k=[1]")
    assert [(cell.ckpt, cell.data) for cell in cells] == [
        (f"{home}/{run}", data) for run in ("a", "b") for data in ("checkpoint", "folder")
    ]
    assert all(cell.error is None for cell in cells)
    for run in ("a", "b"):
        names = sorted(path.name for path in (home / run / "eval").glob("*.json"))
        assert names == ["knn.json", "knn_folder.json"]
    protocols = [protocol_id(cell.result["protocol"]) for cell in cells]
    assert protocols[0] == protocols[2]
    assert protocols[1] == protocols[3]
    assert protocols[0] != protocols[1]


def test_features_that_two_evaluations_share_are_read_once(home, monkeypatch):
    import eval.subject

    read = []
    extract_all = eval.subject.extract_all

    def counted(*given, **settings):
        read.append(settings["title"])
        return extract_all(*given, **settings)

    monkeypatch.setattr(eval.subject, "extract_all", counted)
    call(f"ckpt=[{home}/a,{home}/b]", "suite=[knn,linear_probe]", *PROBE)
    assert sorted(read) == ["test", "test", "train", "train"]  # once for each checkpoint


def test_sets_of_one_name_have_results_of_their_own(home):
    write_images(home / "others", "cats", "dogs", each=8)
    sets = ",".join(f"{{name:folder,root:{home}/{name}}}" for name in ("photos", "others"))
    cells = call(f"ckpt={home}/a", "suite=[knn]", f"data=[{sets}]", "knn.k=[1]")
    assert [Path(cell.result["path"]).name for cell in cells] == ["knn_folder.json", "knn_folder_2.json"]
    assert [cell.result["protocol"]["data"]["num_train"] for cell in cells] == [16, 12]


def test_an_untrained_backbone_stands_beside_the_trained_one(home, tmp_path):
    words = ["model=resnet10", "model.args.channels=[8,8,16,16]", f"data=[{{name:folder,root:{home}/photos,limit:8}}]"]
    cells = call(f"ckpt=[{home}/a,random,pixels]", "suite=[knn]", "knn.k=[5]", *words, f"out={tmp_path}/all")
    assert [cell.error for cell in cells] == [None] * 3
    assert cells[1].result["protocol"]["backbone"]["architecture"].startswith("resnet")
    assert {cell.result["protocol"]["data"]["num_train"] for cell in cells} == {8}
    assert len(rows_of(tmp_path / "all" / "suite.csv")) == 3
    assert len({cell.result["path"] for cell in cells}) == 3
    assert all(Path(cell.result["path"]).is_relative_to(tmp_path / "all") for cell in cells)


def test_an_evaluation_may_run_in_several_settings(home):
    entries = "knn,{name:knn,k:[7]},{name:knn,metric:euclidean,k:[7]}"
    cells = call(f"ckpt={home}/a", f"suite=[{entries}]", "knn.k=[3]")
    assert [cell.title for cell in cells] == ["knn", "knn_2", "knn_euclidean"]
    protocols = [cell.result["protocol"] for cell in cells]
    assert [each["k"] for each in protocols] == [[3], [7], [7]]
    assert [each["metric"] for each in protocols] == ["cosine", "cosine", "euclidean"]
    names = sorted(path.name for path in (home / "a" / "eval").glob("*.json"))
    assert names == ["knn.json", "knn_2.json", "knn_euclidean.json"]


def test_a_published_protocol_and_a_recipe_are_options_of_their_groups(home):
    words = ["suite=[{name:linear_probe,protocol:mae},{name:finetune,recipe:simclr}]", "device=cpu", "seed=3"]
    probe, tuned = suite.make_cells(config_of("suite", suite.SuiteConfig, *suite.spell_out([f"ckpt={home}/a", *words])))
    assert (probe.config.protocol, probe.config.optim.name) == ("mae", "lars")
    assert (tuned.config.optim.name, tuned.config.trainer.device.name, tuned.config.seed) == ("sgd", "cpu", 3)
    assert tuned.config.out == "runs/suites/" + "_".join(home.parts[-2:]) + "_a/finetune_simclr_checkpoint/seed3"


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_table_is_printed_and_written_as_csv_and_markdown(home, monkeypatch, capsys):
    words = [f"ckpt={home}/a", "suite=[knn,linear_probe]", "knn.k=[5]", *PROBE]
    out, _ = command(monkeypatch, capsys, *words)
    rows = rows_of(home / "a" / "eval" / "suite.csv")
    assert [row["evaluation"] for row in rows] == ["knn", "linear_probe"]
    for row in rows:
        result = json.loads((home / "a" / "eval" / f"{row['evaluation']}.json").read_text())
        assert float(row["top1"]) == result["metrics"]["top1"]
        assert row["protocol"] == protocol_id(result["protocol"])
        assert f"{result['metrics']['top1']:.1%}" in out
    markdown = (home / "a" / "eval" / "suite.md").read_text().splitlines()
    assert markdown[0].startswith("| checkpoint | data | evaluation | protocol | top1 | top5 |")
    assert len(markdown) == 4
    last = out.splitlines()[-1]
    assert last == f"next: python -m eval.compare {home}/a/eval/knn.json {home}/a/eval/linear_probe.json"


def test_tables_of_several_runs_get_a_folder_of_their_own(home, tmp_path):
    call(f"ckpt=[{home}/a,{home}/b]", "suite=[knn]")
    (table,) = (tmp_path / "runs" / "suites").glob("*/suite.csv")
    assert [row["checkpoint"] for row in rows_of(table)] == [f"{home}/a", f"{home}/b"]


# ---- what fails ----------------------------------------------------------------------------------------------------


def test_a_failed_cell_is_reported_and_the_others_go_on(home, monkeypatch, capsys):
    words = [f"ckpt=[{home}/gone,{home}/a]", "suite=[knn]", "knn.k=[5]", f"out={home}/all"]
    out, err = command(monkeypatch, capsys, *words, code=1)
    rows = rows_of(home / "all" / "suite.csv")
    assert [row["top1"] == "" for row in rows] == [True, False]
    assert "gone does not exist" in rows[0]["failed"]
    assert f"failed: knn of {home}/gone on checkpoint: ckpt={home}/gone does not exist" in err
    assert "1 of 2 evaluations failed" in err
    assert "gone does not exist" in out  # in the table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["suite=[knn,knnn]"], "must name one or more of knn, linear_probe, finetune, health"),
        (["suite=[]"], "must name one or more"),
        (["suite=[knn]", "knn.kk=[3]"], "knn does not take all of this: kk is not a setting: did you mean k?"),
        (["suite=[knn]", "knn.k=[many]"], "eval.knn cannot be set so"),
        (["suite=[knn]", "linear_probe.steps=3"], "linear_probe.steps has no effect"),
        (["suite=[knn]", "knn.ckpt=x"], "knn.ckpt has no effect"),
        (["suite=[knn]", "data=[cifar11]"], "eval.knn cannot be set so"),
        (["suite=[knn]", "data=[cifar10]"], "this must be given: data.root="),
        (["suite=[knn]", "data=[{root:x}]"], "needs its name"),
        (["suite=[knn,knn]"], "names something twice"),
        (["suite=[{k:[3]}]"], "an entry of suite= needs its name"),
        (["suite=[knn]", "sede=1"], "did you mean seed?"),
    ],
)
def test_settings_that_fit_no_evaluation_stop_before_the_first(words, message, home, monkeypatch, capsys):
    assert message in command(monkeypatch, capsys, f"ckpt={home}/a", *words, code=1)[1]
    assert not (home / "a" / "eval").exists()


def test_without_ckpt_the_ways_to_give_one_are_shown(monkeypatch, capsys):
    assert "eval.suite needs ckpt=" in command(monkeypatch, capsys, code=2)[1]
