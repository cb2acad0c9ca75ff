"""The table of routes: what each gateway is told, who is waited for, and when a replica is unused."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from servicekit.errors import Unavailable
from servicekit.rate_limits import Ledger, Limits
from serving_service import routes as module
from serving_service.routes import EndpointRoutes, EntityRoutes, ReplicaAddress, RouteTable
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.eventually import eventually

SHORT, LONG = 0.05, 30.0


def routes_of(endpoint_id: str, *replicas: str, name: str = "") -> EndpointRoutes:
    entities = (EntityRoutes("churn", "1", 100, tuple(ReplicaAddress(each, f"unix:/{each}") for each in replicas)),)
    return EndpointRoutes(
        endpoint_id=endpoint_id, name=name or endpoint_id, entities=entities, limits=Limits(endpoint_id)
    )


class Gateway:
    """A gateway's stream that does only what it is told to."""

    def __init__(self, table: RouteTable) -> None:
        self._reports: asyncio.Queue[pb.RouteReport | None] = asyncio.Queue()
        self._tables: asyncio.Queue[pb.RouteTable | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._watch(table))

    async def _watch(self, table: RouteTable) -> None:
        try:
            async with contextlib.aclosing(table.watch(self._said())) as tables:
                async for each in tables:
                    self._tables.put_nowait(each)
        finally:
            self._tables.put_nowait(None)

    async def _said(self) -> AsyncIterator[pb.RouteReport]:
        while (report := await self._reports.get()) is not None:
            yield report

    async def told(self) -> pb.RouteTable | None:
        """The next table; None when the stream has ended."""
        async with asyncio.timeout(LONG):
            return await self._tables.get()

    async def follows(self) -> pb.RouteTable:
        """Takes the next table and acknowledges it."""
        table = await self.told()
        assert table is not None
        self.say(table.revision)
        return table

    def say(self, revision: int, **in_flight: int) -> None:
        self._reports.put_nowait(
            pb.RouteReport(
                acknowledged_revision=revision,
                retired=[pb.ReplicaLoad(replica_id=each, in_flight=count) for each, count in in_flight.items()],
            )
        )

    async def leave(self) -> None:
        self._reports.put_nowait(None)
        await asyncio.gather(self._task, return_exceptions=True)


def a_table(*, ack_seconds: float = LONG) -> RouteTable:
    table = RouteTable(Ledger(), ack_seconds=ack_seconds, queue_length=10)
    table.loaded()
    return table


