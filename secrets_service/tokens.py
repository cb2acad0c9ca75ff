"""Personal access tokens and client secrets: how they look, and how a presented one is compared with what is stored.

A prefix that tells which of them it is, a public id (12 characters), 256 random bits (43) and a CRC-32 (6), all
base62. Only the id and a MAC are stored, so a copy of the database authenticates nobody. The key of the MAC has
versions: which one it was is stored beside it, and a MAC of an older one is renewed when its token is used, since
only then the token is there. The check sum spares a typing mistake the look-up, never the answer: every token that is
not right is refused in the same words.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from secrets_service.model import SecretBytes, TokenKind, TokenMac

PREFIXES = {TokenKind.PERSONAL: "dapi", TokenKind.CLIENT_SECRET: "dose"}
_PREFIX_LENGTH = 4
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_DIGITS = {digit: number for number, digit in enumerate(_ALPHABET)}
_ID_LENGTH = 12
_SECRET_LENGTH = 43
_CHECK_LENGTH = 6
_SECRET_BYTES = 32
_LENGTH = _PREFIX_LENGTH + _ID_LENGTH + _SECRET_LENGTH + _CHECK_LENGTH

REMEMBERED = 10_000
"""How many texts are known again."""


@dataclass(frozen=True, slots=True)
class Presented:
    """A well-formed token or client secret that somebody sent; whether it is right is still open."""

    id: str
    secret: SecretBytes = field(repr=False)
    kind: TokenKind = TokenKind.PERSONAL

    @property
    def text(self) -> str:
        """The token as its owner writes it."""
        body = PREFIXES[self.kind] + self.id + _base62(int.from_bytes(self.secret.reveal(), "big"), _SECRET_LENGTH)
        return body + _check_sum(body)


class Sought(NamedTuple):
    """What is looked for in the store when a token is presented."""

    id: str
    candidates: tuple[TokenMac, ...]


class TokenMacs:
    """The MACs under which tokens are stored; `keys` are the versions of their key, of which the highest is in use."""

    def __init__(self, keys: Mapping[int, SecretBytes]) -> None:
        self._macs = _begun(keys)
        self._sought: OrderedDict[tuple[TokenKind, bytes], Sought] = OrderedDict()
        self.current = max(keys)
        """The version of the key that is in use."""

    def use(self, keys: Mapping[int, SecretBytes]) -> None:
        """Goes over to other keys, the ones before included."""
        self._macs = _begun(keys)
        self._sought.clear()
        self.current = max(keys)

    def sought(self, text: str, kind: TokenKind) -> Sought | None:
        """What to look for when a text is presented as a token of that kind; None when it is no well-formed one.

        A text that was asked about before, whether or not it is anybody's token, is known again by its digest.
        """
        if len(text) != _LENGTH or not text.isascii():
            return None
        asked = kind, hashlib.sha256(text.encode()).digest()
        if (known := self._sought.get(asked)) is not None:
            self._sought.move_to_end(asked)
            return known
        presented = parse(text, kind)
        if presented is None:
            return None
        found = self._sought[asked] = Sought(presented.id, self.candidates(presented))
        if len(self._sought) > REMEMBERED:
            self._sought.popitem(last=False)
        return found

    def of(self, token: Presented) -> TokenMac:
        """What is stored of a token."""
        return self._under(self.current, token)

    def candidates(self, token: Presented) -> tuple[TokenMac, ...]:
        """What may be stored of a token, one for each version, the one in use last."""
        return tuple(self._under(version, token) for version in self._macs)

    def _under(self, version: int, token: Presented) -> TokenMac:
        mac = self._macs[version].copy()
        mac.update(token.id.encode() + token.secret.reveal())
        return TokenMac(version, mac.digest())


def _begun(keys: Mapping[int, SecretBytes]) -> dict[int, hmac.HMAC]:
    """A MAC for each key, to be copied: `hmac.digest` lets go of the interpreter's lock, and waits for it longer than
    it works."""
    return {version: hmac.new(key.reveal(), digestmod=hashlib.sha256) for version, key in sorted(keys.items())}


def is_one_of(candidates: tuple[TokenMac, ...], stored: TokenMac | None) -> bool:
    """Whether what is stored is that of the token; as much work when nothing is stored under its id.

    The one of the stored version is compared, and no other.
    """
    version = candidates[-1].version if stored is None else stored.version
    mine = next((each for each in candidates if each.version == version), candidates[-1])
    theirs = TokenMac(mine.version, bytes(len(mine.mac))) if stored is None else stored
    return hmac.compare_digest(mine.mac, theirs.mac) and mine.version == theirs.version and stored is not None


def make(kind: TokenKind = TokenKind.PERSONAL) -> Presented:
    """A new token, or a new client secret."""
    identifier = "".join(secrets.choice(_ALPHABET) for _ in range(_ID_LENGTH))
    return Presented(identifier, SecretBytes(secrets.token_bytes(_SECRET_BYTES)), kind)


def parse(text: str, kind: TokenKind = TokenKind.PERSONAL) -> Presented | None:
    """The parts of a token, or of a client secret; None when it is not a well-formed one of that kind."""
    if len(text) != _LENGTH or not text.startswith(PREFIXES[kind]):
        return None
    body, check_sum = text[:-_CHECK_LENGTH], text[-_CHECK_LENGTH:]
    if not set(text) <= _DIGITS.keys() or _check_sum(body) != check_sum:
        return None
    identifier, digits = body[_PREFIX_LENGTH:-_SECRET_LENGTH], body[-_SECRET_LENGTH:]
    number = 0
    for digit in digits:
        number = number * len(_ALPHABET) + _DIGITS[digit]
    if number.bit_length() > _SECRET_BYTES * 8:
        return None
    return Presented(identifier, SecretBytes(number.to_bytes(_SECRET_BYTES, "big")), kind)


def _check_sum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECK_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
