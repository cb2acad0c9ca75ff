"""Any sequence of operations by several callers is answered as the model of the contract answers it.

One sequence is about everything at once: secrets, ACLs, launches, users, service principals, groups, and the standing
of everybody, those included who are deactivated, gone, or made anew under the name of somebody who is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servicekit import channels
from tessera.identity.v1 import identity_pb2
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.secrets import TIMEOUT, Caller, RunningSecrets, failing, refusal, running_secrets
from tests.support.secrets_model import MANAGE, READ, WRITE, Model, Refused

KEEP = 2

Operation = tuple[str, dict[str, Any]]

# Some are more likely than others, so that sequences meet: most are about one secret of one scope.
scopes = st.sampled_from(["One", "One", "One", "ONE", "two"])
keys = st.sampled_from(["Key", "Key", "kEY", "other"])
versions = st.sampled_from([1, 2, 3, 0, 4, 5])
replicas = st.sampled_from(["r1", "r2"])
names = st.sampled_from(["ann", "ANN", "straße", "STRASSE", "crew"])
# A place among all that were ever made: counted from their beginning, or from their end.
places = st.sampled_from([1, 1, 2, 0, -1, -2])

CALLERS = st.sampled_from([1, 1, 1, 2, 0, -1])
ADMINISTRATORS = st.sampled_from([0, 0, 0, 0, 1, -1])
SCOPE = {"scope": scopes}
SECRET = {"scope": scopes, "key": keys}

OPERATIONS: dict[str, tuple[int, st.SearchStrategy[int], dict[str, st.SearchStrategy[Any]]]] = {
    "create_scope": (2, CALLERS, {**SCOPE, "manager": st.sampled_from(["", "users"])}),
    "delete_scope": (1, CALLERS, SCOPE),
    "list_scopes": (1, CALLERS, {}),
    "put": (8, CALLERS, {**SECRET, "value": st.sampled_from([b"a", b"", b"b\n"]), "if_version": st.none() | versions}),
    "delete": (3, CALLERS, SECRET),
    "get": (2, CALLERS, SECRET),
    "list_secrets": (1, CALLERS, SCOPE),
    "list_versions": (1, CALLERS, SECRET),
    "restore": (3, CALLERS, {**SECRET, "version": versions}),
    "purge": (1, CALLERS, SECRET),
    "put_acl": (6, CALLERS, {**SCOPE, "party": places, "permission": st.sampled_from([MANAGE, WRITE, READ])}),
    "delete_acl": (2, CALLERS, {**SCOPE, "party": places}),
    "list_acls": (1, CALLERS, SCOPE),
    "launch": (5, CALLERS, {**SECRET, "replica": replicas}),
    "end_launch": (2, CALLERS, {"replica": replicas}),
    "create_user": (3, ADMINISTRATORS, {"name": names}),
    "create_service_principal": (1, ADMINISTRATORS, {}),
    "rename_user": (2, ADMINISTRATORS, {"person": places, "name": names}),
    "activate": (4, ADMINISTRATORS, {"person": places, "is_active": st.booleans()}),
    "delete_person": (2, ADMINISTRATORS, {"person": places}),
    "create_group": (2, ADMINISTRATORS, {"name": names}),
    "rename_group": (1, ADMINISTRATORS, {"team": places, "name": names}),
    "delete_group": (1, ADMINISTRATORS, {"team": places}),
    "add_member": (4, ADMINISTRATORS, {"team": places, "person": places}),
    "remove_member": (2, ADMINISTRATORS, {"team": places, "person": places}),
}
"""What can be done: how often, beside the others, by whom, and with which arguments."""


def _one(name: str) -> st.SearchStrategy[Operation]:
    _, callers, arguments = OPERATIONS[name]
    return st.tuples(st.just(name), st.fixed_dictionaries({"caller": callers, **arguments}))


operations = st.lists(
    st.sampled_from([name for name, (times, _, _) in OPERATIONS.items() for _ in range(times)]).flatmap(_one),
    min_size=10,
    max_size=40,
)

BEGINNING: list[Operation] = [
    ("create_user", {"caller": 0, "name": "ann"}),
    ("create_user", {"caller": 0, "name": "ben"}),
    ("create_group", {"caller": 0, "name": "crew"}),
    ("add_member", {"caller": 0, "team": 2, "person": 2}),
    ("create_scope", {"caller": 1, "scope": "One", "manager": ""}),
    ("put", {"caller": 1, "scope": "One", "key": "Key", "value": b"a", "if_version": None}),
    ("put_acl", {"caller": 1, "scope": "One", "party": -1, "permission": WRITE}),
]
"""What every sequence begins with, so that it has something to be about: ben may write, as one of the crew."""

_CHANGES_STANDINGS = frozenset({"create_scope", "delete_scope", "put_acl", "delete_acl"}) | frozenset(
    list(OPERATIONS)[list(OPERATIONS).index("create_user") :]
)


class Real:
    """The service, called in the words of the model."""

    def __init__(self, service: RunningSecrets) -> None:
        self._service = service
        self._ids: list[str] = []
        self._kinds = ["User"]
        self._people: list[Caller] = []
        self._teams: list[str] = []
        self._applications: dict[str, str] = {}
        """What the model calls the ids that service principals were given, by those ids."""

    async def founded(self) -> Real:
        """Knows who is there from the beginning."""
        me = await self._service.admin(self._service.admin.scim.GetMe, identity_pb2.GetMeRequest())
        groups = {group.display: group.value for group in me.groups}
        self._ids, self._people = [me.id], [self._service.admin]
        self._teams = [groups["users"], groups["admins"]]
        return self

    async def __call__(self, name: str, caller: int, arguments: dict[str, Any]) -> Any:
        return await getattr(self, name)(self._people[caller], **arguments)

    # --- secrets ---

    async def create_scope(self, by: Caller, scope: str, manager: str) -> Any:
        request = pb.CreateScopeRequest(scope=scope, initial_manage_principal=manager)
        return None, (await self._sent(by, by.secrets.CreateScope, request))[1]

    async def delete_scope(self, by: Caller, scope: str) -> Any:
        return None, (await self._sent(by, by.secrets.DeleteScope, pb.DeleteScopeRequest(scope=scope)))[1]

    async def list_scopes(self, by: Caller) -> Any:
        answer, warnings = await self._sent(by, by.secrets.ListScopes, pb.ListScopesRequest())
        return [scope.name for scope in answer.scopes], warnings

    async def put(self, by: Caller, scope: str, key: str, value: bytes, if_version: int | None) -> Any:
        request = pb.PutSecretRequest(scope=scope, key=key, bytes_value=value, if_version=if_version)
        return None, (await self._sent(by, by.secrets.PutSecret, request))[1]

    async def delete(self, by: Caller, scope: str, key: str) -> Any:
        return None, (await self._sent(by, by.secrets.DeleteSecret, pb.DeleteSecretRequest(scope=scope, key=key)))[1]

    async def get(self, by: Caller, scope: str, key: str) -> Any:
        answer, warnings = await self._sent(by, by.secrets.GetSecret, pb.GetSecretRequest(scope=scope, key=key))
        return (answer.key, answer.value), warnings

    async def list_secrets(self, by: Caller, scope: str) -> Any:
        answer, warnings = await self._sent(by, by.secrets.ListSecrets, pb.ListSecretsRequest(scope=scope))
        return [secret.key for secret in answer.secrets], warnings

    async def list_versions(self, by: Caller, scope: str, key: str) -> Any:
        request = pb.ListSecretVersionsRequest(scope=scope, key=key)
        answer, warnings = await self._sent(by, by.secrets.ListSecretVersions, request)
        found = [(each.version, each.current, each.held, each.deleted) for each in answer.versions]
        return (answer.key, found), warnings

    async def restore(self, by: Caller, scope: str, key: str, version: int) -> Any:
        request = pb.RestoreSecretRequest(scope=scope, key=key, version=version)
        answer, warnings = await self._sent(by, by.secrets.RestoreSecret, request)
        return answer.version, warnings

    async def purge(self, by: Caller, scope: str, key: str) -> Any:
        return None, (await self._sent(by, by.secrets.PurgeSecret, pb.PurgeSecretRequest(scope=scope, key=key)))[1]

    async def put_acl(self, by: Caller, scope: str, principal: str, permission: int) -> Any:
        granted = pb.AclPermission.ValueType(permission)
        request = pb.PutAclRequest(scope=scope, principal=self._spelled(principal), permission=granted)
        return None, (await self._sent(by, by.secrets.PutAcl, request))[1]

    async def delete_acl(self, by: Caller, scope: str, principal: str) -> Any:
        request = pb.DeleteAclRequest(scope=scope, principal=self._spelled(principal))
        return None, (await self._sent(by, by.secrets.DeleteAcl, request))[1]

    async def list_acls(self, by: Caller, scope: str) -> Any:
        answer, warnings = await self._sent(by, by.secrets.ListAcls, pb.ListAclsRequest(scope=scope))
        return [(self._named(item.principal), item.permission) for item in answer.items], warnings

    async def launch(self, by: Caller, scope: str, key: str, replica: str) -> Any:
        try:
            await self._service.as_serving(by)
        except grpc.aio.AioRpcError:
            return [], 0  # who is not let in makes no endpoint, so there is nothing to launch
        endpoint_id, _ = await self._service.grant(by, (scope, key))
        return list((await self._service.resolve(endpoint_id, (scope, key), replica_id=replica)).values), 0

    async def end_launch(self, by: Caller, replica: str) -> Any:
        await self._service.settle(ended_replica_ids=[replica])
        return None, 0

    # --- the directory ---

    async def who_am_i(self, by: Caller) -> Any:
        me, warnings = await self._sent(by, by.scim.GetMe, identity_pb2.GetMeRequest())
        return (self._named(me.user_name), {group.display for group in me.groups}), warnings

    async def create_user(self, by: Caller, name: str) -> Any:
        made, _ = await self._sent(by, by.scim.CreateUser, identity_pb2.CreateUserRequest(user_name=name))
        return await self._made(by, made.id, made.user_name, kind="User")

    async def create_service_principal(self, by: Caller) -> Any:
        made, _ = await self._sent(by, by.scim.CreateServicePrincipal, identity_pb2.CreateServicePrincipalRequest())
        self._applications[made.application_id] = f"application {len(self._people)}"
        return await self._made(by, made.id, made.application_id, kind="ServicePrincipal")

    async def _made(self, by: Caller, account_id: str, name: str, *, kind: str) -> Any:
        request = identity_pb2.CreateOboTokenRequest(application_id=name)
        token = (await by(by.tokens.CreateOboToken, request)).token_value
        assert account_id not in self._ids, "an id is never given again"
        self._ids.append(account_id)
        self._kinds.append(kind)
        self._people.append(self._service.public(token))
        return None, 0

    async def rename_user(self, by: Caller, person: int, name: str) -> Any:
        request = identity_pb2.ReplaceUserRequest(id=self._ids[person], user_name=name)
        return None, (await self._sent(by, by.scim.ReplaceUser, request))[1]

    async def activate(self, by: Caller, person: int, is_active: bool) -> Any:
        operation = identity_pb2.PatchOperation(op="replace", path="active")
        operation.value.bool_value = is_active
        return await self._patched(by, f"Patch{self._kinds[person]}", self._ids[person], operation)

    async def delete_person(self, by: Caller, person: int) -> Any:
        method = getattr(by.scim, f"Delete{self._kinds[person]}")
        return None, (await self._sent(by, method, identity_pb2.DeleteRequest(id=self._ids[person])))[1]

    async def create_group(self, by: Caller, name: str) -> Any:
        made, warnings = await self._sent(by, by.scim.CreateGroup, identity_pb2.CreateGroupRequest(display_name=name))
        assert made.id not in self._teams, "an id is never given again"
        self._teams.append(made.id)
        return None, warnings

    async def rename_group(self, by: Caller, team: int, name: str) -> Any:
        operation = identity_pb2.PatchOperation(op="replace", path="displayName")
        operation.value.string_value = name
        return await self._patched(by, "PatchGroup", self._teams[team], operation)

    async def delete_group(self, by: Caller, team: int) -> Any:
        request = identity_pb2.DeleteRequest(id=self._teams[team])
        return None, (await self._sent(by, by.scim.DeleteGroup, request))[1]

    async def add_member(self, by: Caller, team: int, person: int) -> Any:
        operation = identity_pb2.PatchOperation(op="add", path="members")
        operation.value.list_value.values.add().struct_value.fields["value"].string_value = self._ids[person]
        return await self._patched(by, "PatchGroup", self._teams[team], operation)

    async def remove_member(self, by: Caller, team: int, person: int) -> Any:
        operation = identity_pb2.PatchOperation(op="remove", path=f'members[value eq "{self._ids[person]}"]')
        return await self._patched(by, "PatchGroup", self._teams[team], operation)

    async def _patched(self, by: Caller, method: str, target: str, operation: identity_pb2.PatchOperation) -> Any:
        request = identity_pb2.PatchRequest(id=target, operations=[operation])
        return None, (await self._sent(by, getattr(by.scim, method), request))[1]

    # --- names ---

    def _named(self, name: str) -> str:
        return self._applications.get(name, name)

    def _spelled(self, name: str) -> str:
        return next((real for real, named in self._applications.items() if named == name), name)

    async def _sent(self, by: Caller, method: Any, request: Any) -> tuple[Any, int]:
        answering = method(request, metadata=by.metadata, timeout=TIMEOUT)
        try:
            answer = await answering
        except grpc.aio.AioRpcError as error:
            refused = await refusal(failing(error))
            told = refused.facts.get("scim_type") or refused.reason
            raise Refused(refused.message if refused.message == "Invalid access token." else told) from None
        trailers = await answering.trailing_metadata()
        return answer, sum(name == channels.WARNING for name, _ in trailers or ())


def _looked_at(model: Model, name: str, arguments: dict[str, Any]) -> Iterator[Operation]:
    """What is asked after an operation: the secret that it was about, or everybody's standing, if it may be another."""
    if "key" in arguments:
        looked_at = {"caller": 0, "scope": arguments["scope"], "key": arguments["key"]}
        yield "list_versions", looked_at
        yield "get", looked_at
    if name in _CHANGES_STANDINGS:
        for caller in range(len(model.people)):
            yield "who_am_i", {"caller": caller}
            # What needs READ, WRITE and MANAGE, and changes nothing.
            yield "get", {"caller": caller, "scope": "One", "key": "Key"}
            yield "restore", {"caller": caller, "scope": "One", "key": "Key", "version": 0}
            yield "list_acls", {"caller": caller, "scope": "One"}


