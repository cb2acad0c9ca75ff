"""A collector of OpenTelemetry in this process: a real OTLP receiver that keeps what it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class Told:
    """A span as it arrived; ids in hexadecimal digits."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    facts: dict[str, Any]
    seconds: float
    is_error: bool


class Collector:
    """What was told so far."""

    def __init__(self) -> None:
        self.address = ""
        self.metadata: list[dict[str, str]] = []
        self._requests: list[Any] = []
        self._lock = threading.Lock()

    def Export(self, request: Any, context: Any) -> Any:
        with self._lock:
            self._requests.append(request)
            self.metadata.append({key: value for key, value in context.invocation_metadata() if isinstance(value, str)})
        return trace_service_pb2.ExportTraceServiceResponse()

    def everything(self) -> bytes:
        """All that arrived, as it arrived."""
        with self._lock:
            return b"".join(request.SerializeToString() for request in self._requests)

    def spans(self, trace_id: str | None = None) -> list[Told]:
        """The spans, of one trace or of all, in the order of their arrival."""
        with self._lock:
            requests = list(self._requests)
        told = [
            _told(resource, span)
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return [span for span in told if trace_id in (None, span.trace_id)]


def _told(resource: Any, span: Any) -> Told:
    return Told(
        service=_facts(resource.resource.attributes)["service.name"],
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        facts=_facts(span.attributes),
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        is_error=span.status.code == span.status.STATUS_CODE_ERROR,
    )


def _facts(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector on loopback; `address` is what TESSERA_OTLP_ENDPOINT is to be."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
