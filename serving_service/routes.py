"""The table by which gateways, and our own Query, find replicas: who has which revision, and when a replica is unused.

A change reaches every stream; a gateway that does not follow it in time is cut off, so that nobody waits for it and it
starts again from a whole table. A replica that left the table is drained when every gateway follows a table without it
and reports no more requests on it. A gateway that went away, and every gateway when we have just started, gets the same
time to come back and report before its silence counts as "none".

Our own queries take places on replicas as gateways do, and are counted likewise (`loads.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial

from servicekit import followed
from servicekit.admission import Offer
from servicekit.errors import Unavailable
from servicekit.followed import Follower
from servicekit.rate_limits import SHARE_SECONDS, Feed, Ledger, Limits
from serving_service.loads import Loads
from serving_service.scaling import REPLICA_CONCURRENCY
from tessera.serving.v1 import serving_pb2 as pb

log = logging.getLogger(__name__)

LOAD_SECONDS = 10.0
"""How long a query waits for the table when the service has just started."""


@dataclass(frozen=True)
class ReplicaAddress:
    """Where one replica listens."""

    replica_id: str
    address: str


@dataclass(frozen=True)
class EntityRoutes:
    """One served entity: the version of its model, its share of the requests in percent, and where it runs."""

    name: str
    version: str
    percentage: int
    replicas: tuple[ReplicaAddress, ...]
    is_asleep: bool = False
    """Whether it is at zero or on its way up from there, so that requests wait for it."""
    problem: str = ""
    """Why it cannot be woken just now."""

    @property
    def can_answer(self) -> bool:
        """Whether it makes sense to wait for it."""
        return bool(self.replicas) or self.is_asleep


@dataclass(frozen=True, kw_only=True)
class EndpointRoutes:
    """How one endpoint is reached; no entities before the first deployment."""

    endpoint_id: str
    name: str
    entities: tuple[EntityRoutes, ...]
    limits: Limits
    is_usage_tracked: bool = False
    is_stopped: bool = False

    @property
    def replica_ids(self) -> frozenset[str]:
        return frozenset(replica.replica_id for entity in self.entities for replica in entity.replicas)

    def pick(self) -> EntityRoutes | None:
        """An entity by its share of the requests, among those that can answer; None when there is none."""
        able = [entity for entity in self.entities if entity.can_answer and entity.percentage]
        weights = [entity.percentage for entity in able]
        return random.choices(able, weights)[0] if able else None  # noqa: S311 (a split, not a secret)


@dataclass(eq=False)
class _Stream(Follower):
    """One gateway's stream: what it still has to be told, and what it told us."""

    uses: Feed = field(kw_only=True)
    retired: dict[str, int] = field(default_factory=dict)
    is_complete_due: bool = True
    changed: set[str] = field(default_factory=set)


