"""Who may talk to the server: requests that name it as it is reached, sent by its own page; and headers for the page.

Any page that a browser shows can send requests to this machine's ports. One that has its own name resolve to 127.0.0.1
(DNS rebinding) is told by the Host header; one that posts from elsewhere by Origin and Sec-Fetch-Site.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
METHODS = ("GET", "HEAD", "POST")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Names:
    """The names that a browser may know this server by."""

    names: frozenset[str]
    any_address: bool
    """Whether every numeric address is ours, as of a server on all interfaces: no other page has an address as name."""

    def __contains__(self, header: str) -> bool:
        name = host_of(header)
        return name != "" and (name in self.names or (self.any_address and is_address(name)))


def names_of(host: str, further: Sequence[str] = ()) -> Names:
    """What a server bound to `host` may be called: of loopback its names, of others every address and the machine's."""
    own = {*LOOPBACK, host.lower(), *(each.lower() for each in further)}
    if is_loopback(host):
        return Names(frozenset(own), any_address=False)
    return Names(frozenset({*own, socket.gethostname().lower(), socket.getfqdn().lower()}), any_address=True)


def host_of(header: str) -> str:
    """The host of `host:port`, in lower case; `::1` of `[::1]:8000`; nothing of what is none."""
    try:
        parts = urlsplit(f"//{header}")
        parts.port  # noqa: B018 - raises where it is no number
        plain = parts.netloc == header and parts.username is None
        return (parts.hostname or "") if plain else ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    """Whether a host is written as an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def refusal(method: str, headers: Headers, names: Names) -> tuple[int, str] | None:
    """Why a request is not answered, as a status and words; None where it is."""
    if headers.get("host", "") not in names:
        return 400, "this server is not known by that name; open the address that it printed, or start it with names="
    if method not in METHODS:
        return 405, f"{method} is not understood here; allowed: {', '.join(METHODS)}"
    if method != "POST":
        return None
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site not in (None, "same-origin") or (origin is not None and origin.partition("://")[2] != headers["host"]):
        return 403, "only the page of this server may send images to it"
    return None


class Guard:
    """An ASGI application behind the checks of this file; it also gives every answer the headers of a closed page."""

    def __init__(self, app: ASGIApp, names: Names) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refused = refusal(scope["method"], Headers(scope=scope), self.names)
        if refused is None:
            await self.app(scope, receive, send_closed)
            return
        status, words = refused
        answer = Response(json.dumps({"error": words}), status, media_type="application/json")
        await answer(scope, receive, send_closed)
