"""Every RPC of Secrets and of Serving fails with a secret in its exception: callers and logs learn nothing of it (S20).

What fails outside of handlers is in `test_grpc_server.py`, and what the gateway answers then in
`unit/gateway/test_errors.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from servicekit import channels, grpc_server
from tessera.policy import POLICY
from tests.service.test_policy import METHODS, bearer, services_of
from tests.support.platform import Platform, running_platform
from tests.support.written_logs import written

CANARY = "sk-live-0f1e2d3c4b5a69788796a5b4c3d2e1f0"
RPCS = sorted(name for name in METHODS if name.startswith("tessera."))


class Failing:
    """A servicer of which one RPC fails, the one that `failing` names."""

    failing = ""

    def __init__(self, service: ServiceDescriptor, servicer: object) -> None:
        self._service = service
        self._servicer = servicer

    def __getattr__(self, name: str) -> Any:
        behavior = getattr(self._servicer, name)
        if name not in self._service.methods_by_name:
            return behavior
        rpc = f"{self._service.full_name}/{name}"

        async def answer(request: Any, context: Any) -> Any:
            _fail(rpc)
            return await behavior(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            _fail(rpc)
            async for each in behavior(request, context):
                yield each

        return stream if inspect.isasyncgenfunction(behavior) else answer


def _fail(rpc: str) -> None:
    if rpc == Failing.failing:
        raise RuntimeError(CANARY) from ValueError(CANARY)


@pytest.fixture(scope="module")
async def platform() -> AsyncIterator[Platform]:
    served: Callable[..., AbstractAsyncContextManager[list[str]]] = grpc_server.serving

    def serving(listeners: Any, *, services: Any, **more: Any) -> AbstractAsyncContextManager[list[str]]:
        return served(listeners, services=[(each, Failing(each, servicer)) for each, servicer in services], **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpc_server, "serving", serving)
        async with running_platform() as platform:
            yield platform


@pytest.mark.parametrize("name", RPCS)
async def test_exception_of_a_handler_is_told_to_nobody(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assertion = await platform.secrets.assertion(platform.tokens["admin"])
    monkeypatch.setattr(Failing, "failing", name)
    with written() as logged:
        for service in services_of(name):
            failed = await _failure(platform, service, name, assertion)
            told = [failed.details(), *failed.initial_metadata(), *(failed.trailing_metadata() or ())]
            assert failed.code() is grpc.StatusCode.INTERNAL
            assert (failed.details() or "").startswith("Internal error. Request id: ")
            assert CANARY not in repr(told)
        assert "RuntimeError" in logged()
    assert CANARY not in logged()


async def _failure(platform: Platform, service: str, name: str, assertion: str) -> grpc.aio.AioRpcError:
    """How a call ends that is made where the RPC is, by somebody who may make it."""
    running = platform.serving if service == "serving" else platform.secrets
    metadata: Any = bearer(platform.tokens["admin"])
    channel = running.public_channel
    if peers := POLICY[name].peers:
        channel, metadata = running.peer_channels[min(peers)], ((channels.ASSERTION, assertion),)
    method = METHODS[name]
    request = GetMessageClass(method.input_type)()
    open_call: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = open_call(f"/{name}", request_serializer=type(request).SerializeToString)(
        request, metadata=metadata, timeout=20
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if method.server_streaming else call)
    error: grpc.aio.AioRpcError = caught.value
    return error
