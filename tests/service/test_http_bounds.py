"""What the gateway takes from somebody it does not know yet: heads of bounded size, in bounded time, one at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from gateway import http_protocol
from tests.support.gateway import Platform, platform

ENOUGH = 4 * 1024 * 1024


@pytest.fixture(scope="module")
async def gateway() -> AsyncIterator[Platform]:
    async with platform() as one:
        yield one


async def spoken(gateway: Platform, *pieces: bytes) -> bytes:
    """All that the gateway says on one connection until it closes it."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(30):
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
            except ConnectionError:
                pass  # it stopped listening; what it said before is still to be read
            said = b""
            while True:
                try:
                    piece = await reader.read(65_536)
                except ConnectionError:
                    return said
                if not piece:
                    return said
                said += piece
    finally:
        writer.close()


def head(*headers: bytes, target: bytes = b"/health") -> bytes:
    """A request that asks for the connection to be closed, which counts as one of its headers."""
    return b"GET %b HTTP/1.1\r\n%b\r\n" % (target, b"".join(one + b"\r\n" for one in (b"connection: close", *headers)))


def problem(said: bytes) -> str:
    """The message of a refusal in the documented envelope."""
    assert said.startswith(b"HTTP/1.1 400 "), said[:200]
    document = json.loads(said.partition(b"\r\n\r\n")[2])
    assert document["error_code"] == "MALFORMED_REQUEST"
    return str(document["message"])


async def test_a_hundred_headers_are_taken_and_one_more_is_not(gateway: Platform) -> None:
    assert (await spoken(gateway, head(*[b"a: b"] * 99))).startswith(b"HTTP/1.1 200 ")
    assert "100 headers" in problem(await spoken(gateway, head(*[b"a: b"] * 100)))


async def test_headers_of_16_kib_are_taken_and_one_more_byte_is_not(gateway: Platform) -> None:
    fitting = http_protocol.LONGEST_HEADERS - len(b"connectioncloseab") + 1
    assert (await spoken(gateway, head(b"a: " + b"b" * fitting))).startswith(b"HTTP/1.1 200 ")
    assert "16384 bytes" in problem(await spoken(gateway, head(b"a: " + b"b" * (fitting + 1))))


async def test_a_target_of_16_kib_is_taken_and_one_more_byte_is_not(gateway: Platform) -> None:
    longest = b"/health?" + b"a" * (http_protocol.LONGEST_TARGET - 8)
    assert (await spoken(gateway, head(target=longest))).startswith(b"HTTP/1.1 200 ")
    assert "16384 bytes" in problem(await spoken(gateway, head(target=longest + b"a")))


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /health HTTP/1.1\r\na: ", b"b" * 1024),
        (b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1;", b"b" * 1024),
        (b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 256),
    ],
    ids=["header", "chunk extension", "trailers"],
)
async def test_framing_without_end_costs_the_connection(gateway: Platform, begin: bytes, more: bytes) -> None:
    await spoken(gateway, begin, *[more] * (ENOUGH // len(more)))


async def test_a_trailer_takes_no_headers_place(gateway: Platform) -> None:
    said = await spoken(
        gateway,
        b"POST /telemetry-ext HTTP/1.1\r\nauthorization: Bearer owner-token\r\nconnection: close\r\n"
        b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nauthorization: Bearer nonsense\r\n\r\n",
    )
    assert said.startswith(b"HTTP/1.1 200 ")


async def test_no_more_than_a_few_requests_wait_on_one_connection(gateway: Platform) -> None:
    flood = b"GET /health HTTP/1.1\r\n\r\n" * 10_000
    assert (await spoken(gateway, flood)).count(b"HTTP/1.1 ") < 1_000


async def test_what_is_no_request_gets_the_envelope_and_never_another_requests_turn(gateway: Platform) -> None:
    assert "valid" in problem(await spoken(gateway, b"nonsense\r\n\r\n"))
    assert b"HTTP/1.1 400" not in await spoken(gateway, b"GET /health HTTP/1.1\r\n\r\nnonsense\r\n\r\n")


@pytest.mark.parametrize("begin", [b"", b"GET /health HTTP/1.1\r\na: "], ids=["nothing", "half a head"])
async def test_who_never_ends_a_head_is_hung_up_on(
    gateway: Platform, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    assert await spoken(gateway, begin) == b""


async def test_a_kept_connection_is_hung_up_on_in_the_middle_of_a_later_head(
    gateway: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.2)
    said = await spoken(gateway, b"GET /health HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.1\r\na: ")
    assert said.count(b"HTTP/1.1 200 ") == 1
