"""Who is calling: tokens are exchanged, assertions verified, and both are forgotten in time."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from servicekit import channels, identity
from servicekit.context import Principal
from servicekit.errors import PermissionDenied, ServiceError, Unauthenticated, Unavailable
from servicekit.identity import (
    AssertionVerifier,
    BoundToken,
    Identity,
    InvalidToken,
    TokenExchange,
    by_assertion,
    by_token,
    claims_of,
    principal_of,
    refuse_bound,
    token_from,
)
from servicekit.policy import AUTHENTICATED, permission
from tests.support.authority import ADA, GRACE, ScriptedAuthority, Signer, authority_server
from tests.support.eventually import eventually

WINDOW = 100.0


def basic(text: str | bytes) -> str:
    return "Basic " + base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()


# --- tokens in headers


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer dapi1", "dapi1"),
        ("bearer  dapi1 ", "dapi1"),
        ("BEARER dapi1", "dapi1"),
        (basic("token:dapi1"), "dapi1"),
        (basic("token:with:colon"), "with:colon"),
        (basic("token:dapi1").replace("Basic", "bAsIc"), "dapi1"),
    ],
)
def test_token_is_found_in_the_two_documented_forms(header: str, token: str) -> None:
    assert token_from(header) == token


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        " ",
        "Bearer",
        "Bearer ",
        "dapi1",
        "Digest dapi1",
        "Bearer\tdapi1",
        "Basic",
        "Basic !!!!",
        "Basic é",
        "Basic 😀",
        basic("token:"),
        basic("token"),
        basic("ada:dapi1"),
        basic("Token:dapi1"),
        basic(b"token:\xff"),
    ],
)
def test_any_other_header_is_no_credential(header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        token_from(header)


# --- assertions


def part(content: Mapping[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def forged(header: Mapping[str, Any], claims: Mapping[str, Any], secret: bytes | None = None) -> str:
    """A token made by hand, since no library would: unsigned, or signed with HMAC under `secret`."""
    text = f"{part(header)}.{part(claims)}"
    signature = b"" if secret is None else hmac.digest(secret, text.encode(), hashlib.sha256)
    return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def claims(principal: Principal = GRACE, **others: Any) -> dict[str, Any]:
    return claims_of(principal, issued_at=time.time()) | others


class Keys:
    """The public keys of `signer`, and how often they were asked for."""

    def __init__(self, *signers: Signer) -> None:
        self.signers = list(signers)
        self.fetches = 0
        self.failure: ServiceError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> dict[str, Ed25519PublicKey]:
        self.fetches += 1
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return {signer.key_id: signer.public for signer in self.signers}


@pytest.fixture
def signer() -> Signer:
    return Signer()


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.seconds = 1_000.0
        self._offset = time.time() - self.seconds

    def __call__(self) -> float:
        return self.seconds

    def wall(self) -> float:
        return self.seconds + self._offset

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the module under test."""
    clock = Clock()
    monkeypatch.setattr(identity, "time", SimpleNamespace(time=clock.wall, monotonic=clock))
    return clock


async def test_assertion_of_secrets_is_believed(signer: Signer) -> None:
    expiring = dataclasses.replace(GRACE, token_expires_at=time.time() + 1_000)
    verifier = AssertionVerifier(Keys(signer))
    assert await verifier.verify(signer.assertion(expiring)) == expiring
    assert await verifier.verify(signer.assertion(ADA)) == ADA


def test_claims_say_all_there_is_to_a_principal() -> None:
    expiring = dataclasses.replace(GRACE, token_expires_at=1.5)
    bound = dataclasses.replace(expiring, endpoint_id="e1")
    for principal in (expiring, bound):
        assert principal_of(json.loads(json.dumps(claims_of(principal, issued_at=0.0)))) == principal
    assert GRACE.is_admin
    assert not ADA.is_admin


def test_bound_token_is_good_for_its_endpoint_and_refused_for_all_else() -> None:
    bound = dataclasses.replace(GRACE, endpoint_id="e1")
    assert bound.may_query("e1")
    assert not bound.may_query("e2")
    assert GRACE.may_query("e2")
    refuse_bound(GRACE)
    with pytest.raises(BoundToken):
        refuse_bound(bound)
    with pytest.raises(BoundToken):
        refuse_bound(dataclasses.replace(GRACE, endpoint_id=""))


