"""Spans of HTTP requests: around the whole application, where traces are on.

A caller's trace context is taken as W3C Trace Context says: one `traceparent`, well-formed, or none at all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gateway.http import Message, Receive, Scope, Send
from servicekit import tracing
from servicekit.tracing import TRACEPARENT, TRACESTATE, Carrier

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_REQUEST_ID = b"x-tessera-request-id"
_HEALTH = b"/health"


class Traced:
    """An ASGI application whose requests are spans; it names them by their routes with `tracing.current()`."""

    def __init__(self, application: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["raw_path"] == _HEALTH:  # asked all the time, by those who trace nothing
            await self._application(scope, receive, send)
            return
        # A method may be any word that a caller likes.
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        with tracing.entered(method, _carrier(scope)) as span:
            span.set("http.request.method", method)

            async def send_seen(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    span.set("http.response.status_code", status)
                    span.set("tessera.request_id", dict(message["headers"]).get(_REQUEST_ID, b"").decode("latin-1"))
                    if status >= 500:
                        span.failed(str(status))
                await send(message)

            await self._application(scope, receive, send_seen)


def routed(method: str, route: str) -> None:
    """Names the current request by its route: the template, never the path."""
    if not tracing.is_on():
        return
    span = tracing.current()
    span.named(f"{method} {route}")
    span.set("http.route", route)


def _carrier(scope: Scope) -> Carrier:
    parents = [value.decode("latin-1") for name, value in scope["headers"] if name == TRACEPARENT.encode()]
    if len(parents) != 1:
        return {}
    states = [value.decode("latin-1") for name, value in scope["headers"] if name == TRACESTATE.encode()]
    return {TRACEPARENT: parents[0]} | ({TRACESTATE: ",".join(states)} if states else {})
