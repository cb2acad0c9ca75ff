"""SQL of key rotation: what is under which key, and what is brought under another one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping

from secrets_service import directory_store, grant_store, places, store
from secrets_service.cipher import VERSION_LENGTH, Damaged
from secrets_service.keyring import Keyring
from secrets_service.model import Scope, StoreKeyUse, WrappedKey
from servicekit.storage import Connection

PART = 50
"""Rows that one transaction seals or authenticates anew: some milliseconds, so that nobody's change waits long."""

Place = tuple[int, int]
"""Where to go on in what is done some rows at a time: the last row that was looked at."""

BEGINNING: Place = (-1, -1)


# --- scope keys ---


def add_scope_key(connection: Connection, keyring: Keyring, scope: Scope, *, created_ms: int) -> None:
    """Gives a scope a new key, under which values are sealed from now on."""
    newest = connection.execute("SELECT max(version) FROM scope_keys WHERE scope_id = ?", (scope.id,)).fetchone()[0]
    key = keyring.new_scope_key(scope.uuid, (newest or 0) + 1)
    store.insert_scope_key(connection, scope, key, created_ms=created_ms)


def due_scopes(connection: Connection, *, made_before_ms: int, uses: int) -> list[Scope]:
    """Scopes whose newest key was made before a time, or has sealed so many values; PART of them at the most."""
    rows = connection.execute(
        "SELECT s.id, s.uuid, s.name FROM scopes s JOIN scope_keys k ON k.scope_id = s.id"
        " WHERE k.version = (SELECT max(version) FROM scope_keys WHERE scope_id = s.id) AND (k.created_ms < ? OR"
        " (SELECT coalesce(sum(last_version), 0) FROM keys WHERE scope_id = s.id) - k.puts_before >= ?)"
        " ORDER BY s.id LIMIT ?",
        (made_before_ms, uses, PART),
    )
    return [Scope(*row) for row in rows]


def counted_uses(connection: Connection, version: int) -> int:
    """How often a store key had sealed when that was last recorded."""
    row = connection.execute("SELECT uses FROM store_key_uses WHERE version = ?", (version,)).fetchone()
    return int(row[0]) if row else 0


def count_uses(connection: Connection, version: int, uses: int) -> None:
    """Records how often a store key has sealed."""
    connection.execute(
        "INSERT INTO store_key_uses (version, uses) VALUES (?, ?)"
        " ON CONFLICT (version) DO UPDATE SET uses = excluded.uses",
        (version, uses),
    )


def rewrap_scope_keys(connection: Connection, keyring: Keyring, after: Place) -> Place | None:
    """Seals some keys of scopes under the store key that is in use: where to go on, None at the end.

    What is damaged stays as it is.
    """
    rows = connection.execute(
        "SELECT k.scope_id, s.uuid, k.version, k.record FROM scope_keys k JOIN scopes s ON s.id = k.scope_id"
        " WHERE (k.scope_id, k.version) > (?, ?) AND substr(k.record, 2, ?) <> ?"
        " ORDER BY k.scope_id, k.version LIMIT ?",
        (*after, VERSION_LENGTH, _stated(keyring.current), PART),
    ).fetchall()
    for scope_id, uuid, version, record in rows:
        with contextlib.suppress(Damaged):
            wrapped = keyring.rewrapped(uuid, WrappedKey(version, record))
            connection.execute(
                "UPDATE scope_keys SET record = ? WHERE scope_id = ? AND version = ?",
                (wrapped.record, scope_id, version),
            )
    return (rows[-1][0], rows[-1][2]) if rows else None


def _stated(version: int) -> bytes:
    return version.to_bytes(VERSION_LENGTH, "big")


def scopes_with_older_keys(connection: Connection) -> list[Scope]:
    """The scopes that have more than the one key that values are sealed under now."""
    rows = connection.execute(
        "SELECT id, uuid, name FROM scopes WHERE id IN"
        " (SELECT scope_id FROM scope_keys GROUP BY scope_id HAVING count(*) > 1)"
    )
    return [Scope(*row) for row in rows]


_VALUES = "SELECT v.rowid, v.key_id, v.version, k.folded FROM keys k JOIN versions v ON v.key_id = k.id"

_IS_BEHIND = "v.key_version < (SELECT max(version) FROM scope_keys WHERE scope_id = k.scope_id)"


def reseal_values(connection: Connection, keyring: Keyring, scope: Scope, after: int) -> tuple[int | None, int]:
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
    connection: Connection, keyring: Keyring, scope: Scope, key_id: int, folded: str, version: int
) -> None:
    sealed, newest = store.sealed_version(connection, key_id, version), store.newest_scope_key(connection, scope)
    if sealed is None or newest is None:
        raise Damaged
    place = places.secret(scope, folded, version)
    value = keyring.of_scope(scope.uuid, sealed.wrapped_key).open(sealed.record, place)
    record = keyring.of_scope(scope.uuid, newest).seal(value, place)
    store.replace_record(connection, key_id, version, record, key_version=newest.version)


