"""A change whose caller chose the request id is made once, and its retries get the first answer, whatever happened."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from servicekit import channels, database, once
from servicekit.database import SqliteConnection
from servicekit.exposure import exposure
from servicekit.storage import Connection
from tessera.identity.v1 import identity_pb2 as identity
from tessera.identity.v1 import permissions_pb2 as permissions
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.secrets import TIMEOUT, Caller, RunningSecrets, data_directory, failing, refusal, running_secrets

DAY = 24 * 3600

SERVICES = {
    "secrets": pb.DESCRIPTOR.services_by_name["Secrets"],
    "scim": identity.DESCRIPTOR.services_by_name["Scim"],
    "tokens": identity.DESCRIPTOR.services_by_name["Tokens"],
    "client_secrets": identity.DESCRIPTOR.services_by_name["ServicePrincipalSecrets"],
}
"""The services with public RPCs, by the stubs of a Caller."""

NOTHING_CHANGES = ("Get", "List")
"""How the names of RPCs begin that only read."""

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets(tokens_per_minute=0) as running:
        yield running


@pytest.fixture
def fresh() -> str:
    """A name, or an id, that no test had before."""
    return f"n{next(_numbers)}"


def under(request_id: str, caller: Caller) -> Caller:
    """The caller, with a request id of its own choice."""
    return Caller(caller.channel, *caller.metadata, (channels.REQUEST_ID, request_id))


def content(service: RunningSecrets, *, answers: bool = False) -> Any:
    """All rows of the service's database, those of recorded answers only if asked for."""
    with closing(sqlite3.connect(service.settings.database)) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {
            table: connection.execute(f"SELECT * FROM {table}").fetchall()
            for table in tables
            # The audit log tells of every call, a retry too; and uses of keys are counted at moments of their own.
            if (answers or table != "answers") and not table.startswith("audit_") and table != "store_key_uses"
        }


def recorded(service: RunningSecrets) -> set[str]:
    """The request ids under which answers are recorded."""
    return {row[2] for row in content(service, answers=True)["answers"]}


# --- every change there is


async def a_scope(admin: Caller, name: str) -> None:
    await admin.create_scope(name)
    for value in ("one", "two"):
        await admin.put(name, "key", value)
    await admin.create_user(name)
    await admin.grant(name, name, pb.READ)


async def a_user(admin: Caller, name: str) -> str:
    return (await admin.create_user(name)).id


async def a_service_principal(admin: Caller, name: str) -> str:
    request = identity.CreateServicePrincipalRequest(display_name=name)
    return str((await admin(admin.scim.CreateServicePrincipal, request)).id)


async def a_client_secret(admin: Caller, name: str) -> tuple[str, str]:
    """The ids of a service principal and of a client secret of its own."""
    owner_id = await a_service_principal(admin, name)
    request = identity.CreateServicePrincipalSecretRequest(service_principal_id=owner_id)
    return owner_id, str((await admin(admin.client_secrets.CreateServicePrincipalSecret, request)).id)


async def a_group(admin: Caller, name: str) -> str:
    return str((await admin(admin.scim.CreateGroup, identity.CreateGroupRequest(display_name=name))).id)


async def a_token(admin: Caller, name: str) -> str:
    made = await admin(admin.tokens.CreateToken, identity.CreateTokenRequest(comment=name))
    return str(made.token_info.token_id)


def renaming(thing: Callable[[Caller, str], Awaitable[str]]) -> Callable[[Caller, str], Awaitable[Any]]:
    async def request(admin: Caller, name: str) -> identity.PatchRequest:
        message = identity.PatchRequest(id=await thing(admin, name))
        operation = message.operations.add(op="replace")
        operation.value.struct_value.update({"displayName": f"{name} the second", "externalId": name})
        return message

    return request


Request = Callable[[Caller, str], Awaitable[Any]]


def about(thing: Callable[[Caller, str], Awaitable[Any]], message: Callable[[Any, str], Any]) -> Request:
    """A request about a thing that is made first: `message` has its id and its name."""

    async def request(admin: Caller, name: str) -> Any:
        return message(await thing(admin, name), name)

    return request


async def nothing(admin: Caller, name: str) -> None:
    """Needs nothing that is there."""


