"""Sealing: every record has a key of its own and opens only at its own place.

A record is `format (1) | key version (4) | salt (32) | nonce (12) | AES-256-GCM ciphertext and tag`. Its key is used
once: HKDF-SHA256 of the key above it, with the random salt. So no (key, nonce) pair ever repeats, without a counter
to keep, also where a machine is set back to a snapshot. Where the record belongs (store, kind, scope, key, version,
version of the key above it, field) is part of both key and tag: copied to another row, it does not open. Nothing is
tried: a record says which version of the key above it opens it, and is opened under that one or not at all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secrets_service.model import SecretBytes

FORMAT = b"\x02"
"""The first was secrets_service.first_format's."""

KEY_LENGTH = 32
VERSION_LENGTH = 4
SALT_LENGTH = 32
NONCE_LENGTH = 12
_SALT = len(FORMAT) + VERSION_LENGTH
_NONCE = _SALT + SALT_LENGTH
_SEALED = _NONCE + NONCE_LENGTH


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
    """Seals and opens the records of one store under one version of a key; `version` is what its records state."""

    def __init__(self, key: SecretBytes, store_id: bytes, version: int) -> None:
        self._key = key
        self._store_id = store_id
        self._version = version.to_bytes(VERSION_LENGTH, "big")

    def seal(self, value: SecretBytes, place: Place) -> bytes:
        """The record that holds a value at a place."""
        salt, nonce = os.urandom(SALT_LENGTH), os.urandom(NONCE_LENGTH)
        bound = self._bound(place)
        sealed = AESGCM(self._derived(salt, bound)).encrypt(nonce, value.reveal(), bound)
        return FORMAT + self._version + salt + nonce + sealed

    def open(self, record: bytes, place: Place) -> SecretBytes:
        """The value that was sealed at this place under this key; raises Damaged for anything else."""
        if record[:_SALT] != FORMAT + self._version or len(record) < _SEALED:
            raise Damaged
        salt, nonce = record[_SALT:_NONCE], record[_NONCE:_SEALED]
        bound = self._bound(place)
        try:
            return SecretBytes(AESGCM(self._derived(salt, bound)).decrypt(nonce, record[_SEALED:], bound))
        except InvalidTag:
            raise Damaged from None

    def derive(self, label: str) -> SecretBytes:
        """A key for another purpose: 32 bytes that depend on key, version, store and label, and lead back to none."""
        return SecretBytes(
            self._derived(None, joined(FORMAT, self._store_id, b"derived", self._version, label.encode()))
        )

    def _derived(self, salt: bytes | None, info: bytes) -> bytes:
        return HKDF(SHA256(), length=KEY_LENGTH, salt=salt, info=info).derive(self._key.reveal())

    def _bound(self, place: Place) -> bytes:
        return joined(
            FORMAT,
            self._store_id,
            place.kind.encode(),
            place.scope,
            place.key.encode(),
            place.version.to_bytes(8, "big"),
            self._version,
            place.field.encode(),
        )


def stated_version(record: bytes) -> int:
    """The version of the key above it that a record says it was sealed under; raises Damaged."""
    if record[:1] != FORMAT or len(record) < _SEALED:
        raise Damaged
    return int.from_bytes(record[1:_SALT], "big")


def joined(*parts: bytes) -> bytes:
    """The parts, each behind its length, so that no two lists of parts look alike."""
    return b"".join([len(part).to_bytes(4, "big") + part for part in parts])
