"""The HTTP server: takes connections until it is told to stop, and lets what is under way finish then.

A connection costs its caller nothing, and us a descriptor, of which replicas need some, too. So there are at most so
many connections, and beyond them the one that has been idle for longest gives way.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.http_protocol import HEAD_SECONDS, Application, Connection, Connections
from servicekit.errors import StartError

BACKLOG = 2048

SILENT_SECONDS = 60
"""How long a connection says nothing before the kernel asks whether the other side is there."""


KEPT_DESCRIPTORS = 4
"""This part of the files that the process may have open is not for connections from outside."""


def most_connections() -> int:
    """How many connections there may be, by the files that this process may have open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return files - files // KEPT_DESCRIPTORS


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
    # A caller whose network is gone does not hang up, and one who follows a stream would be taken for there for ever.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", SILENT_SECONDS), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):  # not everywhere
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
    return listening


@asynccontextmanager
async def serving(
    application: Application, listening: socket.socket, context: ssl.SSLContext | None, *, drain_seconds: float
) -> AsyncIterator[None]:
    """Answers requests with `application` while the context lasts; over TLS where there is a `context` for it.

    What is under way then may take so many seconds to finish.
    """
    loop = asyncio.get_running_loop()
    connections = Connections(most_connections())
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
        connections.stop()
        await _over(connections, drain_seconds)
        for connection in connections.all:
            connection.abandon()
        await _over(connections)


async def _over(connections: Connections, timeout: float | None = None) -> None:
    if pending := [each for connection in connections.all for each in connection.pending()]:
        await asyncio.wait(pending, timeout=timeout)
