"""Checkpoints, exports and configs that a stranger made: nothing of them runs, is followed, or leaves their folder."""

from __future__ import annotations

import ast
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import save_file
from torch import nn

from eval import export, features, finetune, health, knn
from eval.config import register
from eval.head_file import load_head, save_head
from eval.splits import data_settings
from ssl import checkpoint
from ssl.checkpoint_card import read_config, read_state, verify
from ssl.config import CONF, build
from ssl.models.backbones import BackboneSpec, backbone_from_spec
from ssl.models.described import no_larger_than
from ssl.same_run import same_recipe
from ssl.tensor_files import load_tensors, sha256
from ssl.tensor_stream import TensorFile
from tests.run_folder import write_run
from tests.test_pretrain import composed

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    knn: knn.KnnConfig,
    features: features.FeaturesConfig,
    health: health.HealthConfig,
    export: export.ExportConfig,
    finetune: finetune.FinetuneConfig,
}
RAN: list[tuple[Any, ...]] = []


def payload(*args: Any, **kwargs: Any) -> None:
    """What a hostile file would like to see called."""
    RAN.append((args, kwargs))


class Payload:
    """An object whose unpickling calls `payload`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return payload, ("unpickled",)


@pytest.fixture(autouse=True)
def nothing_runs():
    RAN.clear()
    yield
    assert not RAN


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run_dir(made: Path, tmp_path: Path) -> Path:
    """A run folder to be tampered with."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def newest(run_dir: Path) -> Path:
    return checkpoint.steps_saved(run_dir)[-1][1]


def change_card(run_dir: Path, change: Callable[[dict], Any]) -> None:
    path = newest(run_dir) / "state.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def forge(run_dir: Path, name: str, content: str | bytes) -> None:
    """Replace a file and its checksum: a forger can write both."""
    path = newest(run_dir) / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    change_card(run_dir, lambda card: card["sha256"].update({name: sha256(path)}))


def call(module: Any, *words: str) -> Any:
    """What the command does with these words, in this process."""
    register(COMMANDS[module])
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return module.run(compose(module.__name__.removeprefix("eval."), overrides=list(words)))


# ---- names and links ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "..", "sub/file", "", "a\\b", "nul\0"])
def test_a_card_that_names_files_elsewhere_is_refused_before_they_are_read(run_dir: Path, name: str, monkeypatch):
    change_card(run_dir, lambda card: card["sha256"].update({name: "0" * 64}))
    monkeypatch.setattr("ssl.checkpoint_card.sha256", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(ValueError, match="not a file of this folder"):
        checkpoint.load_backbone(run_dir)


@pytest.mark.parametrize("name", ["model.safetensors", "run.yaml", "state.json", "config.json"])
def test_a_link_out_of_a_checkpoint_is_not_followed(run_dir: Path, tmp_path: Path, name: str):
    path = newest(run_dir) / name
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"outside of its folder, and is not followed.*cp -rL"):
        checkpoint.load_backbone(run_dir)


def test_a_link_out_of_an_export_is_not_followed(run_dir: Path, tmp_path: Path):
    out = checkpoint.export(checkpoint.load_backbone(run_dir), tmp_path / "export")
    for name in ("model.safetensors", "config.json"):
        shutil.move(out / name, tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match="is not followed"):
            checkpoint.load_backbone(out)
        (out / name).unlink()
        shutil.move(tmp_path / name, out / name)


