"""Queries go on whatever is killed, stopped or replaced beside them, and none of them fails (R6, R7, R8)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from secrets_service.settings import SecretsSettings
from servicekit import channels, sockets
from tessera.identity.v1 import identity_pb2 as identity
from tessera.serving.v1 import serving_pb2 as pb
from tests.support import tiny_runner
from tests.support.builders import an_input
from tests.support.http import fetch
from tests.support.load import Load
from tests.support.mortal_serving import MortalServing, mortal_serving
from tests.support.secrets import Caller, data_directory
from tests.support.service_process import ServiceProcess, service_process
from tests.support.serving import TINY, ServingCaller, no_replicas

NAME = "demo"
WINDOW_SECONDS = 5.0

SLACK_SECONDS = 3.0
"""For answers that were on their way, and for a machine with other things to do."""


@dataclass(frozen=True)
class Platform:
    """Secrets and Serving as processes to be killed, and a gateway in this one."""

    directory: Path
    secrets: ServiceProcess
    serving: MortalServing
    url: str
    admin_token: str

    async def secrets_caller(self) -> Caller:
        """The admin at Secrets."""
        request = identity.ExchangeTokenRequest(token=self.admin_token)
        gateway = Caller(self.secrets.channel)
        assertion = (await gateway(gateway.authority.ExchangeToken, request)).assertion
        return Caller(self.secrets.channel, (channels.ASSERTION, assertion))

    async def serving_caller(self) -> ServingCaller:
        """The admin at Serving."""
        return ServingCaller(self.serving.channel, *(await self.secrets_caller()).metadata)

    async def token(self, seconds: int = 3600) -> tuple[str, str]:
        """A token of the admin, and its id."""
        admin = await self.secrets_caller()
        request = identity.CreateTokenRequest(lifetime_seconds=seconds, comment="a test's")
        made = await admin(admin.tokens.CreateToken, request)
        return made.token_value, made.token_info.token_id

    async def revoke(self, token_id: str) -> None:
        """Deletes one of the admin's tokens."""
        admin = await self.secrets_caller()
        await admin(admin.tokens.DeleteToken, identity.DeleteTokenRequest(token_id=token_id))

    async def update(self, says: str) -> None:
        """Has the endpoint be of another version."""
        await (await self.serving_caller()).update(NAME, version(says))

    async def settled(self) -> None:
        """Returns when the update is over, and has succeeded."""
        found = await (await self.serving_caller()).settled(NAME)
        assert found.state.config_update == pb.EndpointState.NOT_UPDATING

    async def asked(self, token: str) -> int:
        """The status of one query."""
        return await _asked(self.url, token)


async def _asked(url: str, token: str) -> int:
    return (await fetch(url, "POST", f"/serving-endpoints/{NAME}/invocations", token=token, body=b"{}")).status


def version(says: str) -> pb.ServedEntityInput:
    return an_input(TINY, version=says, name="entity", environment_vars={"SAYS": f"<{says}>"})


@asynccontextmanager
async def running_platform() -> AsyncIterator[Platform]:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(data_directory())
        settings = SecretsSettings(data_dir=directory)
        address = sockets.socket_address(settings.sockets, callee="secrets", caller="gateway")
        environment = {
            "PATH": os.environ["PATH"],
            "TESSERA_DATA_DIR": str(directory),
            "TESSERA_SECRETS_LISTEN": "127.0.0.1:0",
            "TESSERA_LOG_LEVEL": "error",
        }
        secrets = await stack.enter_async_context(
            service_process(address, [sys.executable, "-I", "-m", "secrets_service"], environment)
        )
        await stack.enter_async_context(no_replicas(directory))
        serving = await stack.enter_async_context(mortal_serving(directory))
        await serving.start()
        gateway = GatewaySettings(data_dir=directory, listen="127.0.0.1:0")
        url = await stack.enter_async_context(gateway_app.running(gateway))
        platform = Platform(directory, secrets, serving, url, settings.admin_token.read_text().strip())
        caller = await platform.serving_caller()
        config = pb.EndpointCoreConfigInput(served_entities=[version("1")])
        await caller(caller.stub.CreateServingEndpoint, pb.CreateServingEndpointRequest(name=NAME, config=config))
        await platform.settled()
        yield platform


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    async with running_platform() as running:
        yield running


