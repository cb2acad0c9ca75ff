"""Tokens of the one external issuer that the settings name: from a JWT to the name of a principal here.

The mapping is explicit: one claim holds a user's name or a service principal's application id. Nobody is created.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from secrets_service import jwts, names
from secrets_service.issuer_keys import ALGORITHMS, IssuerKeys
from servicekit.errors import InvalidParameter

TYPES = ("jwt", "at+jwt")
"""Values of the header `typ` in lower case; it may also be absent."""

EMAIL = "email"


@dataclass(frozen=True, slots=True)
class ExternalIdentity:
    """Who an external token speaks of."""

    folded_name: str
    """The name in the form that is compared."""

    expires_at: float
    """When the token stops working, in Unix seconds."""


class ExternalIssuer:
    """Verifies the tokens of one issuer. `now` tells Unix seconds."""

    def __init__(self, *, issuer: str, audience: str, claim: str, keys: IssuerKeys, now: Callable[[], float]) -> None:
        self._issuer = issuer
        self._audience = audience
        self._claim = claim
        self._keys = keys
        self._now = now

    async def identify(self, text: str) -> ExternalIdentity:
        """Whom a token speaks of; raises `jwts.Refused`, or Unavailable while there are no keys to judge by."""
        header, unverified = jwts.peeked(text)
        algorithm, kind = header.get("alg"), header.get("typ", "jwt")
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise jwts.Refused("its algorithm is not allowed")
        if not isinstance(kind, str) or kind.lower() not in TYPES:
            raise jwts.Refused("its type is not allowed")
        if unverified.get("iss") != self._issuer:  # the issuer is not asked about tokens of others
            raise jwts.Refused("it is of another issuer")
        key = await self._keys.find(header.get("kid"), algorithm)
        claims = jwts.verified(
            text, key, algorithm=algorithm, issuer=self._issuer, audience=self._audience, now=self._now()
        )
        if self._claim == EMAIL and claims.get("email_verified") is not True:
            raise jwts.Refused("its email is not verified")
        return ExternalIdentity(self._folded(claims.get(self._claim)), jwts.expiry_of(claims))

    def _folded(self, name: object) -> str:
        if not isinstance(name, str):
            raise jwts.Refused(f"it has no claim {self._claim}")
        try:
            return names.folded_principal(names.principal_name(self._claim, name))
        except InvalidParameter:
            raise jwts.Refused(f"its claim {self._claim} is no name") from None
