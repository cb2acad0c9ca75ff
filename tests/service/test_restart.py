"""Serving is killed without warning and started again: what runs is kept, and what was begun is finished."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from servicekit import channels
from serving_service.launcher import Launch
from tessera.serving.v1 import serving_pb2 as pb
from tessera.serving.v1 import serving_pb2_grpc as rpc
from tests.support.builders import an_input
from tests.support.eventually import eventually
from tests.support.secrets import STREAM_TIMEOUT, running_secrets
from tests.support.service_process import ServiceProcess
from tests.support.serving import (
    MannerLauncher,
    ServingCaller,
    a_launcher,
    no_replicas,
    running_replicas,
    serving_settings,
)
from tests.support.serving_process import serving_process

State = pb.EndpointState


@dataclass(frozen=True)
class Platform:
    """Secrets in this process, Serving in one that can be killed."""

    serving: ServiceProcess
    launcher: MannerLauncher
    assertion: str

    @property
    def admin(self) -> ServingCaller:
        return ServingCaller(self.serving.channel, (channels.ASSERTION, self.assertion))

    async def replicas(self) -> dict[str, int]:
        return await running_replicas(self.launcher)

    async def restart(self) -> None:
        await self.serving.kill()
        await self.serving.start()


@asynccontextmanager
async def running_platform() -> AsyncIterator[Platform]:
    async with (
        running_secrets() as secrets,
        no_replicas(secrets.settings.data_dir),
        serving_process(secrets.settings.data_dir) as serving,
    ):
        launcher = a_launcher(serving_settings(secrets.settings.data_dir))
        yield Platform(serving, launcher, await secrets.assertion(secrets.admin_token))


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    async with running_platform() as running:
        yield running


async def test_replicas_are_kept(platform: Platform) -> None:
    await platform.admin.create("demo")
    before = await platform.admin.settled("demo")
    replicas = await platform.replicas()
    await platform.restart()
    await platform.admin.query("demo")
    assert await platform.admin.until("demo", lambda endpoint: endpoint.state.ready == State.READY) == before
    assert await platform.replicas() == replicas


async def test_the_first_table_after_a_restart_holds_every_replica(platform: Platform) -> None:
    for name in ("one", "two"):
        await platform.admin.create(name)
        await platform.admin.settled(name)
    await platform.restart()
    gateway: Any = rpc.RoutesStub(platform.serving.channel).Watch(timeout=STREAM_TIMEOUT)
    table = await gateway.read()
    told = {replica.replica_id for routes in table.endpoints for each in routes.entities for replica in each.replicas}
    assert (table.complete, told) == (True, set(await platform.replicas()))
    gateway.cancel()


async def test_an_update_under_way_goes_on_with_the_replica_that_was_started(platform: Platform) -> None:
    await platform.admin.create("demo", "slow")
    await eventually(lambda: _runs(platform, 1))
    replicas = await platform.replicas()
    await platform.restart()
    assert (await platform.admin.get("demo")).state.config_update == State.IN_PROGRESS
    await platform.admin.create("other")
    await platform.admin.settled("other")  # so every controller has had its turn
    assert replicas.items() <= (await platform.replicas()).items()
    assert await platform.replicas() != replicas
    assert len(await platform.replicas()) == 2


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.03, 0.06, 0.12])
async def test_a_kill_at_any_moment_of_an_update_ends_in_the_new_version_and_one_replica(
    platform: Platform, seconds: float
) -> None:
    await platform.admin.create("demo")
    await platform.admin.settled("demo")
    await platform.admin.update("demo", an_input("ready", version="2"))
    await asyncio.sleep(seconds)  # the moment is the case, nothing is waited for
    await platform.restart()
    settled = await platform.admin.settled("demo")
    assert (settled.state.ready, settled.config.config_version) == (State.READY, 2)
    await eventually(lambda: _has(platform, 1))
    await platform.admin.query("demo")


async def test_a_deletion_is_finished(platform: Platform) -> None:
    await platform.admin.create("demo")
    await platform.admin.settled("demo")
    await platform.admin.delete("demo")
    await platform.restart()
    assert await platform.admin.names() == []
    await eventually(lambda: _has(platform, 0))


async def test_why_an_update_failed_and_its_log_are_kept(platform: Platform) -> None:
    await platform.admin.create("demo", "dying")
    failed = await platform.admin.settled("demo")
    assert failed.state.config_update == State.UPDATE_FAILED
    await platform.restart()
    assert await platform.admin.get("demo") == failed

    async def has_log() -> bool:
        return await platform.admin.logs("demo", "dying-1") == "about to die\n"

    await eventually(has_log)


async def test_a_replica_that_ended_meanwhile_is_started_again(platform: Platform) -> None:
    await platform.admin.create("demo")
    await platform.admin.settled("demo")
    ((replica_id, pid),) = (await platform.replicas()).items()
    await platform.serving.kill()
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: _runs(platform, 0))
    await platform.serving.start()

    async def another_one_runs() -> bool:
        return len(replicas := await platform.replicas()) == 1 and replica_id not in replicas

    await eventually(another_one_runs)
    await platform.admin.until("demo", lambda endpoint: endpoint.state.ready == State.READY)
    await eventually(lambda: _has(platform, 1))


async def test_a_replica_that_belongs_to_no_endpoint_is_stopped(platform: Platform) -> None:
    await platform.admin.create("demo")
    await platform.admin.settled("demo")
    replicas = await platform.replicas()
    await platform.serving.kill()
    stray = platform.launcher._directory.parent / "ready"
    await platform.launcher.start(Launch(replica_id="f" * 32, model_path=stray, environment={}))
    await eventually(lambda: _runs(platform, 2))
    await platform.serving.start()
    await eventually(lambda: _has(platform, 1))
    assert await platform.replicas() == replicas


async def _runs(platform: Platform, count: int) -> bool:
    return len(await platform.replicas()) == count


async def _has(platform: Platform, count: int) -> bool:
    """As `_runs`, but counting those too that have ended and are kept for their logs."""
    return len(await platform.launcher.adopt()) == count
