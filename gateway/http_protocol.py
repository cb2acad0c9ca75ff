"""One connection of the HTTP server: uvicorn's, with the bounds that it leaves to a proxy in front.

The rule: nobody has said who calls until the head of a request is whole, so a head costs little memory and little time.
What follows a chunked body is dropped: a header there would otherwise take the place of one that was sent in the head.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway import errors
from servicekit.errors import MalformedRequest

MOST_HEADERS = 100
LONGEST_HEADERS = 16 * 1024
"""Bytes of the names and values of a request's headers together."""

LONGEST_TARGET = 16 * 1024
"""Bytes of the path and the query."""

LONGEST_FRAMING = 64 * 1024
"""Bytes that may arrive without completing a head and without any of a body: heads, chunk extensions, trailers."""

HEAD_SECONDS = 30.0
"""How long a new connection, or a request that has begun, may take to the end of its head."""

MOST_QUEUED = 16
"""How many requests may wait on a connection for the answers to earlier ones."""


class BoundedProtocol(HttpToolsProtocol):
    """Refuses what is beyond the bounds with the documented error, and closes the connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._problem = ""
        self._framing = 0
        self._header_bytes = 0
        self._is_in_head = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._framing += len(data)
        super().data_received(data)
        if self._framing > LONGEST_FRAMING and not self.transport.is_closing():
            self._problem = f"More than {LONGEST_FRAMING} bytes came without an end of the headers or any of the body."
            self.send_400_response(self._problem)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no request, or one beyond the bounds."""
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (is_busy and (self._is_in_head or self.cycle.response_started)):
            self.transport.close()  # an answer now would be taken for that to an earlier request
            return
        refusal = errors.render(MalformedRequest(self._problem or "The request is not valid HTTP/1.1."))
        headers = [*refusal.headers, (b"content-length", b"%d" % len(refusal.body)), (b"connection", b"close")]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"HTTP/1.1 %d Bad Request\r\n%b\r\n%b" % (refusal.status, lines, refusal.body))
        self.transport.close()

    # What the parser tells; an exception ends in send_400_response.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._framing = self._header_bytes = 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._check(len(self.url) <= LONGEST_TARGET, f"Path and query have more than {LONGEST_TARGET} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_head:
            return
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        self._check(len(self.headers) <= MOST_HEADERS, f"The request has more than {MOST_HEADERS} headers.")
        self._check(self._header_bytes <= LONGEST_HEADERS, f"The headers have more than {LONGEST_HEADERS} bytes.")

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._framing = 0
        self._head_came()
        super().on_headers_complete()
        self._check(len(self.pipeline) <= MOST_QUEUED, f"More than {MOST_QUEUED} requests wait for their answers.")

    def on_body(self, body: bytes) -> None:
        self._framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._framing = 0
        super().on_message_complete()

    def _check(self, holds: bool, problem: str) -> None:
        if not holds:
            self._problem = problem
            raise ValueError(problem)

    def _expect_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # while an earlier request is answered, reading may pause: the lateness may be ours
            self._expect_head()
