"""Spans by way of OpenTelemetry, sent to a collector over OTLP and gRPC. The only importer of it.

Whatever becomes of the collector, requests do not notice: spans wait in a queue with a bound, a thread of its own sends
them, and what does not fit or cannot be sent is dropped. Everything that the library would read from the environment is
given here, but for what a collector asks of its clients (OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE).
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from types import TracebackType

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from servicekit import tracing
from servicekit.tracing import Carrier, Kind, Span

QUEUE = 4_096
"""How many spans wait to be sent."""

SEND_EVERY_MILLISECONDS = 1_000
SEND_SECONDS = 5.0
_KINDS: dict[str, trace.SpanKind] = {
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
    "internal": trace.SpanKind.INTERNAL,
}
_NOBODY = Context()
_PROPAGATOR = TraceContextTextMapPropagator()


class OtlpRecorder:
    """Tells spans to the collector at an http:// or https:// address."""

    def __init__(self, service: str, endpoint: str, ratio: float) -> None:
        # They warn of each header that is not right, with what is in it; and of each try to send.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource(
                {"service.namespace": "tessera", "service.name": service, "service.version": version("tessera")}
            ),
            span_limits=SpanLimits(max_attributes=32, max_span_attribute_length=256, max_events=0, max_links=0),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=SEND_SECONDS)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=QUEUE, schedule_delay_millis=SEND_EVERY_MILLISECONDS)
        )
        self.tracer = self._provider.get_tracer("tessera")

    def span(self, name: str, kind: Kind, parent: Span | Carrier) -> Span:
        if isinstance(parent, OtlpSpan):
            around = trace.set_span_in_context(parent.span, _NOBODY)
        elif isinstance(parent, Span):
            around = _NOBODY
        else:
            around = _PROPAGATOR.extract(parent, _NOBODY)
        return OtlpSpan(self, self.tracer.start_span(name, around, kind=_KINDS[kind]))

    def close(self) -> None:
        self._provider.shutdown()


class OtlpSpan(Span):
    """A span that is recorded."""

    def __init__(self, recorder: OtlpRecorder, span: trace.Span) -> None:
        self.span = span
        self._recorder = recorder
        self._has_failed = False
        self._before: Span = tracing.OFF

    def __enter__(self) -> Span:
        self._before = tracing.make_current(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and not self._has_failed and tracing.is_failure(kind):
            self.failed(kind.__name__)
        # Not by a token: a stream may be closed in another context than it began in.
        tracing.make_current(self._before)
        self.span.end()

    def named(self, name: str) -> None:
        self.span.update_name(name)

    def set(self, fact: str, value: str | int) -> None:
        self.span.set_attribute(fact, value)

    def failed(self, kind: str) -> None:
        self._has_failed = True
        self.span.set_attribute("error.type", kind)
        self.span.set_status(trace.StatusCode.ERROR)

    def part(self, name: str, started_at: int, duration: int, failure: str = "") -> None:
        around = trace.set_span_in_context(self.span, _NOBODY)
        part = self._recorder.tracer.start_span(name, around, start_time=started_at * 1_000_000)
        if failure:
            OtlpSpan(self._recorder, part).failed(failure)
        part.end((started_at + duration) * 1_000_000)

    def headers(self) -> tuple[tuple[str, str], ...]:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self.span, _NOBODY))
        return tuple(carrier.items())
