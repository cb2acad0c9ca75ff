"""How many replicas a served entity has: between its bounds, as its load asks for, down to zero and back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from servicekit import admission
from serving_service import reconcile
from tessera.identity.v1 import permissions_pb2 as permissions
from tessera.serving.v1 import serving_pb2 as pb
from tests.service.test_lifecycle import CREATING, READY, RECOVERING, Platform, running_platform
from tests.support.builders import an_input
from tests.support.eventually import eventually
from tests.support.http import Answer, fetch
from tests.support.secrets import refusal

SLEEPY: dict[str, Any] = {"workload_size": "Small", "scale_to_zero_enabled": True}
SHORT = 0.2
"""Seconds of idleness, where a test waits for zero."""

PATIENT = {"route_ack_seconds": 10.0}
"""For a gateway that works hard in this same process: it is late now and then, and not deaf."""


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    async with running_platform() as running:
        yield running


@asynccontextmanager
async def running_gateway(platform: Platform) -> AsyncIterator[str]:
    """A gateway of the platform; its URL."""
    async with gateway_app.running(GatewaySettings(data_dir=platform.directory, listen="127.0.0.1:0")) as url:
        yield url


async def deploy(platform: Platform, *entities: pb.ServedEntityInput, name: str = "demo") -> None:
    """Deploys entities on an endpoint, which is made when there is none."""
    if name not in await platform.admin.names():
        await platform.admin.create(name, None)
    await platform.admin.update(name, *entities)
    assert (await platform.admin.settled(name)).state.config_update == pb.EndpointState.NOT_UPDATING


async def until_state(platform: Platform, deployment: int, message: str) -> pb.ServingEndpointDetailed:
    """The endpoint, once its entity's state is this one."""

    def is_so(endpoint: pb.ServingEndpointDetailed) -> bool:
        state = endpoint.config.served_entities[0].state
        return state.deployment == deployment and message in state.deployment_state_message

    return await platform.admin.until("demo", is_so, what=message)


async def at_zero(platform: Platform) -> None:
    found = await until_state(platform, READY, "Scaled to zero")
    assert found.state.ready == pb.EndpointState.READY
    await platform.until_replicas(0)


async def launches(platform: Platform) -> set[str]:
    """The replicas that were ever launched."""
    return {event.replica_id for event in await platform.admin.events("demo")}


def invoke(platform: Platform, url: str) -> asyncio.Task[Answer]:
    token = platform.secrets.admin_token
    return asyncio.create_task(fetch(url, "POST", "/serving-endpoints/demo/invocations", token=token, body=b"{}"))


async def test_an_entity_has_its_fewest_replicas_from_the_start_and_keeps_them(platform: Platform) -> None:
    await deploy(platform, an_input("ready", workload_size="Medium"))
    first = await platform.serving.replicas()
    assert len(first) == 2, "it is ready when both are"

    await platform.start()
    await platform.until_replicas(2)
    assert await platform.serving.replicas() == first

    await deploy(platform, an_input("ready", min_provisioned_concurrency=12))
    await platform.until_replicas(3)
    assert not first.keys() & (await platform.serving.replicas()).keys()


async def test_concurrency_beyond_the_quota_is_refused_and_leaves_nothing_behind(platform: Platform) -> None:
    admin = platform.admin
    await deploy(
        platform, an_input("ready", min_provisioned_concurrency=0, max_provisioned_concurrency=1024), name="wide"
    )
    wide = an_input("slow", min_provisioned_concurrency=0, max_provisioned_concurrency=1024)
    await admin.update("wide", wide)
    await admin.create("narrow", None)
    refused = await refusal(admin.update("narrow", an_input("slow", workload_size="Small")))
    assert refused.reason == "RESOURCE_LIMIT_EXCEEDED"
    assert "model 'slow' would have 1028 of at most 1024" in refused.message
    found = await admin.get("narrow")
    assert not found.HasField("pending_config")
    assert found.state.config_update == found.state.NOT_UPDATING


