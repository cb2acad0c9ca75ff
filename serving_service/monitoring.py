"""What is told of an endpoint that was measured: its metrics now, and what they were."""

from __future__ import annotations

from servicekit.measures import Key, Measured
from serving_service.consumption import NOTHING, Consumption
from serving_service.controllers import Controllers
from serving_service.exposition import EntityMetrics, exposition
from serving_service.meters import Meters
from serving_service.model import Endpoint
from serving_service.scaling import REPLICA_CONCURRENCY


class Monitoring:
    """Puts together what is measured by gateways and what is seen of replicas."""

    def __init__(self, meters: Meters, consumption: Consumption, controllers: Controllers) -> None:
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
