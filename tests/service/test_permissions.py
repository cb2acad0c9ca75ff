"""Permissions on endpoints over real gRPC, and the feed that tells of them (contract 3.4)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from secrets_service import feed, permissions
from servicekit.access import AccessTable
from servicekit.context import Level, Principal
from tessera.identity.v1 import identity_pb2
from tessera.identity.v1 import permissions_pb2 as pb
from tests.support.secrets import STREAM_TIMEOUT, Caller, RunningSecrets, refusal, running_secrets

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"
VIEW, QUERY, MANAGE = pb.CAN_VIEW, pb.CAN_QUERY, pb.CAN_MANAGE


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


@pytest.fixture
async def ann(service: RunningSecrets) -> Caller:
    return await service.user("ann")


@pytest.fixture
async def ben(service: RunningSecrets) -> Caller:
    return await service.user("Ben@Example.com")


@pytest.fixture
async def endpoint(service: RunningSecrets, ann: Caller) -> str:
    """The id of an endpoint that ann created."""
    return (await service.grant(ann))[0]


def entry(level: pb.PermissionLevel.ValueType = VIEW, **named: str) -> pb.AccessControlRequest:
    return pb.AccessControlRequest(permission_level=level, **named)


async def get(caller: Caller, endpoint: str) -> pb.ObjectPermissions:
    request = pb.GetPermissionsRequest(serving_endpoint_id=endpoint)
    answer: pb.ObjectPermissions = await caller(caller.permissions.GetPermissions, request)
    return answer


async def put(caller: Caller, endpoint: str, *entries: pb.AccessControlRequest) -> pb.ObjectPermissions:
    request = pb.SetPermissionsRequest(serving_endpoint_id=endpoint, access_control_list=entries)
    answer: pb.ObjectPermissions = await caller(caller.permissions.SetPermissions, request)
    return answer


async def patch(caller: Caller, endpoint: str, *entries: pb.AccessControlRequest) -> pb.ObjectPermissions:
    request = pb.UpdatePermissionsRequest(serving_endpoint_id=endpoint, access_control_list=entries)
    answer: pb.ObjectPermissions = await caller(caller.permissions.UpdatePermissions, request)
    return answer


async def see(caller: Caller, endpoint: str) -> Any:
    request = pb.GetPermissionLevelsRequest(serving_endpoint_id=endpoint)
    return await caller(caller.permissions.GetPermissionLevels, request)


def direct(answer: pb.ObjectPermissions) -> list[tuple[str, str]]:
    """Name and level of everything that is granted directly."""
    return [
        (
            each.user_name or each.group_name or each.service_principal_name,
            pb.PermissionLevel.Name(held.permission_level),
        )
        for each in answer.access_control_list
        for held in each.all_permissions
        if not held.inherited
    ]


async def create_robot(service: RunningSecrets) -> identity_pb2.ServicePrincipal:
    admin = service.admin
    request = identity_pb2.CreateServicePrincipalRequest(display_name="Robot")
    robot: identity_pb2.ServicePrincipal = await admin(admin.scim.CreateServicePrincipal, request)
    return robot


async def create_group(service: RunningSecrets, name: str, *members: str) -> identity_pb2.Group:
    admin = service.admin
    request = identity_pb2.CreateGroupRequest(
        display_name=name, members=[identity_pb2.Member(value=member) for member in members]
    )
    group: identity_pb2.Group = await admin(admin.scim.CreateGroup, request)
    return group


async def id_of(caller: Caller) -> str:
    return str((await caller(caller.scim.GetMe, identity_pb2.GetMeRequest())).id)


# --- what is granted ---


async def test_a_new_endpoint_is_its_creators_and_the_admins(
    service: RunningSecrets, ann: Caller, endpoint: str
) -> None:
    for reader in (ann, service.admin):
        answer = await get(reader, endpoint)
        assert (answer.object_id, answer.object_type) == (f"/serving-endpoints/{endpoint}", "serving-endpoint")
        creator, admins = answer.access_control_list
        assert (creator.user_name, creator.display_name, direct(answer)) == ("ann", "ann", [("ann", "CAN_MANAGE")])
        assert (admins.group_name, admins.display_name) == ("admins", "")
        [inherited] = admins.all_permissions
        assert (inherited.permission_level, inherited.inherited) == (MANAGE, True)
        assert list(inherited.inherited_from_object) == ["/serving-endpoints/"]


async def test_put_replaces_what_is_granted_and_patch_adds_to_it(
    service: RunningSecrets, ann: Caller, ben: Caller, endpoint: str
) -> None:
    await create_group(service, "Team")
    robot = await create_robot(service)
    answer = await put(
        ann,
        endpoint,
        entry(MANAGE, user_name="ANN"),
        entry(QUERY, group_name="team"),
        entry(service_principal_name=robot.application_id.upper()),
    )
    assert direct(answer) == [("ann", "CAN_MANAGE"), ("Team", "CAN_QUERY"), (robot.application_id, "CAN_VIEW")]
    answer = await patch(ann, endpoint, entry(QUERY, user_name="ben@example.com"), entry(VIEW, group_name="Team"))
    assert direct(answer) == [
        ("ann", "CAN_MANAGE"),
        ("Team", "CAN_VIEW"),
        (robot.application_id, "CAN_VIEW"),
        ("Ben@Example.com", "CAN_QUERY"),
    ]
    assert direct(await get(ann, endpoint)) == direct(answer)
    assert direct(await put(ann, endpoint)) == []
    assert (await refusal(get(ann, endpoint))).reason == MISSING  # it is nobody's but the admins' now
    assert direct(await get(service.admin, endpoint)) == []


async def test_admins_named_directly_are_listed_once(service: RunningSecrets, endpoint: str) -> None:
    answer = await put(service.admin, endpoint, entry(QUERY, group_name="admins"))
    [admins] = answer.access_control_list
    assert [(held.permission_level, held.inherited) for held in admins.all_permissions] == [
        (QUERY, False),
        (MANAGE, True),
    ]
    assert direct(await put(service.admin, endpoint)) == []


async def test_an_application_id_as_user_name_means_the_service_principal(
    service: RunningSecrets, ann: Caller, endpoint: str
) -> None:
    robot = await create_robot(service)
    answer = await patch(ann, endpoint, entry(MANAGE, user_name=robot.application_id))
    listed = answer.access_control_list[1]
    assert (listed.service_principal_name, listed.display_name) == (robot.application_id, "Robot")
    assert listed.user_name == ""


async def test_losing_the_last_can_manage_is_allowed_and_warned_of(
    service: RunningSecrets, ann: Caller, endpoint: str
) -> None:
    request = pb.UpdatePermissionsRequest(
        serving_endpoint_id=endpoint, access_control_list=[entry(VIEW, user_name="ann")]
    )
    [warning] = await ann.warned(ann.permissions.UpdatePermissions, request)
    assert "Nobody but admins" in warning
    assert (await refusal(get(ann, endpoint))).reason == "PERMISSION_DENIED"
    await patch(service.admin, endpoint, entry(MANAGE, user_name="ann"))
    assert direct(await get(ann, endpoint)) == [("ann", "CAN_MANAGE")]


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([entry()], "access_control_list[0]: exactly one of"),
        ([entry(user_name="ann"), entry(user_name="ann", group_name="users")], "access_control_list[1]: exactly one"),
        ([pb.AccessControlRequest(user_name="ann")], "access_control_list[0].permission_level"),
        ([entry(user_name="nobody")], "access_control_list[0].user_name"),
        ([entry(user_name="users")], "access_control_list[0].user_name"),
        ([entry(group_name="ann")], "access_control_list[0].group_name"),
        ([entry(service_principal_name="ann")], "access_control_list[0].service_principal_name"),
        ([entry(user_name="an\0n")], "access_control_list[0].user_name"),
        ([entry(user_name="ann"), entry(QUERY, user_name="ANN")], "access_control_list[1]: ANN is named twice"),
    ],
)
async def test_what_names_no_principal_changes_nothing(
    ann: Caller, endpoint: str, entries: list[pb.AccessControlRequest], says: str
) -> None:
    for change in (put, patch):
        refused = await refusal(change(ann, endpoint, *entries))
        assert refused.reason == INVALID
        assert says in refused.message
    assert direct(await get(ann, endpoint)) == [("ann", "CAN_MANAGE")]


async def test_there_is_a_limit(
    service: RunningSecrets, ann: Caller, ben: Caller, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "MOST_PERMISSIONS", 2)
    await patch(ann, endpoint, entry(user_name="ben@example.com"))
    refused = await refusal(patch(ann, endpoint, entry(group_name="users")))
    assert refused.reason == "RESOURCE_LIMIT_EXCEEDED"
    assert len(direct(await get(ann, endpoint))) == 2
    await put(ann, endpoint, entry(MANAGE, user_name="ann"), entry(group_name="users"))


async def test_levels_that_can_be_granted_are_listed_to_whoever_may_see_the_endpoint(
    ann: Caller, ben: Caller, endpoint: str
) -> None:
    assert (await refusal(see(ben, endpoint))).reason == MISSING
    await patch(ann, endpoint, entry(VIEW, user_name="ben@example.com"))
    levels = (await see(ben, endpoint)).permission_levels
    assert [each.permission_level for each in levels] == [VIEW, QUERY, MANAGE]
    assert all(each.description for each in levels)


# --- who may ---


async def test_without_a_permission_an_endpoint_looks_like_none(ann: Caller, ben: Caller, endpoint: str) -> None:
    missing = "0" * 32
    for call in (get, put, patch, see):
        hidden, absent = await refusal(call(ben, endpoint)), await refusal(call(ben, missing))
        assert (hidden.code, hidden.reason, hidden.facts) == (absent.code, absent.reason, absent.facts)
        assert hidden.message.replace(endpoint, "") == absent.message.replace(missing, "")
        assert hidden.reason == MISSING
    for name in ("ep", "", "x" * 5000, endpoint.upper(), endpoint + "0"):
        assert (await refusal(get(ann, name))).reason == MISSING


@pytest.mark.parametrize("level", [VIEW, QUERY])
async def test_with_too_little_permission_the_right_one_is_named(
    ann: Caller, ben: Caller, endpoint: str, level: pb.PermissionLevel.ValueType
) -> None:
    await patch(ann, endpoint, entry(level, user_name="ben@example.com"))
    for call in (get, put, patch):
        refused = await refusal(call(ben, endpoint))
        assert refused.reason == "PERMISSION_DENIED"
        assert "Ben@Example.com does not have CAN_MANAGE" in refused.message
    assert (await see(ben, endpoint)).permission_levels


async def test_the_strongest_of_all_groups_counts(
    service: RunningSecrets, ann: Caller, ben: Caller, endpoint: str
) -> None:
    group = await create_group(service, "team", await id_of(ben))
    await patch(ann, endpoint, entry(VIEW, group_name="users"), entry(MANAGE, group_name="team"))
    assert direct(await get(ben, endpoint))
    admin = service.admin
    await admin(admin.scim.DeleteGroup, identity_pb2.DeleteRequest(id=group.id))
    assert (await refusal(get(ben, endpoint))).reason == "PERMISSION_DENIED"
    await create_group(service, "team", await id_of(ben))  # another group, whatever its name
    assert (await refusal(get(ben, endpoint))).reason == "PERMISSION_DENIED"


async def test_a_user_made_anew_inherits_nothing(service: RunningSecrets, ann: Caller, endpoint: str) -> None:
    await service.user("kit")
    await patch(ann, endpoint, entry(MANAGE, user_name="kit"))
    admin = service.admin
    users = await admin(admin.scim.ListUsers, identity_pb2.ListRequest(filter='userName eq "kit"'))
    await admin(admin.scim.DeleteUser, identity_pb2.DeleteRequest(id=users.resources[0].id))
    assert direct(await get(ann, endpoint)) == [("ann", "CAN_MANAGE")]
    again = await service.user("kit")
    assert (await refusal(get(again, endpoint))).reason == MISSING


async def test_a_deleted_endpoint_has_no_permissions_even_for_admins(
    service: RunningSecrets, ann: Caller, endpoint: str
) -> None:
    await service.settle(deleted_endpoint_ids=[endpoint])
    for caller in (ann, service.admin):
        assert (await refusal(get(caller, endpoint))).reason == MISSING
        assert (await refusal(put(caller, endpoint, entry(MANAGE, user_name="ann")))).reason == MISSING


# --- the feed ---


class Follower:
    """Somebody who enforces permissions."""

    def __init__(self) -> None:
        self.principals: set[str] = set()
        self.tokens: set[str] = set()
        self.table = AccessTable(forget=self._forget, stale_seconds=0.0)

    def level(self, endpoint: str, user_id: str, *groups: str) -> Level | None:
        caller = Principal(user_id, "somebody", frozenset(), "t", None, group_ids=frozenset(groups))
        return self.table.level(caller, endpoint)

    def _forget(self, principals: Any, tokens: Any) -> None:
        self.principals |= set(principals)
        self.tokens |= set(tokens)


@asynccontextmanager
async def following(service: RunningSecrets, peer: str = "gateway") -> AsyncIterator[Follower]:
    follower = Follower()
    task = asyncio.create_task(follower.table.follow(service.peer_channels[peer]))
    try:
        await follower.table.known()
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_was_answered_is_known_to_everybody_who_follows(
    service: RunningSecrets, ann: Caller, ben: Caller, endpoint: str
) -> None:
    ben_id = await id_of(ben)
    group = await create_group(service, "team")
    async with following(service) as gateway, following(service, "serving") as serving:
        for level, expected in ((VIEW, Level.CAN_VIEW), (MANAGE, Level.CAN_MANAGE)):
            await patch(ann, endpoint, entry(level, user_name="ben@example.com"))
            assert [each.level(endpoint, ben_id) for each in (gateway, serving)] == [expected] * 2
        await put(ann, endpoint, entry(MANAGE, user_name="ann"), entry(QUERY, group_name="team"))
        assert gateway.level(endpoint, ben_id) is None
        assert gateway.level(endpoint, ben_id, "1", group.id) is Level.CAN_QUERY
        another, _ = await service.grant(ann)
        assert gateway.level(another, await id_of(ann)) is Level.CAN_MANAGE
        await service.settle(deleted_endpoint_ids=[another])
        assert gateway.level(another, await id_of(ann)) is None


async def test_every_change_of_an_identity_is_told(service: RunningSecrets, ben: Caller) -> None:
    admin = service.admin
    ben_id = await id_of(ben)
    token = await service.admin(admin.tokens.CreateToken, identity_pb2.CreateTokenRequest())
    async with following(service) as gateway:

        async def told(method: Callable[..., Any], message: Any) -> bool:
            gateway.principals.clear()
            await admin(method, message)
            return ben_id in gateway.principals

        async def patched(**operation: Any) -> bool:
            value = operation.pop("value")
            change = identity_pb2.PatchOperation(op="replace", **operation)
            if isinstance(value, bool):
                change.value.bool_value = value
            else:
                change.value.string_value = value
            return await told(admin.scim.PatchUser, identity_pb2.PatchRequest(id=ben_id, operations=[change]))

        assert await patched(path="active", value=False)
        assert await patched(path="userName", value="benjamin")
        group = await create_group(service, "team")
        member = identity_pb2.Member(value=ben_id)
        request = identity_pb2.ReplaceGroupRequest(id=group.id, display_name="team", members=[member])
        assert await told(admin.scim.ReplaceGroup, request)
        assert await told(admin.scim.DeleteGroup, identity_pb2.DeleteRequest(id=group.id))
        gateway.tokens.clear()
        await admin(admin.tokens.DeleteToken, identity_pb2.DeleteTokenRequest(token_id=token.token_info.token_id))
        assert gateway.tokens == {token.token_info.token_id}
        assert await told(admin.scim.DeleteUser, identity_pb2.DeleteRequest(id=ben_id))
        # His tokens went with him.
        assert len(gateway.tokens) == 2


async def test_who_follows_starts_from_all_that_is_granted(
    service: RunningSecrets, ann: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "PART_SIZE", 2)
    ann_id = await id_of(ann)
    endpoints = [(await service.grant(ann))[0] for _ in range(5)]
    await service.settle(deleted_endpoint_ids=endpoints[:1])
    async with following(service) as gateway:
        levels = [gateway.level(each, ann_id) for each in endpoints]
        assert levels == [None, *[Level.CAN_MANAGE] * 4]


async def test_an_empty_table_is_a_table(service: RunningSecrets) -> None:
    async with following(service) as gateway:
        assert gateway.level("0" * 32, "1") is None


async def test_a_follower_that_does_not_acknowledge_is_cut_off(
    service: RunningSecrets, ann: Caller, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "FOLLOW_SECONDS", 0.1)
    monkeypatch.setattr(feed, "CUT_SECONDS", 0.2)
    gateway = service.peer("gateway")
    stream = gateway.feed.Watch(timeout=STREAM_TIMEOUT)
    first = await stream.read()
    assert isinstance(first, pb.AccessChanges)
    assert first.complete
    answer = await patch(ann, endpoint, entry(VIEW, group_name="users"))
    assert len(direct(answer)) == 2
    while isinstance(await stream.read(), pb.AccessChanges):
        pass
    assert stream.done()
    async with following(service) as follower:
        assert follower.level(endpoint, "1", *[await users_id(service)]) is Level.CAN_VIEW


async def test_a_change_is_answered_when_it_is_followed(
    service: RunningSecrets, ann: Caller, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "FOLLOW_SECONDS", 30.0)
    stream = service.peer("gateway").feed.Watch(timeout=STREAM_TIMEOUT)

    async def follow() -> pb.AccessChanges:
        changes = await stream.read()
        assert isinstance(changes, pb.AccessChanges)
        return changes

    await stream.write(pb.AccessReport(acknowledged_revision=(await follow()).revision))
    changing = asyncio.create_task(patch(ann, endpoint, entry(VIEW, group_name="users")))
    while not (changes := await follow()).endpoints:
        pass
    for _ in range(3):  # calls that come later are answered, and this one is not
        assert await get(ann, endpoint)
    assert not changing.done()
    await stream.write(pb.AccessReport(acknowledged_revision=changes.revision))
    assert await changing
    stream.cancel()


async def users_id(service: RunningSecrets) -> str:
    admin = service.admin
    groups = await admin(admin.scim.ListGroups, identity_pb2.ListRequest(filter='displayName eq "users"'))
    return str(groups.resources[0].id)
