"""All SQL of the Secrets service: functions of a connection, run inside a transaction of `servicekit.database`.

They find and record; whether the caller may is decided above, in the same transaction. Names arrive folded.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

from secrets_service.model import (
    ClientSecret,
    Email,
    Grant,
    Group,
    Key,
    Kind,
    ManagedToken,
    Permission,
    Platform,
    Profile,
    Scope,
    SealedSecret,
    SealedSigningKey,
    SecretInfo,
    Standing,
    StoredToken,
    TokenInfo,
    TokenKind,
    User,
    VersionInfo,
)

# --- platform ---


def find_platform(connection: sqlite3.Connection) -> Platform | None:
    """What the first start decided; None before it."""
    row = connection.execute(
        "SELECT store_id, workspace_id, key_check, admin_id, admin_token_id FROM platform"
    ).fetchone()
    return Platform(*row) if row else None


def insert_platform(connection: sqlite3.Connection, platform: Platform) -> None:
    """Records what the first start decided."""
    connection.execute(
        "INSERT INTO platform (one, store_id, workspace_id, key_check, admin_id, admin_token_id)"
        " VALUES (1, ?, ?, ?, ?, ?)",
        (
            platform.store_id,
            platform.workspace_id,
            platform.key_check,
            platform.admin_id,
            platform.admin_token_id,
        ),
    )


def replace_admin_token_id(connection: sqlite3.Connection, token_id: str) -> None:
    """Deletes the token that stood in admin.token and records which one stands there now."""
    connection.execute("DELETE FROM tokens WHERE id = (SELECT admin_token_id FROM platform)")
    connection.execute("UPDATE platform SET admin_token_id = ?", (token_id,))


def signing_keys(connection: sqlite3.Connection) -> list[SealedSigningKey]:
    """The keys that assertions may be signed with, oldest first."""
    rows = connection.execute("SELECT key_id, record FROM signing_keys ORDER BY id")
    return [SealedSigningKey(*row) for row in rows]


def insert_signing_key(connection: sqlite3.Connection, key: SealedSigningKey) -> None:
    """Adds a key that assertions may be signed with."""
    connection.execute("INSERT INTO signing_keys (key_id, record) VALUES (?, ?)", (key.key_id, key.record))


# --- principals: look-ups; the rest is in directory_store.py ---


def find_principal(connection: sqlite3.Connection, folded: str) -> int | None:
    """The id of the user, service principal or group of that name."""
    row = connection.execute("SELECT id FROM principals WHERE folded = ?", (folded,)).fetchone()
    return row[0] if row else None


def kind_of(connection: sqlite3.Connection, principal_id: int) -> Kind:
    """What the principal of that id is."""
    return Kind(connection.execute("SELECT kind FROM principals WHERE id = ?", (principal_id,)).fetchone()[0])


def groups_of(connection: sqlite3.Connection, principal_id: int) -> tuple[Group, ...]:
    """The groups that a principal belongs to, by id."""
    rows = connection.execute(
        "SELECT p.id, p.name FROM memberships m JOIN principals p ON p.id = m.group_id WHERE m.member_id = ?"
        " ORDER BY p.id",
        (principal_id,),
    )
    return tuple(Group(*row) for row in rows)


ACCOUNT = (
    "SELECT p.id, p.kind, p.name, a.display_name, a.given_name, a.family_name, a.emails, a.is_active, p.roles,"
    " p.entitlements, p.external_id FROM principals p JOIN accounts a ON a.id = p.id"
)


def find_user(connection: sqlite3.Connection, user_id: int) -> User | None:
    """The user or service principal of that id."""
    row = connection.execute(f"{ACCOUNT} WHERE p.id = ?", (user_id,)).fetchone()
    return account(row, groups_of(connection, row[0])) if row else None


def find_user_named(connection: sqlite3.Connection, folded: str) -> User | None:
    """The user of that name, or the service principal of that application id."""
    row = connection.execute(f"{ACCOUNT} WHERE p.folded = ?", (folded,)).fetchone()
    return account(row, groups_of(connection, row[0])) if row else None


def account(row: sqlite3.Row, groups: tuple[Group, ...]) -> User:
    """The user or service principal in a row of ACCOUNT."""
    principal_id, kind, name, display_name, given_name, family_name, emails, is_active, *lists, external_id = row
    roles, entitlements = (tuple(json.loads(each)) for each in lists)
    profile = Profile(
        name=name,
        display_name=display_name,
        given_name=given_name,
        family_name=family_name,
        emails=tuple(Email(*email) for email in json.loads(emails)),
        is_active=bool(is_active),
        roles=roles,
        entitlements=entitlements,
        external_id=external_id,
    )
    return User(principal_id, profile, groups, Kind(kind))


# --- tokens and client secrets ---


def insert_token(
    connection: sqlite3.Connection,
    info: TokenInfo,
    *,
    owner_id: int,
    creator_id: int,
    mac: bytes,
    kind: TokenKind = TokenKind.PERSONAL,
) -> None:
    """Records a token, which its owner or an admin made, or a client secret."""
    connection.execute(
        "INSERT INTO tokens (id, owner_id, creator_id, mac, comment, created_ms, expires_ms, kind)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (info.id, owner_id, creator_id, mac, info.comment, info.created_ms, info.expires_ms, kind),
    )


def find_token_mac(connection: sqlite3.Connection, token_id: str) -> bytes | None:
    """The MAC of the token of that id."""
    row = connection.execute("SELECT mac FROM tokens WHERE id = ?", (token_id,)).fetchone()
    return row[0] if row else None


def find_token(connection: sqlite3.Connection, token_id: str) -> StoredToken | None:
    """A token or client secret and its owner, whether or not it has expired."""
    row = connection.execute(
        "SELECT id, created_ms, expires_ms, comment, owner_id, kind FROM tokens WHERE id = ?", (token_id,)
    ).fetchone()
    if row is None:
        return None
    owner = find_user(connection, row[4])
    return StoredToken(TokenInfo(*row[:4]), owner, TokenKind(row[5])) if owner else None


def tokens_of(connection: sqlite3.Connection, owner_id: int, *, now_ms: int) -> list[TokenInfo]:
    """A principal's tokens that have not expired, oldest first."""
    rows = connection.execute(
        "SELECT id, created_ms, expires_ms, comment FROM tokens"
        " WHERE owner_id = ? AND kind = 'personal' AND expires_ms > ? ORDER BY created_ms, rowid",
        (owner_id, now_ms),
    )
    return [TokenInfo(*row) for row in rows]


