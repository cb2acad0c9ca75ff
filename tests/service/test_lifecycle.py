"""The life of an endpoint, row by row of the contract's table (5.5): what each event makes of its state."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from servicekit import channels
from serving_service.environment import SecretReferences
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import an_input
from tests.support.eventually import eventually
from tests.support.secrets import (
    STREAM_TIMEOUT,
    TIMEOUT,
    RunningSecrets,
    data_directory,
    failing,
    refusal,
    running_secrets,
)
from tests.support.serving import RunningServing, ServingCaller, no_replicas, running_serving

State = pb.EndpointState
CREATING, READY, FAILED, ABORTED, RECOVERING = (
    pb.ServedEntityState.DEPLOYMENT_CREATING,
    pb.ServedEntityState.DEPLOYMENT_READY,
    pb.ServedEntityState.DEPLOYMENT_FAILED,
    pb.ServedEntityState.DEPLOYMENT_ABORTED,
    pb.ServedEntityState.DEPLOYMENT_RECOVERING,
)
FAILING = an_input("failing", environment_vars={"SAID": "no weights"})


class Platform:
    """Secrets, and a Serving that can be started again."""

    def __init__(self, directory: Path, secrets: RunningSecrets) -> None:
        self.directory = directory
        self.secrets = secrets
        self.serving: RunningServing
        self._stack = AsyncExitStack()

    @property
    def admin(self) -> ServingCaller:
        return self.serving.public(self.secrets.admin_token)

    async def start(self, **settings: Any) -> None:
        await self._stack.aclose()
        running = running_serving(self.directory, **{"route_ack_seconds": 0.3, **settings})
        self.serving = await self._stack.enter_async_context(running)

    async def stop(self) -> None:
        await self._stack.aclose()

    async def until_replicas(self, count: int) -> None:
        """Returns when so many model servers run."""

        async def are() -> bool:
            return len(await self.serving.replicas()) == count

        await eventually(are, what=f"{count} replicas run")

    async def serving_demo(self) -> None:
        """An endpoint called demo that serves."""
        await self.admin.create("demo")
        await self.admin.settled("demo")


@asynccontextmanager
async def running_platform() -> AsyncIterator[Platform]:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(data_directory())
        await stack.enter_async_context(no_replicas(directory))
        platform = Platform(directory, await stack.enter_async_context(running_secrets(directory)))
        stack.push_async_callback(platform.stop)
        await platform.start()
        yield platform


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    async with running_platform() as running:
        yield running


def row(endpoint: pb.ServingEndpointDetailed) -> tuple[str, str, int, int]:
    """Ready, config_update, and the versions of the active and of the pending configuration; 0: absent."""
    return (
        State.Ready.Name(endpoint.state.ready),
        State.ConfigUpdate.Name(endpoint.state.config_update),
        endpoint.config.config_version,
        endpoint.pending_config.config_version,
    )


def suspend(endpoint: pb.ServingEndpointDetailed) -> str:
    return State.Suspend.Name(endpoint.state.suspend)


def deployments(config: pb.EndpointCoreConfigOutput) -> list[int]:
    assert [model.state for model in config.served_models] == [entity.state for entity in config.served_entities]
    return [entity.state.deployment for entity in config.served_entities]


# The table


async def test_create_with_configuration_until_the_first_deployment_succeeds(platform: Platform) -> None:
    created = await platform.admin.create("demo")
    assert row(created) == ("NOT_READY", "IN_PROGRESS", 0, 1)
    assert deployments(created.pending_config) == [CREATING]
    settled = await platform.admin.settled("demo")
    assert row(settled) == ("READY", "NOT_UPDATING", 1, 0)
    assert deployments(settled.config) == [READY]


async def test_first_deployment_that_fails(platform: Platform) -> None:
    await platform.admin.create("demo", "failing", environment={"SAID": "no weights"})
    settled = await platform.admin.settled("demo")
    assert row(settled) == ("NOT_READY", "UPDATE_FAILED", 0, 1)
    assert deployments(settled.pending_config) == [FAILED]


async def test_create_without_configuration(platform: Platform) -> None:
    assert row(await platform.admin.create("demo", None)) == ("NOT_READY", "NOT_UPDATING", 0, 0)


async def test_update_that_is_accepted_and_succeeds(platform: Platform) -> None:
    await platform.serving_demo()
    updated = await platform.admin.update("demo", an_input("ready", version="2"))
    assert row(updated) == ("READY", "IN_PROGRESS", 1, 2)
    assert updated.pending_config.start_time
    settled = await platform.admin.settled("demo")
    assert row(settled) == ("READY", "NOT_UPDATING", 2, 0)


async def test_update_that_fails_and_the_next_one(platform: Platform) -> None:
    await platform.serving_demo()
    await platform.admin.update("demo", FAILING, an_input("slow"), routes=[("failing-1", 100), ("slow-1", 0)])
    settled = await platform.admin.settled("demo")
    assert row(settled) == ("READY", "UPDATE_FAILED", 1, 2)
    assert deployments(settled.pending_config) == [FAILED, ABORTED]
    assert row(await platform.admin.update("demo", an_input("ready", version="3"))) == ("READY", "IN_PROGRESS", 1, 3)
    assert row(await platform.admin.settled("demo")) == ("READY", "NOT_UPDATING", 3, 0)


async def test_update_that_is_cancelled_and_the_next_one(platform: Platform) -> None:
    await platform.serving_demo()
    await platform.admin.update("demo", an_input("slow"))
    await platform.until_replicas(2)
    cancelled = await platform.admin.cancel("demo")
    assert row(cancelled) == ("READY", "UPDATE_CANCELED", 1, 2)
    assert deployments(cancelled.pending_config) == [ABORTED]
    assert "admin cancelled" in cancelled.pending_config.served_entities[0].state.deployment_state_message
    await platform.admin.query("demo")
    await platform.until_replicas(1)
    assert row(await platform.admin.get("demo")) == row(cancelled)
    assert row(await platform.admin.update("demo", an_input("ready", version="3"))) == ("READY", "IN_PROGRESS", 1, 3)
    assert row(await platform.admin.settled("demo")) == ("READY", "NOT_UPDATING", 3, 0)


async def test_first_deployment_that_is_cancelled(platform: Platform) -> None:
    await platform.admin.create("demo", "slow")
    assert row(await platform.admin.cancel("demo")) == ("NOT_READY", "UPDATE_CANCELED", 0, 1)
    await platform.until_replicas(0)
    assert (await refusal(platform.admin.query("demo"))).reason == "ENDPOINT_NOT_FOUND"


async def test_replica_that_dies(platform: Platform) -> None:
    await platform.secrets.admin.create_scope("team")
    await platform.secrets.admin.put("team", "api.key", "value")
    await platform.admin.create("demo", environment={"KEY": "{{secrets/team/api.key}}"})
    await platform.admin.settled("demo")
    await platform.secrets.admin.delete("team", "api.key")  # so that no successor takes over before it is seen
    (pid,) = (await platform.serving.replicas()).values()
    os.kill(pid, signal.SIGKILL)
    found = await platform.admin.until("demo", lambda endpoint: endpoint.state.ready == State.NOT_READY)
    assert row(found) == ("NOT_READY", "NOT_UPDATING", 1, 0)
    assert deployments(found.config) == [RECOVERING]


async def test_stop_and_start(platform: Platform) -> None:
    await platform.serving_demo()
    stopped = await platform.admin.stop("demo")
    assert row(stopped) == ("NOT_READY", "NOT_UPDATING", 1, 0)
    assert suspend(stopped) == "STOPPED"
    assert deployments(stopped.config) == [ABORTED]
    await platform.until_replicas(0)

    async def is_said() -> bool:
        return (await refusal(platform.admin.query("demo"))).message.endswith("is stopped. Start it, then ask again.")

    await eventually(is_said)
    refused = await refusal(platform.admin.query("demo"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "BAD_REQUEST")

    started = await platform.admin.start("demo")
    assert row(started) == ("NOT_READY", "IN_PROGRESS", 1, 2)
    assert suspend(started) == "NOT_SUSPENDED"
    settled = await platform.admin.settled("demo")
    assert row(settled) == ("READY", "NOT_UPDATING", 2, 0)
    assert suspend(settled) == "NOT_SUSPENDED"
    entity, before = settled.config.served_entities[0], stopped.config.served_entities[0]
    entity.ClearField("state")
    before.ClearField("state")
    assert entity == before
    await platform.admin.query("demo")
    await platform.until_replicas(1)


# Stopping and starting, further


async def test_requests_in_flight_are_answered_before_their_replica_is_stopped(platform: Platform) -> None:
    await platform.serving_demo()
    gateway = platform.serving.routes.Watch(timeout=STREAM_TIMEOUT)
    await gateway.write(pb.RouteReport())
    table = await gateway.read()
    await gateway.write(pb.RouteReport(acknowledged_revision=table.revision))
    (replica,) = table.endpoints[0].entities[0].replicas
    await platform.admin.stop("demo")
    table = await gateway.read()
    assert table.endpoints[0].is_stopped
    assert list(table.endpoints[0].entities[0].replicas) == []
    load = pb.ReplicaLoad(replica_id=replica.replica_id, in_flight=1)
    whatever_comes = table.revision + 100  # so that it is not cut off meanwhile
    await gateway.write(pb.RouteReport(acknowledged_revision=whatever_comes, retired=[load]))
    await platform.admin.create("another")  # takes longer than stopping a replica that nobody uses
    await platform.admin.settled("another")
    assert replica.replica_id in await platform.serving.replicas()
    await gateway.write(pb.RouteReport(acknowledged_revision=whatever_comes))
    await platform.until_replicas(1)
    assert replica.replica_id not in await platform.serving.replicas()
    gateway.cancel()


async def test_logs_can_be_read_while_an_endpoint_is_stopped(platform: Platform) -> None:
    await platform.admin.create("demo", "speaking", environment={"PIECES": '["some words\\n"]'})
    await platform.admin.settled("demo")
    await platform.admin.stop("demo")
    await platform.until_replicas(0)
    assert await platform.admin.logs("demo", "speaking-1") == "some words\n"


def kept_logs(platform: Platform) -> list[tuple[int, str]]:
    """The logs of replicas that have ended which Serving has recorded, with their versions."""
    database = platform.directory / "serving" / "serving.db"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT version, log FROM last_logs ORDER BY version").fetchall()


@pytest.mark.parametrize("manner", ["speaking", "dying"])
async def test_what_the_last_replica_printed_can_be_read_when_nothing_is_left_of_it(
    platform: Platform, manner: str
) -> None:
    said = "about to die\n" if manner == "dying" else "some words\n"
    await platform.admin.create("demo", manner, environment={"PIECES": '["some words\\n"]'})
    await platform.admin.settled("demo")
    if manner == "speaking":
        await platform.admin.stop("demo")
    await eventually(lambda: kept_logs(platform) == [(1, said)], what="the log is recorded")
    await platform.stop()
    for handle in (await platform.serving.launcher.adopt()).values():
        await handle.stop(0)
    await platform.start()
    assert await platform.serving.launcher.adopt() == {}
    assert await platform.admin.logs("demo", f"{manner}-1") == said


async def test_a_log_is_kept_as_long_as_its_configuration(platform: Platform) -> None:
    await platform.admin.create("demo", "speaking", environment={"PIECES": '["first\\n"]'})
    await platform.admin.settled("demo")
    await platform.admin.stop("demo")
    await eventually(lambda: kept_logs(platform) == [(1, "first\n")], what="the log is recorded")
    await platform.admin.start("demo")
    await platform.admin.settled("demo")
    assert kept_logs(platform) == []
    await platform.admin.stop("demo")
    await eventually(lambda: kept_logs(platform) == [(2, "first\n")], what="the log is recorded")
    await platform.admin.delete("demo")
    await eventually(lambda: kept_logs(platform) == [], what="nothing is left")


async def test_stopped_endpoint_stays_so_after_a_restart_and_can_be_started(platform: Platform) -> None:
    await platform.serving_demo()
    await platform.admin.stop("demo")
    await platform.until_replicas(0)
    await platform.start()
    found = await platform.admin.get("demo")
    assert (row(found), suspend(found)) == (("NOT_READY", "NOT_UPDATING", 1, 0), "STOPPED")
    assert "is stopped" in (await refusal(platform.admin.query("demo"))).message
    await platform.admin.start("demo")
    assert row(await platform.admin.settled("demo")) == ("READY", "NOT_UPDATING", 2, 0)


async def test_start_is_finished_by_a_successor(platform: Platform) -> None:
    await platform.serving_demo()
    await platform.admin.stop("demo")
    await platform.admin.start("demo")
    await platform.start()
    assert row(await platform.admin.settled("demo")) == ("READY", "NOT_UPDATING", 2, 0)
    await platform.until_replicas(1)


async def test_cancelled_update_stays_so_after_a_restart(platform: Platform) -> None:
    await platform.serving_demo()
    await platform.admin.update("demo", an_input("slow"))
    before = await platform.admin.cancel("demo")
    await platform.start()
    assert row(await platform.admin.settled("demo")) == row(before)
    await platform.until_replicas(1)


async def test_start_that_fails_leaves_the_endpoint_stopped_and_says_why(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = platform.secrets.admin
    await owner.create_scope("team")
    await owner.put("team", "api.key", "value")
    await platform.admin.create("demo", environment={"KEY": "{{secrets/team/api.key}}"})
    await platform.admin.settled("demo")
    await platform.admin.stop("demo")
    is_lost = asyncio.Event()
    resolve = SecretReferences.resolve

    async def late(*args: Any, **kwargs: Any) -> Any:
        await is_lost.wait()
        return await resolve(*args, **kwargs)

    monkeypatch.setattr(SecretReferences, "resolve", late)
    await platform.admin.start("demo")
    await owner.delete("team", "api.key")
    is_lost.set()
    failed = await platform.admin.settled("demo")
    assert (row(failed), suspend(failed)) == (("NOT_READY", "UPDATE_FAILED", 1, 2), "STOPPED")
    assert deployments(failed.pending_config) == [FAILED]
    message = failed.pending_config.served_entities[0].state.deployment_state_message
    assert "Scope team has no key api.key" in message
    assert (await refusal(platform.admin.start("demo"))).reason == "INVALID_PARAMETER_VALUE"
    await owner.put("team", "api.key", "value")
    await platform.admin.start("demo")
    assert (await platform.admin.settled("demo")).state.ready == State.READY


async def test_update_of_a_stopped_endpoint_starts_it(platform: Platform) -> None:
    await platform.serving_demo()
    await platform.admin.stop("demo")
    await platform.admin.update("demo", FAILING)
    failed = await platform.admin.settled("demo")
    assert (row(failed), suspend(failed)) == (("NOT_READY", "UPDATE_FAILED", 1, 2), "STOPPED")
    await platform.until_replicas(0)
    await platform.admin.update("demo", an_input("ready", version="3"))
    settled = await platform.admin.settled("demo")
    assert (row(settled), suspend(settled)) == (("READY", "NOT_UPDATING", 3, 0), "NOT_SUSPENDED")


async def test_start_that_is_cancelled_leaves_the_endpoint_stopped(platform: Platform) -> None:
    await platform.serving_demo()
    await platform.admin.stop("demo")
    await platform.admin.update("demo", an_input("slow"))
    cancelled = await platform.admin.cancel("demo")
    assert (row(cancelled), suspend(cancelled)) == (("NOT_READY", "UPDATE_CANCELED", 1, 2), "STOPPED")
    await platform.until_replicas(0)


async def test_stop_forgets_an_update_that_failed_and_changes_nothing_the_second_time(platform: Platform) -> None:
    await platform.serving_demo()
    await platform.admin.update("demo", FAILING)
    await platform.admin.settled("demo")
    first = await platform.admin.stop("demo")
    assert row(first) == ("NOT_READY", "NOT_UPDATING", 1, 0)
    again = await platform.admin.stop("demo")
    assert (row(again), suspend(again)) == (row(first), "STOPPED")
    await platform.until_replicas(0)


async def test_what_cannot_be_done_just_now_is_refused_and_changes_nothing(platform: Platform) -> None:
    admin = platform.admin
    await admin.create("bare", None)
    await admin.create("slow", "slow")
    await platform.serving_demo()
    refusals = [
        await refusal(admin.stop("bare")),
        await refusal(admin.stop("slow")),
        await refusal(admin.start("bare")),
        await refusal(admin.start("slow")),
        await refusal(admin.start("demo")),
        await refusal(admin.cancel("bare")),
        await refusal(admin.cancel("demo")),
        await refusal(admin.stop("nowhere")),
    ]
    bad, conflict, missing = "BAD_REQUEST", "RESOURCE_CONFLICT", "RESOURCE_DOES_NOT_EXIST"
    assert [refused.reason for refused in refusals] == [bad, bad, bad, conflict, bad, bad, bad, missing]
    assert row(await admin.get("slow")) == ("NOT_READY", "IN_PROGRESS", 0, 1)
    assert row(await admin.get("demo")) == ("READY", "NOT_UPDATING", 1, 0)


@pytest.mark.parametrize("state", ["stopping", "stopped", "starting", "cancelled"])
async def test_endpoint_can_be_deleted_in_any_state_and_leaves_nothing(platform: Platform, state: str) -> None:
    admin = platform.admin
    await platform.serving_demo()
    if state == "cancelled":
        await admin.update("demo", an_input("slow"))
        await admin.cancel("demo")
    else:
        await admin.stop("demo")
    if state != "stopping" and state != "cancelled":
        await platform.until_replicas(0)
    if state == "starting":
        await admin.start("demo")
    await admin.delete("demo")
    assert (await refusal(admin.get("demo"))).reason == "RESOURCE_DOES_NOT_EXIST"

    async def nothing_is_left() -> bool:
        return await platform.serving.launcher.adopt() == {}

    await eventually(nothing_is_left)
    created = await admin.create("demo")
    assert (row(created), suspend(created)) == (("NOT_READY", "IN_PROGRESS", 0, 1), "NOT_SUSPENDED")


@pytest.mark.parametrize("stops_first", [True, False])
async def test_of_a_stop_and_an_update_at_once_the_stop_is_refused_or_they_follow_each_other(
    platform: Platform, stops_first: bool
) -> None:
    await platform.serving_demo()
    stopping = asyncio.ensure_future(platform.admin.stop("demo")) if stops_first else None
    updating = asyncio.ensure_future(platform.admin.update("demo", an_input("ready", version="2")))
    stopping = stopping or asyncio.ensure_future(platform.admin.stop("demo"))
    assert row(await updating)[1] == "IN_PROGRESS"
    try:
        version_stopped = (await stopping).config.config_version
    except grpc.aio.AioRpcError as error:
        refused = await refusal(failing(error))
        assert (refused.reason, "is being updated" in refused.message) == ("BAD_REQUEST", True)
        version_stopped = None
    settled = await platform.admin.settled("demo")
    # Whoever came last has its way; in no case is there something between a stopped endpoint and one that serves.
    if version_stopped == 2:
        assert (row(settled), suspend(settled)) == (("NOT_READY", "NOT_UPDATING", 2, 0), "STOPPED")
    else:
        assert (row(settled), suspend(settled)) == (("READY", "NOT_UPDATING", 2, 0), "NOT_SUSPENDED")


async def test_retry_of_a_start_gets_the_first_answer_and_starts_nothing(platform: Platform) -> None:
    await platform.serving_demo()
    await platform.admin.stop("demo")
    request, metadata = pb.StartServingEndpointRequest(name="demo"), (channels.REQUEST_ID, "start-once")
    send: Any = platform.admin.stub.StartServingEndpoint
    first = await send(request, metadata=(*platform.admin._metadata, metadata), timeout=TIMEOUT)
    await platform.admin.settled("demo")
    again = await send(request, metadata=(*platform.admin._metadata, metadata), timeout=TIMEOUT)
    assert again == first
    assert row(await platform.admin.get("demo")) == ("READY", "NOT_UPDATING", 2, 0)
