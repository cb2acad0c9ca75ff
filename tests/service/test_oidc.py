"""Tokens of an external issuer (S13): who gets in with one, and that no forged one ever does."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from secrets_service import issuer_keys
from servicekit.identity import TokenExchange
from servicekit.threads import OneThread
from tessera.identity.v1 import identity_pb2 as pb
from tests.support.certificates import CertificateAuthority, Files
from tests.support.eventually import eventually
from tests.support.issuer import (
    AUDIENCE,
    KEYS,
    BabblingIssuer,
    DrippingIssuer,
    EndlessIssuer,
    FailingIssuer,
    HugeIssuer,
    Issuer,
    KeylessIssuer,
    LyingIssuer,
    RedirectingIssuer,
    SilentIssuer,
    serving,
)
from tests.support.jwt_forgery import FORGERIES, Mint, another_key, public_jwk
from tests.support.secrets import (
    INVALID_TOKEN,
    Caller,
    Refusal,
    RunningSecrets,
    lets_nobody_in,
    refusal,
    running_secrets,
)


@asynccontextmanager
async def trusting(issuer: Issuer, **settings: Any) -> AsyncIterator[RunningSecrets]:
    """Secrets that takes the tokens of an issuer, and knows bob."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(issuer))
        configured = {"oidc_issuer": issuer.url, "oidc_audience": AUDIENCE, **settings}
        service = await stack.enter_async_context(running_secrets(**configured))
        await service.admin.create_user("bob")
        yield service


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
async def service(issuer: Issuer) -> AsyncIterator[RunningSecrets]:
    async with trusting(issuer) as running:
        yield running


async def me(caller: Caller) -> pb.User:
    user: pb.User = await caller(caller.scim.GetMe, pb.GetMeRequest())
    return user


async def refused(service: RunningSecrets, token: str) -> Refusal:
    """How an exchange is refused."""
    return await refusal(service.assertion(token))


async def is_invalid(service: RunningSecrets, token: str) -> bool:
    """Whether a token is refused in the usual words, and lets nobody in at the public listener."""
    return (await refused(service, token)).answer == INVALID_TOKEN and await lets_nobody_in(service, token)


# --- who gets in ---


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
async def test_user_is_known_by_an_external_token(algorithm: str) -> None:
    issuer = Issuer(algorithm)
    async with trusting(issuer) as service:
        for header in ({}, {"typ": None}, {"typ": "at+jwt"}, {"kid": None}):
            assert (await me(service.public(issuer.mint().token(header=header)))).user_name == "bob"
        assert issuer.fetches == 1


async def test_assertion_about_an_external_identity_says_what_the_database_says(
    service: RunningSecrets, issuer: Issuer
) -> None:
    minted = issuer.mint(groups=["admins"], name="mallory")
    token = minted.token()
    claims = jwt.decode(await service.assertion(token), options={"verify_signature": False})
    assert (claims["name"], claims["groups"], claims["tid"]) == ("bob", ["users"], "")
    assert claims["texp"] == minted.claims["exp"]
    assert "eid" not in claims
    peer = service.peer("gateway", await service.assertion(token))
    assert (await me(peer)).user_name == "bob"


async def test_service_principal_is_known_by_its_application_id(service: RunningSecrets, issuer: Issuer) -> None:
    request = pb.CreateServicePrincipalRequest(display_name="robot")
    robot = await service.admin(service.admin.scim.CreateServicePrincipal, request)
    found = await me(service.public(issuer.mint(robot.application_id.upper()).token()))
    assert found.user_name == robot.application_id


async def test_name_is_folded_once_as_every_other(service: RunningSecrets, issuer: Issuer) -> None:
    await service.admin.create_user("Zoë@example.com")
    for name in ("ZOË@EXAMPLE.COM", "zoe\u0308@example.com"):
        assert (await me(service.public(issuer.mint(name).token()))).user_name == "Zoë@example.com"


