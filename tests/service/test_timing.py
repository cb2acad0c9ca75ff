"""How long an answer takes says no more than the answer does (S8, S10). Wants an otherwise idle machine."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from secrets_service import tokens
from secrets_service.model import SecretBytes
from tests.support.secrets import Caller, RunningSecrets, running_secrets
from tests.support.seed import seeded
from tests.support.serving import no_replicas, running_serving
from tests.support.timing import MOST_T, Ask, compared

TIMES = 20_000

pytestmark = pytest.mark.long


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets(tokens_per_minute=0) as running:
        yield running


def refused(call: Callable[[], Awaitable[object]], code: grpc.StatusCode) -> Ask:
    """Makes a call, which must be refused in this way."""

    async def ask() -> None:
        try:
            await call()
        except grpc.aio.AioRpcError as error:
            if error.code() is not code:
                raise
        else:
            raise AssertionError("the call succeeded")

    return ask


async def assert_alike(what: str, first: Ask, second: Ask) -> None:
    found = await compared(first, second, times=TIMES, random=seeded())
    sys.stdout.write(f"{what}: {found}\n")
    assert abs(found.t) < MOST_T, f"{what}: {found}"


async def test_time_does_not_tell_whether_a_token_id_exists(service: RunningSecrets) -> None:
    right = tokens.parse(await service.token_for("admin"))
    assert right is not None
    wrong, unknown = tokens.Presented(right.id, SecretBytes(bytes(32))), tokens.make()

    def shown(token: tokens.Presented) -> Ask:
        caller = service.public(token.text)
        return refused(lambda: caller.keys("nowhere"), grpc.StatusCode.PERMISSION_DENIED)

    await assert_alike("wrong secret, unknown id of a token", shown(wrong), shown(unknown))


@pytest.mark.parametrize("length", [10, 100_000])
async def test_time_does_not_tell_whether_a_key_exists_where_one_may_not_read(
    service: RunningSecrets, length: int
) -> None:
    await service.admin.create_scope("Shop")
    await service.admin.put("Shop", "present", b"v" * length)
    bob: Caller = await service.user("bob")

    def asked(key: str) -> Ask:
        return refused(lambda: bob.get("Shop", key), grpc.StatusCode.PERMISSION_DENIED)

    await assert_alike(f"key that exists ({length} bytes), missing key", asked("present"), asked("missing"))


async def test_time_does_not_tell_whether_an_endpoint_exists_that_one_may_not_see(service: RunningSecrets) -> None:
    directory = service.settings.data_dir
    async with no_replicas(directory), running_serving(directory) as serving:
        await serving.public(service.admin_token).create("present", None)
        await service.admin.create_user("bob")
        bob = serving.public(await service.token_for("bob"))

        def asked(name: str) -> Ask:
            return refused(lambda: bob.get(name), grpc.StatusCode.NOT_FOUND)

        await assert_alike("invisible endpoint, missing endpoint", asked("present"), asked("missing"))