async def _played(sequence: list[Operation]) -> None:
    async with running_secrets(secret_versions=KEEP, tokens_per_minute=0) as service:
        real, model = await Real(service).founded(), Model(KEEP)
        for number, (name, drawn) in enumerate([*BEGINNING, *sequence], 1):
            arguments = _placed(drawn, model)
            await _compared(real, model, f"operation {number}", name, arguments)
            for looked, at in list(_looked_at(model, name, arguments)):
                await _compared(real, model, f"after operation {number}", looked, at)


def _placed(arguments: dict[str, Any], model: Model) -> dict[str, Any]:
    """The arguments with places that exist: drawn ones count on from the beginning, or back from the end."""
    rooms = {
        "caller": len(model.people),
        "person": len(model.people),
        "team": len(model.teams),
        "party": len(model.parties),
    }
    return {name: value % rooms[name] if name in rooms else value for name, value in arguments.items()}


async def _compared(real: Real, model: Model, when: str, name: str, arguments: dict[str, Any]) -> None:
    rest = {key: value for key, value in arguments.items() if key != "caller"}
    real_rest = dict(rest)
    if "party" in real_rest:
        real_rest["principal"] = model.parties[real_rest.pop("party")].name
    expected: Any
    try:
        expected = getattr(model, name)(arguments["caller"], **rest)
    except Refused as refused:
        expected = str(refused)
    try:
        found = await real(name, arguments["caller"], real_rest)
    except Refused as refused:
        found = str(refused)
    assert found == expected, f"{when}: {name} {arguments}"


@settings(max_examples=50)
@given(sequence=operations)
def test_every_sequence_is_answered_as_the_model_answers_it(sequence: list[Operation]) -> None:
    asyncio.run(_played(sequence))


@pytest.mark.long
@settings(max_examples=1_000)
@given(sequence=operations)
def test_very_many_sequences_are_answered_as_the_model_answers_them(sequence: list[Operation]) -> None:
    asyncio.run(_played(sequence))
