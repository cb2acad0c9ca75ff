"""The sealed formats once more: written after their description, with another library and nothing of the service's.

What the service seals must open here, and what is sealed here must open there; so neither is right by itself alone.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping
from typing import Any

from Crypto.Cipher import AES


def framed(*parts: bytes) -> bytes:
    """Each part behind its length, four bytes big-endian."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def hkdf(key: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    prk = hmac.new(salt or bytes(32), key, hashlib.sha256).digest()
    okm, block, counter = b"", b"", 1
    while len(okm) < length:
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        okm, counter = okm + block, counter + 1
    return okm[:length]


def bound(format: int, store: bytes, place: Mapping[str, Any], key_version: int) -> bytes:
    """What a record is bound to, in a format."""
    parts = [
        bytes([format]),
        store,
        place["kind"].encode(),
        bytes.fromhex(place["scope"]),
        place["key"].encode(),
        struct.pack(">Q", place["version"]),
    ]
    if format > 1:
        parts.append(struct.pack(">I", key_version))
    return framed(*parts, place["field"].encode())


def seal(
    format: int,
    key: bytes,
    store: bytes,
    place: Mapping[str, Any],
    value: bytes,
    *,
    key_version: int,
    salt: bytes,
    nonce: bytes,
) -> bytes:
    """The record of a value."""
    info = bound(format, store, place, key_version)
    cipher = AES.new(hkdf(key, salt, info), AES.MODE_GCM, nonce=nonce)
    cipher.update(info)
    ciphertext, tag = cipher.encrypt_and_digest(value)
    head = bytes([format]) + (struct.pack(">I", key_version) if format > 1 else b"")
    return head + salt + nonce + ciphertext + tag


def open_record(key: bytes, store: bytes, place: Mapping[str, Any], record: bytes) -> bytes:
    """The value of a record; raises ValueError when it does not open."""
    version, rest, key_version = record[0], record[1:], 0
    if version > 1:
        key_version, rest = struct.unpack(">I", rest[:4])[0], rest[4:]
    salt, nonce, sealed = rest[:32], rest[32:44], rest[44:]
    info = bound(version, store, place, key_version)
    cipher = AES.new(hkdf(key, salt, info), AES.MODE_GCM, nonce=nonce)
    cipher.update(info)
    return cipher.decrypt_and_verify(sealed[:-16], sealed[-16:])


def derived(format: int, key: bytes, store: bytes, label: str, *, key_version: int) -> bytes:
    """The key that a label leads to."""
    version = [struct.pack(">I", key_version)] if format > 1 else []
    return hkdf(key, b"", framed(bytes([format]), store, b"derived", *version, label.encode()))


def root_key_id(key: bytes) -> str:
    """What a root key is called."""
    return hmac.new(key, b"id of a root key", hashlib.sha256).hexdigest()[:16]


def hmac_sha256(key: bytes, text: str) -> str:
    """The HMAC of a text in hexadecimal digits, in the same."""
    return hmac.new(key, bytes.fromhex(text), hashlib.sha256).hexdigest()
