"""The way between services on different machines: mutual TLS, from the socket of one to the socket of the other.

Services talk over Unix sockets, one for each caller and callee. Where the callee is on another machine, the caller's
process has that socket and takes what comes there to the callee's machine, where the callee's process hands it to the
socket that it has for this caller. So what a peer may call is decided where it always is, by the listener that it
reaches, and this module only decides which one that is: by the certificate, and by nothing that the peer says.

A connection begins with the name of a door, `rpc` or `replica/<id>`, and a line break. It is answered `ok` and a line
break once somebody is behind that door, and closed otherwise; from there on bytes pass both ways until either end
closes. gRPC of Python could do less: its channels keep the certificate that they began with, verify no URI, and its
listeners do not say whom they turned away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from servicekit import background
from servicekit.errors import StartError
from servicekit.pace import HEARD_PER_MINUTE, Flood
from servicekit.peers import PeerCertificate, PeerRefused
from servicekit.source import owner

log = logging.getLogger(__name__)

RPC = "rpc"
"""The door of the listener for RPCs."""

REPLICA = "replica/"
"""What the door of a replica begins with; its id follows."""

GREETING_SECONDS = 5.0
"""How long a peer may take from connecting to the end of the greeting."""

STRANGERS = 64
"""How many connections may be in their greeting at a time; others wait unaccepted."""

_LONGEST_DOOR = 128
_PIECE = 256 * 1024
_OK = b"ok\n"

Doors = Callable[[str, str], str | None]
"""The path of the Unix socket for a caller and a door; None when there is none for it."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Unreachable(OSError):
    """A peer could not be reached, or one of the two did not let the other in; the text says why."""


@asynccontextmanager
async def admitting(listen: str, certificate: PeerCertificate, doors: Doors) -> AsyncIterator[str]:
    """Lets peers in at `host:port`, each through its own doors, until left; yields the address. Raises StartError."""
    host, _, port = listen.rpartition(":")
    try:
        listening = socket.create_server(
            (host.strip("[]"), int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=STRANGERS
        )
    except OSError as error:
        raise StartError(f"Cannot listen on {listen} for peers: {error.strerror}.") from None
    listening.setblocking(False)
    with listening:
        async with _Entrance(listening, certificate, doors).open():
            yield f"{host}:{listening.getsockname()[1]}"


class Way:
    """The way to the service `callee` at `host:port`."""

    def __init__(self, address: str, callee: str, certificate: PeerCertificate) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._callee = callee
        self._certificate = certificate
        self._pumps = _Tasks()
        self._problem: str | None = None

    @asynccontextmanager
    async def leading_from(self, path: str) -> AsyncIterator[None]:
        """Takes what comes to the Unix socket at `path` to the callee's listener, until left. Raises StartError."""
        if await _is_answered(path):
            raise StartError(f"{path} is in use: {self._callee} runs on this machine too, or this service does twice.")

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                there = await self._opened(RPC)
            except Unreachable:
                writer.transport.abort()
                return
            await _joined((reader, writer), there)

        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._pumps.close)
            server = await asyncio.start_unix_server(
                lambda reader, writer: self._pumps.start(pass_on(reader, writer)), path, limit=_PIECE
            )
            stack.callback(server.close)
            yield

    async def dial(self, door: str) -> socket.socket:
        """A connection to what is behind a door; raises Unreachable. Before that no byte of the caller's is sent."""
        there = await self._opened(door)
        with contextlib.ExitStack() as undoing:  # who dialled may be gone, or no descriptor be left
            undoing.callback(there[1].transport.abort)
            ours, theirs = socket.socketpair()
            undoing.callback(ours.close)
            theirs.setblocking(False)
            near = await asyncio.open_unix_connection(sock=theirs, limit=_PIECE)
            undoing.pop_all()
        self._pumps.start(_joined(near, there))
        ours.setblocking(False)
        return ours

    async def _opened(self, door: str) -> Streams:
        writer = None
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                reader, writer = await asyncio.open_connection(
                    self._host.strip("[]"), self._port, ssl=self._certificate.as_client, limit=_PIECE
                )
                name = self._certificate.name_of(writer.get_extra_info("ssl_object"))
                if name != self._callee:
                    raise PeerRefused(f"it is {name}")
                writer.write(f"{door}\n".encode("ascii"))
                if await reader.readline() != _OK:
                    raise PeerRefused("it closed the connection; its log says why")
        except (PeerRefused, OSError, TimeoutError) as error:
            if writer is not None:
                writer.transport.abort()
            cause = _cause(error)
            # A replica that is gone is no news of the machine that it was on.
            if door == RPC:
                self._note(cause)
            raise Unreachable(f"{self._callee} is not reached: {cause}.") from None
        except BaseException:
            if writer is not None:
                writer.transport.abort()
            raise
        self._note(None)
        return reader, writer

    def _note(self, problem: str | None) -> None:
        """Logs what has changed: attempts follow each other quickly while a peer is away."""
        if problem != self._problem:
            self._problem = problem
            facts = {"peer": self._callee, "address": f"{self._host}:{self._port}"}
            if problem is None:
                log.info("peer reached", extra=facts)
            else:
                log.warning("peer not reached", extra={**facts, "cause": problem})


