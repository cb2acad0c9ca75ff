"""Who may do what in a scope, over real gRPC: contract 4.5 and the permission rows of 4.2."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from secrets_service import scopes, store
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.secrets import Caller, RunningSecrets, refusal, running_secrets


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


@pytest.fixture
async def alice(service: RunningSecrets) -> Caller:
    """Owner of the scope `Shop`, which holds `key`."""
    alice = await service.user("alice")
    await alice.create_scope("Shop")
    await alice.put("Shop", "key", "value")
    return alice


READING: dict[str, Callable[[Caller], Awaitable[Any]]] = {
    "GetSecret": lambda caller: caller.get("shop", "key"),
    "ListSecrets": lambda caller: caller.keys("shop"),
}
WRITING: dict[str, Callable[[Caller], Awaitable[Any]]] = {
    "PutSecret": lambda caller: caller.put("shop", "new", "value"),
    "DeleteSecret": lambda caller: caller.delete("shop", "key"),
}
MANAGING: dict[str, Callable[[Caller], Awaitable[Any]]] = {
    "PutAcl": lambda caller: caller.grant("shop", "users", pb.READ),
    "ListAcls": lambda caller: caller.acls("shop"),
    "GetAcl": lambda caller: caller(caller.secrets.GetAcl, pb.GetAclRequest(scope="shop", principal="alice")),
    "DeleteAcl": lambda caller: caller(caller.secrets.DeleteAcl, pb.DeleteAclRequest(scope="shop", principal="alice")),
    "DeleteScope": lambda caller: caller(caller.secrets.DeleteScope, pb.DeleteScopeRequest(scope="shop")),
}
NEEDED = (
    [(name, call, pb.READ) for name, call in READING.items()]
    + [(name, call, pb.WRITE) for name, call in WRITING.items()]
    + [(name, call, pb.MANAGE) for name, call in MANAGING.items()]
)


@pytest.mark.parametrize(("name", "call", "needed"), NEEDED, ids=[row[0] for row in NEEDED])
@pytest.mark.parametrize("through", ["bob", "users"])
async def test_each_operation_needs_its_permission(
    service: RunningSecrets,
    alice: Caller,
    name: str,
    call: Callable[[Caller], Awaitable[Any]],
    needed: int,
    through: str,
) -> None:
    bob = await service.user("bob")
    for held in (pb.ACL_PERMISSION_UNSPECIFIED, pb.READ, pb.WRITE, pb.MANAGE):
        if held:
            await alice.grant("Shop", through, held)
        if held < needed:
            refused = await refusal(call(bob))
            assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
            permission = pb.AclPermission.Name(pb.AclPermission.ValueType(needed))
            assert refused.message == f"User bob does not have {permission} permission on scope Shop"
        else:
            await call(bob)
            return


async def test_without_permission_nobody_learns_which_keys_exist(service: RunningSecrets, alice: Caller) -> None:
    bob = await service.user("bob")
    assert await refusal(bob.get("Shop", "key")) == await refusal(bob.get("Shop", "nokey"))
    assert await refusal(bob.delete("Shop", "key")) == await refusal(bob.delete("Shop", "nokey"))
    assert await refusal(bob.put("Shop", "key", "value")) == await refusal(bob.put("Shop", "nokey", "value"))
    await alice.grant("Shop", "bob", pb.READ)  # READ lists keys, so what is refused now may say no more than before
    assert await refusal(bob.delete("Shop", "key")) == await refusal(bob.delete("Shop", "nokey"))


async def test_key_is_not_even_looked_for_where_one_may_not_read(
    service: RunningSecrets, alice: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    bob = await service.user("bob")
    looked: list[str] = []

    def find_secret(connection: Any, scope: Any, key: str, find: Any = store.find_secret) -> Any:
        looked.append(key)
        return find(connection, scope, key)

    monkeypatch.setattr(store, "find_secret", find_secret)
    for key in ("key", "nokey"):
        assert (await refusal(bob.get("Shop", key))).code is grpc.StatusCode.PERMISSION_DENIED
    assert looked == []
    await alice.get("Shop", "key")
    assert looked == ["key"]


async def test_admins_manage_every_scope_without_being_listed(service: RunningSecrets, alice: Caller) -> None:
    assert await service.admin.get("Shop", "key") == b"value"
    assert await service.admin.acls("Shop") == [("alice", "MANAGE")]
    # Also after the last MANAGE is gone.
    await alice.grant("Shop", "alice", pb.READ)
    assert (await refusal(alice.acls("Shop"))).code is grpc.StatusCode.PERMISSION_DENIED
    await service.admin.grant("Shop", "alice", pb.MANAGE)
    assert await alice.acls("Shop") == [("alice", "MANAGE")]
    await alice(alice.secrets.DeleteAcl, pb.DeleteAclRequest(scope="Shop", principal="alice"))
    assert await service.admin.acls("Shop") == []
    await service.admin(service.admin.secrets.DeleteScope, pb.DeleteScopeRequest(scope="Shop"))


async def test_creator_or_users_get_manage(service: RunningSecrets, alice: Caller) -> None:
    assert await alice.acls("Shop") == [("alice", "MANAGE")]
    await alice.create_scope("Everybodys", "users")
    assert await alice.acls("Everybodys") == [("users", "MANAGE")]
    bob = await service.user("bob")
    await bob.grant("Everybodys", "users", pb.READ)
    assert await service.admin.acls("Everybodys") == [("users", "READ")]


async def test_strongest_of_user_and_groups_counts(service: RunningSecrets, alice: Caller) -> None:
    bob = await service.user("bob")
    await alice.grant("Shop", "bob", pb.WRITE)
    await alice.grant("Shop", "users", pb.READ)
    await bob.put("Shop", "key", "bob's")
    await alice.grant("Shop", "bob", pb.READ)
    await alice.grant("Shop", "users", pb.WRITE)
    await bob.put("Shop", "key", "everybody's")


async def test_put_overwrites_and_keeps_the_place_in_the_list(service: RunningSecrets, alice: Caller) -> None:
    await service.user("bob")
    await alice.grant("Shop", "users", pb.READ)
    await alice.grant("Shop", "bob", pb.MANAGE)
    await alice.grant("Shop", "users", pb.WRITE)
    assert await alice.acls("Shop") == [("alice", "MANAGE"), ("users", "WRITE"), ("bob", "MANAGE")]
    answer = await alice(alice.secrets.GetAcl, pb.GetAclRequest(scope="SHOP", principal="users"))
    assert (answer.principal, answer.permission) == ("users", pb.WRITE)


async def test_user_is_named_in_every_letter_case_and_shown_as_created(service: RunningSecrets, alice: Caller) -> None:
    await service.user("Zoë@Example.com")
    await alice.grant("Shop", "zoe\u0308@EXAMPLE.com", pb.READ)
    await alice.grant("Shop", "ZOË@example.com", pb.WRITE)
    assert await alice.acls("Shop") == [("alice", "MANAGE"), ("Zoë@Example.com", "WRITE")]
    await alice(alice.secrets.DeleteAcl, pb.DeleteAclRequest(scope="Shop", principal="zoë@example.com"))
    assert await alice.acls("Shop") == [("alice", "MANAGE")]


@pytest.mark.parametrize("principal", ["nobody", "", " users", "users\n", "x" * 256])
async def test_permission_for_nobody_is_refused(alice: Caller, principal: str) -> None:
    refused = await refusal(alice.grant("Shop", principal, pb.READ))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER_VALUE")
    assert refused.message.startswith("principal:")


@pytest.mark.parametrize("permission", [0, 4, -1])
async def test_bad_permission_is_refused(alice: Caller, permission: pb.AclPermission.ValueType) -> None:
    refused = await refusal(alice.grant("Shop", "users", permission))
    assert refused.reason == "INVALID_PARAMETER_VALUE"
    assert refused.message.startswith("permission:")


async def test_acl_that_does_not_exist_is_not_found(service: RunningSecrets, alice: Caller) -> None:
    await service.user("bob")  # may read nothing: exists, and has no ACL
    for principal in ("bob", "users", "nobody"):
        for method, request in (
            (alice.secrets.GetAcl, pb.GetAclRequest(scope="Shop", principal=principal)),
            (alice.secrets.DeleteAcl, pb.DeleteAclRequest(scope="Shop", principal=principal)),
        ):
            refused = await refusal(alice(method, request))
            assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_DOES_NOT_EXIST")
            assert principal in refused.message


async def test_implicit_permission_of_admins_is_no_acl(service: RunningSecrets, alice: Caller) -> None:
    refused = await refusal(alice(alice.secrets.GetAcl, pb.GetAclRequest(scope="Shop", principal="admins")))
    assert refused.reason == "RESOURCE_DOES_NOT_EXIST"


async def test_length_of_an_acl_is_limited(
    service: RunningSecrets, alice: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scopes, "MOST_ACLS", 2)
    await alice.grant("Shop", "users", pb.READ)
    assert (await refusal(alice.grant("Shop", "admins", pb.READ))).reason == "RESOURCE_LIMIT_EXCEEDED"
    await alice.grant("Shop", "users", pb.WRITE)