async def test_nobody_is_created_and_groups_are_nobody(service: RunningSecrets, issuer: Issuer) -> None:
    for name in ("mallory", "admins", "", " bob", "bob\u200b", "x" * 300):
        assert await is_invalid(service, issuer.mint(name).token())
    users = await service.admin(service.admin.scim.ListUsers, pb.ListRequest())
    assert {user.user_name for user in users.resources} == {"admin", "bob"}


@pytest.mark.parametrize("verified", [False, None, "true", 1])
async def test_email_counts_only_when_it_is_verified(verified: Any) -> None:
    issuer = Issuer()
    async with trusting(issuer, oidc_claim="email") as service:
        good = issuer.mint("somebody", email="Bob", email_verified=True).token()
        assert (await me(service.public(good))).user_name == "bob"
        assert await is_invalid(service, issuer.mint("bob", email="bob", email_verified=verified).token())
        assert await is_invalid(service, issuer.mint("bob", email_verified=True).token())


async def test_whoever_is_deactivated_or_deleted_is_refused_at_once(service: RunningSecrets, issuer: Issuer) -> None:
    token = issuer.mint().token()
    bob = await me(service.public(token))
    peer = service.peer("gateway", await service.assertion(token))
    patch = [pb.PatchOperation(op="replace", path="active")]
    patch[0].value.bool_value = False
    await service.admin(service.admin.scim.PatchUser, pb.PatchRequest(id=bob.id, operations=patch))
    assert await is_invalid(service, token)
    assert (await refusal(me(peer))).answer == INVALID_TOKEN
    patch[0].value.bool_value = True
    await service.admin(service.admin.scim.PatchUser, pb.PatchRequest(id=bob.id, operations=patch))
    assert (await me(peer)).id == bob.id
    await service.admin(service.admin.scim.DeleteUser, pb.DeleteRequest(id=bob.id))
    assert await is_invalid(service, token)
    await service.admin.create_user("bob")
    assert (await refusal(me(peer))).answer == INVALID_TOKEN  # the assertion is about another bob


async def test_token_is_refused_once_it_has_expired_and_peers_remember_it_no_longer(
    service: RunningSecrets, issuer: Issuer
) -> None:
    exchange = TokenExchange(service.peer_channels["gateway"], stale_seconds=3600)
    mint = issuer.mint(exp=int(time.time()) + 60)
    assert (await exchange.identify(mint.token())).principal.token_expires_at == mint.claims["exp"]
    service.clock.offset = 61
    assert await is_invalid(service, mint.token())


async def test_clock_of_the_issuer_may_be_a_minute_ahead(service: RunningSecrets, issuer: Issuer) -> None:
    now = int(time.time())
    assert (await me(service.public(issuer.mint(iat=now + 50, nbf=now + 50).token()))).user_name == "bob"


async def test_without_settings_no_external_token_is_taken(issuer: Issuer) -> None:
    async with serving(issuer), running_secrets() as service:
        await service.admin.create_user("bob")
        assert await is_invalid(service, issuer.mint().token())
        assert issuer.asked == []


# --- who does not ---


@pytest.fixture(scope="module")
async def watched() -> AsyncIterator[tuple[RunningSecrets, Mint, Issuer]]:
    """One service for all forgeries: what they leave behind is part of the test."""
    issuer = Issuer("RS256")
    async with trusting(issuer) as running:
        mint = issuer.mint()
        assert (await me(running.public(mint.token()))).user_name == "bob"
        yield running, mint, issuer
        assert (await me(running.public(mint.token()))).user_name == "bob"
        assert issuer.fetches <= 2, "keys are fetched once, and once more for an id that is unknown"


@pytest.mark.parametrize("wrong", FORGERIES)
async def test_forged_external_token_is_refused(watched: tuple[RunningSecrets, Mint, Issuer], wrong: str) -> None:
    service, mint, _ = watched
    assert await is_invalid(service, FORGERIES[wrong](mint))


async def test_there_are_at_least_thirty_forgeries() -> None:
    assert len(FORGERIES) >= 30