class _Entrance:
    """Where connections of peers arrive."""

    def __init__(self, listening: socket.socket, certificate: PeerCertificate, doors: Doors) -> None:
        self._listening = listening
        self._certificate = certificate
        self._doors = doors
        self._strangers = asyncio.Semaphore(STRANGERS)
        self._refusals = Flood(HEARD_PER_MINUTE)
        self._pumps = _Tasks()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        try:
            async with background.running({"peers": self._accept}):
                yield
        finally:
            await self._pumps.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._strangers.acquire()
            try:
                connection, address = await loop.sock_accept(self._listening)
            except OSError as error:  # out of descriptors, most likely
                self._strangers.release()
                log.error("peers cannot connect", extra={"cause": error.strerror})
                await asyncio.sleep(1)
                continue
            self._pumps.start(self._serve(connection, address[0]))

    async def _serve(self, connection: socket.socket, source: str) -> None:
        try:
            both = await self._admitted(connection, source)
        finally:
            self._strangers.release()
        if both is not None:
            await _joined(*both)

    async def _admitted(self, connection: socket.socket, source: str) -> tuple[Streams, Streams] | None:
        """The connection, and the one to what is behind its door; None when it was not let in, which is logged."""
        writer = None
        caller = ""
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                reader, writer = await _secured(connection, self._certificate.as_server)
                caller = self._certificate.name_of(writer.get_extra_info("ssl_object"))
                door = await _door(reader)
                path = self._doors(caller, door)
                if path is None:
                    raise PeerRefused("there is no such door for it")
                try:
                    inside = await asyncio.open_unix_connection(path, limit=_PIECE)
                except OSError:  # a replica that has just ended, or a service that is about to
                    writer.close()
                    return None
                writer.write(_OK)
                return (reader, writer), inside
        except (PeerRefused, OSError, TimeoutError, EOFError, asyncio.LimitOverrunError) as error:
            self._tell(source, caller or "unknown", _cause(error))
            if writer is not None:
                writer.transport.abort()
            return None
        except BaseException:
            if writer is not None:
                writer.transport.abort()
            raise

    def _tell(self, source: str, caller: str, cause: str) -> None:
        """Logs that a peer was turned away, unless too many from there were."""
        if not self._refusals.wait(owner(source)):
            log.warning("peer refused", extra={"source": source, "peer": caller, "cause": cause})
        elif self._refusals.begins(owner(source)):
            log.warning("too many peers refused, no more of this address are logged", extra={"source": source})


async def _secured(connection: socket.socket, context: ssl.SSLContext) -> Streams:
    """The connection after its handshake; raises what is wrong with it."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader = asyncio.StreamReader(limit=_PIECE)
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _door(reader: asyncio.StreamReader) -> str:
    line = await reader.readuntil(b"\n")
    try:
        return line[:_LONGEST_DOOR].decode("ascii").removesuffix("\n")
    except UnicodeDecodeError:
        raise PeerRefused("it did not name a door") from None


async def _joined(one: Streams, other: Streams) -> None:
    """Passes bytes both ways until either end closes, and what was said by then has been passed on."""
    ways = [asyncio.create_task(_pumped(one[0], other[1])), asyncio.create_task(_pumped(other[0], one[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for _, writer in (one, other):
            writer.close()
    except BaseException:
        for _, writer in (one, other):
            writer.transport.abort()
        raise
    finally:
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)


async def _pumped(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()


async def _is_answered(path: str) -> bool:
    """Whether somebody listens at a Unix socket; a file that was left behind is nobody."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    return True


def _cause(error: BaseException) -> str:
    """What went wrong, in words that are a library's or ours."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or 'the handshake was broken off'}"
    if isinstance(error, TimeoutError):
        return f"it took longer than {GREETING_SECONDS:g} s"
    if isinstance(error, OSError):
        return error.strerror or "the connection broke"
    if isinstance(error, EOFError):
        return "it said nothing"
    return str(error)


class _Tasks:
    """What is under way, and its end."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