def hmac_secrets(signer: Signer) -> list[bytes]:
    pem = signer.public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return [b"", signer.raw, pem]


def forgeries(signer: Signer) -> dict[str, str]:
    """Assertions that must not be believed, by what is wrong with them."""
    good = signer.assertion(GRACE)
    header, payload, signature = good.split(".")
    stranger = Signer()
    jwk = jwt.algorithms.OKPAlgorithm.to_jwk(stranger.public, as_dict=True)
    key_headers: dict[str, Any] = {
        "jwk": jwk,
        "jku": "http://127.0.0.1:1/keys",
        "x5u": "http://127.0.0.1:1/cert",
        "x5c": ["AAAA"],
    }
    tokens = {
        "nothing": "",
        "garbage": "a.b.c",
        "no signature": f"{header}.{payload}.",
        "two parts": f"{header}.{payload}",
        "another payload": f"{header}.{part(claims())}.{signature}",
        "alg none": forged({"alg": "none", "kid": "k1"}, claims()),
        "alg NONE": forged({"alg": "NONE", "kid": "k1"}, claims()),
        "no alg": forged({"kid": "k1"}, claims()),
        "signed by a stranger": stranger.assertion(GRACE),
        "no kid": jwt.encode(claims(), signer.private, algorithm="EdDSA"),
        "no type": jwt.encode(claims(), signer.private, algorithm="EdDSA", headers={"kid": "k1", "typ": None}),
        "type of access tokens": jwt.encode(
            claims(), signer.private, algorithm="EdDSA", headers={"kid": "k1", "typ": "at+jwt"}
        ),
        "unknown kid": jwt.encode(claims(), signer.private, algorithm="EdDSA", headers={"kid": "k2"}),
        "kid that is a list": forged({"alg": "EdDSA", "kid": ["k1"]}, claims()),
        "unknown critical header": jwt.encode(
            claims(), signer.private, algorithm="EdDSA", headers={"kid": "k1", "crit": ["zip"], "zip": "x"}
        ),
        "another audience": signer.assertion(GRACE, aud="elsewhere"),
        "expired": signer.assertion(GRACE, iat=int(time.time()) - 61, exp=int(time.time()) - 1),
        "from the future": signer.assertion(GRACE, iat=int(time.time()) + 30, exp=int(time.time()) + 90),
        "not valid yet": signer.assertion(GRACE, nbf=int(time.time()) + 30),
        "groups that are no list": signer.assertion(GRACE, groups=7),
        "expiry that is no number": signer.assertion(GRACE, texp="never"),
    }
    for name in ("aud", "exp", "iat", "sub", "name", "groups", "tid"):
        tokens[f"no {name}"] = signer.assertion(GRACE, **{name: None})
    for number, secret in enumerate(hmac_secrets(signer)):
        tokens[f"HS256 under public bytes {number}"] = forged({"alg": "HS256", "kid": "k1"}, claims(), secret)
    for name, value in key_headers.items():
        tokens[f"key of a stranger in {name}"] = jwt.encode(
            claims(), stranger.private, algorithm="EdDSA", headers={"kid": "k1", name: value}
        )
    return tokens


@pytest.mark.parametrize("what", sorted(forgeries(Signer())))
async def test_forged_assertion_is_refused_with_a_fixed_text(signer: Signer, what: str) -> None:
    verifier = AssertionVerifier(Keys(signer))
    for _ in range(2):
        with pytest.raises(Unauthenticated) as caught:
            await verifier.verify(forgeries(signer)[what])
        assert caught.value.message == "The assertion is not valid."
        assert caught.value.__cause__ is None


async def test_clock_of_secrets_may_be_a_little_ahead(signer: Signer) -> None:
    ahead = int(time.time()) + 5
    assert await AssertionVerifier(Keys(signer)).verify(signer.assertion(ADA, iat=ahead, exp=ahead + 60)) == ADA


async def test_verified_assertion_is_refused_once_it_expires(signer: Signer) -> None:
    verifier = AssertionVerifier(Keys(signer))
    assertion = signer.assertion(ADA, exp=int(time.time()) + 2)

    async def is_refused() -> bool:
        try:
            await verifier.verify(assertion)
        except Unauthenticated:
            return True
        return False

    assert not await is_refused()
    await eventually(is_refused)


