"""Who is calling: a token is exchanged for an assertion, and an assertion is verified.

Secrets alone knows tokens and signs assertions. The other services send a token there once, keep the assertion for a
few seconds, and pass it on instead of the token. Nothing else in a request says who the caller is.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from servicekit import channels
from servicekit.context import Principal
from servicekit.errors import PermissionDenied, ServiceError, Unauthenticated, Unavailable
from servicekit.policy import Row
from tessera.identity.v1 import identity_pb2 as pb
from tessera.identity.v1 import identity_pb2_grpc as rpc

AUDIENCE = "tessera"
ALGORITHM = "EdDSA"
ASSERTION_SECONDS = 60

ASSERTION_TYPE = "JWT"
"""The header `typ` of assertions. Access tokens, which the same keys sign, have another one."""

FRESH_SECONDS = 3.0
"""Up to this age a cached identity is used as it is."""

REFRESH_SECONDS = 8.0
"""Up to this age it is used while it is being refreshed; beyond, a request waits for the refresh. A revoked token
therefore stops working within 10 s everywhere (S12)."""

EXCHANGE_TIMEOUT = 1.0
"""Seconds that Secrets has for one exchange."""

SKEW_SECONDS = 10.0
"""How far ahead the clock of Secrets may be of ours, where the two are on different machines."""

REFETCH_SECONDS = 1.0
"""How long at least lies between two fetches of the platform's keys."""

CAPACITY = 10_000
"""How many identities and verified assertions are kept."""


_REFUSALS = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT)
"""Answers of Secrets that are a verdict on the token; any other leaves the question open."""


class InvalidToken(PermissionDenied):
    """The token is wrong, expired or revoked, or its owner is not active."""

    def __init__(self) -> None:
        super().__init__("Invalid access token.")


class BoundToken(PermissionDenied):
    """The token is good for the queries of one endpoint, and this is something else."""

    def __init__(self) -> None:
        super().__init__(
            "This token is good for queries of one serving endpoint and for nothing else. Use the one that it was"
            " obtained with."
        )


def refuse_bound(principal: Principal) -> None:
    """Raises BoundToken for a caller whose token is good for the queries of one endpoint only."""
    if principal.endpoint_id is not None:
        raise BoundToken


def authorization_details(endpoint_id: str) -> dict[str, object]:
    """What a token for the queries of one endpoint allows, as clients say it and are told it (contract 6.9)."""
    return {
        "type": "workspace_permission",
        "object_type": "serving-endpoints",
        "object_path": f"/serving-endpoints/{endpoint_id}",
        "actions": ["query_inference_endpoint"],
    }


CREDENTIAL_REFUSED = (Unauthenticated, InvalidToken)
"""What is raised when a request's credential is missing, of a wrong kind, or not good (any more)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller and, where one is at hand, the assertion that proves it to the next service."""

    principal: Principal
    assertion: str | None = field(default=None, repr=False)


Identify = Callable[[Mapping[str, str], Row | None], Awaitable[Identity | None]]
"""Decides who calls: from a call's metadata and its row in the policy (None: there is no such method) to an identity;
raises Unauthenticated or InvalidToken. None: nobody, which only an internal RPC accepts."""


def token_from(authorization: str | None) -> str:
    """The token in an Authorization header: `Bearer <token>`, or Basic with user `token` (contract 2.3).

    Raises Unauthenticated for anything else.
    """
    kind, _, credential = (authorization or "").strip().partition(" ")
    credential = credential.strip()
    if kind.lower() == "bearer" and credential:
        return credential
    if kind.lower() == "basic":
        try:
            user, _, password = base64.b64decode(credential, validate=True).decode().partition(":")
        except ValueError:  # no base64, or no text
            raise Unauthenticated from None
        if user == "token" and password:
            return password
    raise Unauthenticated


