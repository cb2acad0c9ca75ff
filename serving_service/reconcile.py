"""What to do next for one endpoint: a pure decision from what is desired and what was observed.

The rules: the active configuration is served, unless the endpoint was stopped, until the pending one is ready in all
its parts and has been activated; of each entity as many replicas run as are wanted and never more are started; nothing
is stopped that could still be needed; a plan can be made at any time, however often, and ends in a state where there is
nothing left to do.
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


@dataclass(frozen=True)
class Wanted:
    """A version, and how many replicas each of its entities is to have."""

    version: int
    replicas: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Desired:
    """What the records and the load ask for."""

    is_deleted: bool = False
    is_updating: bool = False
    active: Wanted | None = None
    pending: Wanted | None = None
    """It is activated when as many of each entity are ready."""
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

    def ready(self, version: int, entity: str) -> int:
        """How many replicas of an entity answer."""
        return sum(replica.phase is Phase.READY for replica in self.of(version, entity))

    def live(self, version: int, entity: str) -> int:
        """How many replicas of an entity start or answer."""
        return sum(replica.is_live for replica in self.of(version, entity))

    def is_ready(self, wanted: Wanted) -> bool:
        """Whether a version has all the replicas that it is to have."""
        return all(self.ready(wanted.version, entity) >= count for entity, count in wanted.replicas.items())


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
        if desired.is_stopped:
            actions += _rest(desired.active, observed)
        else:
            actions += _keep_running(desired.active, observed, now)
    if desired.pending is not None:
        if desired.is_updating:
            actions += _deploy(desired.pending, observed, desired.deadline, now)
        else:
            actions += _rest(desired.pending, observed)
    return actions


def next_look(desired: Desired, observed: Observed, now: float) -> float | None:
    """When time alone makes another plan: the end of a back-off or the deadline of an update; None: never."""
    times = [retry.not_before for retry in observed.retries.values() if retry.not_before > now]
    if desired.is_updating and not desired.is_deleted:
        times.append(max(desired.deadline, now))
    return min(times, default=None)


def after_end(
    before: Retry | None, *, ready_seconds: float, message: str, now: float, is_patient: bool = False
) -> Retry:
    """When to start an entity again whose replica ended: at once the first time, then later and later.

    The patient do not try at once even then.
    """
    failures = 1 if before is None or ready_seconds >= GOOD_SECONDS else before.failures + 1
    failures = max(failures, 2) if is_patient else failures
    delay = 0.0 if failures == 1 else min(FIRST_BACKOFF * 2.0 ** min(failures - 2, 16), LONGEST_BACKOFF)
    return Retry(failures, now + delay, message)


def after_wait(before: Retry | None, *, message: str, now: float) -> Retry:
    """When to look again whether something that a launch needs is back; soon, for it is not the model's fault."""
    failures, waits = (before.failures, before.waits + 1) if before else (0, 1)
    return Retry(failures, now + min(FIRST_WAIT * 2.0 ** min(waits - 1, 16), LONGEST_WAIT), message, waits)


def _versions(desired: Desired) -> set[int]:
    if desired.is_deleted:
        return set()
    return {each.version for each in (desired.active, desired.pending) if each is not None}


def _keep_running(wanted: Wanted, observed: Observed, now: float) -> list[Action]:
    actions: list[Action] = []
    for entity, count in wanted.replicas.items():
        if count == 0:
            actions += _put_to_rest(observed.of(wanted.version, entity))
            continue
        actions += _started(wanted.version, entity, count, observed, now)
        actions += [StopReplica(replica.id) for replica in _surplus(observed.of(wanted.version, entity), count)]
        # The log of the latest one that ended may be read until a successor is ready.
        ended = [each for each in observed.of(wanted.version, entity) if each.phase is Phase.ENDED]
        obsolete = ended if observed.ready(wanted.version, entity) else ended[:-1]
        actions += [StopReplica(replica.id) for replica in obsolete]
    return actions


def _surplus(replicas: list[Replica], count: int) -> list[Replica]:
    """Those that are too many: what still starts before what answers, the newest first to go."""
    live = [replica for replica in replicas if replica.is_live]
    by_merit = sorted(live, key=lambda replica: replica.phase is not Phase.READY)
    return by_merit[count:][::-1]


def _rest(wanted: Wanted, observed: Observed) -> list[Action]:
    return [action for entity in wanted.replicas for action in _put_to_rest(observed.of(wanted.version, entity))]


def _put_to_rest(replicas: list[Replica]) -> list[Action]:
    """Nothing of an entity is to run; what the replica that says most has logged can still be read."""
    telling = next((replica for replica in reversed(replicas) if replica.is_final), replicas[-1] if replicas else None)
    others = [StopReplica(replica.id) for replica in replicas if replica is not telling]
    return [*others, *([StopReplica(telling.id, keep_log=True)] if telling is not None and telling.is_live else [])]


def _deploy(wanted: Wanted, observed: Observed, deadline: float, now: float) -> list[Action]:
    version = wanted.version
    failed = [
        (entity, replica.message)
        for entity in wanted.replicas
        for replica in observed.of(version, entity)
        if replica.phase is Phase.ENDED and replica.is_final
    ]
    if failed:
        return [FailUpdate(version, tuple(dict(failed).items()))]
    if observed.is_ready(wanted):
        return [Activate(version)]
    unready = {entity: count for entity, count in wanted.replicas.items() if observed.ready(version, entity) < count}
    if now >= deadline:
        return [FailUpdate(version, tuple((entity, _overdue(version, entity, observed)) for entity in unready))]
    return [action for entity, count in unready.items() for action in _started(version, entity, count, observed, now)]


def _started(version: int, entity: str, count: int, observed: Observed, now: float) -> list[Action]:
    retry = observed.retries.get((version, entity))
    if retry is not None and now < retry.not_before:
        return []
    if retry is not None and observed.ready(version, entity) == 0:
        count = min(count, 1)  # what failed shows with one that it works again
    missing = count - observed.live(version, entity)
    return [StartReplica(version, entity)] * missing


def _overdue(version: int, entity: str, observed: Observed) -> str:
    retry = observed.retries.get((version, entity))
    last = [replica.message for replica in observed.of(version, entity) if replica.message]
    doing = last[-1] if last else retry.message if retry else "It was not started."
    return f"It was not ready in time. {doing} See its log, then update the endpoint."
