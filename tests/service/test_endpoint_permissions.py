"""Serving enforces what Secrets decides: permissions on endpoints, and grants of what their launches refer to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from servicekit import channels
from servicekit.storage import StorageError
from serving_service import endpoints, store
from serving_service.environment import SecretReferences
from tessera.identity.v1 import identity_pb2
from tessera.identity.v1 import permissions_pb2 as permissions
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import an_input
from tests.support.eventually import eventually
from tests.support.platform import running_pair
from tests.support.secrets import TIMEOUT, Caller, RunningSecrets, data_directory, refusal
from tests.support.serving import RunningServing, ServingCaller
from tests.support.stores import rewrite

State = pb.EndpointState
SECRET = "{{secrets/team/api.key}}"
MISSING = "RESOURCE_DOES_NOT_EXIST"
DENIED = "PERMISSION_DENIED"

VIEW, QUERY, MANAGE = permissions.CAN_VIEW, permissions.CAN_QUERY, permissions.CAN_MANAGE


class Person:
    """Somebody, at both services."""

    def __init__(self, secrets: Caller, serving: ServingCaller) -> None:
        self.secrets = secrets
        self.serving = serving

    async def allow(self, endpoint_id: str, name: str, level: permissions.PermissionLevel.ValueType) -> None:
        entry = permissions.AccessControlRequest(user_name=name, permission_level=level)
        request = permissions.UpdatePermissionsRequest(serving_endpoint_id=endpoint_id, access_control_list=[entry])
        await self.secrets(self.secrets.permissions.UpdatePermissions, request)

    async def disallow(self, endpoint_id: str) -> None:
        """Takes everything away that is granted directly, but for what the creator needs to give it again."""
        me = await self.secrets(self.secrets.scim.GetMe, identity_pb2.GetMeRequest())
        entry = permissions.AccessControlRequest(user_name=me.user_name, permission_level=MANAGE)
        request = permissions.SetPermissionsRequest(serving_endpoint_id=endpoint_id, access_control_list=[entry])
        await self.secrets(self.secrets.permissions.SetPermissions, request)


class Platform:
    """Both services, the people who use them, and a secret that ann may read."""

    def __init__(self, directory: Path, secrets: RunningSecrets, serving: RunningServing) -> None:
        self.directory = directory
        self.secrets = secrets
        self.serving = serving
        self.people: dict[str, Person] = {}

    async def person(self, name: str) -> Person:
        await self.secrets.admin.create_user(name)
        token = await self.secrets.token_for(name)
        return Person(self.secrets.public(token), self.serving.public(token))

    @property
    def ann(self) -> Person:
        return self.people["ann"]

    @property
    def ben(self) -> Person:
        return self.people["ben"]


@contextlib.asynccontextmanager
async def running_platform(directory: Path) -> AsyncIterator[Platform]:
    async with running_pair(directory) as (secrets, serving):
        platform = Platform(directory, secrets, serving)
        platform.people = {name: await platform.person(name) for name in ("ann", "ben")}
        await platform.ann.secrets.create_scope("team")
        await platform.ann.secrets.put("team", "api.key", "value")
        yield platform


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    with data_directory() as directory:
        async with running_platform(directory) as running:
            yield running


async def first_piece(caller: ServingCaller) -> Any:
    """How a log that is followed begins."""
    request = pb.FollowServedModelLogsRequest(name="demo", served_model_name="ready-1")
    call = caller.stub.FollowServedModelLogs(request, metadata=caller._metadata, timeout=TIMEOUT)
    try:
        return await call.read()
    finally:
        call.cancel()


Operation = Callable[[ServingCaller], Awaitable[Any]]

OPERATIONS: dict[str, tuple[int, Operation]] = {
    "get": (VIEW, lambda caller: caller.get("demo")),
    "query": (QUERY, lambda caller: caller.query("demo")),
    "logs": (MANAGE, lambda caller: caller.logs("demo", "ready-1")),
    "build logs": (
        MANAGE,
        lambda caller: caller(
            caller.stub.GetServedModelBuildLogs,
            pb.GetServedModelBuildLogsRequest(name="demo", served_model_name="ready-1"),
        ),
    ),
    "follow logs": (MANAGE, lambda caller: first_piece(caller)),
    "update": (MANAGE, lambda caller: caller.update("demo", an_input("ready"))),
    "delete": (MANAGE, lambda caller: caller.delete("demo")),
}
"""What can be done with an endpoint, and the level that it needs (contract 3.4)."""


@pytest.mark.parametrize("level", [None, VIEW, QUERY, MANAGE])
async def test_each_level_opens_what_it_is_for_and_nothing_else(platform: Platform, level: Any) -> None:
    made = await platform.ann.serving.create("demo")
    await platform.ann.serving.settled("demo")
    if level is not None:
        await platform.ann.allow(made.id, "ben", level)
    ben = platform.ben.serving
    assert await ben.names() == ([] if level is None else ["demo"])
    for name, (needed, operation) in OPERATIONS.items():
        if level is not None and level >= needed:
            answer = await operation(ben)
            if name == "get":
                assert answer.permission_level == level
        else:
            refused = await refusal(operation(ben))
            absent = "ENDPOINT_NOT_FOUND" if name == "query" else MISSING
            assert refused.reason == (absent if level is None else DENIED), name
            if level is not None:
                assert f"CAN_{'QUERY' if needed == QUERY else 'MANAGE'}" in refused.message


async def test_a_hidden_endpoint_is_answered_like_a_missing_one(platform: Platform) -> None:
    await platform.ann.serving.create("demo", "ready")
    await platform.ann.serving.settled("demo")
    ben = platform.ben.serving
    others: dict[str, Operation] = {
        "get": lambda caller: caller.get("none"),
        "query": lambda caller: caller.query("none"),
        "logs": lambda caller: caller.logs("none", "ready-1"),
        "update": lambda caller: caller.update("none", an_input("ready")),
        "delete": lambda caller: caller.delete("none"),
    }
    for name, missing in others.items():
        hidden, absent = await refusal(OPERATIONS[name][1](ben)), await refusal(missing(ben))
        assert (hidden.code, hidden.reason, hidden.facts) == (absent.code, absent.reason, absent.facts)
        assert hidden.message.replace("demo", "") == absent.message.replace("none", "")


async def test_a_permission_of_a_group_and_its_end_are_in_force_at_once(platform: Platform) -> None:
    made = await platform.ann.serving.create("demo")
    admin = platform.secrets.admin
    me = await platform.ben.secrets(platform.ben.secrets.scim.GetMe, identity_pb2.GetMeRequest())
    group = await admin(admin.scim.CreateGroup, identity_pb2.CreateGroupRequest(display_name="team"))
    entry = permissions.AccessControlRequest(group_name="team", permission_level=VIEW)
    request = permissions.UpdatePermissionsRequest(serving_endpoint_id=made.id, access_control_list=[entry])
    await platform.ann.secrets(platform.ann.secrets.permissions.UpdatePermissions, request)
    for members in ([identity_pb2.Member(value=me.id)], []):
        replace = identity_pb2.ReplaceGroupRequest(id=group.id, display_name="team", members=members)
        await admin(admin.scim.ReplaceGroup, replace)
        assert await platform.ben.serving.names() == ["demo"] * len(members)
    for level, names in ((VIEW, ["demo"]), (None, [])):
        if level is None:
            await platform.ann.disallow(made.id)
        else:
            await platform.ann.allow(made.id, "ben", level)
        assert await platform.ben.serving.names() == names


async def test_a_name_that_is_used_again_has_none_of_the_permissions_of_before(platform: Platform) -> None:
    first = await platform.ann.serving.create("demo", None)
    await platform.ann.allow(first.id, "ben", MANAGE)
    await platform.ben.serving.delete("demo")
    second = await platform.ann.serving.create("demo", None)
    assert second.id != first.id
    assert await platform.ben.serving.names() == []
    request = permissions.GetPermissionsRequest(serving_endpoint_id=first.id)

    async def is_gone() -> bool:
        try:
            await platform.ann.secrets(platform.ann.secrets.permissions.GetPermissions, request)
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.NOT_FOUND
        return False

    await eventually(is_gone, what="the first endpoint's permissions are gone")


async def test_whoever_manages_an_endpoint_may_scale_it_but_not_run_something_else_with_its_secrets(
    platform: Platform,
) -> None:
    made = await platform.ann.serving.create("demo", environment={"A": SECRET})
    await platform.ann.serving.settled("demo")
    await platform.ann.allow(made.id, "ben", MANAGE)
    ben = platform.ben.serving
    for changed in (
        an_input("ready", entity_version="2", environment_vars={"A": SECRET}),
        an_input("slow", environment_vars={"A": SECRET}),
        an_input("ready", environment_vars={"A": SECRET, "PROXY": "http://evil.example"}),
        an_input("ready", environment_vars={"B": SECRET}),
    ):
        refused = await refusal(ben.update("demo", changed))
        assert refused.reason == DENIED
        assert "User ben does not have READ permission on scope team" in refused.message
    await ben.update("demo", an_input("ready", workload_size="Medium", environment_vars={"A": SECRET}))
    assert (await ben.settled("demo")).config.config_version == 2  # a refused attempt takes no number
    # Without the secret it may run what it likes.
    await ben.update("demo", an_input("ready", entity_version="2"))
    assert (await ben.settled("demo")).state.config_update == State.NOT_UPDATING


async def test_what_was_changed_in_the_database_is_not_launched_with_secrets(platform: Platform) -> None:
    await platform.ann.serving.create("demo", environment={"A": SECRET})
    await platform.ann.serving.settled("demo")
    with closing(sqlite3.connect(platform.directory / "serving" / "serving.db")) as connection:
        connection.execute('UPDATE configs SET content = replace(content, \'"version":"1"\', \'"version":"7"\')')
        connection.commit()
    (pid,) = (await platform.serving.replicas()).values()
    os.kill(pid, signal.SIGKILL)
    waiting = await platform.ann.serving.until(
        "demo",
        lambda endpoint: "never granted" in endpoint.config.served_entities[0].state.deployment_state_message,
    )
    assert "{{secrets/team/api.key}}" in waiting.config.served_entities[0].state.deployment_state_message


# --- between two databases ---


async def granted(platform: Platform) -> dict[str, set[int]]:
    """The versions that each endpoint may launch with secrets, as Secrets has them."""
    with closing(sqlite3.connect(f"file:{platform.directory}/secrets/secrets.db?mode=ro", uri=True)) as connection:
        found: dict[str, set[int]] = {
            row[0]: set() for row in connection.execute("SELECT id FROM endpoints WHERE NOT is_deleted")
        }
        for endpoint_id, version in connection.execute("SELECT endpoint_id, version FROM launch_grants"):
            found[endpoint_id].add(version)
    return found


async def test_grants_follow_the_configurations_that_may_be_launched(platform: Platform) -> None:
    made = await platform.ann.serving.create("demo", environment={"A": SECRET})
    await platform.ann.serving.settled("demo")
    assert await granted(platform) == {made.id: {1}}
    await platform.ann.serving.update("demo", an_input("failing", environment_vars={"A": SECRET}))
    assert (await platform.ann.serving.settled("demo")).state.config_update == State.UPDATE_FAILED
    assert await granted(platform) == {made.id: {1, 2}}
    await platform.ann.serving.update("demo", an_input("ready", entity_version="2", environment_vars={"A": SECRET}))
    await platform.ann.serving.settled("demo")

    async def has(expected: dict[str, set[int]]) -> bool:
        return await granted(platform) == expected

    await eventually(lambda: has({made.id: {3}}), what="only the active configuration is granted")
    await platform.ann.serving.delete("demo")
    await eventually(lambda: has({}), what="nothing is granted")


@pytest.mark.parametrize("step", ["before the grant", "after the grant", "at the commit"])
async def test_a_create_that_fails_half_way_leaves_nothing(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    fail_at(monkeypatch, step)
    assert (await refusal(platform.ann.serving.create("demo", environment={"A": SECRET}))).reason == "INTERNAL_ERROR"
    monkeypatch.undo()
    await platform.ann.serving.create("demo", environment={"A": SECRET})

    async def is_alone() -> bool:
        return len(await granted(platform)) == 1

    await eventually(is_alone, what="Secrets has forgotten the first attempt")
    assert (await platform.ann.serving.settled("demo")).state.ready == State.READY


@pytest.mark.parametrize("step", ["before the grant", "after the grant", "at the commit"])
async def test_an_update_that_fails_half_way_can_be_sent_again(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    made = await platform.ann.serving.create("demo", environment={"A": SECRET})
    await platform.ann.serving.settled("demo")
    fail_at(monkeypatch, step)
    changed = an_input("ready", entity_version="2", environment_vars={"A": SECRET})
    assert (await refusal(platform.ann.serving.update("demo", changed))).reason == "INTERNAL_ERROR"
    monkeypatch.undo()
    await platform.ann.serving.update("demo", changed)
    settled = await platform.ann.serving.settled("demo")
    assert settled.config.config_version == 3  # what Secrets may have heard of is not used again

    async def is_settled() -> bool:
        return await granted(platform) == {made.id: {3}}

    await eventually(is_settled, what="only the active configuration is granted")


async def test_a_reservation_that_cannot_be_released_is_released_when_the_disk_can_be_written_again(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "RELEASE_SECONDS", 0.01)
    await platform.ann.serving.create("there", None)
    fail_at(monkeypatch, "at the commit")
    is_full = True

    def while_there_is_room(release: Any) -> Any:
        def attempt(*arguments: Any, **names: Any) -> None:
            if is_full:
                refuse()
            release(*arguments, **names)

        return attempt

    for name in ("release_endpoint", "release_version"):
        monkeypatch.setattr(store, name, while_there_is_room(getattr(store, name)))
    ann = platform.ann.serving
    for change in (ann.create("demo", None), ann.update("there", an_input("ready"))):
        assert (await refusal(change)).reason == "INTERNAL_ERROR"
    assert (await refusal(ann.create("demo", None))).reason == "RESOURCE_ALREADY_EXISTS"
    monkeypatch.undo()
    is_full = False

    async def is_free() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await ann.create("demo", None)
            return True
        return False

    async def is_updated() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await ann.update("there", an_input("ready"))
            return True
        return False

    await eventually(is_free, what="the name is free again")
    await eventually(is_updated, what="the endpoint can be updated again")


async def test_a_create_that_secrets_refuses_leaves_nothing_there(platform: Platform) -> None:
    for _ in range(3):
        refused = await refusal(platform.ben.serving.create("demo", environment={"A": SECRET}))
        assert refused.reason == DENIED
    with closing(sqlite3.connect(f"file:{platform.directory}/secrets/secrets.db?mode=ro", uri=True)) as connection:
        assert connection.execute("SELECT count(*) FROM endpoints").fetchone() == (0,)


def refuse(*arguments: Any, **names: Any) -> None:
    raise StorageError("injected")


def fail_at(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Has the next change fail at one of its steps, as by a full disk."""
    grant = SecretReferences.grant

    async def failing(self: SecretReferences, *arguments: Any, **names: Any) -> None:
        if step == "after the grant":
            await grant(self, *arguments, **names)
        raise OSError("injected")

    if step == "at the commit":
        monkeypatch.setattr(store, "commit_endpoint", refuse)
        monkeypatch.setattr(store, "propose_config", refuse)
    else:
        monkeypatch.setattr(SecretReferences, "grant", failing)


