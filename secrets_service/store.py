"""All SQL of the Secrets service: functions of a connection, run inside a transaction of `servicekit.database`.

They find and record; whether the caller may is decided above, in the same transaction. Names arrive folded. What
decides about rights is verified here, where it is read, and authenticated where it is written (integrity.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secrets_service import integrity, tokens
from secrets_service.errors import RightsDamaged
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
    SealedKeyring,
    SealedSecret,
    SealedSigningKey,
    SecretInfo,
    Standing,
    StoredToken,
    TokenInfo,
    TokenKind,
    TokenMac,
    User,
    VersionInfo,
    WrappedKey,
)
from servicekit.storage import Connection

# --- platform ---

_PLATFORM = "SELECT store_id, workspace_id, admin_id, admin_token_id, knows_older_endpoints, mac FROM platform"


def stated_platform(connection: Connection) -> Platform | None:
    """What the first start decided, as it is stored, to find the keys with which it is verified; None before it."""
    row = connection.execute(_PLATFORM).fetchone()
    return Platform(*row[:4]) if row else None


def find_platform(connection: Connection) -> Platform:
    """What the first start decided."""
    return Platform(*_verified_platform(connection)[:4])


def knows_older_endpoints(connection: Connection) -> bool:
    """Whether Serving has told which endpoints are older than grants."""
    return bool(_verified_platform(connection)[4])


def insert_platform(connection: Connection, platform: Platform) -> None:
    """Records what the first start decided."""
    row = (platform.store_id, platform.workspace_id, platform.admin_id, platform.admin_token_id, 0)
    connection.execute(
        "INSERT INTO platform (one, store_id, workspace_id, admin_id, admin_token_id, knows_older_endpoints)"
        " VALUES (1, ?, ?, ?, ?, ?)",
        row,
    )
    _authenticate_platform(connection, row)


def older_endpoints_are_known(connection: Connection) -> None:
    """Records that Serving has told which endpoints are older than grants; there are no others."""
    before = _verified_platform(connection)
    connection.execute("UPDATE platform SET knows_older_endpoints = 1")
    _authenticate_platform(connection, (*before[:4], 1))


def replace_admin_token_id(connection: Connection, token_id: str) -> None:
    """Deletes the token that stood in admin.token and records which one stands there now."""
    before = _verified_platform(connection)
    connection.execute("DELETE FROM tokens WHERE id = ?", (before[3],))
    connection.execute("UPDATE platform SET admin_token_id = ?", (token_id,))
    _authenticate_platform(connection, (*before[:3], token_id, before[4]))


def _verified_platform(connection: Connection) -> tuple[Any, ...]:
    row = connection.execute(_PLATFORM).fetchone()
    if row is None:
        raise RightsDamaged("the", "platform")
    integrity.of(connection).require(row[5], "platform", *row[:5])
    return tuple(row[:5])


def _authenticate_platform(connection: Connection, row: tuple[Any, ...]) -> None:
    connection.execute("UPDATE platform SET mac = ?", (integrity.of(connection).mac("platform", *row),))


def holds_data(connection: Connection) -> bool:
    """Whether there is anything that a first start would not find."""
    found = connection.execute(
        "SELECT EXISTS (SELECT 1 FROM principals UNION ALL SELECT 1 FROM scopes UNION ALL SELECT 1 FROM keyring"
        " UNION ALL SELECT 1 FROM signing_keys)"
    ).fetchone()
    return bool(found[0])


# --- keys ---


def find_keyring(connection: Connection) -> SealedKeyring | None:
    """The keyring; None in a store of the first format."""
    row = connection.execute("SELECT root_key_id, record, wrapped FROM keyring").fetchone()
    return SealedKeyring(*row) if row else None


def insert_keyring(connection: Connection, keyring: SealedKeyring) -> None:
    """Records the keyring of a store that has none yet."""
    connection.execute(
        "INSERT INTO keyring (one, root_key_id, record, wrapped) VALUES (1, ?, ?, ?)",
        (keyring.root_key_id, keyring.record, keyring.wrapped),
    )


def replace_keyring(connection: Connection, keyring: SealedKeyring) -> None:
    """Records a keyring in place of the one before."""
    connection.execute(
        "UPDATE keyring SET root_key_id = ?, record = ?, wrapped = ?",
        (keyring.root_key_id, keyring.record, keyring.wrapped),
    )


def insert_scope_key(connection: Connection, scope: Scope, key: WrappedKey, *, created_ms: int) -> None:
    """Adds a version to the key of a scope."""
    connection.execute(
        "INSERT INTO scope_keys (scope_id, version, created_ms, record, puts_before)"
        " VALUES (?1, ?2, ?3, ?4, (SELECT coalesce(sum(last_version), 0) FROM keys WHERE scope_id = ?1))",
        (scope.id, key.version, created_ms, key.record),
    )


def newest_scope_key(connection: Connection, scope: Scope) -> WrappedKey | None:
    """The version of a scope's key that values are sealed under now."""
    row = connection.execute(
        "SELECT version, record FROM scope_keys WHERE scope_id = ? ORDER BY version DESC LIMIT 1", (scope.id,)
    ).fetchone()
    return WrappedKey(*row) if row else None


