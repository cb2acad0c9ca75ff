"""What the gateway lets through to a replica at a time, whom it lets wait, and what it tells who waited in vain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tessera.serving.v1 import serving_pb2 as pb
from tests.service.test_gateway import GONE, Echo, body_of, reply
from tests.support.eventually import eventually
from tests.support.gateway import OWNER, Platform, platform, routes
from tests.support.http import Answer, fetch

TOO_BUSY = {
    "error_code": "REQUEST_LIMIT_EXCEEDED",
    "message": "Too many concurrent requests. Consider increasing the provisioned concurrency of the served entity.",
}


class Counting:
    """A replica that lets one request go on for each `step`, and counts how many it has."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.bodies: list[bytes] = []
        self._steps = asyncio.Semaphore(0)

    def step(self, requests: int = 1) -> None:
        for _ in range(requests):
            self._steps.release()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        body = await body_of(receive)
        self.bodies.append(body)
        try:
            await self._steps.acquire()
        finally:
            self.now -= 1
        await reply(send, body)


@pytest.fixture
async def start() -> AsyncIterator[Any]:
    """Starts a gateway with settings."""
    async with AsyncExitStack() as stack:

        async def started(**settings: Any) -> Platform:
            return await stack.enter_async_context(platform(**settings))

        yield started


def limited(endpoint: pb.EndpointRoutes, concurrency: int = 2) -> pb.EndpointRoutes:
    """The same routes, with as many requests per replica."""
    for entity in endpoint.entities:
        for replica in entity.replicas:
            replica.concurrency = concurrency
    return endpoint


def asleep(name: str, entity: str = "m-1", *, problem: str = "") -> pb.EndpointRoutes:
    """The routes of an endpoint whose entity is at zero."""
    endpoint = routes(name, (entity, 100, []))
    endpoint.entities[0].is_asleep, endpoint.entities[0].problem = not problem, problem
    return endpoint


def invoke(gateway: Platform, name: str, body: bytes = b"{}", entity: str = "") -> asyncio.Task[Answer]:
    target = f"served-models/{entity}/invocations" if entity else "invocations"
    return asyncio.create_task(
        fetch(gateway.url, "POST", f"/serving-endpoints/{name}/{target}", token="owner-token", body=body)
    )


def load(gateway: Platform) -> tuple[int, int]:
    """In flight and waiting, as the gateway reported last."""
    loads = gateway.serving.reports[-1].loads
    return (loads[0].in_flight, loads[0].waiting) if loads else (0, 0)


async def test_a_replica_gets_as_many_as_it_takes_and_the_others_wait_in_turn(start: Any) -> None:
    gateway: Platform = await start()
    replica = Counting()
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", await gateway.add_replica(replica))]))))
    tasks = []
    for number in range(4):
        tasks.append(invoke(gateway, "ep", b"%d" % number))
        await eventually(lambda: load(gateway) == (min(len(tasks), 2), max(len(tasks) - 2, 0)))
    replica.step(4)
    answers = [(await task).body for task in tasks]
    assert answers == [b"0", b"1", b"2", b"3"]
    assert replica.bodies == answers, "the first who came was the first to be answered"
    assert replica.most == 2
    await eventually(lambda: load(gateway) == (0, 0), what="that nothing is left is told too")


async def test_a_second_replica_takes_those_who_wait_as_soon_as_it_is_there(start: Any) -> None:
    gateway: Platform = await start()
    first, second = Counting(), Counting()
    addresses = [await gateway.add_replica(each) for each in (first, second)]
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", addresses[0])]))))
    tasks = [invoke(gateway, "ep") for _ in range(5)]
    await eventually(lambda: load(gateway) == (2, 3))
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", addresses[0]), ("r2", addresses[1])]))))
    await eventually(lambda: (first.now, second.now) == (2, 2))
    first.step(3)
    second.step(2)
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 5


async def test_beyond_the_queue_is_too_much_and_says_so_at_once(start: Any) -> None:
    gateway: Platform = await start(queue_length=2)
    replica = Counting()
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", await gateway.add_replica(replica))])), 1))
    tasks = [invoke(gateway, "ep") for _ in range(3)]
    await eventually(lambda: load(gateway) == (1, 2))
    refused = await invoke(gateway, "ep")
    assert (refused.status, refused.json(), refused.headers["retry-after"]) == (429, TOO_BUSY, "1")
    replica.step(3)
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 3


async def test_who_waited_too_long_is_told_and_leaves_its_place_to_others(start: Any) -> None:
    gateway: Platform = await start(queue_seconds=0.3)
    replica = Counting()
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", await gateway.add_replica(replica))])), 1))
    first = invoke(gateway, "ep")
    await eventually(lambda: replica.now == 1)
    late = await invoke(gateway, "ep")
    assert (late.status, late.json()) == (429, TOO_BUSY)
    replica.step(2)
    assert (await first).status == (await invoke(gateway, "ep")).status == 200


