"""Tokens and assertions without a listener: the cases that need a hand on clock and keys."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import jwt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secrets_service import directory_store, store, tokens
from secrets_service.app import MIGRATIONS
from secrets_service.authority import Authority, SigningKeys
from secrets_service.feed import AccessFeed
from secrets_service.memory import RememberingDatabase
from secrets_service.model import Profile, SecretBytes, TokenInfo
from secrets_service.tokens import TokenMac
from servicekit import database, identity
from servicekit.context import Principal
from servicekit.identity import InvalidToken
from tests.support.answers import plain_answers

MAC = TokenMac(SecretBytes(b"m" * 32))


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[RememberingDatabase]:
    async with database.opened(tmp_path / "secrets.db", MIGRATIONS) as opened:
        yield RememberingDatabase(opened, plain_answers(), AccessFeed())


async def test_remembered_token_is_refused_the_moment_it_expires(opened: RememberingDatabase) -> None:
    token = tokens.make()

    def insert(connection: sqlite3.Connection) -> None:
        user = directory_store.insert_account(connection, Profile(name="bob"), folded="bob", groups=[])
        info = TokenInfo(token.id, created_ms=0, expires_ms=1_000_000, comment="")
        store.insert_token(connection, info, owner_id=user.id, creator_id=user.id, mac=MAC.of(token))

    await opened.write(insert)
    times = [999.9]
    keys = SigningKeys({"k": Ed25519PrivateKey.generate()})
    authority = Authority(opened, MAC, keys, None, workspace_id="1", now=lambda: times[-1])
    assert (await authority.authenticate(token.text)).token_expires_at == 1_000
    times.append(1_000.0)
    with pytest.raises(InvalidToken):
        await authority.authenticate(token.text)


def test_newest_key_signs_and_all_verify() -> None:
    old, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    keys = SigningKeys({"old": old, "new": new})
    principal = Principal(id="1", name="bob", groups=frozenset(), token_id="t", token_expires_at=None)
    assertion = keys.assertion(principal, issued_at=1_000.0)
    assert jwt.get_unverified_header(assertion)["kid"] == "new"
    claims = jwt.decode(
        assertion,
        keys.public["new"],
        algorithms=[identity.ALGORITHM],
        audience=identity.AUDIENCE,
        options={"verify_exp": False},
    )
    assert (claims["iat"], claims["exp"]) == (1_000, 1_060)
    keys.public["old"].verify(old.sign(b"text"), b"text")
    with pytest.raises(InvalidSignature):
        keys.public["new"].verify(old.sign(b"text"), b"text")
