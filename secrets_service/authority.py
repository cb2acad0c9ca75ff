"""Who is calling: tokens in, assertions out. Only this service knows tokens, and only it signs.

A token is compared with its MAC at most once in three seconds; in between it is known by its hash. Whatever makes a
token worthless clears that memory, so that it is refused at once here, and within ten seconds everywhere.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from secrets_service import store, tokens
from secrets_service.model import StoredToken
from servicekit import identity
from servicekit.context import Principal
from servicekit.database import Database
from servicekit.identity import Identify, Identity, InvalidToken

REMEMBERED = 10_000
"""How many tokens are known by their hash at the most."""


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
        database: Database,
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
        self._known: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()
        self._generation = 0
        self.workspace_id = workspace_id

    async def authenticate(self, text: str) -> Principal:
        """The owner of a token; raises InvalidToken, in the same words whatever is wrong."""
        digest = hashlib.sha256(text.encode()).digest()
        now = self._now()
        known = self._known.get(digest)
        if known is not None and known[1] <= now < known[1] + identity.FRESH_SECONDS:
            principal = known[0]
        else:
            principal = await self._looked_up(digest, text, now)
        if principal.token_expires_at is not None and now >= principal.token_expires_at:
            raise InvalidToken
        return principal

    async def exchange(self, text: str) -> str:
        """An assertion about the owner of a token; raises InvalidToken."""
        return self._keys.assertion(await self.authenticate(text), issued_at=self._now())

    async def public_keys(self) -> Mapping[str, Ed25519PublicKey]:
        """The keys that assertions are verified with, by their ids."""
        return self._keys.public

    def forget(self) -> None:
        """Makes every token be looked up again."""
        self._generation += 1
        self._known.clear()

    async def _looked_up(self, digest: bytes, text: str, now: float) -> Principal:
        generation = self._generation
        presented = tokens.parse(text)
        if presented is None:
            raise InvalidToken
        stored = await self._database.read(store.find_token, presented.id)
        # The comparison comes first: an unknown id costs as much as a wrong secret.
        if not self._mac.matches(presented, stored.mac if stored else None) or stored is None:
            raise InvalidToken
        if not stored.owner.profile.is_active:
            raise InvalidToken
        principal = _principal(stored)
        # What was forgotten while we were looking may have changed since.
        if generation == self._generation:
            self._known[digest] = (principal, now)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return principal


def by_own_token(authority: Authority) -> Identify:
    """How the public listener of this service knows its callers: without asking itself over gRPC."""

    async def identify(metadata: Mapping[str, str], method: str) -> Identity:
        return Identity(await authority.authenticate(identity.token_from(metadata.get("authorization"))))

    return identify


def _principal(token: StoredToken) -> Principal:
    return Principal(
        id=str(token.owner.id),
        name=token.owner.profile.name,
        groups=frozenset(group.name for group in token.owner.groups),
        token_id=token.info.id,
        token_expires_at=token.info.expires_ms / 1000,
    )
