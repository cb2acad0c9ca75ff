"""A request over HTTP and its answer, as whoever answers sees them; `gateway/http_protocol.py` has their connection.

The rule: an answer ends as its head said it would, or its connection is cut, which is how HTTP says that something is
missing. And it begins only when the policy allowed what it answers.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from http import HTTPStatus
from types import TracebackType
from typing import Protocol

from google.protobuf.descriptor import ServiceDescriptor

from servicekit.arrivals import Arriving
from servicekit.errors import InvalidParameter, ServiceError
from servicekit.policy import Decision, Undecided

Headers = list[tuple[bytes, bytes]]

MOST_BUFFERED = 64 * 1024
"""Bytes of a body that wait to be read before no more are taken from the connection."""

BODY_SECONDS = 60.0
"""How long a body that we read ourselves may take to arrive."""

MOST_AWAITED = 200
"""How many bodies that we read ourselves may be on their way of one sender."""

_UNSENDABLE = re.compile(rb"[\0-\x08\x0a-\x1f\x7f]")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in HTTPStatus}
STATUSES = _STATUS_LINES.keys()
"""All that an answer can have."""

_WITHOUT_BODY = (204, 304)


class ClientGone(Exception):
    """The caller hung up before its request was complete, or before it had its answer."""


class Wire(Protocol):
    """What a request and its answer need of their connection."""

    is_stopping: bool
    """Whether the answer under way is the last one."""

    def source(self) -> tuple[str, str]:
        """The peer's address, empty where it has none, and the scheme."""

    def wants_body(self) -> None:
        """Somebody waits for more of the body."""

    def taken(self) -> None:
        """What had arrived of the body was taken."""

    def write(self, data: bytes) -> None:
        """Sends; does nothing when the caller has gone."""

    async def writable(self) -> None:
        """Returns once the caller has taken most of what was sent; raises ClientGone."""

    def answered(self, *, keep: bool) -> None:
        """The answer is whole. The connection waits for the next request, if it is to be kept."""

    def cut(self) -> None:
        """Ends the connection in the middle."""


class Request:
    """One request. `path` is still percent-encoded; `service` is who answers, once that is known."""

    __slots__ = (
        *("_body", "_heard", "_size", "_wire", "fields", "headers", "id", "is_complete", "is_gone"),
        *("is_kept", "is_stream", "ends_with_caller", "method", "path", "query_string", "route", "service"),
        *("task", "version"),
    )

    def __init__(
        self, wire: Wire, method: str, path: str, query_string: bytes, fields: Headers, version: str, *, is_kept: bool
    ) -> None:
        self.method = method
        self.path = path
        self.query_string = query_string
        self.fields = fields
        """All headers as they came, their names in lower case."""
        self.headers = dict(fields)
        self.version = version
        self.id = ""
        self.service: ServiceDescriptor | None = None
        self.route = ""
        """The method and the path's template, once that is known."""
        self.is_stream = False
        """Whether the answer takes as long as somebody reads it."""
        self.is_complete = False
        """Whether all of the body has arrived; it may still have to be read."""
        self.is_kept = is_kept
        """Whether the caller may send another request after this one."""
        self.is_gone = False
        """Whether the caller has hung up."""
        self._wire = wire
        self._body: list[bytes] = []
        self._size = 0
        self._heard: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None] | None = None
        """The task that answers it."""
        self.ends_with_caller = False
        """Whether that task is cancelled when the caller hangs up."""

    def header(self, name: bytes) -> str | None:
        """A header's value; the name in lower case."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def values(self, name: bytes) -> list[str]:
        """All values of a header, in the order in which they came."""
        return [value.decode("latin-1") for known, value in self.fields if known == name]

    def declared_length(self) -> int | None:
        """The length that the request declares for its body, if it does."""
        value = self.headers.get(b"content-length", b"")
        return int(value) if value.isdigit() else None

    def source(self) -> tuple[str, str]:
        """The peer's address, empty where it has none, and the scheme."""
        return self._wire.source()

    async def more(self) -> bytes:
        """What has come of the body since it was last read, once there is any; empty at its end. Raises ClientGone."""
        while not self._body and not self.is_complete and not self.is_gone:
            self._wire.wants_body()
            self._heard = asyncio.get_running_loop().create_future()
            await self._heard
        if self.is_gone:
            raise ClientGone
        body, self._body = self._body, []
        if self._size > MOST_BUFFERED:
            self._wire.taken()
        self._size = 0
        return body[0] if len(body) == 1 else b"".join(body)

    # What the connection tells it.

    def arrived(self, piece: bytes) -> bool:
        """Takes a piece of the body; whether more may come before it is read."""
        self._body.append(piece)
        self._size += len(piece)
        self._wake()
        return self._size <= MOST_BUFFERED

    def completed(self) -> None:
        """All of the body has arrived."""
        self.is_complete = True
        self._wake()

    def lost(self) -> None:
        """The caller has hung up."""
        self.is_gone = True
        self._wake()
        if self.ends_with_caller and self.task is not None:
            self.task.cancel()

    def _wake(self) -> None:
        if self._heard is not None and not self._heard.done():
            self._heard.set_result(None)


