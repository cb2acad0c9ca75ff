"""One connection of the HTTP client, and what passes over it: the request's bytes, the answer's parsing, the errors.

The rule it lives by: bytes that nobody asked for end a connection. Whoever sends them does not agree with us where an
answer ends, and the next caller must not be given a stranger's answer. Callers use `servicekit.http_client`.
"""

import asyncio
import re
import select
from collections import deque
from collections.abc import AsyncIterable, Callable, Sequence
from typing import cast

import httptools

Headers = Sequence[tuple[bytes, bytes]]

_MAX_HEAD = 64 * 1024
"""Bytes of an answer that may pass without any of its body: its head, interim answers, trailers (and one read more)."""
_HIGH_WATER = 256 * 1024
"""Unread bytes of an answer at which we stop reading from its connection; at half of them we go on."""

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET = re.compile(r"[\x21-\x7e]+")
_LINE_BREAKING = re.compile(rb"[\r\n\0]")


class HttpError(Exception):
    """A request that did not get its whole answer."""


class ConnectFailed(HttpError):
    """There was no connection and no byte was sent: another replica may be tried."""


class ConnectionLost(HttpError):
    """The peer closed or reset the connection before its answer was complete.

    `answered`: a byte of the answer had arrived. `sent`: the whole request had been handed over, so that the peer may
    have carried it out; when it is False, the peer has not seen the end of the request.
    """

    def __init__(self, message: str, *, answered: bool, sent: bool) -> None:
        super().__init__(message)
        self.answered = answered
        self.sent = sent


class HttpTimeout(HttpError):
    """The request's one deadline passed: in connecting, sending, waiting or reading."""


class ProtocolError(HttpError):
    """The peer's answer is not the HTTP/1.1 that we are willing to read."""


class AnswerTooLarge(HttpError):
    """The body is longer than the reader's limit."""


