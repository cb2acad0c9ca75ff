"""What was measured of all endpoints: taken from gateways, each report once, kept for a while, and stored every minute.

The rule: what is in memory can be had again. A gateway keeps its reports until they are stored; the number of the last
one that is stored stands in the database with what it told, so a restart counts nothing twice and, but for queries over
gRPC of the last minute, forgets nothing. An endpoint that nobody asks costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from servicekit.errors import InvalidParameter
from servicekit.measures import Key, Measured, Measures, Taken, UsageKey, Used, reported
from servicekit.storage import Storage, StorageError
from serving_service import store
from serving_service.model import Minute, MinuteOfUse
from tessera.serving.v1 import serving_pb2 as pb

log = logging.getLogger(__name__)

WINDOW_SECONDS = 60.0
"""How far back what is called "the last minute" reaches."""

TAKE_SECONDS = 2.0
"""How often our own queries are added."""

STORE_SECONDS = 60.0
"""How often everything new is stored."""

FORGET_SECONDS = 3_600.0
"""How long after its last request a served entity that is no longer configured is shown."""


@dataclass(slots=True)
class _Gateway:
    """What we have of one gateway's reports."""

    received: int
    stored: int


@dataclass(slots=True)
class _Total:
    """All that was measured of one served entity since this process started, and when last."""

    measured: Measured
    last: float


class Meters:
    """The measures of all endpoints, for the life of the service. Lives on one event loop.

    `own` are those of queries that Serving itself passes on, `count_replicas` tells how many run of an entity. `now`
    tells seconds on a clock that nobody can set, `wall` Unix seconds. Usage is kept for `usage_days`.
    """

    def __init__(
        self,
        database: Storage,
        own: Measures,
        count_replicas: Callable[[Key], int],
        *,
        usage_days: int,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._own = own
        self._count_replicas = count_replicas
        self._now, self._wall = now, wall
        self._gateways: dict[str, _Gateway] = {}
        self._usage_days = usage_days
        self._window: deque[tuple[float, Mapping[Key, Measured]]] = deque()
        self._totals: dict[Key, _Total] = {}
        self._unstored: dict[tuple[Key, int], Measured] = {}
        self._unstored_usage: dict[tuple[UsageKey, int], Used] = {}

    async def load(self) -> None:
        """Learns which reports are stored; before the first is received."""
        stored = await self._database.read(store.stored_reports)
        self._gateways = {each: _Gateway(sequence, sequence) for each, sequence in stored.items()}

    def receive(self, report: pb.MeasuresReport) -> pb.MeasuresReceipt:
        """Counts what a gateway measured, unless it is not the report that is expected from it.

        Raises InvalidParameter for counts that are not between our bounds.
        """
        gateway = self._gateways.setdefault(report.gateway_id, _Gateway(0, 0))
        expected = max(gateway.received + 1, report.oldest_sequence)
        if report.sequence == expected:
            try:
                taken = reported(report)
            except ValueError as error:
                raise InvalidParameter(f"entities: {error}. Gateway and Serving must be of the same version.") from None
            gateway.received = report.sequence
            self._add(taken, report.end_time / 1000)
            expected += 1
        return pb.MeasuresReceipt(expected_sequence=expected, stored_sequence=gateway.stored)

    def recent(self, endpoint_id: str) -> dict[Key, Measured]:
        """What was measured of an endpoint in the last minute."""
        self._take_own()
        self._forget_window()
        found: dict[Key, Measured] = {}
        for _, measured in self._window:
            for key, one in measured.items():
                if key.endpoint_id == endpoint_id:
                    found.setdefault(key, Measured()).merge(one)
        return found

    def total(self, key: Key) -> Measured:
        """What was measured of a served entity since this process started."""
        total = self._totals.get(key)
        return Measured() if total is None else total.measured

    async def run(self) -> None:
        """Adds our own queries, stores and forgets, until cancelled; then stores once more."""
        due = self._now() + STORE_SECONDS
        storing: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.sleep(TAKE_SECONDS)
                self._take_own()
                self._forget_window()
                if self._now() >= due:
                    storing = asyncio.create_task(self.store())
                    await asyncio.shield(storing)
                    due = self._now() + STORE_SECONDS
        finally:
            if storing is not None:  # what it takes along is back only when it has failed
                await asyncio.wait([storing])
            self._take_own()
            await self.store()

    async def store(self) -> None:
        """Stores what is not stored yet; when that fails, it is tried again with the next."""
        unstored, self._unstored = self._unstored, {}
        usage, self._unstored_usage = self._unstored_usage, {}
        received = {each: gateway.received for each, gateway in self._gateways.items() if gateway.received}
        behind = {each: sequence for each, sequence in received.items() if sequence > self._gateways[each].stored}
        if not unstored and not usage and not behind:
            return
        minutes = [
            Minute(key, minute, measured, self._count_replicas(key)) for (key, minute), measured in unstored.items()
        ]
        try:
            known = await self._database.write(
                store.add_measures,
                minutes,
                [MinuteOfUse(key, minute, used) for (key, minute), used in usage.items()],
                reports=behind,
                now=int(self._wall()),
                usage_days=self._usage_days,
            )
        except StorageError:
            log.warning("measures cannot be stored yet", extra={"minutes": len(unstored)})
            for place, measured in unstored.items():
                self._unstored.setdefault(place, Measured()).merge(measured)
            for use, used in usage.items():
                self._unstored_usage.setdefault(use, Used()).merge(used)
            return
        for each, sequence in behind.items():
            self._gateways[each].stored = sequence
        self._forget_totals(known)

    def _take_own(self) -> None:
        if taken := self._own.take():
            self._add(taken, self._wall())

    def _add(self, taken: Taken, ended_at: float) -> None:
        """Counts what was measured until `ended_at` (Unix seconds); what is older than a minute is no news."""
        wall, now = self._wall(), self._now()
        ended_at = min(ended_at, wall)
        if wall - ended_at < WINDOW_SECONDS:
            self._window.append((now - (wall - ended_at), taken.entities))
        minute = int(ended_at // 60)
        for use, used in taken.usage.items():
            self._unstored_usage.setdefault((use, minute), Used()).merge(used)
        for key, one in taken.entities.items():
            self._unstored.setdefault((key, minute), Measured()).merge(one)
            total = self._totals.setdefault(key, _Total(Measured(), now))
            total.measured.merge(one)
            total.last = now

    def _forget_window(self) -> None:
        oldest = self._now() - WINDOW_SECONDS
        while self._window and self._window[0][0] <= oldest:
            self._window.popleft()

    def _forget_totals(self, known: Iterable[str]) -> None:
        """Forgets the endpoints that are gone, and what nobody has asked for a long time."""
        known, oldest = set(known), self._now() - FORGET_SECONDS
        self._totals = {
            key: total for key, total in self._totals.items() if key.endpoint_id in known and total.last > oldest
        }
