"""What the launches of one endpoint did when: the phase that each is in, and those that ended, which are stored.

The rule: no phase is silent. Whoever looks sees for how long it has gone on, and the log says so every few seconds. A
database that cannot be written costs events and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from servicekit import tracing
from servicekit.storage import Storage, StorageError
from servicekit.tracing import Span
from serving_service import store
from serving_service.launch_metrics import LaunchMetrics
from serving_service.phases import LaunchEvent, LaunchPhase, Outcome, Step
from serving_service.reconcile import Replica

log = logging.getLogger(__name__)

BEAT_SECONDS = 4.0
"""How often the log tells what goes on, and events that could not be stored are tried again."""

MOST_UNWRITTEN = 100
"""How many events wait for a database that cannot be written; the oldest go first."""


class Timeline:
    """The launches of one endpoint. `run` stores what ended."""

    def __init__(self, endpoint_id: str, database: Storage, launched: LaunchMetrics) -> None:
        self._endpoint_id = endpoint_id
        self._database = database
        self._launched = launched
        self._steps: dict[str, tuple[Replica, Step]] = {}
        self._spans: dict[str, Span] = {}
        self._unwritten: list[LaunchEvent] = []
        self._changed = asyncio.Event()

    def enter(self, replica: Replica, phase: LaunchPhase) -> None:
        """Begins a phase of a launch, where the one before it ends."""
        step = Step(phase=phase)
        if replica.id not in self._steps:
            self._trace(replica)
        else:
            _, before = self._steps[replica.id]
            step = before.next(phase, self._end(replica.id, Outcome.SUCCEEDED, before.phase, ""))
        self.go_on(replica, step)

    def go_on(self, replica: Replica, step: Step) -> None:
        """Says that a launch is in a phase, since whenever that began."""
        self._steps[replica.id] = (replica, step)
        self._changed.set()

    def end(
        self, replica_id: str, outcome: Outcome, *, message: str = "", failed_at: LaunchPhase | None = None
    ) -> None:
        """Ends the phase that a launch is in, and with it the launch; nothing when it is over already.

        `failed_at` is what it failed at, where that is known better than by the phase.
        """
        if replica_id in self._steps:
            _, step = self._steps[replica_id]
            self._end(replica_id, outcome, failed_at or step.phase, message)
            self._launched.ended(outcome)
            if (span := self._spans.pop(replica_id, None)) is not None:
                with span:
                    span.set("tessera.outcome", outcome)
                    if outcome is Outcome.FAILED:
                        span.failed(failed_at or step.phase)

    def phase(self, replica_id: str) -> LaunchPhase | None:
        """The phase that a launch is in."""
        return self._steps[replica_id][1].phase if replica_id in self._steps else None

    def duration(self, replica_id: str) -> int | None:
        """For how long a launch has been in its phase, in milliseconds."""
        return self._steps[replica_id][1].duration if replica_id in self._steps else None

    def message(self, replica_id: str) -> str | None:
        """What a launch does, and for how long; None when it is in no phase."""
        return self._steps[replica_id][1].message if replica_id in self._steps else None

    def unstored(self) -> list[LaunchEvent]:
        """The phases that go on, and those that ended a moment ago."""
        running = [
            _event(replica, step, step.phase, Outcome.RUNNING, step.duration, step.message)
            for replica, step in self._steps.values()
        ]
        return [*self._unwritten, *running]

    async def run(self) -> None:
        """Stores what ended and tells what goes on, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS if self._steps or self._unwritten else None):
                    await self._changed.wait()
            self._changed.clear()
            await self._store()
            for replica, step in self._steps.values():
                if step.duration >= BEAT_SECONDS * 1000:
                    facts = {"endpoint": self._endpoint_id, "replica": replica.id, "entity": replica.entity}
                    log.info("launch goes on", extra={**facts, "phase": step.phase, "seconds": step.duration // 1000})

    def _trace(self, replica: Replica) -> None:
        """Begins the trace of a launch; what the launching task does from here on belongs to it."""
        span = self._spans[replica.id] = tracing.entered("launch", {}, "internal")
        tracing.make_current(span)
        span.set("tessera.endpoint_id", self._endpoint_id)
        span.set("tessera.entity", replica.entity)
        span.set("tessera.config_version", replica.version)
        span.set("tessera.replica", replica.id)

    def _end(self, replica_id: str, outcome: Outcome, phase: LaunchPhase, message: str) -> int:
        replica, step = self._steps.pop(replica_id)
        event = _event(replica, step, phase, outcome, step.duration, message)
        self._unwritten.append(event)
        self._launched.phase_ended(event)
        if replica_id in self._spans:
            failure = phase if outcome is Outcome.FAILED else ""
            self._spans[replica_id].part(step.phase, event.started_at, event.duration, failure)
        self._changed.set()
        return event.duration

    async def _store(self) -> None:
        events = tuple(self._unwritten)
        if not events:
            return
        try:
            await self._database.write(store.add_events, self._endpoint_id, events)
        except StorageError:
            log.warning("events cannot be stored", extra={"endpoint": self._endpoint_id, "events": len(events)})
            del self._unwritten[:-MOST_UNWRITTEN]
        else:
            del self._unwritten[: len(events)]


def _event(
    replica: Replica, step: Step, phase: LaunchPhase, outcome: Outcome, duration: int, message: str
) -> LaunchEvent:
    return LaunchEvent(
        replica_id=replica.id,
        version=replica.version,
        entity=replica.entity,
        phase=phase,
        outcome=outcome,
        started_at=step.started_at,
        duration=duration,
        message=message,
    )
