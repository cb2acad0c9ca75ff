"""A service's own metrics, for whoever runs it: what it answers, how long that takes, and what there is.

The rule: a label holds names of ours only (methods, routes, codes, states), never what a caller said, so that there are
few series and nothing to hide. Nobody has to prove who he is to read them; so they have a listener of their own, which
is off unless a setting names it, and on this machine unless another one says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from servicekit.errors import StartError

REQUEST_SECONDS = 5.0
"""How long a request for metrics may take to arrive."""

REQUEST_BYTES = 16 * 1024

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
"""The bounds of all histograms."""


class Calls:
    """Counts what was asked by its kind and by how it ended, and how long each kind took."""

    def __init__(self, registry: CollectorRegistry, name: str, meaning: str, *, kind: str, ending: str) -> None:
        """`kind` and `ending` are the names of the labels."""
        self._ended = Counter(f"{name}_total", f"{meaning}.", [kind, ending], registry=registry)
        self._seconds = Histogram(
            f"{name}_seconds",
            f"How long {meaning[:1].lower()}{meaning[1:]} took.",
            [kind],
            registry=registry,
            buckets=SECONDS,
        )

        # To look a series up in its metric takes longer than to count.
        self._count: dict[tuple[str, str], Counter] = {}
        self._observe: dict[str, Histogram] = {}

    def ended(self, kind: str, ending: str, seconds: float | None) -> None:
        """Counts one; without `seconds` where its length says nothing, as that of a stream that is followed."""
        count = self._count.get((kind, ending))
        if count is None:
            count = self._count[kind, ending] = self._ended.labels(kind, ending)
        count.inc()
        if seconds is not None:
            observe = self._observe.get(kind)
            if observe is None:
                observe = self._observe[kind] = self._seconds.labels(kind)
            observe.observe(seconds)


class ServiceMetrics:
    """The metrics of one service; every one has those of its process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.rpcs = Calls(
            self.registry, "tessera_rpc_calls", "RPCs that this service answered", kind="method", ending="code"
        )

    def watch(self, name: str, meaning: str, look: Callable[[], float | Mapping[str, float]], label: str = "") -> None:
        """A gauge that is looked at when metrics are asked for; with a `label`, one for each of its values."""
        self.registry.register(_Gauge(name, meaning, look, label))

    def text(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that a header `Accept` asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        text: bytes = encode(self.registry)
        return text, content_type


class _Gauge(Collector):
    def __init__(self, name: str, meaning: str, look: Callable[[], float | Mapping[str, float]], label: str) -> None:
        self._name, self._meaning, self._look, self._label = name, meaning, look, label

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._meaning, labels=[self._label] if self._label else None)
        found = self._look()
        if isinstance(found, Mapping):
            for value, count in found.items():
                family.add_metric([value], count)
        else:
            family.add_metric([], found)
        yield family


@asynccontextmanager
async def listening(listen: str, metrics: ServiceMetrics) -> AsyncIterator[str]:
    """Answers `GET /metrics` at `host:port` or `unix:/path` until the context is left; yields the address.

    With an empty `listen` nothing listens. Raises StartError.
    """
    if not listen:
        yield ""
        return

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(
            OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
        ):
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_answer(head.decode("latin-1"), metrics))
                await writer.drain()
        writer.close()

    try:
        if listen.startswith("unix:"):
            server = await asyncio.start_unix_server(converse, listen.removeprefix("unix:"), limit=REQUEST_BYTES)
        else:
            host, _, port = listen.rpartition(":")
            server = await asyncio.start_server(converse, host.strip("[]"), int(port), limit=REQUEST_BYTES)
            listen = f"{host}:{server.sockets[0].getsockname()[1]}"
    except OSError as error:
        raise StartError(f"Cannot listen on {listen} for metrics: {error.strerror or error}.") from None
    try:
        yield listen
    finally:
        server.close()


def _answer(head: str, metrics: ServiceMetrics) -> bytes:
    """The whole answer to a request of HTTP/1; it is the last on its connection."""
    request, *lines = head.split("\r\n")
    method, target, *_ = (*request.split(" "), "", "")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status, body, content_type = "404 Not Found", b"The metrics are at /metrics.\n", "text/plain; charset=utf-8"
    if target.partition("?")[0] == "/metrics":
        if method == "GET":
            status, (body, content_type) = "200 OK", metrics.text(headers.get("accept", ""))
        else:
            status, body = "405 Method Not Allowed", b"Only GET is answered.\n"
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode("latin-1") + body
