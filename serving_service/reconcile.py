"""What to do next for one endpoint: a pure decision from what is desired and what was observed.

The rules: the active configuration is served, unless the endpoint was stopped, until the pending one is ready in all
its parts and has been activated; nothing is stopped that could still be needed; a plan can be made at any time, however
often, and ends in a state where there is nothing left to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

FIRST_BACKOFF = 10.0
LONGEST_BACKOFF = 300.0
GOOD_SECONDS = 600.0
"""A replica that was ready for so long has shown that its predecessor's end was an accident."""

FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0


class Phase(Enum):
    """How far a replica has come."""

    STARTING = auto()
    READY = auto()
    ENDED = auto()
    """No process is left, or it is about to end."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A replica as it was last observed."""

    id: str
    version: int
    entity: str
    phase: Phase = Phase.STARTING
    message: str = ""
    """What it is doing, or why it ended."""
    is_final: bool = False
    """Whether it failed to start in a way that trying again does not change."""
    is_stopping: bool = False

    @property
    def is_live(self) -> bool:
        return self.phase is not Phase.ENDED and not self.is_stopping


@dataclass(frozen=True)
class Retry:
    """When an entity whose start failed may be tried again, on the caller's clock, and what failed."""

    failures: int
    not_before: float
    message: str
    waits: int = 0
    """How often in a row something was missing that a launch needs."""


@dataclass(frozen=True, kw_only=True)
class Desired:
    """What the records ask for. Versions are given with the names of their entities."""

    is_deleted: bool = False
    is_updating: bool = False
    active: tuple[int, tuple[str, ...]] | None = None
    pending: tuple[int, tuple[str, ...]] | None = None
    is_stopped: bool = False
    """Whether the active version is not to run."""
    deadline: float = 0.0
    """When the update under way counts as failed, on the caller's clock."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What there is: replicas, the oldest first, and what failed before."""

    replicas: tuple[Replica, ...] = ()
    retries: Mapping[tuple[int, str], Retry] = field(default_factory=dict)

    def of(self, version: int, entity: str) -> list[Replica]:
        """The replicas of one entity that are not being stopped, the oldest first."""
        return [r for r in self.replicas if (r.version, r.entity) == (version, entity) and not r.is_stopping]

    def is_ready(self, version: int, entity: str) -> bool:
        return any(replica.phase is Phase.READY for replica in self.of(version, entity))


@dataclass(frozen=True)
class StartReplica:
    """Start a replica of an entity."""

    version: int
    entity: str


@dataclass(frozen=True)
class Activate:
    """Switch to the pending version."""

    version: int


@dataclass(frozen=True)
class FailUpdate:
    """Give the update up. `causes` holds a sentence per entity that failed; the others were given up with it."""

    version: int
    causes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class StopReplica:
    """End a replica once nobody uses it, and keep its log or forget it."""

    replica_id: str
    keep_log: bool = False


Action = StartReplica | Activate | FailUpdate | StopReplica


def plan(desired: Desired, observed: Observed, now: float) -> list[Action]:
    """What to do next so that `observed` comes closer to `desired`; safe to call at any time."""
    wanted = _versions(desired)
    actions: list[Action] = [
        StopReplica(replica.id)
        for replica in observed.replicas
        if replica.version not in wanted and not replica.is_stopping
    ]
    if desired.is_deleted:
        return actions
    if desired.active is not None:
        version, entities = desired.active
        if desired.is_stopped:
            actions += _rest(version, entities, observed)
        else:
            actions += _keep_running(version, entities, observed, now)
    if desired.pending is not None:
        version, entities = desired.pending
        if desired.is_updating:
            actions += _deploy(version, entities, observed, desired.deadline, now)
        else:
            actions += _rest(version, entities, observed)
    return actions


def next_look(desired: Desired, observed: Observed, now: float) -> float | None:
    """When time alone makes another plan: the end of a back-off or the deadline of an update; None: never."""
    times = [retry.not_before for retry in observed.retries.values() if retry.not_before > now]
    if desired.is_updating and not desired.is_deleted:
        times.append(max(desired.deadline, now))
    return min(times, default=None)


def after_end(before: Retry | None, *, ready_seconds: float, message: str, now: float) -> Retry:
    """When to start an entity again whose replica ended: at once the first time, then later and later."""
    failures = 1 if before is None or ready_seconds >= GOOD_SECONDS else before.failures + 1
    delay = 0.0 if failures == 1 else min(FIRST_BACKOFF * 2.0 ** min(failures - 2, 16), LONGEST_BACKOFF)
    return Retry(failures, now + delay, message)


def after_wait(before: Retry | None, *, message: str, now: float) -> Retry:
    """When to look again whether something that a launch needs is back; soon, for it is not the model's fault."""
    failures, waits = (before.failures, before.waits + 1) if before else (0, 1)
    return Retry(failures, now + min(FIRST_WAIT * 2.0 ** min(waits - 1, 16), LONGEST_WAIT), message, waits)


def _versions(desired: Desired) -> set[int]:
    if desired.is_deleted:
        return set()
    return {each[0] for each in (desired.active, desired.pending) if each is not None}


def _keep_running(version: int, entities: tuple[str, ...], observed: Observed, now: float) -> list[Action]:
    actions: list[Action] = []
    for entity in entities:
        replicas = observed.of(version, entity)
        actions += _started(version, entity, observed, now)
        # The log of the latest one that ended may be read until its successor is ready.
        ended = [replica for replica in replicas if replica.phase is Phase.ENDED]
        obsolete = ended if observed.is_ready(version, entity) else ended[:-1]
        actions += [StopReplica(replica.id) for replica in obsolete]
    return actions


def _rest(version: int, entities: tuple[str, ...], observed: Observed) -> list[Action]:
    """Nothing is to run; what did can still be read in its logs."""
    return [
        StopReplica(replica.id, keep_log=True)
        for entity in entities
        for replica in observed.of(version, entity)
        if replica.is_live
    ]


def _deploy(version: int, entities: tuple[str, ...], observed: Observed, deadline: float, now: float) -> list[Action]:
    failed = [
        (entity, replica.message)
        for entity in entities
        for replica in observed.of(version, entity)
        if replica.phase is Phase.ENDED and replica.is_final
    ]
    if failed:
        return [FailUpdate(version, tuple(dict(failed).items()))]
    unready = [entity for entity in entities if not observed.is_ready(version, entity)]
    if not unready:
        return [Activate(version)]
    if now >= deadline:
        return [FailUpdate(version, tuple((entity, _overdue(version, entity, observed)) for entity in unready))]
    return [action for entity in unready for action in _started(version, entity, observed, now)]


def _started(version: int, entity: str, observed: Observed, now: float) -> list[Action]:
    if any(replica.is_live for replica in observed.of(version, entity)):
        return []
    retry = observed.retries.get((version, entity))
    return [] if retry is not None and now < retry.not_before else [StartReplica(version, entity)]


def _overdue(version: int, entity: str, observed: Observed) -> str:
    retry = observed.retries.get((version, entity))
    last = [replica.message for replica in observed.of(version, entity) if replica.message]
    doing = last[-1] if last else retry.message if retry else "It was not started."
    return f"It was not ready in time. {doing} See its log, then update the endpoint."
