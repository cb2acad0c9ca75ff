"""Input that was made to cost a lot: refused in bounded time of the processor, and in bounded memory (S25).

Both are those of this process, in which the services are and the one who sends, so the bounds are wider than what a
service alone needs. The processor's time does not depend on what else the machine does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import psutil
import pytest

from gateway import app, http
from gateway.json_codec import MAX_DEPTH
from servicekit import grpc_server, interceptors
from tessera.identity.v1 import identity_pb2
from tessera.secrets.v1 import secrets_pb2
from tests.support.eventually import eventually
from tests.support.gateway import Platform, platform
from tests.support.http import Answer, fetch
from tests.support.secrets import INVALID_TOKEN, RunningSecrets, refusal, running_secrets

MOST_SECONDS = 5.0
"""Of the processor, for one input: one second on the machine that the bound is stated for."""

MOST_BYTES = 128 << 20

USERS = "/api/2.0/preview/scim/v2/Users"
PUT = "/api/2.0/secrets/put"


@pytest.fixture(scope="module")
async def gateway() -> AsyncIterator[Platform]:
    async with platform() as one:
        yield one


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


@contextmanager
def cheap() -> Iterator[None]:
    """Fails when what is done within takes much of the processor or of memory."""
    process = psutil.Process()
    memory, seconds = process.memory_info().rss, time.process_time()
    yield
    assert time.process_time() - seconds < MOST_SECONDS
    assert process.memory_info().rss - memory < MOST_BYTES


async def post(gateway: Platform, path: str, body: bytes | AsyncIterator[bytes]) -> Answer:
    return await fetch(gateway.url, "POST", path, token="owner-token", body=body)


# --- JSON

BOMBS = {
    "lists in lists": b"[" * 500_000,
    "closed, too": b"[" * 500_000 + b"]" * 500_000,
    "objects in objects": b'{"a":' * 200_000,
    "in a field that is known": b'{"emails":' + b"[" * 500_000,
    "many objects": b'{"emails":[' + b"{}," * 300_000 + b"{}]}",
    "many strings": b'{"schemas":[' + b'"",' * 300_000 + b'""]}',
    "many names": b"{" + b",".join(b'"%d":0' % number for number in range(100_000)) + b"}",
    "one name again and again": b"{" + b'"userName":"a",' * 60_000 + b'"userName":"a"}',
    "a long number": b'{"active":' + b"9" * 1_000_000 + b"}",
    "a long exponent": b'{"active":1e' + b"9" * 1_000_000 + b"}",
    "a long string": b'{"userName":"' + b"\\u0000" * 170_000 + b'"}',
    "half a string": b'{"userName":"' + b"a" * 1_000_000,
    "no text": b"\xff" * 1_000_000,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
async def test_json_that_is_made_to_cost_a_lot_does_not(gateway: Platform, bomb: bytes) -> None:
    assert len(bomb) <= app.CONTROL_BODY_LIMIT
    with cheap():
        answer = await post(gateway, USERS, bomb)
    # What is no bomb to us after all is answered by the service.
    assert answer.status in (400, 501, 503), answer.body
    assert (await fetch(gateway.url, "GET", "/health")).status == 200


async def test_json_is_as_deep_as_it_may_be_and_not_deeper(gateway: Platform) -> None:
    def nested(levels: int) -> bytes:
        return b'{"unknown":' * levels + b"0" + b"}" * levels

    assert (await post(gateway, USERS, nested(MAX_DEPTH))).json()["status"] == "501"
    refused = await post(gateway, USERS, nested(MAX_DEPTH + 1))
    assert (refused.status, str(MAX_DEPTH) in refused.json()["detail"]) == (400, True)


# --- bodies that come slowly, in pieces, or not at all


async def test_a_body_in_pieces_of_a_byte_is_taken(gateway: Platform) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"userName": "'
        for _ in range(20_000):
            yield b"a"
        yield b'"}'

    with cheap():
        assert (await post(gateway, USERS, pieces())).status == 501


async def test_a_body_that_does_not_come_is_given_up(gateway: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS", 0.3)
    host, port = gateway.url.removeprefix("http://").split(":")
    head = b"POST %b HTTP/1.1\r\nauthorization: Bearer owner-token\r\ncontent-length: 100\r\n\r\n{"
    connections = [await asyncio.open_connection(host, int(port)) for _ in range(50)]
    try:
        for _, writer in connections:
            writer.write(head % PUT.encode())
        async with asyncio.timeout(60):
            for reader, _ in connections:
                assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
                await reader.readuntil(b"Send it at once")
    finally:
        for _, writer in connections:
            writer.close()


async def test_half_a_request_whose_sender_is_gone_leaves_nothing(gateway: Platform) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    before = len(asyncio.all_tasks())
    for said in (b"", b"POST /x", b"POST /x HTTP/1.1\r\ncontent-length: 100\r\n\r\n{"):
        for _ in range(50):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(said)
            writer.transport.abort()
    await eventually(lambda: len(asyncio.all_tasks()) <= before, within=60, what="nothing is under way")


# --- messages over gRPC


def _field(message: Any, name: str) -> int:
    return int(message.DESCRIPTOR.fields_by_name[name].number)


def _length(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def _nested(message: Any, name: str, levels: int) -> bytes:
    """As many messages within each other."""
    raw = b""
    for _ in range(levels):
        raw = bytes([_field(message, name) << 3 | 2]) + _length(len(raw)) + raw
    return raw


_GROUPS = b"\x0b" * 100_000  # a group that begins, again and again, and never ends
_EMAILS = bytes([_field(identity_pb2.CreateUserRequest, "emails") << 3 | 2, 0])

MESSAGES = {
    "truncated": secrets_pb2.PutSecretRequest(scope="a", key="b", string_value="c" * 100).SerializeToString()[:-50],
    "longer than it is": b"\x0a\xff\xff\xff\xff\x07a",
    "a length without end": b"\x0a" + b"\xff" * 100_000,
    "groups in groups": _GROUPS,
    "no field": b"\x00" * 100_000,
    "unknown fields": b"\xf8\xff\xff\xff\x0f\x01" * 150_000,
    "no text": b"\x0a\x04\xff\xff\xff\xff",
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
async def test_message_that_is_none_is_refused(service: RunningSecrets, message: bytes) -> None:
    call: Any = service.public_channel.unary_unary("/tessera.secrets.v1.Secrets/PutSecret")
    with cheap():
        refused = await refusal(call(message, metadata=service.admin.metadata, timeout=30))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_message_of_very_many_parts_is_refused_before_anybody_goes_through_them(service: RunningSecrets) -> None:
    """Each of two bytes becomes one of a hundred and more."""
    call: Any = service.public_channel.unary_unary("/tessera.identity.v1.Scim/CreateUser")
    bomb = _EMAILS * (grpc_server.LONGEST_REQUEST // 2)
    fitting = _EMAILS * interceptors.MOST_ELEMENTS
    for message, words in (
        (fitting, "userName"),
        (fitting + _EMAILS, "10000 elements"),
        (bomb, "10000 elements"),
        (bomb + _EMAILS, "1048576 bytes"),
        (bomb * 3, "1048576 bytes"),
    ):
        with cheap():
            refused = await refusal(call(message, metadata=service.admin.metadata, timeout=60))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in refused.message


async def test_a_call_whose_message_does_not_come_keeps_nobody_waiting(service: RunningSecrets) -> None:
    """A stream is opened, and nothing is sent on it: as over a connection that breaks down in the middle."""
    silent: list[Any] = []
    for _ in range(50):
        call: Any = service.public_channel.stream_unary("/tessera.secrets.v1.Secrets/ListScopes")
        silent.append(call(metadata=service.admin.metadata, timeout=60))
    await service.admin(service.admin.secrets.ListScopes, secrets_pb2.ListScopesRequest())
    for call in silent:
        call.cancel()
    await service.admin(service.admin.secrets.ListScopes, secrets_pb2.ListScopesRequest())


async def test_metadata_without_end_is_refused(service: RunningSecrets) -> None:
    call: Any = service.public_channel.unary_unary("/tessera.secrets.v1.Secrets/ListScopes")
    flood = tuple((f"x-{number}", "a" * 100) for number in range(1_000))
    with cheap():
        refused = await refusal(call(b"", metadata=(*service.admin.metadata, *flood), timeout=30))
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await service.admin(service.admin.secrets.ListScopes, secrets_pb2.ListScopesRequest())


# --- ten thousand wrong tokens


async def _guessed(guesses: int) -> None:
    """S11: after twenty of an address nearly all are told to wait, and a good token is taken all the while."""
    async with running_secrets(failed_logins=10) as service:
        answers: dict[str, int] = {}
        began = time.monotonic()

        async def guess(number: int) -> None:
            caller = service.public(f"wrong-{number}")
            refused = await refusal(caller(caller.secrets.ListScopes, secrets_pb2.ListScopesRequest()))
            answers[refused.code.name] = answers.get(refused.code.name, 0) + 1
            assert refused.answer == INVALID_TOKEN or refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED

        for start in range(0, guesses, 50):
            await asyncio.gather(*(guess(number) for number in range(start, start + 50)))
            await service.admin(service.admin.secrets.ListScopes, secrets_pb2.ListScopesRequest())
        # Twenty, and ten for each minute that this took.
        assert answers.pop("PERMISSION_DENIED") <= 20 + 1 + (time.monotonic() - began) / 6
        assert sum(answers.values()) >= guesses * 0.9


async def test_guesses_are_told_to_wait_and_a_good_token_is_taken_between_them() -> None:
    await _guessed(500)


@pytest.mark.long
async def test_ten_thousand_guesses_are_told_to_wait_and_a_good_token_is_taken_between_them() -> None:
    await _guessed(10_000)
