"""Which replica a request goes to, and when: as many at a time as a replica takes, the others in turn.

An entity at zero is woken by the request that waits for it. Who waits is answered at the latest when the time is over,
and at once when what it waits for cannot come.
"""

from __future__ import annotations

from collections.abc import Collection

from gateway.routes import Endpoint, Entity, RoutingTable
from servicekit import tracing
from servicekit.admission import Queue, QueueFull, Server, Turn
from servicekit.errors import BadRequest, NotFound, TooManyRequests, Unavailable
from servicekit.measures import Invocation

COLD_RETRY_SECONDS = 5
"""When to ask again after waiting for an entity that did not come up in time."""


class EndpointNotFound(NotFound):
    """No such endpoint or entity on the data plane, or none that this caller may know of (contract 6.7)."""

    reason = "ENDPOINT_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__(
            "The given endpoint does not exist, please retry after checking the specified model and version deployment"
            " exists."
        )


class TooBusy(TooManyRequests):
    """All replicas are busy, and as many requests wait as may, or this one has waited as long as it may."""

    def __init__(self) -> None:
        super().__init__(
            "Too many concurrent requests. Consider increasing the provisioned concurrency of the served entity.",
            retry_after=1,
        )


class Admission:
    """Finds replicas for requests. `seconds` is how long one may wait."""

    def __init__(self, table: RoutingTable, *, seconds: float) -> None:
        self._table = table
        self._seconds = seconds

    def place(self, endpoint: Endpoint, entity_name: str | None, measured: Invocation) -> Place:
        """The way to a replica of the endpoint, or of one entity of it, for one request, of which `measured` hears."""
        return Place(self._table, endpoint, entity_name, measured, seconds=self._seconds)


class Place(Turn):
    """A request's place on a replica, by the table as it is when it looks."""

    def __init__(
        self, table: RoutingTable, endpoint: Endpoint, entity_name: str | None, measured: Invocation, *, seconds: float
    ) -> None:
        super().__init__(seconds=seconds)
        self._table = table
        self._endpoint = endpoint
        self._entity_name = entity_name
        self._measured = measured
        self.entity: Entity

    async def __aenter__(self) -> Server:
        """Raises EndpointNotFound, BadRequest, TooBusy or Unavailable."""
        try:
            replica = await super().__aenter__()
        except QueueFull:
            raise TooBusy from None
        except TimeoutError:
            if self.queue.servers:
                raise TooBusy from None
            raise Unavailable(
                f"{self.entity.name} is scaling from zero and was not up in time. Try again in a moment.",
                retry_after=COLD_RETRY_SECONDS,
            ) from None
        self._measured.sent()
        return replica

    def choose(self, avoided: Collection[Server]) -> Queue:
        """As the table is now; raises EndpointNotFound, BadRequest or Unavailable."""
        endpoint, name = self._table.endpoint(self._endpoint.name), self._entity_name
        if endpoint is None or endpoint.id != self._endpoint.id:
            raise EndpointNotFound
        if endpoint.is_stopped:
            raise BadRequest(f"Endpoint {endpoint.name} is stopped. Start it, then ask again.")
        entity = endpoint.chosen() if name is None else endpoint.entity(name)
        if entity is None and name is not None:
            raise EndpointNotFound
        if entity is None or not entity.can_answer:
            raise _not_ready(endpoint, name)
        if entity.replicas and all(replica in avoided for replica in entity.replicas):
            raise BadRequest(
                f"Endpoint {endpoint.name} is not ready: {entity.name} takes no requests just now. If that goes on, it"
                " is started again."
            )
        self.entity = entity
        self._measured.chosen(entity.name, entity.version)
        tracing.current().set("tessera.entity", entity.name)
        return entity.queue


def _not_ready(endpoint: Endpoint, entity_name: str | None) -> BadRequest:
    idle = [one for one in endpoint.entities if not one.can_answer and entity_name in (None, one.name)]
    why = " ".join(one.problem for one in idle if one.problem) or "The endpoint's state and logs say why."
    names = ", ".join(one.name for one in idle)
    return BadRequest(f"Endpoint {endpoint.name} is not ready: {names} has no running replica just now. {why}")
