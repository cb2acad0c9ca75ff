"""Stores of the first format, in which the root key itself sealed every value, and how one is brought up to date.

The rule: it is done in one transaction, with the new keyring in it. A start that is killed on the way leaves a store
of the first format, which the next start begins with again; there is nothing in between. What did not open before is
left as it is and goes on not to open. The MACs of tokens cannot be made anew without the tokens: the key that they
were made under moves into the keyring, and each is renewed when its token is used.

Rights had no MACs then, and none in the first stores with a keyring: they get them here, too, as they are stored.
"""

from __future__ import annotations

import logging

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secrets_service import integrity, places, rotation_store, store
from secrets_service.cipher import Damaged, Place, joined
from secrets_service.integrity import Integrity
from secrets_service.keyring import Keyring
from secrets_service.model import Platform, Scope, SealedSigningKey, SecretBytes
from secrets_service.rootkey import RootKey
from servicekit.storage import Connection

log = logging.getLogger(__name__)

FORMAT = b"\x01"
_NONCE = 1 + 32
_SEALED = _NONCE + 12

_CHECK = b"this is the key"
_CHECK_PLACE = Place(kind="key-check")
_TOKEN_MAC = "token-mac"  # noqa: S105 (a label, not a token)


class FirstFormat:
    """Opens the records of a store of the first format: `format (1) | salt (32) | nonce (12) | ciphertext and tag`."""

    def __init__(self, root_key: SecretBytes, store_id: bytes) -> None:
        self._root_key = root_key
        self._store_id = store_id

    def open(self, record: bytes, place: Place) -> SecretBytes:
        """The value that was sealed at this place; raises Damaged for anything else."""
        if record[:1] != FORMAT or len(record) < _SEALED:
            raise Damaged
        bound = joined(
            FORMAT,
            self._store_id,
            place.kind.encode(),
            place.scope,
            place.key.encode(),
            place.version.to_bytes(8, "big"),
            place.field.encode(),
        )
        try:
            opened = AESGCM(self._derived(record[1:_NONCE], bound)).decrypt(
                record[_NONCE:_SEALED], record[_SEALED:], bound
            )
        except InvalidTag:
            raise Damaged from None
        return SecretBytes(opened)

    def token_mac_key(self) -> SecretBytes:
        """The key under which tokens had their MACs."""
        return SecretBytes(self._derived(None, joined(FORMAT, self._store_id, b"derived", _TOKEN_MAC.encode())))

    def _derived(self, salt: bytes | None, info: bytes) -> bytes:
        return HKDF(SHA256(), length=32, salt=salt, info=info).derive(self._root_key.reveal())


def is_key_of(root: RootKey, platform: Platform, key_check: bytes) -> bool:
    """Whether a store of the first format was sealed under this root key."""
    try:
        return FirstFormat(root.key, platform.store_id).open(key_check, _CHECK_PLACE).reveal() == _CHECK
    except Damaged:
        return False


def migrate(connection: Connection, root: RootKey, platform: Platform, *, now_ms: int) -> Keyring:
    """Seals everything anew, each scope under a key of its own; the keyring, which is recorded, too."""
    old = FirstFormat(root.key, platform.store_id)
    keyring = Keyring.made(platform.store_id, now_ms, inherited=old.token_mac_key())
    damaged = sum(_migrate_scope(connection, old, keyring, scope, now_ms) for scope in store.scopes(connection))
    for signing_key in store.signing_keys(connection):
        place = places.signing_key(signing_key.key_id)
        record = keyring.seal(old.open(signing_key.record, place), place)
        store.replace_signing_key(connection, SealedSigningKey(signing_key.key_id, record))
    for answer_id, principal_id, request_id, record in store.answers(connection):
        place = places.answer(f"{principal_id}/{request_id}")
        try:
            store.replace_answer(connection, answer_id, keyring.seal(old.open(record, place), place))
        except Damaged:
            damaged += 1
    integrity.equip(connection, Integrity(keyring.rights_keys()))
    authenticate_rights(connection)
    store.insert_keyring(connection, keyring.sealed(root))
    store.end_first_format(connection)
    log.warning("store brought to the present format", extra={"damaged_records": damaged})
    return keyring


def authenticate(connection: Connection, root: RootKey, keyring: Keyring) -> Keyring:
    """Gives the rights in a store that has a keyring their MACs; the keyring, which is recorded, and says so."""
    authenticate_rights(connection)
    changed = keyring.with_authenticated_rights()
    store.replace_keyring(connection, changed.sealed(root))
    log.warning("rights in the store are authenticated from now on")
    return changed


def authenticate_rights(connection: Connection) -> None:
    """Makes the MACs of all rights of what is stored, whatever that is."""
    rotation_store.authenticate_all(connection)


def _migrate_scope(connection: Connection, old: FirstFormat, keyring: Keyring, scope: Scope, now_ms: int) -> int:
    """Seals the values of a scope anew; how many did not open."""
    wrapped = keyring.new_scope_key(scope.uuid, 1)
    store.insert_scope_key(connection, scope, wrapped, created_ms=now_ms)
    cipher, damaged = keyring.of_scope(scope.uuid, wrapped), 0
    for key_id, folded in store.folded_keys(connection, scope):
        for version, record in store.records(connection, key_id):
            place = places.secret(scope, folded, version)
            try:
                value = old.open(record, place)
            except Damaged:
                damaged += 1
                continue
            sealed = cipher.seal(value, place)
            store.replace_record(connection, key_id, version, sealed, key_version=wrapped.version)
    return damaged
