"""Who is calling: tokens in, assertions and access tokens out. Only this service knows tokens, and only it signs.

What is stored about a token is remembered until something is written, so a revoked token is refused here at once, and
within ten seconds everywhere. It is remembered under the token's id and MAC together: a wrong secret meets nothing
there and takes the way of an unknown id, so that the time of a refusal does not tell which ids exist.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from secrets_service import access_tokens, jwts, names, store, tokens
from secrets_service.access_tokens import AccessToken
from secrets_service.memory import RememberingDatabase
from secrets_service.model import NewAccessToken, StoredToken, TokenKind, TokenMac, User
from secrets_service.oidc import ExternalIssuer
from servicekit import audit, context, identity
from servicekit.context import Principal
from servicekit.identity import AssertionVerifier, Identify, Identity, InvalidToken
from servicekit.pace import HEARD_PER_MINUTE, Flood
from servicekit.policy import Row
from servicekit.source import owner
from servicekit.storage import StorageError

log = logging.getLogger(__name__)


class SigningKeys:
    """The keys of assertions and access tokens: all verify, the newest signs."""

    def __init__(self, keys: Mapping[str, Ed25519PrivateKey]) -> None:
        self._key_id, self._key = list(keys.items())[-1]
        self.public: dict[str, Ed25519PublicKey] = {key_id: key.public_key() for key_id, key in keys.items()}

    def assertion(self, principal: Principal, *, issued_at: float) -> str:
        """A signed statement about a principal, good for 60 s from `issued_at` (Unix seconds)."""
        return self._signed(identity.claims_of(principal, issued_at=issued_at), identity.ASSERTION_TYPE)

    def access_token(self, token: AccessToken, *, audience: str, issued_at: int) -> str:
        """An access token that says what `token` does."""
        claims = access_tokens.claims_of(token, audience=audience, issued_at=issued_at)
        return self._signed(claims, access_tokens.TYPE)

    def _signed(self, claims: dict[str, Any], kind: str) -> str:
        headers = {"kid": self._key_id, "typ": kind}
        return jwt.encode(claims, self._key, algorithm=identity.ALGORITHM, headers=headers)


class Authority:
    """Tells who owns a token, and says so to the other services. `now` tells Unix seconds.

    `external` verifies tokens that others issued; None: there are no such others.
    """

    def __init__(
        self,
        database: RememberingDatabase,
        macs: tokens.TokenMacs,
        keys: SigningKeys,
        external: ExternalIssuer | None,
        *,
        workspace_id: str,
        now: Callable[[], float],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`now` decides about tokens; `wall` is the time that other services have, too, and that assertions name."""
        self._database = database
        self._macs = macs
        self._keys = keys
        self._external = external
        self._now = now
        self._wall = wall
        self._refusals = Flood(HEARD_PER_MINUTE)
        self.workspace_id = workspace_id

    async def authenticate(self, text: str) -> Principal:
        """The owner of a token of any kind that is taken as one.

        Raises InvalidToken, in the same words whatever is wrong; Unavailable while that cannot be said.
        """
        if not jwts.is_jwt(text):
            stored = await self._presented(text, TokenKind.PERSONAL)
            return _principal(stored.owner, token_id=stored.info.id, expires_at=stored.info.expires_ms / 1000)
        try:
            _, claims = jwts.peeked(text)
            if claims.get("iss") == access_tokens.ISSUER:
                return await self._by_access_token(text)
            return await self._by_external_token(text)
        except jwts.Refused as refused:
            if not self._refusals.wait(owner(context.source())):
                log.info("JWT refused", extra={"cause": str(refused)})
            raise InvalidToken from None

    async def confirm(self, principal: Principal) -> None:
        """Raises InvalidToken when the token behind an assertion is good no more: an assertion outlives it."""
        await self._account(principal.id, principal.token_id)

    async def token_for_client(self, client_id: str, client_secret: str, endpoint_id: str | None) -> NewAccessToken:
        """An access token for a service principal that has a client secret; raises InvalidToken."""
        stored = await self._presented(client_secret, TokenKind.CLIENT_SECRET)
        if names.folded_principal(stored.owner.profile.name) != names.folded_principal(client_id):
            raise InvalidToken
        return self._issued(str(stored.owner.id), stored.info.id, endpoint_id, stored.info.expires_ms / 1000)

    async def token_for_assertion(self, assertion: str, endpoint_id: str | None) -> NewAccessToken:
        """An access token in exchange for a token; raises InvalidToken, also for one that is bound to an endpoint."""
        caller = await self.authenticate(assertion)
        if caller.endpoint_id is not None:
            raise InvalidToken
        return self._issued(caller.id, caller.token_id, endpoint_id, caller.token_expires_at)

    async def exchange(self, text: str) -> str:
        """An assertion about the owner of a token; raises InvalidToken."""
        return self._keys.assertion(await self.authenticate(text), issued_at=self._wall())

    async def public_keys(self) -> Mapping[str, Ed25519PublicKey]:
        """The keys that assertions are verified with, by their ids."""
        return self._keys.public

    async def _presented(self, text: str, kind: TokenKind) -> StoredToken:
        sought = self._macs.sought(text, kind)
        if sought is None:
            raise InvalidToken
        stored = await self._database.remembered(store.find_presented, sought.id, sought.candidates, if_kept=_exists)
        if stored is None or stored.kind is not kind or not self._is_good(stored):
            raise InvalidToken
        if stored.mac_version != self._macs.current:
            await self._renew(stored, sought.candidates)
        return stored

    async def _renew(self, stored: StoredToken, candidates: tuple[TokenMac, ...]) -> None:
        """Stores the MAC of a token under the key that is in use. Where that fails, it is tried at the next use."""
        try:
            with audit.apart():  # whoever presents a token did not ask for that, and may be refused yet
                await self._database.write(store.renew_token_mac, stored.info.id, stored.mac_version, candidates[-1])
        except StorageError:
            log.warning("MAC of a token not renewed", extra={"token_id": stored.info.id})

    async def _by_access_token(self, text: str) -> Principal:
        found = access_tokens.read(text, self._keys.public, audience=self.workspace_id, now=self._now())
        owner = await self._account(found.owner_id, found.credential_id)
        return _principal(
            owner, token_id=found.credential_id, expires_at=found.expires_at, endpoint_id=found.endpoint_id
        )

    async def _by_external_token(self, text: str) -> Principal:
        if self._external is None:
            raise jwts.Refused("no external issuer is configured")
        found = await self._external.identify(text)
        owner = await self._database.remembered(store.find_user_named, found.folded_name, if_kept=_exists)
        if owner is None or not owner.profile.is_active:
            raise jwts.Refused("it speaks of nobody who is active here")
        return _principal(owner, token_id="", expires_at=found.expires_at)

    async def _account(self, owner_id: str, credential_id: str) -> User:
        """An active principal whose credential is still good; raises InvalidToken.

        Without a credential id, the credential is an external token, of which we keep nothing.
        """
        if credential_id:
            stored = await self._database.remembered(store.find_token, credential_id, if_kept=_exists)
            if stored is None or str(stored.owner.id) != owner_id or not self._is_good(stored):
                raise InvalidToken
            return stored.owner
        owner = await self._database.remembered(store.find_user, int(owner_id), if_kept=_exists)
        if owner is None or not owner.profile.is_active:
            raise InvalidToken
        return owner

    def _is_good(self, stored: StoredToken) -> bool:
        return stored.owner.profile.is_active and self._now() * 1000 < stored.info.expires_ms

    def _issued(
        self, owner_id: str, credential_id: str, endpoint_id: str | None, expires_at: float | None
    ) -> NewAccessToken:
        now = int(self._now())
        end = now + access_tokens.LIFETIME if expires_at is None else min(now + access_tokens.LIFETIME, int(expires_at))
        if end <= now:  # the credential has less than a second left
            raise InvalidToken
        token = AccessToken(owner_id, credential_id, endpoint_id, end)
        return NewAccessToken(self._keys.access_token(token, audience=self.workspace_id, issued_at=now), end - now)


