"""The public keys of the external issuer: fetched from the one address that the settings lead to, and kept.

The rule: whatever tokens name, the issuer is asked at most once in `REFETCH_SECONDS`, by one fetch at a time that takes
no longer than `FETCH_SECONDS`, and has one thread even where the name server takes longer. While it does not answer,
the keys that are known go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import math
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from secrets_service.jwts import PublicKey, Refused
from secrets_service.settings import issuer_url
from servicekit.errors import Unavailable
from servicekit.threads import OneThread

log = logging.getLogger(__name__)

ALGORITHMS = frozenset(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"))
"""What external tokens may be signed with: public keys only."""

REFETCH_SECONDS = 30.0
"""How long at least lies between the beginnings of two fetches."""

KEPT_SECONDS = 600.0
"""After so long, keys that are used are fetched again, so that one that was withdrawn goes; nobody waits for that."""

FETCH_SECONDS = 3.0
"""How long a fetch may take in all."""

DOCUMENT_LIMIT = 256 * 1024
"""Bytes of a document of the issuer."""

SMALLEST_RSA = 2048
"""Bits of an RSA key."""

_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """A key, and what it may verify."""

    id: str | None
    algorithms: frozenset[str]
    key: PublicKey


class FetchFailed(Exception):
    """The issuer did not answer, or not as it should; the text tells the operator."""


class IssuerKeys:
    """The keys of one issuer. `jwks_url` may be empty: its discovery document says it. `now` tells Unix seconds."""

    def __init__(self, issuer: str, jwks_url: str, now: Callable[[], float]) -> None:
        self._issuer = issuer
        self._jwks_url = jwks_url
        self._now = now
        self._keys: tuple[IssuerKey, ...] = ()
        self._asked_at = self._fetched_at = -math.inf
        self._fetch: asyncio.Task[None] | None = None
        self._thread = OneThread("issuer keys")

    async def find(self, key_id: str | None, algorithm: str) -> PublicKey:
        """The key that a token names, or the only one that can be meant.

        Raises Refused when there is none, and Unavailable when that cannot be said because no key was ever fetched.
        """
        found = self._matching(key_id, algorithm)
        if found is None or not self._is_within(self._fetched_at, KEPT_SECONDS):
            fetch = self._fetch_under_way()
            if found is None and fetch is not None:
                await asyncio.shield(fetch)
                found = self._matching(key_id, algorithm)
        if found is not None:
            return found
        if not self._keys:
            raise Unavailable(
                "The issuer of this token does not answer just now, so it cannot be verified. Try again in a moment.",
                retry_after=math.ceil(REFETCH_SECONDS),
            )
        raise Refused("its key is not one of the issuer's")

    async def close(self) -> None:
        """Gives up a fetch that is under way."""
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.wait([self._fetch])

    def _matching(self, key_id: str | None, algorithm: str) -> PublicKey | None:
        found = [one.key for one in self._keys if key_id in (None, one.id) and algorithm in one.algorithms]
        return found[0] if len(found) == 1 else None  # none is tried out

    def _is_within(self, moment: float, seconds: float) -> bool:
        return moment <= self._now() < moment + seconds

    def _fetch_under_way(self) -> asyncio.Task[None] | None:
        """The fetch that runs, or a new one; None when the last one was just now."""
        if (self._fetch is None or self._fetch.done()) and not self._is_within(self._asked_at, REFETCH_SECONDS):
            self._asked_at = self._now()
            self._fetch = asyncio.create_task(self._refresh(), name="issuer keys")
        return None if self._fetch is None or self._fetch.done() else self._fetch

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                url = self._jwks_url or self._discovered(
                    await fetched(f"{self._issuer.rstrip('/')}/.well-known/openid-configuration", self._thread)
                )
                self._keys = usable_keys(await fetched(url, self._thread))
        except (TimeoutError, FetchFailed) as error:
            log.warning(
                "the keys of the external issuer could not be fetched",
                extra={"issuer": self._issuer, "cause": str(error) or f"no answer within {FETCH_SECONDS:g} s"},
            )
        else:
            self._fetched_at = self._now()

    def _discovered(self, document: dict[str, Any]) -> str:
        """Where a discovery document says that the keys are."""
        if document.get("issuer") != self._issuer:
            raise FetchFailed("the discovery document is of another issuer")
        url = document.get("jwks_uri")
        try:
            if not isinstance(url, str) or urlsplit(url).scheme != urlsplit(self._issuer).scheme:
                raise ValueError
            return issuer_url(url)
        except ValueError:
            raise FetchFailed("the discovery document names no address that keys may be fetched from") from None


def usable_keys(document: dict[str, Any]) -> tuple[IssuerKey, ...]:
    """The keys of a JWKS that can verify signatures; others are passed over. Raises FetchFailed if there are none."""
    listed = document.get("keys")
    found = tuple(filter(None, map(_usable_key, listed if isinstance(listed, list) else [])))
    if not found:
        raise FetchFailed("the document of keys holds none that can be used")
    return found


def _usable_key(jwk: Any) -> IssuerKey | None:
    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig" or not isinstance(jwk.get("kid"), str | None):
        return None
    try:
        key = jwt.PyJWK(jwk).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    algorithms = _algorithms(key) & ALGORITHMS
    if "alg" in jwk:
        algorithms &= {jwk["alg"]} if isinstance(jwk["alg"], str) else set()
    return IssuerKey(jwk.get("kid"), algorithms, key) if algorithms else None


def _algorithms(key: object) -> frozenset[str]:
    """What a key is for. Of a private or symmetric one: nothing."""
    match key:
        case RSAPublicKey() if key.key_size >= SMALLEST_RSA:
            return frozenset(name for name in ALGORITHMS if name.startswith(("RS", "PS")))
        case EllipticCurvePublicKey() if key.curve.name in _CURVES:
            return frozenset((_CURVES[key.curve.name],))
        case Ed25519PublicKey():
            return frozenset(("EdDSA",))
    return frozenset()


async def fetched(url: str, thread: OneThread) -> dict[str, Any]:
    """The JSON object at an address: one GET, no redirect, no proxy of the environment. Raises FetchFailed."""
    parts = urlsplit(url)
    assert parts.hostname is not None  # settings and discovery see to it
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=FETCH_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=FETCH_SECONDS)
    target = f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}"
    try:
        return await thread.run(lambda: _get(connection, target))
    finally:
        # A thread cannot be cancelled, but one that has a connection ends with it.
        if (open_socket := connection.sock) is not None:
            with contextlib.suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)


def _get(connection: http.client.HTTPConnection, target: str) -> dict[str, Any]:
    try:
        with contextlib.closing(connection):
            connection.request("GET", target, headers={"accept": "application/json"})
            with connection.getresponse() as response:
                if response.status != http.HTTPStatus.OK:
                    raise FetchFailed(f"answered with status {response.status}")
                body = response.read(DOCUMENT_LIMIT + 1)
        if len(body) > DOCUMENT_LIMIT:
            raise FetchFailed(f"answered with more than {DOCUMENT_LIMIT} bytes")
        document = json.loads(body)
    except (OSError, http.client.HTTPException) as error:
        raise FetchFailed(f"cannot be reached: {type(error).__name__}") from None
    except (ValueError, RecursionError):
        raise FetchFailed("answered with something that is no JSON") from None
    if not isinstance(document, dict):
        raise FetchFailed("answered with something that is no JSON object")
    return document