class AssertionVerifier:
    """Verifies assertions with the platform's public keys, which are fetched when an unknown key is met."""

    def __init__(self, fetch_keys: Callable[[], Awaitable[Mapping[str, Ed25519PublicKey]]]) -> None:
        self._fetch_keys = fetch_keys
        self._keys: Mapping[str, Ed25519PublicKey] = {}
        self._fetch: asyncio.Task[None] | None = None
        self._fetched_at = 0.0
        self._verified: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()

    async def verify(self, assertion: str) -> Principal:
        """The principal that a valid assertion speaks of; raises Unauthenticated for any other."""
        digest = hashlib.sha256(assertion.encode()).digest()
        known = self._verified.get(digest)
        if known is not None and time.time() < known[1]:
            return known[0]
        try:
            header = jwt.get_unverified_header(assertion)
            if header.get("typ") != ASSERTION_TYPE:
                raise ValueError("not an assertion")
            key = await self._key(str(header.get("kid", "")))
            claims = jwt.decode(
                assertion,
                key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                options={"require": ["exp", "iat", "sub", "aud"], "verify_iat": False},
            )
            if float(claims["iat"]) > time.time() + SKEW_SECONDS:
                raise ValueError("from the future")
            principal = principal_of(claims)
        except (jwt.InvalidTokenError, KeyError, TypeError, ValueError):
            raise Unauthenticated("The assertion is not valid.") from None
        _remember(self._verified, digest, (principal, float(claims["exp"])))
        return principal

    async def _key(self, key_id: str) -> Ed25519PublicKey:
        if key_id not in self._keys:
            await asyncio.shield(self._fetched())
        return self._keys[key_id]

    def _fetched(self) -> asyncio.Task[None]:
        """The fetch under way or, however many unknown keys are named, the last one for a second, failed or not."""
        if self._fetch is None or (self._fetch.done() and time.monotonic() - self._fetched_at > REFETCH_SECONDS):
            self._fetch = asyncio.create_task(self._refetch(), name="key fetch")
            self._fetch.add_done_callback(_heard)
        return self._fetch

    async def _refetch(self) -> None:
        try:
            self._keys = await self._fetch_keys()
        finally:
            self._fetched_at = time.monotonic()


def claims_of(principal: Principal, *, issued_at: float) -> dict[str, Any]:
    """The claims of an assertion about a principal; the reverse of `principal_of`."""
    claims: dict[str, Any] = {
        "aud": AUDIENCE,
        "sub": principal.id,
        "name": principal.name,
        "kind": principal.kind,
        "groups": sorted(principal.groups),
        "gids": sorted(principal.group_ids),
        "tid": principal.token_id,
        "iat": int(issued_at),
        "exp": int(issued_at) + ASSERTION_SECONDS,
    }
    if principal.token_expires_at is not None:
        claims["texp"] = principal.token_expires_at
    if principal.endpoint_id is not None:
        claims["eid"] = principal.endpoint_id
    return claims


def principal_of(claims: Mapping[str, Any]) -> Principal:
    """The principal in the claims of a verified assertion; raises KeyError, TypeError or ValueError."""
    expires, endpoint_id = claims.get("texp"), claims.get("eid")
    return Principal(
        id=str(claims["sub"]),
        name=str(claims["name"]),
        groups=frozenset(str(group) for group in claims["groups"]),
        token_id=str(claims["tid"]),
        token_expires_at=None if expires is None else float(expires),
        kind=str(claims["kind"]),
        group_ids=frozenset(str(group) for group in claims["gids"]),
        endpoint_id=None if endpoint_id is None else str(endpoint_id),
    )


@dataclass(slots=True)
class _Known:
    identity: Identity
    verified_at: float
    """When Secrets was asked, not when it answered: a revocation in between is not known yet."""

    unanswered_at: float = -math.inf
    """When Secrets last failed to answer for this token."""


