"""The server: which request gets which answer, within which limits. It stores nothing and reads no path from anyone."""

from __future__ import annotations

import asyncio
import functools
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from eval.app.connections import PromptH11Protocol
from eval.app.guard import Guard, Names
from eval.app.inspector import Inspector
from eval.app.uploads import Refused, decode_upload, read_body
from eval.app.worker import RETRY_AFTER, Worker

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "pages"
FILES = {
    "/": ("text/html", [HERE / "page.html"]),
    "/app.css": ("text/css", [PAGES / "page.css", HERE / "app.css"]),
    "/app.js": ("text/javascript", [PAGES / "page.js", HERE / "app.js"]),
}
"""The page and its parts, which it shares with the reports: media type, and files that are joined."""
CONNECTIONS = 64
"""Open at once; whoever comes later is asked to come again."""
BODY_SECONDS = 30.0
"""An image has come by then, or its sender is given up."""
MOST_MASKS = 2**31


class Server:
    """Answers the page's requests about `inspector`'s checkpoint, one at a time."""

    def __init__(self, inspector: Inspector, *, max_bytes: int, max_pixels: int, queue: int, seconds: float) -> None:
        self.inspector, self.max_bytes, self.max_pixels = inspector, max_bytes, max_pixels
        self.worker = Worker(queue=queue, seconds=seconds)
        self.readers = asyncio.Semaphore(1 + queue)  # bodies in memory that no job has taken yet

    def app(self, names: Names) -> ASGIApp:
        """The ASGI application, behind its guard."""
        routes = [
            *(Route(path, functools.partial(send_file, path)) for path in FILES),
            Route("/api/about", self.about),
            Route("/api/picture/{group}/{place:int}", self.picture),
            Route("/api/look", self.look, methods=["POST"]),
            Route("/api/maps", self.maps, methods=["POST"]),
            Route("/api/reconstruct", self.reconstruct, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {Refused: refused, HTTPException: no_such_page, Exception: failed}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), names)

    async def about(self, request: Request) -> Response:
        """What is served, and what may be sent."""
        limits = {"max_bytes": self.max_bytes, "max_pixels": self.max_pixels}
        return JSONResponse(self.inspector.about() | limits)

    async def picture(self, request: Request) -> Response:
        """A small picture of one of the server's own images."""
        group, place = request.path_params["group"], request.path_params["place"]
        return Response(await run_in_threadpool(self.inspector.thumbnail, group, place), media_type="image/png")

    async def look(self, request: Request) -> Response:
        """What the backbone makes of the image in the body, or of one of the server's that the query names."""
        known = named_image(request)
        return await self._answer(request, functools.partial(self.inspector.look, known=known))

    async def maps(self, request: Request) -> Response:
        """Where the network looks in the image; apart from the rest, as it takes several times as long."""
        return await self._answer(request, self.inspector.look_where)

    async def reconstruct(self, request: Request) -> Response:
        """What the method makes of the image with a share of it masked."""
        ratio, mask = number(request, "ratio", float), number(request, "mask", int)
        if not 0 <= mask < MOST_MASKS:
            raise Refused(400, f"mask must lie in 0..{MOST_MASKS - 1}")
        return await self._answer(request, functools.partial(self.inspector.reconstruct, mask_ratio=ratio, mask=mask))

    async def _answer(self, request: Request, job: Callable[[np.ndarray], dict[str, Any]]) -> Response:
        """What `job` makes of the request's image and the notes on it, from the thread that has the model."""
        known = named_image(request)
        data = await self._body(request)
        if known is not None and data:
            raise Refused(400, "the request names an image of the server's and brings another; send one")

        def work() -> dict[str, Any]:
            if known is not None:
                return {"notes": []} | job(self.inspector.own(*known))
            channels = self.inspector.scene.channels
            pixels, notes = decode_upload(data, channels=channels, max_pixels=self.max_pixels)
            return {"notes": notes} | job(pixels)

        return JSONResponse(await self.worker.run(work))

    async def _body(self, request: Request) -> bytes:
        """The body, within the limits. Other types than these a page of another site could send without being asked."""
        kind = request.headers.get("content-type", "")
        if kind != "application/octet-stream" and not kind.startswith("image/"):
            raise Refused(415, "send the bytes of an image file with Content-Type: application/octet-stream")
        if self.readers.locked():
            raise Refused(503, "too many images are on their way; try again in a moment", retry_after=RETRY_AFTER)
        try:
            async with self.readers, asyncio.timeout(BODY_SECONDS):
                declared = request.headers.get("content-length")
                return await read_body(request.stream(), declared=declared, limit=self.max_bytes)
        except TimeoutError:
            raise Refused(408, f"the image did not arrive within {BODY_SECONDS:g} seconds; try again") from None
        except ClientDisconnect:
            raise Refused(400, "the connection was closed before the image had arrived") from None


def named_image(request: Request) -> tuple[str, int] | None:
    """Group and place of the server's image that the query names; None where the image is in the body."""
    if "group" not in request.query_params and "place" not in request.query_params:
        return None
    return request.query_params.get("group", ""), number(request, "place", int)


def number(request: Request, key: str, kind: Callable[[str], float]) -> Any:
    """A finite number of the query. Raises Refused where it is none."""
    try:
        value = kind(request.query_params[key])
        if math.isfinite(value):
            return value
    except (KeyError, ValueError, OverflowError):
        pass
    raise Refused(400, f"{key} must be given as a number")


async def send_file(path: str, request: Request) -> Response:
    """A part of the page, read anew each time, so that it can be worked on."""
    kind, parts = FILES[path]
    return Response("\n".join(part.read_text(encoding="utf-8") for part in parts), media_type=kind)


def refused(request: Request, error: Refused) -> Response:
    """What is wrong with a request, in words. A body that was not read to its end ends the connection."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status in (408, 413):
        headers["Connection"] = "close"
    return JSONResponse({"error": str(error)}, error.status, headers=headers)


def no_such_page(request: Request, error: HTTPException) -> Response:
    """A path that there is not, or a method that it does not take."""
    words = {404: "there is nothing at this address", 405: "this address does not take that method"}
    return JSONResponse({"error": words.get(error.status_code, error.detail)}, error.status_code, headers=error.headers)


def failed(request: Request, error: Exception) -> Response:
    """A mistake of ours: the terminal has the details, which are nobody else's business."""
    return JSONResponse({"error": "this went wrong; the terminal that the server runs in says why"}, 500)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError, saying what to do, where the place is taken or is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        hint = (
            "give another port=, or port=0 for any that is free" if port else "host= must be an address of this machine"
        )
        raise OSError(f"cannot listen on host={host} port={port}: {error.strerror or error}; {hint}") from error


class HttpServer(uvicorn.Server):
    """uvicorn, which tells whoever waits for the model before it closes the connections."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.close()
        await super().shutdown(sockets)


def make_uvicorn(app: ASGIApp, worker: Worker) -> HttpServer:
    """The HTTP server around the application: one process, plain HTTP, no log of who asked what."""
    config = uvicorn.Config(
        app,
        http=PromptH11Protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    return HttpServer(config, worker)
