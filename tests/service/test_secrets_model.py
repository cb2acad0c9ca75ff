"""Any sequence of operations by several callers is answered as the model of the contract answers it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servicekit import channels
from tessera.identity.v1.identity_pb2 import GetMeRequest
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.secrets import TIMEOUT, Caller, RunningSecrets, refusal, running_secrets
from tests.support.secrets_model import MANAGE, READ, WRITE, Model, Refused

KEEP = 2

# Some are more likely than others, so that sequences meet: most are about one secret of one scope.
callers = st.sampled_from(["ann", "ann", "ann", "ben", "admin"])
scopes = st.sampled_from(["One", "One", "One", "ONE", "two"])
keys = st.sampled_from(["Key", "Key", "kEY", "other"])
versions = st.sampled_from([1, 2, 3, 0, 4, 5])
replicas = st.sampled_from(["r1", "r2"])
principals = st.sampled_from(["ann", "ben", "users"])


SCOPE = {"scope": scopes}
SECRET = {"scope": scopes, "key": keys}

OPERATIONS: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "create_scope": (2, {**SCOPE, "manager": st.sampled_from(["", "users"])}),
    "delete_scope": (1, SCOPE),
    "list_scopes": (1, {}),
    "put": (12, {**SECRET, "value": st.sampled_from([b"a", b"", b"b\n"]), "if_version": st.none() | versions}),
    "delete": (3, SECRET),
    "get": (2, SECRET),
    "list_secrets": (1, SCOPE),
    "list_versions": (1, SECRET),
    "restore": (4, {**SECRET, "version": versions}),
    "purge": (1, SECRET),
    "put_acl": (2, {**SCOPE, "principal": principals, "permission": st.sampled_from([MANAGE, WRITE, READ])}),
    "delete_acl": (1, {**SCOPE, "principal": principals}),
    "list_acls": (1, SCOPE),
    "launch": (6, {**SECRET, "replica": replicas}),
    "end_launch": (2, {"replica": replicas}),
}
"""What can be done: how often, beside the others, and with which arguments."""

operations = st.lists(
    st.sampled_from([name for name, (times, _) in OPERATIONS.items() for _ in range(times)]).flatmap(
        lambda name: st.tuples(st.just(name), st.fixed_dictionaries({"caller": callers, **OPERATIONS[name][1]}))
    ),
    min_size=10,
    max_size=40,
)

BEGINNING: list[tuple[str, dict[str, Any]]] = [
    ("create_scope", {"caller": "ann", "scope": "One", "manager": ""}),
    ("put", {"caller": "ann", "scope": "One", "key": "Key", "value": b"a", "if_version": None}),
    ("put_acl", {"caller": "ann", "scope": "One", "principal": "ben", "permission": WRITE}),
]
"""What every sequence begins with, so that it has something to be about."""


class Real:
    """The service, called in the words of the model. Scopes and replicas of each run have names of their own."""

    def __init__(self, service: RunningSecrets, callers: dict[str, Caller], run: str) -> None:
        self._service = service
        self._callers = callers
        self._run = run

    async def __call__(self, name: str, caller: str, arguments: dict[str, Any]) -> Any:
        if "scope" in arguments:
            arguments = {**arguments, "scope": self._run + arguments["scope"]}
        if "replica" in arguments:
            arguments = {**arguments, "replica": self._run + arguments["replica"]}
        return await getattr(self, name)(self._callers[caller], **arguments)

    async def create_scope(self, by: Caller, scope: str, manager: str) -> Any:
        request = pb.CreateScopeRequest(scope=scope, initial_manage_principal=manager)
        return None, (await self._sent(by, by.secrets.CreateScope, request))[1]

    async def delete_scope(self, by: Caller, scope: str) -> Any:
        return None, (await self._sent(by, by.secrets.DeleteScope, pb.DeleteScopeRequest(scope=scope)))[1]

    async def list_scopes(self, by: Caller) -> Any:
        answer, warnings = await self._sent(by, by.secrets.ListScopes, pb.ListScopesRequest())
        names = [scope.name for scope in answer.scopes if scope.name.startswith(self._run)]
        return [name.removeprefix(self._run) for name in names], warnings

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
        request = pb.PutAclRequest(scope=scope, principal=principal, permission=pb.AclPermission.ValueType(permission))
        return None, (await self._sent(by, by.secrets.PutAcl, request))[1]

    async def delete_acl(self, by: Caller, scope: str, principal: str) -> Any:
        request = pb.DeleteAclRequest(scope=scope, principal=principal)
        return None, (await self._sent(by, by.secrets.DeleteAcl, request))[1]

    async def list_acls(self, by: Caller, scope: str) -> Any:
        answer, warnings = await self._sent(by, by.secrets.ListAcls, pb.ListAclsRequest(scope=scope))
        return [(item.principal, item.permission) for item in answer.items], warnings

    async def launch(self, by: Caller, scope: str, key: str, replica: str) -> Any:
        endpoint_id, _ = await self._service.grant(by, (scope, key))
        return list((await self._service.resolve(endpoint_id, (scope, key), replica_id=replica)).values), 0

    async def end_launch(self, by: Caller, replica: str) -> Any:
        await self._service.settle(ended_replica_ids=[replica])
        return None, 0

    async def _sent(self, by: Caller, method: Any, request: Any) -> tuple[Any, int]:
        answering = method(request, metadata=by.metadata, timeout=TIMEOUT)
        try:
            answer = await answering
        except grpc.aio.AioRpcError as error:
            raise Refused((await refusal(_failing(error))).reason) from None
        trailers = await answering.trailing_metadata()
        return answer, sum(name == channels.WARNING for name, _ in trailers or ())


async def _failing(error: grpc.aio.AioRpcError) -> None:
    raise error


class Played:
    """A service that sequences are played on, one after the other."""

    def __init__(self, runner: asyncio.Runner, service: RunningSecrets, callers: dict[str, Caller]) -> None:
        self._runner = runner
        self._service = service
        self._callers = callers
        self._runs = itertools.count(1)

    def play(self, sequence: list[tuple[str, dict[str, Any]]]) -> None:
        real = Real(self._service, self._callers, f"run{next(self._runs)}.")
        self._runner.run(_played(real, Model(KEEP), [*BEGINNING, *sequence]))


def _looked_at(sequence: list[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sequence, with a look at the secret after everything that was done to one."""
    for name, arguments in sequence:
        yield name, arguments
        if "key" in arguments:
            looked_at = {"caller": "admin", "scope": arguments["scope"], "key": arguments["key"]}
            yield "list_versions", looked_at
            yield "get", looked_at


async def _played(real: Real, model: Model, sequence: list[tuple[str, dict[str, Any]]]) -> None:
    for index, (name, arguments) in enumerate(_looked_at(sequence)):
        rest = {key: value for key, value in arguments.items() if key != "caller"}
        expected: Any
        try:
            expected = getattr(model, name)(arguments["caller"], **rest)
        except Refused as refused:
            expected = str(refused)
        try:
            found = await real(name, arguments["caller"], rest)
        except Refused as refused:
            found = str(refused)
        assert found == expected, f"operation {index + 1}: {name} {arguments}"


async def _id_of(caller: Caller) -> str:
    return str((await caller(caller.scim.GetMe, GetMeRequest())).id)


@pytest.fixture(scope="module")
def played() -> Iterator[Played]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            service = runner.run(stack.enter_async_context(running_secrets(secret_versions=KEEP)))
            people = {name: runner.run(service.user(name)) for name in ("ann", "ben")}
            yield Played(runner, service, {"admin": service.admin, **people})
        finally:
            runner.run(stack.aclose())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=operations)
def test_every_sequence_is_answered_as_the_model_answers_it(
    played: Played, sequence: list[tuple[str, dict[str, Any]]]
) -> None:
    played.play(sequence)
