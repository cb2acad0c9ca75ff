"""Tokens and assertions without a listener: the cases that need a hand on clock and keys."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secrets_service import directory_store, store, tokens
from secrets_service.authority import Authority, SigningKeys
from secrets_service.feed import AccessFeed
from secrets_service.memory import RememberingDatabase
from secrets_service.model import Profile, SecretBytes, TokenInfo
from secrets_service.tokens import Presented, TokenMacs
from servicekit import identity
from servicekit.context import Principal
from servicekit.identity import InvalidToken
from servicekit.storage import Connection, StorageError
from tests.support.answers import plain_answers
from tests.support.stores import opened_store

OLD_KEY, KEY = SecretBytes(b"o" * 32), SecretBytes(b"m" * 32)
MACS = TokenMacs({0: OLD_KEY, 1: KEY})


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[RememberingDatabase]:
    async with opened_store(tmp_path / "secrets.db") as opened:
        yield RememberingDatabase(opened, plain_answers(), AccessFeed())


def an_authority(opened: RememberingDatabase, *, now: Callable[[], float] = lambda: 0.0) -> Authority:
    return Authority(opened, MACS, SigningKeys({"k": Ed25519PrivateKey.generate()}), None, workspace_id="1", now=now)


async def a_token(opened: RememberingDatabase, macs: TokenMacs = MACS) -> Presented:
    """A new user's token, which is good for the first thousand seconds."""
    token = tokens.make()

    def insert(connection: Connection) -> None:
        user = directory_store.insert_account(connection, Profile(name="bob"), folded="bob", groups=[])
        info = TokenInfo(token.id, created_ms=0, expires_ms=1_000_000, comment="")
        store.insert_token(connection, info, owner_id=user.id, creator_id=user.id, mac=macs.of(token))

    await opened.write(insert)
    return token


async def test_remembered_token_is_refused_the_moment_it_expires(opened: RememberingDatabase) -> None:
    token = await a_token(opened)
    times = [999.9]
    authority = an_authority(opened, now=lambda: times[-1])
    assert (await authority.authenticate(token.text)).token_expires_at == 1_000
    times.append(1_000.0)
    with pytest.raises(InvalidToken):
        await authority.authenticate(token.text)


async def test_wrong_secret_is_looked_up_as_an_unknown_id_is_however_well_the_token_is_known(
    opened: RememberingDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, authority = await a_token(opened), an_authority(opened)
    await authority.authenticate(token.text)
    asked: list[str] = []

    def find_token_mac(connection: Connection, token_id: str, find: Any = store.find_token_mac) -> Any:
        asked.append(token_id)
        return find(connection, token_id)

    monkeypatch.setattr(store, "find_token_mac", find_token_mac)
    monkeypatch.delattr(store, "find_token")  # nothing else is read before the secret was compared
    wrong, unknown = Presented(token.id, SecretBytes(bytes(32))), tokens.make()
    for refused in (wrong, unknown, wrong, unknown):
        with pytest.raises(InvalidToken):
            await authority.authenticate(refused.text)
    assert asked == [wrong.id, unknown.id] * 2
    assert (await authority.authenticate(token.text)).token_id == token.id


async def test_mac_under_an_older_key_is_renewed_when_its_token_is_used(opened: RememberingDatabase) -> None:
    token, authority = await a_token(opened, TokenMacs({0: OLD_KEY})), an_authority(opened)
    with pytest.raises(InvalidToken):
        await authority.authenticate(Presented(token.id, SecretBytes(bytes(32))).text)
    before = await opened.read(store.find_token_mac, token.id)
    assert before is not None
    assert before.version == 0
    for _ in range(2):
        assert (await authority.authenticate(token.text)).token_id == token.id
        assert await opened.read(store.find_token_mac, token.id) == MACS.of(token)
    with pytest.raises(InvalidToken):
        await authority.authenticate(Presented(token.id, SecretBytes(bytes(32))).text)


async def test_token_whose_mac_cannot_be_renewed_is_good_all_the_same(
    opened: RememberingDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, authority = await a_token(opened, TokenMacs({0: OLD_KEY})), an_authority(opened)

    def full(*_: Any) -> None:
        raise StorageError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "renew_token_mac", full)
        for _ in range(2):
            assert (await authority.authenticate(token.text)).token_id == token.id
    assert (await authority.authenticate(token.text)).token_id == token.id
    assert await opened.read(store.find_token_mac, token.id) == MACS.of(token)


@pytest.mark.parametrize("version", [0, 1, 2, -1])
async def test_mac_is_compared_under_the_version_that_is_stored_and_no_other(
    opened: RememberingDatabase, version: int
) -> None:
    """The MAC under one key, said to be under another, or under one that there is not."""
    token, authority = await a_token(opened), an_authority(opened)
    await opened.write(
        lambda connection: connection.execute("UPDATE tokens SET mac_version = ?", (version,)).fetchone()
    )
    if version == 1:
        assert (await authority.authenticate(token.text)).token_id == token.id
    else:
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