class TokenExchange:
    """Tokens to identities, through Secrets, with a bounded memory.

    `stale_seconds` is how long an identity that was verified before may be used while Secrets does not answer, and then
    only where the caller of `identify` allows it: inference (S12).
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        stale_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._authority = rpc.AuthorityStub(channel)
        self._stale_seconds = stale_seconds
        self._now = now
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._exchanges: dict[bytes, asyncio.Task[Identity]] = {}
        self._forgotten = 0
        self.verifier = AssertionVerifier(self._fetch_keys)
        """Verifies assertions with the same platform's keys."""
        self.workspace_id: str | None = None
        """The workspace's id: decimal digits. Known from the first exchange, or the first call of `platform`, on."""

    async def platform(self) -> pb.GetPlatformResponse:
        """What is the same for the whole platform; raises Unavailable while Secrets does not answer."""
        platform = await channels.call(
            self._authority.GetPlatform,
            pb.GetPlatformRequest(),
            peer="Secrets",
            timeout=EXCHANGE_TIMEOUT,
            waiting_for=self._channel,
        )
        self.workspace_id = platform.workspace_id
        return platform

    def known_count(self) -> int:
        """How many tokens are known."""
        return len(self._known)

    async def identify(self, token: str, *, may_be_stale: bool = False) -> Identity:
        """Who owns a token.

        Raises InvalidToken, or Unavailable while Secrets does not answer and no identity may be used without it.
        """
        digest = hashlib.sha256(token.encode()).digest()
        known = self._known.get(digest)
        if known is None:
            return await self._exchanged(digest, token)
        expires = known.identity.principal.token_expires_at
        if expires is not None and time.time() >= expires:
            del self._known[digest]
            raise InvalidToken
        age = self._now() - known.verified_at
        if age < FRESH_SECONDS:
            return known.identity
        usable = may_be_stale and age < self._stale_seconds
        refresh = self._exchange(digest, token)
        # Secrets is gone for sure only while it was just asked; a token that was idle since then waits for the answer.
        is_secrets_gone = self._now() - known.unanswered_at < FRESH_SECONDS
        is_over = may_be_stale and is_secrets_gone and not usable
        if (age < REFRESH_SECONDS and not is_over) or (usable and is_secrets_gone):
            return known.identity
        try:
            return await asyncio.shield(refresh)
        except Unavailable:
            if usable:
                return known.identity
            raise

    def forget(self, principal_ids: Iterable[str], token_ids: Iterable[str]) -> None:
        """Has whatever is known of these principals and credentials asked for again; answers under way count as old."""
        changed, gone = frozenset(principal_ids), frozenset(token_ids)
        if not changed and not gone:
            return
        self._forgotten += 1
        for digest, known in list(self._known.items()):
            principal = known.identity.principal
            if principal.id in changed or principal.token_id in gone:
                del self._known[digest]

    async def _exchanged(self, digest: bytes, token: str) -> Identity:
        return await asyncio.shield(self._exchange(digest, token))

    def _exchange(self, digest: bytes, token: str) -> asyncio.Task[Identity]:
        """The exchange of this token that is under way; one at a time, however many requests wait for it."""
        task = self._exchanges.get(digest)
        if task is None:
            task = asyncio.create_task(self._ask_secrets(digest, token), name="token exchange")
            self._exchanges[digest] = task
            task.add_done_callback(lambda done: self._finished(digest, done))
        return task

    def _finished(self, digest: bytes, task: asyncio.Task[Identity]) -> None:
        self._exchanges.pop(digest, None)
        _heard(task)

    async def _ask_secrets(self, digest: bytes, token: str) -> Identity:
        asked_at, forgotten = self._now(), self._forgotten
        try:
            answer = await channels.call(
                self._authority.ExchangeToken,
                pb.ExchangeTokenRequest(token=token),
                peer="Secrets",
                timeout=EXCHANGE_TIMEOUT,
                # Whoever is known may be able to go on without an answer; for others a start is worth waiting for.
                waiting_for=None if digest in self._known else self._channel,
            )
            principal = await self.verifier.verify(answer.assertion)
        except ServiceError as error:
            if error.code in _REFUSALS:
                self._known.pop(digest, None)
                raise InvalidToken from None
            # Anything else is no verdict on the token: Secrets is unreachable, or not able to say.
            if digest in self._known:
                self._known[digest].unanswered_at = self._now()
            raise Unavailable("The Secrets service does not answer just now.", retry_after=1) from None
        identity = Identity(principal, answer.assertion)
        if forgotten != self._forgotten:
            # Something changed meanwhile, maybe this: good for now, and asked again next time.
            asked_at -= REFRESH_SECONDS
        _remember(self._known, digest, _Known(identity, asked_at))
        return identity

    async def _fetch_keys(self) -> dict[str, Ed25519PublicKey]:
        platform = await self.platform()
        return {key.key_id: Ed25519PublicKey.from_public_bytes(key.public_key) for key in platform.keys}


def by_token(exchange: TokenExchange) -> Identify:
    """How a public listener knows its callers; inference may go on with known ones while Secrets is gone."""

    async def identify(metadata: Mapping[str, str], row: Row | None) -> Identity:
        token = token_from(metadata.get("authorization"))
        return await exchange.identify(token, may_be_stale=row is not None and row.is_inference)

    return identify


def by_assertion(verifier: AssertionVerifier) -> Identify:
    """How an internal listener knows on whose behalf its peer calls."""

    async def identify(metadata: Mapping[str, str], row: Row | None) -> Identity | None:
        assertion = metadata.get(channels.ASSERTION)
        if assertion is None:
            return None
        return Identity(await verifier.verify(assertion), assertion)

    return identify


def _heard(task: asyncio.Task[Any]) -> None:
    """Whoever waited has the exception of a shared task; when nobody did, nobody needs to hear of it."""
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()


def _remember(memory: OrderedDict[bytes, Any], digest: bytes, value: Any) -> None:
    memory[digest] = value
    memory.move_to_end(digest)
    while len(memory) > CAPACITY:
        memory.popitem(last=False)