async def test_replicas_come_with_the_load_and_go_when_it_has_been_quiet(platform: Platform, tmp_path: Path) -> None:
    await platform.start(quiet_seconds=0.5)
    gate, seen = tmp_path / "gate", tmp_path / "seen"
    seen.mkdir()
    entity = an_input(
        "gated",
        min_provisioned_concurrency=4,
        max_provisioned_concurrency=12,
        environment_vars={"GATE": str(gate), "SEEN": str(seen)},
    )
    await deploy(platform, entity)
    await platform.until_replicas(1)
    queries = [asyncio.create_task(platform.admin.query("demo")) for _ in range(14)]
    await eventually(lambda: len(list(seen.iterdir())) == 3, what="three replicas are asked")
    gate.touch()
    answers = [json.loads(body) for _, body in await asyncio.gather(*queries)]
    assert max(answer["most"] for answer in answers) == 4, "no replica has more than four at a time"
    await platform.until_replicas(1)
    await until_state(platform, READY, "")


async def test_a_ready_entity_says_how_many_replicas_it_still_waits_for(platform: Platform, tmp_path: Path) -> None:
    gates = {"GATE": str(tmp_path / "gate"), "START_GATE": str(tmp_path / "start")}
    (tmp_path / "start").touch()
    entity = an_input("gated", min_provisioned_concurrency=4, max_provisioned_concurrency=8, environment_vars=gates)
    await deploy(platform, entity)
    (tmp_path / "start").unlink()
    queries = [asyncio.create_task(platform.admin.query("demo")) for _ in range(5)]
    found = await until_state(platform, READY, "1 of 2 replicas are ready. Phase load")
    assert found.state.ready == pb.EndpointState.READY
    (tmp_path / "start").touch()
    (tmp_path / "gate").touch()
    await asyncio.gather(*queries)
    found = await platform.admin.until(
        "demo", lambda each: "replicas are ready" not in each.config.served_entities[0].state.deployment_state_message
    )


async def test_one_launch_wakes_what_is_at_zero_for_all_and_a_restart_leaves_it_there(platform: Platform) -> None:
    await platform.start(idle_seconds=SHORT)
    await platform.secrets.admin.create_scope("scope")
    await platform.secrets.admin.put("scope", "key", "old")
    entity = an_input("ready", environment_vars={"KEY": "{{secrets/scope/key}}"}, **SLEEPY)
    await deploy(platform, entity)
    await at_zero(platform)
    before = await launches(platform)
    assert len(before) == 1, "one replica shows that it works"

    await platform.start(idle_seconds=SHORT)
    await at_zero(platform)
    assert await launches(platform) == before

    await platform.secrets.admin.put("scope", "key", "new")
    answers = await asyncio.gather(*(platform.admin.query("demo") for _ in range(30)))
    assert {json.loads(body)["environment"]["KEY"] for _, body in answers} == {"new"}
    assert len(await launches(platform) - before) == 1
    assert (await platform.admin.logs("demo", "ready-1")) == ""
    await at_zero(platform)


async def test_on_its_way_up_it_says_so_and_the_endpoint_stays_ready(platform: Platform, tmp_path: Path) -> None:
    await platform.start(idle_seconds=SHORT, queue_seconds=1.0)
    gate = tmp_path / "start"
    gate.touch()
    await deploy(platform, an_input("gated", environment_vars={"START_GATE": str(gate)}, **SLEEPY))
    await at_zero(platform)
    gate.unlink()
    impatient = await refusal(platform.admin.query("demo"))
    assert (impatient.reason, impatient.facts["retry_after"]) == ("TEMPORARILY_UNAVAILABLE", "5")
    found = await until_state(platform, CREATING, "Scaling from zero... Phase load")
    assert found.state.ready == pb.EndpointState.READY
    patient = asyncio.create_task(platform.admin.query("demo"))
    gate.touch()
    await patient
    await at_zero(platform)


async def test_whoever_loses_the_right_while_it_comes_up_is_not_answered(platform: Platform, tmp_path: Path) -> None:
    await platform.start(idle_seconds=SHORT)
    gate = tmp_path / "start"
    gate.touch()
    await deploy(platform, an_input("gated", environment_vars={"START_GATE": str(gate)}, **SLEEPY))
    await platform.secrets.admin.create_user("ann")
    ann = platform.serving.public(await platform.secrets.token_for("ann"))
    endpoint = await platform.admin.get("demo")
    secrets = platform.secrets.admin

    async def set_level(*levels: Any) -> None:
        entries = [permissions.AccessControlRequest(user_name="ann", permission_level=level) for level in levels]
        request = permissions.SetPermissionsRequest(serving_endpoint_id=endpoint.id, access_control_list=entries)
        await secrets(secrets.permissions.SetPermissions, request)

    await set_level(permissions.CAN_QUERY)
    assert (await ann.query("demo"))[1]
    await at_zero(platform)
    gate.unlink()
    waiting = asyncio.create_task(refusal(ann.query("demo")))
    await until_state(platform, CREATING, "Scaling from zero... Phase load")
    await set_level()
    gate.touch()
    assert (await waiting).reason == "ENDPOINT_NOT_FOUND"


