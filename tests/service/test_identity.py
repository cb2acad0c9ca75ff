"""Who is calling: listeners, tokens, assertions and users, over real gRPC (contract 3.1 to 3.3)."""

from __future__ import annotations

import asyncio
import base64
import errno
import itertools
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from secrets_service import files, personal_tokens, store
from servicekit import channels, identity
from servicekit.audit import AuditUnavailable
from servicekit.identity import TokenExchange
from servicekit.storage import StorageFailed
from tessera.identity.v1 import identity_pb2 as pb
from tessera.secrets.v1 import secrets_pb2
from tests.support.eventually import eventually
from tests.support.secrets import (
    INVALID_TOKEN,
    TIMEOUT,
    Caller,
    RunningSecrets,
    data_directory,
    refusal,
    running_secrets,
    settings_for,
)

DAY = 24 * 3600
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


async def me(caller: Caller) -> pb.User:
    user: pb.User = await caller(caller.scim.GetMe, pb.GetMeRequest())
    return user


async def create_token(caller: Caller, **fields: Any) -> pb.CreateTokenResponse:
    answer: pb.CreateTokenResponse = await caller(caller.tokens.CreateToken, pb.CreateTokenRequest(**fields))
    return answer


async def delete_token(caller: Caller, token_id: str) -> None:
    await caller(caller.tokens.DeleteToken, pb.DeleteTokenRequest(token_id=token_id))


async def refused_token(service: RunningSecrets, token: str) -> bool:
    """Whether a token is refused in the usual words, at the public listener and in an exchange alike."""
    for call in (me(service.public(token)), service.assertion(token)):
        refused = await refusal(call)
        if refused.answer != INVALID_TOKEN:
            return False
    return True


# --- listeners ---


