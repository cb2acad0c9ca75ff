"""Serving is killed at every point of scaling: by load, to zero and back from there (R5, R10).

The load comes from queries through a gateway, which goes on while Serving is gone: none of them is lost either.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from servicekit import admission
from tessera.serving.v1 import serving_pb2 as pb
from tests.service import test_kill_points as kill_points
from tests.service.test_kill_points import NAME, UNITS, Case, Change, Platform, Step, all_proved, drawn, points_of
from tests.support.eventually import eventually
from tests.support.http import fetch
from tests.support.serving import ServingCaller

PLATFORMS = 3

LONGEST_SECONDS = 1.0
"""Most scalings are over by then."""

MANY, FEW = UNITS + 2, 2
"""How many queries are under way at a time: more than one replica takes, and fewer."""

SHORT = {"route_ack_seconds": 3.0, "quiet_seconds": 0.4, "idle_seconds": 0.4}
"""A gateway that works in this same process is late now and then; it is missed only when it does not come back."""
LONG = {"quiet_seconds": 600.0, "idle_seconds": 600.0}
"""Whoever has come up stays there until the gateway has found Serving again, however long that takes."""


async def _deploy(platform: Platform, caller: ServingCaller, **bounds: Any) -> None:
    entity = platform.version("1", GATE=str(platform.gate))
    entity.MergeFrom(pb.ServedEntityInput(**bounds))
    config = pb.EndpointCoreConfigInput(served_entities=[entity])
    await caller(caller.stub.CreateServingEndpoint, pb.CreateServingEndpointRequest(name=NAME, config=config))
    await caller.settled(NAME)


async def _deploy_one_or_two(platform: Platform, caller: ServingCaller) -> None:
    await _deploy(platform, caller, min_provisioned_concurrency=UNITS, max_provisioned_concurrency=2 * UNITS)
    await _until_running(platform, 1)
    await _until_said(caller, "")


async def _deploy_none_or_one(platform: Platform, caller: ServingCaller) -> None:
    await _deploy(platform, caller, min_provisioned_concurrency=0, max_provisioned_concurrency=UNITS)


async def _until_said(caller: ServingCaller, message: str) -> None:
    """Returns once that is all that there is to be said of a served entity that is ready."""

    def is_said(endpoint: pb.ServingEndpointDetailed) -> bool:
        return endpoint.config.served_entities[0].state.deployment_state_message == message

    await caller.until(NAME, is_said, what=message)


async def _until_running(platform: Platform, count: int) -> None:
    await eventually(lambda: platform.running() == count, what=f"{count} run")


async def _fall_asleep(platform: Platform, caller: ServingCaller) -> None:
    await _until_said(caller, "Scaled to zero")
    await _until_running(platform, 0)


async def _ask(platform: Platform, caller: ServingCaller) -> None:
    _query(platform, FEW)


async def _ask_much(platform: Platform, caller: ServingCaller) -> None:
    _query(platform, MANY)


def _query(platform: Platform, count: int) -> None:
    """So many queries, which are answered once the gate is open."""
    for _ in range(count):
        query = fetch(
            platform.url,
            "POST",
            f"/serving-endpoints/{NAME}/invocations",
            token=platform.secrets.admin_token,
            body=b"{}",
        )
        platform.queries.append(asyncio.create_task(query))


async def _be_asked(platform: Platform, caller: ServingCaller) -> None:
    _query(platform, FEW)
    await _until_running(platform, 1)
    await _until_said(caller, "")


async def _be_asked_much(platform: Platform, caller: ServingCaller) -> None:
    _query(platform, MANY)
    await _until_running(platform, 2)
    await _until_said(caller, "")


async def _open_gate(platform: Platform, caller: ServingCaller) -> None:
    platform.gate.touch()


async def _all_are_answered(platform: Platform, caller: ServingCaller) -> None:
    platform.gate.touch()
    answers = await asyncio.gather(*platform.queries)
    platform.queries.clear()
    assert {(answer.status, answer.body) for answer in answers} == {(200, b"1")}


def _scaling(act: Step, *before: Step, **more: Any) -> Change:
    """To ask when it is over would be load again; whoever asked before is answered."""
    return Change(act, before, settings=SHORT, is_quiet=True, then=_all_are_answered, **more)


SCALINGS = {
    "more by load": _scaling(_ask_much, _deploy_one_or_two, running=2, folders=2, surge=2, later=LONG),
    "fewer by load": _scaling(_open_gate, _deploy_one_or_two, _be_asked_much, surge=2),
    "to zero": _scaling(_open_gate, _deploy_none_or_one, _be_asked, running=0),
    "from zero": _scaling(_ask, _deploy_none_or_one, _fall_asleep, later=LONG),
}


@asynccontextmanager
async def running_platform() -> AsyncIterator[Platform]:
    async with AsyncExitStack() as stack:
        platform = await stack.enter_async_context(kill_points.running_platform())
        settings = GatewaySettings(data_dir=platform.directory, listen="127.0.0.1:0")
        url = await stack.enter_async_context(gateway_app.running(settings))
        yield Platform(platform.secrets, platform.serving, url)


@pytest.fixture(scope="module")
async def platforms() -> AsyncIterator[list[Platform]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running_platform()) for _ in range(PLATFORMS)]


@pytest.mark.parametrize("name", SCALINGS)
async def test_a_kill_at_any_point_of_scaling_comes_to_the_same_end(
    platforms: list[Platform], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(admission, "LOAD_SECONDS", 0.1)
    change = SCALINGS[name]
    points, end = await points_of(platforms[0], change)
    assert points
    await all_proved(platforms, (Case(name, change, point) for point in points), {name: end})


@pytest.mark.long
async def test_a_kill_at_any_moment_of_scaling_comes_to_the_same_end(
    platforms: list[Platform], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "LOAD_SECONDS", 0.1)
    ends = {name: (await points_of(platforms[0], change))[1] for name, change in SCALINGS.items()}
    await all_proved(platforms, drawn(SCALINGS, 100, LONGEST_SECONDS), ends)