@pytest.mark.parametrize("is_granted", [False, True])
async def test_what_a_killed_process_had_begun_is_undone_by_the_next(is_granted: bool) -> None:
    with data_directory() as directory:
        async with running_platform(directory) as platform:
            made = await platform.ann.serving.create("demo", environment={"A": SECRET})
            await platform.ann.serving.settled("demo")
            if is_granted:
                await platform.secrets.grant(platform.ann.secrets, ("team", "api.key"))  # of an endpoint not committed
                await platform.secrets.grant(platform.ann.secrets, ("team", "api.key"), endpoint_id=made.id, version=2)
            token = platform.ann.secrets.metadata[0][1].removeprefix("Bearer ")
        with closing(sqlite3.connect(directory / "serving" / "serving.db")) as connection:
            columns = "name, creator_id, creator, description, tags, created_at, updated_at, config_update, failures"
            connection.execute(
                f"INSERT INTO endpoints (id, {columns}, latest_version, is_deleted, is_reserved)"
                f" SELECT 'reserved', 'taken', {columns.partition(', ')[2]}, 1, 0, 1 FROM endpoints"
            )
            connection.execute("UPDATE endpoints SET reserved_version = 2 WHERE name = 'demo'")
            connection.commit()
        async with running_pair(directory) as (secrets, serving):
            platform = Platform(directory, secrets, serving)
            ann = serving.public(token)
            assert await ann.names() == ["demo"]

            async def is_settled() -> bool:
                return await granted(platform) == {made.id: {1}}

            await eventually(is_settled, what="what was not committed is forgotten")
            await ann.create("taken", None)
            await ann.update("demo", an_input("ready", entity_version="2", environment_vars={"A": SECRET}))
            assert (await ann.settled("demo")).config.config_version == 3


