"""Whatever stands in a JWT, it is taken or refused: nothing in header or claims makes the service stumble (S25)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secrets_service import access_tokens, jwts
from secrets_service.access_tokens import AccessToken
from secrets_service.issuer_keys import FetchFailed, IssuerKeys, usable_keys
from secrets_service.oidc import ExternalIssuer
from tests.support.jwt_forgery import Mint, another_key, encoded, public_jwk

NOW = 1_000_000.0
KEY = another_key("EdDSA")
HERE = Mint(
    "EdDSA",
    {"typ": "at+jwt", "kid": "k1"},
    {"iss": "tessera", "aud": "42", "sub": "7", "cid": "c", "iat": 999_990, "exp": 1_000_100},
    KEY,
    KEY,
)
THERE = Mint(
    "EdDSA",
    {"typ": "JWT", "kid": "k1"},
    {"iss": "https://login.example.com", "aud": "here", "email": "bob", "email_verified": True, "exp": 1_000_100},
    KEY,
    KEY,
)

values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def parts(*names: str) -> Any:
    """Some members of a header or of claims, with any values."""
    # Those two are parameters of what signs.
    others = st.text(max_size=5).filter(lambda name: name not in ("key", "self"))
    return st.dictionaries(st.sampled_from(names) | others, values, max_size=4)


headers = parts("alg", "typ", "kid", "crit", "b64", "jwk", "jku", "x5c", "cty", "zip")
claims = parts("iss", "aud", "sub", "cid", "eid", "exp", "nbf", "iat", "email", "email_verified")


class KnownKeys(IssuerKeys):
    """Keys that were fetched already."""

    def __init__(self) -> None:
        super().__init__("https://login.example.com", "", lambda: NOW)
        self._keys = usable_keys({"keys": [public_jwk(KEY, "k1")]})
        self._asked_at = self._fetched_at = NOW


def read(text: str) -> AccessToken:
    return access_tokens.read(text, {"k1": KEY.public_key()}, audience="42", now=NOW)


def external() -> ExternalIssuer:
    return ExternalIssuer(
        issuer="https://login.example.com", audience="here", claim="email", keys=KnownKeys(), now=lambda: NOW
    )


def test_the_good_ones_are_taken() -> None:
    assert read(HERE.token()) == AccessToken("7", "c", None, 1_000_100)
    assert asyncio.run(external().identify(THERE.token())).folded_name == "bob"


def test_issuer_counts_also_where_nobody_looked_at_it_before() -> None:
    good: dict[str, Any] = {"algorithm": "EdDSA", "issuer": "tessera", "audience": "42", "now": NOW}
    assert jwts.verified(HERE.token(), KEY.public_key(), **good)
    with pytest.raises(jwts.Refused):
        jwts.verified(HERE.token(), KEY.public_key(), **good | {"issuer": "other"})


@given(headers, claims)
def test_access_token_with_anything_in_it_is_read_or_refused(header: dict[str, Any], changed: dict[str, Any]) -> None:
    with contextlib.suppress(jwts.Refused):
        found = read(HERE.token(header=header, **changed))
        assert isinstance(found.owner_id, str)
        assert isinstance(found.endpoint_id, str | None)
        assert found.expires_at + 1 > NOW


@given(headers, claims)
def test_external_token_with_anything_in_it_is_taken_or_refused(
    header: dict[str, Any], changed: dict[str, Any]
) -> None:
    with contextlib.suppress(jwts.Refused):
        found = asyncio.run(external().identify(THERE.token(header=header, **changed)))
        assert found.folded_name
        assert found.expires_at > NOW


@given(st.text(max_size=60) | st.binary(max_size=60).map(encoded), st.binary(max_size=60).map(encoded))
def test_any_text_is_refused(first: str, second: str) -> None:
    for text in (first, f"{first}.{second}.", f"{first}.{second}.{second}", f"{encoded(b'{}')}.{first}.{second}"):
        with pytest.raises(jwts.Refused):
            read(text)
        with pytest.raises(jwts.Refused):
            asyncio.run(external().identify(text))


@given(values | st.lists(parts("kty", "kid", "use", "alg", "n", "e", "crv", "x", "y", "k", "d")))
def test_any_document_of_keys_is_used_or_refused(listed: Any) -> None:
    with contextlib.suppress(FetchFailed):
        usable_keys({"keys": listed})


@given(parts("kty", "kid", "use", "alg", "crv", "x", "d"))
def test_key_with_anything_in_it_is_used_or_passed_over(changed: dict[str, Any]) -> None:
    json_key = json.loads(json.dumps({**public_jwk(KEY, "k1"), **changed}))
    with contextlib.suppress(FetchFailed):
        for key in usable_keys({"keys": [json_key]}):
            assert key.algorithms == {"EdDSA"}
