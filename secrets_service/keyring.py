"""The keys of a store, in three levels: the root key seals the keyring, and the keyring leads to everything else.

The keyring holds the **store keys**: random, numbered from 1; the newest is in use, older ones open what was sealed
under them. A store key seals the **scope keys**, under which the values of a scope are sealed; by a label it leads to
keys for what belongs to no scope, and for the MACs of tokens and of rights. All of it is decided by a version that is
written beside what it opens: no key is ever tried.

The keyring also says that rights in the store have MACs (integrity.py). Nobody can write that but who has the root
key, so nobody else can have a store taken for one that is older than these MACs.

A store that was made before there was a keyring brings one key along: the one under which its tokens have their MACs.
It counts as version 0 of that key, and stays as long as a token has not been used since.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from functools import lru_cache

from secrets_service.cipher import KEY_LENGTH, Cipher, Damaged, Place, stated_version
from secrets_service.model import SealedKeyring, SecretBytes, WrappedKey
from secrets_service.rootkey import RootKey

SCOPE_KEYS_REMEMBERED = 4_096
"""How many scope keys are kept open in memory at the most."""

_ENTRY = struct.Struct(f">BIQ{KEY_LENGTH}s")
"""What the keyring seals is a row of these: what it is, version, when it was made in Unix milliseconds, the key."""

_STORE_KEY = 1
_INHERITED_TOKEN_MAC = 2
_RIGHTS_ARE_AUTHENTICATED = 3

_RECORDS = "records"
_RIGHTS = "rights"
_AUDIT = "audit"
_BACKUPS = "backups"
_TOKEN_MAC = "token-mac"  # noqa: S105 (a label, not a token)


class Keyring:
    """The opened keyring of one store. A change makes another one, which this one can go over to (`learn`, `use`)."""

    def __init__(
        self,
        store_id: bytes,
        store_keys: Mapping[int, tuple[int, SecretBytes]],
        inherited: SecretBytes | None = None,
        *,
        rights_are_authenticated: bool = True,
    ) -> None:
        """`store_keys` by version, with the time when each was made; `inherited`: the key of tokens' MACs of old."""
        self._store_id = store_id
        self._store_keys = dict(store_keys)
        self._inherited = inherited
        self.rights_are_authenticated = rights_are_authenticated
        self.current = max(self._store_keys)
        """The version of the store key that is in use."""
        self.uses = 0
        """How often this object has sealed under it."""
        self._ciphers = {version: Cipher(key, store_id, version) for version, (_, key) in self._store_keys.items()}
        self._records = {
            version: Cipher(cipher.derive(_RECORDS), store_id, version) for version, cipher in self._ciphers.items()
        }
        self._scope_cipher = lru_cache(maxsize=SCOPE_KEYS_REMEMBERED)(self._opened_scope_key)

    @classmethod
    def made(cls, store_id: bytes, now_ms: int, *, inherited: SecretBytes | None = None) -> Keyring:
        """The keyring of a store that has none yet, with one store key."""
        return cls(store_id, {1: (now_ms, _new_key())}, inherited)

    # --- under the root key ---

    def sealed(self, root: RootKey) -> SealedKeyring:
        """The keyring as it is stored."""
        entries = [
            _ENTRY.pack(_STORE_KEY, version, made_ms, key.reveal())
            for version, (made_ms, key) in sorted(self._store_keys.items())
        ]
        if self._inherited is not None:
            entries.append(_ENTRY.pack(_INHERITED_TOKEN_MAC, 0, 0, self._inherited.reveal()))
        if self.rights_are_authenticated:
            entries.append(_ENTRY.pack(_RIGHTS_ARE_AUTHENTICATED, 1, 0, bytes(KEY_LENGTH)))
        record = _under(root, self._store_id).seal(SecretBytes(b"".join(entries)), _place(root))
        return SealedKeyring(root.id, record, root.wrapped)

    @classmethod
    def opened(cls, sealed: SealedKeyring, root: RootKey, store_id: bytes) -> Keyring:
        """The keyring that was stored; raises Damaged."""
        content = _under(root, store_id).open(sealed.record, _place(root)).reveal()
        store_keys: dict[int, tuple[int, SecretBytes]] = {}
        inherited: SecretBytes | None = None
        rights_are_authenticated = False
        for kind, version, made_ms, key in _ENTRY.iter_unpack(content):
            if kind == _STORE_KEY:
                store_keys[version] = (made_ms, SecretBytes(key))
            elif kind == _INHERITED_TOKEN_MAC:
                inherited = SecretBytes(key)
            elif kind == _RIGHTS_ARE_AUTHENTICATED:
                rights_are_authenticated = True
            else:  # written by a later version of this program
                raise Damaged
        return cls(store_id, store_keys, inherited, rights_are_authenticated=rights_are_authenticated)

    def with_authenticated_rights(self) -> Keyring:
        """The same keyring, of a store whose rights have MACs from now on."""
        return Keyring(self._store_id, self._store_keys, self._inherited)

    def with_new_store_key(self, now_ms: int) -> Keyring:
        """The same keyring with one store key more, which is in use."""
        store_keys = {**self._store_keys, max(self._store_keys) + 1: (now_ms, _new_key())}
        return Keyring(
            self._store_id, store_keys, self._inherited, rights_are_authenticated=self.rights_are_authenticated
        )

    def learn(self, other: Keyring) -> None:
        """Opens from now on what another keyring of the same store opens, and goes on sealing under its own key."""
        self._store_keys |= other._store_keys
        self._ciphers |= other._ciphers
        self._records |= other._records

    def use(self, other: Keyring) -> None:
        """Goes over to another keyring of the same store. Only to one that is on stable storage."""
        self.learn(other)
        self.current = other.current
        self.uses = other.uses

    def store_keys(self) -> dict[int, int]:
        """The versions of the store key that are or were in use, and when each was made (Unix milliseconds)."""
        made = {version: made_ms for version, (made_ms, _) in sorted(self._store_keys.items())}
        return {version: made_ms for version, made_ms in made.items() if version <= self.current}

    # --- of a scope ---

    def new_scope_key(self, scope: bytes, version: int) -> WrappedKey:
        """A new key for the scope of that uuid, sealed."""
        return self._wrapped(_new_key(), scope, version)

    def rewrapped(self, scope: bytes, wrapped: WrappedKey) -> WrappedKey:
        """The same key of a scope, sealed under the store key that is in use; raises Damaged."""
        return self._wrapped(self._unwrapped(scope, wrapped), scope, wrapped.version)

    def _wrapped(self, key: SecretBytes, scope: bytes, version: int) -> WrappedKey:
        self.uses += 1
        return WrappedKey(version, self._ciphers[self.current].seal(key, _scope_place(scope, version)))

    def of_scope(self, scope: bytes, wrapped: WrappedKey) -> Cipher:
        """What seals and opens the values of a scope under a version of its key; raises Damaged."""
        return self._scope_cipher(scope, wrapped)

    def _opened_scope_key(self, scope: bytes, wrapped: WrappedKey) -> Cipher:
        return Cipher(self._unwrapped(scope, wrapped), self._store_id, wrapped.version)

    def _unwrapped(self, scope: bytes, wrapped: WrappedKey) -> SecretBytes:
        above = self._ciphers.get(stated_version(wrapped.record))
        if above is None:
            raise Damaged
        return above.open(wrapped.record, _scope_place(scope, wrapped.version))

    # --- of no scope ---

    def seal(self, value: SecretBytes, place: Place) -> bytes:
        """The record of something that belongs to no scope."""
        self.uses += 1
        return self._records[self.current].seal(value, place)

    def open(self, record: bytes, place: Place) -> SecretBytes:
        """What was sealed at this place; raises Damaged."""
        cipher = self._records.get(stated_version(record))
        if cipher is None:
            raise Damaged
        return cipher.open(record, place)

    def rights_keys(self) -> dict[int, SecretBytes]:
        """The keys under which rights have their MACs, by version; the highest is in use."""
        return {version: cipher.derive(_RIGHTS) for version, cipher in self._ciphers.items()}

    def audit_keys(self, service: str) -> dict[int, SecretBytes]:
        """The keys that the audit log of a service is or was chained with, by version; the highest is in use."""
        return {version: self._ciphers[version].derive(f"{_AUDIT}/{service}") for version in self.store_keys()}

    def backup_keys(self) -> dict[int, SecretBytes]:
        """The keys under which backups have their MACs, by version of the store key."""
        return {version: cipher.derive(_BACKUPS) for version, cipher in self._ciphers.items()}

    def token_mac_keys(self) -> dict[int, SecretBytes]:
        """The keys under which tokens have their MACs, by version; the highest is in use."""
        keys = {version: cipher.derive(_TOKEN_MAC) for version, cipher in self._ciphers.items()}
        return keys if self._inherited is None else {0: self._inherited, **keys}


def _new_key() -> SecretBytes:
    return SecretBytes(os.urandom(KEY_LENGTH))


def _under(root: RootKey, store_id: bytes) -> Cipher:
    # A root key has an id and no version; the id is part of the place.
    return Cipher(root.key, store_id, 0)


def _place(root: RootKey) -> Place:
    return Place(kind="keyring", key=root.id)


def _scope_place(scope: bytes, version: int) -> Place:
    return Place(kind="scope-key", scope=scope, version=version)