async def test_an_endpoint_that_is_older_than_grants_goes_on_and_is_granted_at_its_next_launch() -> None:
    with data_directory() as directory:
        async with running_platform(directory) as platform:
            made = await platform.ann.serving.create("demo", environment={"A": SECRET})
            await platform.ann.serving.settled("demo")
            token = platform.ann.secrets.metadata[0][1].removeprefix("Bearer ")
        rewrite(directory, "DELETE FROM endpoints", "UPDATE platform SET knows_older_endpoints = 0")
        async with running_pair(directory) as (secrets, serving):
            platform = Platform(directory, secrets, serving)
            ann = serving.public(token)

            async def is_hers() -> bool:
                return await ann.names() == ["demo"]

            await eventually(is_hers, what="the endpoint is known again, with its creator")
            for pid in (await serving.replicas()).values():
                os.kill(pid, signal.SIGKILL)
            await ann.until("demo", lambda endpoint: endpoint.state.ready == State.NOT_READY)
            await ann.until("demo", lambda endpoint: endpoint.state.ready == State.READY)
            assert await granted(platform) == {made.id: {1}}
            await ann.update("demo", an_input("ready", entity_version="2", environment_vars={"A": SECRET}))
            assert (await ann.settled("demo")).config.config_version == 2


# --- retries ---