async def test_new_key_is_fetched_when_it_is_met(signer: Signer, clock: Clock) -> None:
    keys = Keys(signer)
    verifier = AssertionVerifier(keys)
    await verifier.verify(signer.assertion())
    keys.signers = [Signer("k2")]
    clock.advance(1.1)
    assert await verifier.verify(keys.signers[0].assertion()) == ADA
    assert keys.fetches == 2


async def test_flood_of_unknown_keys_causes_one_fetch_a_second(signer: Signer, clock: Clock) -> None:
    keys = Keys(signer)
    verifier = AssertionVerifier(keys)
    for second in range(1, 4):
        for number in range(20):
            with pytest.raises(Unauthenticated):
                await verifier.verify(Signer(f"unknown-{number}").assertion())
        assert keys.fetches == second
        clock.advance(1.1)


async def test_first_callers_all_wait_for_the_keys(signer: Signer) -> None:
    keys = Keys(signer)
    keys.gate.clear()
    verifier = AssertionVerifier(keys)
    first = asyncio.create_task(verifier.verify(signer.assertion(ADA)))
    second = asyncio.create_task(verifier.verify(signer.assertion(GRACE)))
    await eventually(lambda: keys.fetches == 1)
    first.cancel()
    await asyncio.wait([first])
    keys.gate.set()
    assert await second == GRACE
    assert keys.fetches == 1


async def test_assertion_cannot_be_judged_while_keys_cannot_be_had(signer: Signer, clock: Clock) -> None:
    keys = Keys(signer)
    keys.failure = Unavailable("gone")
    verifier = AssertionVerifier(keys)
    for _ in range(2):
        with pytest.raises(Unavailable):
            await verifier.verify(signer.assertion())
    assert keys.fetches == 1
    keys.failure = None
    clock.advance(1.1)
    assert await verifier.verify(signer.assertion()) == ADA


async def test_memory_of_assertions_is_bounded(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "CAPACITY", 5)
    verifier = AssertionVerifier(Keys(signer))
    for number in range(20):
        await verifier.verify(signer.assertion(ADA, name=str(number)))
    assert len(verifier._verified) == 5


async def test_nobody_and_a_forger_are_told_apart_on_an_internal_listener(signer: Signer) -> None:
    identify = by_assertion(AssertionVerifier(Keys(signer)))
    assertion = signer.assertion(ADA)
    assert await identify({}, AUTHENTICATED) is None
    assert await identify({"authorization": "Bearer ada-token"}, AUTHENTICATED) is None
    assert await identify({channels.ASSERTION: assertion}, AUTHENTICATED) == Identity(ADA, assertion)
    with pytest.raises(Unauthenticated):
        await identify({channels.ASSERTION: ""}, AUTHENTICATED)


# --- tokens at Secrets


@asynccontextmanager
async def exchange_with(
    authority: ScriptedAuthority, clock: Clock, *, stale_seconds: float = WINDOW
) -> AsyncIterator[TokenExchange]:
    async with authority_server(authority) as channel:
        exchange = TokenExchange(channel, stale_seconds=stale_seconds, now=clock)
        yield exchange
        await settled(exchange)