def client_secrets_of(connection: sqlite3.Connection, owner_id: int, *, now_ms: int) -> list[ClientSecret]:
    """A service principal's client secrets that have not expired, oldest first."""
    rows = connection.execute(
        "SELECT id, created_ms, expires_ms, comment, mac FROM tokens"
        " WHERE owner_id = ? AND kind = 'client_secret' AND expires_ms > ? ORDER BY created_ms, rowid",
        (owner_id, now_ms),
    )
    return [ClientSecret(TokenInfo(*row[:4]), row[4]) for row in rows]


_MANAGED = (
    "SELECT t.id, t.created_ms, t.expires_ms, t.comment, t.owner_id, t.creator_id, coalesce(p.name, '')"
    " FROM tokens t LEFT JOIN principals p ON p.id = t.creator_id WHERE t.kind = 'personal'"
)


def find_managed_token(connection: sqlite3.Connection, token_id: str, *, now_ms: int) -> ManagedToken | None:
    """Anybody's token that has not expired."""
    row = connection.execute(f"{_MANAGED} AND t.id = ? AND t.expires_ms > ?", (token_id, now_ms)).fetchone()
    return _managed(row) if row else None


def newest_tokens(
    connection: sqlite3.Connection, *, creators: Sequence[int] | None, now_ms: int, count: int
) -> list[ManagedToken]:
    """The newest tokens that have not expired, oldest first: everybody's, or those that some principals made."""
    made_by = "" if creators is None else " AND t.creator_id IN (SELECT value FROM json_each(?))"
    rows = connection.execute(
        f"{_MANAGED} AND t.expires_ms > ?{made_by} ORDER BY t.created_ms DESC, t.rowid DESC LIMIT ?",
        (now_ms, *([] if creators is None else [json.dumps(list(creators))]), count),
    ).fetchall()
    return [_managed(row) for row in reversed(rows)]


