"""Spans of HTTP requests: around the whole application, where traces are on.

A caller's trace context is taken as W3C Trace Context says: one `traceparent`, well-formed, or none at all.
"""

from __future__ import annotations

from gateway.http import Answer, Request
from gateway.http_protocol import Application
from servicekit import tracing
from servicekit.tracing import TRACEPARENT, TRACESTATE, Carrier

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_HEALTH = "/health"


class Traced:
    """An application whose requests are spans; it names them by their routes with `tracing.current()`."""

    def __init__(self, application: Application) -> None:
        self._application = application

    async def __call__(self, request: Request, answer: Answer) -> None:
        if request.path == _HEALTH:  # asked all the time, by those who trace nothing
            await self._application(request, answer)
            return
        # A method may be any word that a caller likes.
        method = request.method if request.method in _METHODS else "_OTHER"
        with tracing.entered(method, _carrier(request)) as span:
            span.set("http.request.method", method)
            await self._application(request, answer)
            span.set("tessera.request_id", request.id)
            if answer.status:
                span.set("http.response.status_code", answer.status)
            if answer.status >= 500:
                span.failed(str(answer.status))


def routed(method: str, route: str) -> None:
    """Names the current request by its route: the template, never the path."""
    if not tracing.is_on():
        return
    span = tracing.current()
    span.named(f"{method} {route}")
    span.set("http.route", route)


def _carrier(request: Request) -> Carrier:
    parents = request.values(TRACEPARENT.encode())
    if len(parents) != 1:
        return {}
    states = request.values(TRACESTATE.encode())
    return {TRACEPARENT: parents[0]} | ({TRACESTATE: ",".join(states)} if states else {})