def test_a_head_that_leads_out_of_its_folder_or_lacks_tensors_is_refused(tmp_path: Path):
    features = {"layer": "last", "pooling": "model"}
    about = {"classes": ["a", "b"], "checkpoint": "runs/x", "sha256": "0", "features": features, "image_size": (32, 32)}
    folder = save_head(tmp_path / "head", weight=torch.ones(2, 3), bias=torch.ones(2), **about)
    save_file({"weight": torch.ones(2, 3)}, folder / "head.safetensors")
    card = json.loads((folder / "head.json").read_text())
    card["head_sha256"] = sha256(folder / "head.safetensors")
    (folder / "head.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"1 tensors are missing from it \(bias\)"):
        load_head(folder)
    for name in ("head.safetensors", "head.json"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match="is not followed"):
            load_head(folder)
        (folder / name).unlink()
        shutil.move(tmp_path / name, folder / name)


def test_a_pipe_under_the_name_of_a_file_is_not_waited_for(run_dir: Path):
    for name in ("model.safetensors", "state.json"):
        (newest(run_dir) / name).unlink()
        os.mkfifo(newest(run_dir) / name)
        with pytest.raises(ValueError, match="not a file"):
            checkpoint.load_backbone(run_dir)


def test_an_average_that_the_card_does_not_list_is_not_taken(run_dir: Path):
    folder = newest(run_dir)
    before = checkpoint.load_backbone(run_dir).hash
    shutil.copy(folder / "method.safetensors", folder / "ema.safetensors")
    loaded = checkpoint.load_backbone(run_dir)
    assert (loaded.weights, loaded.hash) == ("model", before)


def test_the_name_of_the_data_leads_nowhere_out_of_the_run(run_dir: Path, tmp_path: Path):
    text = (newest(run_dir) / "run.yaml").read_text()
    forge(run_dir, "run.yaml", text.replace("name: embedded", "name: ../../../../escaped"))
    before = set(tmp_path.rglob("*"))
    call(knn, f"ckpt={run_dir}", "device=cpu", "threads=1")
    written = set(tmp_path.rglob("*")) - before
    assert written
    assert all(path.is_relative_to(run_dir / "eval") for path in written)


# ---- code --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tests.test_hostile.payload", "may only name parts of ssl.data"),
        ("os.system", "may only name parts of ssl.data"),
        ("ssl.database.payload", "may only name parts of ssl.data"),
        ("ssl.data.remote.ThreadPoolExecutor", "imported there"),
        ("ssl.data.sources.os.system", "cannot be found"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__)
def test_no_command_calls_what_a_checkpoint_names_outside_of_the_data(
    run_dir: Path, tmp_path: Path, command: Any, target: str, message: str
):
    config = f"data:\n  name: x\n  channels: 3\n  source:\n    _target_: {target}\nseed: 0\n"
    forge(run_dir, "run.yaml", config)
    words = [f"ckpt={run_dir}", f"out={tmp_path / 'out'}"]
    if command is export:  # says so, and compares on other images
        call(command, *words)
        assert (tmp_path / "out" / "model.safetensors").exists()
        return
    with pytest.raises(ValueError, match=message):
        call(command, *words, "device=cpu" if command is not finetune else "trainer.device=cpu")


def test_what_one_trusts_oneself_may_be_anything():
    with pytest.raises(AssertionError):  # that it ran is what the fixture would complain about
        assert build({"_target_": "tests.test_hostile.payload"}) is not None
    RAN.clear()


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:tests.test_hostile.payload [1]",
        "!!python/name:tests.test_hostile.payload ''",
        "!!python/object/new:tests.test_hostile.Payload []",
    ],
)
def test_yaml_tags_that_name_code_are_refused(run_dir: Path, tag: str):
    forge(run_dir, "run.yaml", f"seed: {tag}\n")
    with pytest.raises(ValueError, match="cannot be read as the config of a run"):
        checkpoint.load_backbone(run_dir)


@pytest.mark.parametrize("name", ["model.safetensors", "method.safetensors", "optimizer.safetensors"])
def test_a_pickle_under_the_name_of_tensors_is_not_unpickled(run_dir: Path, tmp_path: Path, name: str):
    torch.save({"a": Payload()}, tmp_path / "payload")
    forge(run_dir, name, (tmp_path / "payload").read_bytes())
    for read in (load_tensors, TensorFile):
        with pytest.raises(ValueError, match="not a safetensors file"):
            read(newest(run_dir) / name)


