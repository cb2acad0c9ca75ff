"""Callers who were removed or deactivated after they were let in, and before their transaction began."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from secrets_service import callers, directory_store, store
from secrets_service.directory import Accounts, Directory
from secrets_service.errors import AdminsOnly
from secrets_service.feed import AccessFeed
from secrets_service.memory import RememberingDatabase
from secrets_service.model import USERS, Kind, Profile
from secrets_service.personal_tokens import Tokens
from secrets_service.scopes import SecretScopes
from secrets_service.throttle import Throttle
from secrets_service.tokens import TokenMacs
from secrets_service.values import SecretValues
from servicekit.context import ADMINS, Principal
from servicekit.identity import InvalidToken
from servicekit.policy import AUTHENTICATED
from servicekit.storage import Connection
from tessera.policy import ADMIN
from tests.support.answers import plain_answers
from tests.support.policy import serving
from tests.support.stores import KEYRING, opened_store


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[RememberingDatabase]:
    async with opened_store(tmp_path / "secrets.db") as opened:
        yield RememberingDatabase(opened, plain_answers(), AccessFeed())


async def a_caller(opened: RememberingDatabase, *, is_active: bool = True, is_there: bool = True) -> Principal:
    """Somebody who still holds that it is an admin."""

    def make(connection: Connection) -> int:
        for group in (ADMINS, USERS):
            directory_store.insert_group(connection, group, folded=group)
        profile = Profile(name="ada", is_active=is_active)
        user = directory_store.insert_account(connection, profile, folded="ada", groups=[ADMINS, USERS])
        if not is_there:
            directory_store.delete_principal(connection, user.id)
        return user.id

    return Principal(str(await opened.write(make)), "ada", frozenset({ADMINS, USERS}), "t", None)


@pytest.mark.parametrize("facts", [{"is_active": False}, {"is_there": False}])
async def test_who_was_taken_away_meanwhile_makes_nothing(opened: RememberingDatabase, facts: dict[str, bool]) -> None:
    caller = await a_caller(opened, **facts)
    scopes = SecretScopes(opened, SecretValues(KEYRING, keep=1, now=lambda: 0.0))
    tokens = Tokens(opened, TokenMacs(KEYRING.token_mac_keys()), Throttle(10, lambda: 0.0), lambda: 0.0)
    users = Accounts(Directory(opened), Kind.USER)
    for row, call in (
        (AUTHENTICATED, scopes.create_scope(scope="s", initial_manage_principal="", caller=caller)),
        (AUTHENTICATED, tokens.create_token(comment="", lifetime=None, caller=caller)),
        (ADMIN, tokens.create_obo_token(application_id="ada", comment="", lifetime=None, caller=caller)),
        (ADMIN, tokens.list_managed_tokens(creator_id=None, creator_name="", caller=caller)),
        (ADMIN, users.create(Profile(name="bob"), caller=caller)),
    ):
        with serving(row), pytest.raises(InvalidToken):
            await call
    assert await scopes.list_scopes() == []


async def test_what_an_assertion_says_about_groups_makes_nobody_an_admin(opened: RememberingDatabase) -> None:
    caller = await a_caller(opened)

    def leave(connection: Connection) -> None:
        callers.require_admin(connection, caller, "do this")
        admins = store.find_principal(connection, ADMINS)
        assert admins is not None
        directory_store.change_members(connection, admins, added=[], removed=[int(caller.id)])

    with serving(ADMIN):
        await opened.write(leave)
    with serving(ADMIN) as decision, pytest.raises(AdminsOnly, match="Only admins may do this"):
        await opened.read(lambda connection: callers.require_admin(connection, caller, "do this"))
    assert not decision.is_allowed
