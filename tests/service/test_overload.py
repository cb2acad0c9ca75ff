"""What the gateway takes at a time beside queries of models, and how often one may change things over REST."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from gateway import app as gateway_app
from gateway import invocations, oauth
from servicekit import arrivals
from servicekit.shedding import ALWAYS_TAKEN, LATE_LOOKS, Lag
from tests.service.test_gateway import Echo
from tests.support.eventually import eventually
from tests.support.gateway import OWNER, Platform, platform, routes
from tests.support.http import Answer, fetch
from tests.support.platform import running_platform

ENDPOINTS = "/api/2.0/serving-endpoints"


def refused(answer: Answer) -> bool:
    """Whether it is refused as what is too much, and told when to ask again."""
    if answer.status != 429:
        return False
    assert answer.json()["error_code"] == "REQUEST_LIMIT_EXCEEDED"
    assert int(answer.headers["retry-after"]) >= 1
    return True


async def answer_to_half_a_request(gateway: Platform) -> bytes:
    """The first line of the answer to a request whose body does not come."""
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"POST %b HTTP/1.1\r\ncontent-length: 1000\r\n\r\n{" % ENDPOINTS.encode())
        async with asyncio.timeout(30):
            return (await reader.readline()).strip()
    finally:
        writer.close()


async def test_more_requests_than_there_is_room_for_are_refused_and_queries_of_models_are_not() -> None:
    async with platform(calls=2) as gateway:
        await gateway.publish(routes("churn", ("m-1", 100, [("r1", await gateway.add_replica(Echo()))])))
        gateway.serving.gate.clear()
        slow = [
            asyncio.create_task(fetch(gateway.url, "GET", ENDPOINTS, token=token))
            for token in ("owner-token", "stranger-token")
        ]
        await eventually(lambda: len(gateway.serving.seen) == 2, within=30)
        # Nobody is asked who calls, and the body is not waited for.
        assert refused(await fetch(gateway.url, "GET", ENDPOINTS, token="of-nobody"))
        assert refused(await fetch(gateway.url, "POST", "/oidc/v1/token"))
        assert await answer_to_half_a_request(gateway) == b"HTTP/1.1 429 Too Many Requests"
        assert gateway.authority.exchanges == 2
        for path in ("/health", "/.well-known/databricks-config"):
            assert (await fetch(gateway.url, "GET", path)).status == 200
        query = "/serving-endpoints/churn/invocations"
        assert (await fetch(gateway.url, "POST", query, token="owner-token", body=b"{}")).status == 200
        gateway.serving.gate.set()
        assert {answer.status for answer in await asyncio.gather(*slow)} == {501}
        answer = await fetch(gateway.url, "GET", ENDPOINTS, token="owner-token")
        assert answer.status == 501, "what Serving says here of everything"


HALVES = {
    "of anybody": b"POST /oidc/v1/token HTTP/1.1\r\ncontent-length: 100\r\n\r\ng",
    "of a message": b"POST %b HTTP/1.1\r\nauthorization: Bearer owner-token\r\ncontent-length: 100\r\n\r\n{"
    % ENDPOINTS.encode(),
    "of telemetry": b"POST /telemetry-ext HTTP/1.1\r\nauthorization: Bearer owner-token\r\ncontent-length: 9\r\n\r\n{",
}


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
async def test_who_sends_half_of_many_requests_keeps_nobody_else_out(
    half: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_app, "MOST_AWAITED", 10)
    monkeypatch.setattr(oauth, "MOST_AWAITED", 10)
    async with platform(calls=2) as gateway, AsyncExitStack() as stack:
        assert (await fetch(gateway.url, "GET", ENDPOINTS, token="owner-token")).status == 501  # who is known by then
        host, port = gateway.url.removeprefix("http://").split(":")
        readers = []
        for _ in range(20):
            reader, writer = await asyncio.open_connection(host, int(port))
            stack.callback(writer.close)
            writer.write(half)
            readers.append(asyncio.create_task(reader.readline()))
        # Ten are waited for, and the others refused at once.
        await eventually(lambda: sum(task.done() for task in readers) == 10, within=30)
        assert {task.result() for task in readers if task.done()} == {b"HTTP/1.1 429 Too Many Requests\r\n"}
        for _ in range(5):
            assert (await fetch(gateway.url, "GET", ENDPOINTS, token="stranger-token")).status == 501
        for task in readers:
            task.cancel()


async def test_who_sends_half_of_long_bodies_has_a_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        platform(inference_body_limit=100_000, stale_identity_seconds=0) as gateway,
        AsyncExitStack() as stack,
    ):
        await gateway.publish(routes("churn", ("m-1", 100, [("r1", await gateway.add_replica(Echo()))])))
        host, port = gateway.url.removeprefix("http://").split(":")
        lines = []
        most = invocations.MOST_KEPT // arrivals.PARTS
        for path in ("/serving-endpoints/chat/completions", "/serving-endpoints/churn/invocations"):
            for _ in range(most):
                reader, writer = await asyncio.open_connection(host, int(port))
                stack.callback(writer.close)
                head = f"POST {path} HTTP/1.1\r\nauthorization: Bearer owner-token\r\ncontent-length: 100000\r\n\r\n"
                writer.write(head.encode() + b" " * 99_999)
                lines.append(asyncio.create_task(reader.readline()))
        await eventually(lambda: sum(task.done() for task in lines) >= most, within=30)
        assert {task.result() for task in lines if task.done()} == {b"HTTP/1.1 429 Too Many Requests\r\n"}
        query = "/serving-endpoints/churn/invocations"
        assert (await fetch(gateway.url, "POST", query, token="owner-token", body=b"{}")).status == 200
        for task in lines:
            task.cancel()


async def test_requests_are_refused_while_the_event_loop_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    lags: list[Lag] = []

    async def look(self: Lag) -> None:
        lags.append(self)
        await asyncio.Event().wait()

    monkeypatch.setattr(Lag, "run", look)
    async with platform() as gateway:
        gateway.authority.tokens |= {f"token-{number}": OWNER for number in range(ALWAYS_TAKEN)}
        gateway.serving.gate.clear()
        slow = [
            asyncio.create_task(fetch(gateway.url, "GET", ENDPOINTS, token=f"token-{number}"))
            for number in range(ALWAYS_TAKEN)
        ]
        await eventually(lambda: len(gateway.serving.seen) == ALWAYS_TAKEN, within=30)
        one_more = asyncio.create_task(fetch(gateway.url, "GET", ENDPOINTS, token="owner-token"))
        await eventually(lambda: len(gateway.serving.seen) == ALWAYS_TAKEN + 1, within=30)
        for _ in range(LATE_LOOKS):
            lags[-1].looked(1.0)
        assert refused(await fetch(gateway.url, "GET", ENDPOINTS, token="owner-token"))
        lags[-1].looked(0.0)
        gateway.serving.gate.set()
        assert (await fetch(gateway.url, "GET", ENDPOINTS, token="owner-token")).status == 501
        assert {answer.status for answer in await asyncio.gather(*slow, one_more)} == {501}


async def test_changes_over_rest_are_refused_beyond_the_pace_and_made_when_it_is_kept() -> None:
    async with running_platform(changes=1) as running:

        async def put(key: str) -> Answer:
            body = b'{"scope": "shop", "key": "%b", "string_value": "x"}' % key.encode()
            return await running.fetch("POST", "/api/2.0/secrets/put", token=running.tokens["admin"], body=body)

        async def made() -> bool:
            answer = await running.fetch(
                "POST", "/api/2.0/secrets/scopes/create", token=running.tokens["admin"], body=b'{"scope": "shop"}'
            )
            return answer.status == 200

        await eventually(made, within=30)
        answers = [await put(f"k{number}") for number in range(20)]
        assert any(map(refused, answers))
        listed = await running.fetch("GET", "/api/2.0/secrets/list?scope=shop", token=running.tokens["admin"])
        there = {each["key"] for each in listed.json().get("secrets", [])}
        assert there == {f"k{number}" for number, answer in enumerate(answers) if answer.status == 200}