async def test_who_hangs_up_leaves_the_queue(start: Any) -> None:
    gateway: Platform = await start()
    replica = Counting()
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", await gateway.add_replica(replica))])), 1))
    first, leaving, last = (invoke(gateway, "ep", body) for body in (b"first", b"leaving", b"last"))
    await eventually(lambda: load(gateway) == (1, 2))
    leaving.cancel()
    await eventually(lambda: load(gateway) == (1, 1))
    replica.step(2)
    assert {(await first).body, (await last).body} == {b"first", b"last"} == set(replica.bodies)


async def test_the_first_request_for_what_is_at_zero_is_told_at_once_and_all_wait_until_it_is_up(start: Any) -> None:
    gateway: Platform = await start()
    await gateway.publish(asleep("ep"))
    tasks = [invoke(gateway, "ep") for _ in range(20)]
    await eventually(lambda: load(gateway) == (0, 20))
    assert gateway.serving.reports[-1].loads[0].served_entity_name == "m-1"
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", await gateway.add_replica(Echo()))]))))
    assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 20


async def test_what_is_not_up_in_time_may_be_asked_again(start: Any) -> None:
    gateway: Platform = await start(queue_seconds=0.1)
    await gateway.publish(asleep("ep"))
    answer = await invoke(gateway, "ep")
    assert (answer.status, answer.json()["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
    assert int(answer.headers["retry-after"]) > 0


async def test_who_waits_for_what_cannot_come_up_hears_why_and_so_does_the_next(start: Any) -> None:
    gateway: Platform = await start()
    await gateway.publish(asleep("ep"))
    tasks = [invoke(gateway, "ep"), invoke(gateway, "ep", entity="m-1")]
    await eventually(lambda: load(gateway) == (0, 2))
    await gateway.publish(asleep("ep", problem="Phase reference failed: no key."))
    for answer in (*(await asyncio.gather(*tasks)), await invoke(gateway, "ep")):
        assert (answer.status, answer.json()["error_code"]) == (400, "BAD_REQUEST")
        assert "Phase reference failed: no key." in answer.json()["message"]


async def test_who_waits_follows_an_update_and_the_end_of_its_endpoint(start: Any) -> None:
    gateway: Platform = await start()
    replica = Counting()
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", await gateway.add_replica(replica))])), 1))
    tasks = [invoke(gateway, "ep", b"%d" % number) for number in range(3)]
    direct = invoke(gateway, "ep", entity="m-1")
    await eventually(lambda: load(gateway) == (1, 3))
    await gateway.publish(routes("ep", ("m-2", 100, [("r2", await gateway.add_replica(Echo("new")))])))
    assert (await direct).json() == GONE
    replica.step()
    answers = await asyncio.gather(*tasks)
    assert sorted(answer.headers["served-model-name"] for answer in answers) == ["m-1", "m-2", "m-2"]

    await gateway.publish(asleep("ep"))
    waiting = invoke(gateway, "ep")
    await eventually(lambda: load(gateway) == (0, 1))
    await gateway.serving.publish(removed=("id-ep",))
    assert (await waiting).json() == GONE


async def test_what_is_at_zero_gets_its_share_of_the_requests(start: Any) -> None:
    gateway: Platform = await start()
    endpoint = routes("ep", ("awake", 50, [("r1", await gateway.add_replica(Echo()))]), ("asleep", 50, []))
    endpoint.entities[1].is_asleep = True
    await gateway.publish(endpoint)
    tasks = [invoke(gateway, "ep") for _ in range(40)]
    await eventually(lambda: any(load.waiting for report in gateway.serving.reports for load in report.loads))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_loads_are_told_about_once_a_second_however_many_requests_there_are(start: Any) -> None:
    gateway: Platform = await start()
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", await gateway.add_replica(Echo()))]))))
    before = len(gateway.serving.reports)
    for _ in range(50):
        await invoke(gateway, "ep")
    assert len(gateway.serving.reports) - before <= 10
    assert any(load.in_flight for report in gateway.serving.reports for load in report.loads)


@pytest.mark.parametrize("withdrawn", ["the permission", "the token"])
async def test_whoever_loses_the_right_while_waiting_gets_no_turn(start: Any, withdrawn: str) -> None:
    gateway: Platform = await start()
    replica = Counting()
    await gateway.publish(limited(routes("ep", ("m-1", 100, [("r1", await gateway.add_replica(replica))])), 1))
    first = invoke(gateway, "ep", b"first")
    await eventually(lambda: load(gateway) == (1, 0))
    second = invoke(gateway, "ep", b"second")
    await eventually(lambda: load(gateway) == (1, 1))
    if withdrawn == "the permission":
        await gateway.access.change({"id-ep": {}})
    else:
        gateway.authority.revoked.add("owner-token")
        await gateway.access.change(token_ids=[OWNER.token_id])
    replica.step(2)
    assert (await first).status == 200
    assert (await second).status == (404 if withdrawn == "the permission" else 403)
    assert replica.bodies == [b"first"]