CHANGES: dict[str, Request] = {
    "CreateScope": about(nothing, lambda _, name: pb.CreateScopeRequest(scope=name)),
    "DeleteScope": about(a_scope, lambda _, name: pb.DeleteScopeRequest(scope=name)),
    "PutSecret": about(a_scope, lambda _, name: pb.PutSecretRequest(scope=name, key="key", string_value="three\n")),
    "DeleteSecret": about(a_scope, lambda _, name: pb.DeleteSecretRequest(scope=name, key="key")),
    "PutAcl": about(a_scope, lambda _, name: pb.PutAclRequest(scope=name, principal=name, permission=pb.WRITE)),
    "DeleteAcl": about(a_scope, lambda _, name: pb.DeleteAclRequest(scope=name, principal=name)),
    "RestoreSecret": about(a_scope, lambda _, name: pb.RestoreSecretRequest(scope=name, key="key", version=1)),
    "PurgeSecret": about(a_scope, lambda _, name: pb.PurgeSecretRequest(scope=name, key="key")),
    "CreateUser": about(nothing, lambda _, name: identity.CreateUserRequest(user_name=name)),
    "PatchUser": renaming(a_user),
    "ReplaceUser": about(
        a_user, lambda known_id, name: identity.ReplaceUserRequest(id=known_id, user_name=name, display_name="Other")
    ),
    "DeleteUser": about(a_user, lambda known_id, _: identity.DeleteRequest(id=known_id)),
    "CreateGroup": about(nothing, lambda _, name: identity.CreateGroupRequest(display_name=name)),
    "PatchGroup": renaming(a_group),
    "ReplaceGroup": about(
        a_group,
        lambda known_id, name: identity.ReplaceGroupRequest(id=known_id, display_name=name, external_id="other"),
    ),
    "DeleteGroup": about(a_group, lambda known_id, _: identity.DeleteRequest(id=known_id)),
    "CreateServicePrincipal": about(nothing, lambda _, name: identity.CreateServicePrincipalRequest(display_name=name)),
    "PatchServicePrincipal": renaming(a_service_principal),
    "ReplaceServicePrincipal": about(
        a_service_principal,
        lambda known_id, _: identity.ReplaceServicePrincipalRequest(id=known_id, display_name="Other"),
    ),
    "DeleteServicePrincipal": about(a_service_principal, lambda known_id, _: identity.DeleteRequest(id=known_id)),
    "CreateToken": about(nothing, lambda _, name: identity.CreateTokenRequest(comment=name)),
    "DeleteToken": about(a_token, lambda known_id, _: identity.DeleteTokenRequest(token_id=known_id)),
    "UpdateToken": about(
        a_token,
        lambda known_id, _: identity.UpdateTokenRequest(token_id=known_id, token=identity.TokenChange(comment="other")),
    ),
    "CreateOboToken": about(a_user, lambda _, name: identity.CreateOboTokenRequest(application_id=name)),
    "UpdateManagedToken": about(
        a_token,
        lambda known_id, _: identity.UpdateTokenRequest(token_id=known_id, token=identity.TokenChange(comment="other")),
    ),
    "CreateServicePrincipalSecret": about(
        a_service_principal,
        lambda known_id, _: identity.CreateServicePrincipalSecretRequest(service_principal_id=known_id),
    ),
    "DeleteServicePrincipalSecret": about(
        a_client_secret,
        lambda ids, _: identity.DeleteServicePrincipalSecretRequest(service_principal_id=ids[0], secret_id=ids[1]),
    ),
    "DeleteManagedToken": about(a_token, lambda known_id, _: identity.DeleteManagedTokenRequest(token_id=known_id)),
}
"""A request of every RPC that changes something; what it is about is made first."""

PUBLIC = [
    (stub, method) for stub, service in SERVICES.items() for method in service.methods if not exposure(method).callers
]


def test_every_rpc_that_is_not_known_to_read_is_tried() -> None:
    assert set(CHANGES) == {method.name for _, method in PUBLIC if not method.name.startswith(NOTHING_CHANGES)}


