"""What is measured of invocations, by whoever passes them on: a gateway, or Serving for queries over gRPC.

The rule: it stands in the way of every request, so it is a few additions and nothing is ever waited for. What was
measured is taken away now and then, and what goes on meanwhile is counted where it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self

from servicekit import token_usage
from servicekit.context import Principal
from servicekit.distribution import Distribution
from servicekit.errors import HTTP_STATUS, ServiceError
from servicekit.rate_limits import Charge
from servicekit.token_usage import MOST_SUMMED, Usage
from tessera.serving.v1 import serving_pb2 as pb

TIMING = b"x-tessera-timing"
"""The header by which a model server says how long a request waited there and how long its model took: milliseconds,
with a space between. In the head of a stream the second is not known yet, and missing."""

LONGEST_MS = 1e9
"""That a model server is believed to have taken."""

NOBODY_ANSWERED = 0
"""The status of a request whose caller went away."""


class Key(NamedTuple):
    """What measures are about. Without an entity: requests for which none had been chosen yet."""

    endpoint_id: str
    entity: str = ""
    entity_version: str = ""


class Measured:
    """What was measured of one served entity; durations are milliseconds."""

    __slots__ = ("busy", "failed", "latency", "prediction", "queue", "refused", "requests")

    def __init__(self) -> None:
        self.requests = self.refused = self.failed = 0
        self.busy = 0.0
        """How long requests were under way, all together."""
        self.latency, self.prediction, self.queue = Distribution(), Distribution(), Distribution()

    def merge(self, other: Measured) -> None:
        """Adds all of `other`."""
        self.requests += other.requests
        self.refused += other.refused
        self.failed += other.failed
        self.busy += other.busy
        self.latency.merge(other.latency)
        self.prediction.merge(other.prediction)
        self.queue.merge(other.queue)


class UsageKey(NamedTuple):
    """Who used what. `requester` is the principal's name at the time."""

    endpoint_id: str
    entity: str
    principal_id: str
    requester: str


class Used:
    """How much of an endpoint whose usage is tracked somebody used."""

    __slots__ = ("failed", "input_tokens", "output_tokens", "refused", "requests")

    def __init__(self) -> None:
        self.requests = self.refused = self.failed = 0
        self.input_tokens = self.output_tokens = 0

    def merge(self, other: Used) -> None:
        """Adds all of `other`."""
        self.requests += other.requests
        self.refused += other.refused
        self.failed += other.failed
        self.add_tokens(other.input_tokens, other.output_tokens)

    def add_tokens(self, read: int, written: int) -> None:
        """Adds tokens, up to MOST_SUMMED of each."""
        self.input_tokens = min(self.input_tokens + read, MOST_SUMMED)
        self.output_tokens = min(self.output_tokens + written, MOST_SUMMED)


@dataclass(frozen=True, slots=True)
class Taken:
    """All that was measured in a while."""

    entities: dict[Key, Measured]
    usage: dict[UsageKey, Used]

    def __bool__(self) -> bool:
        return bool(self.entities or self.usage)


class Invocation:
    """One request under way. As a context it ends the request, with the error that leaves it as the answer."""

    __slots__ = ("_began", "_key", "_measures", "_queue", "_queued", "_requester", "_sent", "_took", "_usage", "status")

    def __init__(self, measures: Measures, endpoint_id: str, requester: Principal | None) -> None:
        self._measures = measures
        self._requester = requester
        self._usage: Usage | None = None
        self._key = Key(endpoint_id)
        self._began = self._sent = measures.now()
        self._queued = False
        self._queue = 0.0
        self._took: float | None = None
        self.status = NOBODY_ANSWERED
        """The HTTP status of the answer."""

    def chosen(self, entity: str, entity_version: str) -> None:
        """Says which served entity is to answer; again when it is to be another one."""
        if self._key.entity:
            self._measures.leave(self._key)
        self._key = Key(self._key.endpoint_id, entity, entity_version)
        self._measures.enter(self._key)

    def sent(self) -> None:
        """Says that the request waits no longer and goes to a model server."""
        self._sent = self._measures.now()
        self._queued = True

    def answered(self, status: int, timing: bytes = b"") -> None:
        """Says what the model server answered; `timing` is what it said under `TIMING`."""
        self.status = status
        said = _milliseconds(timing)
        self._queue = said[0] if said else 0.0
        self._took = said[1] if len(said) > 1 else None

    @property
    def wants_tokens(self) -> bool:
        """Whether it is to be told how many tokens the answer took."""
        return self._requester is not None

    def used(self, usage: Usage | None) -> None:
        """Says how many tokens the answer took; None: it does not tell."""
        self._usage = usage

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.status = self._measures.status_of(error)
        now = self._measures.now()
        measured = self._measures.leave(self._key)
        self._count(measured)
        if self._requester is not None:
            used = self._measures.used_by(self._key, self._requester)
            self._count(used)
            if self._usage is not None:
                used.add_tokens(self._usage.input_tokens, self._usage.output_tokens)
        if self.status != NOBODY_ANSWERED:
            measured.latency.add((now - self._began) * 1000)
        if self._queued:
            measured.queue.add((self._sent - self._began) * 1000 + self._queue)
        if self._took is not None:
            measured.prediction.add(self._took)
        elif self._queued and 200 <= self.status < 300:  # a stream: its model works until its end
            measured.prediction.add(max((now - self._sent) * 1000 - self._queue, 0.0))

    def _count(self, counts: Measured | Used) -> None:
        counts.requests += 1
        counts.refused += 400 <= self.status < 500
        counts.failed += self.status >= 500


