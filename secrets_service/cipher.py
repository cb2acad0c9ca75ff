"""Encryption at rest: every record is sealed under a key of its own and opens only at its own place.

A record is `format byte | salt (32) | nonce (12) | AES-256-GCM ciphertext and tag`. Its key is HKDF-SHA256 of the root
key with a random salt, so no (key, nonce) pair ever repeats, without any counter to keep. Where the record belongs
(store, kind, scope, key, version, field) is part of both key and tag: copied to another row, it does not open.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secrets_service.model import SecretBytes

FORMAT = b"\x01"
SALT_LENGTH = 32
NONCE_LENGTH = 12
_HEADER = len(FORMAT) + SALT_LENGTH + NONCE_LENGTH


class Damaged(Exception):
    """A record does not open at this place: it was changed, moved, or sealed under another key."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record belongs; only there it opens."""

    kind: str
    scope: bytes = b""
    key: str = ""
    version: int = 0
    field: str = ""


class Cipher:
    """Seals and opens records of one store, under its root key."""

    def __init__(self, root_key: SecretBytes, store_id: bytes) -> None:
        self._root_key = root_key
        self._store_id = store_id

    def seal(self, value: SecretBytes, place: Place) -> bytes:
        """The record that holds a value at a place."""
        salt, nonce = os.urandom(SALT_LENGTH), os.urandom(NONCE_LENGTH)
        bound = self._bound(place)
        sealed = AESGCM(self._derived(salt, bound)).encrypt(nonce, value.reveal(), bound)
        return FORMAT + salt + nonce + sealed

    def open(self, record: bytes, place: Place) -> SecretBytes:
        """The value that was sealed at this place; raises Damaged for anything else."""
        if record[:1] != FORMAT or len(record) < _HEADER:
            raise Damaged
        salt, nonce = record[1 : 1 + SALT_LENGTH], record[1 + SALT_LENGTH : _HEADER]
        bound = self._bound(place)
        try:
            return SecretBytes(AESGCM(self._derived(salt, bound)).decrypt(nonce, record[_HEADER:], bound))
        except InvalidTag:
            raise Damaged from None

    def derive(self, label: str) -> SecretBytes:
        """A key of this store for another purpose: 32 bytes that depend on the label."""
        return SecretBytes(self._derived(None, _joined(FORMAT, self._store_id, b"derived", label.encode())))

    def _derived(self, salt: bytes | None, info: bytes) -> bytes:
        return HKDF(SHA256(), length=32, salt=salt, info=info).derive(self._root_key.reveal())

    def _bound(self, place: Place) -> bytes:
        return _joined(
            FORMAT,
            self._store_id,
            place.kind.encode(),
            place.scope,
            place.key.encode(),
            place.version.to_bytes(8, "big"),
            place.field.encode(),
        )


def _joined(*parts: bytes) -> bytes:
    """The parts, each behind its length, so that no two lists of parts look alike."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
