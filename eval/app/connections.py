"""Connections that must say what they ask for: one that keeps its place without a request is closed.

uvicorn allows so many at once, and closes by itself only those that send nothing after an answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
"""The head of a request has come by then after the connection was made, or after the last answer."""


class PromptH11Protocol(H11Protocol):
    """uvicorn's HTTP, with a limit on the time in which no request is being answered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As uvicorn's; the time begins."""
        super().connection_made(transport)
        self._keep_limit()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's; the time ends with a whole head, and goes on with a part of one."""
        super().data_received(data)
        self._keep_limit()

    def on_response_complete(self) -> None:
        """As uvicorn's; the time begins again."""
        super().on_response_complete()
        self._keep_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        self._end_limit()
        super().connection_lost(exc)

    def _keep_limit(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_limit()
        elif self._limit is None and not self.transport.is_closing():
            self._limit = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