@pytest.mark.parametrize(
    ("stub", "method"), [pytest.param(*each, id=each[1].name) for each in PUBLIC if each[1].name in CHANGES]
)
async def test_retry_of_every_change_gives_the_first_answer_and_changes_nothing(
    service: RunningSecrets,
    fresh: str,
    stub: str,
    method: MethodDescriptor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    admin = under(fresh, service.admin)
    call = getattr(getattr(admin, stub), method.name)
    request = await CHANGES[method.name](service.admin, fresh)
    before = content(service)
    answered = [await told(admin, call, request)]
    after = content(service)
    assert after != before
    monkeypatch.setattr(service.clock, "offset", service.clock.offset + 60)
    answered += [await told(admin, call, request) for _ in range(2)]
    assert answered == [answered[0]] * 3
    assert content(service) == after
    assert [record.message for record in caplog.records].count("first answer given again") == 2


async def told(caller: Caller, method: Any, request: Any) -> tuple[Any, list[str]]:
    """The answer to a call, and the warnings that came with it."""
    answering = method(request, metadata=caller.metadata, timeout=TIMEOUT)
    answer = await answering
    return answer, [value for name, value in await answering.trailing_metadata() or () if name == channels.WARNING]


async def test_reads_are_not_recorded_and_use_up_no_id(service: RunningSecrets, fresh: str) -> None:
    await a_scope(service.admin, fresh)
    admin = under(fresh, service.admin)
    await admin.get(fresh, "key")
    await admin.keys(fresh)
    await admin(admin.tokens.ListTokens, identity.ListTokensRequest())
    await admin(admin.scim.GetMe, identity.GetMeRequest())
    assert fresh not in recorded(service)
    await admin.put(fresh, "key", "value")
    await admin.keys(fresh)


# --- whose retry is one


async def test_id_of_another_request_is_refused_by_name(service: RunningSecrets, fresh: str) -> None:
    admin = under(fresh, service.admin)
    await admin.create_scope(fresh)
    for call in (admin.create_scope(f"{fresh}-other"), admin.put(fresh, "key", "value")):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER_VALUE")
        assert "X-Tessera-Request-Id" in refused.message
    assert await service.admin.keys(fresh) == []


async def test_ids_belong_to_their_callers(service: RunningSecrets, fresh: str) -> None:
    await under(fresh, service.admin).create_scope(f"{fresh}-1")
    other = under(fresh, await service.user(fresh))
    await other.create_scope(f"{fresh}-2")
    await other.create_scope(f"{fresh}-2")


async def test_another_token_of_the_caller_serves_for_a_retry(service: RunningSecrets, fresh: str) -> None:
    await service.admin.create_user(fresh)
    for _ in range(2):
        await under(fresh, service.public(await service.token_for(fresh))).create_scope(fresh)


async def test_refused_request_is_judged_anew(service: RunningSecrets, fresh: str) -> None:
    admin = under(f"{fresh}-id", service.admin)
    assert (await refusal(admin.put(fresh, "key", "value"))).code is grpc.StatusCode.NOT_FOUND
    await service.admin.create_scope(fresh)
    await admin.put(fresh, "key", "value")
    await admin.put(fresh, "key", "value")
    assert [each.version for each in await service.admin.versions(fresh, "key")] == [1]


@pytest.mark.parametrize("odd", ["", "a" * 65, "a b", "../x"])
async def test_chosen_id_that_is_none_is_refused_by_name(service: RunningSecrets, fresh: str, odd: str) -> None:
    refused = await refusal(under(odd, service.admin).create_scope(fresh))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER_VALUE")
    assert "X-Tessera-Request-Id" in refused.message
    await service.admin.create_scope(fresh)


async def test_id_that_the_service_made_up_is_not_recorded(service: RunningSecrets, fresh: str) -> None:
    before = recorded(service)
    spoofing = Caller(service.public_channel, *service.admin.metadata, (channels.CHOSEN, "true"))
    await spoofing.create_scope(fresh)
    await service.admin.put(fresh, "key", "value")
    assert recorded(service) == before


async def test_peer_says_whether_its_caller_chose_the_id(service: RunningSecrets, fresh: str) -> None:
    peer = service.peer("gateway", await service.assertion(service.admin_token))
    passing_on, retrying = under(f"{fresh}-1", peer), under(f"{fresh}-2", peer)
    retrying = Caller(retrying.channel, *retrying.metadata, (channels.CHOSEN, "true"))
    await passing_on.create_scope(fresh)
    assert (await refusal(passing_on.create_scope(fresh))).reason == "RESOURCE_ALREADY_EXISTS"
    for _ in range(2):
        await retrying.put(fresh, "key", "value")
    assert [each.version for each in await service.admin.versions(fresh, "key")] == [1]
    assert recorded(service) & {f"{fresh}-1", f"{fresh}-2"} == {f"{fresh}-2"}


async def test_internal_change_is_never_taken_for_a_retry(service: RunningSecrets, fresh: str) -> None:
    peer = service.peer("serving", await service.assertion(service.admin_token))
    chosen = Caller(peer.channel, *peer.metadata, (channels.REQUEST_ID, fresh), (channels.CHOSEN, "true"))
    for _ in range(2):
        await chosen(chosen.resolver.Settle, pb.SettleRequest(ended_replica_ids=[fresh]))
    await chosen(chosen.resolver.Settle, pb.SettleRequest(ended_replica_ids=["other"]))
    assert fresh not in recorded(service)


async def test_permissions_are_changed_once(service: RunningSecrets, fresh: str) -> None:
    endpoint_id, _ = await service.grant(service.admin)
    await service.admin.create_user(fresh)
    chosen = under(fresh, service.admin)
    entry = permissions.AccessControlRequest(user_name=fresh, permission_level=permissions.CAN_VIEW)
    change = permissions.UpdatePermissionsRequest(serving_endpoint_id=endpoint_id, access_control_list=[entry])
    first = await chosen(chosen.permissions.UpdatePermissions, change)
    assert len(first.access_control_list) == 3
    all_gone = permissions.SetPermissionsRequest(serving_endpoint_id=endpoint_id)
    await service.admin(service.admin.permissions.SetPermissions, all_gone)
    assert await chosen(chosen.permissions.UpdatePermissions, change) == first
    listed = await service.admin(
        service.admin.permissions.GetPermissions, permissions.GetPermissionsRequest(serving_endpoint_id=endpoint_id)
    )
    assert [each.group_name for each in listed.access_control_list] == ["admins"]
    refused = await refusal(chosen(chosen.permissions.SetPermissions, all_gone))
    assert refused.reason == "INVALID_PARAMETER_VALUE"


# --- how long, and what remains of it


async def test_answer_counts_for_a_day(fresh: str) -> None:
    async with running_secrets() as service:
        admin = under(fresh, service.admin)
        await admin.create_scope(fresh)
        service.clock.offset += DAY - 10
        await admin.create_scope(fresh)
        service.clock.offset += 20
        assert (await refusal(admin.create_scope(fresh))).reason == "RESOURCE_ALREADY_EXISTS"
        await admin.put(fresh, "key", "value")  # the id is free again
        assert recorded(service) == {fresh}


async def test_retry_after_a_restart_gives_the_first_answer(fresh: str) -> None:
    with data_directory() as directory:
        made = []
        for _ in range(2):
            async with running_secrets(directory) as service:
                made.append(await create_token(under(fresh, service.admin)))
        assert made[0] == made[1]


async def test_nothing_of_an_answer_or_of_its_request_can_be_read_in_the_files(fresh: str) -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            made = await create_token(under(fresh, service.admin))
            await under(f"{fresh}-scope", service.admin).create_scope(fresh)
            await under(f"{fresh}-put", service.admin).put(fresh, "key", "canary-value")
            records = b"".join(row[5] for row in content(service, answers=True)["answers"])
        stored = b"".join(path.read_bytes() for path in service.settings.database.parent.iterdir())
    fingerprint = pb.PutSecretRequest(scope=fresh, key="key", string_value="canary-value").SerializeToString()
    told = hashlib.sha256(b"/tessera.secrets.v1.Secrets/PutSecret\n" + fingerprint)
    for canary in (made.token_value.encode(), b"canary-value", told.digest(), told.hexdigest().encode()):
        assert canary not in stored
    assert made.token_info.token_id.encode() in stored
    assert made.token_info.token_id.encode() not in records


async def test_damaged_answer_is_said_and_changes_nothing(service: RunningSecrets, fresh: str) -> None:
    admin = under(fresh, service.admin)
    await admin.create_scope(fresh)
    with closing(sqlite3.connect(service.settings.database)) as connection:
        connection.execute("UPDATE answers SET record = zeroblob(100) WHERE request_id = ?", (fresh,))
        connection.commit()
    before = content(service)
    assert (await refusal(admin.create_scope(fresh))).reason == "DATA_LOSS"
    assert content(service) == before


async def test_answer_that_was_moved_to_another_id_is_not_given(service: RunningSecrets, fresh: str) -> None:
    await create_token(under(fresh, service.admin))
    with closing(sqlite3.connect(service.settings.database)) as connection:
        connection.execute("UPDATE answers SET request_id = ? WHERE request_id = ?", (f"{fresh}-moved", fresh))
        connection.commit()
    assert (await refusal(create_token(under(f"{fresh}-moved", service.admin)))).reason == "DATA_LOSS"


# --- what else changed meanwhile


async def test_caller_gets_its_own_answer_whatever_it_may_do_by_then(service: RunningSecrets, fresh: str) -> None:
    user = await service.user(fresh)
    await service.admin.create_scope(fresh)
    await service.admin.grant(fresh, fresh, pb.WRITE)
    await under(fresh, user).put(fresh, "key", "value")
    await service.admin(service.admin.secrets.DeleteAcl, pb.DeleteAclRequest(scope=fresh, principal=fresh))
    await under(fresh, user).put(fresh, "key", "value")
    assert (await refusal(user.put(fresh, "key", "value"))).code is grpc.StatusCode.PERMISSION_DENIED
    assert [each.version for each in await service.admin.versions(fresh, "key")] == [1]


async def test_deactivated_caller_gets_nothing(service: RunningSecrets, fresh: str) -> None:
    user = await service.user(fresh)
    made = under(fresh, user)
    await create_token(made)
    [found] = (
        await service.admin(service.admin.scim.ListUsers, identity.ListRequest(filter=f'userName eq "{fresh}"'))
    ).resources
    request = identity.PatchRequest(id=found.id)
    request.operations.add(op="replace", path="active").value.bool_value = False
    await service.admin(service.admin.scim.PatchUser, request)
    assert (await refusal(create_token(made))).code is grpc.StatusCode.PERMISSION_DENIED


async def test_answers_go_with_their_caller(service: RunningSecrets, fresh: str) -> None:
    user = await service.user(fresh)
    await under(fresh, user).create_scope(fresh)
    me = await user(user.scim.GetMe, identity.GetMeRequest())
    assert fresh in recorded(service)
    await service.admin(service.admin.scim.DeleteUser, identity.DeleteRequest(id=me.id))
    assert fresh not in recorded(service)


async def test_admin_can_delete_itself_under_an_id(service: RunningSecrets, fresh: str) -> None:
    user = await service.user(fresh)
    me = await user(user.scim.GetMe, identity.GetMeRequest())
    admins = (
        await service.admin(service.admin.scim.ListGroups, identity.ListRequest(filter='displayName eq "admins"'))
    ).resources[0]
    request = identity.PatchRequest(id=admins.id)
    request.operations.add(op="add", path="members").value.list_value.add_struct().update({"value": me.id})
    await service.admin(service.admin.scim.PatchGroup, request)
    chosen = under(fresh, user)
    await chosen(chosen.scim.DeleteUser, identity.DeleteRequest(id=me.id))
    assert (await refusal(chosen(chosen.scim.DeleteUser, identity.DeleteRequest(id=me.id)))).code is (
        grpc.StatusCode.PERMISSION_DENIED
    )


async def test_retry_does_not_meet_the_throttle_of_tokens(fresh: str) -> None:
    async with running_secrets(tokens_per_minute=2) as service:
        admin = under(fresh, service.admin)
        made = [await create_token(admin) for _ in range(3)]
        assert made == [made[0]] * 3
        await create_token(service.admin)
        assert (await refusal(create_token(service.admin))).reason == "REQUEST_LIMIT_EXCEEDED"
        assert await create_token(admin) == made[0]


async def create_token(caller: Caller) -> identity.CreateTokenResponse:
    answer: identity.CreateTokenResponse = await caller(
        caller.tokens.CreateToken, identity.CreateTokenRequest(comment="mine")
    )
    return answer


# --- at the same time, and when the first answer is lost


async def test_duplicates_at_the_same_time_are_made_once(service: RunningSecrets, fresh: str) -> None:
    user = await service.user(fresh)
    made = await asyncio.gather(*(create_token(under(fresh, user)) for _ in range(20)))
    assert made == [made[0]] * 20
    listed = await user(user.tokens.ListTokens, identity.ListTokensRequest())
    assert [token.comment for token in listed.token_infos].count("mine") == 1


class Writer:
    """The connection that writes, which a test may hold up or let fail while it serves a request with a chosen id.

    `statements` counts those of one transaction, its BEGIN and its COMMIT included; `has_failed` tells that one did.
    """

    def __init__(self) -> None:
        self.fails_at: int | None = None
        self.fails_after_commit = False
        self.has_failed = False
        self.statements = 0
        self.has_committed = threading.Event()
        self.may_return = threading.Event()
        self.may_return.set()
        self._transaction = database._transaction

    def transaction(self, connection: Any, begin: str, *args: Any, **kwargs: Any) -> Any:
        # The audit log and the rotation of keys have transactions of their own, at any moment.
        if begin != "BEGIN IMMEDIATE" or once.chosen_id() is None:
            return self._transaction(connection, begin, *args, **kwargs)
        self.statements = 0
        result = self._transaction(_Failing(connection, self), begin, *args, **kwargs)  # type: ignore[arg-type]
        self.has_committed.set()
        assert self.may_return.wait(10)
        if self.fails_after_commit:
            self.has_failed = True
            raise sqlite3.OperationalError("disk I/O error")
        return result

    def count(self) -> None:
        self.statements += 1
        if self.statements == self.fails_at:
            self.has_failed = True
            raise sqlite3.OperationalError("disk I/O error")


class _Failing:
    """A connection whose statements are counted, and one of which may fail."""

    def __init__(self, connection: Connection, writer: Writer) -> None:
        self._connection = connection
        self._writer = writer

    def execute(self, sql: str, *args: Any) -> Any:
        if sql != "ROLLBACK":
            self._writer.count()
        return self._connection.execute(sql, *args)

    def executemany(self, *args: Any) -> Any:
        self._writer.count()
        return self._connection.executemany(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    held = Writer()
    monkeypatch.setattr(database, "_transaction", held.transaction)
    yield held
    held.may_return.set()


async def test_retry_after_a_lost_reply_gives_the_answer(service: RunningSecrets, fresh: str, writer: Writer) -> None:
    user = await service.user(fresh)
    admin = under(fresh, user)
    writer.has_committed.clear()
    writer.may_return.clear()
    lost = asyncio.create_task(create_token(admin))
    assert await asyncio.to_thread(writer.has_committed.wait, 10)
    lost.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lost
    writer.may_return.set()
    made = [await create_token(admin) for _ in range(2)]
    assert made[0] == made[1]
    listed = await user(user.tokens.ListTokens, identity.ListTokensRequest())
    assert [token.comment for token in listed.token_infos].count("mine") == 1


FAULTY = ("CreateScope", "PutSecret", "RestoreSecret", "PurgeSecret", "CreateToken", "CreateUser", "PatchGroup")


@pytest.mark.parametrize("name", FAULTY)
async def test_retry_after_a_fault_at_any_statement_makes_the_change_once(
    service: RunningSecrets, writer: Writer, name: str
) -> None:
    stub, _ = next(each for each in PUBLIC if each[1].name == name)

    async def tried(fails_at: int | None, *, after_commit: bool = False) -> bool:
        """One change that fails there, if it comes that far, and its retry; whether it failed."""
        fresh = f"f{next(_numbers)}"
        admin = under(fresh, service.admin)
        request = await CHANGES[name](service.admin, fresh)
        call = getattr(getattr(admin, stub), name)
        before = content(service, answers=True)
        writer.fails_at, writer.fails_after_commit, writer.has_failed = fails_at, after_commit, False
        try:
            first: Any = (await asyncio.gather(admin(call, request), return_exceptions=True))[0]
        finally:
            writer.fails_at, writer.fails_after_commit = None, False
        assert isinstance(first, grpc.aio.AioRpcError) is writer.has_failed
        if writer.has_failed:
            assert (await refusal(failing(first))).reason == "INTERNAL_ERROR"
            assert (content(service, answers=True) == before) is not after_commit
            done = content(service) if after_commit else None
            first = await admin(call, request)
            assert done is None or content(service) == done
        done = content(service)
        assert await admin(call, request) == first
        assert content(service) == done
        return writer.has_failed

    await tried(None)  # with which a service that has just begun has done what it still had to
    # How many statements there are may differ by one: the audit log's head is found otherwise when it was just emptied.
    reached = 0
    while await tried(reached + 1):
        reached += 1
    assert reached > 5
    assert await tried(None, after_commit=True)


async def test_retry_after_a_full_disk_makes_the_change_once(
    service: RunningSecrets, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transaction = database._transaction
    limit: int | None = 0

    def on_a_full_disk(connection: SqliteConnection, begin: str, *args: Any, **kwargs: Any) -> Any:
        if begin == "BEGIN IMMEDIATE":
            # No page more than there are, or any number.
            connection.execute(f"PRAGMA max_page_count={1 if limit == 0 else 1 << 30}")
        return transaction(connection, begin, *args, **kwargs)

    await service.admin.create_scope(fresh)
    admin = under(fresh, service.admin)
    before = content(service, answers=True)
    monkeypatch.setattr(database, "_transaction", on_a_full_disk)
    assert (await refusal(admin.put(fresh, "key", "v" * 100_000))).reason == "TEMPORARILY_UNAVAILABLE"
    assert content(service, answers=True) == before
    limit = None
    for _ in range(2):
        await admin.put(fresh, "key", "v" * 100_000)
    assert [each.version for each in await service.admin.versions(fresh, "key")] == [1]


async def test_retry_is_answered_when_what_it_destroyed_is_gone_from_the_files(
    service: RunningSecrets, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call may still be on its way to that."""
    await a_scope(service.admin, fresh)
    erased = 0
    erase = database.Database.erase

    async def counted(self: database.Database) -> None:
        nonlocal erased
        await erase(self)
        erased += 1

    monkeypatch.setattr(database.Database, "erase", counted)
    for times in (1, 2):
        await under(f"{fresh}-id", service.admin).purge(fresh, "key")
        assert erased == times


# --- any sequence


keys = st.sampled_from(["one", "two"])
steps = st.lists(
    st.tuples(
        st.one_of(
            st.tuples(st.just("put"), keys, st.sampled_from(["a", "b"])),
            st.tuples(st.just("delete"), keys),
            st.tuples(st.just("restore"), keys, st.integers(1, 3)),
            st.tuples(st.just("purge"), keys),
        ),
        # At once, and after so many more steps.
        st.lists(st.integers(0, 5), max_size=3),
    ),
    min_size=1,
    max_size=15,
)


class Played:
    """A service on which sequences are played, each in two scopes of its own."""

    def __init__(self, runner: asyncio.Runner, service: RunningSecrets) -> None:
        self._runner = runner
        self._admin = service.admin

    def play(self, sequence: list[tuple[Any, list[int]]]) -> None:
        self._runner.run(self._played(sequence))

    async def _played(self, sequence: list[tuple[Any, list[int]]]) -> None:
        run = f"run{next(_numbers)}"
        plain, retried = f"{run}.plain", f"{run}.retried"
        for scope in (plain, retried):
            await self._admin.create_scope(scope)
        expected = [await self._done(self._admin, plain, step) for step, _ in sequence]
        due: dict[int, list[int]] = {}
        for index, (step, delays) in enumerate(sequence):
            assert await self._done(under(f"{run}.{index}", self._admin), retried, step) == expected[index]
            for delay in delays:
                # A refused request is judged anew: its retry is one only while nothing else has happened.
                due.setdefault(index + (0 if "refused" in expected[index] else delay), []).append(index)
            for again in due.pop(index, ()):
                caller = under(f"{run}.{again}", self._admin)
                assert await self._done(caller, retried, sequence[again][0]) == expected[again]
        assert await self._state(retried) == await self._state(plain)

    async def _done(self, caller: Caller, scope: str, step: tuple[Any, ...]) -> Any:
        try:
            return "answered", await getattr(caller, step[0])(scope, *step[1:])
        except grpc.aio.AioRpcError as error:
            return "refused", error.code()

    async def _state(self, scope: str) -> Any:
        found = {}
        for key in await self._admin.keys(scope):
            versions = await self._admin.versions(scope, key)
            shown = [(each.version, each.current) for each in versions]
            found[key] = (shown, await self._admin.get(scope, key))
        return found


@pytest.fixture(scope="module")
def played() -> Iterator[Played]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            yield Played(runner, runner.run(stack.enter_async_context(running_secrets())))
        finally:
            runner.run(stack.aclose())


@settings(max_examples=60)
@given(sequence=steps)
def test_sequence_with_retries_has_the_effect_of_the_sequence(
    played: Played, sequence: list[tuple[Any, list[int]]]
) -> None:
    played.play(sequence)
