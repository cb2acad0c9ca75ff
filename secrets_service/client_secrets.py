"""The use cases of client secrets: what service principals get access tokens with.

Admins look after them. A secret's text leaves once, in the answer that makes it; one that is taken away is refused here
at once, and with it the access tokens that were obtained with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from secrets_service import callers, names, store, tokens
from secrets_service.errors import ClientSecretNotFound, PrincipalNotFound, TooManyClientSecrets
from secrets_service.memory import RememberingDatabase
from secrets_service.model import ClientSecret, Kind, NewClientSecret, TokenInfo, TokenKind
from secrets_service.personal_tokens import LONGEST_LIFETIME
from servicekit import audit
from servicekit.context import Principal
from servicekit.errors import InvalidParameter
from servicekit.storage import Connection

MOST_SECRETS = 5
"""Client secrets of one service principal, as upstream."""

LARGEST_PAGE = 1_000

_ACTION = "look after client secrets"
_LIFETIME = re.compile(r"([0-9]{1,10})s")
_PAGE = re.compile(r"[0-9]{1,9}")


class ClientSecrets:
    """Client secrets of service principals. `now` tells Unix seconds."""

    def __init__(self, database: RememberingDatabase, macs: tokens.TokenMacs, now: Callable[[], float]) -> None:
        self._database = database
        self._macs = macs
        self._now = now

    async def create_secret(self, *, principal_id: str, lifetime: str, caller: Principal) -> NewClientSecret:
        """Makes a client secret; `lifetime` is empty or a number of seconds with the unit."""
        seconds = _seconds(lifetime)
        secret = tokens.make(TokenKind.CLIENT_SECRET)
        created_ms = int(self._now() * 1000)
        info = TokenInfo(secret.id, created_ms, created_ms + seconds * 1000, comment="")
        mac = self._macs.of(secret)

        def create(connection: Connection) -> NewClientSecret:
            owner_id = _owner(connection, principal_id, caller)
            store.delete_expired_tokens(connection, owner_id, now_ms=created_ms)
            if len(store.client_secrets_of(connection, owner_id, now_ms=created_ms)) >= MOST_SECRETS:
                raise TooManyClientSecrets(MOST_SECRETS)
            store.insert_token(
                connection, info, owner_id=owner_id, creator_id=int(caller.id), mac=mac, kind=TokenKind.CLIENT_SECRET
            )
            audit.changed(secret_id=info.id, owner_id=principal_id, now="good")
            return NewClientSecret(ClientSecret(info, mac), secret.text)

        return await self._database.write(create)

    async def list_secrets(
        self, *, principal_id: str, page_size: int | None, page_token: str, caller: Principal
    ) -> tuple[list[ClientSecret], str]:
        """A page of the secrets that are good, oldest first, and what asks for the next one (empty on the last)."""
        size = LARGEST_PAGE if page_size is None else page_size
        if not 1 <= size <= LARGEST_PAGE:
            raise InvalidParameter(f"page_size: 1 to {LARGEST_PAGE}.")
        if page_token and not _PAGE.fullmatch(page_token):
            raise InvalidParameter("page_token: not one that this list answered with.")
        start = int(page_token or 0)

        def find(connection: Connection) -> list[ClientSecret]:
            owner_id = _owner(connection, principal_id, caller)
            return store.client_secrets_of(connection, owner_id, now_ms=int(self._now() * 1000))

        secrets = await self._database.read(find)
        end = start + size
        return secrets[start:end], str(end) if end < len(secrets) else ""

    async def delete_secret(self, *, principal_id: str, secret_id: str, caller: Principal) -> None:
        """Takes a secret away, and with it the access tokens that were obtained with it."""

        def delete(connection: Connection) -> None:
            owner_id = _owner(connection, principal_id, caller)
            owned = store.client_secrets_of(connection, owner_id, now_ms=int(self._now() * 1000))
            if secret_id not in {secret.info.id for secret in owned}:
                raise ClientSecretNotFound(secret_id[: names.LONGEST_TEXT])
            store.delete_token(connection, secret_id)

        await self._database.write(delete)


def _owner(connection: Connection, principal_id: str, caller: Principal) -> int:
    """The service principal of that id, for admins."""
    callers.require_admin(connection, caller, _ACTION)
    found = store.find_user(connection, int(principal_id)) if names.is_id(principal_id) else None
    if found is None or found.kind is not Kind.SERVICE_PRINCIPAL:
        raise PrincipalNotFound(Kind.SERVICE_PRINCIPAL, principal_id[: names.LONGEST_TEXT])
    return found.id


def _seconds(lifetime: str) -> int:
    if not lifetime:
        return LONGEST_LIFETIME
    match = _LIFETIME.fullmatch(lifetime)
    if match is None or not 1 <= int(match[1]) <= LONGEST_LIFETIME:
        raise InvalidParameter(f"lifetime: 1s to {LONGEST_LIFETIME}s (730 days), in whole seconds.")
    return int(match[1])
