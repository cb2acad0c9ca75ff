"""What is told of an endpoint that was measured: its metrics now, what they were, and who used it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson

from servicekit.errors import InvalidParameter
from servicekit.measures import Key, Measured
from servicekit.storage import Storage
from serving_service import store
from serving_service.consumption import NOTHING, Consumption
from serving_service.controllers import Controllers
from serving_service.exposition import EntityMetrics, exposition
from serving_service.meters import Meters
from serving_service.model import Endpoint, Minute, MinuteOfUse
from serving_service.scaling import REPLICA_CONCURRENCY
from tessera.serving.v1 import serving_pb2 as pb

T = TypeVar("T")
M = TypeVar("M", Minute, MinuteOfUse)

MINUTE_MS = 60_000
MOST_ITEMS = 1_000
"""On one page: the gateway writes each as JSON while all others wait."""

LATEST_MS = 253_402_300_800_000
"""The year 10000; what is later is no time."""

Place = tuple[Any, ...]
"""Where a page ended: minute, entity, and one name more."""


@dataclass(frozen=True, kw_only=True)
class Period:
    """Which minutes are wanted, at most `size` items of them, behind the place where an earlier page ended."""

    start: int
    """Unix minutes, like `end`, which is not in it."""
    end: int
    size: int
    after: Place


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of what there is; the token leads to the next, and is empty when there is none."""

    items: Sequence[T]
    next_token: str


class Monitoring:
    """Puts together what is measured by gateways and what is seen of replicas."""

    def __init__(self, database: Storage, meters: Meters, consumption: Consumption, controllers: Controllers) -> None:
        self._database = database
        self._meters = meters
        self._consumption = consumption
        self._controllers = controllers

    def metrics(self, endpoint: Endpoint) -> bytes:
        """The metrics of an endpoint as text: its configured entities, and others that were asked a short while ago."""
        recent = self._meters.recent(endpoint.id)
        config = endpoint.active or endpoint.pending
        configured = [Key(endpoint.id, each.name, each.model.version) for each in config.entities] if config else []
        keys = dict.fromkeys((*configured, *sorted(recent)))
        return exposition(endpoint.name, endpoint.id, [self._entity(key, recent.get(key)) for key in keys])

    async def history(self, endpoint: Endpoint, period: Period) -> Page[Minute]:
        """What was measured of an endpoint in each minute, the oldest first."""
        return await self._page(store.minutes_of, endpoint, period, lambda each: each.key.entity_version)

    async def usage(self, endpoint: Endpoint, period: Period) -> Page[MinuteOfUse]:
        """Who used an endpoint in each minute, the oldest first."""
        return await self._page(store.usage_of, endpoint, period, lambda each: each.key.principal_id)

    async def _page(
        self, read: Callable[..., list[M]], endpoint: Endpoint, period: Period, last: Callable[[M], str]
    ) -> Page[M]:
        """A page of what `read` finds; `last` is the name that tells apart what an entity has in one minute."""
        # One more than fits says that there is a next page.
        limit = period.size + 1
        found = await self._database.read(
            read, endpoint.id, start=period.start, end=period.end, after=period.after, limit=limit
        )
        token = ""
        if len(found) == limit:
            end = found[period.size - 1]
            place = (end.minute, end.key.entity, last(end))
            token = base64.urlsafe_b64encode(orjson.dumps(place)).decode()
        return Page(found[: period.size], token)

    def _entity(self, key: Key, recent: Measured | None) -> EntityMetrics:
        replicas = self._controllers.ready(key)
        return EntityMetrics(
            entity=key.entity,
            entity_version=key.entity_version,
            usage=self._consumption.of(replicas) if replicas else NOTHING,
            concurrency=len(replicas) * REPLICA_CONCURRENCY,
            recent=recent or Measured(),
            total=self._meters.total(key),
        )


def read_period(
    request: pb.ListServingEndpointMetricsHistoryRequest | pb.ListServingEndpointUsageRequest,
) -> Period:
    """What a request asks for; raises InvalidParameter."""
    now = time.time_ns() // 1_000_000
    start = request.start_time_ms if request.HasField("start_time_ms") else 0
    end = request.end_time_ms if request.HasField("end_time_ms") else now + MINUTE_MS
    for name, value in (("start_time_ms", start), ("end_time_ms", end)):
        if not 0 <= value < LATEST_MS:
            raise InvalidParameter(f"{name}: give Unix milliseconds.")
    if end < start:
        raise InvalidParameter("end_time_ms: it lies before start_time_ms.")
    size = request.page_size if request.HasField("page_size") else MOST_ITEMS
    if not 1 <= size <= MOST_ITEMS:
        raise InvalidParameter(f"page_size: give 1 to {MOST_ITEMS}.")
    return Period(start=start // MINUTE_MS, end=-(-end // MINUTE_MS), size=size, after=_place(request.page_token))


def _place(token: str) -> Place:
    if not token:
        return ()
    try:
        place = orjson.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except ValueError:
        place = None
    match place:
        case [int(minute), str(), str()] if not isinstance(minute, bool) and 0 <= minute < LATEST_MS:
            return tuple(place)
    raise InvalidParameter("page_token: give what an earlier answer said in `next_page_token`, or nothing.")