def signing_keys(connection: Connection) -> list[SealedSigningKey]:
    """The keys that assertions may be signed with, oldest first."""
    rows = connection.execute("SELECT key_id, record FROM signing_keys ORDER BY id")
    return [SealedSigningKey(*row) for row in rows]


def insert_signing_key(connection: Connection, key: SealedSigningKey) -> None:
    """Adds a key that assertions may be signed with."""
    connection.execute("INSERT INTO signing_keys (key_id, record) VALUES (?, ?)", (key.key_id, key.record))


# --- stores of the first format ---


def first_format_check(connection: Connection) -> bytes | None:
    """What the root key of a store of the first format is known by; None in every other."""
    row = connection.execute("SELECT key_check FROM first_format").fetchone()
    return row[0] if row else None


def end_first_format(connection: Connection) -> None:
    """Records that nothing of the first format is left."""
    connection.execute("DELETE FROM first_format")


def folded_keys(connection: Connection, scope: Scope) -> list[tuple[int, str]]:
    """All keys of a scope, deleted ones included: id and folded name."""
    return connection.execute("SELECT id, folded FROM keys WHERE scope_id = ?", (scope.id,)).fetchall()


def records(connection: Connection, key_id: int) -> list[tuple[int, bytes]]:
    """The versions of a key that are kept, with their sealed values."""
    return connection.execute("SELECT version, record FROM versions WHERE key_id = ?", (key_id,)).fetchall()


def replace_record(connection: Connection, key_id: int, version: int, record: bytes, *, key_version: int) -> None:
    """Records the same value, sealed anew."""
    connection.execute(
        "UPDATE versions SET record = ?, key_version = ? WHERE key_id = ? AND version = ?",
        (record, key_version, key_id, version),
    )


def replace_signing_key(connection: Connection, key: SealedSigningKey) -> None:
    """Records the same signing key, sealed anew."""
    connection.execute("UPDATE signing_keys SET record = ? WHERE key_id = ?", (key.record, key.key_id))


def answers(connection: Connection) -> list[tuple[int, int, str, bytes]]:
    """All first answers: id, principal, request, sealed answer."""
    return connection.execute("SELECT id, principal_id, request_id, record FROM answers").fetchall()


def replace_answer(connection: Connection, answer_id: int, record: bytes) -> None:
    """Records the same answer, sealed anew."""
    connection.execute("UPDATE answers SET record = ? WHERE id = ?", (record, answer_id))


# --- principals: look-ups; the rest is in directory_store.py ---

PRINCIPAL = "SELECT p.id, p.kind, p.name, p.folded, p.external_id, p.roles, p.entitlements, p.mac FROM principals p"

ACCOUNT = (
    "SELECT p.id, p.kind, p.name, p.folded, p.external_id, p.roles, p.entitlements, p.mac,"
    " a.display_name, a.given_name, a.family_name, a.emails, a.is_active, a.mac"
    " FROM principals p LEFT JOIN accounts a ON a.id = p.id"
)

# A membership of a group that there is not belongs to what is verified, too.
_GROUPS = (
    "SELECT p.id, p.kind, p.name, p.folded, p.external_id, p.roles, p.entitlements, p.mac"
    " FROM memberships m LEFT JOIN principals p ON p.id = m.group_id"
)

