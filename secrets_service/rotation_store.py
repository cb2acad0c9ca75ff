"""SQL of key rotation: what is under which key, and what is brought under another one."""

from __future__ import annotations

import contextlib
import sqlite3

from secrets_service import places, store
from secrets_service.cipher import VERSION_LENGTH, Damaged
from secrets_service.keyring import Keyring
from secrets_service.model import Scope, StoreKeyUse, WrappedKey

PART = 50
"""Values that one transaction seals anew: some milliseconds, so that nobody's change waits long."""


# --- scope keys ---


def add_scope_key(connection: sqlite3.Connection, keyring: Keyring, scope: Scope, *, created_ms: int) -> None:
    """Gives a scope a new key, under which values are sealed from now on."""
    newest = connection.execute("SELECT max(version) FROM scope_keys WHERE scope_id = ?", (scope.id,)).fetchone()[0]
    key = keyring.new_scope_key(scope.uuid, (newest or 0) + 1)
    store.insert_scope_key(connection, scope, key, created_ms=created_ms)


def rewrap_scope_keys(connection: sqlite3.Connection, keyring: Keyring) -> None:
    """Seals the keys of all scopes under the store key that is in use. What is damaged stays as it is."""
    rows = connection.execute(
        "SELECT k.scope_id, s.uuid, k.version, k.record FROM scope_keys k JOIN scopes s ON s.id = k.scope_id"
    ).fetchall()
    for scope_id, uuid, version, record in rows:
        with contextlib.suppress(Damaged):
            wrapped = keyring.rewrapped(uuid, WrappedKey(version, record))
            connection.execute(
                "UPDATE scope_keys SET record = ? WHERE scope_id = ? AND version = ?",
                (wrapped.record, scope_id, version),
            )


def scopes_with_older_keys(connection: sqlite3.Connection) -> list[Scope]:
    """The scopes that have more than the one key that values are sealed under now."""
    rows = connection.execute(
        "SELECT id, uuid, name FROM scopes WHERE id IN"
        " (SELECT scope_id FROM scope_keys GROUP BY scope_id HAVING count(*) > 1)"
    )
    return [Scope(*row) for row in rows]


_VALUES = "SELECT v.rowid, v.key_id, v.version, k.folded FROM keys k JOIN versions v ON v.key_id = k.id"

_IS_BEHIND = "v.key_version < (SELECT max(version) FROM scope_keys WHERE scope_id = k.scope_id)"


def reseal_values(connection: sqlite3.Connection, keyring: Keyring, scope: Scope, after: int) -> tuple[int | None, int]:
    """Seals some values of a scope under its newest key: where to go on, None at the end, and how many it were.

    What is damaged stays as it is.
    """
    rows = connection.execute(
        f"{_VALUES} WHERE k.scope_id = ? AND {_IS_BEHIND} AND v.rowid > ? ORDER BY v.rowid LIMIT ?",
        (scope.id, after, PART),
    ).fetchall()
    changed = 0
    for _, key_id, version, folded in rows:
        with contextlib.suppress(Damaged):
            _reseal_value(connection, keyring, scope, key_id, folded, version)
            changed += 1
    return rows[-1][0] if rows else None, changed


def _reseal_value(
    connection: sqlite3.Connection, keyring: Keyring, scope: Scope, key_id: int, folded: str, version: int
) -> None:
    sealed, newest = store.sealed_version(connection, key_id, version), store.newest_scope_key(connection, scope)
    if sealed is None or newest is None:
        raise Damaged
    place = places.secret(scope, folded, version)
    value = keyring.of_scope(scope.uuid, sealed.wrapped_key).open(sealed.record, place)
    record = keyring.of_scope(scope.uuid, newest).seal(value, place)
    store.replace_record(connection, key_id, version, record, key_version=newest.version)


def drop_scope_keys(connection: sqlite3.Connection, scope: Scope) -> int:
    """Destroys the older keys of a scope that nothing is sealed under any more; how many."""
    return connection.execute(
        "DELETE FROM scope_keys WHERE scope_id = ?1"
        " AND version < (SELECT max(version) FROM scope_keys WHERE scope_id = ?1) AND version NOT IN"
        " (SELECT v.key_version FROM keys k JOIN versions v ON v.key_id = k.id WHERE k.scope_id = ?1)",
        (scope.id,),
    ).rowcount


# --- what there is ---


def count_behind(connection: sqlite3.Connection) -> int:
    """How many values are not sealed under the newest key of their scope."""
    return sum(
        len(connection.execute(f"{_VALUES} WHERE k.scope_id = ? AND {_IS_BEHIND}", (scope.id,)).fetchall())
        for scope in scopes_with_older_keys(connection)
    )


def oldest_scope_key(connection: sqlite3.Connection) -> int:
    """When the oldest of the keys was made that values are sealed under now; 0 without scopes."""
    row = connection.execute(
        "SELECT coalesce(min(made), 0) FROM (SELECT max(created_ms) AS made FROM scope_keys GROUP BY scope_id)"
    ).fetchone()
    return int(row[0])


def store_key_uses(connection: sqlite3.Connection, keyring: Keyring) -> list[StoreKeyUse]:
    """The store keys, oldest first, and what is under them."""
    wrapped = dict(
        connection.execute("SELECT substr(record, 2, ?), count(*) FROM scope_keys GROUP BY 1", (VERSION_LENGTH,))
    )
    tokens = dict(connection.execute("SELECT mac_version, count(*) FROM tokens GROUP BY 1"))
    return [
        StoreKeyUse(
            version,
            made_ms,
            scope_keys=wrapped.get(version.to_bytes(VERSION_LENGTH, "big"), 0),
            tokens=tokens.get(version, 0),
        )
        for version, made_ms in keyring.store_keys().items()
    ]
