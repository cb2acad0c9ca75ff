"""Rate limits on a platform: whoever asks, over REST or gRPC and by whichever gateway, keeps to the same ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.eventually import eventually
from tests.support.http import Answer, fetch
from tests.support.platform import Platform, running_platform
from tests.support.secrets import refusal

INVOCATIONS = "/serving-endpoints/demo/invocations"


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    async with running_platform() as running:
        await running.introduce("ada@example.com")
        admin = running.endpoints_of("admin")
        await admin.create("demo")
        await admin.settled("demo")
        yield running


async def limit(platform: Platform, *limits: pb.AiGatewayRateLimit) -> None:
    admin = platform.endpoints_of("admin")
    request = pb.PutServingEndpointAiGatewayRequest(name="demo", ai_gateway=pb.AiGatewayConfig(rate_limits=limits))
    await admin(admin.stub.PutServingEndpointAiGateway, request)


def calls(most: int, key: str = "user") -> pb.AiGatewayRateLimit:
    return pb.AiGatewayRateLimit(renewal_period="minute", key=key, calls=most)


async def invoke(platform: Platform, url: str = "") -> Answer:
    return await fetch(url or platform.url, "POST", INVOCATIONS, token=platform.tokens["admin"], body=b"{}")


def asking(platform: Platform, status: int, url: str = "") -> Callable[[], Awaitable[bool]]:
    async def answered_so() -> bool:
        return (await invoke(platform, url)).status == status

    return answered_so


async def query_is_refused(platform: Platform) -> bool:
    try:
        await platform.endpoints_of("admin").query("demo")
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return False


async def test_what_is_beyond_a_limit_is_refused_until_the_limit_is_another_one(platform: Platform) -> None:
    await eventually(asking(platform, 200), what="the gateway has the routes")
    await limit(platform, calls(3))
    await eventually(asking(platform, 429), what="the gateway keeps to the limit")
    refused = await invoke(platform)
    assert refused.json()["error_code"] == "REQUEST_LIMIT_EXCEEDED"
    assert refused.json()["message"].startswith("Exceeded the rate limit of 3 calls per minute for 'admin'.")
    assert 0 < int(refused.headers["retry-after"]) <= 61
    await limit(platform)
    await eventually(asking(platform, 200), what="there is no limit any more")


async def test_the_older_spelling_holds_besides_the_newer_one(platform: Platform) -> None:
    await eventually(asking(platform, 200), what="the gateway has the routes")
    admin = platform.endpoints_of("admin")
    request = pb.PutServingEndpointRateLimitsRequest(
        name="demo", rate_limits=[pb.RateLimit(calls=0, renewal_period="minute")]
    )
    assert (await admin(admin.stub.PutServingEndpointRateLimits, request)).rate_limits == request.rate_limits
    await limit(platform, calls(100))
    await eventually(asking(platform, 429), what="the gateway keeps to the older limit")
    assert not (await admin.get("demo")).ai_gateway.rate_limits[1:]


async def test_a_limit_holds_over_grpc_and_counts_what_came_over_rest(platform: Platform) -> None:
    await eventually(asking(platform, 200), what="the gateway has the routes")
    await limit(platform, calls(4, "endpoint"))
    await eventually(asking(platform, 429), what="the gateway keeps to the limit")

    async def refused() -> bool:
        return await query_is_refused(platform)

    await eventually(refused, what="Serving has heard of what the gateway let through")
    found = await refusal(platform.endpoints_of("admin").query("demo"))
    assert (found.reason, "rate limit of 4 calls" in found.message) == ("REQUEST_LIMIT_EXCEEDED", True)


async def test_gateways_hear_of_each_other_and_one_that_starts_anew_knows_what_was_used(platform: Platform) -> None:
    await limit(platform, calls(20))
    await eventually(asking(platform, 200), what="the gateway has the routes")
    settings = GatewaySettings(data_dir=platform.secrets.settings.data_dir, listen="127.0.0.1:0")
    async with AsyncExitStack() as stack:
        second = await stack.enter_async_context(gateway_app.running(settings))
        await eventually(asking(platform, 429), what="the first gateway let through all that it may")
        await eventually(asking(platform, 429, second), what="the second one has heard of it")
        anew = await stack.enter_async_context(gateway_app.running(settings))
        assert (await invoke(platform, anew)).status == 429


async def test_who_may_not_query_is_not_counted(platform: Platform) -> None:
    await limit(platform, calls(1, "endpoint"))
    ada: dict[str, Any] = {"token": platform.tokens["ada@example.com"], "body": b"{}"}
    for _ in range(5):
        assert (await platform.fetch("POST", INVOCATIONS, **ada)).status == 404
    assert not await query_is_refused(platform)
    assert await query_is_refused(platform)
