"""One connection of the HTTP server: requests are parsed by llhttp as their bytes arrive, and answered in their order.

The rule: nobody has said who calls until the head of a request is whole, so a head costs little memory and little time.
What follows a chunked body is dropped: a header there would otherwise take the place of one that was sent in the head.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

import httptools

from gateway import errors
from gateway.http import Answer, ClientGone, Headers, Request, refusal
from servicekit.errors import MalformedRequest

log = logging.getLogger(__name__)

MOST_HEADERS = 100
LONGEST_HEADERS = 16 * 1024
"""Bytes of the names and values of a request's headers together."""

LONGEST_TARGET = 16 * 1024
"""Bytes of the path and the query."""

LONGEST_FRAMING = 64 * 1024
"""Bytes that may arrive without completing a head and without any of a body: heads, chunk extensions, trailers."""

HEAD_SECONDS = 30.0
"""How long a new connection, or a request that has begun, may take to the end of its head."""

IDLE_SECONDS = 75.0
"""How long a connection is kept without a request."""

UNREAD_SECONDS = 60.0
"""How long a caller may leave answers unread before its next request, or the end of its connection."""

LINGER_SECONDS = 2.0
"""For how long what a caller still sends is dropped after its last answer: closing at once would take that from it."""

MOST_QUEUED = 16
"""How many requests may wait on a connection for the answers to earlier ones."""

Application = Callable[[Request, Answer], Awaitable[None]]


class Connections:
    """All connections of a server: at most so many."""

    def __init__(self, most: int) -> None:
        self.all: set[Connection] = set()
        self._most = most
        self._idle: dict[Connection, None] = {}
        """Those without a request, the longest first."""
        self._is_stopping = False

    def joins(self, connection: Connection) -> None:
        """There is one more, for which another one may have to go, or it itself."""
        self.all.add(connection)
        self._idle[connection] = None
        if self._is_stopping:  # it was accepted before
            connection.stop()
        elif len(self.all) > self._most:
            next(iter(self._idle)).abandon()

    def is_busy(self, connection: Connection) -> None:
        """It has a request, or its caller is gone: it cannot give way."""
        self._idle.pop(connection, None)

    def is_idle(self, connection: Connection) -> None:
        """It has none any more."""
        self._idle[connection] = None

    def stop(self) -> None:
        """Closes all, and those that are still to come, after the answers under way."""
        self._is_stopping = True
        for connection in self.all:
            connection.stop()


