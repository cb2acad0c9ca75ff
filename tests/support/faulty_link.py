"""A link between two processes that fails as it is told to: a proxy, in this process, for streams of bytes.

Each failure also meets the connections that there are. What was swallowed does not come back when the link is healed:
its connections are cut then, as those of a network that forgot them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

DELAY_SECONDS = 0.3


class FaultyLink:
    """The link; `address` is where to connect instead, as gRPC names it."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.connections = 0
        """How many were ever made."""
        self._target = target
        self._fault = "none"
        self._open: set[asyncio.StreamWriter] = set()

    def heal(self) -> None:
        """Has it work again, for connections that are made from now on."""
        self._fault = "none"
        self._end()

    def swallow(self) -> None:
        """Has it take everything, pass on nothing, and close nothing."""
        self._fault = "swallow"

    def delay(self) -> None:
        """Has everything that is said take its time."""
        self._fault = "delay"

    def slice(self) -> None:
        """Has everything arrive byte by byte."""
        self._fault = "slice"

    def cut(self) -> None:
        """Has every connection end, and new ones too, at once."""
        self._fault = "cut"
        self._end()

    def reset(self) -> None:
        """As `cut`, without a goodbye."""
        self._fault = "reset"
        self._end()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes one connection on."""
        self.connections += 1
        self._open.add(writer)
        try:
            if self._fault in ("cut", "reset"):
                return
            there_reader, there = await _connected(self._target)
            self._open.add(there)
            try:
                await _both(self._pass(reader, there), self._pass(there_reader, writer))
            finally:
                self._open.discard(there)
                there.close()
        except OSError:
            pass
        finally:
            self._open.discard(writer)
            self._close(writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            if self._fault == "swallow":
                continue
            if self._fault == "delay":
                await asyncio.sleep(DELAY_SECONDS)
            pieces = [data[at : at + 1] for at in range(len(data))] if self._fault == "slice" else [data]
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if len(pieces) > 1:
                    await asyncio.sleep(0)  # so that it is sent by itself

    def _end(self) -> None:
        for writer in list(self._open):
            self._close(writer)

    def _close(self, writer: asyncio.StreamWriter) -> None:
        if self._fault == "reset":
            raw = cast(socket.socket, writer.get_extra_info("socket"))
            if raw.family != socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()


FAULTS: dict[str, Callable[[FaultyLink], None]] = {
    "swallow": FaultyLink.swallow,
    "delay": FaultyLink.delay,
    "slice": FaultyLink.slice,
    "cut": FaultyLink.cut,
    "reset": FaultyLink.reset,
}
"""All ways in which a link fails."""


@asynccontextmanager
async def faulty(target: str, *, at: Path | None = None) -> AsyncIterator[FaultyLink]:
    """A link to `target`, which is `host:port` or `unix:/path`; it is there itself at a path, or on a free port."""
    link = FaultyLink(target)
    if at is not None:
        server = await asyncio.start_unix_server(link.serve, at)
        link.address = f"unix:{at}"
    else:
        server = await asyncio.start_server(link.serve, "127.0.0.1", 0)
        link.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield link
    finally:
        server.close()
        link.heal()


async def _connected(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if target.startswith("unix:"):
        return await asyncio.open_unix_connection(target.removeprefix("unix:"))
    host, _, port = target.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _both(*ways: Coroutine[Any, Any, None]) -> None:
    """Until one way has ended: then the connection has."""
    tasks = [asyncio.create_task(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
