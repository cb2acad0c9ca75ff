"""The HTTP server: takes connections until it is told to stop, and lets what is under way finish then."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.http_protocol import HEAD_SECONDS, Application, Connection
from servicekit.errors import StartError

BACKLOG = 2048

SILENT_SECONDS = 60
"""How long a connection says nothing before the kernel asks whether the other side is there."""


def bound(listen: str) -> socket.socket:
    """A socket that listens on `host:port`; raises StartError."""
    host, _, port = listen.rpartition(":")
    try:
        listening = socket.create_server(
            (host.strip("[]"), int(port)),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=BACKLOG,
        )
    except OSError as error:
        raise StartError(f"Cannot listen on {listen}: {error.strerror}.") from None
    # Inherited by what is accepted. uvloop sets it by itself; asyncio does not, and an answer would wait for 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # So that a connection ends whose peer vanished without a word.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):  # not everywhere
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
    # A caller whose network is gone does not hang up: one who follows a stream would be taken for there for ever.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_SECONDS)
    return listening


@asynccontextmanager
async def serving(
    application: Application, listening: socket.socket, context: ssl.SSLContext | None, *, drain_seconds: float
) -> AsyncIterator[None]:
    """Answers requests with `application` while the context lasts; over TLS where there is a `context` for it.

    What is under way then may take so many seconds to finish.
    """
    loop = asyncio.get_running_loop()
    connections: set[Connection] = set()
    server = await loop.create_server(
        lambda: Connection(application, connections, loop),
        sock=listening,
        backlog=BACKLOG,
        ssl=context,
        ssl_handshake_timeout=None if context is None else HEAD_SECONDS,
    )
    try:
        yield
    finally:
        server.close()
        for connection in connections:
            connection.stop()
        await _over(connections, drain_seconds)
        for connection in connections:
            connection.abandon()
        await _over(connections)


async def _over(connections: set[Connection], timeout: float | None = None) -> None:
    if pending := [each for connection in connections for each in connection.pending()]:
        await asyncio.wait(pending, timeout=timeout)
