"""SQL of serving endpoints' rights: their permissions, what may be launched with secrets, and what changed.

Whether the caller may is decided above, in the same transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping

from secrets_service.model import (
    AccessChange,
    Endpoint,
    EndpointGrant,
    GrantedReference,
    Kind,
    LaunchGrant,
)
from servicekit.context import Level

# --- endpoints ---


def find_endpoint(connection: sqlite3.Connection, endpoint_id: str) -> Endpoint | None:
    """What is known about an endpoint, also when it was deleted."""
    row = connection.execute(
        "SELECT id, creator_id, is_inherited, is_deleted FROM endpoints WHERE id = ?", (endpoint_id,)
    ).fetchone()
    return Endpoint(row[0], row[1], is_inherited=bool(row[2]), is_deleted=bool(row[3])) if row else None


def live_endpoints(connection: sqlite3.Connection) -> set[str]:
    """The ids of all endpoints that are not deleted."""
    return {row[0] for row in connection.execute("SELECT id FROM endpoints WHERE NOT is_deleted")}


def insert_endpoint(connection: sqlite3.Connection, endpoint: Endpoint) -> None:
    """Makes an endpoint known."""
    connection.execute(
        "INSERT INTO endpoints (id, creator_id, is_inherited, is_deleted) VALUES (?, ?, ?, ?)",
        (endpoint.id, endpoint.creator_id, endpoint.is_inherited, endpoint.is_deleted),
    )


def end_inheritance(connection: sqlite3.Connection, endpoint_id: str) -> None:
    """Has an older endpoint get its grants from callers only, like any other."""
    connection.execute("UPDATE endpoints SET is_inherited = 0 WHERE id = ? AND is_inherited", (endpoint_id,))


def delete_endpoint(connection: sqlite3.Connection, endpoint_id: str) -> None:
    """Takes away all rights on an endpoint and all that it was granted, for ever; also of one that is not known yet."""
    connection.execute(
        "INSERT INTO endpoints (id, creator_id, is_inherited, is_deleted) VALUES (?, 0, 0, 1)"
        " ON CONFLICT (id) DO UPDATE SET is_deleted = 1, is_inherited = 0 WHERE NOT is_deleted",
        (endpoint_id,),
    )
    connection.execute("DELETE FROM endpoint_permissions WHERE endpoint_id = ?", (endpoint_id,))
    connection.execute("DELETE FROM launch_grants WHERE endpoint_id = ?", (endpoint_id,))


def knows_older_endpoints(connection: sqlite3.Connection) -> bool:
    """Whether Serving has told which endpoints are older than grants."""
    return bool(connection.execute("SELECT knows_older_endpoints FROM platform").fetchone()[0])


def older_endpoints_are_known(connection: sqlite3.Connection) -> None:
    """Records that Serving has told which endpoints are older than grants; there are no others."""
    connection.execute("UPDATE platform SET knows_older_endpoints = 1")


# --- permissions ---


def levels_of(connection: sqlite3.Connection, endpoint_id: str, principal_id: int) -> list[Level]:
    """What is granted on an endpoint to a principal and to its groups."""
    rows = connection.execute(
        "SELECT level FROM endpoint_permissions WHERE endpoint_id = ?1 AND (principal_id = ?2"
        " OR principal_id IN (SELECT group_id FROM memberships WHERE member_id = ?2))",
        (endpoint_id, principal_id),
    )
    return [Level(row[0]) for row in rows]


def endpoint_grants(connection: sqlite3.Connection, endpoint_id: str) -> list[EndpointGrant]:
    """All that is granted on an endpoint, in the order in which it was first granted."""
    rows = connection.execute(
        "SELECT p.kind, p.name, coalesce(a.display_name, ''), e.level FROM endpoint_permissions e"
        " JOIN principals p ON p.id = e.principal_id LEFT JOIN accounts a ON a.id = p.id"
        " WHERE e.endpoint_id = ? ORDER BY e.id",
        (endpoint_id,),
    )
    return [EndpointGrant(Kind(kind), name, display_name, Level(level)) for kind, name, display_name, level in rows]


def put_level(connection: sqlite3.Connection, endpoint_id: str, principal_id: int, level: Level) -> None:
    """Grants a level in place of the principal's older one, which keeps its place in the list."""
    connection.execute(
        "INSERT INTO endpoint_permissions (endpoint_id, principal_id, level) VALUES (?, ?, ?)"
        " ON CONFLICT (endpoint_id, principal_id) DO UPDATE SET level = excluded.level",
        (endpoint_id, principal_id, int(level)),
    )