IS_AMONG = "p.id IN (SELECT CAST(value AS BIGINT) FROM json_each(?))"
"""The condition that a principal is one of a list of ids."""


def verify_principal(connection: Connection, row: Sequence[Any]) -> None:
    """Raises RightsDamaged for a row of PRINCIPAL that was changed."""
    integrity.of(connection).require(row[7], "principal", *row[:7])


def find_principal(connection: Connection, folded: str) -> int | None:
    """The id of the user, service principal or group of that name."""
    row = connection.execute(f"{PRINCIPAL} WHERE p.folded = ?", (folded,)).fetchone()
    if row is None:
        return None
    verify_principal(connection, row)
    return int(row[0])


def kind_of(connection: Connection, principal_id: int) -> Kind:
    """What the principal of that id is."""
    row = connection.execute(f"{PRINCIPAL} WHERE p.id = ?", (principal_id,)).fetchone()
    verify_principal(connection, row)
    return Kind(row[1])


def groups_of(connection: Connection, principal_id: int) -> tuple[Group, ...]:
    """The groups that a principal belongs to, by id. Whether it does, only its account's MAC tells (`account`)."""
    rows = connection.execute(f"{_GROUPS} WHERE m.member_id = ? ORDER BY m.group_id", (principal_id,))
    return tuple(group(connection, row) for row in rows)


def group(connection: Connection, row: Sequence[Any]) -> Group:
    """The group in a row of PRINCIPAL."""
    verify_principal(connection, row)
    if row[1] != Kind.GROUP:
        raise RightsDamaged("group", str(row[0]))
    return Group(row[0], row[2])


def find_user(connection: Connection, user_id: int) -> User | None:
    """The user or service principal of that id."""
    row = connection.execute(f"{ACCOUNT} WHERE p.id = ? AND p.kind <> 'group'", (user_id,)).fetchone()
    return account(connection, row, groups_of(connection, row[0])) if row else None


def find_user_named(connection: Connection, folded: str) -> User | None:
    """The user of that name, or the service principal of that application id."""
    row = connection.execute(f"{ACCOUNT} WHERE p.folded = ? AND p.kind <> 'group'", (folded,)).fetchone()
    return account(connection, row, groups_of(connection, row[0])) if row else None


def account(connection: Connection, row: Sequence[Any], groups: tuple[Group, ...]) -> User:
    """The user or service principal in a row of ACCOUNT, which belongs to these groups; raises RightsDamaged."""
    verify_principal(connection, row)
    integrity.of(connection).require(row[13], "account", row[0], *row[8:13], [each.id for each in groups])
    principal_id, kind, name, _, external_id, roles, entitlements, _ = row[:8]
    display_name, given_name, family_name, emails, is_active, _ = row[8:]
    profile = Profile(
        name=name,
        display_name=display_name,
        given_name=given_name,
        family_name=family_name,
        emails=tuple(Email(*email) for email in json.loads(emails)),
        is_active=bool(is_active),
        roles=tuple(json.loads(roles)),
        entitlements=tuple(json.loads(entitlements)),
        external_id=external_id,
    )
    return User(principal_id, profile, groups, Kind(kind))


# --- tokens and client secrets ---

_TOKENS = (
    "SELECT t.id, t.created_ms, t.expires_ms, t.comment, t.owner_id, t.creator_id, t.kind, t.mac_version, t.mac,"
    " t.row_mac, coalesce(p.name, '') FROM tokens t LEFT JOIN principals p ON p.id = t.creator_id"
)
"""The last column, the name of whoever made it, is for lists: it decides nothing."""


def insert_token(
    connection: Connection,
    info: TokenInfo,
    *,
    owner_id: int,
    creator_id: int,
    mac: TokenMac,
    kind: TokenKind = TokenKind.PERSONAL,
) -> None:
    """Records a token, which its owner or an admin made, or a client secret."""
    row = (info.id, info.created_ms, info.expires_ms, info.comment, owner_id, creator_id, kind, mac.version, mac.mac)
    connection.execute(
        "INSERT INTO tokens (id, created_ms, expires_ms, comment, owner_id, creator_id, kind, mac_version, mac,"
        " row_mac) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, integrity.of(connection).mac("token", *row)),
    )