def drop_scope_keys(connection: Connection, scope: Scope) -> int:
    """Destroys the older keys of a scope that nothing is sealed under any more; how many."""
    return connection.execute(
        "DELETE FROM scope_keys WHERE scope_id = ?1"
        " AND version < (SELECT max(version) FROM scope_keys WHERE scope_id = ?1) AND version NOT IN"
        " (SELECT v.key_version FROM keys k JOIN versions v ON v.key_id = k.id WHERE k.scope_id = ?1)",
        (scope.id,),
    ).rowcount


# --- rights ---

_ROWS = {
    "principals": "SELECT rowid, version FROM (SELECT rowid, substr(mac, 2, 4) AS version FROM principals) AS stated",
    "accounts": "SELECT rowid, version FROM (SELECT rowid, substr(mac, 2, 4) AS version FROM accounts) AS stated",
    "scopes": "SELECT rowid, version FROM (SELECT rowid, substr(mac, 2, 4) AS version FROM scopes) AS stated",
    "endpoints": "SELECT rowid, version FROM (SELECT rowid, substr(mac, 2, 4) AS version FROM endpoints) AS stated",
    "tokens": "SELECT rowid, version FROM (SELECT rowid, substr(row_mac, 2, 4) AS version FROM tokens) AS stated",
    "platform": "SELECT rowid, version FROM (SELECT rowid, substr(mac, 2, 4) AS version FROM platform) AS stated",
}
"""The objects that have a MAC, and the version of the store key that each states."""

_AUTHENTICATE: Mapping[str, Callable[..., None]] = {
    "principals": directory_store.authenticate_principal,
    "accounts": directory_store.authenticate_account,
    "scopes": store.authenticate_scope,
    "endpoints": grant_store.authenticate_endpoint,
    "tokens": store.authenticate_token,
    "platform": store.authenticate_platform,
}
"""What makes the MAC of one of them anew."""

KINDS = tuple(_ROWS)
"""Tables of objects that have a MAC."""


def authenticate_all(connection: Connection) -> None:
    """Makes the MACs of all rights of what is stored, whatever that is."""
    for kind, authenticate in _AUTHENTICATE.items():
        for row_id, _ in connection.execute(_ROWS[kind]).fetchall():
            authenticate(connection, row_id, believed=True)
    grant_store.forget_access_changes(connection)


def renew_macs(connection: Connection, kind: str, version: int, after: Place) -> Place | None:
    """Makes some MACs of a kind anew, under the store key that is in use, of that version: where to go on, None at the
    end. What is damaged stays as it is."""
    behind = connection.execute(
        f"{_ROWS[kind]} WHERE rowid > ? AND (version IS NULL OR version <> ?) ORDER BY rowid LIMIT ?",
        (after[0], _stated(version), PART),
    ).fetchall()
    for row_id, _ in behind:
        _AUTHENTICATE[kind](connection, row_id, believed=False)
    grant_store.forget_access_changes(connection)
    return (behind[-1][0], 0) if behind else None


# --- what there is ---


def damaged_values(connection: Connection, keyring: Keyring) -> list[tuple[str, str]]:
    """The secrets of which a kept version does not open: scope and key."""
    found: dict[tuple[str, str], None] = {}
    for scope in store.scopes(connection):
        for key_id, folded in store.folded_keys(connection, scope):
            for version, _ in store.records(connection, key_id):
                sealed = store.sealed_version(connection, key_id, version)
                assert sealed is not None  # all of it is one state of the database
                try:
                    keyring.of_scope(scope.uuid, sealed.wrapped_key).open(
                        sealed.record, places.secret(scope, folded, version)
                    )
                except Damaged:
                    found[scope.name, sealed.key] = None
    return list(found)


def count_behind(connection: Connection) -> int:
    """How many values are not sealed under the newest key of their scope."""
    return sum(
        len(connection.execute(f"{_VALUES} WHERE k.scope_id = ? AND {_IS_BEHIND}", (scope.id,)).fetchall())
        for scope in scopes_with_older_keys(connection)
    )


def oldest_scope_key(connection: Connection) -> int:
    """When the oldest of the keys was made that values are sealed under now; 0 without scopes."""
    row = connection.execute(
        "SELECT coalesce(min(made), 0)"
        " FROM (SELECT max(created_ms) AS made FROM scope_keys GROUP BY scope_id) AS newest"
    ).fetchone()
    return int(row[0])


def store_key_uses(connection: Connection, keyring: Keyring) -> list[StoreKeyUse]:
    """The store keys, oldest first, and what is under them."""
    wrapped = dict(
        connection.execute("SELECT substr(record, 2, ?), count(*) FROM scope_keys GROUP BY 1", (VERSION_LENGTH,))
    )
    tokens = dict(connection.execute("SELECT mac_version, count(*) FROM tokens GROUP BY 1"))
    rights: Counter[bytes] = Counter()
    for kind in KINDS:
        rights.update(version for _, version in connection.execute(_ROWS[kind]))
    return [
        StoreKeyUse(
            version,
            made_ms,
            scope_keys=wrapped.get(_stated(version), 0),
            tokens=tokens.get(version, 0),
            rights=rights[_stated(version)],
        )
        for version, made_ms in keyring.store_keys().items()
    ]
