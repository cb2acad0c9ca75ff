"""An OpenID Connect issuer in this process, and others that are named for how they misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.jwt_forgery import Mint, another_key, public_jwk

AUDIENCE = "tessera-test"
DISCOVERY = "/.well-known/openid-configuration"
KEYS = "/keys"


class Issuer:
    """Answers discovery and keys, and counts how often it is asked; `key` is the one that it signs with."""

    def __init__(self, algorithm: str = "EdDSA") -> None:
        self.algorithm = algorithm
        self.key = another_key(algorithm)
        self.documents: list[dict[str, Any]] = [public_jwk(self.key, "k1")]
        self.url = ""
        self.asked: list[str] = []
        self.writers: set[asyncio.StreamWriter] = set()

    @property
    def fetches(self) -> int:
        """How often the keys were asked for."""
        return self.asked.count(KEYS)

    def mint(self, sub: str = "bob", **claims: Any) -> Mint:
        """Tokens about somebody, good for ten minutes."""
        issued = int(time.time())
        good = {"iss": self.url, "aud": AUDIENCE, "sub": sub, "iat": issued, "exp": issued + 600, **claims}
        return Mint(self.algorithm, {"kid": "k1", "typ": "JWT"}, good, self.key, another_key(self.algorithm))

    def discovery(self) -> dict[str, Any]:
        return {"issuer": self.url, "jwks_uri": f"{self.url}{KEYS}"}

    def document(self, path: str) -> bytes:
        found = {DISCOVERY: self.discovery(), KEYS: {"keys": self.documents}}
        return json.dumps(found[path]).encode()

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        self.send(writer, self.document(path))

    def send(self, writer: asyncio.StreamWriter, body: bytes, *, status: str = "200 OK", more: str = "") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        writer.write(head.encode() + body)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked.append(head.split(b" ")[1].decode())
            await self.answer(self.asked[-1], writer)
            await writer.drain()
        writer.close()


class FailingIssuer(Issuer):
    """Answers every request with an error, whatever it says besides."""

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        self.send(writer, self.document(path), status="503 Service Unavailable")


class SilentIssuer(Issuer):
    """Takes requests and says nothing."""

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()


class DrippingIssuer(Issuer):
    """Answers so slowly that no single read ever takes too long."""

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)


class HugeIssuer(Issuer):
    """Answers with `size` bytes: by default one more than anybody should listen to."""

    size = 256 * 1024 + 1

    def document(self, path: str) -> bytes:
        return super().document(path).ljust(self.size)


class EndlessIssuer(Issuer):
    """Never comes to an end; `sent` is how many bytes it got rid of."""

    sent = 0

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n{")
        while True:
            writer.write(b" " * 65_536)
            await writer.drain()
            self.sent += 65_536


class RedirectingIssuer(Issuer):
    """Sends everybody to `elsewhere`."""

    elsewhere = ""

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        self.send(writer, self.document(path), status="302 Found", more=f"Location: {self.elsewhere}{path}\r\n")


class LyingIssuer(Issuer):
    """Says that it is another one."""

    def discovery(self) -> dict[str, Any]:
        return {**super().discovery(), "issuer": "https://other.example.com"}


class BabblingIssuer(Issuer):
    """Answers with what is no JSON."""

    async def answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        self.send(writer, b"<html>")


class KeylessIssuer(Issuer):
    """Has no key that could verify anything: symmetric, private, too small, for encryption, of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.documents = [
            {"kty": "oct", "kid": "k1", "k": "c2VjcmV0"},
            {**self.documents[0], "d": "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"},
            {**self.documents[0], "use": "enc"},
            {"kty": "new", "kid": "k1"},
            {"kid": "k1"},
        ]


@asynccontextmanager
async def serving(
    issuer: Issuer, *, host: str = "127.0.0.1", context: ssl.SSLContext | None = None
) -> AsyncIterator[Issuer]:
    """Listens on a free port of this machine, which becomes the issuer's name; with `context` over TLS."""
    server = await asyncio.start_server(issuer.serve, host, 0, ssl=context)
    issuer.url = f"{'http' if context is None else 'https'}://{host}:{server.sockets[0].getsockname()[1]}"
    try:
        yield issuer
    finally:
        server.close()
        for writer in issuer.writers:
            writer.close()


@contextlib.contextmanager
def serving_in_a_thread(issuer: Issuer) -> Iterator[Issuer]:
    """The same for tests that block."""
    loop = asyncio.new_event_loop()
    started, ended = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with serving(issuer):
            started.set()
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])
    thread.start()
    try:
        assert started.wait(10)
        yield issuer
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()