def find_token_mac(connection: Connection, token_id: str) -> TokenMac | None:
    """The MAC of the token of that id, as it is stored; the token is verified when it is read."""
    row = connection.execute("SELECT mac_version, mac FROM tokens WHERE id = ?", (token_id,)).fetchone()
    return TokenMac(*row) if row else None


def find_token(connection: Connection, token_id: str) -> StoredToken | None:
    """A token or client secret and its owner, whether or not it has expired."""
    row = _verified_token(connection, token_id)
    if row is None:
        return None
    owner = find_user(connection, row[4])
    return StoredToken(TokenInfo(*row[:4]), owner, TokenKind(row[6]), row[7]) if owner else None


def find_presented(connection: Connection, token_id: str, candidates: tuple[TokenMac, ...]) -> StoredToken | None:
    """The token of that id, if its MAC is one of these. Nothing but the MAC is read before it was compared."""
    if not tokens.is_one_of(candidates, find_token_mac(connection, token_id)):
        return None
    return find_token(connection, token_id)


def renew_token_mac(connection: Connection, token_id: str, before: int, mac: TokenMac) -> None:
    """Records the MAC of a token under another version of its key, if it still is under the version of `before`."""
    row = _verified_token(connection, token_id)
    if row is None or row[7] != before:
        return
    _replace_token(connection, (*row[:7], mac.version, mac.mac))


def tokens_of(connection: Connection, owner_id: int, *, now_ms: int) -> list[TokenInfo]:
    """A principal's tokens that have not expired, oldest first."""
    return [TokenInfo(*row[:4]) for row in _tokens_of(connection, owner_id, TokenKind.PERSONAL, now_ms)]


def client_secrets_of(connection: Connection, owner_id: int, *, now_ms: int) -> list[ClientSecret]:
    """A service principal's client secrets that have not expired, oldest first."""
    rows = _tokens_of(connection, owner_id, TokenKind.CLIENT_SECRET, now_ms)
    return [ClientSecret(TokenInfo(*row[:4]), TokenMac(*row[7:9])) for row in rows]


def _tokens_of(connection: Connection, owner_id: int, kind: TokenKind, now_ms: int) -> Iterator[Sequence[Any]]:
    rows = connection.execute(
        f"{_TOKENS} WHERE t.owner_id = ? AND t.kind = ? AND t.expires_ms > ? ORDER BY t.created_ms, t.rowid",
        (owner_id, kind, now_ms),
    ).fetchall()
    return (row for row in rows if _is_intact_token(connection, row))


def _verified_token(connection: Connection, token_id: str) -> Sequence[Any] | None:
    row: Sequence[Any] | None = connection.execute(f"{_TOKENS} WHERE t.id = ?", (token_id,)).fetchone()
    if row is not None:
        integrity.of(connection).require(row[9], "token", *row[:9])
    return row


def _is_intact_token(connection: Connection, row: Sequence[Any]) -> bool:
    """Whether a token may be listed: one that was changed lets nobody in and is as good as none."""
    return integrity.of(connection).is_intact(row[9], "token", *row[:9])


def _replace_token(connection: Connection, row: Sequence[Any]) -> None:
    """Records what may change of a token that was verified: its comment and its MAC."""
    connection.execute(
        "UPDATE tokens SET comment = ?, mac_version = ?, mac = ?, row_mac = ? WHERE id = ?",
        (row[3], row[7], row[8], integrity.of(connection).mac("token", *row), row[0]),
    )


def find_managed_token(connection: Connection, token_id: str, *, now_ms: int) -> ManagedToken | None:
    """Anybody's token that has not expired."""
    row = connection.execute(
        f"{_TOKENS} WHERE t.kind = 'personal' AND t.id = ? AND t.expires_ms > ?", (token_id, now_ms)
    ).fetchone()
    if row is None:
        return None
    integrity.of(connection).require(row[9], "token", *row[:9])
    return _managed(row)


