"""A gRPC server on a Unix socket that answers unary calls of any descriptor as a test says, and remembers them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

Answer = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[Any]]


@dataclass
class EchoServer:
    """Answers with `answer(request, context)`; None stands for an empty response."""

    channel: grpc.aio.Channel
    answer: Answer
    methods: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    time_left: list[float | None] = field(default_factory=list)


async def echo(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    """The answer that is the request."""
    return request


@asynccontextmanager
async def echo_server(*services: ServiceDescriptor) -> AsyncIterator[EchoServer]:
    """A running server for all RPCs of `services`, echoing until told otherwise."""
    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    server = grpc.aio.server()
    address = f"unix:{folder}/echo.sock"
    async with grpc.aio.insecure_channel(address) as channel:
        running = EchoServer(channel, echo)
        for service in services:
            handlers = {method.name: _handler(running, method) for method in service.methods}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        server.add_insecure_port(address)
        await server.start()
        try:
            yield running
        finally:
            await server.stop(0)
            shutil.rmtree(folder)


def _handler(running: EchoServer, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
    request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)

    async def handle(message: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        running.methods.append(method.full_name)
        running.requests.append(message)
        running.metadata.append(dict(context.invocation_metadata() or ()))
        running.time_left.append(context.time_remaining())
        answer = await running.answer(message, context)
        return answer if isinstance(answer, response) else response()

    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )
