"""Logs that are followed: what a follower is told, when that ends, what it costs, and who may follow for how long."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import grpc
import pytest

from gateway import app as gateway_app
from gateway import streams
from gateway.settings import GatewaySettings
from servicekit import channels
from serving_service import followers, outputs
from tessera.identity.v1 import identity_pb2 as identity
from tessera.identity.v1 import permissions_pb2 as permissions
from tests.support.eventually import eventually
from tests.support.following import CUT, Following, over_grpc, over_rest
from tests.support.platform import Platform, running_platform
from tests.support.secrets import data_directory, running_secrets
from tests.support.serving import ServingCaller, no_replicas, running_serving

ENTITY = "talking-1"
WAYS = ("gRPC", "REST")


@pytest.fixture(scope="module")
async def platform() -> AsyncIterator[Platform]:
    async with running_platform() as running:
        await running.introduce("ann", "ben")
        yield running


def following(platform: Platform, way: str, name: str, *, who: str = "ann") -> AbstractAsyncContextManager[Following]:
    if way == "gRPC":
        return over_grpc(platform.endpoints_of(who), name, ENTITY)
    return over_rest(platform, who, name, ENTITY)


async def talking(platform: Platform, name: str) -> str:
    """An endpoint of ann's whose model prints what it is sent; returns the endpoint's id."""
    ann = platform.endpoints_of("ann")
    made = await ann.create(name, "talking")
    await ann.settled(name)
    return made.id


async def say(platform: Platform, name: str, words: str, **more: object) -> None:
    try:
        await platform.endpoints_of("ann").query(name, path=json.dumps({"say": words, **more}).encode())
    except grpc.aio.AioRpcError:
        if "dies" not in more:
            raise


def headers(text: str) -> list[str]:
    """The replicas that are said to speak, in order."""
    return re.findall(r"^--- replica ([0-9a-f]{32}) of configuration 1$", text, re.MULTILINE)


# --- what is told


@pytest.mark.parametrize("way", WAYS)
async def test_follower_is_told_what_there_is_and_then_what_comes(platform: Platform, way: str) -> None:
    name = f"told-{way}"
    await talking(platform, name)
    await say(platform, name, "before")
    async with following(platform, way, name) as follower:
        await follower.until("before\n")
        await say(platform, name, "first after")
        await follower.until("first after\n")
        await say(platform, name, "second after")
        text = await follower.until("second after\n")
        assert follower.ending == ""
    [replica] = headers(text)
    assert text == f"--- replica {replica} of configuration 1\nbefore\nfirst after\nsecond after\n"


async def test_last_words_of_a_replica_are_told_and_then_those_of_its_successor(platform: Platform) -> None:
    await talking(platform, "dying")
    await say(platform, "dying", "before")
    async with following(platform, "gRPC", "dying") as follower:
        await follower.until("before\n")
        await say(platform, "dying", "last words", dies=True)
        await platform.endpoints_of("ann").until("dying", lambda endpoint: endpoint.state.ready == endpoint.state.READY)
        await eventually(lambda: _says(platform, "dying", "of another"), what="the successor answers")
        text = await follower.until("of another\n")
    first, second = headers(text)
    assert text == (
        f"--- replica {first} of configuration 1\nbefore\nlast words\n"
        f"--- replica {second} of configuration 1\nof another\n"
    )


async def _says(platform: Platform, name: str, words: str) -> bool:
    try:
        await say(platform, name, words)
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_it_ends_when_the_endpoint_is_stopped(platform: Platform) -> None:
    name = "stopped"
    await talking(platform, name)
    async with following(platform, "gRPC", name) as follower:
        await say(platform, name, "words")
        await follower.until("words\n")
        await platform.endpoints_of("ann").stop(name)
        assert await follower.end() == "OK"
    async with following(platform, "REST", name) as follower:
        assert await follower.end() == "OK"
    assert follower.text.endswith("\nwords\n")


async def test_it_ends_with_what_a_failed_deployment_had_printed(platform: Platform) -> None:
    await platform.endpoints_of("ann").create("failed", "dying")
    async with over_grpc(platform.endpoints_of("ann"), "failed", "dying-1") as follower:
        assert await follower.end() == "OK"
    assert follower.text.endswith("\nabout to die\n")


async def test_how_an_environment_came_about_is_told_and_ends(platform: Platform) -> None:
    ann = platform.endpoints_of("ann")
    await ann.create("built", "ready")
    async with over_grpc(ann, "built", "ready-1", is_build=True) as follower:
        assert await follower.end() == "OK"
    assert re.fullmatch(r"The service's own environment .* nothing is built\.\n", follower.text)


async def test_what_could_not_be_told_is_left_out_and_counted(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "NEWS_BYTES", 1_000)
    await talking(platform, "flood")
    async with following(platform, "gRPC", "flood") as follower:
        await say(platform, "flood", "begin")
        await follower.until("begin\n")
        await say(platform, "flood", "x" * 99, times=200)
        await say(platform, "flood", "end")
        text = await follower.until("end\n")
    missing = [int(number) for number in re.findall(r"^--- (\d+) lines are left out$", text, re.MULTILINE)]
    assert sum(missing) + text.count("x" * 99) == 200
    assert sum(missing) > 0


async def test_what_is_not_there_cannot_be_followed(platform: Platform) -> None:
    await talking(platform, "bare")
    ann = platform.endpoints_of("ann")
    ben = platform.endpoints_of("ben")
    for caller, name, entity in ((ann, "none", ENTITY), (ann, "bare", "none"), (ben, "bare", ENTITY)):
        async with over_grpc(caller, name, entity) as follower:
            assert await follower.end() == "NOT_FOUND"
    async with over_rest(platform, "ben", "bare", ENTITY) as refused:
        assert await refused.end() == "404"


# --- who may follow, and for how long


async def take_permission(platform: Platform, endpoint_id: str) -> None:
    await share(platform, endpoint_id)


async def delete_token(platform: Platform, endpoint_id: str) -> None:
    ben = platform.secrets.public(platform.tokens["ben"])
    platform.tokens["ben"] = await platform.secrets.token_for("ben")
    listed = (await ben(ben.tokens.ListTokens, identity.ListTokensRequest())).token_infos
    me = [each.token_id for each in listed if each.creation_time == min(one.creation_time for one in listed)]
    await ben(ben.tokens.DeleteToken, identity.DeleteTokenRequest(token_id=me[0]))


async def share(platform: Platform, endpoint_id: str, *names: str) -> None:
    """Has just these, beside ann, manage an endpoint."""
    entries = [
        permissions.AccessControlRequest(user_name=name, permission_level=permissions.CAN_MANAGE)
        for name in ("ann", *names)
    ]
    ann = platform.secrets.public(platform.tokens["ann"])
    request = permissions.SetPermissionsRequest(serving_endpoint_id=endpoint_id, access_control_list=entries)
    await ann(ann.permissions.SetPermissions, request)


TAKEN: dict[str, tuple[Callable[[Platform, str], Awaitable[None]], str]] = {
    "permission": (take_permission, "NOT_FOUND"),
    "token": (delete_token, "PERMISSION_DENIED"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", TAKEN)
async def test_who_may_not_read_any_more_is_told_nothing_more(platform: Platform, way: str, what: str) -> None:
    take_away, code = TAKEN[what]
    name = f"taken-{what}-{way}"
    endpoint_id = await talking(platform, name)
    await share(platform, endpoint_id, "ben")
    async with following(platform, way, name, who="ben") as follower:
        await say(platform, name, "before")
        await follower.until("before\n")
        await take_away(platform, endpoint_id)
        await say(platform, name, "afterwards")
        assert await follower.end() == (code if way == "gRPC" else CUT)
    assert "afterwards" not in follower.text


# --- what it costs


@pytest.mark.parametrize("way", WAYS)
async def test_who_hangs_up_leaves_nothing_behind(platform: Platform, way: str) -> None:
    name = f"left-{way}"
    await talking(platform, name)
    await say(platform, name, "words")
    async with following(platform, way, name) as follower:  # so that what stays once is there
        await follower.until("words\n")
    before = held()
    for _ in range(followers.MOST_OF_ONE + 2):
        async with following(platform, way, name) as follower:
            await follower.until("words\n")

    def is_as_before() -> bool:
        return all(now <= then for now, then in zip(held(), before, strict=True))

    await eventually(is_as_before, what=f"no more than {before} tasks and descriptors are there")


def held() -> tuple[int, int]:
    """How many tasks there are and how many descriptors are open, both services and this test together."""
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))  # noqa: PTH208


async def test_one_caller_follows_so_many_logs_and_leaves_room_for_others(platform: Platform) -> None:
    endpoint_id = await talking(platform, "crowd")
    await share(platform, endpoint_id, "ben")
    async with AsyncExitStack() as stack:
        for _ in range(followers.MOST_OF_ONE):
            follower = await stack.enter_async_context(following(platform, "gRPC", "crowd"))
            await eventually(lambda follower=follower: follower.pieces > 0)
        async with following(platform, "gRPC", "crowd") as refused, following(platform, "REST", "crowd") as over_http:
            assert (await refused.end(), await over_http.end()) == ("RESOURCE_EXHAUSTED", "429")
        async with following(platform, "gRPC", "crowd", who="ben") as other:
            await eventually(lambda: other.pieces > 0)


async def test_who_takes_nothing_at_a_gateway_is_cut_off(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streams, "UNREAD_SECONDS", 0.2)
    monkeypatch.setattr(outputs, "NEWS_BYTES", 4 << 20)
    await talking(platform, "unread")
    caplog.set_level(logging.INFO, logger="gateway.streams")
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        host, _, port = platform.url.removeprefix("http://").rpartition(":")
        line.connect((host, int(port)))
        path = f"/api/2.0/tessera/serving-endpoints/unread/served-models/{ENTITY}/logs:follow"
        line.sendall(f"GET {path} HTTP/1.1\r\nAuthorization: Bearer {platform.tokens['ann']}\r\n\r\n".encode())

        async def is_cut_off() -> bool:
            await say(platform, "unread", "x" * 1_023, times=4_000)
            return any(vars(record).get("problem") == "TimeoutError" for record in caplog.records)

        await eventually(is_cut_off, within=30.0, what="the stream is given up")


# --- restarts


async def test_stopping_gateway_does_not_wait_for_followers(platform: Platform) -> None:
    await talking(platform, "left-alone")
    await say(platform, "left-alone", "words")
    async with AsyncExitStack() as stack:
        second = await stack.enter_async_context(AsyncExitStack())
        settings = GatewaySettings(
            data_dir=platform.secrets.settings.data_dir, listen="127.0.0.1:0", drain_seconds=40.0
        )
        url = await second.enter_async_context(gateway_app.running(settings))
        follower = await stack.enter_async_context(over_rest(platform, "ann", "left-alone", ENTITY, url=url))
        await follower.until("words\n")
        began = time.monotonic()
        await second.aclose()
        assert time.monotonic() - began < 20
        assert await follower.end() == CUT


async def test_follower_is_told_that_serving_stops_and_may_go_on_with_its_successor() -> None:
    with data_directory() as directory:
        async with no_replicas(directory), running_secrets(directory) as secrets:
            async with AsyncExitStack() as stack:
                async with running_serving(directory, route_ack_seconds=0.3) as serving:
                    admin = serving.public(secrets.admin_token)
                    await admin.create("demo", "talking")
                    await admin.settled("demo")
                    await admin.query("demo", path=b'{"say": "before"}')
                    channel = await stack.enter_async_context(channels.opened(serving.address))
                    caller = ServingCaller(channel, *admin._metadata)
                    first = await stack.enter_async_context(over_grpc(caller, "demo", ENTITY))
                    await first.until("before\n")
                assert await first.end() == "UNAVAILABLE"
            async with running_serving(directory, route_ack_seconds=0.3) as serving:
                admin = serving.public(secrets.admin_token)
                async with over_grpc(admin, "demo", ENTITY) as second:
                    await second.until("before\n")
                    await eventually(lambda: _is_answered(admin, b'{"say": "after"}'))
                    await second.until("after\n")
    assert headers(first.text) == headers(second.text)


async def _is_answered(caller: ServingCaller, body: bytes) -> bool:
    try:
        await caller.query("demo", path=body)
    except grpc.aio.AioRpcError:
        return False
    return True