class RouteTable:
    """All routes, for the life of the service. Lives on one event loop.

    What is used of rate limits, here and at each gateway, is told to all others by the same streams.
    """

    def __init__(self, ledger: Ledger, *, ack_seconds: float, queue_length: int) -> None:
        """`queue_length`: how many of our own queries may wait for one entity."""
        self._ledger = ledger
        self._ack_seconds = ack_seconds
        self._endpoints: dict[str, EndpointRoutes] = {}
        self._by_name: dict[str, EndpointRoutes] = {}
        self._revision = 1
        self._left: dict[str, int] = {}
        """The revision at which each replica left the table, for as long as a gateway may follow an older one."""
        self._streams: set[_Stream] = set()
        self._absent: set[object] = set()
        self._waiters: set[asyncio.Future[None]] = set()
        self._is_loaded = False
        self._is_over = False
        self.loads = Loads(queue_length=queue_length)
        self.loads.on_unused = self._notify

    async def run(self) -> None:
        """Ends every stream when cancelled, also those that are still to come."""
        self._expect_return()
        try:
            await followed.cut_at_end(self._streams)
        finally:
            self._is_over = True
            self._notify()

    def loaded(self) -> None:
        """Says that the table is whole; no stream is served before."""
        self._is_loaded = True
        self._notify()

    def gateways(self) -> int:
        """How many gateways follow."""
        return len(self._streams)

    def publish(self, routes: EndpointRoutes) -> None:
        """Puts an endpoint's routes in place of its older ones."""
        if self._endpoints.get(routes.endpoint_id) == routes:
            return
        self._change(routes.endpoint_id, routes)

    def remove(self, endpoint_id: str) -> None:
        """Takes an endpoint out of the table."""
        if endpoint_id in self._endpoints:
            self._change(endpoint_id, None)

    async def acknowledged(self) -> None:
        """Returns when every gateway with a live stream follows the table as it is now, or was cut off."""
        revision = self._revision
        await self._until(lambda: all(stream.acknowledged >= revision for stream in self._streams))

    async def drained(self, replica_id: str, *, timeout: float) -> None:
        """Returns when nobody uses a replica that has left the table, or after `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._until(lambda: self._is_unused(replica_id))

    async def find(self, name: str) -> EndpointRoutes | None:
        """The routes of the endpoint of that name; raises Unavailable when the table does not get whole in time."""
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                await self._begun()
        except TimeoutError:
            raise Unavailable("The Serving service is still starting. Try again.", retry_after=1) from None
        if not self._is_loaded:
            raise Unavailable("The Serving service is being stopped. Try again in a moment.", retry_after=1)
        return self._by_name.get(name)

    def now(self, endpoint_id: str) -> EndpointRoutes | None:
        """The routes of an endpoint as they are now."""
        return self._endpoints.get(endpoint_id)

    async def watch(self, reports: AsyncIterator[pb.RouteReport]) -> AsyncGenerator[pb.RouteTable, None]:
        """Serves one gateway: tables out, reports in, until either side ends."""
        await self._begun()
        if self._is_over:
            return
        woken = asyncio.Event()
        share_soon = partial(asyncio.get_running_loop().call_later, SHARE_SECONDS, woken.set)
        with self._ledger.feed(share_soon, own_only=False) as uses:
            stream = _Stream(woken=woken, uses=uses)
            reading = asyncio.create_task(self._read(stream, reports), name="route reports")
            self._streams.add(stream)
            self._expect_acknowledgement(stream)
            try:
                yield self._next(stream)
                while True:
                    await stream.wait()
                    if stream.is_over:
                        return
                    yield self._next(stream)
            finally:
                reading.cancel()
                self._streams.discard(stream)
                self._expect_return()

    async def _read(self, stream: _Stream, reports: AsyncIterator[pb.RouteReport]) -> None:
        try:
            async for report in reports:
                stream.acknowledged = max(stream.acknowledged, report.acknowledged_revision)
                stream.retired = {load.replica_id: load.in_flight for load in report.retired}
                if report.uses:
                    stream.uses.without = report.uses[0].source
                    self._ledger.learn(report.uses)
                self.loads.report(stream, report.loads)
                self._notify()
        finally:
            self.loads.report(stream, ())
            stream.end()

    def _change(self, endpoint_id: str, routes: EndpointRoutes | None) -> None:
        self._revision += 1
        before = self._endpoints.pop(endpoint_id, None)
        if before is not None and self._by_name.get(before.name) is before:
            del self._by_name[before.name]
        if routes is not None:
            self._endpoints[endpoint_id] = self._by_name[routes.name] = routes
        offers = {entity.name: _offer(entity) for entity in routes.entities} if routes else {}
        self.loads.queues.serve(endpoint_id, offers)
        # What every gateway follows need not be remembered: one that comes later begins with a table that is newer.
        followed_by_all = min((stream.acknowledged for stream in self._streams), default=self._revision)
        self._left = {each: revision for each, revision in self._left.items() if revision > followed_by_all}
        left = (before.replica_ids if before else frozenset()) - (routes.replica_ids if routes else frozenset())
        self._left.update(dict.fromkeys(left, self._revision))
        for stream in self._streams:
            stream.changed.add(endpoint_id)
            stream.woken.set()
            self._expect_acknowledgement(stream)

    def _next(self, stream: _Stream) -> pb.RouteTable:
        """What the stream is to be told now: all that changed since the last time."""
        stream.woken.clear()
        changed = set(self._endpoints) if stream.is_complete_due else stream.changed
        table = pb.RouteTable(
            revision=self._revision,
            complete=stream.is_complete_due,
            endpoints=[_message(self._endpoints[each]) for each in sorted(changed) if each in self._endpoints],
            removed_endpoint_ids=sorted(changed - set(self._endpoints)),
            uses=stream.uses.take(),
        )
        stream.is_complete_due, stream.changed = False, set()
        return table

    def _expect_acknowledgement(self, stream: _Stream) -> None:
        asyncio.get_running_loop().call_later(self._ack_seconds, self._cut_if_behind, stream, self._revision)

    def _cut_if_behind(self, stream: _Stream, revision: int) -> None:
        if stream in self._streams and stream.acknowledged < revision:
            log.warning("gateway does not follow the routes and is cut off", extra={"revision": revision})
            stream.cut()

    def _expect_return(self) -> None:
        """Gives a gateway that we do not hear from time to come back before its requests count as ended."""
        absence = object()
        self._absent.add(absence)
        self._notify()

        def over() -> None:
            self._absent.discard(absence)
            self._notify()

        asyncio.get_running_loop().call_later(self._ack_seconds, over)

    def _is_unused(self, replica_id: str) -> bool:
        revision = self._left.get(replica_id, 1)
        return (
            not self._absent
            and all(server.id != replica_id for server in self.loads.queues.retired)
            and all(stream.acknowledged >= revision and not stream.retired.get(replica_id) for stream in self._streams)
        )

    async def _begun(self) -> None:
        """Returns when the table is whole, or is not going to be because the service stops."""
        await self._until(lambda: self._is_loaded or self._is_over)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


def _offer(routes: EntityRoutes) -> Offer:
    replicas = tuple((each.replica_id, each.address, REPLICA_CONCURRENCY) for each in routes.replicas)
    return Offer(replicas, is_awaited=routes.is_asleep)


def _message(routes: EndpointRoutes) -> pb.EndpointRoutes:
    return pb.EndpointRoutes(
        endpoint_id=routes.endpoint_id,
        name=routes.name,
        is_stopped=routes.is_stopped,
        rate_limits=routes.limits.rules,
        is_usage_tracked=routes.is_usage_tracked,
        entities=[
            pb.EntityRoutes(
                name=entity.name,
                entity_version=entity.version,
                traffic_percentage=entity.percentage,
                replicas=[
                    pb.ReplicaRoute(replica_id=each.replica_id, address=each.address, concurrency=REPLICA_CONCURRENCY)
                    for each in entity.replicas
                ],
                is_asleep=entity.is_asleep,
                problem=entity.problem,
            )
            for entity in routes.entities
        ],
    )
