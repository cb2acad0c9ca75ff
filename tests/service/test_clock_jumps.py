"""The clock of Secrets jumps by a day while it runs, ahead and back: nothing stops, and nothing that was over is good
again (R21)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tessera.identity.v1 import identity_pb2
from tests.support.secrets import Caller, RunningSecrets, lets_nobody_in, running_secrets

DAY = 86_400.0
HOUR = 3_600


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        await running.admin.create_scope("scope")
        yield running


async def made(caller: Caller, seconds: int) -> identity_pb2.CreateTokenResponse:
    request = identity_pb2.CreateTokenRequest(comment="jumps", lifetime_seconds=seconds)
    answer: identity_pb2.CreateTokenResponse = await caller(caller.tokens.CreateToken, request)
    return answer


async def is_at_work(service: RunningSecrets, caller: Caller, value: str) -> None:
    """Fails unless people can be known, read and write."""
    await caller.put("scope", "key", value)
    assert await caller.get("scope", "key") == value.encode()
    newest = (await made(caller, HOUR)).token_value
    assert await is_let_in(service, newest)
    health = health_pb2_grpc.HealthStub(service.public_channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def is_let_in(service: RunningSecrets, token: str) -> bool:
    try:
        caller = service.public(token)
        await caller(caller.scim.GetMe, identity_pb2.GetMeRequest())
    except grpc.aio.AioRpcError:
        return not await lets_nobody_in(service, token)
    return True


@pytest.mark.parametrize("days", [(1, 0, 1, 0), (-1, 0, -1), (1, -1, 0)], ids=str)
async def test_jumps_stop_nothing_and_bring_nothing_back(service: RunningSecrets, days: tuple[int, ...]) -> None:
    admin, ada = service.admin, await service.user("ada")  # who makes no further token, which would clear old ones away
    revoked, short = await made(ada, 30 * 24 * HOUR), await made(ada, HOUR)
    await ada(ada.tokens.DeleteToken, identity_pb2.DeleteTokenRequest(token_id=revoked.token_info.token_id))
    is_over = False
    for number, day in enumerate(days):
        service.clock.offset = day * DAY
        is_over = is_over or day > 0
        assert not await is_let_in(service, revoked.token_value)
        assert await is_let_in(service, short.token_value) != is_over, f"after {days[: number + 1]}"
        await is_at_work(service, admin, f"value {number}")
