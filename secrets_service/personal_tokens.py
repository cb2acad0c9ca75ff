"""The use cases of personal access tokens.

Owners look after their own tokens, and admins after everybody's. A token's text leaves once, in the answer that makes
it; a token that is taken away is refused here at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from secrets_service import callers, names, store, tokens
from secrets_service.errors import TokenNotFound, TooManyTokens, UnknownPrincipal
from secrets_service.memory import RememberingDatabase
from secrets_service.model import ManagedToken, NewToken, TokenInfo
from secrets_service.throttle import Throttle
from servicekit import audit
from servicekit.context import Principal, current_decision
from servicekit.errors import InvalidParameter
from servicekit.storage import Connection
from tessera import policy

DAY = 24 * 3600
LONGEST_LIFETIME = 730 * DAY
"""Seconds that a token lives at the most, and when nobody says otherwise."""

MOST_TOKENS = 600
"""Tokens of one owner."""

MOST_LISTED = 10_000
"""Tokens in an admin's list, which the contract knows no pages for."""

_OTHERS = "look after the tokens of others"


class Tokens:
    """Personal access tokens. `now` tells Unix seconds."""

    def __init__(
        self, database: RememberingDatabase, macs: tokens.TokenMacs, throttle: Throttle, now: Callable[[], float]
    ) -> None:
        self._database = database
        self._macs = macs
        self._throttle = throttle
        self._now = now

    async def create_token(self, *, comment: str, lifetime: int | None, caller: Principal) -> NewToken:
        """Makes a token for the caller; `lifetime` is in seconds."""

        def owner(connection: Connection) -> int:
            return callers.require_active(connection, caller).id

        return await self._create(owner, comment=comment, lifetime=lifetime, caller=caller)

    async def create_obo_token(
        self, *, application_id: str, comment: str, lifetime: int | None, caller: Principal
    ) -> NewToken:
        """Makes a token for another principal, on behalf of an admin."""
        folded = names.folded_principal(names.principal_name("application_id", application_id))

        def owner(connection: Connection) -> int:
            callers.require_admin(connection, caller, "create tokens for others")
            user = store.find_user_named(connection, folded)
            if user is None:
                raise UnknownPrincipal("application_id", application_id)
            return user.id

        return await self._create(owner, comment=comment, lifetime=lifetime, caller=caller)

    async def list_tokens(self, *, caller: Principal) -> list[TokenInfo]:
        """The caller's tokens that are good, oldest first."""
        return await self._database.read(store.tokens_of, int(caller.id), now_ms=self._now_ms())

    async def update_token(self, *, token_id: str, comment: str, caller: Principal) -> TokenInfo:
        """Changes the comment of one of the caller's tokens."""

        def update(connection: Connection) -> TokenInfo:
            return self._commented(connection, self._own(connection, token_id, caller), comment).info

        return await self._database.write(update)

    async def delete_token(self, *, token_id: str, caller: Principal) -> None:
        """Revokes one of the caller's tokens."""
        await self._revoke(lambda connection: self._own(connection, token_id, caller))

    async def list_managed_tokens(
        self, *, creator_id: int | None, creator_name: str, caller: Principal
    ) -> list[ManagedToken]:
        """Everybody's tokens that are good, or those that one principal made: the newest, oldest first."""

        def find(connection: Connection) -> list[ManagedToken]:
            callers.require_admin(connection, caller, _OTHERS)
            creators = None if creator_id is None else {creator_id}
            if creator_name:
                named = store.find_principal(connection, names.folded_principal(creator_name))
                creators = {named} & (creators or {named}) if named is not None else set()
            return store.newest_tokens(
                connection,
                creators=None if creators is None else sorted(creators),
                now_ms=self._now_ms(),
                count=MOST_LISTED,
            )

        return await self._database.read(find)

    async def get_managed_token(self, *, token_id: str, caller: Principal) -> ManagedToken:
        """Anybody's token."""
        return await self._database.read(lambda connection: self._managed(connection, token_id, caller))

    async def update_managed_token(self, *, token_id: str, comment: str, caller: Principal) -> ManagedToken:
        """Changes the comment of anybody's token."""

        def update(connection: Connection) -> ManagedToken:
            return self._commented(connection, self._managed(connection, token_id, caller), comment)

        return await self._database.write(update)

    async def delete_managed_token(self, *, token_id: str, caller: Principal) -> None:
        """Revokes anybody's token."""
        await self._revoke(lambda connection: self._managed(connection, token_id, caller))

    async def _create(
        self,
        find_owner: Callable[[Connection], int],
        *,
        comment: str,
        lifetime: int | None,
        caller: Principal,
    ) -> NewToken:
        names.short_text("comment", comment)
        if lifetime is None:
            lifetime = LONGEST_LIFETIME
        if not 1 <= lifetime <= LONGEST_LIFETIME:
            raise InvalidParameter(f"lifetime_seconds: 1 to {LONGEST_LIFETIME} (730 days).")
        token = tokens.make()
        created_ms = self._now_ms()
        info = TokenInfo(token.id, created_ms, created_ms + lifetime * 1000, comment)

        def create(connection: Connection) -> NewToken:
            owner_id = find_owner(connection)
            self._throttle.admit(owner_id)
            store.delete_expired_tokens(connection, owner_id, now_ms=created_ms)
            if len(store.tokens_of(connection, owner_id, now_ms=created_ms)) >= MOST_TOKENS:
                raise TooManyTokens(MOST_TOKENS)
            store.insert_token(connection, info, owner_id=owner_id, creator_id=int(caller.id), mac=self._macs.of(token))
            audit.changed(token_id=info.id, owner_id=str(owner_id), now="good")
            return NewToken(info, token.text)

        return await self._database.write(create)

    async def _revoke(self, find: Callable[[Connection], ManagedToken]) -> None:
        await self._database.write(lambda connection: store.delete_token(connection, find(connection).info.id))

    def _own(self, connection: Connection, token_id: str, caller: Principal) -> ManagedToken:
        decision = current_decision(policy.OWNER)
        found = store.find_managed_token(connection, token_id, now_ms=self._now_ms())
        if found is None or found.owner_id != int(caller.id):
            raise TokenNotFound(token_id[: names.LONGEST_TEXT])
        decision.allow()
        return found

    def _managed(self, connection: Connection, token_id: str, caller: Principal) -> ManagedToken:
        callers.require_admin(connection, caller, _OTHERS)
        found = store.find_managed_token(connection, token_id, now_ms=self._now_ms())
        if found is None:
            raise TokenNotFound(token_id[: names.LONGEST_TEXT])
        return found

    def _commented(self, connection: Connection, token: ManagedToken, comment: str) -> ManagedToken:
        names.short_text("comment", comment)
        store.comment_token(connection, token.info.id, comment)
        return replace(token, info=replace(token.info, comment=comment))

    def _now_ms(self) -> int:
        return int(self._now() * 1000)
