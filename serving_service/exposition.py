"""The metrics of one endpoint as text, under the names of contract 5.15.

The text is valid both in OpenMetrics and in the older format of Prometheus, which is what its content type says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from servicekit.distribution import BOUNDS_MS, Distribution
from servicekit.measures import Measured
from serving_service.consumption import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LABELS = ("endpoint_name", "endpoint_id", "served_model_name", "served_model_version")

_LE = [*map(floatToGoString, BOUNDS_MS), "+Inf"]


@dataclass(frozen=True, kw_only=True)
class EntityMetrics:
    """What is exported of one served entity; its name and version are empty for requests that reached none."""

    entity: str
    entity_version: str
    usage: Usage
    concurrency: int
    """How many requests at a time it is provisioned for."""
    recent: Measured
    """Of the last minute."""
    total: Measured
    """Since the service started."""


def exposition(endpoint_name: str, endpoint_id: str, entities: Sequence[EntityMetrics]) -> bytes:
    """The metrics of an endpoint, a sample for each of its entities."""
    text: bytes = generate_latest(_Metrics(endpoint_name, endpoint_id, entities))  # type: ignore[no-untyped-call]
    return text


class _Metrics(Collector):
    def __init__(self, endpoint_name: str, endpoint_id: str, entities: Sequence[EntityMetrics]) -> None:
        self._endpoint = [endpoint_name, endpoint_id]
        self._entities = entities

    def collect(self) -> Iterator[Metric]:
        served = [each for each in self._entities if each.entity]
        yield self._gauge(
            "cpu_usage_percentage",
            "Average use of the processors by a replica in the last minute.",
            ((each, each.usage.cpu) for each in served),
        )
        yield self._gauge(
            "mem_usage_percentage",
            "Average use of the memory that a replica may use, in the last minute.",
            ((each, each.usage.memory) for each in served),
        )
        if any(each.usage.gpu is not None or each.usage.gpu_memory is not None for each in served):
            yield self._gauge(
                "gpu_usage_percentage",
                "Average share of the time in which the GPUs of a replica had something to do, in the last minute.",
                ((each, each.usage.gpu) for each in served),
            )
            yield self._gauge(
                "gpu_memory_usage_percentage",
                "Average use of the memory of the GPUs of a replica, in the last minute.",
                ((each, each.usage.gpu_memory) for each in served),
            )
        yield self._gauge(
            "provisioned_concurrent_requests_total",
            "How many requests at a time the running replicas are provisioned for.",
            ((each, each.concurrency) for each in served),
        )
        yield self._gauge(
            "request_count_total",
            "Requests that ended in the last minute.",
            ((each, each.recent.requests) for each in self._entities),
        )
        yield self._gauge(
            "request_4xx_count_total",
            "Requests that were answered with a status of 400 to 499 in the last minute.",
            ((each, each.recent.refused) for each in self._entities),
        )
        yield self._gauge(
            "request_5xx_count_total",
            "Requests that were answered with a status of 500 or more in the last minute.",
            ((each, each.recent.failed) for each in self._entities),
        )
        yield self._histogram(
            "request_latency_ms",
            "From the arrival of a request to the end of its answer, in milliseconds.",
            ((each, each.total.latency) for each in self._entities),
        )
        yield self._histogram(
            "model_prediction_latency_ms",
            "In the model itself, in milliseconds; for a stream until its end.",
            ((each, each.total.prediction) for each in served),
        )
        yield self._histogram(
            "model_queue_time_ms",
            "Waiting for the model, in milliseconds.",
            ((each, each.total.queue) for each in served),
        )

    def _gauge(self, name: str, meaning: str, values: Iterable[tuple[EntityMetrics, float | None]]) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=LABELS)
        for each, value in values:
            if value is not None:
                family.add_metric(self._labels(each), value)
        return family

    def _histogram(self, name: str, meaning: str, values: Iterable[tuple[EntityMetrics, Distribution]]) -> Metric:
        family = HistogramMetricFamily(name, meaning, labels=LABELS)
        for each, value in values:
            buckets = list(zip(_LE, map(float, accumulate(value.counts)), strict=True))
            family.add_metric(self._labels(each), buckets, sum_value=value.sum)
        return family

    def _labels(self, each: EntityMetrics) -> list[str]:
        return [*self._endpoint, each.entity, each.entity_version]