class Exchange:
    """One request and its answer: what the connection writes down and the caller reads."""

    def __init__(
        self, connection: "Connection", loop: asyncio.AbstractEventLoop, deadline: float, *, has_body: bool
    ) -> None:
        self.status = 0  # until the head of the final answer is there
        self.headers: list[tuple[bytes, bytes]] = []
        self.pieces: deque[bytes] = deque()
        self.has_body = has_body
        self.is_sent = False
        self.is_answered = False
        self.is_complete = False
        self.keep_alive = False
        self.ends_with_connection = False
        self.idle_bytes = 0  # of the answer since the last piece of its body
        self.error: Exception | None = None
        self._connection = connection
        self._unread = 0
        self._is_paused = False
        self._waiter: asyncio.Future[None] | None = None
        self.deadline = deadline
        self._loop = loop
        self._timer = loop.call_at(deadline, self._expire)

    async def answer_begun(self) -> None:
        while not self.status:
            if self.error is not None:
                raise self.error
            await self.changed()

    async def changed(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def add_piece(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self._unread += len(piece)
        if self._unread > _HIGH_WATER and not self._is_paused:
            self._is_paused = True
            self._connection.pause_reading()

    def take_piece(self) -> bytes:
        piece = self.pieces.popleft()
        self._unread -= len(piece)
        if self._unread <= _HIGH_WATER // 2:
            self._resume()
        return piece

    def fail(self, error: Exception) -> None:
        """Ends the exchange, and its connection with it, unless it has ended already."""
        if self.error is None and not self.is_complete:
            self.error = error
            self.end()
            self._connection.abort()

    def end(self) -> None:
        self._timer.cancel()
        self._resume()  # the connection's next exchange, or its end, must be heard of
        self.wake()

    def _resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._connection.resume_reading()

    def _expire(self) -> None:
        waiting_for = "the rest of its answer" if self.status else "an answer"
        self.fail(HttpTimeout(f"The deadline passed while waiting for {waiting_for} from {self._connection.address}."))


class Connection(asyncio.Protocol):
    """One connection: at most one exchange at a time, parsed by llhttp as bytes arrive."""

    def __init__(
        self,
        address: str,
        opened: "Callable[[Connection], None]",
        released: "Callable[[Connection], None]",
        lost: "Callable[[Connection], None]",
    ) -> None:
        self.address = address
        self.idle_since = 0.0
        self._opened = opened
        self._released = released
        self._lost = lost
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._poll = select.poll()
        self._writable = asyncio.Event()
        self._writable.set()
        self._heard = asyncio.Event()

    # What the pool and the exchange ask of it.

    def is_quiet(self) -> bool:
        """Whether the peer has neither closed nor said anything that we have not read yet."""
        return not self._transport.is_closing() and not self._poll.poll(0)

    def begin(self, loop: asyncio.AbstractEventLoop, deadline: float, *, has_body: bool) -> Exchange:
        self._exchange = Exchange(self, loop, deadline, has_body=has_body)
        return self._exchange

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    async def send_body(self, exchange: Exchange, body: AsyncIterable[bytes], length: int | None) -> None:
        """Sends the body no faster than the peer takes it; whatever goes wrong in it ends the exchange."""
        total = 0
        try:
            async for piece in body:
                total += len(piece)
                if length is not None and total > length:
                    raise ValueError(f"The body is longer than its content-length of {length} bytes.")
                # Writing to a peer that has answered and gone would throw its answer away: listen first.
                self._heard.clear()
                if not self.is_quiet():
                    await self._heard.wait()
                if piece:  # an empty chunk would be the end
                    self.write(piece if length is not None else b"%x\r\n%b\r\n" % (len(piece), piece))
                await self._writable.wait()
            if length is None:
                self.write(b"0\r\n\r\n")
            elif total < length:
                raise ValueError(f"The body ended after {total} bytes of its content-length of {length}.")
            exchange.is_sent = True
        except Exception as error:  # of the body's, or uvloop's when the peer is gone: that exchange has failed already
            exchange.fail(error)

    def pause_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def lose(self, how: str) -> None:
        """Ends the exchange as `ConnectionLost`, if there is one that lasts."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            message = f"The connection to {self.address} {how} before the answer was complete."
            exchange.fail(ConnectionLost(message, answered=exchange.is_answered, sent=exchange.is_sent))

    def abort(self) -> None:
        """Closes at once: what is still to be written is dropped."""
        self._exchange = None
        self._transport.abort()

    # What the transport tells it.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        self._opened(self)

    def data_received(self, data: bytes) -> None:
        self._heard.set()
        exchange = self._exchange
        if exchange is None:
            self.abort()
            return
        exchange.is_answered = True
        exchange.idle_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if exchange.idle_bytes > _MAX_HEAD:
                raise ProtocolError(f"more than {_MAX_HEAD} bytes without any of the body")
        except (httptools.HttpParserError, ProtocolError) as error:
            reason = error.__context__ if isinstance(error.__context__, ProtocolError) else error
            exchange.keep_alive = False
            exchange.fail(ProtocolError(f"The answer of {self.address} is not valid HTTP: {reason}."))
        if exchange.is_complete:
            self._finish(exchange)
        else:
            exchange.wake()

    def eof_received(self) -> None:
        self._heard.set()
        exchange = self._exchange
        if exchange is not None and exchange.ends_with_connection:
            exchange.is_complete = True
            self._finish(exchange)
        else:
            self.lose("was closed by the peer")

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard.set()
        self._writable.set()
        self.lose("broke" if exc is not None else "was closed")
        self._lost(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # What the parser tells it; all of it from within data_received.

    def on_message_begin(self) -> None:
        if self._current().is_complete:
            raise ProtocolError("bytes after its end")

    def on_header(self, name: bytes, value: bytes) -> None:
        exchange = self._current()
        if not exchange.status:  # later ones are trailers
            exchange.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        exchange = self._current()
        status = self._parser.get_status_code()
        if sum(len(name) + len(value) + 4 for name, value in exchange.headers) > _MAX_HEAD:
            raise ProtocolError(f"headers of more than {_MAX_HEAD} bytes")
        if status > 599:
            raise ProtocolError("a status that HTTP does not have")
        if status == 101:
            raise ProtocolError("an upgrade that was not asked for")
        if status < 200:  # interim
            exchange.headers.clear()
            return
        codings = [value.lower() for name, value in exchange.headers if name == b"transfer-encoding"]
        if codings not in ([], [b"chunked"]):
            raise ProtocolError("a transfer-encoding other than chunked")
        exchange.status = status
        exchange.idle_bytes = 0
        exchange.keep_alive = self._parser.should_keep_alive()  # it forgets with the end of the message
        if not exchange.has_body:
            # The parser does not know of HEAD and waits for a body: the answer is whole, the parser is spent.
            exchange.is_complete = True
            exchange.keep_alive = False
        else:
            names = {name for name, _ in exchange.headers}
            exchange.ends_with_connection = names.isdisjoint((b"content-length", b"transfer-encoding"))

    def on_body(self, piece: bytes) -> None:
        exchange = self._current()
        exchange.idle_bytes = 0
        if not exchange.is_complete:
            exchange.add_piece(piece)

    def on_message_complete(self) -> None:
        exchange = self._current()
        if exchange.status:
            exchange.is_complete = True
            exchange.idle_bytes = 0

    def _current(self) -> Exchange:
        assert self._exchange is not None
        return self._exchange

    def _finish(self, exchange: Exchange) -> None:
        self._exchange = None
        exchange.end()
        # What the peer has not taken yet of the request is never in front of another one.
        is_sent = exchange.is_sent and not self._transport.get_write_buffer_size()
        if exchange.keep_alive and is_sent and not self._transport.is_closing():
            self._released(self)
        else:
            self.abort()


def request_head(
    address: str, method: str, target: str, headers: Headers, body: bytes | AsyncIterable[bytes]
) -> tuple[bytes, int | None]:
    """The request up to its body, and the length of the body; None is a body in chunks.

    Nothing of the caller's may end a line or say anything about the framing but the truth: a value that did would be
    a second request in the replica's eyes. Values are not shown in errors, they may be credentials.
    """
    if not _TOKEN.fullmatch(method.encode()) or not _TARGET.fullmatch(target):
        raise ValueError("The method or the target has characters that do not belong into a request line.")
    length = len(body) if isinstance(body, bytes) else None
    names = {}
    lines = []
    for name, value in headers:
        if not _TOKEN.fullmatch(name) or _LINE_BREAKING.search(value):
            raise ValueError(f"The header {name!r} has characters that cannot be sent.")
        lines.append(b"%b: %b\r\n" % (name, value))
        lower = name.lower()
        if lower in (b"transfer-encoding", b"content-length") and lower in names:
            raise ValueError(f"The header {name!r} may be given only once.")
        names[lower] = value
    if b"transfer-encoding" in names:
        raise ValueError("transfer-encoding is decided by the client: leave it out.")
    declared = names.get(b"content-length")
    if declared is not None:
        if not declared.isdigit() or int(declared) != (int(declared) if length is None else length):
            raise ValueError("content-length is not the length of the body.")
        length = int(declared)
    elif length is not None:
        lines.append(b"content-length: %d\r\n" % length)
    else:
        lines.append(b"transfer-encoding: chunked\r\n")
    if b"host" not in names:
        host = "localhost" if "/" in address else address
        lines.insert(0, f"host: {host}\r\n".encode("ascii"))
    return f"{method} {target} HTTP/1.1\r\n".encode("ascii") + b"".join(lines) + b"\r\n", length
