"""The HTTP/1.1 client of the data plane: keep-alive connections to replicas, over Unix sockets and TCP.

The rule it lives by: an inference may change something, so no request is ever sent twice. A connection is looked at
once more right before it is written to, and one that is already closed is not used; from the first byte on, a loss is
the caller's to judge (`ConnectionLost`).
"""

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Self

from servicekit.http_connection import (
    AnswerTooLarge,
    ConnectFailed,
    Connection,
    ConnectionLost,
    Exchange,
    Headers,
    HttpError,
    HttpTimeout,
    ProtocolError,
    request_head,
)

__all__ = [
    "AnswerTooLarge",
    "ConnectFailed",
    "ConnectionLost",
    "Headers",
    "HttpError",
    "HttpPool",
    "HttpResponse",
    "HttpTimeout",
    "ProtocolError",
]


class HttpResponse:
    """An answer: its status and headers (names in lower case) at once, its body as it arrives.

    Leave it with `close()` or `async with`. A body that is not wanted to its end costs the connection, which is how a
    replica learns that its caller went away. One reader at a time.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.status = exchange.status
        self.headers = exchange.headers
        self.deadline = exchange.deadline
        """When it ends at the latest, on the loop's clock; who passes it on has no longer than that either."""
        self._exchange = exchange

    def header(self, name: bytes) -> bytes:
        """The first value of a header, by its name in lower case; empty when there is none."""
        return next((value for known, value in self.headers if known == name), b"")

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        exchange = self._exchange
        while not exchange.pieces:
            if exchange.error is not None:
                raise exchange.error
            if exchange.is_complete:
                raise StopAsyncIteration
            try:
                await exchange.changed()
            except asyncio.CancelledError:
                await self.close()
                raise
        return exchange.take_piece()

    def whole(self) -> bytes | None:
        """The rest of the body, when all of it is here already."""
        exchange = self._exchange
        if not exchange.is_complete:
            return None
        pieces = [exchange.take_piece() for _ in range(len(exchange.pieces))]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read(self, limit: int | None = None) -> bytes:
        """The rest of the body; one of more than `limit` bytes is given up with `AnswerTooLarge`."""
        pieces: list[bytes] = []
        size = 0
        async for piece in self:
            size += len(piece)
            if limit is not None and size > limit:
                await self.close()
                raise AnswerTooLarge(f"The answer has more than {limit} bytes.")
            pieces.append(piece)
        return b"".join(pieces)

    async def close(self) -> None:
        """Gives up what was not read; safe to call at any time and more than once."""
        self._exchange.pieces.clear()
        self._exchange.fail(HttpError("The answer was closed before its end."))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class HttpPool:
    """Keep-alive HTTP/1.1 connections to addresses: `unix:/path` or `host:port`. Lives on one event loop.

    With `dial` all connections are its own: it is given the address, whatever that means to it, and raises OSError.
    `connect_timeout` and `idle_timeout` are seconds. A peer should keep an idle connection for longer than
    `idle_timeout`: when both decide at the same moment, a request can meet a connection that is just being closed.
    """

    def __init__(
        self,
        *,
        connect_timeout: float = 1.0,
        idle_timeout: float = 30.0,
        max_idle_per_address: int = 32,
        dial: Callable[[str], Awaitable[socket.socket]] | None = None,
    ) -> None:
        self._dial = dial
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._max_idle = max_idle_per_address
        self._open: set[Connection] = set()
        self._idle: dict[str, deque[Connection]] = {}  # per address, the longest idle first
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send(
        self,
        address: str,
        method: str,
        target: str,
        headers: Headers,
        body: bytes | AsyncIterable[bytes],
        *,
        timeout: float,
    ) -> HttpResponse:
        """Sends one request and returns when the head of its answer is there.

        `host` and the framing are added: `content-length` for bytes, chunks for an iterable unless `headers` name its
        length. `timeout` (seconds) runs until the last byte of the answer has arrived. An answer that begins while we
        are still sending ends the sending.

        Raises `HttpError`s, ValueError for a request that cannot be put on the wire, and what `body` raises.
        """
        head, length = request_head(address, method, target, headers, body)
        # Asking for the running loop is a system call in Python 3.11.
        loop = self._loop = self._loop or asyncio.get_running_loop()
        deadline = loop.time() + timeout
        connection = self._take_idle(address) or await self._connect(address, deadline)
        exchange = connection.begin(loop, deadline, has_body=method != "HEAD")
        try:
            if isinstance(body, bytes):
                exchange.is_sent = True
                connection.write(head + body)
                await exchange.answer_begun()
            else:
                connection.write(head)
                sender = asyncio.create_task(connection.send_body(exchange, body, length))
                try:
                    await exchange.answer_begun()
                finally:
                    sender.cancel()
                    await asyncio.wait([sender])
        except BaseException:
            exchange.fail(HttpError("The request was given up."))
            raise
        return HttpResponse(exchange)

    def forget(self, address: str) -> None:
        """Closes the idle connections to an address that is gone; requests in flight go on."""
        for connection in self._idle.pop(address, ()):
            connection.abort()

    async def close(self) -> None:
        """Closes every connection; requests in flight fail. Nothing can be sent afterwards."""
        if self._closed is None:
            self._closed = asyncio.get_running_loop().create_future()
            if self._sweeper is not None:
                self._sweeper.cancel()
            self._idle.clear()
            for connection in self._open:
                connection.lose("was dropped, because this client is being closed,")
                connection.abort()
            if not self._open:
                self._closed.set_result(None)
        await asyncio.shield(self._closed)

    def _take_idle(self, address: str) -> Connection | None:
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()  # the one used last is the least likely to be closed under our hands
            if not idle:
                del self._idle[address]
            if connection.is_quiet():
                return connection
            connection.abort()
        return None

    async def _connect(self, address: str, deadline: float) -> Connection:
        if self._closed is not None:
            raise ConnectFailed("This client is closed.")
        loop = asyncio.get_running_loop()
        limit = min(deadline, loop.time() + self._connect_timeout)

        def protocol() -> Connection:
            return Connection(address, self._opened, self._released, self._lost)

        try:
            async with asyncio.timeout_at(limit):
                if self._dial is not None:
                    _, connection = await loop.create_unix_connection(protocol, sock=await self._dial(address))
                elif address.startswith("unix:"):
                    _, connection = await loop.create_unix_connection(protocol, address.removeprefix("unix:"))
                else:
                    host, _, port = address.rpartition(":")
                    _, connection = await loop.create_connection(protocol, host.strip("[]"), int(port))
        except TimeoutError:
            if limit == deadline:
                raise HttpTimeout(f"The deadline passed while connecting to {address}.") from None
            raise ConnectFailed(f"Cannot connect to {address} within {self._connect_timeout} s.") from None
        except OSError as error:
            raise ConnectFailed(f"Cannot connect to {address}: {error.strerror or 'it does not accept'}.") from error
        if not connection.is_quiet():
            connection.abort()
            raise ConnectFailed(f"{address} accepts connections and closes them at once.")
        return connection

    def _opened(self, connection: Connection) -> None:
        self._open.add(connection)
        if self._closed is not None:
            connection.abort()

    def _released(self, connection: Connection) -> None:
        idle = self._idle.setdefault(connection.address, deque())
        if len(idle) >= self._max_idle:
            connection.abort()
            return
        assert self._loop is not None
        loop = self._loop
        connection.idle_since = loop.time()
        idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._idle_timeout, self._sweep)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        expired = loop.time() - self._idle_timeout
        for address, idle in list(self._idle.items()):
            while idle and idle[0].idle_since <= expired:
                idle.popleft().abort()
            if not idle:
                del self._idle[address]
        oldest = min((idle[0].idle_since for idle in self._idle.values()), default=None)
        self._sweeper = None if oldest is None else loop.call_at(oldest + self._idle_timeout, self._sweep)

    def _lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        idle = self._idle.get(connection.address)
        if idle is not None and connection in idle:
            idle.remove(connection)
            if not idle:
                del self._idle[connection.address]
        if self._closed is not None and not self._open and not self._closed.done():
            self._closed.set_result(None)
