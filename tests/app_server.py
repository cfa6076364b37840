"""A page of `eval.app` that is served within the tests' own process, and how they talk to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig

from eval.app.command import make_server
from eval.app.guard import names_of
from eval.app.server import Server, listen, make_uvicorn
from eval.app.settings import AppConfig
from eval.config import register
from tests.scenes import compose_config

BYTES = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def values(self) -> dict[str, Any]:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    """A server that answers at `address`."""

    address: str
    server: Server

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """What one request on a connection of its own is answered; the path goes out as it is.

        A body that is too large is refused by its length: the server may answer and close while it is still being sent.
        """
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=20)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, named, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: bytes = b"", **headers: str) -> Answer:
        """Post the bytes of an image, with further headers whose underscores stand for hyphens."""
        further = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", path, body, BYTES | further)

    def connect(self) -> socket.socket:
        """A connection on which a test says what no client would."""
        host, port = urlsplit(self.address).netloc.split(":")
        return socket.create_connection((host, int(port)), timeout=20)


def app_config(ckpt: Path | str, *words: str) -> DictConfig:
    """The config of `python -m eval.app`, on one thread of the CPU."""
    register(AppConfig)
    few = [] if any(word.startswith(("images=", "indices=")) for word in words) else ["num_images=4"]
    return compose_config("app", [f"ckpt={ckpt}", "device=cpu", "threads=1", "sample=48", *few, *words])


@contextmanager
def serving(ckpt: Path | str, *words: str) -> Iterator[Served]:
    """Serve a checkpoint on a free port; the requests that wait when it connects are answered once it runs."""
    server = make_server(app_config(ckpt, *words))
    with listen("127.0.0.1", 0) as place:
        http_server = make_uvicorn(server.app(names_of("127.0.0.1")), server.worker)
        thread = threading.Thread(target=http_server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{place.getsockname()[1]}/", server)
        finally:
            http_server.should_exit = True
            thread.join(20)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels, with none behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