def versions(load: Load) -> list[tuple[float, float, str]]:
    """When each query was sent and answered, and by which version, alone and whole; every one was answered."""
    assert load.statuses() == {200: len(load.answers)}, [each for each in load.answers if each.status != 200][:3]
    found = []
    for each in load.answers:
        pieces = each.body.decode().removesuffix(">").split(">")
        assert len(pieces) == (tiny_runner.PIECES if each.is_stream else 1), each
        assert len(set(pieces)) == 1, each
        found.append((each.sent, each.ended, pieces[0].removeprefix("<")))
    return found


async def test_no_query_fails_while_serving_is_killed_again_and_again(platform: Platform) -> None:
    load = Load(platform.url, NAME, platform.admin_token)
    async with load.running(streams=1):
        await load.reaches(2_000)
        await platform.serving.kill()
        await load.reaches(4_000)
        await platform.serving.start()
        await load.reaches(5_000)
        await platform.update("2")
        await platform.serving.kill()
        await load.reaches(6_000)
        await platform.serving.start()
        await platform.settled()
        await load.reaches(10_000)
    assert {says for _, _, says in versions(load)} == {"1", "2"}


async def _updated_under_load(platform: Platform, queries: int, updates: int = 5) -> None:
    load = Load(platform.url, NAME, platform.admin_token)
    settled = {"1": 0.0}
    async with load.running(streams=2):
        for number in range(updates):
            await load.reaches((number + 1) * queries // (updates + 1))
            await platform.update(says := str(number + 2))
            await platform.settled()
            settled[says] = time.monotonic()
        await load.reaches(queries)
    for sent, _, says in versions(load):
        newer = [other for other, since in settled.items() if since < sent]
        assert int(says) >= max(map(int, newer)), f"version {says} answered a query from after the end of its drain"
    assert {says for _, _, says in versions(load)} == settled.keys()


async def test_no_query_fails_while_versions_change_and_none_reaches_one_that_is_gone(platform: Platform) -> None:
    await _updated_under_load(platform, 5_000)


@pytest.mark.long
async def test_no_query_of_very_many_fails_while_versions_change(platform: Platform) -> None:
    await _updated_under_load(platform, 20_000)


async def _without_secrets(platform: Platform, queries: int, seconds: float) -> None:
    """Secrets hangs for half of the time, and is gone for the other half."""
    (known, _), (unseen, _), (revoked, revoked_id) = [await platform.token() for _ in range(3)]
    expiring, _ = await platform.token(int(seconds / 2))
    async with AsyncExitStack() as stack:
        settings = GatewaySettings(
            data_dir=platform.directory, listen="127.0.0.1:0", stale_identity_seconds=WINDOW_SECONDS
        )
        strict = Load(await stack.enter_async_context(gateway_app.running(settings)), NAME, known)
        load = Load(platform.url, NAME, known)
        assert await _asked(strict.url, known) == 200
        for token in (known, expiring, revoked):
            assert await platform.asked(token) == 200
        await platform.revoke(revoked_id)
        await stack.enter_async_context(load.running(6, streams=1))
        await stack.enter_async_context(strict.running(1))
        await load.more(100)
        await strict.more(10)
        began = time.monotonic()
        platform.secrets.send(signal.SIGSTOP)
        await asyncio.sleep(seconds / 2)  # what is proved is that time passes
        await platform.secrets.kill()
        await asyncio.sleep(seconds / 2)
        await load.reaches(queries)
        assert [await platform.asked(token) for token in (known, expiring, revoked, unseen)] == [200, 403, 503, 503]
    assert {says for _, _, says in versions(load)} == {"1"}
    assert strict.statuses().keys() == {200, 503}
    assert strict.statuses(since=began + WINDOW_SECONDS + SLACK_SECONDS).keys() == {503}


async def test_no_known_caller_is_refused_while_secrets_hangs_and_while_it_is_gone(platform: Platform) -> None:
    await _without_secrets(platform, 10_000, seconds=20)


@pytest.mark.long
async def test_no_known_caller_is_refused_in_ten_minutes_without_secrets(platform: Platform) -> None:
    await _without_secrets(platform, 10_000, seconds=600)
