"""Signed JWTs, our own access tokens and those of an external issuer: what must be true of either kind.

Who signs, for whom and with which algorithm is known before a token is looked at, and nothing in it changes that: a
header that brings a key along is not heeded, and one that asks for more than we know (`crit`) is refused.
"""

from __future__ import annotations

from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

SKEW = 60.0
"""Seconds by which the clock of whoever issued a token may be ahead of ours."""

LONGEST = 16 * 1024
"""Characters of a token, as many as fit into the headers of a request."""

_SIGNATURE_ONLY: Any = dict.fromkeys(
    ("verify_exp", "verify_nbf", "verify_iat", "verify_aud", "verify_iss", "verify_sub", "verify_jti"), False
)
_UNVERIFIED: Any = {**_SIGNATURE_ONLY, "verify_signature": False}


class Refused(Exception):
    """A JWT that is not taken. The text tells the operator why and repeats nothing of the token."""


def is_jwt(text: str) -> bool:
    """Whether a credential has the shape of a JWT, which no token of ours in the other form has."""
    return text.count(".") == 2


def peeked(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims of a JWT that nobody has verified; raises Refused for one that is not well formed."""
    if len(text) > LONGEST:
        raise Refused("it is too long")
    try:
        found = jwt.decode_complete(text, options=_UNVERIFIED)
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise Refused("it is malformed") from None
    header: dict[str, Any] = found["header"]
    if "crit" in header:
        raise Refused("its header has extensions")
    return header, found["payload"]


def verified(text: str, key: PublicKey, *, algorithm: str, issuer: str, audience: str, now: float) -> dict[str, Any]:
    """The claims of a JWT that this key signed for us and that is good at `now` (Unix seconds); raises Refused."""
    try:
        claims: dict[str, Any] = jwt.decode(text, key, algorithms=[algorithm], options=_SIGNATURE_ONLY)
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise Refused("its signature is wrong") from None
    if claims.get("iss") != issuer:
        raise Refused("it is of another issuer")
    if claims.get("aud") not in (audience, [audience]):
        raise Refused("it is for another audience, or for others too")
    if now >= expiry_of(claims):
        raise Refused("it has expired")
    for name in ("nbf", "iat"):
        if name in claims and _time(claims, name) > now + SKEW:
            raise Refused(f"its {name} is in the future")
    return claims


def expiry_of(claims: dict[str, Any]) -> float:
    """When a JWT stops working, in Unix seconds; raises Refused for one that does not say."""
    return _time(claims, "exp")


def _time(claims: dict[str, Any], name: str) -> float:
    value = claims.get(name)
    # JSON here knows NaN, infinities, and numbers that no float holds: none of them is below the bound.
    if not isinstance(value, int | float) or not abs(value) < 2**53:
        raise Refused(f"its {name} is no time")
    return float(value)
