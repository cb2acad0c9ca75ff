"""Queries over gRPC: pick an entity by its share, send the body to its replica, stream the answer back.

The same way that requests take through a gateway, with the same limits and the same waiting. Bodies are passed on as
they are; nothing of them is logged.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass

from servicekit import tracing
from servicekit.access import AccessTable
from servicekit.admission import Queue, QueueFull, Server, Turn
from servicekit.context import Principal, caller_again, current_decision
from servicekit.errors import BadRequest, DeadlineExceeded
from servicekit.http_client import ConnectFailed, HttpError, HttpPool, HttpResponse, HttpTimeout
from servicekit.measures import TIMING, Invocation, Measures, Tokens
from servicekit.rate_limits import Charge, Ledger
from serving_service.errors import ModelServerFailed, NotDeployed, NotReady, NotUpYet, Stopped, TooBusy
from serving_service.routes import EndpointRoutes, EntityRoutes, RouteTable
from tessera import policy

MAX_BODY_BYTES = 16 << 20
DEFAULT_CONTENT_TYPE = "application/json"

_UNSENDABLE = re.compile(r"[\r\n\0]")

SPAN = "invocation"
"""What the way to a model is called in a trace."""


@dataclass(frozen=True)
class AnswerHead:
    """What is known of an answer before its body."""

    status: int
    content_type: str
    entity: str


class Queries:
    """Sends queries to replicas."""

    def __init__(
        self,
        routes: RouteTable,
        access: AccessTable,
        pool: HttpPool,
        ledger: Ledger,
        measures: Measures,
        *,
        deadline: float,
        queue_seconds: float,
    ) -> None:
        self._queue_seconds = queue_seconds
        self._routes = routes
        self._access = access
        self._pool = pool
        self._ledger = ledger
        self._measures = measures
        self._deadline = deadline

    async def query(
        self, name: str, entity_name: str, content_type: str, body: bytes, *, caller: Principal, timeout: float | None
    ) -> AsyncIterator[AnswerHead | bytes]:
        """The answer of a model: its head, then its body as it comes.

        `entity_name` is empty for the traffic split; `timeout` is in seconds. Raises NotDeployed,
        EndpointPermissionDenied, RateLimited, Stopped, NotReady, TooBusy, NotUpYet, ModelServerFailed,
        DeadlineExceeded, and BadRequest for a body that cannot be sent.
        """
        if len(body) > MAX_BODY_BYTES:
            raise BadRequest(f"The body has {len(body)} bytes, more than the limit of {MAX_BODY_BYTES}. Send less.")
        routes = await self._permitted(name, caller)
        tracked = caller if routes.is_usage_tracked else None
        with self._measures.began(routes.endpoint_id, tracked=tracked) as measured, tracing.within(SPAN):
            charge = self._ledger.admit(routes.limits, caller)
            async for part in self._answer(routes, entity_name, content_type, body, timeout, charge, measured):
                yield part

    async def _answer(
        self,
        routes: EndpointRoutes,
        entity_name: str,
        content_type: str,
        body: bytes,
        timeout: float | None,
        charge: Charge,
        measured: Invocation,
    ) -> AsyncIterator[AnswerHead | bytes]:
        if _UNSENDABLE.search(content_type):
            raise BadRequest("The body's content type cannot be sent. Use application/json.")
        timeout = self._deadline if timeout is None else min(timeout, self._deadline)
        until = asyncio.get_running_loop().time() + timeout
        headers = [(b"content-type", (content_type or DEFAULT_CONTENT_TYPE).encode())]
        span = tracing.current()
        span.set("tessera.endpoint", routes.name)
        headers += [(name.encode(), value.encode("latin-1")) for name, value in span.headers()]
        place = _Place(
            self._routes, routes, entity_name, measured, until=until, seconds=min(self._queue_seconds, timeout)
        )
        while True:
            try:
                async with place as replica:
                    if place.has_waited:
                        await self._permitted(routes.name, await caller_again())
                    left = until - asyncio.get_running_loop().time()
                    response = await self._pool.send(
                        replica.address, "POST", "/invocations", headers, body, timeout=left
                    )
                    async with response:
                        measured.answered(response.status, response.header(TIMING))
                        yield AnswerHead(response.status, _content_type(response), place.entity.name)
                        with Tokens(response.header(b"content-type"), charge, measured) as tokens:
                            async for piece in response:
                                tokens.feed(piece)
                                yield piece
                        return
            except ConnectFailed:
                place.avoid(replica)  # nothing was sent
            except HttpTimeout:
                raise DeadlineExceeded(f"Served entity '{place.entity.name}' did not answer in time.") from None
            except HttpError:
                raise ModelServerFailed(place.entity.name) from None

    async def _permitted(self, name: str, caller: Principal) -> EndpointRoutes:
        """The endpoint's routes; raises NotDeployed also when the caller may not know of it."""
        decision = current_decision(policy.ENDPOINT)
        await self._access.known()
        routes = await self._routes.find(name)
        level = self._access.decide(decision, caller, name=name, endpoint_id=routes.endpoint_id if routes else None)
        if routes is None or level is None:
            raise NotDeployed
        return routes


class _Place(Turn):
    """A query's place on a replica, by the routes as they are when it looks.

    It is given back at `until`, the deadline of the exchange, on the loop's clock: the query itself may last longer,
    while gRPC waits for a caller who does not read.
    """

    def __init__(
        self,
        table: RouteTable,
        routes: EndpointRoutes,
        entity_name: str,
        measured: Invocation,
        *,
        until: float,
        seconds: float,
    ) -> None:
        super().__init__(seconds=seconds)
        self._deadline = until
        self._leaving: asyncio.TimerHandle | None = None
        self._table = table
        self._endpoint_id = routes.endpoint_id
        self._entity_name = entity_name
        self._measured = measured
        self.entity: EntityRoutes

    async def __aenter__(self) -> Server:
        try:
            server = await super().__aenter__()
        except QueueFull:
            raise TooBusy from None
        except TimeoutError:
            raise (TooBusy() if self.queue.servers else NotUpYet(self.entity.name)) from None
        self._measured.sent()
        self._leaving = asyncio.get_running_loop().call_at(self._deadline, self.leave)
        return server

    def leave(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
        super().leave()

    def choose(self, avoided: Collection[Server]) -> Queue:
        """As the routes are now; raises NotDeployed, Stopped or NotReady."""
        routes = self._table.now(self._endpoint_id)
        if routes is None:
            raise NotDeployed
        if routes.is_stopped:
            raise Stopped(routes.name)
        entity = _chosen(routes, self._entity_name)
        if entity is None or not entity.can_answer:
            asked = [each for each in routes.entities if self._entity_name in ("", each.name)]
            raise NotReady(routes.name, {each.name: each.problem for each in asked if not each.can_answer})
        queue = self._table.loads.queues.of(routes.endpoint_id, entity.name)
        if queue.servers and all(server in avoided for server in queue.servers):
            raise NotReady(routes.name, {entity.name: ""})
        self.entity = entity
        self._measured.chosen(entity.name, entity.version)
        tracing.current().set("tessera.entity", entity.name)
        return queue


def _chosen(routes: EndpointRoutes, entity_name: str) -> EntityRoutes | None:
    if not routes.entities:
        raise NotDeployed
    if not entity_name:
        return routes.pick()
    for entity in routes.entities:
        if entity.name == entity_name:
            return entity
    raise NotDeployed


def _content_type(response: HttpResponse) -> str:
    return response.header(b"content-type").decode("latin-1") or DEFAULT_CONTENT_TYPE