async def is_pending(task: asyncio.Task[None]) -> bool:
    """Whether the task still waits, after everything that could go on has."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not task.done()


async def finished(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(LONG):
        await task


async def test_a_gateway_is_told_the_whole_table_first_and_then_what_changed() -> None:
    table = a_table()
    table.publish(routes_of("one", "r1"))
    table.publish(routes_of("two"))
    gateway = Gateway(table)
    whole = await gateway.follows()
    assert whole.complete
    assert [each.endpoint_id for each in whole.endpoints] == ["one", "two"]
    replica = whole.endpoints[0].entities[0].replicas[0]
    assert (replica.replica_id, replica.address) == ("r1", "unix:/r1")
    table.publish(routes_of("two", "r2"))
    change = await gateway.follows()
    assert not change.complete
    assert [each.endpoint_id for each in change.endpoints] == ["two"]
    assert change.revision > whole.revision
    table.remove("one")
    assert list((await gateway.follows()).removed_endpoint_ids) == ["one"]
    await gateway.leave()


async def test_nothing_is_told_before_the_table_is_whole() -> None:
    table = RouteTable(Ledger(), ack_seconds=LONG, queue_length=10)
    table.publish(routes_of("one"))
    gateway = Gateway(table)
    told = asyncio.create_task(gateway.told())
    assert await is_pending(told)  # type: ignore[arg-type]
    table.publish(routes_of("two"))
    table.loaded()
    whole = await told
    assert whole is not None
    assert len(whole.endpoints) == 2
    await gateway.leave()


async def test_a_query_before_the_table_is_whole_waits_and_is_then_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = RouteTable(Ledger(), ack_seconds=LONG, queue_length=10)
    monkeypatch.setattr(module, "LOAD_SECONDS", SHORT)
    with pytest.raises(Unavailable):
        await table.find("one")
    monkeypatch.setattr(module, "LOAD_SECONDS", LONG)
    finding = asyncio.create_task(table.find("one"))
    table.publish(routes_of("one"))
    table.loaded()
    assert await finding == routes_of("one")


async def test_what_has_not_changed_is_not_told_again() -> None:
    table = a_table()
    table.publish(routes_of("one", "r1"))
    gateway = Gateway(table)
    await gateway.follows()
    table.publish(routes_of("one", "r1"))
    table.publish(routes_of("two", "r2"))
    assert [each.endpoint_id for each in (await gateway.follows()).endpoints] == ["two"]
    await gateway.leave()


async def test_every_gateway_is_waited_for() -> None:
    table = a_table()
    first, second = Gateway(table), Gateway(table)
    await first.follows()
    await second.follows()
    table.publish(routes_of("one", "r1"))
    waiting = asyncio.create_task(table.acknowledged())
    await first.follows()
    assert await is_pending(waiting)
    await second.follows()
    await finished(waiting)
    await first.leave()
    await second.leave()


async def test_without_gateways_nobody_is_waited_for() -> None:
    table = a_table()
    table.publish(routes_of("one", "r1"))
    async with asyncio.timeout(SHORT):
        await table.acknowledged()


async def test_a_gateway_that_does_not_follow_in_time_is_cut_off_and_no_longer_waited_for() -> None:
    table = a_table(ack_seconds=SHORT)
    gateway = Gateway(table)
    await gateway.follows()
    table.publish(routes_of("one", "r1"))
    await finished(asyncio.create_task(table.acknowledged()))
    assert await gateway.told() is not None
    assert await gateway.told() is None
    anew = Gateway(table)
    assert (await anew.follows()).complete
    await anew.leave()


async def test_a_gateway_that_takes_nothing_is_cut_off_too() -> None:
    table = a_table(ack_seconds=SHORT)
    has_first, never = asyncio.Event(), asyncio.Event()

    async def no_reports() -> AsyncIterator[pb.RouteReport]:
        await never.wait()
        yield pb.RouteReport()

    async def stuck() -> None:
        async for _ in table.watch(no_reports()):
            has_first.set()
            await never.wait()  # as a send does whose other end does not read

    task = asyncio.create_task(stuck())
    await has_first.wait()
    table.publish(routes_of("one"))
    with pytest.raises(asyncio.CancelledError):
        await finished(task)


async def test_a_replica_is_unused_when_every_gateway_follows_and_reports_nothing_on_it() -> None:
    table = a_table()
    table.publish(routes_of("one", "old"))
    gateway = Gateway(table)
    await gateway.follows()
    table.publish(routes_of("one", "new"))
    draining = asyncio.create_task(table.drained("old", timeout=LONG))
    change = await gateway.told()
    assert change is not None
    assert await is_pending(draining)
    gateway.say(change.revision, old=1)
    assert await is_pending(draining)
    gateway.say(change.revision)
    await finished(draining)
    await gateway.leave()


async def test_our_own_requests_in_flight_keep_a_replica() -> None:
    table = a_table()
    counting = asyncio.create_task(table.loads.run())
    table.publish(routes_of("one", "old"))
    server = table.loads.queues.of("one", "churn").take()
    assert server is not None
    table.remove("one")
    draining = asyncio.create_task(table.drained("old", timeout=LONG))
    assert await is_pending(draining)
    server.queue.give_back(server)
    await finished(draining)
    counting.cancel()


async def test_a_drain_ends_with_its_time() -> None:
    table = a_table()
    table.publish(routes_of("one", "old"))
    assert table.loads.queues.of("one", "churn").take() is not None
    table.remove("one")
    await finished(asyncio.create_task(table.drained("old", timeout=SHORT)))


async def test_replicas_that_left_are_forgotten_once_every_gateway_follows() -> None:
    table = a_table()
    gateway, late = Gateway(table), Gateway(table)
    await gateway.follows()
    for number in range(10):
        table.publish(routes_of("one", f"r{number}"))  # each in the place of one that crashed and is not drained
        await gateway.follows()
    assert len(table._left) == 9
    assert (await late.follows()).complete
    while (await late.follows()).revision < table._revision:
        pass
    await finished(asyncio.create_task(table.acknowledged()))
    table.publish(routes_of("one"))
    assert set(table._left) == {"r9"}
    await gateway.leave()
    await late.leave()
    table.publish(routes_of("one", "r10"))
    assert table._left == {}


async def test_a_gateway_that_went_away_gets_time_to_come_back_and_report() -> None:
    table = a_table(ack_seconds=0.3)
    table.publish(routes_of("one", "old"))
    gateway = Gateway(table)
    await gateway.follows()
    await gateway.leave()
    table.remove("one")
    draining = asyncio.create_task(table.drained("old", timeout=LONG))
    anew = Gateway(table)
    whole = await anew.told()
    assert whole is not None
    anew.say(whole.revision, old=1)
    await eventually(lambda: not table._absent, what="the time for coming back is over")
    assert await is_pending(draining)
    anew.say(whole.revision)
    await finished(draining)
    await anew.leave()


async def test_when_the_service_has_just_started_every_gateway_gets_that_time() -> None:
    table = a_table(ack_seconds=0.2)
    job = asyncio.create_task(table.run())
    await eventually(lambda: bool(table._absent))
    draining = asyncio.create_task(table.drained("left-by-a-predecessor", timeout=LONG))
    assert await is_pending(draining)
    await finished(draining)
    job.cancel()


async def test_streams_end_when_the_service_stops() -> None:
    table = a_table()
    job = asyncio.create_task(table.run())
    gateway = Gateway(table)
    await gateway.follows()
    job.cancel()
    assert await gateway.told() is None


async def ended(table: RouteTable) -> None:
    """Runs a table's job to its end, as a service that stops does."""
    job = asyncio.create_task(table.run())
    await asyncio.sleep(0)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)


