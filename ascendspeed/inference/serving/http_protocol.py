"""HTTP/1.1 protocol of the service: uvicorn's, which also closes connections that send no complete head."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30.0
"""Seconds in which the head of a request must arrive; each open connection holds a file descriptor."""


class HttpProtocol(H11Protocol):
    """Protocol of one connection."""

    head_seconds = HEAD_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to wait for the first request."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Reads a part of a request; uvicorn's timer of idle connections ends with its first byte."""
        super().data_received(data)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        if self._head_timer:
            self._head_timer.cancel()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._close_idle, self.cycle)

    def _close_idle(self, last: Any) -> None:
        """Closes the connection unless a request has followed the `last` one."""
        self._head_timer = None
        if self.cycle is last:
            self.transport.close()
        else:
            self._wait_for_head()
