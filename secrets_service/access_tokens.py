"""Access tokens of OAuth, as their claims say it.

The rule: a token proves only which credential it was obtained with, and what it was narrowed to. Everything else (name,
groups, whether the owner is active and the credential still good) is read from the database each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from secrets_service import jwts
from servicekit.identity import ALGORITHM

ISSUER = "tessera"
"""No address, so that the issuer that the settings name can never be this one."""

TYPE = "at+jwt"
"""The header `typ` (RFC 9068). Assertions, which the same keys sign, have another one."""

LIFETIME = 3600
"""Seconds that an access token is good, unless its credential ends before."""


@dataclass(frozen=True, slots=True)
class AccessToken:
    """What an access token says."""

    owner_id: str
    """The principal's id: decimal digits."""

    credential_id: str
    """The client secret or personal access token that it was obtained with; empty for an external token."""

    endpoint_id: str | None
    """The one endpoint that it may query, and nothing else; None when it is not bound."""

    expires_at: int
    """Unix seconds."""


def claims_of(token: AccessToken, *, audience: str, issued_at: int) -> dict[str, Any]:
    """The claims of an access token; the reverse of `read`."""
    claims = {
        "iss": ISSUER,
        "aud": audience,
        "sub": token.owner_id,
        "cid": token.credential_id,
        "iat": issued_at,
        "exp": token.expires_at,
    }
    return claims if token.endpoint_id is None else {**claims, "eid": token.endpoint_id}


def read(text: str, keys: Mapping[str, Ed25519PublicKey], *, audience: str, now: float) -> AccessToken:
    """What a token of ours says; raises `jwts.Refused` for everything else."""
    header, _ = jwts.peeked(text)
    key = keys.get(header.pop("kid", ""))
    # Nothing else is in a header that we wrote.
    if key is None or header != {"alg": ALGORITHM, "typ": TYPE}:
        raise jwts.Refused("its header is none of ours")
    claims = jwts.verified(text, key, algorithm=ALGORITHM, issuer=ISSUER, audience=audience, now=now)
    owner_id, credential_id, endpoint_id = claims.get("sub"), claims.get("cid"), claims.get("eid")
    if not isinstance(owner_id, str) or not isinstance(credential_id, str) or not isinstance(endpoint_id, str | None):
        raise jwts.Refused("its claims are none of ours")
    return AccessToken(owner_id, credential_id, endpoint_id, int(jwts.expiry_of(claims)))