async def test_key_that_is_too_small_or_for_another_algorithm_verifies_nothing() -> None:
    small = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    issuer = Issuer("RS256")
    issuer.documents = [
        public_jwk(small, "small"),
        public_jwk(issuer.key, "k1", alg="PS256"),
        public_jwk(issuer.key, "twice"),
        public_jwk(another_key("RS256"), "twice"),
    ]
    async with trusting(issuer) as service:
        assert await is_invalid(service, issuer.mint().token(header={"kid": "small"}, key=small))
        assert await is_invalid(service, issuer.mint().token())
        assert await is_invalid(service, issuer.mint().token(header={"kid": "twice"}))


async def test_assertion_is_no_token(service: RunningSecrets) -> None:
    assert await is_invalid(service, await service.assertion(service.admin_token))


# --- the issuer's keys ---


async def test_flood_of_unknown_key_ids_asks_the_issuer_once_in_thirty_seconds(
    service: RunningSecrets, issuer: Issuer
) -> None:
    mint = issuer.mint()
    await me(service.public(mint.token()))
    service.clock.offset = 31
    flood = [mint.token(header={"kid": f"unknown-{number}"}) for number in range(60)]
    assert all(await asyncio.gather(*(is_invalid(service, token) for token in flood)))
    assert issuer.fetches == 2
    # The key that is known goes on meanwhile, and a new one is found when its time has come.
    assert (await me(service.public(mint.token()))).user_name == "bob"
    issuer.key = another_key(issuer.algorithm)
    issuer.documents = [public_jwk(issuer.key, "k2")]
    rotated = issuer.mint().token(header={"kid": "k2"})
    assert await is_invalid(service, rotated)
    service.clock.offset = 62
    assert (await me(service.public(rotated))).user_name == "bob"
    assert await is_invalid(service, mint.token())
    assert issuer.fetches == 3


async def test_first_callers_share_one_fetch(service: RunningSecrets, issuer: Issuer) -> None:
    token = issuer.mint().token()
    found = await asyncio.gather(*(me(service.public(token)) for _ in range(20)))
    assert {user.user_name for user in found} == {"bob"}
    assert issuer.fetches == 1


async def test_withdrawn_key_is_forgotten_after_a_while_though_nobody_asks_for_another(
    service: RunningSecrets, issuer: Issuer
) -> None:
    good = issuer.mint(exp=int(time.time()) + 3600).token()
    await me(service.public(good))
    issuer.documents = [public_jwk(another_key("EdDSA"), "k2")]
    service.clock.offset = issuer_keys.KEPT_SECONDS + 1
    await me(service.public(good))  # it does not wait
    await eventually(lambda: issuer.fetches == 2)

    async def is_refused() -> bool:
        try:
            await me(service.public(good))
        except grpc.aio.AioRpcError:
            return True
        return False

    await eventually(is_refused)


async def test_known_keys_go_on_while_the_issuer_is_gone_and_others_are_refused() -> None:
    issuer = Issuer()
    async with AsyncExitStack() as stack:
        gone = await stack.enter_async_context(AsyncExitStack())
        await gone.enter_async_context(serving(issuer))
        service = await stack.enter_async_context(running_secrets(oidc_issuer=issuer.url, oidc_audience=AUDIENCE))
        await service.admin.create_user("bob")
        await me(service.public(issuer.mint().token()))
        await gone.aclose()
        for offset in (31, issuer_keys.KEPT_SECONDS + 62):
            service.clock.offset = offset
            long = issuer.mint(exp=int(time.time()) + 3600)
            assert (await me(service.public(long.token()))).user_name == "bob"
            assert await is_invalid(service, long.token(header={"kid": "unknown"}))


async def test_document_may_be_as_long_as_the_limit() -> None:
    issuer = HugeIssuer()
    issuer.size = issuer_keys.DOCUMENT_LIMIT
    async with trusting(issuer) as service:
        assert (await me(service.public(issuer.mint().token()))).user_name == "bob"


async def test_issuer_that_never_ends_is_not_listened_to_for_long() -> None:
    issuer = EndlessIssuer()
    async with trusting(issuer) as service:
        said = await refusal(me(service.public(issuer.mint().token())))
        assert said.code is grpc.StatusCode.UNAVAILABLE
        assert issuer.sent < 16 << 20


