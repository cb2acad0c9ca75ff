"""The use cases of users and tokens.

Any user may look at users; only admins make them, and only admins make tokens for others. A token's text leaves once,
in the answer that makes it.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from dataclasses import replace

from secrets_service import names, store, tokens
from secrets_service.errors import (
    AdminsOnly,
    InvalidFilter,
    TokenNotFound,
    TooManyTokens,
    UnknownPrincipal,
    UserExists,
    UserNotFound,
)
from secrets_service.memory import RememberingDatabase
from secrets_service.model import USERS, Email, NewToken, Profile, TokenInfo, User, UserPage
from servicekit.context import Principal
from servicekit.errors import InvalidParameter

DAY = 24 * 3600
LONGEST_LIFETIME = 730 * DAY
"""Seconds that a token lives at the most, and when nobody says otherwise."""

MOST_TOKENS = 600
MOST_EMAILS = 10
LARGEST_PAGE = 1_000

# Attribute names and operators are written in any letter case (RFC 7644, section 3.4.2.2).
_BY_USER_NAME = re.compile(r'\s*userName\s+eq\s+("(?:[^"\\\x00-\x1f]|\\.)*")\s*', re.IGNORECASE)


class Users:
    """The users of the workspace."""

    def __init__(self, database: RememberingDatabase) -> None:
        self._database = database

    async def create_user(self, profile: Profile, *, caller: Principal) -> User:
        """Adds a user, who belongs to the group `users`."""
        profile = _normalised(profile)
        folded = names.folded_principal(profile.name)

        def create(connection: sqlite3.Connection) -> User:
            _require_admin(connection, caller, "create users")
            if store.find_principal(connection, folded) is not None:
                raise UserExists(profile.name)
            return store.insert_user(connection, profile, folded=folded, groups=[USERS])

        return await self._database.write(create)

    async def list_users(self, *, filter: str, start: int | None, count: int | None) -> UserPage:
        """A page of users in order of their creation, or the one whom the filter names.

        `start` is one-based; it and `count` are brought into their range rather than refused, as RFC 7644 asks.
        """
        start = max(1, 1 if start is None else start)
        count = min(max(0, LARGEST_PAGE if count is None else count), LARGEST_PAGE)
        if not filter.strip():
            return await self._database.read(store.user_page, start=start, count=count)
        user = await self._database.read(store.find_user_named, _filtered_name(filter))
        found = () if user is None else (user,)
        return UserPage(found[start - 1 :][:count], start, len(found))

    async def get_user(self, user_id: str) -> User:
        """The user of that id."""
        found = await self._database.read(store.find_user, int(user_id)) if names.is_id(user_id) else None
        if found is None:
            raise UserNotFound(user_id[: names.LONGEST_TEXT])
        return found


class Tokens:
    """Personal access tokens. `now` tells Unix seconds."""

    def __init__(self, database: RememberingDatabase, mac: tokens.TokenMac, now: Callable[[], float]) -> None:
        self._database = database
        self._mac = mac
        self._now = now

    async def create_token(self, *, comment: str, lifetime: int | None, caller: Principal) -> NewToken:
        """Makes a token for the caller; `lifetime` is in seconds."""
        return await self._create(int(caller.id), comment=comment, lifetime=lifetime)

    async def create_obo_token(
        self, *, application_id: str, comment: str, lifetime: int | None, caller: Principal
    ) -> NewToken:
        """Makes a token for another principal, on behalf of an admin."""
        folded = names.folded_principal(names.principal_name("application_id", application_id))

        def owner(connection: sqlite3.Connection) -> int:
            _require_admin(connection, caller, "create tokens for others")
            user = store.find_user_named(connection, folded)
            if user is None:
                raise UnknownPrincipal("application_id", application_id)
            return user.id

        return await self._create(await self._database.read(owner), comment=comment, lifetime=lifetime)

    async def list_tokens(self, *, caller: Principal) -> list[TokenInfo]:
        """The caller's tokens that are good, oldest first."""
        return await self._database.read(store.tokens_of, int(caller.id), now_ms=self._now_ms())

    async def delete_token(self, *, token_id: str, caller: Principal) -> None:
        """Revokes one of the caller's tokens."""

        def delete(connection: sqlite3.Connection) -> None:
            if not store.delete_token(connection, token_id, owner_id=int(caller.id)):
                raise TokenNotFound(token_id[: names.LONGEST_TEXT])

        await self._database.write(delete)

    async def _create(self, owner_id: int, *, comment: str, lifetime: int | None) -> NewToken:
        names.short_text("comment", comment)
        if lifetime is None:
            lifetime = LONGEST_LIFETIME
        if not 1 <= lifetime <= LONGEST_LIFETIME:
            raise InvalidParameter(f"lifetime_seconds: 1 to {LONGEST_LIFETIME} (730 days).")
        token = tokens.make()
        created_ms = self._now_ms()
        info = TokenInfo(token.id, created_ms, created_ms + lifetime * 1000, comment)

        def create(connection: sqlite3.Connection) -> None:
            store.delete_expired_tokens(connection, owner_id, now_ms=created_ms)
            if len(store.tokens_of(connection, owner_id, now_ms=created_ms)) >= MOST_TOKENS:
                raise TooManyTokens(MOST_TOKENS)
            store.insert_token(connection, info, owner_id=owner_id, mac=self._mac.of(token))

        await self._database.write(create)
        return NewToken(info, token.text)

    def _now_ms(self) -> int:
        return int(self._now() * 1000)


def _require_admin(connection: sqlite3.Connection, caller: Principal, action: str) -> None:
    user = store.find_user(connection, int(caller.id))
    if user is None or not user.is_admin:
        raise AdminsOnly(action)


def _normalised(profile: Profile) -> Profile:
    """The profile as it is kept: name in NFC, with a display name and at least one address."""
    name = names.principal_name("userName", profile.name)
    for field, text in (
        ("displayName", profile.display_name),
        ("name.givenName", profile.given_name),
        ("name.familyName", profile.family_name),
        ("externalId", profile.external_id),
    ):
        names.short_text(field, text)
    if len(profile.emails) > MOST_EMAILS:
        raise InvalidParameter(f"emails: at most {MOST_EMAILS}.")
    for email in profile.emails:
        names.short_text("emails.type", email.type)
        names.short_text("emails.value", email.value)
    return replace(
        profile,
        name=name,
        display_name=profile.display_name or name,
        emails=profile.emails or (Email("work", name, is_primary=True),),
    )


def _filtered_name(text: str) -> str:
    match = _BY_USER_NAME.fullmatch(text)
    if match is None:
        raise InvalidFilter
    try:
        name = json.loads(match[1])
        return names.folded_principal(names.principal_name("filter", name))
    except (ValueError, InvalidParameter):
        raise InvalidFilter from None