def under(request_id: str, caller: ServingCaller, channel: grpc.aio.Channel) -> ServingCaller:
    return ServingCaller(channel, *caller._metadata, (channels.REQUEST_ID, request_id))


async def test_a_retry_of_a_change_gets_the_first_answer(platform: Platform) -> None:
    channel = platform.serving.public_channel
    ann = platform.ann.serving
    creating = under("create-1", ann, channel)
    first = await creating.create("demo", environment={"A": SECRET})
    await ann.settled("demo")
    assert await creating.create("demo", environment={"A": SECRET}) == first
    assert (await refusal(creating.create("demo"))).reason == "INVALID_PARAMETER_VALUE"
    updating = under("update-1", ann, channel)
    updated = await updating.update("demo", an_input("ready", entity_version="2"))
    await ann.settled("demo")
    assert await updating.update("demo", an_input("ready", entity_version="2")) == updated
    assert (await ann.get("demo")).config.config_version == 2
    deleting = under("delete-1", ann, channel)
    await deleting.delete("demo")
    await ann.create("demo", None)
    await deleting.delete("demo")
    assert await ann.names() == ["demo"]


async def test_duplicates_at_once_make_one_endpoint(platform: Platform) -> None:
    creating = under("create-1", platform.ann.serving, platform.serving.public_channel)
    answers = await asyncio.gather(*(creating.create("demo", environment={"A": SECRET}) for _ in range(10)))
    assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1


async def test_a_refused_change_is_judged_anew(platform: Platform) -> None:
    creating = under("create-1", platform.ben.serving, platform.serving.public_channel)
    assert (await refusal(creating.create("demo", environment={"A": SECRET}))).reason == DENIED
    await platform.ann.secrets.grant("team", "ben", secrets_pb2.READ)
    await creating.create("demo", environment={"A": SECRET})