async def test_who_waits_for_a_launch_that_fails_hears_why_and_the_next_caller_has_it_tried_again(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "FIRST_BACKOFF", 1.0)
    await platform.start(idle_seconds=SHORT)
    broken = tmp_path / "broken"
    await deploy(platform, an_input("gated", environment_vars={"BROKEN": str(broken)}, **SLEEPY))
    await at_zero(platform)
    before = await launches(platform)
    broken.touch()
    for refused in await asyncio.gather(*(refusal(platform.admin.query("demo")) for _ in range(5))):
        assert refused.reason == "BAD_REQUEST"
        assert "the weights are gone" in refused.message
    assert len(await launches(platform) - before) == 1
    found = await until_state(platform, RECOVERING, "the weights are gone")
    assert found.state.ready == pb.EndpointState.NOT_READY
    broken.unlink()

    async def is_tried_again() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await platform.admin.query("demo")
            return True
        return False

    await eventually(is_tried_again)
    assert len(await launches(platform) - before) == 2
    await at_zero(platform)


async def test_what_is_not_needed_any_more_by_the_end_of_a_plan_goes_with_the_next_one(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, ahead = reconcile.plan, 0.0

    def slow(*args: Any) -> list[reconcile.Action]:
        nonlocal ahead
        ahead += SHORT
        return plan(*args)

    clock = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + ahead)
    monkeypatch.setattr("serving_service.controller.time", clock)
    monkeypatch.setattr(reconcile, "plan", slow)
    await platform.start(idle_seconds=SHORT)
    await deploy(platform, an_input("tiny", **SLEEPY))
    await at_zero(platform)


async def test_launches_wait_for_each_other_and_one_that_hangs_does_not_hold_up_the_rest(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "start"
    await platform.start(parallel_launches=1)
    three = an_input("gated", min_provisioned_concurrency=12, environment_vars={"START_GATE": str(gate)})
    await platform.admin.create("demo", None)
    await platform.admin.update("demo", three)
    await platform.until_replicas(1)
    assert len(await launches(platform)) == 1
    gate.touch()
    await platform.until_replicas(3)
    await platform.admin.settled("demo")
    monkeypatch.setattr("serving_service.slots.LONGEST_SECONDS", 0.2)
    gate.unlink()
    await platform.admin.update("demo", three)
    await platform.until_replicas(6)


async def test_from_zero_and_back_twenty_times_with_fifty_callers_each_and_none_is_lost(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "LOAD_SECONDS", 0.1)
    await platform.start(idle_seconds=SHORT, **PATIENT)
    await deploy(platform, an_input("tiny", **SLEEPY))
    async with running_gateway(platform) as url:
        for cycle in range(20):
            await at_zero(platform)
            before = await launches(platform)
            assert len(before) == cycle + 1
            answers = await asyncio.gather(*(invoke(platform, url) for _ in range(50)))
            assert [answer.status for answer in answers] == [200] * 50


async def test_an_update_of_several_replicas_under_load_loses_nothing(platform: Platform) -> None:
    await platform.start(quiet_seconds=0.3, **PATIENT)
    entity = an_input("ready", min_provisioned_concurrency=8, max_provisioned_concurrency=16)
    await deploy(platform, entity)
    statuses: list[int] = []
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(running_gateway(platform))
        is_over = asyncio.Event()

        async def ask() -> None:
            while not is_over.is_set():
                statuses.append((await invoke(platform, url)).status)

        callers = [asyncio.create_task(ask()) for _ in range(12)]
        for _ in range(3):
            await deploy(platform, entity)
        is_over.set()
        await asyncio.gather(*callers)
        await platform.until_replicas(2)
    assert len(statuses) > 100
    assert set(statuses) == {200}
