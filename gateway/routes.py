"""The table by which an invocation finds a replica, kept up to date by a stream from Serving.

The last table stays in force while Serving is gone, so inference needs no service but this one. A replica that leaves
the table gets no new request; how many it is still answering is reported until there are none, which is what Serving
waits for before it stops the process. So is the load of each entity, by which Serving scales it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import grpc

from servicekit import channels, followed
from servicekit.admission import Offer, Queue, Queues, Server
from servicekit.rate_limits import SHARE_SECONDS, Feed, Ledger, Limits
from tessera.serving.v1 import serving_pb2 as pb
from tessera.serving.v1 import serving_pb2_grpc as rpc


@dataclass(frozen=True, slots=True)
class Entity:
    """A served entity, and the queue in front of its replicas that are ready."""

    name: str
    version: str
    """That of its model."""
    traffic_percentage: int
    queue: Queue
    is_asleep: bool
    """Whether it has no replica, but gets one when a request waits."""
    problem: str
    """Why it cannot be woken just now."""

    @property
    def replicas(self) -> tuple[Server, ...]:
        return self.queue.servers

    @property
    def can_answer(self) -> bool:
        """Whether it makes sense to wait for it."""
        return bool(self.queue.servers) or self.is_asleep


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint, as far as invocations need to know it; without entities before its first deployment."""

    id: str
    name: str
    entities: tuple[Entity, ...]
    limits: Limits
    is_stopped: bool = False
    is_usage_tracked: bool = False
    """Whether it is recorded who uses it."""

    def entity(self, name: str) -> Entity | None:
        """The entity called `name`, if there is one."""
        return next((entity for entity in self.entities if entity.name == name), None)

    def chosen(self) -> Entity | None:
        """An entity drawn by the traffic split among those that can answer; None when none of them can."""
        able = [entity for entity in self.entities if entity.can_answer and entity.traffic_percentage]
        if len(able) == 1:
            return able[0]
        weights = [entity.traffic_percentage for entity in able]
        return random.choices(able, weights)[0] if able else None  # noqa: S311 (a split, not a secret)


class RoutingTable:
    """All endpoints by name. `follow` keeps it up to date; `known` is set from the first table on.

    What is used of rate limits is told to Serving, and heard from it, by the same stream.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        queue_length: int,
        address_of: Callable[[pb.ReplicaRoute], str],
    ) -> None:
        """`queue_length`: how many requests may wait for one entity. `address_of`: where a replica is reached."""
        self._ledger = ledger
        self._address_of = address_of
        self.known = asyncio.Event()
        self._by_name: dict[str, Endpoint] = {}
        self._by_id: dict[str, Endpoint] = {}
        self._revision = 0
        self._changed = asyncio.Event()
        """Whether there is something that Serving has to be told at once."""
        self._queues = Queues(length=queue_length, changed=self._changed)

    def endpoint(self, name: str) -> Endpoint | None:
        """The endpoint called `name`, if there is one."""
        return self._by_name.get(name)

    def count(self) -> int:
        """How many endpoints there are."""
        return len(self._by_id)

    def in_flight(self) -> int:
        """How many requests replicas are answering, here."""
        return self._queues.in_flight

    def apply(self, table: pb.RouteTable) -> None:
        """Follows a message of the stream: new requests go by it from here on."""
        self._ledger.learn(table.uses)
        if table.revision == self._revision:
            return  # nothing else is new
        if table.complete:
            kept = {endpoint.endpoint_id for endpoint in table.endpoints}
            gone = [endpoint_id for endpoint_id in self._by_id if endpoint_id not in kept]
        else:
            gone = list(table.removed_endpoint_ids)
        for endpoint_id in gone:
            self._remove(endpoint_id)
            self._queues.serve(endpoint_id, {})
        for routes in table.endpoints:
            # A name can pass to a new endpoint in the same message that removes the old one.
            self._remove(routes.endpoint_id)
            endpoint = self._endpoint(routes)
            self._by_id[endpoint.id] = self._by_name[endpoint.name] = endpoint
        self._revision = table.revision
        self.known.set()
        self._changed.set()

    def _remove(self, endpoint_id: str) -> None:
        endpoint = self._by_id.pop(endpoint_id, None)
        if endpoint is not None and self._by_name.get(endpoint.name) is endpoint:
            del self._by_name[endpoint.name]

    def _endpoint(self, routes: pb.EndpointRoutes) -> Endpoint:
        # Whoever is told to look again does so when all of the message has been applied.
        offers = {entity.name: self._offer(entity) for entity in routes.entities}
        queues = self._queues.serve(routes.endpoint_id, offers)
        entities = [
            Entity(
                each.name,
                each.entity_version,
                each.traffic_percentage,
                queues[each.name],
                each.is_asleep,
                each.problem,
            )
            for each in routes.entities
        ]
        limits = Limits(routes.endpoint_id, tuple(routes.rate_limits))
        return Endpoint(
            routes.endpoint_id, routes.name, tuple(entities), limits, routes.is_stopped, routes.is_usage_tracked
        )

    def _offer(self, routes: pb.EntityRoutes) -> Offer:
        replicas = tuple((each.replica_id, self._address_of(each), each.concurrency) for each in routes.replicas)
        return Offer(replicas, is_awaited=routes.is_asleep)

    async def follow(self, channel: grpc.aio.Channel) -> None:
        """Keeps the table up to date until cancelled; comes back by itself when Serving was gone."""
        await followed.follow("routes", partial(self._follow_once, channel), heard=lambda: self._revision)

    async def _follow_once(self, channel: grpc.aio.Channel) -> None:
        self._revision = 0
        self._changed.set()
        stream = rpc.RoutesStub(channel).Watch(metadata=channels.outgoing_metadata())
        share_soon = partial(asyncio.get_running_loop().call_later, SHARE_SECONDS, self._changed.set)
        with self._ledger.feed(share_soon, own_only=True) as uses:
            writer = asyncio.create_task(self._write_reports(stream, uses), name="route reports")
            try:
                async for table in stream:
                    self.apply(table)
            finally:
                writer.cancel()
                stream.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    async def _write_reports(
        self, stream: grpc.aio.StreamStreamCall[pb.RouteReport, pb.RouteTable], uses: Feed
    ) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._queues.seconds):
                    await self._changed.wait()
            self._changed.clear()
            await stream.write(
                pb.RouteReport(
                    acknowledged_revision=self._revision,
                    retired=[
                        pb.ReplicaLoad(replica_id=replica.id, in_flight=replica.busy)
                        for replica in self._queues.retired
                    ],
                    loads=[
                        pb.EntityLoad(
                            endpoint_id=endpoint_id, served_entity_name=name, in_flight=in_flight, waiting=waiting
                        )
                        for (endpoint_id, name), (in_flight, waiting) in self._queues.loads().items()
                    ],
                    uses=uses.take(),
                )
            )
