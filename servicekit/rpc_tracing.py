"""Spans of RPCs, at both ends; no listener or channel has these where traces are off.

The trace context travels as metadata. Streams that stay open, such as the feeds between services, have no spans.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import Any

import grpc

from servicekit import tracing
from servicekit.tracing import TRACEPARENT, TRACESTATE, Span

_SERVER_FAILED = frozenset(
    (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)
"""Codes that tell of a server's own trouble; with any other it has done what it should."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class ClientTracing(grpc.aio.UnaryUnaryClientInterceptor):
    """Around each call of a channel; the peer is told which span it is part of."""

    async def intercept_unary_unary(
        self,
        continuation: Callable[[Any, Any], Awaitable[Any]],
        client_call_details: Any,
        request: Any,
    ) -> Any:
        method = client_call_details.method
        with _of_rpc(tracing.within("rpc"), method.decode() if isinstance(method, bytes) else method) as span:
            metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()), *span.headers())
            call = await continuation(client_call_details._replace(metadata=metadata), request)
            code = await call.code()
            span.set("rpc.grpc.status_code", code.value[0])
            if code is not grpc.StatusCode.OK:
                span.failed(code.name)
            return call


class ServerTracing(grpc.aio.ServerInterceptor):
    """Around all that happens to a call of one of `methods`, the judging of its caller included.

    They take one message each, which the interceptor below receives by itself.
    """

    def __init__(self, methods: Collection[str]) -> None:
        self._methods = methods

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method not in self._methods:
            return handler
        carrier = {
            key: value
            for key, value in handler_call_details.invocation_metadata or ()
            if key in (TRACEPARENT, TRACESTATE) and isinstance(value, str)
        }
        read, write = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(_stream(handler.stream_stream, method, carrier), read, write)
        return grpc.stream_unary_rpc_method_handler(_unary(handler.stream_unary, method, carrier), read, write)


def _unary(behavior: Any, method: str, carrier: dict[str, str]) -> Any:
    async def handle(request: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> Any:
        with _of_rpc(tracing.entered("rpc", carrier), method) as span:
            try:
                return await behavior(request, rpc)
            finally:
                _ended(span, rpc)

    return handle


def _stream(behavior: Any, method: str, carrier: dict[str, str]) -> Any:
    async def handle(request: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        with _of_rpc(tracing.entered("rpc", carrier), method) as span:
            try:
                async with aclosing(behavior(request, rpc)) as answers:
                    async for answer in answers:
                        yield answer
            finally:
                _ended(span, rpc)

    return handle


def _of_rpc(span: Span, method: str) -> Span:
    service, _, name = method.removeprefix("/").partition("/")
    span.named(f"{service}/{name}")
    span.set("rpc.system", "grpc")
    span.set("rpc.service", service)
    span.set("rpc.method", name)
    return span


def _ended(span: Span, rpc: grpc.aio.ServicerContext[Any, Any]) -> None:
    found: Any = rpc.code()
    code = found if isinstance(found, grpc.StatusCode) else _CODES.get(found or 0, grpc.StatusCode.UNKNOWN)
    span.set("rpc.grpc.status_code", code.value[0])
    if code in _SERVER_FAILED:
        span.failed(code.name)