def newest_tokens(
    connection: Connection, *, creators: Sequence[int] | None, now_ms: int, count: int
) -> list[ManagedToken]:
    """The newest tokens that have not expired, oldest first: everybody's, or those that some principals made."""
    made_by = "" if creators is None else " AND t.creator_id IN (SELECT CAST(value AS BIGINT) FROM json_each(?))"
    rows = connection.execute(
        f"{_TOKENS} WHERE t.kind = 'personal' AND t.expires_ms > ?{made_by}"
        " ORDER BY t.created_ms DESC, t.rowid DESC LIMIT ?",
        (now_ms, *([] if creators is None else [json.dumps(list(creators))]), count),
    ).fetchall()
    return [_managed(row) for row in reversed(rows) if _is_intact_token(connection, row)]


def _managed(row: Sequence[Any]) -> ManagedToken:
    return ManagedToken(TokenInfo(*row[:4]), owner_id=row[4], creator_id=row[5], creator_name=row[10])


def comment_token(connection: Connection, token_id: str, comment: str) -> None:
    """Changes what a token is said to be for."""
    row = _verified_token(connection, token_id)
    if row is not None:
        _replace_token(connection, (*row[:3], comment, *row[4:9]))


def delete_token(connection: Connection, token_id: str) -> None:
    """Deletes a token or client secret."""
    connection.execute("DELETE FROM tokens WHERE id = ?", (token_id,))


def delete_expired_tokens(connection: Connection, owner_id: int, *, now_ms: int) -> None:
    """Forgets those of a principal's tokens and client secrets that have expired."""
    connection.execute("DELETE FROM tokens WHERE owner_id = ? AND expires_ms <= ?", (owner_id, now_ms))


# --- scopes and secrets ---


def find_scope(connection: Connection, folded: str) -> Scope | None:
    """The scope of that name."""
    found = _verified_scope(connection, "folded = ?", folded)
    return found.scope if found else None


def scopes(connection: Connection) -> list[Scope]:
    """All scopes by name."""
    return [Scope(*row) for row in connection.execute("SELECT id, uuid, name FROM scopes ORDER BY folded")]


def count_scopes(connection: Connection) -> int:
    """How many scopes there are."""
    return int(connection.execute("SELECT count(*) FROM scopes").fetchone()[0])


def insert_scope(connection: Connection, name: str, *, folded: str, uuid: bytes) -> Scope:
    """Adds an empty scope without ACLs."""
    row = connection.execute(
        "INSERT INTO scopes (uuid, name, folded) VALUES (?, ?, ?) RETURNING id", (uuid, name, folded)
    ).fetchone()
    scope = Scope(row[0], uuid, name)
    _authenticate_scope(connection, _GrantedScope(scope, folded, 0, {}))
    return scope


def delete_scope(connection: Connection, scope: Scope) -> int:
    """Deletes a scope with its secrets, keys and ACLs; how many values and keys were destroyed with it."""
    destroyed = connection.execute(
        "SELECT (SELECT count(*) FROM versions v JOIN keys k ON k.id = v.key_id WHERE k.scope_id = ?1)"
        " + (SELECT count(*) FROM scope_keys WHERE scope_id = ?1)",
        (scope.id,),
    ).fetchone()[0]
    connection.execute("DELETE FROM scopes WHERE id = ?", (scope.id,))
    return int(destroyed)


# A key exists while its last version is not older than its last deletion: `last_version >= first_version`.


def find_key(connection: Connection, scope: Scope, folded: str) -> Key | None:
    """What is known about a key, also when it was deleted; None when it never was."""
    row = connection.execute(
        "SELECT id, key, first_version, last_version FROM keys WHERE scope_id = ? AND folded = ?", (scope.id, folded)
    ).fetchone()
    return Key(*row) if row else None


def find_secret(connection: Connection, scope: Scope, folded: str) -> SealedSecret | None:
    """The version of a secret that is read."""
    row = connection.execute(
        f"{_SEALED} WHERE k.scope_id = ? AND k.folded = ? AND v.version = k.last_version"
        " AND k.last_version >= k.first_version",
        (scope.id, folded),
    ).fetchone()
    return _sealed(row) if row else None


def find_version(connection: Connection, key: Key, version: int) -> SealedSecret | None:
    """A version of a secret, if it is kept."""
    return sealed_version(connection, key.id, version)


