"""How many replicas a served entity needs: its bounds, and a pure decision from the load that was seen and the time.

The rules: more are wanted as soon as they are needed, fewer only after they were not needed for a while; while no
replica is ready no more are wanted than the fewest that there have to be, so that one launch from zero serves whoever
waits. What is asleep, at zero, is woken by a request and by nothing else: a restart of this service leaves it there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from serving_service.model import EndpointConfig, ServedEntity

REPLICA_CONCURRENCY = 4
"""How many requests one replica answers at a time."""

WORKLOAD_SIZES: Mapping[str, tuple[int, int]] = {"Small": (4, 4), "Medium": (8, 16), "Large": (16, 64)}
"""The least and the most provisioned concurrency of each size (contract 5.8)."""


@dataclass(frozen=True)
class Bounds:
    """The fewest and the most replicas of a served entity."""

    lower: int
    upper: int

    @property
    def first(self) -> int:
        """How many are started to begin with: one at least, to show that it works."""
        return max(self.lower, 1)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long replicas that are not needed go on, in seconds."""

    quiet: float
    idle: float
    """The last one, where there may be none."""


@dataclass(frozen=True)
class Need:
    """How many replicas are needed, and how many were."""

    now: int = 0
    last: tuple[float, ...] = ()
    """The last moment at which one was needed, two were, three were, ..."""

    def after(self, load: int, at: float, *, most: int) -> Need:
        """What is known once `load` requests at a time have been seen; of more than `most` replicas nothing is kept."""
        now = min(-(-load // REPLICA_CONCURRENCY), most)
        busy = max(now, self.now)
        return Need(now, (at,) * busy + self.last[busy:])

    def kept(self, patience: Patience, at: float) -> int:
        """How many are needed, or were a short while ago."""
        recent = (n for n, last in enumerate(self.last, 1) if at < last + _patience(patience, n))
        return max(self.now, max(recent, default=0))

    def next_change(self, patience: Patience, at: float) -> float | None:
        """The earliest moment at which fewer can count as needed; None when none do."""
        kept = self.kept(patience, at)
        if kept == 0:
            return None
        return (at if kept <= self.now else self.last[kept - 1]) + _patience(patience, kept)


def bounds(entity: ServedEntity) -> Bounds:
    """The bounds that an entity's compute fields ask for."""
    least, most = provisioned(entity)
    lower = 0 if entity.scale_to_zero else least // REPLICA_CONCURRENCY
    return Bounds(lower, most // REPLICA_CONCURRENCY)


def provisioned(entity: ServedEntity) -> tuple[int, int]:
    """The least and the most provisioned concurrency of an entity. One that was not given follows from the other."""
    if entity.workload_size:
        return WORKLOAD_SIZES[entity.workload_size]
    least, most = entity.min_concurrency, entity.max_concurrency
    if least is None:
        least = REPLICA_CONCURRENCY
    return least, max(least, REPLICA_CONCURRENCY) if most is None else most


@dataclass(slots=True)
class _Entity:
    bounds: Bounds
    need: Need
    is_asleep: bool
    wanted: int = 0
    problem: str = ""


@dataclass
class Scaling:
    """The entities of the active version of one endpoint: what each needs, and which are asleep.

    Time is handed in, in seconds on a clock that nobody can set.
    """

    patience: Patience
    version: int = 0
    _entities: dict[str, _Entity] = field(default_factory=dict)

    def follow(self, config: EndpointConfig, ready: Mapping[str, int], now: float) -> None:
        """Turns to a version that has become the active one, or that was so when this service started.

        `ready` says how many replicas of each entity are ready. They count as needed just now; where there is none and
        need not be any, the entity is asleep.
        """
        if config.version == self.version:
            return
        self.version, self._entities = config.version, {}
        for entity in config.entities:
            limits, count = bounds(entity), ready.get(entity.name, 0)
            need = Need(0, (now,) * min(count, limits.upper))
            self._entities[entity.name] = _Entity(limits, need, is_asleep=limits.lower == 0 and count == 0)

    def loaded(self, entity: str, load: int, now: float) -> None:
        """Hears how many requests at a time the entity has, those that wait included."""
        if entity in self._entities:
            known = self._entities[entity]
            known.need = known.need.after(load, now, most=known.bounds.upper)

    def wanted(self, entity: str, *, ready: int, live: int, now: float) -> int:
        """How many replicas the entity is to have, where `live` start or run and `ready` of them answer.

        One of which none is wanted any more is asleep from then on, until a replica that was wanted later answers.
        """
        known = self._entities[entity]
        if ready:
            if known.is_asleep and known.wanted:
                known.is_asleep, known.problem = False, ""
                known.need = Need(known.need.now, (now,) * max(known.need.now, 1))
            kept = max(known.need.kept(self.patience, now), known.bounds.lower)
            known.wanted = min(kept, known.bounds.upper)
            known.is_asleep = known.wanted == 0
        elif known.is_asleep:
            known.wanted = 1 if known.need.now or live else 0
        else:
            known.wanted = known.bounds.first
        return known.wanted

    def not_woken(self, entity: str, problem: str) -> None:
        """Remembers, until it is awake, why an entity that is asleep could not be woken."""
        if self.is_asleep(entity):
            self._entities[entity].problem = problem

    def is_asleep(self, entity: str) -> bool:
        """Whether the entity is at zero, or coming up from there and not ready yet."""
        return entity in self._entities and self._entities[entity].is_asleep

    def problem(self, entity: str) -> str:
        """Why the entity could not be woken the last time; empty when it could."""
        return self._entities[entity].problem if entity in self._entities else ""

    @property
    def entities(self) -> Collection[str]:
        """The names of the entities."""
        return self._entities.keys()

    def next_change(self, now: float) -> float | None:
        """When time alone can change what is wanted; None: never."""
        changes = (each.need.next_change(self.patience, now) for each in self._entities.values() if not each.is_asleep)
        return min((change for change in changes if change is not None), default=None)


def _patience(patience: Patience, replicas: int) -> float:
    return patience.idle if replicas == 1 else patience.quiet
