"""The short memory of the token look-up: what it saves, and that it never outlives a change."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secrets_service import store, tokens
from secrets_service.app import MIGRATIONS
from secrets_service.authority import Authority, SigningKeys
from secrets_service.model import Profile, SecretBytes, TokenInfo
from secrets_service.tokens import TokenMac
from servicekit import database
from servicekit.database import Database
from servicekit.identity import InvalidToken

MAC = TokenMac(SecretBytes(b"m" * 32))


class SlowDatabase:
    """Answers a look-up only when it is let go, with what it read before."""

    def __init__(self, real: Database) -> None:
        self._real = real
        self.may_answer = asyncio.Event()
        self.has_read = asyncio.Event()
        self.reads = 0

    async def read(self, function: Callable[..., Any], *args: Any) -> Any:
        self.reads += 1
        found = await self._real.read(function, *args)
        self.has_read.set()
        await self.may_answer.wait()
        return found


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Database]:
    async with database.opened(tmp_path / "secrets.db", MIGRATIONS) as opened:
        yield opened


@pytest.fixture
async def token(opened: Database) -> tokens.Presented:
    """A stored token of the user `bob`, good until the second 1,000."""
    token = tokens.make()

    def insert(connection: sqlite3.Connection) -> None:
        user = store.insert_user(connection, Profile(name="bob"), folded="bob", groups=[])
        info = TokenInfo(token.id, created_ms=0, expires_ms=1_000_000, comment="")
        store.insert_token(connection, info, owner_id=user.id, mac=MAC.of(token))

    await opened.write(insert)
    return token


def an_authority(database: Any, now: Callable[[], float]) -> Authority:
    keys = SigningKeys({"k": Ed25519PrivateKey.generate()})
    return Authority(database, MAC, keys, workspace_id="1", now=now)


async def test_known_token_is_looked_up_again_after_three_seconds(opened: Database, token: tokens.Presented) -> None:
    slow = SlowDatabase(opened)
    slow.may_answer.set()
    times = [100.0]
    authority = an_authority(slow, lambda: times[-1])
    for now, reads in (
        (100.0, 1),
        (102.9, 1),
        (103.1, 2),
        (104.0, 2),
        (50.0, 3),
    ):  # a clock that jumps back saves nothing
        times.append(now)
        assert (await authority.authenticate(token.text)).name == "bob"
        assert slow.reads == reads


async def test_known_token_is_refused_the_moment_it_expires(opened: Database, token: tokens.Presented) -> None:
    times = [999.0]
    authority = an_authority(opened, lambda: times[-1])
    await authority.authenticate(token.text)
    times.append(1_000.0)
    with pytest.raises(InvalidToken):
        await authority.authenticate(token.text)


async def test_token_deleted_while_it_is_looked_up_is_not_remembered(opened: Database, token: tokens.Presented) -> None:
    slow = SlowDatabase(opened)
    authority = an_authority(slow, lambda: 100.0)
    under_way = asyncio.create_task(authority.authenticate(token.text))
    await slow.has_read.wait()
    await opened.write(lambda connection: connection.execute("DELETE FROM tokens"))
    authority.forget()
    slow.may_answer.set()
    await under_way  # it was good when it was looked up
    with pytest.raises(InvalidToken):
        await authority.authenticate(token.text)


def test_newest_key_signs_and_all_verify() -> None:
    old, new = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    keys = SigningKeys({"old": old, "new": new})
    assert set(keys.public) == {"old", "new"}
    assert keys._key_id == "new"