def by_own_token(authority: Authority) -> Identify:
    """How the public listener of this service knows its callers: without asking itself over gRPC."""

    async def identify(metadata: Mapping[str, str], row: Row | None) -> Identity:
        return Identity(await authority.authenticate(identity.token_from(metadata.get("authorization"))))

    return identify


def by_confirmed_assertion(authority: Authority) -> Identify:
    """How the internal listeners of this service know on whose behalf a peer calls.

    Here, where tokens are known, a revoked one is refused at once, whatever its assertion still says.
    """
    by_peer = identity.by_assertion(AssertionVerifier(authority.public_keys))

    async def identify(metadata: Mapping[str, str], row: Row | None) -> Identity | None:
        found = await by_peer(metadata, row)
        if found is not None:
            await authority.confirm(found.principal)
        return found

    return identify


def _exists(found: StoredToken | User | None) -> bool:
    """Ids and names that nobody has are endless, so they are not remembered."""
    return found is not None


def _principal(owner: User, *, token_id: str, expires_at: float, endpoint_id: str | None = None) -> Principal:
    return Principal(
        id=str(owner.id),
        name=owner.profile.name,
        groups=frozenset(group.name for group in owner.groups),
        group_ids=frozenset(str(group.id) for group in owner.groups),
        token_id=token_id,
        token_expires_at=expires_at,
        kind=owner.kind,
        endpoint_id=endpoint_id,
    )