def sealed_version(connection: Connection, key_id: int, version: int) -> SealedSecret | None:
    """A version of the secret of that id, if it is kept."""
    row = connection.execute(f"{_SEALED} WHERE v.key_id = ? AND v.version = ?", (key_id, version)).fetchone()
    return _sealed(row) if row else None


# A value whose key is gone is found all the same: it does not open.
_SEALED = (
    "SELECT k.id, k.key, v.version, v.record, v.key_version, sk.record FROM versions v JOIN keys k"
    " ON k.id = v.key_id LEFT JOIN scope_keys sk ON (sk.scope_id, sk.version) = (k.scope_id, v.key_version)"
)


def _sealed(row: Sequence[Any]) -> SealedSecret:
    key_id, key, version, record, key_version, wrapped = row
    return SealedSecret(key_id, key, version, record, WrappedKey(key_version, wrapped or b""))


def versions(connection: Connection, key: Key) -> list[VersionInfo]:
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


def secrets(connection: Connection, scope: Scope) -> list[SecretInfo]:
    """The keys of a scope, by name."""
    rows = connection.execute(
        "SELECT k.key, v.created_ms FROM keys k JOIN versions v ON v.key_id = k.id AND v.version = k.last_version"
        " WHERE k.scope_id = ? AND k.last_version >= k.first_version ORDER BY k.folded",
        (scope.id,),
    )
    return [SecretInfo(*row) for row in rows]


def spare_secrets(connection: Connection, scope: Scope, most: int) -> int:
    """How many more secrets a scope takes, or fewer: what was deleted leaves its row, which counts while there is room.

    It looks at each row in an index, so that it takes longer than all else of a put where there are many.
    """
    (rows,) = connection.execute("SELECT count(*) FROM keys WHERE scope_id = ?", (scope.id,)).fetchone()
    if rows >= most:
        (rows,) = connection.execute(
            "SELECT count(*) FROM keys WHERE scope_id = ? AND last_version >= first_version", (scope.id,)
        ).fetchone()
    return max(most - int(rows), 0)


def next_version(connection: Connection, scope: Scope, name: str, *, folded: str) -> Key:
    """Counts a put: the key as it is then. One that exists keeps its spelling."""
    row = connection.execute(
        "INSERT INTO keys (scope_id, key, folded, first_version, last_version) VALUES (?, ?, ?, 1, 1)"
        " ON CONFLICT (scope_id, folded) DO UPDATE SET last_version = keys.last_version + 1,"
        " key = CASE WHEN keys.last_version >= keys.first_version THEN keys.key ELSE excluded.key END"
        " RETURNING id, key, first_version, last_version",
        (scope.id, name, folded),
    ).fetchone()
    return Key(*row)


def insert_version(connection: Connection, secret: SealedSecret, *, created_ms: int) -> None:
    """Records the value of a version."""
    connection.execute(
        "INSERT INTO versions (key_id, version, created_ms, record, key_version) VALUES (?, ?, ?, ?, ?)",
        (secret.key_id, secret.version, created_ms, secret.record, secret.wrapped_key.version),
    )


def delete_key(connection: Connection, key: Key) -> None:
    """Has all versions of a key count as put before its deletion."""
    connection.execute("UPDATE keys SET first_version = last_version + 1 WHERE id = ?", (key.id,))


def drop_versions(connection: Connection, key_id: int, *, keep: int) -> int:
    """Destroys the versions of a key that are not held, but for the newest `keep` since its deletion; how many."""
    cursor = connection.execute(
        "DELETE FROM versions WHERE key_id = ?1"
        " AND EXISTS (SELECT 1 FROM keys k WHERE k.id = ?1"
        " AND (version <= k.last_version - ?2 OR version < k.first_version))"
        " AND NOT EXISTS (SELECT 1 FROM holds h WHERE h.key_id = ?1 AND h.version = versions.version)",
        (key_id, keep),
    )
    return cursor.rowcount


def drop_all_versions(connection: Connection, key: Key) -> int:
    """Destroys every version of a key, held or not; how many."""
    return connection.execute("DELETE FROM versions WHERE key_id = ?", (key.id,)).rowcount


def hold(connection: Connection, replica_id: str, secret: SealedSecret) -> None:
    """Records that a replica is started with a version."""
    connection.execute(
        "INSERT INTO holds (replica_id, key_id, version) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (replica_id, secret.key_id, secret.version),
    )