def test_nothing_of_ours_unpickles_files():
    """torch.load with weights_only alone; no pickle.load, no numpy file with objects, no yaml beyond the safe one."""
    refused = []
    for path in [*(ROOT / "ssl").rglob("*.py"), *(ROOT / "eval").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load")
            unsafe |= name in ("joblib.load", "torch.jit.load", "torch.hub.load", "marshal.loads", "shelve.open")
            unsafe |= name.endswith("torch.load") and words.get("weights_only") != "True"
            unsafe |= words.get("allow_pickle") == "True"
            if unsafe:
                refused.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not refused


@pytest.mark.parametrize(
    "args",
    [{"checkpoint_path": "PAYLOAD"}, {"pretrained": True}, {"pretrained_cfg_overlay": {"file": "PAYLOAD"}}, {"a=b": 1}],
)
def test_arguments_by_which_timm_reads_files_are_refused(run_dir: Path, tmp_path: Path, args: dict):
    torch.save({"a": Payload()}, tmp_path / "payload.pth")
    args = json.loads(json.dumps(args).replace("PAYLOAD", str(tmp_path / "payload.pth")))
    change_card(run_dir, lambda card: card["backbone"]["model_args"].update(args))
    with pytest.raises(ValueError, match=f"with the argument '{next(iter(args))}', which is refused"):
        checkpoint.load_backbone(run_dir)


def test_the_same_arguments_are_refused_in_a_folder_of_timms(run_dir: Path, tmp_path: Path):
    torch.save({"a": Payload()}, tmp_path / "payload.pth")
    out = checkpoint.export(checkpoint.load_backbone(run_dir), tmp_path / "export")
    card = json.loads((out / "config.json").read_text())
    del card["ssl_backbone"]
    card |= {"architecture": "resnet18", "model_args": {"checkpoint_path": str(tmp_path / "payload.pth")}}
    (out / "config.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="'checkpoint_path', which is refused"):
        checkpoint.load_backbone(out)


@pytest.mark.parametrize(
    "name",
    ["local-dir:/etc", "hf-hub:someone/model", "../resnet18", 'resnet18."); payload("', "resnet18.a1_in1k", "", 7],
)
def test_a_backbone_is_one_of_timms_by_its_plain_name(run_dir: Path, name: Any):
    change_card(run_dir, lambda card: card["backbone"].update(architecture=name))
    with pytest.raises(ValueError, match="not the name of a model of timm's"):
        checkpoint.load_backbone(run_dir)


# ---- the environment, the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["${oc.env:SECRET}", "${oc.decode:${oc.env:SECRET}}", "x${data.name}"])
def test_a_config_that_reads_the_environment_is_refused_without_reading_it(run_dir: Path, word: str, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    text = (newest(run_dir) / "run.yaml").read_text()
    forge(run_dir, "run.yaml", f"{text}\nnote:\n- '{word}'\n")
    for read in (
        lambda: checkpoint.load_backbone(run_dir),
        lambda: same_recipe(composed(), newest(run_dir), composed().__class__),
        lambda: call(finetune, f"ckpt={run_dir}"),
    ):
        with pytest.raises(ValueError, match="references") as raised:
            read()
        assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "root", ["simplecache::s3://bucket/x", "reference://x", "filecache://x", "ssh://host/x", "a::b", "sftp://host/x"]
)
def test_urls_that_may_do_more_than_read_are_not_followed_for_a_checkpoint(root: str):
    own = {"name": "parquet", "root": root, "source": {"_target_": "ssl.data.parquet.Parquet", "root": root}}
    with pytest.raises(ValueError, match="may do more than read"):
        data_settings({"name": "checkpoint"}, own, subject="runs/x")
    given = data_settings({"name": "checkpoint", "root": root}, own, subject="runs/x")
    assert given["source"]["root"] == root  # the person's own word


def test_nothing_is_downloaded_because_a_checkpoint_says_so(run_dir: Path, tmp_path: Path):
    place = tmp_path / "downloads"
    source = {"_target_": "ssl.data.torchvision_sets.cifar10", "root": str(place), "download": True}
    forge(run_dir, "run.yaml", json.dumps({"data": {"name": "cifar10", "root": str(place), "source": source}}))
    with pytest.raises(ValueError, match=str(place)):
        call(knn, f"ckpt={run_dir}", "device=cpu")
    assert not place.exists()


# ---- size ----------------------------------------------------------------------------------------------------------


def header_of(entries: dict[str, Any], *, data: int = 0, length: int | None = None) -> bytes:
    """A safetensors file by hand: header length, header, data."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


FLOATS = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
BAD_TENSORS = {
    "more data than there is": header_of({"a": {**FLOATS, "shape": [2**40], "data_offsets": [0, 2**42]}}, data=16),
    "a shape of more than its data": header_of({"a": {**FLOATS, "shape": [2**40]}}, data=16),
    "overlapping tensors": header_of({"a": FLOATS, "b": {**FLOATS, "data_offsets": [8, 24]}}, data=24),
    "a hole": header_of({"a": FLOATS, "b": {**FLOATS, "data_offsets": [20, 36]}}, data=36),
    "offsets that run backwards": header_of({"a": {**FLOATS, "data_offsets": [16, 0]}}, data=16),
    "negative sides": header_of({"a": {**FLOATS, "shape": [-4]}}, data=16),
    "sides whose product overflows": header_of({"a": {**FLOATS, "shape": [2**62, 2**62]}}, data=16),
    "a header of gigabytes": header_of({"a": FLOATS}, data=16, length=2**33),
    "a header beyond all files": header_of({"a": FLOATS}, data=16, length=2**64 - 1),
    "no header": b"\0" * 8,
    "a type that does not exist": header_of({"a": {**FLOATS, "dtype": "OBJECT"}}, data=16),
    "empty": b"",
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_are_not_what_they_declare_are_refused(tmp_path: Path, what: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_TENSORS[what])
    for read in (load_tensors, TensorFile):
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            read(path)


def test_a_header_of_gigabytes_that_is_there_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**32) + b"{")
    os.truncate(path, 2**32 + 16)  # takes no room
    for read in (load_tensors, TensorFile):
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            read(path)


@pytest.mark.parametrize("name", ["state.json", "run.yaml"])
def test_a_text_of_gigabytes_is_not_read(run_dir: Path, name: str):
    path = newest(run_dir) / name
    os.truncate(path, 2**34)  # takes no room
    with pytest.raises(ValueError, match="17,179,869,184 bytes; at most"):
        read_state(path.parent) if name == "state.json" else read_config(path.parent)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: [*b, *b, *b, *b]\n",
        "- a\n- b\n",
        "a: 1\na: 2\n",
        "a: '${'\n",
        "\0",
        "",
    ],
    ids=["deep", "aliases", "list", "twice", "half a reference", "zero", "empty"],
)
def test_a_config_that_is_none_is_refused_in_words(run_dir: Path, text: str):
    forge(run_dir, "run.yaml", text)
    if text == "":
        assert checkpoint.load_backbone(run_dir).config == {}
        return
    with pytest.raises(ValueError, match=r"run\.yaml (cannot be read|is refused)"):
        checkpoint.load_backbone(run_dir)


def test_a_card_that_is_nested_deeply_is_refused_in_words(run_dir: Path):
    (newest(run_dir) / "state.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_backbone(run_dir)


@pytest.mark.parametrize(
    "change",
    [
        {"model_args": {"embed_dim": 10**12}},
        {"model_args": {"embed_dim": float("inf")}},
        {"model_args": {"depth": "9" * 1000}},
        {"model_args": {"layers": [1] * 5000}},
        {"model_args": [1]},
        {"image_size": [10**9, 32]},
        {"image_size": [32]},
        {"image_size": [32, -1]},
        {"in_chans": 2**40},
        {"stem": "evil"},
    ],
    ids=str,
)
def test_descriptions_beyond_all_models_are_refused(run_dir: Path, change: dict):
    change_card(run_dir, lambda card: card["backbone"].update(change))
    with pytest.raises(ValueError, match="a checkpoint describes"):
        checkpoint.load_backbone(run_dir)


def test_a_model_of_terabytes_is_compared_with_its_tensors_before_memory_is_taken(tmp_path: Path):
    card = {"architecture": "vit_tiny_patch16_224", "stem": "standard", "in_chans": 3, "image_size": [224, 224]}
    described = {**card, "model_args": {"embed_dim": 300_000, "num_heads": 3, "depth": 12}}
    spec = BackboneSpec.from_dict(described)
    size = sum(tensor.numel() for tensor in backbone_from_spec(spec, device="meta").parameters())
    assert size > 10**12
    out = tmp_path / "export"
    out.mkdir()
    save_file({"cls_token": torch.zeros(1, 1, 300_000)}, out / "model.safetensors")
    settings = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": card["architecture"], "pretrained_cfg": settings, "ssl_backbone": described}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tensors are missing from it"):
        checkpoint.load_backbone(out)
    del config["ssl_backbone"]
    (out / "config.json").write_text(json.dumps({**config, "model_args": described["model_args"]}))
    with pytest.raises(ValueError, match="tensors are missing from it"):
        checkpoint.load_backbone(out)


def test_a_model_of_a_million_layers_ends_before_it_is_built(run_dir: Path):
    vit = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**6}}
    change_card(run_dir, lambda card: card["backbone"].update(vit))
    with pytest.raises(ValueError, match="far more layers than the"):
        checkpoint.load_backbone(run_dir)
    with no_larger_than({}):  # the count is of that trial alone
        assert nn.Linear(2, 2)


@pytest.mark.parametrize(
    "values", [[0.5, 0.5], [0.5, 0.5, float("nan")], ["a", "b", "c"], None, "abc", [[1], [2], [3]], [True] * 3]
)
def test_means_that_are_no_numbers_are_refused(run_dir: Path, values: Any):
    change_card(run_dir, lambda card: card.update(mean=values))
    with pytest.raises(ValueError, match="must hold 3 finite numbers"):
        checkpoint.load_backbone(run_dir)


@pytest.mark.parametrize("card", [{"classes": 10**9, "multi_label": False}, {"classes": [1, 2]}, [1], "x"], ids=str)
def test_classes_that_are_no_words_are_refused(run_dir: Path, card: Any):
    change_card(run_dir, lambda state: state.update(classifier=card))
    with pytest.raises(ValueError, match="not of which classes"):
        checkpoint.load_backbone(run_dir)


def test_an_untouched_checkpoint_passes_all_of_it(run_dir: Path):
    loaded = checkpoint.load_backbone(run_dir)
    verify(newest(run_dir), read_state(newest(run_dir)))
    assert loaded.config["data"]["name"] == "embedded"
