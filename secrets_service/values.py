"""Values at rest: every put makes a version, sealed at its own place, and what need not be kept is destroyed.

A value is sealed under the newest key of its scope, and opened under the one that it was sealed under.

The rule: the newest versions since the key was last deleted are kept, as many as configured, and those that a running
replica holds. All else goes in the transaction that makes it superfluous. Methods run inside a transaction, after the
caller's permission was checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from secrets_service import names, places, store
from secrets_service.cipher import Damaged
from secrets_service.errors import ScopeDamaged, SecretDamaged
from secrets_service.keyring import Keyring
from secrets_service.model import Key, Scope, SealedSecret, SecretBytes
from servicekit.storage import Connection

log = logging.getLogger(__name__)


class SecretValues:
    """The values of secrets; `keep` is how many versions of each stay, `now` tells Unix seconds."""

    def __init__(self, keyring: Keyring, *, keep: int, now: Callable[[], float]) -> None:
        self._keyring = keyring
        self._keep = keep
        self._now = now

    def prepare(self, connection: Connection, scope: Scope) -> None:
        """Gives a new scope the key under which its values are sealed."""
        key = self._keyring.new_scope_key(scope.uuid, 1)
        store.insert_scope_key(connection, scope, key, created_ms=self._now_ms())

    def add(self, connection: Connection, scope: Scope, key: str, value: SecretBytes) -> tuple[int, int]:
        """Makes a new version; its number, and how many older ones were destroyed."""
        folded = names.folded(key)
        made = store.next_version(connection, scope, key, folded=folded)
        wrapped = store.newest_scope_key(connection, scope)
        if wrapped is None:
            raise ScopeDamaged(scope.name)
        try:
            cipher = self._keyring.of_scope(scope.uuid, wrapped)
        except Damaged:
            log.error("key of a scope is damaged", extra={"scope": scope.name})
            raise ScopeDamaged(scope.name) from None
        record = cipher.seal(value, places.secret(scope, folded, made.last_version))
        sealed = SealedSecret(made.id, made.name, made.last_version, record, wrapped)
        store.insert_version(connection, sealed, created_ms=self._now_ms())
        has_older = made.last_version > self._keep or made.first_version > 1
        return made.last_version, store.drop_versions(connection, made.id, keep=self._keep) if has_older else 0

    def open(self, scope: Scope, sealed: SealedSecret) -> SecretBytes:
        """The value of a version; raises SecretDamaged."""
        try:
            cipher = self._keyring.of_scope(scope.uuid, sealed.wrapped_key)
            return cipher.open(sealed.record, places.secret(scope, names.folded(sealed.key), sealed.version))
        except Damaged:
            log.error("stored secret is damaged", extra={"scope": scope.name, "key": sealed.key})
            raise SecretDamaged(scope.name, sealed.key) from None

    def delete(self, connection: Connection, key: Key) -> int:
        """Deletes a key and destroys its values, except those that are held; how many were destroyed."""
        store.delete_key(connection, key)
        return store.drop_versions(connection, key.id, keep=self._keep)

    def purge(self, connection: Connection, key: Key) -> int:
        """Deletes a key and destroys its values, held or not; how many were destroyed."""
        store.delete_key(connection, key)
        return store.drop_all_versions(connection, key)

    def release(self, connection: Connection, replica_ids: Iterable[str]) -> int:
        """Ends what replicas hold; how many values were destroyed with it."""
        concerned = store.release(connection, replica_ids)
        return sum(store.drop_versions(connection, key_id, keep=self._keep) for key_id in concerned)

    def _now_ms(self) -> int:
        return int(self._now() * 1000)