class WhileWanted:
    """Within it, the task that answers a request is cancelled when the caller hangs up; ClientGone leaves it then.

    While its connection is not read, because of a body that nobody reads or of requests that wait for this answer, a
    hang-up is not heard.
    """

    __slots__ = ("_request",)

    def __init__(self, request: Request) -> None:
        self._request = request

    def __enter__(self) -> None:
        if self._request.is_gone:
            raise ClientGone
        self._request.ends_with_caller = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._request.ends_with_caller = False
        if kind is asyncio.CancelledError and self._request.is_gone and self._request.task is not None:
            self._request.task.uncancel()
            raise ClientGone from None


class Answer:
    """The answer to one request: whole at once, or its head, then pieces, then its end."""

    __slots__ = ("_has_body", "_is_chunked", "_is_kept", "_left", "_request", "_wire", "decision", "headers", "status")

    def __init__(self, wire: Wire, request: Request) -> None:
        self.headers: Headers = []
        """What every answer to this request has among its headers."""
        self.status = 0
        """The status that was sent, once one was."""
        self.decision: Decision | None = None
        """What has to be allowed before anything is sent, if something has."""
        self._wire = wire
        self._request = request
        self._is_kept = request.is_kept
        self._is_chunked = False
        self._has_body = True
        self._left = 0

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Sends all of it. Raises Undecided."""
        if status not in _WITHOUT_BODY:
            headers = [*headers, (b"content-length", b"%d" % len(body))]
        head = self._head(status, headers)
        self._wire.write(head + body if self._has_body else head)
        self._wire.answered(keep=self._is_kept)

    def begin(self, status: int, headers: Headers) -> None:
        """Sends the head. Without a length among `headers` the body may have any. Raises Undecided."""
        length = next((value for name, value in headers if name == b"content-length"), None)
        if length is not None:
            self._left = int(length)
        elif self._request.version == "1.1":
            self._is_chunked = True
            headers = [*headers, (b"transfer-encoding", b"chunked")]
        else:
            self._is_kept = False  # its end is that of the connection
        self._wire.write(self._head(status, headers))

    async def piece(self, body: bytes) -> None:
        """Sends a piece, no faster than the caller takes them; raises ClientGone."""
        if not body or not self._has_body:
            return
        if self._is_chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body)
        else:
            self._left -= len(body)
        self._wire.write(body)
        await self._wire.writable()

    def end(self) -> None:
        """Ends it after the last piece; what has another length than its head said is cut."""
        if self._is_chunked and self._has_body:
            self._wire.write(b"0\r\n\r\n")
        if self._left and self._has_body:
            self._wire.cut()
        else:
            self._wire.answered(keep=self._is_kept)

    def _head(self, status: int, headers: Headers) -> bytes:
        if self.status:
            raise RuntimeError("a request is answered once")
        if self.decision is not None and not self.decision.is_allowed:
            raise Undecided
        headers = headers + self.headers
        if _UNSENDABLE.search(b"".join([value for _, value in headers])):
            raise ValueError("a header of the answer has characters that cannot be sent")
        line = _STATUS_LINES[status]
        if self._wire.is_stopping:
            self._is_kept = False
        if not self._is_kept:
            headers.append((b"connection", b"close"))
        self.status = status
        self._has_body = self._request.method != "HEAD" and status not in _WITHOUT_BODY
        lines = [b"%b: %b\r\n" % header for header in headers]
        return b"".join((line, _date(), *lines, b"\r\n"))


async def read_body(
    request: Request, limit: int, arriving: Arriving, error: Callable[[str], ServiceError] = InvalidParameter
) -> bytes:
    """The whole body, which `arriving` keeps account of.

    Raises `error` for one of more than `limit` bytes or that takes too long, Overloaded, and ClientGone.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read_body(request, limit, arriving, error)
    except TimeoutError:
        raise error(f"The body was not complete after {BODY_SECONDS:g} s. Send it at once.") from None


async def _read_body(request: Request, limit: int, arriving: Arriving, error: Callable[[str], ServiceError]) -> bytes:
    if (request.declared_length() or 0) > limit:
        raise error(too_large(limit))
    pieces: list[bytes] = []
    size = 0
    while piece := await request.more():
        size += len(piece)
        if size > limit:
            raise error(too_large(limit))
        arriving.keep(len(piece))
        pieces.append(piece)
    return b"".join(pieces)


def too_large(limit: int) -> str:
    """The text that goes with a body of more than `limit` bytes."""
    return f"The body has more than {limit} bytes, which is the limit here. Send less at a time."


_dated: tuple[int, bytes] = (0, b"")


def _date() -> bytes:
    """The line that says what time it is (RFC 9110, 6.6.1)."""
    global _dated
    now = int(time.time())
    if _dated[0] != now:
        _dated = now, f"date: {formatdate(now, usegmt=True)}\r\n".encode("ascii")
    return _dated[1]


def refusal(status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bytes:
    """The last answer on a connection, to what is no request."""
    lines = [b"%b: %b\r\n" % header for header in (*headers, (b"content-length", b"%d" % len(body)))]
    return b"".join((_STATUS_LINES[status], _date(), *lines, b"connection: close\r\n\r\n", body))
