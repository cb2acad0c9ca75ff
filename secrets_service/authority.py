"""Who is calling: tokens in, assertions out. Only this service knows tokens, and only it signs.

What is stored about a token is remembered until something is written, so a revoked token is refused here at once, and
within ten seconds everywhere. It is remembered under the token's id and MAC together: a wrong secret meets nothing
there and takes the way of an unknown id, so that the time of a refusal does not tell which ids exist.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from secrets_service import names, store, tokens
from secrets_service.memory import RememberingDatabase
from secrets_service.model import StoredToken
from servicekit import identity
from servicekit.context import Principal
from servicekit.identity import AssertionVerifier, Identify, Identity, InvalidToken


class SigningKeys:
    """The keys of assertions: all verify, the newest signs."""

    def __init__(self, keys: Mapping[str, Ed25519PrivateKey]) -> None:
        self._key_id, self._key = list(keys.items())[-1]
        self.public: dict[str, Ed25519PublicKey] = {key_id: key.public_key() for key_id, key in keys.items()}

    def assertion(self, principal: Principal, *, issued_at: float) -> str:
        """A signed statement about a principal, good for 60 s from `issued_at` (Unix seconds)."""
        claims = identity.claims_of(principal, issued_at=issued_at)
        return jwt.encode(claims, self._key, algorithm=identity.ALGORITHM, headers={"kid": self._key_id})


class Authority:
    """Tells who owns a token, and says so to the other services. `now` tells Unix seconds."""

    def __init__(
        self,
        database: RememberingDatabase,
        mac: tokens.TokenMac,
        keys: SigningKeys,
        *,
        workspace_id: str,
        now: Callable[[], float],
    ) -> None:
        self._database = database
        self._mac = mac
        self._keys = keys
        self._now = now
        self.workspace_id = workspace_id

    async def authenticate(self, text: str) -> Principal:
        """The owner of a token; raises InvalidToken, in the same words whatever is wrong."""
        presented = tokens.parse(text)
        if presented is None:
            raise InvalidToken
        stored = await self._database.remembered(_find_right, presented.id, self._mac.of(presented), if_kept=_exists)
        if stored is None:
            raise InvalidToken
        if not stored.owner.profile.is_active or self._now() * 1000 >= stored.info.expires_ms:
            raise InvalidToken
        return _principal(stored)

    async def confirm(self, principal: Principal) -> None:
        """Raises InvalidToken when the token behind an assertion is good no more: an assertion outlives it."""
        stored = await self._database.remembered(store.find_token, principal.token_id, if_kept=_exists)
        if stored is None or not stored.owner.profile.is_active:
            raise InvalidToken

    async def is_active(self, principal_id: str) -> bool:
        """Whether a user or service principal exists and may act."""
        found = await self._database.read(store.find_user, int(principal_id)) if names.is_id(principal_id) else None
        return found is not None and found.profile.is_active

    async def exchange(self, text: str) -> str:
        """An assertion about the owner of a token; raises InvalidToken."""
        return self._keys.assertion(await self.authenticate(text), issued_at=self._now())

    async def public_keys(self) -> Mapping[str, Ed25519PublicKey]:
        """The keys that assertions are verified with, by their ids."""
        return self._keys.public


def by_own_token(authority: Authority) -> Identify:
    """How the public listener of this service knows its callers: without asking itself over gRPC."""

    async def identify(metadata: Mapping[str, str], method: str) -> Identity:
        return Identity(await authority.authenticate(identity.token_from(metadata.get("authorization"))))

    return identify


def by_confirmed_assertion(authority: Authority) -> Identify:
    """How the internal listeners of this service know on whose behalf a peer calls.

    Here, where tokens are known, a revoked one is refused at once, whatever its assertion still says.
    """
    by_peer = identity.by_assertion(AssertionVerifier(authority.public_keys))

    async def identify(metadata: Mapping[str, str], method: str) -> Identity | None:
        found = await by_peer(metadata, method)
        if found is not None:
            await authority.confirm(found.principal)
        return found

    return identify


def _find_right(connection: sqlite3.Connection, token_id: str, mac: bytes) -> StoredToken | None:
    """The token of that id, if it has that MAC. Nothing but the MAC is read before it was compared."""
    if not tokens.is_same(mac, store.find_token_mac(connection, token_id)):
        return None
    return store.find_token(connection, token_id)


def _exists(token: StoredToken | None) -> bool:
    """Ids that nobody has are endless, so they are not remembered."""
    return token is not None


def _principal(token: StoredToken) -> Principal:
    return Principal(
        id=str(token.owner.id),
        name=token.owner.profile.name,
        groups=frozenset(group.name for group in token.owner.groups),
        token_id=token.info.id,
        token_expires_at=token.info.expires_ms / 1000,
        kind=token.owner.kind,
    )
