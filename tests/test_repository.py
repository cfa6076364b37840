"""What holds for the repository as a whole: its layout, its lock file, its boundaries."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[1]
CODE = ("ssl", "eval")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files under version control, relative to the root."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def texts(tracked: list[Path]) -> dict[Path, str]:
    """The tracked text files' contents."""
    pictures = {".png", ".jpg", ".gif"}
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in tracked if path.suffix not in pictures}


def test_the_top_level_is_what_the_readme_describes(tracked: list[Path]) -> None:
    project = {"pyproject.toml", "README.md", "ssl", "conf", "launch", "eval", "tests", "benchmarks"}
    around = {".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "conftest.py", "uv.lock"}
    around |= {"mkdocs.yml"}
    allowed = {"docs", ".github", ".python-version"}
    found = {path.parts[0] for path in tracked}
    assert project | around <= found
    assert found - allowed <= project | around


def test_scripts_are_executable_and_parse(tracked: list[Path]) -> None:
    scripts = [path for path in tracked if path.suffix == ".sh" or path == Path(".ci/run")]
    assert len(scripts) >= 2
    for script in scripts:
        assert os.access(ROOT / script, os.X_OK), script
        subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_launch_script_is_the_command_with_the_root_on_the_path(tmp_path: Path) -> None:
    spy = tmp_path / "python"
    spy.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@"\n')
    spy.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(spy), "NPROC": "3", "PYTHONPATH": "before"}
    script, settings = ROOT / "launch" / "one_machine.sh", ["method=mae", "data.root=a folder"]
    printed = subprocess.check_output([script, *settings], cwd=tmp_path, env=environment, text=True)
    assert printed == f"{ROOT}:before -m ssl.pretrain trainer.devices=3 method=mae data.root=a folder\n"
    assert "usage:" in subprocess.check_output([script, "--help"], text=True)


def test_no_file_names_a_folder_of_one_persons_machine(texts: dict[Path, str]) -> None:
    private = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt|scratch)/[\w.-]+")
    found = {f"{path}: {match.group()}" for path, text in texts.items() for match in private.finditer(text)}
    assert found == set()


def test_nothing_unfinished_is_tracked(texts: dict[Path, str]) -> None:
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|break" + r"point\(\))|^<{7} |^>{7} ", re.MULTILINE)
    found = {f"{path}: {match.group()}" for path, text in texts.items() for match in marks.finditer(text)}
    assert found == set()


def test_no_file_is_a_drawer_for_everything(tracked: list[Path]) -> None:
    assert [path for path in tracked if path.stem in ("utils", "helpers", "misc", "common")] == []


def test_no_tracked_file_is_large(tracked: list[Path]) -> None:
    assert [path for path in tracked if (ROOT / path).stat().st_size > 2**20] == []


def test_uv_lock_takes_every_package_from_pypi() -> None:
    lock = (ROOT / "uv.lock").read_text()
    hosts = set(re.findall(r"https?://([^/\"]+)", lock))
    assert hosts == {"pypi.org", "files.pythonhosted.org"}
    packages = tomllib.loads(lock)["package"]
    assert all(package["source"].keys() <= {"registry", "virtual"} for package in packages)


def test_uv_lock_is_in_step_with_pyproject() -> None:
    uv = ROOT / ".uv" / "bin" / "uv"
    if not uv.exists():
        pytest.skip("uv is not in .uv; make setup puts it there")
    command = [uv, "lock", "--check", "--offline", "--no-config", "--python", sys.executable]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"run make lock\n{done.stderr}"


def test_both_faiss_wheels_are_never_installed_together() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wheels = [Requirement(line) for line in project["dependencies"] if line.startswith("faiss")]
    assert len(wheels) == 2
    for system in ("linux", "darwin", "win32"):
        for machine in ("x86_64", "aarch64", "arm64", "AMD64"):
            here = {"sys_platform": system, "platform_machine": machine}
            chosen = [wheel.name for wheel in wheels if wheel.marker is not None and wheel.marker.evaluate(here)]
            assert chosen == (["faiss-gpu"] if (system, machine) == ("linux", "x86_64") else ["faiss-cpu"])


def _imports(*folders: str) -> Iterator[tuple[Path, str]]:
    """(file, imported module) of every import under `folders`, those inside functions too."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from ((path, alias.name) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    yield path, node.module
                    yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


def test_ssl_imports_nothing_of_eval() -> None:
    assert [path for path, module in _imports("ssl") if module.split(".")[0] in ("eval", "tests", "benchmarks")] == []


def test_only_files_about_processes_touch_torch_distributed() -> None:
    touching = {path.relative_to(ROOT) for path, module in _imports(*CODE) if module.startswith("torch.distributed")}
    touching |= {path.relative_to(ROOT) for path, module in _imports(*CODE) if module.startswith("torch.nn.parallel")}
    assert touching <= {Path(f"ssl/{name}.py") for name in ("distributed", "trainer", "sharding", "elastic")}


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[<>=;\[ ]", line)[0] for line in lines}
    distribution = {
        "hydra": "hydra-core",
        "PIL": "pillow",
        "faiss": "faiss-gpu",
        "huggingface_hub": "huggingface-hub",
        "yaml": "pyyaml",
        "sklearn": "scikit-learn",
        "umap": "umap-learn",
        "hydra_plugins": "hydra-submitit-launcher",  # and hydra-optuna-sweeper: one namespace
    }
    ours = {"ssl", "eval", *sys.stdlib_module_names}
    imported = {module.split(".")[0] for _, module in _imports(*CODE)} - ours
    assert {distribution.get(name, name) for name in imported} <= declared


def _targets(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from _targets(value)


def test_every_yaml_parses_and_every_target_exists() -> None:
    files = sorted((ROOT / "conf").rglob("*.yaml"))
    assert len(files) > 10
    for path in files:
        config = OmegaConf.load(path)
        assert isinstance(config, (DictConfig, ListConfig))
        for target in _targets(OmegaConf.to_container(config, resolve=False)):
            assert callable(get_object(target)), f"{path.relative_to(ROOT)} names {target}"


@pytest.mark.parametrize(
    ("group", "options"),
    [
        ("method", "relative_location simclr mae"),
        ("model", "vit_t vit_s vit_b vit_l vit_h resnet18 resnet50 timm"),
        ("data", "embedded folder parquet cifar10 cifar100 stl10 imagenet"),
        ("optim", "adamw sgd lars"),
    ],
)
def test_conf_has_every_option_that_the_contract_names(group: str, options: str) -> None:
    assert set(options.split()) <= {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