def keep_levels(connection: sqlite3.Connection, endpoint_id: str, principal_ids: Iterable[int]) -> None:
    """Takes away what is granted to all other principals."""
    connection.execute(
        "DELETE FROM endpoint_permissions WHERE endpoint_id = ?"
        " AND principal_id NOT IN (SELECT value FROM json_each(?))",
        (endpoint_id, json.dumps(list(principal_ids))),
    )


def count_levels(connection: sqlite3.Connection, endpoint_id: str) -> int:
    """To how many principals something is granted on an endpoint."""
    row = connection.execute("SELECT count(*) FROM endpoint_permissions WHERE endpoint_id = ?", (endpoint_id,))
    return int(row.fetchone()[0])


# --- launches ---


def launch_grants(connection: sqlite3.Connection, endpoint_id: str) -> list[LaunchGrant]:
    """Everything that may be launched for an endpoint with secrets."""
    rows = connection.execute(
        "SELECT version, digest, author_id, refs FROM launch_grants WHERE endpoint_id = ? ORDER BY version, digest",
        (endpoint_id,),
    )
    return [
        LaunchGrant(
            version,
            digest,
            author_id,
            tuple(GrantedReference(scope, key, bytes.fromhex(uuid)) for scope, key, uuid in json.loads(refs)),
        )
        for version, digest, author_id, refs in rows
    ]


def put_launch_grant(connection: sqlite3.Connection, endpoint_id: str, grant: LaunchGrant) -> None:
    """Records what may be launched, in place of an older grant for the same."""
    refs = json.dumps([[each.scope, each.key, each.scope_uuid.hex()] for each in grant.references])
    connection.execute(
        "INSERT INTO launch_grants (endpoint_id, version, digest, author_id, refs) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO UPDATE SET author_id = excluded.author_id, refs = excluded.refs",
        (endpoint_id, grant.version, grant.digest, grant.author_id, refs),
    )


def drop_launch_grants(connection: sqlite3.Connection, endpoint_id: str, versions: Collection[int]) -> None:
    """Takes back what may be launched of some configurations."""
    connection.execute(
        "DELETE FROM launch_grants WHERE endpoint_id = ? AND version IN (SELECT value FROM json_each(?))",
        (endpoint_id, json.dumps(list(versions))),
    )


def keep_launch_grants(connection: sqlite3.Connection, endpoint_id: str, versions: Collection[int]) -> None:
    """Takes back what may be launched of all other configurations."""
    connection.execute(
        "DELETE FROM launch_grants WHERE endpoint_id = ? AND version NOT IN (SELECT value FROM json_each(?))",
        (endpoint_id, json.dumps(list(versions))),
    )


# --- what those who enforce rights are told ---


def access_table(connection: sqlite3.Connection) -> dict[str, dict[int, Level]]:
    """What is granted on every endpoint that is not deleted, by principal id."""
    table: dict[str, dict[int, Level]] = {endpoint_id: {} for endpoint_id in live_endpoints(connection)}
    for endpoint_id, principal_id, level in connection.execute(
        "SELECT endpoint_id, principal_id, level FROM endpoint_permissions"
    ):
        table[endpoint_id][principal_id] = Level(level)
    return table


def take_access_changes(connection: sqlite3.Connection) -> AccessChange | None:
    """What the transaction under way changed about who may do what; None when nothing."""
    rows = connection.execute("SELECT kind, id FROM access_changes").fetchall()
    if not rows:
        return None
    connection.execute("DELETE FROM access_changes")
    changed: Mapping[str, set[str]] = {kind: {row[1] for row in rows if row[0] == kind} for kind in _CHANGED}
    endpoints: dict[str, dict[int, Level]] = {}
    for endpoint_id in changed["endpoint"]:
        endpoint = find_endpoint(connection, endpoint_id)
        if endpoint is not None and not endpoint.is_deleted:
            granted = connection.execute(
                "SELECT principal_id, level FROM endpoint_permissions WHERE endpoint_id = ?", (endpoint_id,)
            )
            endpoints[endpoint_id] = {principal_id: Level(level) for principal_id, level in granted}
    return AccessChange(
        endpoints=endpoints,
        removed_endpoints=frozenset(changed["endpoint"] - endpoints.keys()),
        principals=frozenset(changed["principal"]),
        tokens=frozenset(changed["token"]),
    )


_CHANGED = ("endpoint", "principal", "token")