def every_rpc() -> list[tuple[str, bool, frozenset[str]]]:
    """Full name, whether it is public, and the peers that may call it where it is not."""
    from servicekit.exposure import exposure

    return [
        (f"/{service.full_name}/{method.name}", not exposure(method).callers, exposure(method).callers)
        for file in (pb.DESCRIPTOR, secrets_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    ]


async def code_of(caller: Caller, method: str) -> grpc.StatusCode:
    """How a method answers an empty request."""
    call = caller.channel.unary_unary(method, Empty.SerializeToString, lambda reply: reply)
    try:
        await call(Empty(), metadata=caller.metadata, timeout=TIMEOUT)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_every_rpc_needs_a_credential_at_the_public_listener(service: RunningSecrets) -> None:
    for method, _, _ in every_rpc():
        assert await code_of(service.public(None), method) is UNAUTHENTICATED, method
    for method in ("/tessera.secrets.v1.Secrets/NoSuch", "/no.such.Service/Method"):
        assert await code_of(service.public(None), method) is UNAUTHENTICATED
        assert await code_of(service.admin, method) is UNIMPLEMENTED


async def test_internal_rpc_exists_only_on_the_sockets_of_its_callers(service: RunningSecrets) -> None:
    assertion = await service.assertion(service.admin_token)
    listeners = {"public": service.admin} | {peer: service.peer(peer, assertion) for peer in service.peer_channels}
    expected = {
        method: {name for name in listeners if is_public or name in callers}
        for method, is_public, callers in every_rpc()
    }
    assert expected["/tessera.identity.v1.Authority/ExchangeToken"] == {"gateway", "serving"}
    assert expected["/tessera.secrets.v1.SecretResolver/Resolve"] == {"serving"}
    assert expected["/tessera.identity.v1.Authority/RenewAdminToken"] == {"operator"}
    # Last, because it takes the admin's token away.
    expected["/tessera.identity.v1.Authority/RenewAdminToken"] = expected.pop(
        "/tessera.identity.v1.Authority/RenewAdminToken"
    )
    for method, where in expected.items():
        found = {name for name, caller in listeners.items() if await code_of(caller, method) is not UNIMPLEMENTED}
        assert found == where, method


async def test_health_is_open_to_everybody(service: RunningSecrets) -> None:
    health = health_pb2_grpc.HealthStub(service.public_channel)

    async def is_serving() -> bool:
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    await eventually(is_serving)


async def _descriptors(caller: Caller) -> list[str]:
    # As a stream of one request, which goes out with the call: what is written to a call that is refused at once may
    # fail as a write, and hide the refusal.
    reflect = caller.channel.unary_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflect(request, metadata=caller.metadata, timeout=TIMEOUT)
    return [service.name async for answer in call for service in answer.list_services_response.service]


async def test_reflection_needs_a_token_and_shows_public_services_only(service: RunningSecrets) -> None:
    assert (await refusal(_descriptors(service.public(None)))).code is UNAUTHENTICATED
    shown = await _descriptors(service.admin)
    assert "tessera.secrets.v1.Secrets" in shown
    assert not {"tessera.secrets.v1.SecretResolver", "tessera.identity.v1.Authority"} & set(shown)


async def test_reflection_can_be_switched_off() -> None:
    async with running_secrets(reflection=False) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _descriptors(service.admin)
        assert caught.value.code() is UNIMPLEMENTED


def test_listener_beyond_loopback_needs_leave_and_has_no_reflection() -> None:
    with data_directory() as directory:
        with pytest.raises(ValueError, match="TESSERA_SECRETS_LISTEN"):
            settings_for(directory, listen="0.0.0.0:8081")
        allowed = settings_for(directory, listen="0.0.0.0:8081", allow_plaintext=True)
        assert not allowed.offers_reflection
        assert settings_for(directory).offers_reflection


async def test_plain_headers_say_nothing_about_the_caller(service: RunningSecrets) -> None:
    assertion = await service.assertion(service.admin_token)
    for caller in (
        Caller(service.public_channel, (channels.ASSERTION, assertion)),
        Caller(service.public_channel, ("x-forwarded-user", "admin"), ("x-tessera-user", "admin")),
        Caller(service.peer_channels["gateway"], ("authorization", f"Bearer {service.admin_token}")),
        service.peer("gateway"),
    ):
        assert (await refusal(me(caller))).code is UNAUTHENTICATED


# --- tokens and assertions ---


async def test_token_is_taken_as_bearer_and_as_basic(service: RunningSecrets) -> None:
    basic = base64.b64encode(f"token:{service.admin_token}".encode()).decode()
    for credential in (f"Bearer {service.admin_token}", f"bearer  {service.admin_token} ", f"Basic {basic}"):
        assert (await me(Caller(service.public_channel, ("authorization", credential)))).user_name == "admin"
    for credential in ("", "Bearer", service.admin_token, f"Digest {service.admin_token}", "Basic !!"):
        refused = await refusal(me(Caller(service.public_channel, ("authorization", credential))))
        assert refused.code is UNAUTHENTICATED


async def test_wrong_tokens_are_all_refused_in_the_same_words(service: RunningSecrets) -> None:
    good, other = service.admin_token, (await create_token(service.admin)).token_value
    body = 4 + 12
    for token in (
        "x",
        "dapi",
        good[:-1],
        good + "0",
        good[:-1] + ("1" if good[-1] != "1" else "2"),
        good.swapcase(),
        good[:body] + other[body:],
        "dapi" + "z" * 61,
    ):
        assert await refused_token(service, token)
    # Over REST any text may arrive.
    assert (await refusal(service.assertion("dapi" + "é" * 61))).answer == INVALID_TOKEN


async def test_secret_of_one_token_does_not_go_with_the_id_of_another(service: RunningSecrets) -> None:
    from secrets_service import tokens

    first, second = [tokens.parse((await create_token(service.admin)).token_value) for _ in range(2)]
    assert first is not None
    assert second is not None
    assert await refused_token(service, tokens.Presented(first.id, second.secret).text)
    assert await refused_token(service, tokens.make().text)  # well formed, and nobody's


async def test_token_is_shown_once_and_listed_without_its_value(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    made = await create_token(bob, comment="laptop", lifetime_seconds=60)
    assert made.token_value.startswith("dapi")
    assert made.token_info.comment == "laptop"
    assert made.token_info.expiry_time - made.token_info.creation_time == 60_000
    assert abs(made.token_info.creation_time / 1000 - time.time()) < 60
    listed = await bob(bob.tokens.ListTokens, pb.ListTokensRequest())
    assert len(listed.token_infos) == 2  # the one it calls with came first
    assert listed.token_infos[1] == made.token_info
    assert made.token_value[16:] not in str(listed)
    assert not (await service.admin(service.admin.tokens.ListTokens, pb.ListTokensRequest())).token_infos[1:]


@pytest.mark.parametrize("lifetime", [0, -1, 730 * DAY + 1, 2**63 - 1])
async def test_lifetime_out_of_range_is_refused(service: RunningSecrets, lifetime: int) -> None:
    refused = await refusal(create_token(service.admin, lifetime_seconds=lifetime))
    assert refused.reason == "INVALID_PARAMETER_VALUE"
    assert refused.message.startswith("lifetime_seconds:")


async def test_lifetime_is_two_years_unless_said_otherwise(service: RunningSecrets) -> None:
    for made in (await create_token(service.admin), await create_token(service.admin, lifetime_seconds=730 * DAY)):
        assert made.token_info.expiry_time - made.token_info.creation_time == 730 * DAY * 1000
    assert (await refusal(create_token(service.admin, comment="c" * 256))).reason == "INVALID_PARAMETER_VALUE"


async def test_expired_token_is_refused_at_once_and_no_longer_listed(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    made = await create_token(bob, lifetime_seconds=60)
    assert (await me(service.public(made.token_value))).user_name == "bob"
    service.clock.offset = 58
    await service.assertion(made.token_value)
    service.clock.offset = 60.5
    assert await refused_token(service, made.token_value)
    listed = await bob(bob.tokens.ListTokens, pb.ListTokensRequest())
    assert made.token_info.token_id not in [info.token_id for info in listed.token_infos]


async def test_deleted_token_is_refused_at_once(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    made = await create_token(bob)
    await me(service.public(made.token_value))
    await delete_token(bob, made.token_info.token_id)
    assert await refused_token(service, made.token_value)
    assert (await me(bob)).user_name == "bob"


async def test_token_of_somebody_else_is_not_found(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    made = await create_token(bob)
    for token_id in (made.token_info.token_id, "nosuch", ""):
        refused = await refusal(delete_token(service.admin, token_id))
        assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_DOES_NOT_EXIST")
    assert (await me(service.public(made.token_value))).user_name == "bob"


async def test_number_of_tokens_is_limited_and_expired_ones_do_not_count(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert personal_tokens.MOST_TOKENS == 600
    monkeypatch.setattr(personal_tokens, "MOST_TOKENS", 3)
    await create_token(service.admin, lifetime_seconds=10)
    await create_token(service.admin)
    refused = await refusal(create_token(service.admin))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "QUOTA_EXCEEDED")
    service.clock.offset = 11
    await create_token(service.admin)


async def test_only_admins_make_tokens_for_others(service: RunningSecrets) -> None:
    bob = await service.user("Bob@example.com")
    for name in ("bob@EXAMPLE.com", "Bob@example.com"):
        request = pb.CreateOboTokenRequest(application_id=name, comment="for bob", lifetime_seconds=60)
        made = await service.admin(service.admin.tokens.CreateOboToken, request)
        assert (await me(service.public(made.token_value))).user_name == "Bob@example.com"
        assert made.token_info.comment == "for bob"
    refused = await refusal(bob(bob.tokens.CreateOboToken, pb.CreateOboTokenRequest(application_id="admin")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    for name in ("nobody", "users", ""):
        request = pb.CreateOboTokenRequest(application_id=name)
        refused = await refusal(service.admin(service.admin.tokens.CreateOboToken, request))
        assert refused.reason == "INVALID_PARAMETER_VALUE"
        assert refused.message.startswith("application_id:")


async def test_token_of_an_inactive_user_is_refused(service: RunningSecrets) -> None:
    await service.admin.create_user("ghost", active=False)
    assert await refused_token(service, await service.token_for("ghost"))


async def test_assertion_says_who_owns_the_token_and_for_how_long(service: RunningSecrets) -> None:
    made = await create_token(service.admin, lifetime_seconds=600)
    assertion = await service.assertion(made.token_value)
    peer = service.peer("serving")
    platform = await peer(peer.authority.GetPlatform, pb.GetPlatformRequest())
    header = jwt.get_unverified_header(assertion)
    assert header["alg"] == "EdDSA"
    assert header["kid"] in [key.key_id for key in platform.keys]
    claims = jwt.decode(assertion, options={"verify_signature": False})
    assert claims.pop("exp") - claims["iat"] == 60
    assert abs(claims.pop("iat") - time.time()) < 60
    admin = await me(service.admin)
    assert claims == {
        "aud": "tessera",
        "sub": admin.id,
        "name": "admin",
        "kind": "user",
        "groups": ["admins", "users"],
        "gids": sorted(group.value for group in admin.groups),
        "tid": made.token_info.token_id,
        "texp": made.token_info.expiry_time / 1000,
    }


async def test_workspace_id_stays_for_the_life_of_the_database() -> None:
    async def workspace_id(service: RunningSecrets) -> str:
        peer = service.peer("gateway")
        return str((await peer(peer.authority.GetPlatform, pb.GetPlatformRequest())).workspace_id)

    with data_directory() as directory:
        async with running_secrets(directory) as service:
            first = await workspace_id(service)
        async with running_secrets(directory) as service:
            assert await workspace_id(service) == first
    assert len(first) == 16
    assert first.isdigit()
    assert first[0] != "0"
    async with running_secrets() as other:
        assert await workspace_id(other) != first


async def test_assertion_expires(service: RunningSecrets) -> None:
    service.clock.offset = -61
    old = await service.assertion(service.admin_token)
    assert (await refusal(me(service.peer("gateway", old)))).code is UNAUTHENTICATED
    service.clock.offset = -50
    assert (await me(service.peer("gateway", await service.assertion(service.admin_token)))).user_name == "admin"


def _claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {"aud": "tessera", "sub": "1000000000000003", "name": "admin", "kind": "user", "groups": ["admins"]}
    return {**claims, "tid": "t", "iat": now, "exp": now + 60, **changes}


FORGERIES: dict[str, Callable[[str, bytes], str]] = {
    "no signature": lambda key_id, public: jwt.encode(_claims(), "", algorithm="none", headers={"kid": key_id}),
    "another key": lambda key_id, public: jwt.encode(
        _claims(), Ed25519PrivateKey.generate(), algorithm="EdDSA", headers={"kid": key_id}
    ),
    "public key as HMAC key": lambda key_id, public: jwt.encode(
        _claims(), public, algorithm="HS256", headers={"kid": key_id}
    ),
    "unknown key": lambda key_id, public: jwt.encode(
        _claims(), Ed25519PrivateKey.generate(), algorithm="EdDSA", headers={"kid": "mine"}
    ),
    "no key id": lambda key_id, public: jwt.encode(_claims(), Ed25519PrivateKey.generate(), algorithm="EdDSA"),
    "no JWT": lambda key_id, public: "x.y.z",
    "empty": lambda key_id, public: "",
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
async def test_forged_assertion_is_refused(service: RunningSecrets, forge: Callable[[str, bytes], str]) -> None:
    peer = service.peer("gateway")
    [key] = (await peer(peer.authority.GetPlatform, pb.GetPlatformRequest())).keys
    refused = await refusal(me(service.peer("gateway", forge(key.key_id, key.public_key))))
    assert refused.code is UNAUTHENTICATED


async def test_assertion_with_changed_claims_is_refused(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    token = (await create_token(bob)).token_value
    head, _, signature = (await service.assertion(token)).split(".")
    claims = base64.urlsafe_b64encode(jwt.utils.force_bytes(str(_claims()).replace("'", '"'))).rstrip(b"=").decode()
    assert (await refusal(me(service.peer("gateway", f"{head}.{claims}.{signature}")))).code is UNAUTHENTICATED


async def test_other_services_learn_within_ten_seconds_that_a_token_was_deleted(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    made = await create_token(bob)
    clock = itertools.count(0.0, 9.0)  # the exchange looks at its clock when it is asked
    exchange = TokenExchange(service.peer_channels["gateway"], stale_seconds=3600, now=lambda: next(clock))
    assert (await exchange.identify(made.token_value)).principal.name == "bob"
    await delete_token(bob, made.token_info.token_id)
    with pytest.raises(identity.InvalidToken):
        await exchange.identify(made.token_value, may_be_stale=True)


# --- the first admin ---


async def test_first_start_makes_one_admin_whose_token_is_good_for_ninety_days(service: RunningSecrets) -> None:
    admin = await me(service.admin)
    assert admin.user_name == "admin"
    assert {group.display for group in admin.groups} == {"admins", "users"}
    listed = await service.admin(service.admin.tokens.ListTokens, pb.ListTokensRequest())
    [token] = listed.token_infos
    assert token.expiry_time - token.creation_time == 90 * DAY * 1000
    users = await service.admin(service.admin.scim.ListUsers, pb.ListRequest())
    assert users.total_results == 1


async def test_deleted_token_file_is_not_written_again(service: RunningSecrets) -> None:
    with data_directory() as directory:
        async with running_secrets(directory) as first:
            first.settings.admin_token.unlink()
        async with running_secrets(directory) as second:
            assert not second.settings.admin_token.exists()


async def test_operator_renews_the_admins_token(service: RunningSecrets) -> None:
    file = service.settings.admin_token
    other = (await create_token(service.admin)).token_value
    file.unlink()
    operator = service.peer("operator")
    answer = await operator(operator.authority.RenewAdminToken, pb.RenewAdminTokenRequest())
    assert answer.path == str(file)
    assert abs(answer.expiry_time / 1000 - service.clock() - 90 * DAY) < 60
    assert file.stat().st_mode & 0o777 == 0o600
    renewed = file.read_text().strip()
    assert renewed not in str(answer)
    assert await refused_token(service, service.admin_token)
    assert (await me(service.public(renewed))).user_name == "admin"
    assert (await me(service.public(other))).user_name == "admin"  # only the one in the file is replaced
    await operator(operator.authority.RenewAdminToken, pb.RenewAdminTokenRequest())
    assert await refused_token(service, renewed)


@pytest.mark.parametrize(
    "error", [AuditUnavailable("for a test"), StorageFailed("for a test"), ValueError("for a test")]
)
async def test_admins_token_stays_good_when_a_new_one_is_refused(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*_: Any) -> None:
        raise error

    operator = service.peer("operator")
    renewal = operator.authority.RenewAdminToken, pb.RenewAdminTokenRequest()
    file = service.settings.admin_token
    with monkeypatch.context() as patch:
        patch.setattr(store, "replace_admin_token_id", failing)
        await refusal(operator(*renewal))
    assert file.read_text().strip() == service.admin_token
    assert (await me(service.admin)).user_name == "admin"
    assert [path.name for path in file.parent.glob("*admin.token*")] == ["admin.token"]
    await operator(*renewal)
    assert (await me(service.public(file.read_text().strip()))).user_name == "admin"


async def test_admins_new_token_is_where_the_answer_says_when_its_file_cannot_be_replaced(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    operator = service.peer("operator")
    renewal = operator.authority.RenewAdminToken, pb.RenewAdminTokenRequest()
    file = service.settings.admin_token
    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", busy)
        answer = await operator(*renewal)
    staged = Path(answer.path)
    assert staged.name == "admin.token.next"
    assert staged.stat().st_mode & 0o777 == 0o600
    assert (await me(service.public(staged.read_text().strip()))).user_name == "admin"
    await operator(*renewal)  # as after a crash before the file is in its place
    assert not staged.exists()
    assert (await me(service.public(file.read_text().strip()))).user_name == "admin"


async def test_admins_token_is_in_its_place_also_when_nobody_waits_for_the_answer(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, replace = threading.Event(), store.replace_admin_token_id

    def late(*args: Any) -> None:
        assert gone.wait(10)
        replace(*args)

    monkeypatch.setattr(store, "replace_admin_token_id", late)
    operator = service.peer("operator")
    call = asyncio.ensure_future(operator(operator.authority.RenewAdminToken, pb.RenewAdminTokenRequest()))
    file = service.settings.admin_token
    await eventually(file.with_name("admin.token.next").exists)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await asyncio.sleep(0.2)  # the service hears of it
    gone.set()
    await eventually(lambda: file.read_text().strip() != service.admin_token)
    assert (await me(service.public(file.read_text().strip()))).user_name == "admin"


async def test_admins_token_can_be_renewed_after_it_expired_or_was_deleted(service: RunningSecrets) -> None:
    operator = service.peer("operator")
    for harm in ("delete", "expire"):
        token = service.settings.admin_token.read_text().strip()
        if harm == "delete":
            admin = service.public(token)
            [info] = (await admin(admin.tokens.ListTokens, pb.ListTokensRequest())).token_infos
            await delete_token(admin, info.token_id)
        else:
            service.clock.offset = 91 * DAY
        assert await refused_token(service, token)
        await operator(operator.authority.RenewAdminToken, pb.RenewAdminTokenRequest())
        assert (await me(service.public(service.settings.admin_token.read_text().strip()))).user_name == "admin"


# --- users ---


async def test_new_user_has_the_documented_shape(service: RunningSecrets) -> None:
    made = await service.admin.create_user(
        "alice@example.com",
        display_name="Alice",
        name=pb.UserName(given_name="Alice", family_name="A"),
        external_id="ext-1",
    )
    assert list(made.schemas) == [
        "urn:ietf:params:scim:schemas:core:2.0:User",
        "urn:ietf:params:scim:schemas:extension:workspace:2.0:User",
    ]
    assert len(made.id) == 16
    assert made.id.isdigit()
    assert (made.user_name, made.display_name, made.active) == ("alice@example.com", "Alice", True)
    assert (made.name.given_name, made.name.family_name, made.external_id) == ("Alice", "A", "ext-1")
    assert list(made.emails) == [pb.Email(type="work", value="alice@example.com", primary=True)]
    [group] = made.groups
    assert (group.display, group.type, group.ref) == ("users", "direct", f"Groups/{group.value}")
    assert list(made.entitlements) == [pb.Entitlement(value="workspace-access")]
    assert await me(service.public(await service.token_for("alice@example.com"))) == made
    bob = await service.user("bob")
    assert await bob(bob.scim.GetUser, pb.GetRequest(id=made.id)) == made


async def test_user_name_is_kept_in_its_composed_form(service: RunningSecrets) -> None:
    assert (await service.admin.create_user("zoe\u0308")).user_name == "zo\u00eb"


async def test_given_addresses_are_kept(service: RunningSecrets) -> None:
    emails = [pb.Email(type="home", value="a@b", primary=True), pb.Email(type="work", value="c@d")]
    made = await service.admin.create_user("alice", emails=emails)
    assert list(made.emails) == emails
    assert made.display_name == "alice"


async def test_only_admins_create_users(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    refused = await refusal(bob.create_user("carol"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert "admins" in refused.message


@pytest.mark.parametrize("name", ["zoë@example.com", "ZOË@EXAMPLE.COM", "zoe\u0308@example.com", "users", "Admins"])
async def test_taken_name_is_a_conflict(service: RunningSecrets, name: str) -> None:
    await service.admin.create_user("Zoë@example.com")
    refused = await refusal(service.admin.create_user(name))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "RESOURCE_ALREADY_EXISTS")
    assert refused.facts == {"scim_type": "uniqueness"}


@pytest.mark.parametrize("name", ["", " bob", "bob ", "b\nob", "b\0ob", "b\u202eob", "b\u200bob", "x" * 256])
async def test_bad_user_name_is_refused(service: RunningSecrets, name: str) -> None:
    refused = await refusal(service.admin.create_user(name))
    assert refused.reason == "INVALID_PARAMETER_VALUE"
    assert refused.message.startswith("userName:")


async def test_too_long_parts_of_a_user_are_refused(service: RunningSecrets) -> None:
    long = "x" * 256
    refused_parts: dict[str, dict[str, Any]] = {
        "displayName": {"display_name": long},
        "name.givenName": {"name": pb.UserName(given_name=long)},
        "externalId": {"external_id": long},
        "emails.value": {"emails": [pb.Email(value=long)]},
        "emails": {"emails": [pb.Email(value="a@b")] * 11},
    }
    for field, parts in refused_parts.items():
        refused = await refusal(service.admin.create_user("bob", **parts))
        assert (refused.reason, refused.message.partition(":")[0]) == ("INVALID_PARAMETER_VALUE", field)


@pytest.mark.parametrize("user_id", ["17", "", "x", "-1", "9" * 40, "1000000000000001"])  # the last is a group
async def test_unknown_user_is_not_found(service: RunningSecrets, user_id: str) -> None:
    refused = await refusal(service.admin(service.admin.scim.GetUser, pb.GetRequest(id=user_id)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_DOES_NOT_EXIST")


async def listed(service: RunningSecrets, **fields: Any) -> tuple[list[str], int, int, int]:
    answer = await service.admin(service.admin.scim.ListUsers, pb.ListRequest(**fields))
    assert list(answer.schemas) == ["urn:ietf:params:scim:api:messages:2.0:ListResponse"]
    names = [user.user_name for user in answer.resources]
    return names, answer.total_results, answer.start_index, answer.items_per_page


async def test_users_are_listed_in_pages(service: RunningSecrets) -> None:
    for name in ("zoe", "bob", "carol"):
        await service.admin.create_user(name)
    everybody = ["admin", "zoe", "bob", "carol"]
    assert await listed(service) == (everybody, 4, 1, 4)
    assert await listed(service, start_index=2, count=2) == (["zoe", "bob"], 4, 2, 2)
    assert await listed(service, start_index=1, count=10_000) == (everybody, 4, 1, 4)
    assert await listed(service, start_index=5, count=2) == ([], 4, 5, 0)
    assert await listed(service, start_index=2**63 - 1) == ([], 4, 2**63 - 1, 0)
    assert await listed(service, count=0) == ([], 4, 1, 0)
    assert await listed(service, start_index=-3, count=-3) == ([], 4, 1, 0)
    assert await listed(service, start_index=0, count=1) == (["admin"], 4, 1, 1)


async def test_users_are_found_by_name(service: RunningSecrets) -> None:
    await service.admin.create_user("Zoë@example.com")
    for text in ('userName eq "zoë@EXAMPLE.com"', '  username EQ "Zo\\u00eb@example.com" '):
        assert await listed(service, filter=text) == (["Zoë@example.com"], 1, 1, 1)
    assert await listed(service, filter='userName eq "zoë@example.com"', start_index=2) == ([], 1, 2, 0)
    assert await listed(service, filter='userName eq "zoë@example.com"', count=0) == ([], 1, 1, 0)
    assert await listed(service, filter='userName eq "users"') == ([], 0, 1, 0)


@pytest.mark.parametrize(
    "text",
    [
        'nickName eq "a"',
        'userName gt "a"',
        "userName eq a",
        'userName eq "a" or',
        '(userName eq "a"',
        'userName eq "a") ',
        'not userName eq "a"',
        'active co "t"',
        'active eq "perhaps"',
        "userName eq true",
        'userName eq "a\u0000"',
        "(" * 11 + 'id eq "1"' + ")" * 11,
        " or ".join(['id eq "1"'] * 51),
        'userName eq "' + "x" * 4096 + '"',
        'userName eq "a\\q"',
        'userName eq "\\ud800"',
        "x",
    ],
)
async def test_filter_that_is_not_understood_is_refused(service: RunningSecrets, text: str) -> None:
    refused = await refusal(listed(service, filter=text))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER_VALUE")
    assert refused.facts == {"scim_type": "invalidFilter"}
