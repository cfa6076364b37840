"""The command that serves the page: `python -m eval.app ckpt=runs/<run>`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from eval.app.settings import AppConfig
from eval.config import register
from ssl.command import run_command
from ssl.config import check

if TYPE_CHECKING:
    from eval.app.server import Server

PACKAGES = ("starlette", "uvicorn")
USAGE = """eval.app needs ckpt=, what the page tries:
  python -m eval.app ckpt=runs/<run>                                 a run, an export, a file of weights
  python -m eval.app ckpt=runs/<run> data=folder data.root=photos/   neighbours among other images
  python -m eval.app ckpt=runs/<run> port=0 sample=10000             any free port; more images to compare with"""


def check_packages(packages: tuple[str, ...] = PACKAGES) -> None:
    """Raise ValueError, with what to type, where a package of the extra `app` is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"eval.app needs {' and '.join(missing)}, of the extra app: uv sync --extra app, or "
            "pip install starlette uvicorn"
        )


def check_settings(config: DictConfig) -> None:
    """Raise ValueError for numbers that allow nothing to be served."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError("eval.app serves one checkpoint until it is stopped, so -m makes no sense; leave it out")
    if not 0 <= config.port < 2**16:
        raise ValueError(f"port must lie in 0..65535, got {config.port}; 0 takes any that is free")
    if config.queue < 0:
        raise ValueError(f"queue must be 0 or more requests, got {config.queue}")
    for key in ("max_upload_mib", "max_megapixels", "seconds"):
        if not config[key] > 0:
            raise ValueError(f"{key} must be above 0, got {config[key]:g}")


def make_server(config: DictConfig) -> Server:
    """The server of `config`'s checkpoint, with its features read; it listens nowhere yet."""
    from eval.app.inspector import Inspector  # here, so that what is missing is said in words
    from eval.app.server import Server
    from eval.look.scene import Scene

    check_settings(config)
    began = time.perf_counter()
    scene = Scene(config)
    print(f"{scene.title}: reading up to {config.sample:,} images of train", flush=True)
    inspector = Inspector(scene, config)
    for line in [*inspector.lines(), *(f"note: {note}" for note in dict.fromkeys(scene.notes))]:
        print(line)
    print(f"ready after {time.perf_counter() - began:.1f} s")
    return Server(
        inspector,
        max_bytes=int(config.max_upload_mib * 2**20),
        max_pixels=int(config.max_megapixels * 1e6),
        queue=config.queue,
        seconds=config.seconds,
    )


def run(config: DictConfig) -> None:
    """Serve the page until Ctrl-C. Raises ValueError and OSError, with what to do, where that cannot begin."""
    check_packages()
    from eval.app.guard import is_loopback, names_of
    from eval.app.server import listen, make_uvicorn

    check_settings(config)
    with listen(config.host, config.port) as place:  # first: a taken port should not cost the reading of images
        server = make_server(config)
        if not is_loopback(config.host):
            print(
                f"warning: host={config.host} serves more than this machine: whoever can reach it can use the model "
                "and see the images that are shown. host=127.0.0.1 serves this machine alone",
                file=sys.stderr,
            )
        print(f"serving on {address(config.host, place.getsockname()[1])}  (Ctrl-C stops it)", flush=True)
        app = server.app(names_of(config.host, list(config.names)))
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn passes on when it has closed its connections
            make_uvicorn(app, server.worker).run(sockets=[place])
    print("stopped", flush=True)
    if not server.worker.is_idle:
        os._exit(0)  # a job in torch cannot be interrupted, Python would wait for its end, and nobody else does


def address(host: str, port: int) -> str:
    """What a person opens: of a server on all interfaces by this machine's name."""
    shown = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"


def main() -> None:
    """The command line. Without `ckpt` it ends with exit code 2, another mistake with 1 and a message."""
    register(AppConfig)

    def task(config: DictConfig) -> Any:
        if config.ckpt is None:
            print(USAGE, file=sys.stderr)
            raise SystemExit(2)
        check(config, AppConfig)
        run(config)

    run_command(task, config_name="app")