async def test_issuer_is_not_asked_about_tokens_of_others(service: RunningSecrets, issuer: Issuer) -> None:
    for iss in ("https://other.example.com", None, f"{issuer.url}/"):
        assert await is_invalid(service, issuer.mint(iss=iss).token())
    assert issuer.asked == []


MISBEHAVING = [
    FailingIssuer,
    SilentIssuer,
    DrippingIssuer,
    HugeIssuer,
    LyingIssuer,
    BabblingIssuer,
    KeylessIssuer,
    RedirectingIssuer,
]


@pytest.mark.parametrize("kind", MISBEHAVING)
async def test_issuer_that_never_gave_keys_is_unavailable_and_not_asked_again_at_once(
    kind: type[Issuer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuer_keys, "FETCH_SECONDS", 0.5)
    issuer, elsewhere = kind(), Issuer()
    async with serving(elsewhere), trusting(issuer) as service:
        if isinstance(issuer, RedirectingIssuer):
            issuer.elsewhere = elsewhere.url
        for _ in range(3):
            said = await refusal(me(service.public(issuer.mint().token())))
            assert (said.code, said.reason) == (grpc.StatusCode.UNAVAILABLE, "TEMPORARILY_UNAVAILABLE")
        assert len(issuer.asked) <= 2  # discovery, and keys where that leads to them
        assert elsewhere.asked == []
        # Nobody else suffers.
        assert (await me(service.admin)).user_name == "admin"


async def test_keys_are_fetched_from_the_configured_address_without_discovery() -> None:
    issuer, keys = Issuer(), Issuer()
    keys.documents = issuer.documents
    async with serving(keys), trusting(issuer, oidc_jwks_url=f"{keys.url}{KEYS}") as service:
        assert (await me(service.public(issuer.mint().token()))).user_name == "bob"
        assert (issuer.asked, keys.asked) == ([], [KEYS])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.parametrize("is_trusted", [True, False])
async def test_issuer_must_show_a_certificate_of_its_own_name_from_a_trusted_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, is_trusted: bool
) -> None:
    authority, files = CertificateAuthority(), Files(tmp_path)
    issued = authority.issue()  # for 127.0.0.1
    files.hold(issued.cert, issued.key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.cert, files.key)
    if is_trusted:
        (tmp_path / "root.pem").write_bytes(authority.pem)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "root.pem"))
    issuer = Issuer()
    async with (
        serving(issuer, host=host, context=context),
        running_secrets(oidc_issuer=issuer.url, oidc_audience=AUDIENCE) as service,
    ):
        await service.admin.create_user("bob")
        if is_trusted and host == "127.0.0.1":
            assert (await me(service.public(issuer.mint().token()))).user_name == "bob"
        else:
            said = await refusal(me(service.public(issuer.mint().token())))
            assert (said.code, issuer.asked) == (grpc.StatusCode.UNAVAILABLE, [])


@pytest.mark.parametrize("where", ["http://127.0.0.1:1/keys", "ftp://login.example.com/keys", "/keys", 7, None])
async def test_keys_are_not_fetched_from_where_a_discovery_document_should_not_lead(
    monkeypatch: pytest.MonkeyPatch, where: Any
) -> None:
    issuer = Issuer()
    issuer.url = "https://login.example.com"
    fetched = Fetched({"issuer": issuer.url, "jwks_uri": where})
    monkeypatch.setattr(issuer_keys, "fetched", fetched)
    async with running_secrets(oidc_issuer=issuer.url, oidc_audience=AUDIENCE) as service:
        said = await refusal(me(service.public(issuer.mint().token())))
        assert said.code is grpc.StatusCode.UNAVAILABLE
        assert fetched.urls == [f"{issuer.url}/.well-known/openid-configuration"]


class Fetched:
    """Answers every fetch with one document."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.urls: list[str] = []

    async def __call__(self, url: str, thread: OneThread) -> dict[str, Any]:
        self.urls.append(url)
        return self.document


async def test_proxy_of_the_environment_is_not_asked(
    service: RunningSecrets, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(Issuer()) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert (await me(service.public(issuer.mint().token()))).user_name == "bob"
        assert proxy.asked == []