class Tokens:
    """Hears an answer as it passes, and tells in the end, however that came, how many tokens were used by then."""

    __slots__ = ("_charge", "_measured", "_usage")

    def __init__(self, content_type: bytes, charge: Charge, measured: Invocation) -> None:
        wanted = charge.wants_tokens or measured.wants_tokens
        self._usage = token_usage.reader(content_type) if wanted else None
        self._charge = charge
        self._measured = measured

    def feed(self, piece: bytes) -> None:
        """The next piece of the answer."""
        if self._usage is not None:
            self._usage.feed(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._usage is not None:
            self._charge.tokens(self._usage.total())
            self._measured.used(self._usage.usage())


class _Flow:
    """The requests under way on one key, and for how long they have been since that was last looked at."""

    __slots__ = ("count", "since")

    def __init__(self, now: float) -> None:
        self.count = 0
        self.since = now


class Measures:
    """Everything that was measured since it was last taken. Lives on one event loop. `now` tells seconds."""

    def __init__(
        self, *, gone: type[BaseException] = asyncio.CancelledError, now: Callable[[], float] = time.perf_counter
    ) -> None:
        """`gone` is what a request is given up with when its caller hangs up."""
        self.now = now
        self._gone = gone
        self._measured: dict[Key, Measured] = {}
        self._usage: dict[UsageKey, Used] = {}
        self._flows: dict[Key, _Flow] = {}

    def began(self, endpoint_id: str, *, tracked: Principal | None = None) -> Invocation:
        """A request to an endpoint; enter it as a context. `tracked`: the caller, where it is recorded who that is."""
        return Invocation(self, endpoint_id, tracked)

    def take(self) -> Taken:
        """All that was measured since the last time."""
        for key in self._flows:
            self._look(key)
        taken = Taken(self._measured, self._usage)
        self._measured, self._usage = {}, {}
        return taken

    def used_by(self, key: Key, principal: Principal) -> Used:
        """Where it is counted what a caller uses."""
        usage = UsageKey(key.endpoint_id, key.entity, principal.id, principal.name)
        used = self._usage.get(usage)
        if used is None:
            used = self._usage[usage] = Used()
        return used

    def enter(self, key: Key) -> None:
        """One more request is under way."""
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(self.now())
        else:
            self._look(key)
        flow.count += 1

    def leave(self, key: Key) -> Measured:
        """A request is over; where it is to be counted."""
        if not key.entity:
            return self._of(key)
        measured = self._look(key)
        flow = self._flows[key]
        flow.count -= 1
        if not flow.count:
            del self._flows[key]
        return measured

    def status_of(self, error: BaseException) -> int:
        """What a request that ended with an error was answered."""
        if isinstance(error, ServiceError):
            return error.http_status or HTTP_STATUS.get(error.reason, 500)
        return NOBODY_ANSWERED if isinstance(error, self._gone) or not isinstance(error, Exception) else 500

    def _look(self, key: Key) -> Measured:
        """Adds the time that requests were under way until now."""
        measured = self._of(key)
        flow, now = self._flows[key], self.now()
        measured.busy += flow.count * (now - flow.since) * 1000
        flow.since = now
        return measured

    def _of(self, key: Key) -> Measured:
        measured = self._measured.get(key)
        if measured is None:
            measured = self._measured[key] = Measured()
        return measured


def report(taken: Taken) -> pb.MeasuresReport:
    """What was measured, to be told."""
    return pb.MeasuresReport(
        entities=[_entity(key, measured) for key, measured in taken.entities.items()],
        usage=[
            pb.UsageMeasures(
                endpoint_id=key.endpoint_id,
                served_entity_name=key.entity,
                principal_id=key.principal_id,
                requester=key.requester,
                requests=used.requests,
                refused=used.refused,
                failed=used.failed,
                input_tokens=used.input_tokens,
                output_tokens=used.output_tokens,
            )
            for key, used in taken.usage.items()
        ],
    )


def reported(message: pb.MeasuresReport) -> Taken:
    """What a report tells; raises ValueError when its counts are not between our bounds."""
    taken = Taken({}, {})
    for entity in message.entities:
        measured = taken.entities[Key(entity.endpoint_id, entity.served_entity_name, entity.entity_version)] = (
            Measured()
        )
        measured.requests, measured.refused, measured.failed = entity.requests, entity.refused, entity.failed
        measured.busy = entity.busy_ms
        for name in ("latency", "prediction", "queue"):
            said: pb.Distribution = getattr(entity, name)
            setattr(measured, name, Distribution(said.counts, said.sum_ms))
    for use in message.usage:
        key = UsageKey(use.endpoint_id, use.served_entity_name, use.principal_id, use.requester)
        used = taken.usage[key] = Used()
        used.requests, used.refused, used.failed = use.requests, use.refused, use.failed
        used.add_tokens(use.input_tokens, use.output_tokens)
    return taken


def _entity(key: Key, measured: Measured) -> pb.EntityMeasures:
    return pb.EntityMeasures(
        endpoint_id=key.endpoint_id,
        served_entity_name=key.entity,
        entity_version=key.entity_version,
        requests=measured.requests,
        refused=measured.refused,
        failed=measured.failed,
        busy_ms=measured.busy,
        latency=_distribution(measured.latency),
        prediction=_distribution(measured.prediction),
        queue=_distribution(measured.queue),
    )


def _distribution(distribution: Distribution) -> pb.Distribution:
    counts = distribution.counts if distribution.count else ()
    return pb.Distribution(counts=counts, sum_ms=distribution.sum)


def _milliseconds(timing: bytes) -> list[float]:
    """The durations that a model server says; none where it says nothing, or nothing that can be."""
    try:
        said = [float(part) for part in timing.split()]
    except ValueError:
        return []
    return said if all(0 <= one <= LONGEST_MS for one in said) else []