async def settled(exchange: TokenExchange) -> None:
    """Waits until no exchange is under way."""
    await eventually(lambda: not exchange._exchanges)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a busy machine take longer than Secrets may in earnest."""
    monkeypatch.setattr(identity, "EXCHANGE_TIMEOUT", 10.0)


@pytest.fixture
async def authority() -> ScriptedAuthority:
    return ScriptedAuthority()


async def test_token_is_exchanged_for_identity_and_assertion(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock) as exchange:
        found = await exchange.identify("ada-token")
        assert found.principal == ADA
        assert found.assertion is not None
        assert await exchange.verifier.verify(found.assertion) == ADA
        assert "ada-token" not in repr(exchange.__dict__)
        assert found.assertion not in repr(found)


async def test_requests_with_one_token_share_one_exchange(authority: ScriptedAuthority, clock: Clock) -> None:
    authority.gate.clear()
    async with exchange_with(authority, clock) as exchange:
        waiting = [asyncio.create_task(exchange.identify("ada-token")) for _ in range(20)]
        await eventually(lambda: bool(authority.exchanges))
        authority.gate.set()
        assert {found.principal for found in await asyncio.gather(*waiting)} == {ADA}
        assert authority.exchanges == ["ada-token"]


async def test_cancelled_request_does_not_break_the_others(authority: ScriptedAuthority, clock: Clock) -> None:
    authority.gate.clear()
    async with exchange_with(authority, clock) as exchange:
        first, second = (asyncio.create_task(exchange.identify("ada-token")) for _ in range(2))
        await eventually(lambda: bool(authority.exchanges))
        first.cancel()
        await asyncio.wait([first])
        authority.gate.set()
        assert (await second).principal == ADA
        assert authority.exchanges == ["ada-token"]


async def test_fresh_identity_is_used_as_it_is(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock) as exchange:
        first = await exchange.identify("ada-token")
        clock.advance(2.9)
        assert await exchange.identify("ada-token") is first
        await settled(exchange)
        assert len(authority.exchanges) == 1


async def test_older_identity_is_used_while_it_is_refreshed(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock) as exchange:
        first = await exchange.identify("ada-token")
        clock.advance(7.9)
        authority.gate.clear()
        assert await exchange.identify("ada-token") is first
        authority.gate.set()
        await settled(exchange)
        assert len(authority.exchanges) == 2
        clock.advance(2.9)
        assert await exchange.identify("ada-token") is not first
        assert len(authority.exchanges) == 2


async def test_old_identity_is_not_used_before_it_is_refreshed(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock) as exchange:
        await exchange.identify("ada-token")
        del authority.tokens["ada-token"]
        clock.advance(8.0)
        with pytest.raises(InvalidToken):
            await exchange.identify("ada-token", may_be_stale=True)
        assert not exchange._known


@pytest.mark.parametrize("pause", [0.5, 1.0, 3.5, 9.9])
async def test_revoked_token_stops_working_within_ten_seconds(
    authority: ScriptedAuthority, clock: Clock, pause: float
) -> None:
    async with exchange_with(authority, clock) as exchange:
        await exchange.identify("ada-token")
        clock.advance(2)
        del authority.tokens["ada-token"]
        revoked_at = clock.seconds

        async def is_refused() -> bool:
            clock.advance(pause)
            try:
                await exchange.identify("ada-token", may_be_stale=True)
            except InvalidToken:
                return True
            await settled(exchange)
            return False

        await eventually(is_refused)
        assert clock.seconds - revoked_at < 10


async def test_age_counts_from_the_question_and_not_from_a_late_answer(
    authority: ScriptedAuthority, clock: Clock
) -> None:
    authority.gate.clear()
    async with exchange_with(authority, clock) as exchange:
        waiting = asyncio.create_task(exchange.identify("ada-token"))
        await eventually(lambda: bool(authority.exchanges))
        clock.advance(5)
        authority.gate.set()
        await waiting
        clock.advance(4)
        del authority.tokens["ada-token"]
        with pytest.raises(InvalidToken):
            await exchange.identify("ada-token")


async def test_refused_token_is_not_remembered(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock) as exchange:
        for _ in range(2):
            with pytest.raises(InvalidToken):
                await exchange.identify("new-token", may_be_stale=True)
        assert len(authority.exchanges) == 2
        assert not exchange._known
        authority.tokens["new-token"] = GRACE
        assert (await exchange.identify("new-token")).principal == GRACE


@pytest.mark.parametrize("failure", [Unavailable("gone"), ServiceError("The database is gone.")])
async def test_known_caller_goes_on_where_allowed_while_secrets_does_not_answer(
    authority: ScriptedAuthority, clock: Clock, failure: ServiceError
) -> None:
    async with exchange_with(authority, clock) as exchange:
        first = await exchange.identify("ada-token")
        authority.failure = failure
        clock.advance(WINDOW - 1)
        with pytest.raises(Unavailable):
            await exchange.identify("ada-token")
        assert await exchange.identify("ada-token", may_be_stale=True) is first
        with pytest.raises(Unavailable):
            await exchange.identify("grace-token", may_be_stale=True)
        clock.advance(1)
        with pytest.raises(Unavailable):
            await exchange.identify("ada-token", may_be_stale=True)


async def test_known_caller_does_not_wait_again_while_secrets_is_silent(
    authority: ScriptedAuthority, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with exchange_with(authority, clock) as exchange:
        first = await exchange.identify("ada-token")
        clock.advance(9)
        authority.gate.clear()
        monkeypatch.setattr(identity, "EXCHANGE_TIMEOUT", 1.0)
        assert await exchange.identify("ada-token", may_be_stale=True) is first  # after the time-out of one exchange
        started = time.monotonic()
        for _ in range(20):
            assert await exchange.identify("ada-token", may_be_stale=True) is first
        assert time.monotonic() - started < 0.5
        assert len(authority.exchanges) <= 3


async def test_window_is_only_for_the_time_that_secrets_is_gone(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock) as exchange:
        await exchange.identify("ada-token")
        clock.advance(9)
        authority.failure = Unavailable("gone")
        await exchange.identify("ada-token", may_be_stale=True)
        await settled(exchange)
        authority.failure = None
        del authority.tokens["ada-token"]
        clock.advance(20)
        with pytest.raises(InvalidToken):
            await exchange.identify("ada-token", may_be_stale=True)


async def test_no_window_means_fail_closed(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock, stale_seconds=0) as exchange:
        await exchange.identify("ada-token")
        authority.failure = Unavailable("gone")
        clock.advance(8)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await exchange.identify("ada-token", may_be_stale=True)


async def test_window_that_is_shorter_than_an_identity_is_kept_ends_when_it_says(
    authority: ScriptedAuthority, clock: Clock
) -> None:
    async with exchange_with(authority, clock, stale_seconds=5) as exchange:
        first = await exchange.identify("ada-token")
        authority.failure = Unavailable("gone")
        clock.advance(4)
        assert await exchange.identify("ada-token", may_be_stale=True) is first
        await settled(exchange)
        clock.advance(1)
        with pytest.raises(Unavailable):
            await exchange.identify("ada-token", may_be_stale=True)


@pytest.mark.parametrize("age", [1.0, 5.0, 20.0])
async def test_identity_is_not_used_past_the_expiry_of_its_token(
    authority: ScriptedAuthority, clock: Clock, age: float
) -> None:
    authority.tokens["ada-token"] = dataclasses.replace(ADA, token_expires_at=clock.wall() + age)
    async with exchange_with(authority, clock) as exchange:
        await exchange.identify("ada-token")
        authority.failure = Unavailable("gone")
        clock.advance(age)
        with pytest.raises(InvalidToken):
            await exchange.identify("ada-token", may_be_stale=True)
        assert not exchange._known


async def test_secrets_that_is_back_is_believed_again(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock) as exchange:
        first = await exchange.identify("ada-token")
        authority.failure = Unavailable("gone")
        clock.advance(9)
        await exchange.identify("ada-token", may_be_stale=True)
        await settled(exchange)
        authority.failure = None
        await exchange.identify("ada-token", may_be_stale=True)
        await settled(exchange)
        assert await exchange.identify("ada-token") is not first


async def test_assertion_of_a_stranger_is_not_taken_from_secrets_either(
    authority: ScriptedAuthority, clock: Clock
) -> None:
    async with exchange_with(authority, clock) as exchange:
        await exchange.identify("ada-token")
        authority.signer = Signer()
        with pytest.raises(PermissionDenied):
            await exchange.identify("grace-token")


async def test_memory_of_identities_is_bounded(
    authority: ScriptedAuthority, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "CAPACITY", 5)
    authority.tokens = {f"token-{number}": ADA for number in range(20)}
    async with exchange_with(authority, clock) as exchange:
        for token in authority.tokens:
            await exchange.identify(token)
        assert len(exchange._known) == 5
        before = len(authority.exchanges)
        await exchange.identify("token-19")
        assert len(authority.exchanges) == before


async def test_public_listener_allows_staleness_for_inference_only(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock) as exchange:
        identify = by_token(exchange)
        inference = permission("shop", "CAN_QUERY", is_inference=True)
        headers = {"authorization": "Bearer ada-token", channels.ASSERTION: authority.signer.assertion(GRACE)}
        found = await identify(headers, inference)
        assert found is not None
        assert found.principal == ADA
        authority.failure = Unavailable("gone")
        clock.advance(20)
        assert await identify(headers, inference) is found
        for row in (AUTHENTICATED, permission("shop", "CAN_QUERY"), None):
            with pytest.raises(Unavailable):
                await identify(headers, row)
        with pytest.raises(Unauthenticated):
            await identify({channels.ASSERTION: authority.signer.assertion(GRACE)}, inference)


async def test_platform_is_told_with_its_keys(authority: ScriptedAuthority, clock: Clock) -> None:
    async with exchange_with(authority, clock) as exchange:
        assert (await exchange.platform()).workspace_id == "42"
