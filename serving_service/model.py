"""What Serving talks about: endpoints, their configurations, and the replicas behind them. Plain values, no behaviour.

A configuration never changes once it has a version; what happens to it stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from servicekit.measures import Key, Measured, UsageKey, Used


class ConfigUpdate(StrEnum):
    """Where the latest configuration update of an endpoint stands."""

    NOT_UPDATING = "NOT_UPDATING"
    IN_PROGRESS = "IN_PROGRESS"
    UPDATE_FAILED = "UPDATE_FAILED"
    UPDATE_CANCELED = "UPDATE_CANCELED"


class Deployment(StrEnum):
    """Where the deployment of a served entity stands."""

    CREATING = "DEPLOYMENT_CREATING"
    READY = "DEPLOYMENT_READY"
    RECOVERING = "DEPLOYMENT_RECOVERING"
    FAILED = "DEPLOYMENT_FAILED"
    ABORTED = "DEPLOYMENT_ABORTED"


@dataclass(frozen=True)
class EntityState:
    """The state of a served entity, in a word and in a sentence."""

    deployment: Deployment
    message: str


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A registered model version; what follows the number tells it from another one of the same name and number."""

    name: str
    version: str
    source: str
    created_at: int
    """Unix milliseconds, as the registry says."""
    location: str | None = None
    """Where the registry has its files, which a source may leave open; None in configurations of the time before this
    was recorded."""


@dataclass(frozen=True, kw_only=True)
class ServedEntity:
    """One model version inside a configuration."""

    name: str
    model: ModelVersion
    environment: Mapping[str, str] = field(repr=False)
    """As declared: references stay references."""
    instance_profile_arn: str
    workload_size: str
    """Empty when provisioned concurrency was given instead."""
    workload_type: str
    scale_to_zero: bool
    min_concurrency: int | None
    max_concurrency: int | None
    creator: str
    """The name of whoever brought the entity in."""
    created_at: int


@dataclass(frozen=True)
class Route:
    """One share of the requests, in percent."""

    entity: str
    percentage: int


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """One configuration of one endpoint."""

    version: int
    created_at: int
    entities: tuple[ServedEntity, ...]
    routes: tuple[Route, ...]
    auto_capture: Mapping[str, Any] | None = None
    """As it was given; None when it was not."""

    def entity(self, name: str) -> ServedEntity | None:
        """The served entity of that name."""
        return next((entity for entity in self.entities if entity.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An endpoint as it is recorded. Times are Unix milliseconds."""

    id: str
    name: str
    creator_id: str
    creator: str
    creator_kind: str
    """`User` or `ServicePrincipal`."""
    description: str
    tags: tuple[tuple[str, str | None], ...]
    created_at: int
    updated_at: int
    latest_version: int = 0
    active: EndpointConfig | None = None
    pending: EndpointConfig | None = None
    config_update: ConfigUpdate = ConfigUpdate.NOT_UPDATING
    failures: Mapping[str, EntityState] = field(default_factory=dict)
    """How each entity of a pending configuration ended that failed or was cancelled."""
    is_deleted: bool = False
    is_stopped: bool = False
    """Whether the active configuration is not to run. It stays so until another one has been deployed."""
    ai_gateway: Mapping[str, Any] | None = None
    """As it was given, like the three below; None when it was not."""
    email_notifications: Mapping[str, Any] | None = None
    telemetry_config: Mapping[str, Any] | None = None
    rate_limits: tuple[Mapping[str, Any], ...] = ()
    """In the older spelling, as they were given; they hold besides those of the AI gateway."""
    budget_policy_id: str = ""
    route_optimized: bool = False

    @property
    def is_updating(self) -> bool:
        return self.config_update is ConfigUpdate.IN_PROGRESS

    @property
    def is_resting(self) -> bool:
        """Whether it is stopped and nobody is starting it."""
        return self.is_stopped and not self.is_updating

    def is_at_rest(self, config: EndpointConfig) -> bool:
        """Whether nothing of its active or pending configuration is going to run before somebody changes something."""
        return self.is_stopped if config is self.active else not self.is_updating


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What somebody is to be told of an update that has ended. Times are Unix milliseconds."""

    id: str
    courier: str
    """The way by which it goes."""
    recipient: str = field(repr=False)
    content: Mapping[str, Any]
    created_at: int
    due_at: int
    attempts: int = 0
    """How many times it was not taken."""


@dataclass(frozen=True)
class ReplicaRecord:
    """That a replica was meant to be started: written before it is, removed after it is gone."""

    id: str
    endpoint_id: str
    version: int
    entity: str


@dataclass(frozen=True, slots=True)
class Minute:
    """What was measured of a served entity in one minute. Of predictions and of waiting only the sums are recorded."""

    key: Key
    minute: int
    """Unix minutes."""
    measured: Measured
    replicas: int
    """How many ran in the end."""


@dataclass(frozen=True, slots=True)
class MinuteOfUse:
    """What one caller used in one minute."""

    key: UsageKey
    minute: int
    """Unix minutes."""
    used: Used
