"""OAuth: client secrets, access tokens, and the forms by which they are asked for (contract 2.2, 6.9; S13)."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.empty_pb2 import Empty

from secrets_service import client_secrets, tokens
from secrets_service.authority import SigningKeys
from secrets_service.model import TokenKind
from servicekit.exposure import exposure
from tessera.identity.v1 import identity_pb2 as pb
from tessera.secrets.v1 import secrets_pb2
from tests.support.gateway import CLIENT, Platform, platform, replica, routes
from tests.support.http import Answer, fetch
from tests.support.issuer import AUDIENCE, Issuer, serving
from tests.support.jwt_forgery import FORGERIES, Mint, another_key
from tests.support.secrets import (
    INVALID_TOKEN,
    TIMEOUT,
    Caller,
    RunningSecrets,
    data_directory,
    lets_nobody_in,
    refusal,
    running_secrets,
)
from tests.support.serving import no_replicas, running_serving

ENDPOINT = "15b7ac8270d6454da47efa78debdbf70"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
YEAR = 365 * 24 * 3600


@pytest.fixture
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


@pytest.fixture
async def robot(service: RunningSecrets) -> pb.ServicePrincipal:
    return await a_service_principal(service)


@pytest.fixture
async def stack() -> AsyncIterator[Platform]:
    async with platform(public_url="https://tessera.example") as running:
        yield running


@pytest.fixture(scope="module")
async def strict() -> AsyncIterator[Platform]:
    """One gateway for all requests that it refuses."""
    async with platform() as running:
        yield running


async def a_service_principal(service: RunningSecrets) -> pb.ServicePrincipal:
    request = pb.CreateServicePrincipalRequest(display_name="robot")
    made: pb.ServicePrincipal = await service.admin(service.admin.scim.CreateServicePrincipal, request)
    return made


async def me(caller: Caller) -> pb.User:
    user: pb.User = await caller(caller.scim.GetMe, pb.GetMeRequest())
    return user


async def create_secret(caller: Caller, principal_id: str, **fields: Any) -> pb.CreateServicePrincipalSecretResponse:
    request = pb.CreateServicePrincipalSecretRequest(service_principal_id=principal_id, **fields)
    made: pb.CreateServicePrincipalSecretResponse = await caller(
        caller.client_secrets.CreateServicePrincipalSecret, request
    )
    return made


async def list_secrets(caller: Caller, principal_id: str, **fields: Any) -> pb.ListServicePrincipalSecretsResponse:
    request = pb.ListServicePrincipalSecretsRequest(service_principal_id=principal_id, **fields)
    found: pb.ListServicePrincipalSecretsResponse = await caller(
        caller.client_secrets.ListServicePrincipalSecrets, request
    )
    return found


async def delete_secret(caller: Caller, principal_id: str, secret_id: str) -> None:
    request = pb.DeleteServicePrincipalSecretRequest(service_principal_id=principal_id, secret_id=secret_id)
    await caller(caller.client_secrets.DeleteServicePrincipalSecret, request)


async def issue(service: RunningSecrets, **request: Any) -> pb.IssueTokenResponse:
    """What Secrets issues to the gateway."""
    peer = service.peer("gateway")
    issued: pb.IssueTokenResponse = await peer(peer.authority.IssueToken, pb.IssueTokenRequest(**request))
    return issued


async def for_client(service: RunningSecrets, client_id: str, secret: str, endpoint_id: str = "") -> str:
    client = pb.ClientCredential(client_id=client_id, client_secret=secret)
    return (await issue(service, client=client, endpoint_id=endpoint_id)).access_token


async def is_invalid(service: RunningSecrets, token: str) -> bool:
    """Whether a token is refused in the usual words, in an exchange and as an assertion, and lets nobody in."""
    calls = service.assertion(token), issue(service, assertion=token)
    answers = [(await refusal(call)).answer for call in calls]
    return answers == [INVALID_TOKEN] * 2 and await lets_nobody_in(service, token)


# --- client secrets ---


async def test_client_secret_is_shown_once_and_listed_without_its_value(
    service: RunningSecrets, robot: pb.ServicePrincipal
) -> None:
    made = await create_secret(service.admin, robot.id)
    assert made.secret.startswith("dose")
    assert made.status == "ACTIVE"
    assert made.create_time == made.update_time
    assert made.create_time.endswith("Z")
    assert int(made.expire_time[:4]) - int(made.create_time[:4]) in (1, 2, 3)
    assert len(made.secret_hash) == 64
    assert made.secret_hash != (await create_secret(service.admin, robot.id, lifetime="1s")).secret_hash
    service.clock.offset = 2
    for hashed in (made.secret.encode(), made.secret[16:-6].encode()):
        assert made.secret_hash != hashlib.sha256(hashed).hexdigest()
    listed = await list_secrets(service.admin, robot.id)
    assert [(one.id, one.secret_hash, one.expire_time) for one in listed.secrets] == [
        (made.id, made.secret_hash, made.expire_time)
    ]
    assert made.secret not in str(listed)
    await delete_secret(service.admin, robot.id, made.id)
    assert not (await list_secrets(service.admin, robot.id)).secrets
    refused = await refusal(delete_secret(service.admin, robot.id, made.id))
    assert refused.reason == "RESOURCE_DOES_NOT_EXIST"


@pytest.mark.parametrize(("lifetime", "seconds"), [("", 2 * YEAR), ("60s", 60), ("63072000s", 2 * YEAR)])
async def test_client_secret_lives_as_long_as_was_asked_for(
    service: RunningSecrets, robot: pb.ServicePrincipal, lifetime: str, seconds: int
) -> None:
    made = await create_secret(service.admin, robot.id, lifetime=lifetime)
    service.clock.offset = seconds - 10
    assert await for_client(service, robot.application_id, made.secret)
    service.clock.offset = seconds + 0.5
    refused = await refusal(for_client(service, robot.application_id, made.secret))
    assert refused.answer == INVALID_TOKEN


@pytest.mark.parametrize("lifetime", ["0s", "63072001s", "1", "-1s", "1.5s", "s", "1h", " 1s", "99999999999s", "١s"])
async def test_lifetime_that_is_none_is_refused(
    service: RunningSecrets, robot: pb.ServicePrincipal, lifetime: str
) -> None:
    refused = await refusal(create_secret(service.admin, robot.id, lifetime=lifetime))
    assert refused.reason == "INVALID_PARAMETER_VALUE"
    assert refused.message.startswith("lifetime:")


async def test_only_admins_look_after_client_secrets(service: RunningSecrets, robot: pb.ServicePrincipal) -> None:
    made = await create_secret(service.admin, robot.id)
    bob = await service.user("bob")
    itself = service.public(await for_client(service, robot.application_id, made.secret))
    for caller in (bob, itself):
        for call in (
            create_secret(caller, robot.id),
            list_secrets(caller, robot.id),
            delete_secret(caller, robot.id, made.id),
            list_secrets(caller, "1"),
        ):
            refused = await refusal(call)
            assert (refused.reason, refused.message[:11]) == ("PERMISSION_DENIED", "Only admins")


async def test_client_secrets_belong_to_service_principals_and_each_to_its_own(
    service: RunningSecrets, robot: pb.ServicePrincipal
) -> None:
    made, other = await create_secret(service.admin, robot.id), await a_service_principal(service)
    admin = await me(service.admin)
    for principal_id in (admin.id, "1", "", "x", "9" * 30, robot.application_id):
        for call in (create_secret(service.admin, principal_id), list_secrets(service.admin, principal_id)):
            assert (await refusal(call)).reason == "RESOURCE_DOES_NOT_EXIST"
    refused = await refusal(delete_secret(service.admin, other.id, made.id))
    assert (refused.reason, made.id in refused.message) == ("RESOURCE_DOES_NOT_EXIST", True)
    assert await for_client(service, robot.application_id, made.secret)


async def test_service_principal_has_five_client_secrets_at_the_most(
    service: RunningSecrets, robot: pb.ServicePrincipal
) -> None:
    made = [await create_secret(service.admin, robot.id, lifetime="60s") for _ in range(client_secrets.MOST_SECRETS)]
    refused = await refusal(create_secret(service.admin, robot.id))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "QUOTA_EXCEEDED")
    await delete_secret(service.admin, robot.id, made[0].id)
    await create_secret(service.admin, robot.id)
    service.clock.offset = 61
    assert len((await list_secrets(service.admin, robot.id)).secrets) == 1
    await create_secret(service.admin, robot.id)


async def test_pages_of_client_secrets_hold_each_once(service: RunningSecrets, robot: pb.ServicePrincipal) -> None:
    made = [(await create_secret(service.admin, robot.id)).id for _ in range(5)]
    found, page_token, pages = [], "", 0
    while True:
        page = await list_secrets(service.admin, robot.id, page_size=2, page_token=page_token)
        found += [one.id for one in page.secrets]
        page_token, pages = page.next_page_token, pages + 1
        if not page_token:
            break
    assert (found, pages) == (made, 3)
    assert not (await list_secrets(service.admin, robot.id, page_token="100")).secrets
    for field, wrong in (("page_size", 0), ("page_size", 1001), ("page_size", -1), ("page_token", "x")):
        refused = await refusal(list_secrets(service.admin, robot.id, **{field: wrong}))
        assert (refused.reason, refused.message.partition(":")[0]) == ("INVALID_PARAMETER_VALUE", field)


async def test_scopes_other_than_all_are_refused(service: RunningSecrets, robot: pb.ServicePrincipal) -> None:
    assert (await create_secret(service.admin, robot.id, scopes=["all-apis"])).secret
    refused = await refusal(create_secret(service.admin, robot.id, scopes=["all-apis", "sql"]))
    assert (refused.reason, refused.message[:7]) == ("INVALID_PARAMETER_VALUE", "scopes:")


async def test_client_secret_is_no_token_and_a_token_no_client_secret(
    service: RunningSecrets, robot: pb.ServicePrincipal
) -> None:
    made = await create_secret(service.admin, robot.id)
    assert await is_invalid(service, made.secret)
    # The check sum is no secret: anybody can spell one as the other.
    secret, token = tokens.parse(made.secret, TokenKind.CLIENT_SECRET), tokens.parse(service.admin_token)
    assert secret is not None
    assert token is not None
    assert await is_invalid(service, tokens.Presented(secret.id, secret.secret).text)
    own = tokens.parse(await service.token_for(robot.application_id))
    assert own is not None
    for text in (service.admin_token, tokens.Presented(own.id, own.secret, TokenKind.CLIENT_SECRET).text):
        refused = await refusal(for_client(service, robot.application_id, text))
        assert refused.answer == INVALID_TOKEN


async def test_client_secret_is_in_no_list_of_tokens(service: RunningSecrets, robot: pb.ServicePrincipal) -> None:
    made = await create_secret(service.admin, robot.id)
    itself = service.public(await for_client(service, robot.application_id, made.secret))
    admin = service.admin
    assert not (await itself(itself.tokens.ListTokens, pb.ListTokensRequest())).token_infos
    managed = await admin(admin.tokens.ListManagedTokens, pb.ListManagedTokensRequest())
    assert made.id not in [one.token_id for one in managed.token_infos]
    for call in (
        admin(admin.tokens.GetManagedToken, pb.GetManagedTokenRequest(token_id=made.id)),
        admin(admin.tokens.DeleteManagedToken, pb.DeleteManagedTokenRequest(token_id=made.id)),
        admin(admin.tokens.UpdateManagedToken, pb.UpdateTokenRequest(token_id=made.id)),
        itself(itself.tokens.DeleteToken, pb.DeleteTokenRequest(token_id=made.id)),
    ):
        assert (await refusal(call)).reason == "RESOURCE_DOES_NOT_EXIST"


@pytest.mark.parametrize("wrong", ["id", "name", "empty id", "another principal", "secret", "empty secret"])
async def test_wrong_client_credential_is_refused_in_the_usual_words(
    service: RunningSecrets, robot: pb.ServicePrincipal, wrong: str
) -> None:
    made, other = await create_secret(service.admin, robot.id), await a_service_principal(service)
    client_id, secret = {
        "id": (robot.id, made.secret),
        "name": ("admin", made.secret),
        "empty id": ("", made.secret),
        "another principal": (other.application_id, made.secret),
        "secret": (robot.application_id, tokens.make(TokenKind.CLIENT_SECRET).text),
        "empty secret": (robot.application_id, ""),
    }[wrong]
    refused = await refusal(for_client(service, client_id, secret))
    assert refused.answer == INVALID_TOKEN
    assert await for_client(service, robot.application_id.upper(), made.secret)


# --- access tokens ---


async def test_access_token_says_only_what_it_was_obtained_with(
    service: RunningSecrets, robot: pb.ServicePrincipal
) -> None:
    made = await create_secret(service.admin, robot.id)
    client = pb.ClientCredential(client_id=robot.application_id, client_secret=made.secret)
    issued = await issue(service, client=client)
    assert issued.expires_in == 3600
    peer = service.peer("gateway")
    workspace_id = (await peer(peer.authority.GetPlatform, pb.GetPlatformRequest())).workspace_id
    header = jwt.get_unverified_header(issued.access_token)
    assert (header["typ"], header["alg"], set(header)) == ("at+jwt", "EdDSA", {"typ", "alg", "kid"})
    claims = jwt.decode(issued.access_token, options={"verify_signature": False})
    assert claims.pop("exp") - claims["iat"] == 3600
    assert abs(claims.pop("iat") - time.time()) < 60
    assert claims == {"iss": "tessera", "aud": workspace_id, "sub": robot.id, "cid": made.id}


async def test_access_token_is_taken_as_a_token_and_groups_come_from_the_database(
    service: RunningSecrets, robot: pb.ServicePrincipal
) -> None:
    made = await create_secret(service.admin, robot.id)
    token = await for_client(service, robot.application_id, made.secret)
    assert (await me(service.public(token))).user_name == robot.application_id
    assert (await me(service.peer("gateway", await service.assertion(token)))).user_name == robot.application_id
    admins = await service.admin(service.admin.scim.ListGroups, pb.ListRequest(filter='displayName eq "admins"'))
    operation = pb.PatchOperation(op="add", path="members")
    operation.value.list_value.values.add().struct_value.update({"value": robot.id})
    request = pb.PatchRequest(id=admins.resources[0].id, operations=[operation])
    await service.admin(service.admin.scim.PatchGroup, request)
    claims = jwt.decode(await service.assertion(token), options={"verify_signature": False})
    assert (claims["groups"], claims["tid"], claims["kind"]) == (["admins", "users"], made.id, "service_principal")
    assert claims["texp"] == jwt.decode(token, options={"verify_signature": False})["exp"]


async def test_access_token_never_outlives_its_credential(service: RunningSecrets, robot: pb.ServicePrincipal) -> None:
    made = await create_secret(service.admin, robot.id, lifetime="100s")
    client = pb.ClientCredential(client_id=robot.application_id, client_secret=made.secret)
    issued = await issue(service, client=client)
    assert 95 <= issued.expires_in <= 100
    again = await issue(service, assertion=issued.access_token)
    assert again.expires_in <= issued.expires_in
    service.clock.offset = 50
    assert 45 <= (await issue(service, client=client)).expires_in <= 50
    service.clock.offset = 101
    for token in (issued.access_token, again.access_token):
        assert await is_invalid(service, token)


async def test_access_token_is_good_for_an_hour(service: RunningSecrets) -> None:
    issued = await issue(service, assertion=service.admin_token)
    assert issued.expires_in == 3600
    service.clock.offset = 3595
    assert (await me(service.public(issued.access_token))).user_name == "admin"
    service.clock.offset = 3601
    assert await is_invalid(service, issued.access_token)
    assert (await me(service.admin)).user_name == "admin"


@pytest.mark.parametrize("change", ["secret deleted", "deactivated", "deleted"])
async def test_access_token_of_a_client_ends_at_once_with_what_is_behind_it(
    service: RunningSecrets, robot: pb.ServicePrincipal, change: str
) -> None:
    made = await create_secret(service.admin, robot.id)
    token = await for_client(service, robot.application_id, made.secret)
    nested = (await issue(service, assertion=token)).access_token
    by_peer = service.peer("gateway", await service.assertion(token))
    assert (await me(by_peer)).id == robot.id
    admin = service.admin
    match change:
        case "secret deleted":
            await create_secret(admin, robot.id)  # another does not help
            await delete_secret(admin, robot.id, made.id)
        case "deactivated":
            operation = pb.PatchOperation(op="replace", path="active")
            operation.value.bool_value = False
            await admin(admin.scim.PatchServicePrincipal, pb.PatchRequest(id=robot.id, operations=[operation]))
        case "deleted":
            await admin(admin.scim.DeleteServicePrincipal, pb.DeleteRequest(id=robot.id))
    assert await is_invalid(service, token)
    assert await is_invalid(service, nested)
    assert (await refusal(me(by_peer))).answer == INVALID_TOKEN
    refused = await refusal(for_client(service, robot.application_id, made.secret))
    assert refused.answer == INVALID_TOKEN


async def test_access_token_ends_at_once_with_the_personal_token_behind_it(service: RunningSecrets) -> None:
    bob = await service.user("bob")
    made = await bob(bob.tokens.CreateToken, pb.CreateTokenRequest())
    token = (await issue(service, assertion=made.token_value)).access_token
    assert (await me(service.public(token))).user_name == "bob"
    await bob(bob.tokens.DeleteToken, pb.DeleteTokenRequest(token_id=made.token_info.token_id))
    assert await is_invalid(service, token)
    assert (await me(bob)).user_name == "bob"


async def test_access_token_for_an_external_token_ends_with_it_and_with_its_owner() -> None:
    issuer = Issuer()
    async with serving(issuer), running_secrets(oidc_issuer=issuer.url, oidc_audience=AUDIENCE) as service:
        bob = await service.admin.create_user("bob")
        external = issuer.mint(exp=int(time.time()) + 100).token()
        issued = await issue(service, assertion=external)
        assert 95 <= issued.expires_in <= 100
        assert (await me(service.public(issued.access_token))).user_name == "bob"
        await service.admin(service.admin.scim.DeleteUser, pb.DeleteRequest(id=bob.id))
        assert await is_invalid(service, issued.access_token)
        await service.admin.create_user("bob")
        assert await is_invalid(service, issued.access_token)


async def test_nothing_is_issued_without_a_credential_or_to_others_than_the_gateway(service: RunningSecrets) -> None:
    assert (await refusal(issue(service))).reason == "MALFORMED_REQUEST"
    for caller in (service.admin, service.peer("serving", await service.assertion(service.admin_token))):
        refused = await refusal(caller(caller.authority.IssueToken, pb.IssueTokenRequest()))
        assert refused.code is grpc.StatusCode.UNIMPLEMENTED


# --- forged ones ---


@pytest.fixture(scope="module")
async def minted() -> AsyncIterator[tuple[RunningSecrets, Mint]]:
    """A service, and a mint with the very key that it signs with."""
    keys: list[tuple[str, Ed25519PrivateKey]] = []
    original = SigningKeys.__init__

    def remember(self: SigningKeys, made: Any) -> None:
        keys.extend(made.items())
        original(self, made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SigningKeys, "__init__", remember)
        async with running_secrets() as service:
            token = (await issue(service, assertion=service.admin_token)).access_token
            header = jwt.get_unverified_header(token)
            claims = jwt.decode(token, options={"verify_signature": False})
            header.pop("alg")
            mint = Mint("EdDSA", header, claims, dict(keys)[header["kid"]], another_key("EdDSA"))
            assert (await me(service.public(mint.token()))).user_name == "admin"
            yield service, mint


FORGED_HERE = {
    "type of assertions": lambda mint: mint.token(header={"typ": "JWT"}),
    "no type": lambda mint: mint.token(header={"typ": None}),
    "type in other letters": lambda mint: mint.token(header={"typ": "AT+JWT"}),
    "no key id": lambda mint: mint.token(header={"kid": None}),
    "more in the header": lambda mint: mint.token(header={"cty": "JWT"}),
    "no credential": lambda mint: mint.token(cid=None),
    "credential of another": lambda mint: mint.token(sub="1000000000000001"),
    "credential that is unknown": lambda mint: mint.token(cid="000000000000"),
    "endpoint that is a number": lambda mint: mint.token(eid=1),
    "assertion with another type": lambda mint: mint.token(
        aud="tessera", iss=None, name="admin", groups=["admins"], kind="user", tid="", cid=None
    ),
}


@pytest.mark.parametrize("wrong", FORGERIES | FORGED_HERE)
async def test_forged_access_token_is_refused(minted: tuple[RunningSecrets, Mint], wrong: str) -> None:
    service, mint = minted
    assert await is_invalid(service, (FORGERIES | FORGED_HERE)[wrong](mint))


async def test_assertion_is_no_token_and_an_access_token_no_assertion(minted: tuple[RunningSecrets, Mint]) -> None:
    service, mint = minted
    assertion = await service.assertion(service.admin_token)
    assert await is_invalid(service, assertion)
    claims = jwt.decode(assertion, options={"verify_signature": False})
    good = Mint("EdDSA", {**mint.header, "typ": "JWT"}, claims, mint.key, mint.other_key)
    assert (await me(service.peer("gateway", good.token()))).user_name == "admin"
    for header, more in (
        ({"typ": "at+jwt"}, {}),
        ({"typ": None}, {}),
        ({"typ": "jwt"}, {}),
        ({}, {"aud": mint.claims["aud"]}),
    ):
        refused = await refusal(me(service.peer("gateway", good.token(header=header, **more))))
        assert refused.reason == "UNAUTHENTICATED"
    assert (await refusal(me(service.peer("gateway", mint.token())))).reason == "UNAUTHENTICATED"


# --- tokens that are bound to an endpoint ---


async def test_bound_token_is_good_for_no_rpc_of_secrets(service: RunningSecrets) -> None:
    token = (await issue(service, assertion=service.admin_token, endpoint_id=ENDPOINT)).access_token
    assertion = await service.assertion(token)
    assert jwt.decode(assertion, options={"verify_signature": False})["eid"] == ENDPOINT
    public = [
        f"/{each.full_name}/{method.name}"
        for file in (pb.DESCRIPTOR, secrets_pb2.DESCRIPTOR)
        for each in file.services_by_name.values()
        for method in each.methods
        if not exposure(method).callers
    ]
    assert len(public) > 20
    for caller in (service.public(token), service.peer("gateway", assertion)):
        for method in (*public, "/no.such.Service/Method"):
            call = caller.channel.unary_unary(method, Empty.SerializeToString, lambda reply: reply)
            refused = await refusal(call(Empty(), metadata=caller.metadata, timeout=TIMEOUT))
            assert (refused.code, refused.message[:18]) == (grpc.StatusCode.PERMISSION_DENIED, "This token is good"), (
                method
            )


async def test_bound_token_cannot_be_exchanged_for_another(service: RunningSecrets) -> None:
    token = (await issue(service, assertion=service.admin_token, endpoint_id=ENDPOINT)).access_token
    for endpoint_id in ("", ENDPOINT, "f" * 32):
        refused = await refusal(issue(service, assertion=token, endpoint_id=endpoint_id))
        assert refused.answer == INVALID_TOKEN


async def test_bound_token_queries_its_endpoint_over_grpc_and_does_nothing_else() -> None:
    with data_directory() as directory:
        async with no_replicas(directory), running_secrets(directory) as secrets, running_serving(directory) as serving:
            admin = serving.public(secrets.admin_token)
            ids = {name: (await admin.create(name)).id for name in ("mine", "other")}
            for name in ids:
                await admin.settled(name)
            issued = await issue(secrets, assertion=secrets.admin_token, endpoint_id=ids["mine"])
            bound = serving.public(issued.access_token)
            head, _ = await bound.query("mine")
            assert head.status == 200
            for name in ("other", "nowhere"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await bound.query(name)
                assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            for call in (bound.get("mine"), bound.names(), bound.create("third"), bound.delete("mine")):
                assert (await refusal(call)).reason == "PERMISSION_DENIED"


async def test_bound_token_invokes_its_endpoint_through_the_gateway_and_does_nothing_else(stack: Platform) -> None:
    async def answers(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async with replica(stack.directory, answers) as address:
        for name in ("churn", "other"):
            await stack.publish(routes(name, ("one", 100, [(f"r-{name}", address)])))

        async def status(method: str, path: str, token: str = "bound-token", body: Any = None) -> tuple[int, str]:
            answer = await fetch(stack.url, method, path, token=token, json=body or {})
            return answer.status, answer.json().get("error_code", "")

        assert await status("POST", "/serving-endpoints/churn/invocations") == (200, "")
        assert await status("POST", "/serving-endpoints/churn/served-models/one/invocations") == (200, "")
        assert await status("POST", "/serving-endpoints/chat/completions", body={"model": "churn"}) == (200, "")
        gone = (404, "ENDPOINT_NOT_FOUND")
        assert await status("POST", "/serving-endpoints/other/invocations", "owner-token") == (200, "")
        assert await status("POST", "/serving-endpoints/other/invocations") == gone
        assert await status("POST", "/serving-endpoints/chat/completions", body={"model": "other"}) == gone
        for method, path in (
            ("GET", "/api/2.0/serving-endpoints/churn"),
            ("GET", "/api/2.0/preview/scim/v2/Me"),
            ("GET", "/api/openapi.json"),
            ("POST", "/telemetry-ext"),
            ("GET", "/no/such/path"),
        ):
            assert (await fetch(stack.url, method, path, token="bound-token")).status == 403, path
        assert stack.serving.seen == [], "nothing of it reached a service"


# --- forms ---


def basic(client_id: str, secret: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{client_id}:{secret}".encode()).decode()}


def details(endpoint_id: str = ENDPOINT, **changes: Any) -> str:
    entry = {
        "type": "workspace_permission",
        "object_type": "serving-endpoints",
        "object_path": f"/serving-endpoints/{endpoint_id}",
        "actions": ["query_inference_endpoint"],
    }
    return json.dumps([{**entry, **changes}])


async def post(stack: Platform, form: Any, **headers: str) -> Answer:
    """A form, as the fields, pairs or bytes given; what is answered is never to be kept by anybody."""
    body = form if isinstance(form, bytes) else urlencode(form).encode()
    sent = {"content-type": "application/x-www-form-urlencoded", **headers}
    answer = await fetch(stack.url, "POST", "/oidc/v1/token", body=body, headers=sent)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"
    return answer


async def test_discovery_needs_no_credential_and_names_the_configured_address(stack: Platform) -> None:
    for path in ("", "accounts/1234-abcd/"):
        answer = await fetch(
            stack.url,
            "GET",
            f"/oidc/{path}.well-known/oauth-authorization-server",
            headers={"host": "evil.example", "x-forwarded-host": "evil.example", "x-forwarded-proto": "http"},
        )
        assert answer.status == 200
        found = answer.json()
        root = "https://tessera.example/oidc"
        assert found["issuer"] == root
        assert found["token_endpoint"] == f"{root}/v1/token"
        assert found["authorization_endpoint"] == f"{root}/v1/authorize"
        assert found["grant_types_supported"] == ["client_credentials", JWT_BEARER]
        assert b"evil" not in answer.body


async def test_login_through_a_browser_is_refused_with_the_way_out(stack: Platform) -> None:
    answer = await fetch(stack.url, "GET", "/oidc/v1/authorize?client_id=databricks-cli&response_type=code")
    assert (answer.status, answer.json()["error"]) == (400, "unsupported_response_type")
    assert "client_credentials" in answer.json()["error_description"]


async def test_client_gets_a_token_by_header_or_by_form(stack: Platform) -> None:
    client_id, secret = CLIENT
    for form, headers in (
        ({"grant_type": "client_credentials", "scope": "all-apis"}, basic(*CLIENT)),
        ({"grant_type": "client_credentials"}, basic(*CLIENT)),
        ({"grant_type": "client_credentials", "client_id": client_id}, basic(*CLIENT)),
        ({"grant_type": "client_credentials"}, basic("the%2Dclient", "the%2Dsecret")),
        ({"grant_type": "client_credentials", "client_id": client_id, "client_secret": secret}, {}),
        ({"grant_type": "client_credentials", "scope": "", "unheard": "of"}, basic(*CLIENT)),
    ):
        answer = await post(stack, form, **headers)
        assert answer.status == 200
        assert answer.json() == {
            "access_token": "issued",
            "token_type": "Bearer",
            "expires_in": 3600,
            "scope": "all-apis",
        }
        assert stack.authority.issued[-1].endpoint_id == ""


async def test_token_for_an_endpoint_is_had_by_either_grant(stack: Platform) -> None:
    for form, headers in (
        ({"grant_type": JWT_BEARER, "assertion": "owner-token", "authorization_details": details()}, {}),
        ({"grant_type": "client_credentials", "authorization_details": details()}, basic(*CLIENT)),
    ):
        answer = await post(stack, form, **headers)
        assert answer.json() == {
            "access_token": "issued",
            "token_type": "Bearer",
            "expires_in": 3600,
            "authorization_details": json.loads(details()),
        }
        assert stack.authority.issued[-1].endpoint_id == ENDPOINT


GRANT = ("grant_type", "client_credentials")
BY_FORM = (("client_id", CLIENT[0]), ("client_secret", CLIENT[1]))
WITH_ASSERTION = (("grant_type", JWT_BEARER), ("assertion", "owner-token"))
WRONG_FORMS: dict[str, tuple[Any, dict[str, str], int, str]] = {
    "nothing": (b"", {}, 400, "invalid_request"),
    "no grant": ((("scope", "all-apis"),), basic(*CLIENT), 400, "invalid_request"),
    "empty grant": ((("grant_type", ""),), basic(*CLIENT), 400, "invalid_request"),
    "code": ((("grant_type", "authorization_code"), ("code", "x")), {}, 400, "unsupported_grant_type"),
    "refresh": ((("grant_type", "refresh_token"), ("refresh_token", "x")), {}, 400, "unsupported_grant_type"),
    "password": ((("grant_type", "password"),), basic(*CLIENT), 400, "unsupported_grant_type"),
    "token exchange": (
        (("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),),
        {},
        400,
        "unsupported_grant_type",
    ),
    "grant twice": ((GRANT, GRANT), basic(*CLIENT), 400, "invalid_request"),
    "two grants": ((GRANT, ("grant_type", JWT_BEARER)), basic(*CLIENT), 400, "invalid_request"),
    "too many fields": (
        [GRANT, *((f"f{number}", "x") for number in range(20))],
        basic(*CLIENT),
        400,
        "invalid_request",
    ),
    "no form": (b'{"grant_type": "client_credentials"}', basic(*CLIENT), 400, "invalid_request"),
    "JSON": ((GRANT,), basic(*CLIENT) | {"content-type": "application/json"}, 400, "invalid_request"),
    "no type": ((GRANT,), basic(*CLIENT) | {"content-type": ""}, 400, "invalid_request"),
    "no UTF-8": (b"grant_type=client_credentials&x=\xff", basic(*CLIENT), 400, "invalid_request"),
    "no UTF-8 behind percent": (b"grant_type=client_credentials&x=%ff", basic(*CLIENT), 400, "invalid_request"),
    "too large": ((GRANT, ("x", "x" * 65_536)), basic(*CLIENT), 400, "invalid_request"),
    "another scope": ((GRANT, ("scope", "sql")), basic(*CLIENT), 400, "invalid_scope"),
    "more scopes": ((GRANT, ("scope", "all-apis offline_access")), basic(*CLIENT), 400, "invalid_scope"),
    "group": ((GRANT, ("assume_group", "1")), basic(*CLIENT), 400, "invalid_request"),
    "no client": ((GRANT,), {}, 401, "invalid_client"),
    "no secret": ((GRANT, BY_FORM[0]), {}, 401, "invalid_client"),
    "bearer": ((GRANT,), {"authorization": "Bearer owner-token"}, 401, "invalid_client"),
    "bearer and form": ((GRANT, BY_FORM[0]), {"authorization": "Bearer owner-token"}, 401, "invalid_client"),
    "no base64": ((GRANT,), {"authorization": "Basic !!!"}, 401, "invalid_client"),
    "no colon": ((GRANT,), {"authorization": "Basic eA=="}, 401, "invalid_client"),
    "no text": ((GRANT,), {"authorization": "Basic /////w=="}, 401, "invalid_client"),
    "wrong secret": ((GRANT,), basic(CLIENT[0], "wrong"), 401, "invalid_client"),
    "wrong secret by form": ((GRANT, BY_FORM[0], ("client_secret", "wrong")), {}, 401, "invalid_client"),
    "two credentials": ((GRANT, *BY_FORM), basic(*CLIENT), 400, "invalid_request"),
    "two clients": ((GRANT, ("client_id", "another")), basic(*CLIENT), 400, "invalid_request"),
    "no assertion": ((WITH_ASSERTION[0], ("authorization_details", details())), {}, 400, "invalid_request"),
    "no details": (WITH_ASSERTION, {}, 400, "invalid_request"),
    "wrong assertion": (
        (WITH_ASSERTION[0], ("assertion", "x"), ("authorization_details", details())),
        {},
        400,
        "invalid_grant",
    ),
}
WRONG_DETAILS = {
    "no JSON": "x",
    "no list": "{}",
    "number": "1",
    "null": "null",
    "empty list": "[]",
    "two entries": json.dumps(json.loads(details()) * 2),
    "list of text": '["x"]',
    "list of lists": "[[]]",
    "another type": details(type="other"),
    "another object type": details(object_type="jobs"),
    "no hex": details("g" * 32),
    "capitals": details(ENDPOINT.upper()),
    "short id": details("a" * 31),
    "a path further": details(object_path=f"/serving-endpoints/{ENDPOINT}/x"),
    "line end": details(object_path=f"/serving-endpoints/{ENDPOINT}\n"),
    "path as number": details(object_path=1),
    "another action": details(actions=["manage_inference_endpoint"]),
    "more actions": details(actions=["query_inference_endpoint", "manage"]),
    "no actions": details(actions=[]),
    "more fields": details(locations=["x"]),
    "deep": "[" * 2000,
}


@pytest.mark.parametrize("wrong", WRONG_FORMS)
async def test_wrong_form_is_refused_in_the_shape_of_oauth(strict: Platform, wrong: str) -> None:
    form, headers, status, error = WRONG_FORMS[wrong]
    answer = await post(strict, form, **headers)
    found = answer.json()
    assert (answer.status, found["error"], set(found)) == (status, error, {"error", "error_description"})
    assert answer.headers.get("www-authenticate") == ('Basic realm="tessera"' if status == 401 else None)


@pytest.mark.parametrize("wrong", WRONG_DETAILS)
async def test_authorization_details_of_any_other_form_are_refused(strict: Platform, wrong: str) -> None:
    asked_before = len(strict.authority.issued)
    form = dict(WITH_ASSERTION) | {"authorization_details": WRONG_DETAILS[wrong]}
    answer = await post(strict, form)
    assert (answer.status, answer.json()["error"]) == (400, "invalid_authorization_details")
    assert len(strict.authority.issued) == asked_before


async def test_no_token_is_issued_while_secrets_is_gone_and_a_retry_is_asked_for(stack: Platform) -> None:
    stack.authority.is_gone = True
    answer = await post(stack, (GRANT,), **basic(*CLIENT))
    assert (answer.status, answer.json()["error"]) == (503, "temporarily_unavailable")
    assert answer.headers["retry-after"] == "1"


async def test_refused_client_is_an_event_and_what_it_sent_is_not_in_it(
    stack: Platform, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await post(stack, (GRANT,), **basic(CLIENT[0], "a-wrong-secret"))
        wrong = {"assertion": "a-wrong-token", "authorization_details": details()}
        await post(stack, {"grant_type": JWT_BEARER, **wrong})
    assert [record.message for record in caplog.records].count("credential refused") == 2
    assert "a-wrong" not in caplog.text


async def test_only_post_gets_tokens(stack: Platform) -> None:
    answer = await fetch(stack.url, "GET", "/oidc/v1/token?grant_type=client_credentials", headers=basic(*CLIENT))
    assert answer.status == 401
    assert stack.authority.issued == []
