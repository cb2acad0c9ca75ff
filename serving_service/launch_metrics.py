"""How launches went and how long their phases took, for whoever runs the platform."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from servicekit.metrics import SECONDS
from serving_service.phases import LaunchEvent, Outcome


class LaunchMetrics:
    """Counts what timelines tell."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._launches = Counter(
            "tessera_launches_total", "Launches of replicas by how they ended.", ["outcome"], registry=registry
        )
        self._phases = Histogram(
            "tessera_launch_phase_seconds",
            "How long phases of launches took.",
            ["phase", "outcome"],
            registry=registry,
            buckets=SECONDS,
        )

    def phase_ended(self, event: LaunchEvent) -> None:
        """A phase of a launch is over."""
        self._phases.labels(event.phase.value, event.outcome.value).observe(event.duration / 1000)

    def ended(self, outcome: Outcome) -> None:
        """A launch is over."""
        self._launches.labels(outcome.value).inc()
