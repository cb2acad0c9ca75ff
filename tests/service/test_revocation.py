"""What is taken away is gone everywhere: two gateways and Serving, under load, beside a Secrets that says so (S12)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway import app as gateway_app
from gateway.settings import GatewaySettings
from servicekit.http_client import HttpPool
from tessera.identity.v1 import identity_pb2 as identity
from tessera.identity.v1 import permissions_pb2 as permissions
from tests.support.eventually import eventually
from tests.support.platform import Platform, running_platform

CLIENTS = 4
"""On each gateway; together they keep it busy."""

CEILING_SECONDS = 10.0
"""Within which a right must be gone everywhere."""


@dataclass
class Load:
    """Queries without a pause, with one token at one gateway, until they are told to stop."""

    url: str
    token: str = field(repr=False)
    statuses: list[tuple[float, int]] = field(default_factory=list)
    """When each query was sent, and how it was answered."""

    async def run(self, *, is_over: asyncio.Event) -> None:
        pool = HttpPool()
        headers = [(b"authorization", f"Bearer {self.token}".encode()), (b"content-type", b"application/json")]
        try:
            while not is_over.is_set():
                sent = time.monotonic()
                path = "/serving-endpoints/demo/invocations"
                response = await pool.send(self.url.removeprefix("http://"), "POST", path, headers, b"{}", timeout=10)
                async with response:
                    await response.read()
                self.statuses.append((sent, response.status))
        finally:
            await pool.close()

    def after(self, moment: float) -> set[int]:
        """The answers to what was sent after a moment."""
        return {status for sent, status in self.statuses if sent > moment}


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    """With an endpoint `demo` that the group `team`, which ben belongs to, may query."""
    async with running_platform() as running:
        await running.introduce("ann", "ben")
        made = await running.endpoints_of("ann").create("demo")
        await running.endpoints_of("ann").settled("demo")
        admin = running.secrets.admin
        ben = await admin(admin.scim.ListUsers, identity.ListRequest(filter='userName eq "ben"'))
        member = identity.Member(value=ben.resources[0].id)
        group = identity.CreateGroupRequest(display_name="team", members=[member])
        await admin(admin.scim.CreateGroup, group)
        await grant(running, made.id, group_name="team")
        yield running


async def grant(platform: Platform, endpoint_id: str, **named: str) -> None:
    """Grants CAN_QUERY to nobody but the one named."""
    entries = [permissions.AccessControlRequest(permission_level=permissions.CAN_QUERY, **named)] if named else []
    admin = platform.secrets.admin
    request = permissions.SetPermissionsRequest(serving_endpoint_id=endpoint_id, access_control_list=entries)
    await admin(admin.permissions.SetPermissions, request)


async def _id_of(platform: Platform, kind: str, name: str) -> str:
    admin = platform.secrets.admin
    if kind == "group":
        found = await admin(admin.scim.ListGroups, identity.ListRequest(filter=f'displayName eq "{name}"'))
    else:
        found = await admin(admin.scim.ListUsers, identity.ListRequest(filter=f'userName eq "{name}"'))
    return str(found.resources[0].id)


async def delete_token(platform: Platform) -> None:
    ben = platform.secrets.public(platform.tokens["ben"])
    [token] = (await ben(ben.tokens.ListTokens, identity.ListTokensRequest())).token_infos
    await ben(ben.tokens.DeleteToken, identity.DeleteTokenRequest(token_id=token.token_id))


async def deactivate(platform: Platform) -> None:
    admin = platform.secrets.admin
    off = identity.PatchOperation(op="replace", path="active")
    off.value.bool_value = False
    request = identity.PatchRequest(id=await _id_of(platform, "user", "ben"), operations=[off])
    await admin(admin.scim.PatchUser, request)


async def delete_user(platform: Platform) -> None:
    admin = platform.secrets.admin
    await admin(admin.scim.DeleteUser, identity.DeleteRequest(id=await _id_of(platform, "user", "ben")))


async def leave_group(platform: Platform) -> None:
    admin = platform.secrets.admin
    request = identity.ReplaceGroupRequest(id=await _id_of(platform, "group", "team"), display_name="team")
    await admin(admin.scim.ReplaceGroup, request)


async def take_permission(platform: Platform) -> None:
    await grant(platform, (await platform.endpoints_of("admin").get("demo")).id)


TAKEN: dict[str, tuple[Callable[[Platform], Awaitable[Any]], int]] = {
    "a token that is deleted": (delete_token, 403),
    "a user that is deactivated": (deactivate, 403),
    "a user that is deleted": (delete_user, 403),
    "a member that leaves the group": (leave_group, 404),
    "a permission that is taken away": (take_permission, 404),
}


@pytest.mark.parametrize("name", TAKEN)
async def test_right_that_is_taken_away_is_gone_at_every_gateway(platform: Platform, name: str) -> None:
    take_away, refusal = TAKEN[name]
    async with AsyncExitStack() as stack:
        settings = GatewaySettings(data_dir=platform.secrets.settings.data_dir, listen="127.0.0.1:0", failed_logins=0)
        second = await stack.enter_async_context(gateway_app.running(settings))
        loads = [Load(url, platform.tokens["ben"]) for url in (platform.url, second) for _ in range(CLIENTS)]
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for load in loads:
                tasks.create_task(load.run(is_over=is_over))
            await eventually(lambda: all(len(load.statuses) > 20 for load in loads))
            begun = time.monotonic()
            await take_away(platform)
            answered = time.monotonic()
            await eventually(lambda: all(load.after(answered) for load in loads))
            await eventually(lambda: all(len(load.statuses) > 60 for load in loads))
            is_over.set()
        assert answered - begun < CEILING_SECONDS
        for load in loads:
            assert {status for sent, status in load.statuses if sent < begun - 0.1} <= {200}
            # Not within ten seconds, but with the answer: whoever asks afterwards is refused.
            assert load.after(answered) == {refusal}


async def test_gateway_that_is_cut_off_stops_at_its_window(platform: Platform) -> None:
    """Secrets is gone, so nobody can say that anything was taken away; known callers go on, and not for ever."""
    async with AsyncExitStack() as stack:
        settings = GatewaySettings(
            data_dir=platform.secrets.settings.data_dir, listen="127.0.0.1:0", stale_identity_seconds=0.0
        )
        closed = await stack.enter_async_context(gateway_app.running(settings))
        loads = [Load(url, platform.tokens["ben"]) for url in (platform.url, closed)]
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for load in loads:
                tasks.create_task(load.run(is_over=is_over))
            await eventually(lambda: all(len(load.statuses) > 5 for load in loads))
            await platform.stop_secrets()
            gone = time.monotonic()
            await eventually(lambda: 503 in loads[1].after(gone))
            assert time.monotonic() - gone < CEILING_SECONDS
            last = time.monotonic()
            await eventually(lambda: all(load.after(last) for load in loads))
            is_over.set()
        assert loads[0].after(gone) == {200}
        assert loads[1].after(last) == {503}