def _managed(row: sqlite3.Row) -> ManagedToken:
    return ManagedToken(TokenInfo(*row[:4]), *row[4:])


def comment_token(connection: sqlite3.Connection, token_id: str, comment: str) -> None:
    """Changes what a token is said to be for."""
    connection.execute("UPDATE tokens SET comment = ? WHERE id = ?", (comment, token_id))


def delete_token(connection: sqlite3.Connection, token_id: str) -> None:
    """Deletes a token or client secret."""
    connection.execute("DELETE FROM tokens WHERE id = ?", (token_id,))


def delete_expired_tokens(connection: sqlite3.Connection, owner_id: int, *, now_ms: int) -> None:
    """Forgets those of a principal's tokens and client secrets that have expired."""
    connection.execute("DELETE FROM tokens WHERE owner_id = ? AND expires_ms <= ?", (owner_id, now_ms))


# --- scopes and secrets ---


def find_scope(connection: sqlite3.Connection, folded: str) -> Scope | None:
    """The scope of that name."""
    row = connection.execute("SELECT id, uuid, name FROM scopes WHERE folded = ?", (folded,)).fetchone()
    return Scope(*row) if row else None


def scopes(connection: sqlite3.Connection) -> list[Scope]:
    """All scopes by name."""
    return [Scope(*row) for row in connection.execute("SELECT id, uuid, name FROM scopes ORDER BY folded")]


def count_scopes(connection: sqlite3.Connection) -> int:
    """How many scopes there are."""
    return int(connection.execute("SELECT count(*) FROM scopes").fetchone()[0])


def insert_scope(connection: sqlite3.Connection, name: str, *, folded: str, uuid: bytes) -> Scope:
    """Adds an empty scope without ACLs."""
    cursor = connection.execute("INSERT INTO scopes (uuid, name, folded) VALUES (?, ?, ?)", (uuid, name, folded))
    return Scope(_new_id(cursor), uuid, name)


def delete_scope(connection: sqlite3.Connection, scope: Scope) -> int:
    """Deletes a scope with its secrets and ACLs; how many values were destroyed with it."""
    values = connection.execute(
        "SELECT count(*) FROM versions v JOIN keys k ON k.id = v.key_id WHERE k.scope_id = ?", (scope.id,)
    ).fetchone()[0]
    connection.execute("DELETE FROM scopes WHERE id = ?", (scope.id,))
    return int(values)


# A key exists while its last version is not older than its last deletion: `last_version >= first_version`.


def find_key(connection: sqlite3.Connection, scope: Scope, folded: str) -> Key | None:
    """What is known about a key, also when it was deleted; None when it never was."""
    row = connection.execute(
        "SELECT id, key, first_version, last_version FROM keys WHERE scope_id = ? AND folded = ?", (scope.id, folded)
    ).fetchone()
    return Key(*row) if row else None


def find_secret(connection: sqlite3.Connection, scope: Scope, folded: str) -> SealedSecret | None:
    """The version of a secret that is read."""
    row = connection.execute(
        "SELECT k.id, k.key, v.version, v.record FROM keys k"
        " JOIN versions v ON v.key_id = k.id AND v.version = k.last_version"
        " WHERE k.scope_id = ? AND k.folded = ? AND k.last_version >= k.first_version",
        (scope.id, folded),
    ).fetchone()
    return SealedSecret(*row) if row else None