def release(connection: Connection, replica_ids: Iterable[str]) -> set[int]:
    """Forgets what replicas held; the ids of the keys concerned."""
    rows = connection.execute(
        "DELETE FROM holds WHERE replica_id IN (SELECT value FROM json_each(?)) RETURNING key_id",
        (json.dumps(list(replica_ids)),),
    )
    return {row[0] for row in rows}


def holders(connection: Connection) -> set[str]:
    """The replicas that hold a version."""
    return {row[0] for row in connection.execute("SELECT DISTINCT replica_id FROM holds")}


# --- access control lists ---


@dataclass(frozen=True, slots=True)
class _GrantedScope:
    """A scope with all that is granted on it: what one MAC covers."""

    scope: Scope
    folded: str
    generation: int
    granted: Mapping[int, tuple[int, int]]
    """By principal, in the order in which it was first granted: id of the row, permission."""

    @property
    def content(self) -> tuple[Any, ...]:
        rows = [[row_id, principal_id, level] for principal_id, (row_id, level) in self.granted.items()]
        return (self.scope.name, self.scope.id, self.scope.uuid, self.folded, self.generation, rows)


_SCOPE = "SELECT id, uuid, name, folded, generation, mac FROM scopes"


def _verified_scope(connection: Connection, condition: str, value: str | int) -> _GrantedScope | None:
    """The scope that a condition on one value finds; raises RightsDamaged."""
    row = connection.execute(f"{_SCOPE} WHERE {condition}", (value,)).fetchone()
    if row is None:
        return None
    found = _stored_scope(connection, row)
    integrity.of(connection).require(row[5], "scope", *found.content)
    return found


def _stored_scope(connection: Connection, row: Sequence[Any]) -> _GrantedScope:
    rows = connection.execute("SELECT id, principal_id, permission FROM acls WHERE scope_id = ? ORDER BY id", (row[0],))
    granted = {principal_id: (row_id, level) for row_id, principal_id, level in rows}
    return _GrantedScope(Scope(*row[:3]), row[3], row[4], granted)


def _authenticate_scope(connection: Connection, found: _GrantedScope) -> None:
    connection.execute(
        "UPDATE scopes SET generation = ?, mac = ? WHERE id = ?",
        (found.generation, integrity.of(connection).mac("scope", *found.content), found.scope.id),
    )


def _granted(connection: Connection, scope_id: int) -> _GrantedScope:
    """A scope that something else refers to."""
    found = _verified_scope(connection, "id = ?", scope_id)
    if found is None:
        raise RightsDamaged("scope", str(scope_id))
    return found


def find_scope_and_standing(connection: Connection, folded: str, principal_id: int) -> tuple[Scope, Standing] | None:
    """The scope of that name, and what decides about a principal in it."""
    found = _verified_scope(connection, "folded = ?", folded)
    if found is None:
        return None
    user = find_user(connection, principal_id)
    if user is None:
        return found.scope, Standing(frozenset(), ())
    concerned = [user.id, *(each.id for each in user.groups)]
    return found.scope, Standing(
        groups=frozenset(each.name for each in user.groups),
        granted=tuple(Permission(found.granted[each][1]) for each in concerned if each in found.granted),
    )


def put_grant(connection: Connection, scope: Scope, principal_id: int, permission: Permission) -> None:
    """Grants a permission in place of the principal's older one, which keeps its place in the list."""
    before = _granted(connection, scope.id)
    row_id = connection.execute(
        "INSERT INTO acls (scope_id, principal_id, permission) VALUES (?, ?, ?)"
        " ON CONFLICT (scope_id, principal_id) DO UPDATE SET permission = excluded.permission RETURNING id",
        (scope.id, principal_id, int(permission)),
    ).fetchone()[0]
    granted = {**before.granted, principal_id: (row_id, int(permission))}
    _authenticate_scope(connection, replace(before, generation=before.generation + 1, granted=granted))


