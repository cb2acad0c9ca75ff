"""Grants of launches over real gRPC: who may have what launched with which secrets (security standard, section 4)."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from secrets_service import grants
from tessera.identity.v1 import identity_pb2
from tessera.identity.v1 import permissions_pb2 as levels
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.secrets import (
    DIGEST,
    Caller,
    RunningSecrets,
    as_messages,
    data_directory,
    failures_of,
    refusal,
    running_secrets,
)
from tests.support.stores import rewrite

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"
PASSWORD = ("shop", "DB.PASSWORD")
OTHER_DIGEST = b"something else runs".ljust(32, b".")


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


@pytest.fixture
async def alice(service: RunningSecrets) -> Caller:
    """Owner of the scope `Shop`, which holds `Db.Password`."""
    alice = await service.user("alice@example.com")
    await alice.create_scope("Shop")
    await alice.put("Shop", "Db.Password", "s3cret")
    return alice


@pytest.fixture
async def bob(service: RunningSecrets) -> Caller:
    return await service.user("bob")


async def allow(owner: Caller, endpoint_id: str, name: str) -> None:
    """Lets a user change an endpoint."""
    entry = levels.AccessControlRequest(user_name=name, permission_level=levels.CAN_MANAGE)
    request = levels.UpdatePermissionsRequest(serving_endpoint_id=endpoint_id, access_control_list=[entry])
    await owner(owner.permissions.UpdatePermissions, request)


async def set_active(service: RunningSecrets, name: str, *, is_active: bool) -> None:
    admin = service.admin
    users = await admin(admin.scim.ListUsers, identity_pb2.ListRequest(filter=f'userName eq "{name}"'))
    change = identity_pb2.PatchOperation(op="replace", path="active")
    change.value.bool_value = is_active
    await admin(admin.scim.PatchUser, identity_pb2.PatchRequest(id=users.resources[0].id, operations=[change]))


async def delete_user(service: RunningSecrets, name: str) -> None:
    admin = service.admin
    users = await admin(admin.scim.ListUsers, identity_pb2.ListRequest(filter=f'userName eq "{name}"'))
    await admin(admin.scim.DeleteUser, identity_pb2.DeleteRequest(id=users.resources[0].id))


def kinds(answer: pb.GrantLaunchesResponse | pb.ResolveResponse) -> list[str]:
    return [failure[2] for failure in failures_of(answer)]


async def test_what_was_granted_is_handed_out_in_the_order_of_the_references(
    service: RunningSecrets, alice: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await alice.put("Shop", "empty", "")
    references = [("shop", "EMPTY"), ("SHOP", "db.password"), ("Shop", "empty")]
    endpoint_id, granted = await service.grant(alice, *references)
    assert not granted.failures
    answer = await service.resolve(endpoint_id, *references)
    assert list(answer.values) == [b"", b"s3cret", b""]
    assert not answer.failures
    [event] = [vars(record) for record in caplog.records if record.message == "secrets resolved"]
    facts = {"endpoint": endpoint_id, "replica": "r1", "version": 1, "references": 3, "failures": 0}
    assert {name: event[name] for name in facts} == facts


async def test_one_failure_keeps_everything_back(service: RunningSecrets, alice: Caller) -> None:
    await alice.put("Shop", "binary", "text")
    await service.admin.create_scope("Vault", "users")
    await service.admin.put("Vault", "k", "x")
    references = [("Shop", "Db.Password"), ("Shop", "binary"), ("vault", "k")]
    endpoint_id, granted = await service.grant(alice, *references)
    assert not granted.failures
    await alice.put("Shop", "binary", b"\xff")
    await service.admin(service.admin.secrets.DeleteScope, pb.DeleteScopeRequest(scope="Vault"))
    answer = await service.resolve(endpoint_id, *references)
    assert list(answer.values) == []
    assert failures_of(answer) == [("Shop", "binary", "NOT_TEXT", ""), ("vault", "k", "SCOPE_MISSING", "")]
    again, granted = await service.grant(alice, *references)
    assert kinds(granted) == ["NOT_TEXT", "SCOPE_MISSING"]
    assert kinds(await service.resolve(again, ("Shop", "Db.Password"))) == ["NOT_GRANTED"]


async def test_without_read_nobody_learns_which_keys_there_are(
    service: RunningSecrets, alice: Caller, bob: Caller
) -> None:
    _, granted = await service.grant(bob, PASSWORD, ("Shop", "nokey"))
    assert [failure[2:] for failure in failures_of(granted)] == [("NOT_PERMITTED", "bob")] * 2
    _, granted = await service.grant(alice, ("Shop", "nokey"), ("Nope", "k"))
    assert kinds(granted) == ["KEY_MISSING", "SCOPE_MISSING"]


# --- the rules of the standard, by their letters ---


async def test_a_author_without_read_cannot_add_a_reference(
    service: RunningSecrets, alice: Caller, bob: Caller
) -> None:
    endpoint_id, _ = await service.grant(alice)
    await allow(alice, endpoint_id, "bob")
    _, granted = await service.grant(bob, PASSWORD, endpoint_id=endpoint_id, version=2)
    assert failures_of(granted) == [(*PASSWORD, "NOT_PERMITTED", "bob")]
    assert kinds(await service.resolve(endpoint_id, PASSWORD, version=2)) == ["NOT_GRANTED"]
    await alice.grant("Shop", "bob", pb.READ)
    _, granted = await service.grant(bob, PASSWORD, endpoint_id=endpoint_id, version=2)
    assert not granted.failures
    assert list((await service.resolve(endpoint_id, PASSWORD, version=2)).values) == [b"s3cret"]


async def test_b_author_without_read_cannot_change_what_runs_while_references_remain(
    service: RunningSecrets, alice: Caller, bob: Caller
) -> None:
    endpoint_id, _ = await service.grant(alice, PASSWORD)
    await allow(alice, endpoint_id, "bob")
    _, granted = await service.grant(bob, PASSWORD, endpoint_id=endpoint_id, version=2, digest=OTHER_DIGEST)
    assert failures_of(granted) == [(*PASSWORD, "NOT_PERMITTED", "bob")]
    # Neither under the digest of before: what is referenced is part of what was vouched for.
    _, granted = await service.grant(bob, PASSWORD, ("Shop", "more"), endpoint_id=endpoint_id, version=2)
    assert set(kinds(granted)) == {"NOT_PERMITTED"}
    # To scale or shift traffic is to run the same.
    _, granted = await service.grant(bob, PASSWORD, endpoint_id=endpoint_id, version=2)
    assert not granted.failures
    assert list((await service.resolve(endpoint_id, PASSWORD, version=2)).values) == [b"s3cret"]


async def test_b_can_be_relaxed_to_the_creators_right_alone() -> None:
    async with running_secrets(authors_need_read=False) as service:
        alice = await service.user("alice")
        bob = await service.user("bob")
        await alice.create_scope("Shop")
        for key in ("Db.Password", "other"):
            await alice.put("Shop", key, "s3cret")
        endpoint_id, _ = await service.grant(alice, PASSWORD)
        await allow(alice, endpoint_id, "bob")
        _, granted = await service.grant(bob, PASSWORD, endpoint_id=endpoint_id, version=2, digest=OTHER_DIGEST)
        assert not granted.failures
        # A reference that is new to the endpoint is still the author's to vouch for.
        _, granted = await service.grant(bob, PASSWORD, ("Shop", "other"), endpoint_id=endpoint_id, version=3)
        assert failures_of(granted) == [("Shop", "other", "NOT_PERMITTED", "bob")]


async def test_c_creator_without_read_is_refused_at_the_grant_and_at_the_launch(
    service: RunningSecrets, alice: Caller, bob: Caller
) -> None:
    endpoint_id, _ = await service.grant(bob)
    await allow(bob, endpoint_id, "alice@example.com")
    # The author's right does not stand in for the creator's.
    _, granted = await service.grant(alice, PASSWORD, endpoint_id=endpoint_id, version=2)
    assert failures_of(granted) == [(*PASSWORD, "NOT_PERMITTED", "bob")]
    await alice.grant("Shop", "bob", pb.READ)
    _, granted = await service.grant(alice, PASSWORD, endpoint_id=endpoint_id, version=2)
    assert not granted.failures
    await alice(alice.secrets.DeleteAcl, pb.DeleteAclRequest(scope="Shop", principal="bob"))
    answer = await service.resolve(endpoint_id, PASSWORD, version=2)
    assert (list(answer.values), failures_of(answer)) == ([], [(*PASSWORD, "NOT_PERMITTED", "bob")])


async def test_d_creator_who_is_not_active_or_gone_is_refused(service: RunningSecrets, alice: Caller) -> None:
    endpoint_id, _ = await service.grant(alice, PASSWORD)
    await set_active(service, "alice@example.com", is_active=False)
    assert failures_of(await service.resolve(endpoint_id, PASSWORD)) == [
        (*PASSWORD, "CREATOR_INACTIVE", "alice@example.com")
    ]
    _, granted = await service.grant(service.admin, endpoint_id=endpoint_id, version=2)
    assert granted.creator_is_inactive  # also where nothing is referenced
    await set_active(service, "alice@example.com", is_active=True)
    assert list((await service.resolve(endpoint_id, PASSWORD)).values) == [b"s3cret"]
    await delete_user(service, "alice@example.com")
    again = await service.user("alice@example.com")  # another one, whatever its name
    await service.admin.grant("Shop", "alice@example.com", pb.READ)
    assert failures_of(await service.resolve(endpoint_id, PASSWORD)) == [(*PASSWORD, "CREATOR_INACTIVE", "")]
    serving = await service.as_serving(again)
    request = pb.GrantLaunchesRequest(endpoint_id=endpoint_id, version=2)
    assert (await refusal(serving(serving.resolver.GrantLaunches, request))).reason == MISSING


async def test_e_only_what_was_granted_is_handed_out(service: RunningSecrets, alice: Caller) -> None:
    await alice.put("Shop", "other", "more")
    mine, _ = await service.grant(alice, PASSWORD)
    yours, _ = await service.grant(alice, ("Shop", "other"))
    for attempt in (
        service.resolve(mine, ("Shop", "other")),  # a reference outside the grant
        service.resolve(yours, PASSWORD),  # what another endpoint was granted
        service.resolve(mine, PASSWORD, version=2),  # a configuration that was not granted
        service.resolve(mine, PASSWORD, digest=OTHER_DIGEST),  # something else that is to run
        service.resolve(uuid.uuid4().hex, PASSWORD),  # an endpoint that nobody made
    ):
        answer = await attempt
        assert (list(answer.values), kinds(answer)) == ([], ["NOT_GRANTED"])
    answer = await service.resolve(mine, PASSWORD, ("Shop", "other"))
    assert (list(answer.values), kinds(answer)) == ([], ["NOT_GRANTED"])


async def test_e_a_configuration_that_is_over_is_not_launched(service: RunningSecrets, alice: Caller) -> None:
    endpoint_id, _ = await service.grant(alice, PASSWORD)
    for version in (2, 3):
        await service.grant(alice, PASSWORD, endpoint_id=endpoint_id, version=version, digest=OTHER_DIGEST)
    await service.settle(dropped_configs=[pb.ConfigVersions(endpoint_id=endpoint_id, versions=[1])])
    assert kinds(await service.resolve(endpoint_id, PASSWORD)) == ["NOT_GRANTED"]
    assert not kinds(await service.resolve(endpoint_id, PASSWORD, version=2, digest=OTHER_DIGEST))
    # Nor does it vouch for anything any more.
    bob = await service.user("bob")
    await allow(alice, endpoint_id, "bob")
    _, granted = await service.grant(bob, PASSWORD, endpoint_id=endpoint_id, version=4)
    assert kinds(granted) == ["NOT_PERMITTED"]
    existing = pb.ExistingEndpoint(endpoint_id=endpoint_id, versions=[3])
    await service.reconcile(endpoints=[existing])
    assert kinds(await service.resolve(endpoint_id, PASSWORD, version=2, digest=OTHER_DIGEST)) == ["NOT_GRANTED"]
    assert not kinds(await service.resolve(endpoint_id, PASSWORD, version=3, digest=OTHER_DIGEST))


async def test_f_a_scope_that_was_made_anew_is_judged_by_its_own_acl_and_told_of(
    service: RunningSecrets, alice: Caller, bob: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[str]:
        return [vars(each)["scope"] for each in caplog.records if "scope was made anew" in each.message]

    await alice.grant("Shop", "bob", pb.READ)
    endpoint_id, _ = await service.grant(bob, PASSWORD)
    await alice(alice.secrets.DeleteScope, pb.DeleteScopeRequest(scope="Shop"))
    await service.admin.create_scope("SHOP")
    await service.admin.put("SHOP", "db.password", "new one")
    assert failures_of(await service.resolve(endpoint_id, PASSWORD)) == [(*PASSWORD, "NOT_PERMITTED", "bob")]
    assert told() == []
    await service.admin.grant("SHOP", "bob", pb.READ)
    assert list((await service.resolve(endpoint_id, PASSWORD)).values) == [b"new one"]
    assert told() == ["shop"]
    assert list((await service.resolve(endpoint_id, PASSWORD)).values) == [b"new one"]
    assert told() == ["shop"]


async def test_g_a_deleted_endpoint_has_no_grant_and_never_gets_one_again(
    service: RunningSecrets, alice: Caller
) -> None:
    endpoint_id, _ = await service.grant(alice, PASSWORD)
    await service.settle(deleted_endpoint_ids=[endpoint_id])
    assert kinds(await service.resolve(endpoint_id, PASSWORD)) == ["NOT_GRANTED"]
    serving = await service.as_serving(alice)
    for is_new in (False, True):
        request = pb.GrantLaunchesRequest(endpoint_id=endpoint_id, is_new=is_new, version=2)
        assert (await refusal(serving(serving.resolver.GrantLaunches, request))).reason == MISSING
    # Also when the end is told before the grant arrives.
    early = uuid.uuid4().hex
    await service.settle(deleted_endpoint_ids=[early])
    request = pb.GrantLaunchesRequest(endpoint_id=early, is_new=True, version=1)
    assert (await refusal(serving(serving.resolver.GrantLaunches, request))).reason == MISSING
    await service.settle(deleted_endpoint_ids=[endpoint_id])  # told twice


async def test_h_creator_who_loses_read_is_named_with_scope_and_key_and_holds_what_runs(
    service: RunningSecrets, alice: Caller, bob: Caller
) -> None:
    await alice.grant("Shop", "bob", pb.READ)
    endpoint_id, _ = await service.grant(bob, PASSWORD)
    await service.resolve(endpoint_id, PASSWORD, replica_id="running")
    await alice(alice.secrets.DeleteAcl, pb.DeleteAclRequest(scope="Shop", principal="bob"))
    answer = await service.resolve(endpoint_id, PASSWORD, replica_id="next")
    assert failures_of(answer) == [(*PASSWORD, "NOT_PERMITTED", "bob")]
    [version] = await alice.versions("Shop", "db.password")
    assert version.held


# --- around them ---


async def test_grants_are_given_on_somebodys_behalf_only(service: RunningSecrets) -> None:
    serving = service.peer("serving")
    request = pb.GrantLaunchesRequest(endpoint_id=uuid.uuid4().hex, is_new=True)
    refused = await refusal(serving(serving.resolver.GrantLaunches, request))
    assert refused.code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_change_needs_can_manage_here_too(service: RunningSecrets, alice: Caller, bob: Caller) -> None:
    endpoint_id, _ = await service.grant(alice)
    serving = await service.as_serving(bob)
    request = pb.GrantLaunchesRequest(endpoint_id=endpoint_id, version=2)
    hidden = await refusal(serving(serving.resolver.GrantLaunches, request))
    entry = levels.AccessControlRequest(user_name="bob", permission_level=levels.CAN_QUERY)
    update = levels.UpdatePermissionsRequest(serving_endpoint_id=endpoint_id, access_control_list=[entry])
    await alice(alice.permissions.UpdatePermissions, update)
    refused = await refusal(serving(serving.resolver.GrantLaunches, request))
    assert (hidden.reason, refused.reason) == (MISSING, "PERMISSION_DENIED")


async def test_the_same_grant_again_is_the_same(service: RunningSecrets, alice: Caller, bob: Caller) -> None:
    endpoint_id, _ = await service.grant(alice, PASSWORD)
    serving = await service.as_serving(alice)
    again = pb.GrantLaunchesRequest(
        endpoint_id=endpoint_id,
        is_new=True,
        version=1,
        entities=[pb.GrantedEntity(digest=OTHER_DIGEST, references=as_messages([PASSWORD]))],
    )
    await serving(serving.resolver.GrantLaunches, again)
    assert kinds(await service.resolve(endpoint_id, PASSWORD)) == ["NOT_GRANTED"]  # the later grant counts
    assert not kinds(await service.resolve(endpoint_id, PASSWORD, digest=OTHER_DIGEST))
    taken = await service.as_serving(bob)  # an id that is somebody else's
    assert (await refusal(taken(taken.resolver.GrantLaunches, again))).reason == MISSING


async def test_values_that_are_too_long_together_are_refused(
    service: RunningSecrets, alice: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grants, "LONGEST_VALUES", 12)
    endpoint_id, _ = await service.grant(alice, PASSWORD)
    await service.resolve(endpoint_id, *[PASSWORD] * 2)
    refused = await refusal(service.resolve(endpoint_id, *[PASSWORD] * 3))
    assert refused.reason == "RESOURCE_LIMIT_EXCEEDED"


async def test_author_is_told_what_is_in_a_scope_only_where_it_may_list_it(
    service: RunningSecrets, alice: Caller, bob: Caller
) -> None:
    endpoint_id, _ = await service.grant(alice, PASSWORD)
    await allow(alice, endpoint_id, "bob")
    await alice.delete("Shop", "Db.Password")
    _, granted = await service.grant(bob, PASSWORD, endpoint_id=endpoint_id, version=2)
    assert not granted.failures  # the same runs, and whether the key is there is none of its business
    _, granted = await service.grant(alice, PASSWORD, endpoint_id=endpoint_id, version=2)
    assert kinds(granted) == ["KEY_MISSING"]


async def test_what_is_no_endpoint_digest_or_name_is_refused(service: RunningSecrets, alice: Caller) -> None:
    for attempt in (
        service.resolve("e1", PASSWORD),
        service.resolve(uuid.uuid4().hex, PASSWORD, digest=b"short"),
        service.resolve(uuid.uuid4().hex, PASSWORD, replica_id=""),
        service.resolve(uuid.uuid4().hex, ("a/b", "k")),
        service.grant(alice, ("a", "k/")),
        service.grant(alice, PASSWORD, digest=DIGEST + b"."),
        service.settle(deleted_endpoint_ids=["x"]),
        service.reconcile(endpoints=[pb.ExistingEndpoint(endpoint_id="x")]),
    ):
        assert (await refusal(attempt)).reason == INVALID


# --- endpoints that are older than grants ---


def as_before_grants(directory: Path) -> None:
    """Makes a store one of the time before grants."""
    rewrite(
        directory,
        "DELETE FROM launch_grants",
        "DELETE FROM endpoints",
        "UPDATE platform SET knows_older_endpoints = 0",
    )


async def test_an_older_endpoint_is_granted_at_its_next_launch_what_its_creator_may_read() -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as service:
            await service.admin.create_scope("Shop")
            await service.admin.put("Shop", "Db.Password", "s3cret")
            bob = await service.user("bob")
            bob_id = (await bob(bob.scim.GetMe, identity_pb2.GetMeRequest())).id
            admin_id = (await service.admin(service.admin.scim.GetMe, identity_pb2.GetMeRequest())).id
        as_before_grants(directory)
        mine, his, late = (uuid.uuid4().hex for _ in range(3))
        async with running_secrets(directory) as service:
            assert kinds(await service.resolve(mine, PASSWORD)) == ["NOT_GRANTED"]  # nobody said so far who made it
            older = [
                pb.ExistingEndpoint(endpoint_id=mine, creator_id=admin_id, versions=[1]),
                pb.ExistingEndpoint(endpoint_id=his, creator_id=bob_id, versions=[1]),
            ]
            await service.reconcile(endpoints=older)
            assert list((await service.resolve(mine, PASSWORD)).values) == [b"s3cret"]
            assert failures_of(await service.resolve(his, PASSWORD)) == [(*PASSWORD, "NOT_PERMITTED", "bob")]
            # From now on it is an endpoint like any other.
            await service.grant(service.admin, PASSWORD, endpoint_id=mine, version=2)
            assert kinds(await service.resolve(mine, PASSWORD, version=3)) == ["NOT_GRANTED"]
            # Nor can another one be slipped in.
            await service.reconcile(
                endpoints=[*older, pb.ExistingEndpoint(endpoint_id=late, creator_id=admin_id, versions=[1])]
            )
            assert kinds(await service.resolve(late, PASSWORD)) == ["NOT_GRANTED"]
            bob = service.public(bob.metadata[0][1].removeprefix("Bearer "))
            listed = await bob(bob.permissions.GetPermissions, levels.GetPermissionsRequest(serving_endpoint_id=his))
            assert listed.access_control_list[0].user_name == "bob"


async def test_a_new_database_takes_nobodys_word_for_endpoints(service: RunningSecrets, alice: Caller) -> None:
    me = await alice(alice.scim.GetMe, identity_pb2.GetMeRequest())
    unheard = uuid.uuid4().hex
    await service.reconcile(endpoints=[pb.ExistingEndpoint(endpoint_id=unheard, creator_id=me.id, versions=[1])])
    assert kinds(await service.resolve(unheard, PASSWORD)) == ["NOT_GRANTED"]


async def test_endpoints_that_serving_does_not_have_are_over(service: RunningSecrets, alice: Caller) -> None:
    kept, gone = (await service.grant(alice, PASSWORD))[0], (await service.grant(alice, PASSWORD))[0]
    await service.reconcile(endpoints=[pb.ExistingEndpoint(endpoint_id=kept, versions=[1])])
    assert not kinds(await service.resolve(kept, PASSWORD))
    assert kinds(await service.resolve(gone, PASSWORD)) == ["NOT_GRANTED"]
    request = levels.GetPermissionsRequest(serving_endpoint_id=gone)
    assert (await refusal(service.admin(service.admin.permissions.GetPermissions, request))).reason == MISSING