def find_version(connection: sqlite3.Connection, key: Key, version: int) -> SealedSecret | None:
    """A version of a secret, if it is kept."""
    row = connection.execute(
        "SELECT record FROM versions WHERE key_id = ? AND version = ?", (key.id, version)
    ).fetchone()
    return SealedSecret(key.id, key.name, version, row[0]) if row else None


def versions(connection: sqlite3.Connection, key: Key) -> list[VersionInfo]:
    """The versions of a secret that are kept, the newest first."""
    rows = connection.execute(
        "SELECT version, created_ms, EXISTS (SELECT 1 FROM holds h WHERE (h.key_id, h.version) = (v.key_id, v.version))"
        " FROM versions v WHERE key_id = ? ORDER BY version DESC",
        (key.id,),
    )
    return [
        VersionInfo(
            version,
            created_ms,
            is_current=version == key.current,
            is_held=bool(is_held),
            is_deleted=version < key.first_version,
        )
        for version, created_ms, is_held in rows
    ]


def secrets(connection: sqlite3.Connection, scope: Scope) -> list[SecretInfo]:
    """The keys of a scope, by name."""
    rows = connection.execute(
        "SELECT k.key, v.created_ms FROM keys k JOIN versions v ON v.key_id = k.id AND v.version = k.last_version"
        " WHERE k.scope_id = ? AND k.last_version >= k.first_version ORDER BY k.folded",
        (scope.id,),
    )
    return [SecretInfo(*row) for row in rows]


def count_secrets(connection: sqlite3.Connection, scope: Scope) -> int:
    """How many secrets a scope holds."""
    row = connection.execute(
        "SELECT count(*) FROM keys WHERE scope_id = ? AND last_version >= first_version", (scope.id,)
    ).fetchone()
    return int(row[0])


def next_version(connection: sqlite3.Connection, scope: Scope, name: str, *, folded: str) -> tuple[int, int]:
    """Counts a put: the key's id and the new version. A key that exists keeps its spelling."""
    row = connection.execute(
        "INSERT INTO keys (scope_id, key, folded, first_version, last_version) VALUES (?, ?, ?, 1, 1)"
        " ON CONFLICT (scope_id, folded) DO UPDATE SET last_version = last_version + 1,"
        " key = iif(last_version >= first_version, key, excluded.key) RETURNING id, last_version",
        (scope.id, name, folded),
    ).fetchone()
    return row[0], row[1]


def insert_version(connection: sqlite3.Connection, secret: SealedSecret, *, created_ms: int) -> None:
    """Records the value of a version."""
    connection.execute(
        "INSERT INTO versions (key_id, version, created_ms, record) VALUES (?, ?, ?, ?)",
        (secret.key_id, secret.version, created_ms, secret.record),
    )


def delete_key(connection: sqlite3.Connection, key: Key) -> None:
    """Has all versions of a key count as put before its deletion."""
    connection.execute("UPDATE keys SET first_version = last_version + 1 WHERE id = ?", (key.id,))


def drop_versions(connection: sqlite3.Connection, key_id: int, *, keep: int) -> int:
    """Destroys the versions of a key that are not held, but for the newest `keep` since its deletion; how many."""
    cursor = connection.execute(
        "DELETE FROM versions WHERE key_id = ?1"
        " AND EXISTS (SELECT 1 FROM keys k WHERE k.id = ?1"
        " AND (version <= k.last_version - ?2 OR version < k.first_version))"
        " AND NOT EXISTS (SELECT 1 FROM holds h WHERE h.key_id = ?1 AND h.version = versions.version)",
        (key_id, keep),
    )
    return cursor.rowcount


def drop_all_versions(connection: sqlite3.Connection, key: Key) -> int:
    """Destroys every version of a key, held or not; how many."""
    return connection.execute("DELETE FROM versions WHERE key_id = ?", (key.id,)).rowcount