def find_grant(connection: Connection, scope: Scope, folded: str) -> Grant | None:
    """What is granted to the principal of that name itself."""
    principal_id = find_principal(connection, folded)
    granted = _granted(connection, scope.id).granted
    if principal_id is None or principal_id not in granted:
        return None
    name = connection.execute("SELECT name FROM principals WHERE id = ?", (principal_id,)).fetchone()[0]
    return Grant(name, Permission(granted[principal_id][1]))


def grants(connection: Connection, scope: Scope) -> list[Grant]:
    """All that is granted on a scope, in the order in which it was first granted."""
    granted = _granted(connection, scope.id).granted
    rows = connection.execute(
        f"{PRINCIPAL} WHERE {IS_AMONG}",
        (json.dumps(list(granted)),),
    ).fetchall()
    for row in rows:
        verify_principal(connection, row)
    named = {row[0]: row[2] for row in rows}
    for principal_id in granted.keys() - named.keys():
        raise RightsDamaged("principal", str(principal_id))
    return [Grant(named[principal_id], Permission(level)) for principal_id, (_, level) in granted.items()]


def delete_grant(connection: Connection, scope: Scope, folded: str) -> None:
    """Takes away what is granted to the principal of that name."""
    principal_id = find_principal(connection, folded)
    if principal_id is not None:
        _take_away(connection, _granted(connection, scope.id), principal_id)


def take_away_everywhere(connection: Connection, principal_id: int) -> None:
    """Takes away what is granted to a principal on any scope. One that is damaged stays so, and nobody has it."""
    for row in connection.execute("SELECT scope_id FROM acls WHERE principal_id = ?", (principal_id,)).fetchall():
        with contextlib.suppress(RightsDamaged):
            _take_away(connection, _granted(connection, row[0]), principal_id)


def _take_away(connection: Connection, before: _GrantedScope, principal_id: int) -> None:
    connection.execute("DELETE FROM acls WHERE scope_id = ? AND principal_id = ?", (before.scope.id, principal_id))
    granted = {each: row for each, row in before.granted.items() if each != principal_id}
    _authenticate_scope(connection, replace(before, generation=before.generation + 1, granted=granted))


# --- all MACs ---


def damaged_rights(connection: Connection) -> list[tuple[str, str]]:
    """What does not fit its MAC, of scopes, tokens and the platform: kind and name."""
    made = integrity.of(connection)
    scopes = [(row, _stored_scope(connection, row)) for row in connection.execute(_SCOPE).fetchall()]
    found = [("scope", row[2]) for row, stored in scopes if not made.is_intact(row[5], "scope", *stored.content)]
    tokens = connection.execute(_TOKENS).fetchall()
    found += [("token", row[0]) for row in tokens if not _is_intact_token(connection, row)]
    platform = connection.execute(_PLATFORM).fetchone()
    if platform is None or not made.is_intact(platform[5], "platform", *platform[:5]):
        found.append(("platform", "itself"))
    return found


def authenticate_scope(connection: Connection, row_id: int, *, believed: bool) -> None:
    """Makes the MAC of a scope anew: of what is stored, whatever that is, where it is `believed`; else only of what is
    intact. Other objects have functions of the same kind; rotation_store.py lists them."""
    row = connection.execute(f"{_SCOPE} WHERE rowid = ?", (row_id,)).fetchone()
    found = _stored_scope(connection, row)
    if believed or integrity.of(connection).is_intact(row[5], "scope", *found.content):
        _authenticate_scope(connection, found)


def authenticate_token(connection: Connection, row_id: int, *, believed: bool) -> None:
    """Makes the MAC of a token's row anew, as `authenticate_scope` does."""
    row = connection.execute(f"{_TOKENS} WHERE t.rowid = ?", (row_id,)).fetchone()
    if believed or _is_intact_token(connection, row):
        mac = integrity.of(connection).mac("token", *row[:9])
        connection.execute("UPDATE tokens SET row_mac = ? WHERE rowid = ?", (mac, row_id))


def authenticate_platform(connection: Connection, row_id: int, *, believed: bool) -> None:
    """Makes the MAC of what the first start decided anew, as `authenticate_scope` does."""
    row = connection.execute(f"{_PLATFORM} WHERE rowid = ?", (row_id,)).fetchone()
    if believed or integrity.of(connection).is_intact(row[5], "platform", *row[:5]):
        _authenticate_platform(connection, row[:5])
