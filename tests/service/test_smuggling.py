"""What one client sends as one request reaches a model as one, whatever its framing pretends (S30)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.gateway import Platform, platform, routes
from tests.support.sockets import short_directory

HEAD = b"POST /serving-endpoints/ep/invocations HTTP/1.1\r\nhost: x\r\nauthorization: Bearer owner-token\r\n"
SMUGGLED = b"POST /smuggled HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
WHOLE = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)

REFUSED = {
    "length and chunks": b"content-length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + SMUGGLED,
    "chunks and length": CHUNKED + b"content-length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": b"content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "two lengths in one": b"content-length: 0, %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "a signed length": b"content-length: +%d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "a negative length": b"content-length: -1\r\n\r\n" + SMUGGLED,
    "a length in hex": b"content-length: 0x10\r\n\r\n" + SMUGGLED,
    "a blank before the colon": b"content-length : %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "a tab before the colon": b"transfer-encoding\t: chunked\r\n\r\n" + WHOLE,
    "an unknown coding": b"transfer-encoding: xchunked\r\n\r\n" + WHOLE,
    "chunked and something after": b"transfer-encoding: chunked, identity\r\n\r\n" + WHOLE,
    "a NUL in a value": b"transfer-encoding: chun\0ked\r\n\r\n" + WHOLE,
    "a size that is no number": CHUNKED + b"\r\nzz\r\n" + SMUGGLED,
    "a signed size": CHUNKED + b"\r\n+5\r\nhello\r\n0\r\n\r\n" + SMUGGLED,
    "a size beyond all numbers": CHUNKED + b"\r\nfffffffffffffffffff\r\n" + SMUGGLED,
}
"""Nobody can say where such a request ends, so nothing after its head is one."""

TAKEN = {
    "a length": b"content-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "chunks": CHUNKED + b"\r\n" + WHOLE,
    "chunks in capitals": b"Transfer-Encoding: CHUNKED\r\n\r\n" + WHOLE,
    "an extension of a chunk": CHUNKED + b"\r\n%x;a=b\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
    "trailers that are credentials": CHUNKED
    + b"\r\n%x\r\n%b\r\n0\r\ncookie: session=1\r\nauthorization: Bearer other\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
    "hop by hop": b"connection: keep-alive, x-secret\r\nx-secret: 1\r\nkeep-alive: 9\r\nte: trailers\r\n"
    b"proxy-authorization: Basic x\r\nupgrade: h2c\r\nhttp2-settings: x\r\ncookie: session=1\r\n"
    b"content-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
}
"""One request each, however much its body looks like another."""


class Model:
    """A model server that keeps what it reads, byte for byte, and answers each request that it makes out."""

    def __init__(self) -> None:
        self.requests: list[tuple[bytes, bytes]] = []
        """Head and body of each."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                assert (b"content-length" in lines) != (b"transfer-encoding" in lines), head
                if b"content-length" in lines:
                    body = await reader.readexactly(int(lines[b"content-length"]))
                else:
                    body = b""
                    while size := int(await reader.readline(), 16):
                        body += (await reader.readexactly(size + 2))[:-2]
                    assert await reader.readline() == b"\r\n"
                self.requests.append((head, body))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@pytest.fixture
async def model() -> Model:
    return Model()


@pytest.fixture
async def gateway(model: Model) -> AsyncIterator[Platform]:
    with short_directory() as directory:
        server = await asyncio.start_unix_server(model.serve, directory / "model.sock")
        async with server, platform() as running:
            await running.publish(routes("ep", ("m-1", 100, [("r-1", f"unix:{directory}/model.sock")])))
            yield running


async def said(gateway: Platform, request: bytes) -> bytes:
    """All that is answered until the connection is closed."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("name", REFUSED)
async def test_a_request_without_one_clear_end_reaches_no_model_and_nothing_after_it_does(
    gateway: Platform, model: Model, name: str
) -> None:
    answers = await said(gateway, HEAD + REFUSED[name])
    assert answers.count(b"HTTP/1.1 ") <= 1
    assert answers.startswith(b"HTTP/1.1 400 ") or answers == b"", answers[:300]
    assert model.requests == []


@pytest.mark.parametrize("name", TAKEN)
async def test_one_request_is_one_for_the_model_and_brings_nothing_that_is_the_gateways(
    gateway: Platform, model: Model, name: str
) -> None:
    answers = await said(gateway, HEAD + TAKEN[name] + b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n")
    assert answers.count(b"HTTP/1.1 200 ") == answers.count(b"HTTP/1.1 ") == 2  # the second is where it should begin
    ((head, body),) = model.requests
    assert body == SMUGGLED
    names = {line.split(b":")[0].lower() for line in head.split(b"\r\n")[1:] if line}
    assert names <= {b"host", b"content-length", b"transfer-encoding"}
    assert b"token" not in head