class Connection(asyncio.Protocol):
    """Refuses what is beyond the bounds with the documented error, and closes the connection then."""

    def __init__(self, application: Application, all: Connections, loop: asyncio.AbstractEventLoop) -> None:
        self.is_stopping = False
        self.closed: asyncio.Future[None] = loop.create_future()
        self._application = application
        self._all = all
        self._loop = loop
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        # Whoever says that this is its last request may send another one all the same; it is not answered.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._current: Answer | None = None
        self._waiting: deque[tuple[Request, Answer]] = deque()
        self._receiving: Request | None = None
        self._answering: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._expects_continue = False
        self._is_paused = False
        self._is_deaf = False
        self._is_ended = False
        """Whether nothing more is sent than what waits to be."""
        # The head that is arriving.
        self._is_in_head = False
        self._url = b""
        self._fields: Headers = []
        self._framing = 0
        self._problem = ""
        # When it is given up, if nothing happens before; the timer may ring earlier.
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Closes it, after the answer under way if there is one."""
        self.is_stopping = True
        if self._answering is None:
            self._end()

    def abandon(self) -> None:
        """Ends it, and the work for it, at once."""
        self._transport.abort()
        if self._task is not None:
            self._task.cancel()

    def pending(self) -> list[asyncio.Future[None]]:
        """What has to be done before it is over."""
        return [self.closed] if self._task is None else [self.closed, self._task]

    # What a request and its answer ask of it.

    def source(self) -> tuple[str, str]:
        peer = self._transport.get_extra_info("peername")
        is_encrypted = self._transport.get_extra_info("sslcontext") is not None
        return (peer[0] if isinstance(peer, tuple) else ""), ("https" if is_encrypted else "http")

    def wants_body(self) -> None:
        if self._expects_continue:
            self._expects_continue = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.taken()

    def taken(self) -> None:
        if self._is_paused and not self._waiting:
            self._is_paused = False
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        if not self._is_ended and not self._transport.is_closing():
            self._transport.write(data)

    async def writable(self) -> None:
        if not self._writable.is_set():
            await self._writable.wait()
        if self.closed.done():
            raise ClientGone

    def answered(self, *, keep: bool) -> None:
        self._answering = None
        if self._is_ended:
            return
        # Whoever was never told to go on may leave its body out or send it: what comes next means nothing.
        if not keep or self._expects_continue:
            self._end()
        elif self._writable.is_set():
            self._next()
        else:  # answers that nobody reads take memory: there are no more before these are read
            self._pause()
            self._expect(UNREAD_SECONDS)

    def cut(self) -> None:
        self._transport.abort()

    # What the transport tells it.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._expect(HEAD_SECONDS)
        self._all.joins(self)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf or self._parser is None:
            return
        self._framing += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # We speak nothing else. The request is answered as if it had not offered to, and what follows it may be in
            # another language already.
            self._is_deaf = self.is_stopping = True
        except httptools.HttpParserError:
            self._refuse()
            return
        if self._framing > LONGEST_FRAMING and not self._is_ended:
            self._problem = f"More than {LONGEST_FRAMING} bytes came without an end of the headers or any of the body."
            self._refuse()
        elif self._is_in_head and self._due is None:
            self._expect(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.is_busy(self)
        if self._task is None or self._task.done():
            self._over()
        else:  # a change is made, also when nobody waits for the answer any more
            self._task.add_done_callback(lambda _: self._over())
        self.closed.set_result(None)
        self._writable.set()
        if self._timer is not None:
            self._timer.cancel()
        self._due = self._timer = self._parser = None
        self._waiting.clear()
        if self._answering is not None:
            self._answering.lost()
        self._answering = self._receiving = self._current = None  # which know of us

    def _over(self) -> None:
        self._all.all.discard(self)
        self._task = None  # which knows of us

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
        if self._answering is None and not self._is_ended:
            self._next()

    # What the parser tells it, from within data_received; an exception ends in _refuse.

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._url = b""
        self._fields = []
        self._framing = 0
        self._due = None

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > LONGEST_TARGET:
            self._reject(f"Path and query have more than {LONGEST_TARGET} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            self._fields.append((name.lower(), value))
            if len(self._fields) > MOST_HEADERS:
                self._reject(f"The request has more than {MOST_HEADERS} headers.")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._is_in_head = False
        self._framing = 0
        self._due = None
        if sum([len(name) + len(value) for name, value in self._fields]) > LONGEST_HEADERS:
            self._reject(f"The headers have more than {LONGEST_HEADERS} bytes.")
        path, query = _split(self._url)
        version = self._parser.get_http_version()
        request = self._receiving = Request(
            self,
            self._parser.get_method().decode("ascii"),
            path.decode("ascii"),
            query,
            self._fields,
            version,
            is_kept=version == "1.1" and self._parser.should_keep_alive(),
        )
        answer = Answer(self, request)
        if self._answering is None and not self._waiting and self._writable.is_set():
            self._start(request, answer)
            return
        self._waiting.append((request, answer))
        self._pause()
        if len(self._waiting) > MOST_QUEUED:
            self._reject(f"More than {MOST_QUEUED} requests wait for their answers.")

    def on_body(self, body: bytes) -> None:
        self._framing = 0
        request = self._receiving
        # Of an answered request the rest is read to get to the next one.
        if request is not None and (request is self._answering or self._waiting) and not request.arrived(body):
            self._pause()

    def on_message_complete(self) -> None:
        self._framing = 0
        if self._receiving is not None:
            self._receiving.completed()
            self._receiving = None

    def _pause(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def _reject(self, problem: str) -> None:
        self._problem = problem
        raise ValueError(problem)

    def _next(self) -> None:
        """Goes on with the next request, when it comes."""
        if self._waiting:
            self._start(*self._waiting.popleft())
            return
        self._all.is_idle(self)
        self.taken()
        if not self._is_in_head:
            self._expect(IDLE_SECONDS)

    def _end(self, *, is_listening: bool = False) -> None:
        """Closes the connection when all is sent that waits to be, and gives the peer the time to read it.

        `is_listening`: the peer may be in the middle of sending.
        """
        if self._is_ended or self._transport.is_closing():
            return
        self._is_ended = self._is_deaf = True
        self._waiting.clear()
        if not (is_listening or self._receiving) or not self._transport.can_write_eof():
            self._transport.close()
            self._expect(UNREAD_SECONDS)
        else:
            self._transport.write_eof()
            self.taken()
            self._expect(LINGER_SECONDS)

    def _start(self, request: Request, answer: Answer) -> None:
        self._all.is_busy(self)
        self._answering, self._current = request, answer
        self._expects_continue = request.headers.get(b"expect", b"").lower() == b"100-continue"
        self._task = request.task = self._loop.create_task(self._answer(request, answer))

    async def _answer(self, request: Request, answer: Answer) -> None:
        try:
            await self._application(request, answer)
        except ClientGone:
            pass  # nobody is left to be answered
        except Exception as error:  # the application renders those that it knows: this one is a bug of ours
            log.error("request failed", exc_info=(type(error), error, error.__traceback__))
        finally:
            # Its context leads to the request. What leads to itself is left to the garbage collector, and with every
            # request that would be so much that all others wait for it.
            request.task = None
        if self._answering is request:  # not answered, or not to its end
            self._transport.abort()

    def _refuse(self) -> None:
        """Answers what is no request, or one beyond the bounds."""
        has_begun = self._current is not None and self._current.status != 0
        if self._waiting or (self._answering is not None and (self._is_in_head or has_begun)):
            self._end()  # an answer now would be taken for that to an earlier request
            return
        said = errors.render(MalformedRequest(self._problem or "The request is not valid HTTP/1.1."))
        self.write(refusal(said.status, said.headers, said.body))
        self._end(is_listening=True)

    # When it is given up.

    def _expect(self, seconds: float) -> None:
        """Gives the connection up in so many seconds, unless `_due` is changed before."""
        self._due = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self._due:
            self._arm()

    def _arm(self) -> None:
        assert self._due is not None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._due > self._loop.time():
            self._arm()
        elif self._answering is None or self._is_ended:
            self._transport.abort()  # closing would wait for a peer that reads nothing
        else:  # while an earlier request is answered, reading may pause: the lateness may be ours
            self._expect(HEAD_SECONDS)


def _split(url: bytes) -> tuple[bytes, bytes]:
    """The path and the query of a request's target."""
    if url.startswith(b"/") and b"#" not in url:
        path, _, query = url.partition(b"?")
        return path, query
    parsed = httptools.parse_url(url)  # in its absolute form, or nonsense
    return parsed.path or b"", parsed.query or b""
