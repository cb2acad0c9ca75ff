"""The table by which an invocation finds a replica, kept up to date by a stream from Serving.

The last table stays in force while Serving is gone, so inference needs no service but this one. A replica that leaves
the table gets no new request; how many it is still answering is reported until there are none, which is what Serving
waits for before it stops the process.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import grpc

from servicekit import channels, followed
from servicekit.rate_limits import SHARE_SECONDS, Feed, Ledger, Limits
from tessera.serving.v1 import serving_pb2 as pb
from tessera.serving.v1 import serving_pb2_grpc as rpc


@dataclass(slots=True, eq=False)
class Replica:
    """One replica, with the number of requests that this gateway has in flight on it."""

    id: str
    address: str
    in_flight: int = 0
    is_retired: bool = False


@dataclass(frozen=True, slots=True)
class Entity:
    """A served entity and the replicas that are ready."""

    name: str
    version: str
    """That of its model."""
    traffic_percentage: int
    replicas: tuple[Replica, ...]


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
        """An entity drawn by the traffic split among those that have a replica; None when none of them can answer."""
        able = [entity for entity in self.entities if entity.replicas and entity.traffic_percentage]
        if len(able) == 1:
            return able[0]
        weights = [entity.traffic_percentage for entity in able]
        return random.choices(able, weights)[0] if able else None  # noqa: S311 (a split, not a secret)


@dataclass(slots=True)
class _Report:
    """What Serving has not been told yet."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    demand: set[tuple[str, str]] = field(default_factory=set)


class RoutingTable:
    """All endpoints by name. `follow` keeps it up to date; `known` is set from the first table on.

    What is used of rate limits is told to Serving, and heard from it, by the same stream.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.known = asyncio.Event()
        self._by_name: dict[str, Endpoint] = {}
        self._by_id: dict[str, Endpoint] = {}
        self._replicas: dict[str, Replica] = {}
        self._revision = 0
        self._report = _Report()

    def endpoint(self, name: str) -> Endpoint | None:
        """The endpoint called `name`, if there is one."""
        return self._by_name.get(name)

    def count(self) -> int:
        """How many endpoints there are."""
        return len(self._by_id)

    def in_flight(self) -> int:
        """How many requests replicas are answering, here."""
        return sum(replica.in_flight for replica in self._replicas.values())

    def begin(self, replicas: Sequence[Replica]) -> Replica:
        """Takes the least busy of the replicas for one request; `end` gives it back."""
        replica = min(replicas, key=lambda one: one.in_flight)
        replica.in_flight += 1
        return replica

    def end(self, replica: Replica) -> None:
        """The request that `begin` took the replica for is over."""
        replica.in_flight -= 1
        if replica.is_retired and replica.in_flight == 0:
            self._replicas.pop(replica.id, None)
            self._report.changed.set()

    def ask_for(self, endpoint: Endpoint, entity_names: Sequence[str]) -> None:
        """Tells Serving that these entities were asked for and have no replica."""
        self._report.demand.update((endpoint.id, name) for name in entity_names)
        self._report.changed.set()

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
        for routes in table.endpoints:
            # A name can pass to a new endpoint in the same message that removes the old one.
            self._remove(routes.endpoint_id)
            endpoint = self._endpoint(routes)
            self._by_id[endpoint.id] = self._by_name[endpoint.name] = endpoint
        current = {
            replica.id
            for endpoint in self._by_id.values()
            for entity in endpoint.entities
            for replica in entity.replicas
        }
        for replica in list(self._replicas.values()):
            replica.is_retired = replica.id not in current
            if replica.is_retired and replica.in_flight == 0:
                del self._replicas[replica.id]
        self._revision = table.revision
        self.known.set()
        self._report.changed.set()

    def _remove(self, endpoint_id: str) -> None:
        endpoint = self._by_id.pop(endpoint_id, None)
        if endpoint is not None and self._by_name.get(endpoint.name) is endpoint:
            del self._by_name[endpoint.name]

    def _endpoint(self, routes: pb.EndpointRoutes) -> Endpoint:
        entities = [
            Entity(
                entity.name,
                entity.entity_version,
                entity.traffic_percentage,
                tuple(self._replica(route) for route in entity.replicas),
            )
            for entity in routes.entities
        ]
        limits = Limits(routes.endpoint_id, tuple(routes.rate_limits))
        return Endpoint(
            routes.endpoint_id, routes.name, tuple(entities), limits, routes.is_stopped, routes.is_usage_tracked
        )

    def _replica(self, route: pb.ReplicaRoute) -> Replica:
        replica = self._replicas.get(route.replica_id)
        if replica is None:
            replica = self._replicas[route.replica_id] = Replica(route.replica_id, route.address)
        return replica

    async def follow(self, channel: grpc.aio.Channel) -> None:
        """Keeps the table up to date until cancelled; comes back by itself when Serving was gone."""
        await followed.follow("routes", partial(self._follow_once, channel), heard=lambda: self._revision)

    async def _follow_once(self, channel: grpc.aio.Channel) -> None:
        self._revision = 0
        self._report.changed.set()
        stream = rpc.RoutesStub(channel).Watch(metadata=channels.outgoing_metadata())
        share_soon = partial(asyncio.get_running_loop().call_later, SHARE_SECONDS, self._report.changed.set)
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
            await self._report.changed.wait()
            self._report.changed.clear()
            demand, self._report.demand = self._report.demand, set()
            await stream.write(
                pb.RouteReport(
                    acknowledged_revision=self._revision,
                    retired=[
                        pb.ReplicaLoad(replica_id=replica.id, in_flight=replica.in_flight)
                        for replica in self._replicas.values()
                        if replica.is_retired
                    ],
                    demand=[pb.EntityDemand(endpoint_id=one, served_entity_name=name) for one, name in sorted(demand)],
                    uses=uses.take(),
                )
            )
