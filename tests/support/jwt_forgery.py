"""JWTs as nobody should take them: from one that is good, a table of those that are not.

Made by hand where no library would make them. `Mint.token()` without changes is good, which tests check first: what
refuses everything would refuse forgeries too.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

OTHER_ISSUER = "https://other.example.com"


def encoded(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def another_key(algorithm: str) -> Any:
    """A new private key for an algorithm."""
    if algorithm == "EdDSA":
        return Ed25519PrivateKey.generate()
    if algorithm.startswith("ES"):
        return generate_private_key(SECP256R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@dataclass(frozen=True)
class Mint:
    """Makes tokens: the good one, unless told otherwise. A claim or header that is None is left out."""

    algorithm: str
    header: Mapping[str, Any]
    claims: Mapping[str, Any]
    key: Any = field(repr=False)
    other_key: Any = field(repr=False)

    def token(self, *, header: Mapping[str, Any] | None = None, key: Any = None, **claims: Any) -> str:
        """A signed token. `key` signs it instead; bytes are a secret for HMAC."""
        signed = self.unsigned(header=header, **claims)
        key = self.key if key is None else key
        if isinstance(key, bytes):
            return f"{signed}.{encoded(hmac.digest(key, signed.encode(), hashlib.sha256))}"
        return f"{signed}.{encoded(jwt.get_algorithm_by_name(self.algorithm).sign(signed.encode(), key))}"

    def unsigned(self, *, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
        """Header and claims."""
        parts = ({"alg": self.algorithm, **self.header, **(header or {})}, {**self.claims, **claims})
        kept = ({name: value for name, value in part.items() if value is not None} for part in parts)
        return ".".join(encoded(json.dumps(part).encode()) for part in kept)

    def public(self, form: serialization.Encoding) -> bytes:
        """The public key as anybody can have it."""
        raw = serialization.PublicFormat.SubjectPublicKeyInfo
        return bytes(self.key.public_key().public_bytes(form, raw))

    def jwk(self) -> dict[str, Any]:
        """The other key as a header may bring it along."""
        return public_jwk(self.other_key, "forged")


def public_jwk(key: Any, key_id: str, **more: Any) -> dict[str, Any]:
    """The public part of a private key as a JWK."""
    public = key.public_key()
    name = {"Ed25519PublicKey": "EdDSA", "RSAPublicKey": "RS256"}.get(type(public).__name__, "ES256")
    document = jwt.get_algorithm_by_name(name).to_jwk(public, as_dict=True)
    return {**dict(document), "kid": key_id, "use": "sig", **more}


def _none(mint: Mint, spelled: str) -> str:
    return mint.unsigned(header={"alg": spelled}) + "."


def _hmac(mint: Mint, form: serialization.Encoding) -> str:
    return mint.token(header={"alg": "HS256"}, key=mint.public(form))


def _spliced(mint: Mint, part: int) -> str:
    """Parts of two good tokens: the claims, header or signature of another."""
    parts, others = mint.token().split("."), mint.token(iat=mint.claims["iat"] - 5, header={"cty": "x"}).split(".")
    parts[part] = others[part]
    return ".".join(parts)


def now(offset: float = 0.0) -> int:
    return int(time.time() + offset)


FORGERIES: dict[str, Callable[[Mint], str]] = {
    "algorithm none": lambda mint: _none(mint, "none"),
    "algorithm None": lambda mint: _none(mint, "None"),
    "algorithm NONE with a signature": lambda mint: mint.token(header={"alg": "NONE"}),
    "no algorithm": lambda mint: mint.token(header={"alg": None}),
    "no signature": lambda mint: mint.unsigned() + ".",
    "HMAC with the public key in PEM": lambda mint: _hmac(mint, serialization.Encoding.PEM),
    "HMAC with the public key in DER": lambda mint: _hmac(mint, serialization.Encoding.DER),
    "HMAC with nothing": lambda mint: mint.token(header={"alg": "HS256"}, key=b""),
    "algorithm of a list": lambda mint: mint.token(header={"alg": [mint.algorithm]}),
    "algorithm of another key": lambda mint: mint.token(
        header={"alg": "ES256" if mint.algorithm != "ES256" else "RS256"}
    ),
    "another key under the same id": lambda mint: mint.token(key=mint.other_key),
    "another key, brought along in jwk": lambda mint: mint.token(header={"jwk": mint.jwk()}, key=mint.other_key),
    "another key, brought along in x5c": lambda mint: mint.token(header={"x5c": ["MIIB"]}, key=mint.other_key),
    "another key behind jku": lambda mint: mint.token(
        header={"jku": "https://evil.example.com/keys", "kid": "forged"}, key=mint.other_key
    ),
    "another key behind x5u": lambda mint: mint.token(header={"x5u": "https://evil.example.com"}, key=mint.other_key),
    "unknown key id": lambda mint: mint.token(header={"kid": "unknown"}),
    "key id that is a number": lambda mint: mint.token(header={"kid": 1}),
    "key id that is a path": lambda mint: mint.token(header={"kid": "../../dev/null"}, key=b""),
    "key id that is SQL": lambda mint: mint.token(header={"kid": "' OR 1=1 --"}),
    "another type": lambda mint: mint.token(header={"typ": "secevent+jwt"}),
    "type that is a number": lambda mint: mint.token(header={"typ": 1}),
    "extension that must be understood": lambda mint: mint.token(header={"crit": ["exp"], "exp": 1}),
    "extension that changes nothing": lambda mint: mint.token(header={"crit": ["b64"], "b64": True}),
    "payload outside": lambda mint: mint.token(header={"crit": ["b64"], "b64": False}),
    "another audience": lambda mint: mint.token(aud="another"),
    "audience of assertions": lambda mint: mint.token(aud="tessera"),
    "no audience": lambda mint: mint.token(aud=None),
    "two audiences": lambda mint: mint.token(aud=[mint.claims["aud"], "another"]),
    "audience as a part": lambda mint: mint.token(aud=mint.claims["aud"] + "0"),
    "another issuer": lambda mint: mint.token(iss=OTHER_ISSUER),
    "no issuer": lambda mint: mint.token(iss=None),
    "issuer with a slash": lambda mint: mint.token(iss=mint.claims["iss"] + "/"),
    "list of issuers": lambda mint: mint.token(iss=[mint.claims["iss"]]),
    "expired": lambda mint: mint.token(exp=now(-1)),
    "expired long ago": lambda mint: mint.token(exp=now(-3600), iat=now(-7200)),
    "no expiry": lambda mint: mint.token(exp=None),
    "expiry as text": lambda mint: mint.token(exp=str(now(600))),
    "expiry that is no number": lambda mint: mint.token(exp=float("nan")),
    "expiry in infinity": lambda mint: mint.token(exp=float("inf")),
    "expiry beyond all numbers": lambda mint: mint.token(exp=10**400),
    "expiry that is true": lambda mint: mint.token(exp=True),
    "not valid yet": lambda mint: mint.token(nbf=now(120)),
    "not valid before a text": lambda mint: mint.token(nbf="soon"),
    "issued in the future": lambda mint: mint.token(iat=now(120)),
    "claims of another": lambda mint: _spliced(mint, 1),
    "header of another": lambda mint: _spliced(mint, 0),
    "signature of another": lambda mint: _spliced(mint, 2),
    "truncated": lambda mint: mint.token()[:-8],
    "without its claims": lambda mint: mint.token().split(".")[0] + ".." + mint.token().split(".")[2],
    "with a part too many": lambda mint: mint.token() + ".x",
    "longer signature": lambda mint: mint.token() + "AAAA",
    "claims that are a list": lambda mint: ".".join((mint.token().split(".")[0], encoded(b"[]"), "AAAA")),
    "claims that are deep": lambda mint: ".".join((mint.token().split(".")[0], encoded(b"[" * 5000), "AAAA")),
    "no subject": lambda mint: mint.token(sub=None),
    "subject that is a number": lambda mint: mint.token(sub=1),
    "too long": lambda mint: mint.token(pad="x" * 20_000),
}
"""What is refused whoever issued the good one, by what is wrong."""
