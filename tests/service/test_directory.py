"""Users, groups and service principals over real gRPC, and what becomes of their rights (contract 3.1 to 3.3)."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Value

from secrets_service import directory, personal_tokens
from servicekit.identity import InvalidToken, TokenExchange
from tessera.identity.v1 import identity_pb2 as pb
from tessera.secrets.v1 import secrets_pb2
from tests.support.secrets import Caller, Refusal, RunningSecrets, refusal, running_secrets

DENIED = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets(tokens_per_minute=0) as running:
        yield running


def operation(op: str, path: str = "", value: Any = None) -> pb.PatchOperation:
    parsed = json_format.ParseDict(value, Value()) if value is not None else None
    return pb.PatchOperation(op=op, path=path, value=parsed)


async def patch(caller: Caller, kind: str, id: str, *operations: pb.PatchOperation) -> Any:
    return await caller(getattr(caller.scim, f"Patch{kind}"), pb.PatchRequest(id=id, operations=operations))


async def delete(caller: Caller, kind: str, id: str) -> None:
    await caller(getattr(caller.scim, f"Delete{kind}"), pb.DeleteRequest(id=id))


async def get(caller: Caller, kind: str, id: str, **fields: Any) -> Any:
    return await caller(getattr(caller.scim, f"Get{kind}"), pb.GetRequest(id=id, **fields))


async def listed(caller: Caller, kinds: str, **fields: Any) -> Any:
    return await caller(getattr(caller.scim, f"List{kinds}"), pb.ListRequest(**fields))


async def create_group(caller: Caller, name: str, *members: str, **fields: Any) -> pb.Group:
    request = pb.CreateGroupRequest(display_name=name, members=[pb.Member(value=each) for each in members], **fields)
    group: pb.Group = await caller(caller.scim.CreateGroup, request)
    return group


async def create_robot(caller: Caller, name: str = "robot", **fields: Any) -> pb.ServicePrincipal:
    request = pb.CreateServicePrincipalRequest(display_name=name, **fields)
    made: pb.ServicePrincipal = await caller(caller.scim.CreateServicePrincipal, request)
    return made


async def group_named(service: RunningSecrets, name: str) -> pb.Group:
    [group] = (await listed(service.admin, "Groups", filter=f'displayName eq "{name}"')).resources
    assert isinstance(group, pb.Group)
    return group


async def me(caller: Caller) -> pb.User:
    user: pb.User = await caller(caller.scim.GetMe, pb.GetMeRequest())
    return user


def scim_type(refused: Refusal) -> str:
    return refused.facts.get("scim_type", "")


async def is_refused_token(call: Awaitable[Any]) -> bool:
    refused = await refusal(call)
    return refused.message == "Invalid access token." and (refused.code, refused.reason) == DENIED


# --- groups ---


async def test_group_has_the_documented_shape(service: RunningSecrets) -> None:
    ada = await service.admin.create_user("ada", display_name="Ada")
    robot = await create_robot(service.admin)
    made = await create_group(
        service.admin, "Team", ada.id, robot.id, roles=[pb.Role(value="r")], entitlements=[pb.Entitlement(value="e")]
    )
    assert json_format.MessageToDict(made) == {
        "schemas": ["urn:ietf:params:scim:schemas:core:2.0:Group"],
        "id": made.id,
        "displayName": "Team",
        "members": [
            {"value": ada.id, "display": "Ada", "$ref": f"Users/{ada.id}"},
            {"value": robot.id, "display": "robot", "$ref": f"ServicePrincipals/{robot.id}"},
        ],
        "roles": [{"value": "r"}],
        "entitlements": [{"value": "e"}],
        "meta": {"resourceType": "WorkspaceGroup"},
    }
    bob = await service.user("bob")
    assert await get(bob, "Group", made.id) == made
    groups = (await get(bob, "User", ada.id)).groups
    assert [(group.display, group.value, group.ref) for group in groups][1:] == [("Team", made.id, f"Groups/{made.id}")]


async def test_members_are_added_and_removed_one_by_one(service: RunningSecrets) -> None:
    ids = [(await service.admin.create_user(name)).id for name in ("a", "b", "c")]
    team = await create_group(service.admin, "team")
    add = operation("add", "members", [{"value": ids[0]}, {"value": ids[1]}])
    remove = operation("remove", f'members[value eq "{ids[0]}"]')
    changed = await patch(
        service.admin, "Group", team.id, add, remove, operation("add", "members", [{"value": ids[2]}])
    )
    assert [member.value for member in changed.members] == ids[1:]
    request = pb.ReplaceGroupRequest(id=team.id, display_name="Crew", members=[pb.Member(value=ids[0])] * 2)
    replaced = await service.admin(service.admin.scim.ReplaceGroup, request)
    assert [member.value for member in replaced.members] == ids[:1]
    assert await get(service.admin, "Group", team.id) == replaced
    assert replaced.display_name == "Crew"


async def test_patch_is_done_as_a_whole_or_not_at_all(service: RunningSecrets) -> None:
    ada = await service.admin.create_user("ada")
    team = await create_group(service.admin, "team")
    operations = operation("add", "members", [{"value": ada.id}]), operation("add", "members", [{"value": "17"}])
    refused = await refusal(patch(service.admin, "Group", team.id, *operations))
    assert refused.message == "members: principal 17 does not exist."
    assert await get(service.admin, "Group", team.id) == team


async def test_members_are_users_and_service_principals_only(service: RunningSecrets) -> None:
    team, other = await create_group(service.admin, "team"), await create_group(service.admin, "other")
    refused = await refusal(patch(service.admin, "Group", team.id, operation("add", "members", [{"value": other.id}])))
    assert refused.reason == "INVALID_PARAMETER_VALUE"
    assert "is a group" in refused.message
    for member in ("", "x", "9" * 30, "-1"):
        assert "does not exist" in (await refusal(create_group(service.admin, "new", member))).message


async def test_everybodys_group_cannot_be_changed_and_admins_cannot_go(service: RunningSecrets) -> None:
    ada = await service.admin.create_user("ada")
    users, admins = await group_named(service, "users"), await group_named(service, "admins")
    assert [member.value for member in users.members] == [(await me(service.admin)).id, ada.id]
    for call in (
        patch(service.admin, "Group", users.id, operation("remove", f'members[value eq "{ada.id}"]')),
        patch(service.admin, "Group", users.id, operation("replace", "displayName", "everybody")),
        service.admin(service.admin.scim.ReplaceGroup, pb.ReplaceGroupRequest(id=users.id, display_name="users")),
        delete(service.admin, "Group", users.id),
        delete(service.admin, "Group", admins.id),
        patch(service.admin, "Group", admins.id, operation("replace", "displayName", "root")),
    ):
        refused = await refusal(call)
        assert (refused.reason, scim_type(refused)) == ("INVALID_PARAMETER_VALUE", "mutability")
        assert "cannot be" in refused.message or "keeps its name" in refused.message


async def test_last_active_admin_stays(service: RunningSecrets) -> None:
    first = (await me(service.admin)).id
    admins = await group_named(service, "admins")
    deputy = await create_robot(service.admin, active=False)
    await patch(service.admin, "Group", admins.id, operation("add", "members", [{"value": deputy.id}]))

    def takings(caller: Caller, id: str, kind: str) -> list[Awaitable[Any]]:
        return [
            patch(caller, "Group", admins.id, operation("remove", f'members[value eq "{id}"]')),
            patch(caller, "Group", admins.id, operation("replace", "members", [])),
            patch(caller, kind, id, operation("replace", "active", False)),
        ]

    for taking in takings(service.admin, first, "User"):
        assert scim_type(await refusal(taking)) == "mutability"
    await patch(service.admin, "ServicePrincipal", deputy.id, operation("replace", "active", True))
    robot = service.public(await service.token_for(deputy.application_id))
    await patch(robot, "User", first, operation("replace", "active", False))
    for taking in takings(robot, deputy.id, "ServicePrincipal"):
        assert scim_type(await refusal(taking)) == "mutability"
    assert scim_type(await refusal(delete(robot, "ServicePrincipal", deputy.id))) == "mutability"


async def test_first_admin_cannot_be_deleted(service: RunningSecrets) -> None:
    first, admins = (await me(service.admin)).id, await group_named(service, "admins")
    ada = await service.admin.create_user("ada")
    await patch(service.admin, "Group", admins.id, operation("add", "members", [{"value": ada.id}]))
    assert scim_type(await refusal(delete(service.admin, "User", first))) == "mutability"


async def test_operator_brings_the_first_admin_back(service: RunningSecrets) -> None:
    first, admins = (await me(service.admin)).id, await group_named(service, "admins")
    ada = await service.admin.create_user("ada")
    deputy = service.public(await service.token_for("ada"))
    await patch(service.admin, "Group", admins.id, operation("replace", "members", [{"value": ada.id}]))
    await patch(deputy, "User", first, operation("replace", "active", False))
    operator = service.peer("operator")
    await operator(operator.authority.RenewAdminToken, pb.RenewAdminTokenRequest())
    renewed = service.public(service.settings.admin_token.read_text().strip())
    assert {group.display for group in (await me(renewed)).groups} == {"admins", "users"}


async def test_new_member_has_the_groups_rights_at_once_and_loses_them_at_once(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    team = await create_group(service.admin, "team")
    await service.admin.create_scope("shop")
    await service.admin.put("shop", "key", "value")
    await service.admin.grant("shop", "TEAM", secrets_pb2.READ)
    member = operation("add", "members", [{"value": (await me(bob)).id}])
    assert (await refusal(bob.get("shop", "key"))).code is grpc.StatusCode.PERMISSION_DENIED
    await patch(service.admin, "Group", team.id, member)
    assert await bob.get("shop", "key") == b"value"
    await patch(service.admin, "Group", team.id, operation("replace", "displayName", "crew"))
    assert ("crew", "READ") in await service.admin.acls("shop")
    await delete(service.admin, "Group", team.id)
    assert (await refusal(bob.get("shop", "key"))).code is grpc.StatusCode.PERMISSION_DENIED
    await create_group(service.admin, "crew", (await me(bob)).id)
    assert (await refusal(bob.get("shop", "key"))).code is grpc.StatusCode.PERMISSION_DENIED


async def test_page_of_groups_ends_before_it_has_too_many_members(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "MOST_LISTED_MEMBERS", 2)
    ids = [(await service.admin.create_user(name)).id for name in "abc"]
    for name, members in (("one", ids[:1]), ("two", ids[:2]), ("three", ids)):
        await create_group(service.admin, name, *members)
    names, start = [], 1
    while (page := await listed(service.admin, "Groups", start_index=start)).resources:
        assert page.total_results == 5
        names.append([group.display_name for group in page.resources])
        start += len(page.resources)
    assert names == [["admins"], ["users"], ["one"], ["two"], ["three"]]
    short = await listed(service.admin, "Groups", excluded_attributes="members,meta")
    assert len(short.resources) == 5
    assert not any(group.members or group.HasField("meta") for group in short.resources)


# --- service principals ---


async def test_service_principal_is_made_called_and_granted_by_its_application_id(service: RunningSecrets) -> None:
    made = await create_robot(service.admin, "Deployer", external_id="x")
    assert str(uuid.UUID(made.application_id)) == made.application_id
    assert (made.display_name, made.active, made.external_id) == ("Deployer", True, "x")
    assert [group.display for group in made.groups] == ["users"]
    robot = service.public(await service.token_for(made.application_id.upper()))
    user = await me(robot)
    assert (user.id, user.user_name, user.display_name) == (made.id, made.application_id, "Deployer")
    await robot.create_scope("own")
    assert await robot.acls("own") == [(made.application_id, "MANAGE")]
    await service.admin.create_scope("shop")
    await service.admin.put("shop", "key", "value")
    await service.admin.grant("shop", made.application_id, secrets_pb2.READ)
    assert await robot.get("shop", "key") == b"value"
    [found] = (await listed(robot, "ServicePrincipals", filter=f'applicationId eq "{made.application_id}"')).resources
    assert found == made
    assert not (await listed(robot, "Users", filter=f'userName eq "{made.application_id}"')).resources


async def test_principals_of_one_kind_are_not_found_as_another(service: RunningSecrets) -> None:
    user, robot, group = await me(service.admin), await create_robot(service.admin), await group_named(service, "users")
    ids = {"User": user.id, "ServicePrincipal": robot.id, "Group": group.id}
    for kind, of in ((kind, of) for kind in ids for of in ids if kind != of):
        for call in (get, delete):
            refused = await refusal(call(service.admin, kind, ids[of]))
            assert refused.code is grpc.StatusCode.NOT_FOUND, (kind, of)


async def test_application_id_never_changes(service: RunningSecrets) -> None:
    made = await create_robot(service.admin)
    for path in ("applicationId", "id", "groups"):
        refused = await refusal(patch(service.admin, "ServicePrincipal", made.id, operation("replace", path, "x")))
        assert scim_type(refused) == "mutability"
    operations = operation("replace", "", {"applicationId": "x", "displayName": "Renamed", "active": False})
    changed = await patch(service.admin, "ServicePrincipal", made.id, operations)
    assert (changed.application_id, changed.display_name, changed.active) == (made.application_id, "Renamed", False)
    request = pb.ReplaceServicePrincipalRequest(id=made.id, display_name="Again")
    replaced = await service.admin(service.admin.scim.ReplaceServicePrincipal, request)
    assert (replaced.application_id, replaced.display_name, replaced.active) == (made.application_id, "Again", False)


# --- users ---


async def test_user_is_replaced_but_for_what_is_not_said_about_being_active(service: RunningSecrets) -> None:
    made = await service.admin.create_user(
        "ada", display_name="Ada", external_id="x", active=False, roles=[pb.Role(value="r")]
    )
    replaced = await service.admin(
        service.admin.scim.ReplaceUser, pb.ReplaceUserRequest(id=made.id, user_name="Ada@example.com")
    )
    assert (replaced.user_name, replaced.display_name, replaced.active) == ("Ada@example.com", "Ada@example.com", False)
    assert (list(replaced.roles), list(replaced.entitlements), replaced.external_id) == ([], [], "")
    assert await get(service.admin, "User", made.id) == replaced


async def test_renamed_user_keeps_what_it_has_and_its_old_name_is_free(service: RunningSecrets) -> None:
    ada = await service.user("ada")
    await ada.create_scope("own")
    await patch(service.admin, "User", (await me(ada)).id, operation("replace", "userName", "countess"))
    assert (await me(ada)).user_name == "countess"
    assert await ada.acls("own") == [("countess", "MANAGE")]
    other = await service.user("ada")
    assert (await refusal(other.acls("own"))).code is grpc.StatusCode.PERMISSION_DENIED
    refused = await refusal(patch(service.admin, "User", (await me(ada)).id, operation("replace", "userName", "ADA")))
    assert scim_type(refused) == "uniqueness"


async def test_user_made_anew_under_an_old_name_inherits_nothing(service: RunningSecrets) -> None:
    team = await create_group(service.admin, "team")
    ada = await service.user("ada")  # the newest, whose id would be the next again if ids were counted by what is there
    first = await me(ada)
    await patch(service.admin, "Group", team.id, operation("add", "members", [{"value": first.id}]))
    await ada.create_scope("own")
    await service.admin.put("own", "key", "value")
    await delete(service.admin, "User", first.id)
    assert await service.admin.acls("own") == []
    second = await service.admin.create_user("ada")
    assert second.id != first.id
    again = service.public(await service.token_for("ada"))
    assert (await refusal(again.get("own", "key"))).code is grpc.StatusCode.PERMISSION_DENIED
    assert not (await get(service.admin, "Group", team.id)).members
    assert [group.display for group in second.groups] == ["users"]
    assert await is_refused_token(me(ada))
    assert len((await again(again.tokens.ListTokens, pb.ListTokensRequest())).token_infos) == 1


@pytest.mark.parametrize("kind", ["User", "ServicePrincipal"])
@pytest.mark.parametrize("how", ["deactivate", "delete"])
async def test_who_is_deactivated_or_deleted_is_refused_at_once_also_with_an_assertion(
    service: RunningSecrets, kind: str, how: str
) -> None:
    found: Any
    if kind == "User":
        found = await service.admin.create_user("ada")
        token = await service.token_for("ada")
    else:
        found = await create_robot(service.admin)
        token = await service.token_for(found.application_id)
    through_gateway = service.peer("gateway", await service.assertion(token))
    await me(through_gateway)
    clock = itertools.count(0.0, 9.0)  # the exchange looks at its clock when it is asked
    exchange = TokenExchange(service.peer_channels["gateway"], stale_seconds=3600, now=lambda: next(clock))
    await exchange.identify(token)
    if how == "delete":
        await delete(service.admin, kind, found.id)
    else:
        await patch(service.admin, kind, found.id, operation("replace", "active", False))
    for caller in (service.public(token), through_gateway):
        assert await is_refused_token(me(caller))
        assert await is_refused_token(caller.create_scope("mine"))
        assert await is_refused_token(caller(caller.tokens.CreateToken, pb.CreateTokenRequest()))
    with pytest.raises(InvalidToken):  # elsewhere: nine seconds later
        await exchange.identify(token, may_be_stale=True)
    if how == "deactivate":
        await patch(service.admin, kind, found.id, operation("replace", "active", True))
        assert (await me(service.public(token))).id == found.id


async def test_only_admins_change_the_directory(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    user, robot = await me(bob), await create_robot(service.admin)
    group = await create_group(service.admin, "team")
    made = {"User": user.id, "Group": group.id, "ServicePrincipal": robot.id}
    rename = operation("replace", "displayName", "x")
    calls: list[Awaitable[Any]] = [
        create_group(bob, "mine"),
        create_robot(bob),
        *(patch(bob, kind, made[kind], rename) for kind in made),
        *(delete(bob, kind, made[kind]) for kind in made),
        bob(bob.scim.ReplaceUser, pb.ReplaceUserRequest(id=user.id, user_name="x")),
        bob(bob.scim.ReplaceGroup, pb.ReplaceGroupRequest(id=group.id, display_name="x")),
        bob(bob.scim.ReplaceServicePrincipal, pb.ReplaceServicePrincipalRequest(id=robot.id)),
        patch(bob, "User", "17", rename),
    ]
    for call in calls:
        refused = await refusal(call)
        assert (refused.code, refused.reason) == DENIED
        assert "Only admins may" in refused.message
    for kinds in ("Users", "Groups", "ServicePrincipals"):
        assert (await listed(bob, kinds)).resources


@pytest.mark.parametrize("name", ["", " x", "x\n", "a\0", "a\u202eb", "a\u200bb", "\ud7ff\ue000", "x" * 256])
async def test_hostile_name_of_a_group_is_refused(service: RunningSecrets, name: str) -> None:
    refused = await refusal(create_group(service.admin, name))
    assert (refused.reason, refused.message.partition(":")[0]) == ("INVALID_PARAMETER_VALUE", "displayName")


async def test_names_that_fold_to_one_are_one_name_of_every_kind(service: RunningSecrets) -> None:
    robot = await create_robot(service.admin)
    await service.admin.create_user("Straße")
    for name in ("STRASSE", "strasse", "ADMINS", robot.application_id.upper()):
        assert scim_type(await refusal(create_group(service.admin, name))) == "uniqueness", name
        assert scim_type(await refusal(service.admin.create_user(name))) == "uniqueness", name


async def test_labels_hold_no_control_characters(service: RunningSecrets) -> None:
    for fields in ({"display_name": "a\0b"}, {"external_id": "a\n"}, {"roles": [pb.Role(value="\u202e")]}):
        assert (await refusal(service.admin.create_user("ada", **fields))).reason == "INVALID_PARAMETER_VALUE"
    many = [pb.Role(value=str(number)) for number in range(101)]
    assert (await refusal(service.admin.create_user("ada", roles=many))).message == "roles: at most 100."
    assert len((await service.admin.create_user("ada", roles=many[:100])).roles) == 100


async def test_workspace_is_full_at_its_limits(service: RunningSecrets, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (directory.MOST_ACCOUNTS, directory.MOST_GROUPS) == (20_000, 5_000)
    monkeypatch.setattr(directory, "MOST_ACCOUNTS", 2)
    monkeypatch.setattr(directory, "MOST_GROUPS", 3)
    await service.admin.create_user("ada")
    await create_group(service.admin, "team")
    for call in (service.admin.create_user("bob"), create_robot(service.admin), create_group(service.admin, "more")):
        assert (await refusal(call)).reason == "RESOURCE_LIMIT_EXCEEDED"


# --- lists ---


async def test_answers_hold_the_attributes_that_were_asked_for(service: RunningSecrets) -> None:
    await service.admin.create_user("ada", name=pb.UserName(given_name="Ada"))

    async def fields(**wanted: str) -> set[str]:
        page = await listed(service.admin, "Users", filter='userName eq "ada"', **wanted)
        return {field.json_name for field, _ in page.resources[0].ListFields()}

    everything = {"schemas", "id", "userName", "displayName", "active", "name", "emails", "groups", "entitlements"}
    assert await fields() == everything
    assert await fields(attributes="userName, NAME.givenName") == {"schemas", "id", "userName", "name"}
    assert await fields(excluded_attributes="id,groups,active") == everything - {"groups", "active"}
    assert await fields(attributes="userName,active", excluded_attributes="active") == {"schemas", "id", "userName"}
    shown = await service.admin(service.admin.scim.GetMe, pb.GetMeRequest(excluded_attributes="entitlements,groups"))
    assert (list(shown.entitlements), list(shown.groups)) == ([], [])
    assert shown.active


async def test_lists_are_sorted_either_way_and_unknown_orders_refused(service: RunningSecrets) -> None:
    for name in ("b", "A", "c"):
        await service.admin.create_user(name)

    async def names(**wanted: Any) -> list[str]:
        return [user.user_name for user in (await listed(service.admin, "Users", **wanted)).resources]

    assert await names(sort_by="USERNAME") == ["A", "admin", "b", "c"]
    assert await names(sort_by="userName", sort_order="descending", start_index=2, count=2) == ["b", "admin"]
    for wanted in ({"sort_by": "emails.value"}, {"sort_by": "p.id; DROP"}, {"sort_by": "id", "sort_order": "up"}):
        refused = await refusal(names(**wanted))
        assert refused.reason == "INVALID_PARAMETER_VALUE"
        assert refused.message.startswith("sort")


# --- tokens ---


async def test_admins_look_after_the_tokens_of_others(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    user, admin = await me(bob), await me(service.admin)
    made = await bob(bob.tokens.CreateToken, pb.CreateTokenRequest(comment="mine"))
    managed = service.admin.tokens

    async def tokens(**wanted: Any) -> list[pb.ManagedToken]:
        answer = await service.admin(managed.ListManagedTokens, pb.ListManagedTokensRequest(**wanted))
        return list(answer.token_infos)

    assert [(token.owner_id, token.created_by_username) for token in await tokens()] == [
        (int(admin.id), "admin"),
        (int(user.id), "admin"),
        (int(user.id), "bob"),
    ]
    [own] = await tokens(created_by_username="BOB")
    assert [own] == await tokens(created_by_id=int(user.id))
    assert (own.token_id, own.comment) == (made.token_info.token_id, "mine")
    assert len(await tokens(created_by_id=int(admin.id))) == 2
    for wanted in (
        {"created_by_id": 17},
        {"created_by_username": "nobody"},
        {"created_by_username": "bob", "created_by_id": 17},
    ):
        assert await tokens(**wanted) == []
    assert made.token_value[16:] not in str(await tokens())
    request = pb.UpdateTokenRequest(
        token_id=own.token_id, token=pb.TokenChange(comment="theirs"), update_mask="comment"
    )
    assert (await service.admin(managed.UpdateManagedToken, request)).comment == "theirs"
    found = await service.admin(managed.GetManagedToken, pb.GetManagedTokenRequest(token_id=own.token_id))
    assert found.token_info.comment == "theirs"
    await service.admin(managed.DeleteManagedToken, pb.DeleteManagedTokenRequest(token_id=own.token_id))
    assert await is_refused_token(me(service.public(made.token_value)))
    refused = await refusal(service.admin(managed.GetManagedToken, pb.GetManagedTokenRequest(token_id=own.token_id)))
    assert refused.reason == "RESOURCE_DOES_NOT_EXIST"


async def test_only_admins_look_after_the_tokens_of_others(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    [token] = (await service.admin(service.admin.tokens.ListTokens, pb.ListTokensRequest())).token_infos
    for call in (
        bob(bob.tokens.ListManagedTokens, pb.ListManagedTokensRequest()),
        bob(bob.tokens.GetManagedToken, pb.GetManagedTokenRequest(token_id=token.token_id)),
        bob(bob.tokens.UpdateManagedToken, pb.UpdateTokenRequest(token_id=token.token_id)),
        bob(bob.tokens.DeleteManagedToken, pb.DeleteManagedTokenRequest(token_id=token.token_id)),
        bob(bob.tokens.GetManagedToken, pb.GetManagedTokenRequest(token_id="nosuch")),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == DENIED


async def test_owner_changes_the_comment_of_its_own_token_alone(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    made = (await bob(bob.tokens.CreateToken, pb.CreateTokenRequest(comment="old"))).token_info
    change = {"token_id": made.token_id, "token": pb.TokenChange(comment="new")}
    changed = await bob(bob.tokens.UpdateToken, pb.UpdateTokenRequest(**change))
    assert changed == pb.TokenInfo(
        token_id=made.token_id, creation_time=made.creation_time, expiry_time=made.expiry_time, comment="new"
    )
    refused = await refusal(bob(bob.tokens.UpdateToken, pb.UpdateTokenRequest(**change, update_mask="scopes")))
    assert refused.message.startswith("update_mask:")
    refused = await refusal(service.admin(service.admin.tokens.UpdateToken, pb.UpdateTokenRequest(**change)))
    assert refused.reason == "RESOURCE_DOES_NOT_EXIST"


async def test_list_for_admins_is_bounded_by_its_newest(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personal_tokens, "MOST_LISTED", 2)
    for comment in ("a", "b", "c"):
        await service.admin(service.admin.tokens.CreateToken, pb.CreateTokenRequest(comment=comment))
    answer = await service.admin(service.admin.tokens.ListManagedTokens, pb.ListManagedTokensRequest())
    assert [token.comment for token in answer.token_infos] == ["b", "c"]


async def test_owner_gets_ten_tokens_in_a_minute_whoever_makes_them() -> None:
    async with running_secrets() as service:
        bob = await service.user("bob")  # the first
        for _ in range(8):
            made = await bob(bob.tokens.CreateToken, pb.CreateTokenRequest())
        await bob(bob.tokens.DeleteToken, pb.DeleteTokenRequest(token_id=made.token_info.token_id))
        service.clock.offset = 20
        await bob(bob.tokens.CreateToken, pb.CreateTokenRequest())
        for call in (bob(bob.tokens.CreateToken, pb.CreateTokenRequest()), service.token_for("bob")):
            refused = await refusal(call)
            assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_LIMIT_EXCEEDED")
            assert 30 <= int(refused.facts["retry_after"]) <= 40
        await service.admin(service.admin.tokens.CreateToken, pb.CreateTokenRequest())
        service.clock.offset = 61
        await bob(bob.tokens.CreateToken, pb.CreateTokenRequest())


# --- what Serving asks ---


async def test_assertion_says_what_kind_of_principal_calls(service: RunningSecrets) -> None:
    robot = await create_robot(service.admin)
    exchange = TokenExchange(service.peer_channels["serving"], stale_seconds=0)
    found = await exchange.identify(await service.token_for(robot.application_id))
    assert (found.principal.kind, found.principal.name) == ("service_principal", robot.application_id)
    assert (await exchange.identify(service.admin_token)).principal.kind == "user"
