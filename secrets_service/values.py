"""Values at rest: every put makes a version, sealed at its own place, and what need not be kept is destroyed.

The rule: the newest versions since the key was last deleted are kept, as many as configured, and those that a running
replica holds. All else goes in the transaction that makes it superfluous. Methods run inside a transaction, after the
caller's permission was checked.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable

from secrets_service import names, store
from secrets_service.cipher import Cipher, Damaged, Place
from secrets_service.errors import SecretDamaged
from secrets_service.model import Key, Scope, SealedSecret, SecretBytes

log = logging.getLogger(__name__)


class SecretValues:
    """The values of secrets; `keep` is how many versions of each stay, `now` tells Unix seconds."""

    def __init__(self, cipher: Cipher, *, keep: int, now: Callable[[], float]) -> None:
        self._cipher = cipher
        self._keep = keep
        self._now = now

    def add(self, connection: sqlite3.Connection, scope: Scope, key: str, value: SecretBytes) -> tuple[int, int]:
        """Makes a new version; its number, and how many older ones were destroyed."""
        folded = names.folded(key)
        key_id, version = store.next_version(connection, scope, key, folded=folded)
        record = self._cipher.seal(value, _place(scope, folded, version))
        store.insert_version(connection, SealedSecret(key_id, key, version, record), created_ms=int(self._now() * 1000))
        return version, store.drop_versions(connection, key_id, keep=self._keep)

    def open(self, scope: Scope, sealed: SealedSecret) -> SecretBytes:
        """The value of a version; raises SecretDamaged."""
        try:
            return self._cipher.open(sealed.record, _place(scope, names.folded(sealed.key), sealed.version))
        except Damaged:
            log.error("stored secret is damaged", extra={"scope": scope.name, "key": sealed.key})
            raise SecretDamaged(scope.name, sealed.key) from None

    def delete(self, connection: sqlite3.Connection, key: Key) -> int:
        """Deletes a key and destroys its values, except those that are held; how many were destroyed."""
        store.delete_key(connection, key)
        return store.drop_versions(connection, key.id, keep=self._keep)

    def purge(self, connection: sqlite3.Connection, key: Key) -> int:
        """Deletes a key and destroys its values, held or not; how many were destroyed."""
        store.delete_key(connection, key)
        return store.drop_all_versions(connection, key)

    def release(self, connection: sqlite3.Connection, replica_ids: Iterable[str]) -> int:
        """Ends what replicas hold; how many values were destroyed with it."""
        concerned = store.release(connection, replica_ids)
        return sum(store.drop_versions(connection, key_id, keep=self._keep) for key_id in concerned)


def _place(scope: Scope, folded: str, version: int) -> Place:
    """Where the value of a version belongs; there alone it opens."""
    return Place(kind="secret", scope=scope.uuid, key=folded, version=version, field="value")
