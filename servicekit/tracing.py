"""Traces: which request made which call, and how long each took, told to a collector of OpenTelemetry.

Off unless a collector is configured; then nothing is imported for it, and a span is one object that does nothing. A
trace goes on from the W3C trace context that a request came with, wherever that is well-formed, and means nothing but
which trace that is. The rule: a span tells methods, routes, names of endpoints and entities, and how it ended; never a
body, a header, a path, or the text of an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, Protocol

Kind = Literal["server", "client", "internal"]
Carrier = Mapping[str, str]
"""`traceparent` and `tracestate`, as a request or call came with them."""

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

FLUSH_SECONDS = 2.0
"""How long a service that stops may take to tell the rest."""

_NO_FAILURES = frozenset(("CancelledError", "GeneratorExit", "ClientGone", "AbortError"))
"""Exceptions of calls that nobody waits for any more, and one that carries an answer, which is told already."""


class Span:
    """Something that takes time. This one is recorded nowhere."""

    def __enter__(self) -> Span:
        """Makes it the current one of this task."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it; of an exception it tells the type alone."""

    def named(self, name: str) -> None:
        """Gives it another name, once more is known."""

    def set(self, fact: str, value: str | int) -> None:
        """Adds a fact."""

    def failed(self, kind: str) -> None:
        """Says that it failed, and with what kind of error."""

    def part(self, name: str, started_at: int, duration: int, failure: str = "") -> None:
        """Adds a span within it that is over already; Unix milliseconds and milliseconds."""

    def headers(self) -> tuple[tuple[str, str], ...]:
        """What whoever is called is told, so that its spans belong to this one."""
        return ()


class Recorder(Protocol):
    """What spans are told to."""

    def span(self, name: str, kind: Kind, parent: Span | Carrier) -> Span:
        """A new span, part of `parent` if that is one."""

    def close(self) -> None:
        """Tells what it has not told yet; may block."""


OFF = Span()

_current: ContextVar[Span] = ContextVar("span", default=OFF)
_recorder: Recorder | None = None  # of this process, as its log is


def is_on() -> bool:
    """Whether spans are recorded."""
    return _recorder is not None


def current() -> Span:
    """The span that the current task is in."""
    return _current.get()


def entered(name: str, carrier: Carrier, kind: Kind = "server") -> Span:
    """The span of a request that came in, or, with nothing in `carrier`, the first one of a trace."""
    return OFF if _recorder is None else _recorder.span(name, kind, carrier)


def within(name: str, kind: Kind = "client") -> Span:
    """A span within the current one."""
    return OFF if _recorder is None else _recorder.span(name, kind, _current.get())


def make_current(span: Span) -> Span:
    """Makes a span the current one of this task; returns the one before."""
    before = _current.get()
    _current.set(span)
    return before


def is_failure(kind: type[BaseException]) -> bool:
    """Whether a span that such an exception leaves has failed."""
    return kind.__name__ not in _NO_FAILURES


@contextmanager
def recording(service: str, endpoint: str | None, ratio: float) -> Iterator[None]:
    """Has this process tell its spans to the collector at `endpoint`, unless that is None.

    `ratio` says how many of the traces that begin here are told; for others that is said by whoever began them.
    """
    if endpoint is None:
        yield
        return
    from servicekit import otlp  # OpenTelemetry is only for those who use it

    with using(otlp.OtlpRecorder(service, endpoint, ratio)):
        yield


@contextmanager
def using(recorder: Recorder) -> Iterator[None]:
    """Records spans with `recorder`, and gives it a while to tell the last ones."""
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None
        # A collector that hangs must not hold the end up: nobody waits for this thread.
        closing = threading.Thread(target=recorder.close, name="last spans", daemon=True)
        closing.start()
        closing.join(FLUSH_SECONDS)