async def test_a_stream_that_begins_when_the_service_has_stopped_ends_at_once() -> None:
    table = a_table()
    table.publish(routes_of("one", "r1"))
    await ended(table)
    assert await Gateway(table).told() is None
    assert await table.find("one") == routes_of("one", "r1")  # a query that is under way goes on


async def test_nobody_waits_for_the_table_of_a_service_that_stops_before_it_is_whole() -> None:
    table = RouteTable(Ledger(), ack_seconds=LONG, queue_length=10)
    gateway = Gateway(table)
    finding = asyncio.create_task(table.find("one"))
    await asyncio.sleep(0)
    await ended(table)
    assert await gateway.told() is None
    with pytest.raises(Unavailable, match="being stopped"):
        await finding


async def test_the_load_of_an_entity_is_what_all_report_who_are_there() -> None:
    table = a_table()
    counting = asyncio.create_task(table.loads.run())
    table.publish(routes_of("one", "r1"))
    changed: asyncio.Queue[str] = asyncio.Queue()
    table.loads.on_change = changed.put_nowait
    gateways = [Gateway(table), Gateway(table)]
    for gateway in gateways:
        await gateway.follows()
        gateway._reports.put_nowait(
            pb.RouteReport(loads=[pb.EntityLoad(endpoint_id="one", served_entity_name="churn", in_flight=4, waiting=3)])
        )
    await eventually(lambda: table.loads.of("one", "churn") == 14)
    assert table.loads.queues.of("one", "churn").take() is not None
    await eventually(lambda: table.loads.of("one", "churn") == 15)
    assert table.loads.of("one", "other") == 0
    await gateways[0].leave()
    await eventually(lambda: table.loads.of("one", "churn") == 8)
    assert [changed.get_nowait() for _ in range(changed.qsize())] == ["one"] * 4
    await gateways[1].leave()
    counting.cancel()


async def test_gateways_are_told_how_much_a_replica_takes_and_what_may_be_waited_for() -> None:
    table = a_table()
    asleep = EntityRoutes("asleep", "1", 40, (), is_asleep=True)
    broken = EntityRoutes("broken", "1", 60, (), problem="no key")
    entities = (*routes_of("one", "r1").entities, asleep, broken)
    table.publish(EndpointRoutes(endpoint_id="one", name="one", entities=entities, limits=Limits("one")))
    gateway = Gateway(table)
    awake, *others = (await gateway.follows()).endpoints[0].entities
    assert [replica.concurrency for replica in awake.replicas] == [4]
    assert [(each.is_asleep, each.problem) for each in (awake, *others)] == [(False, ""), (True, ""), (False, "no key")]
    await gateway.leave()


async def test_a_name_that_passes_to_a_new_endpoint_is_found_there() -> None:
    table = a_table()
    table.publish(routes_of("old", "r1", name="demo"))
    table.publish(routes_of("new", "r2", name="demo"))
    table.remove("old")
    found = await table.find("demo")
    assert found is not None
    assert found.endpoint_id == "new"


def test_requests_are_split_by_percentage_among_entities_that_can_answer() -> None:
    replica = (ReplicaAddress("r", "unix:/r"),)
    entities = (
        EntityRoutes("a", "1", 90, replica),
        EntityRoutes("b", "1", 10, replica),
        EntityRoutes("c", "1", 0, replica),
    )
    routes = EndpointRoutes(endpoint_id="1", name="demo", entities=entities, limits=Limits("1"))
    picked = Counter(entity.name for entity in (routes.pick() for _ in range(4_000)) if entity is not None)
    assert set(picked) == {"a", "b"}
    assert 250 < picked["b"] < 550
    idle = EndpointRoutes(
        endpoint_id="1",
        name="demo",
        entities=(EntityRoutes("a", "1", 90, ()), EntityRoutes("b", "1", 10, replica)),
        limits=Limits("1"),
    )
    assert {entity.name for entity in (idle.pick() for _ in range(50)) if entity is not None} == {"b"}