def hold(connection: sqlite3.Connection, replica_id: str, secret: SealedSecret) -> None:
    """Records that a replica is started with a version."""
    connection.execute(
        "INSERT INTO holds (replica_id, key_id, version) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (replica_id, secret.key_id, secret.version),
    )


def release(connection: sqlite3.Connection, replica_ids: Iterable[str]) -> set[int]:
    """Forgets what replicas held; the ids of the keys concerned."""
    rows = connection.execute(
        "DELETE FROM holds WHERE replica_id IN (SELECT value FROM json_each(?)) RETURNING key_id",
        (json.dumps(list(replica_ids)),),
    )
    return {row[0] for row in rows}


def holders(connection: sqlite3.Connection) -> set[str]:
    """The replicas that hold a version."""
    return {row[0] for row in connection.execute("SELECT DISTINCT replica_id FROM holds")}


# --- access control lists ---


def find_scope_and_standing(
    connection: sqlite3.Connection, folded: str, principal_id: int
) -> tuple[Scope, Standing] | None:
    """The scope of that name, and what decides about a principal in it."""
    # One row for the principal itself and one for each of its groups.
    rows = connection.execute(
        "SELECT s.id, s.uuid, s.name, p.kind, p.name, a.permission FROM scopes s"
        " CROSS JOIN (SELECT ?1 AS id UNION ALL SELECT group_id FROM memberships WHERE member_id = ?1) who"
        " JOIN principals p ON p.id = who.id"
        " LEFT JOIN acls a ON a.scope_id = s.id AND a.principal_id = who.id WHERE s.folded = ?2",
        (principal_id, folded),
    ).fetchall()
    return (Scope(*rows[0][:3]), _standing(rows)) if rows else None


def _standing(rows: list[sqlite3.Row]) -> Standing:
    return Standing(
        groups=frozenset(row[4] for row in rows if row[3] == "group"),
        granted=tuple(Permission(row[5]) for row in rows if row[5] is not None),
    )


def put_grant(connection: sqlite3.Connection, scope: Scope, principal_id: int, permission: Permission) -> None:
    """Grants a permission in place of the principal's older one, which keeps its place in the list."""
    connection.execute(
        "INSERT INTO acls (scope_id, principal_id, permission) VALUES (?, ?, ?)"
        " ON CONFLICT (scope_id, principal_id) DO UPDATE SET permission = excluded.permission",
        (scope.id, principal_id, int(permission)),
    )


def find_grant(connection: sqlite3.Connection, scope: Scope, folded: str) -> Grant | None:
    """What is granted to the principal of that name itself."""
    row = connection.execute(
        "SELECT p.name, a.permission FROM acls a JOIN principals p ON p.id = a.principal_id"
        " WHERE a.scope_id = ? AND p.folded = ?",
        (scope.id, folded),
    ).fetchone()
    return Grant(row[0], Permission(row[1])) if row else None


def grants(connection: sqlite3.Connection, scope: Scope) -> list[Grant]:
    """All that is granted on a scope, in the order in which it was first granted."""
    rows = connection.execute(
        "SELECT p.name, a.permission FROM acls a JOIN principals p ON p.id = a.principal_id"
        " WHERE a.scope_id = ? ORDER BY a.id",
        (scope.id,),
    )
    return [Grant(name, Permission(permission)) for name, permission in rows]


def delete_grant(connection: sqlite3.Connection, scope: Scope, folded: str) -> None:
    """Takes away what is granted to the principal of that name."""
    connection.execute(
        "DELETE FROM acls WHERE scope_id = ? AND principal_id = (SELECT id FROM principals WHERE folded = ?)",
        (scope.id, folded),
    )


def _new_id(cursor: sqlite3.Cursor) -> int:
    assert cursor.lastrowid is not None
    return cursor.lastrowid
