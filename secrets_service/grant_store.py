"""SQL of serving endpoints' rights: their permissions, what may be launched with secrets, and what changed.

Whether the caller may is decided above, in the same transaction. An endpoint is authenticated with its permissions and
grants, as one (integrity.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secrets_service import integrity, store
from secrets_service.errors import RightsDamaged
from secrets_service.model import (
    AccessChange,
    Endpoint,
    EndpointGrant,
    GrantedReference,
    Kind,
    LaunchGrant,
    User,
)
from secrets_service.store import ACCOUNT, IS_AMONG
from servicekit.context import Level
from servicekit.storage import Connection

# --- endpoints ---


@dataclass(frozen=True, slots=True)
class _GrantedEndpoint:
    """An endpoint with all that is granted on it and to it: what one MAC covers."""

    endpoint: Endpoint
    levels: Mapping[int, tuple[int, int]]
    """By principal, in the order in which it was first granted: id of the row, level."""
    launches: Mapping[tuple[int, bytes], tuple[int, str]]
    """By version and digest of what runs: author, references as they are stored."""

    @property
    def content(self) -> tuple[Any, ...]:
        endpoint = self.endpoint
        return (
            endpoint.id,
            endpoint.creator_id,
            int(endpoint.is_inherited),
            int(endpoint.is_deleted),
            [[row_id, principal_id, level] for principal_id, (row_id, level) in self.levels.items()],
            [[*what, *granted] for what, granted in sorted(self.launches.items())],
        )


def _verified(connection: Connection, endpoint_id: str) -> _GrantedEndpoint | None:
    """What is known about an endpoint, also when it was deleted; raises RightsDamaged."""
    row = connection.execute(
        "SELECT id, creator_id, is_inherited, is_deleted, mac FROM endpoints WHERE id = ?", (endpoint_id,)
    ).fetchone()
    if row is None:
        return None
    if not {row[2], row[3]} <= {0, 1}:
        raise RightsDamaged("endpoint", endpoint_id)
    found = _stored(connection, row)
    integrity.of(connection).require(row[4], "endpoint", *found.content)
    return found


def _stored(connection: Connection, row: Sequence[Any]) -> _GrantedEndpoint:
    levels = connection.execute(
        "SELECT principal_id, id, level FROM endpoint_permissions WHERE endpoint_id = ? ORDER BY id", (row[0],)
    )
    launches = connection.execute(
        "SELECT version, digest, author_id, refs FROM launch_grants WHERE endpoint_id = ?", (row[0],)
    )
    return _GrantedEndpoint(
        Endpoint(row[0], row[1], is_inherited=bool(row[2]), is_deleted=bool(row[3])),
        {principal_id: (row_id, level) for principal_id, row_id, level in levels},
        {(version, digest): (author_id, refs) for version, digest, author_id, refs in launches},
    )


def _known(connection: Connection, endpoint_id: str) -> _GrantedEndpoint:
    """As `_verified`, of one that something else refers to."""
    found = _verified(connection, endpoint_id)
    if found is None:
        raise RightsDamaged("endpoint", endpoint_id)
    return found


def _authenticate(connection: Connection, found: _GrantedEndpoint) -> None:
    mac = integrity.of(connection).mac("endpoint", *found.content)
    connection.execute("UPDATE endpoints SET mac = ? WHERE id = ?", (mac, found.endpoint.id))


def find_endpoint(connection: Connection, endpoint_id: str) -> Endpoint | None:
    """What is known about an endpoint, also when it was deleted."""
    found = _verified(connection, endpoint_id)
    return found.endpoint if found else None


def live_endpoints(connection: Connection) -> set[str]:
    """The ids of all endpoints that are not deleted."""
    return {row[0] for row in connection.execute("SELECT id FROM endpoints WHERE is_deleted = 0")}


def insert_endpoint(connection: Connection, endpoint: Endpoint) -> None:
    """Makes an endpoint known."""
    connection.execute(
        "INSERT INTO endpoints (id, creator_id, is_inherited, is_deleted) VALUES (?, ?, ?, ?)",
        (endpoint.id, endpoint.creator_id, int(endpoint.is_inherited), int(endpoint.is_deleted)),
    )
    _authenticate(connection, _GrantedEndpoint(endpoint, {}, {}))


def end_inheritance(connection: Connection, endpoint_id: str) -> None:
    """Has an older endpoint get its grants from callers only, like any other."""
    before = _known(connection, endpoint_id)
    if before.endpoint.is_inherited:
        connection.execute("UPDATE endpoints SET is_inherited = 0 WHERE id = ?", (endpoint_id,))
        _authenticate(connection, replace(before, endpoint=replace(before.endpoint, is_inherited=False)))


def delete_endpoint(connection: Connection, endpoint_id: str) -> None:
    """Takes away all rights on an endpoint and all that it was granted, for ever; also of one that is not known yet.

    Also of one that is damaged: nothing of what it was is left.
    """
    row = connection.execute("SELECT creator_id, is_deleted FROM endpoints WHERE id = ?", (endpoint_id,)).fetchone()
    if row is None:
        insert_endpoint(connection, Endpoint(endpoint_id, 0, is_deleted=True))
        return
    connection.execute("DELETE FROM endpoint_permissions WHERE endpoint_id = ?", (endpoint_id,))
    connection.execute("DELETE FROM launch_grants WHERE endpoint_id = ?", (endpoint_id,))
    if not row[1]:
        connection.execute("UPDATE endpoints SET is_deleted = 1, is_inherited = 0 WHERE id = ?", (endpoint_id,))
        _authenticate(connection, _GrantedEndpoint(Endpoint(endpoint_id, row[0], is_deleted=True), {}, {}))


# --- permissions ---


def levels_of(connection: Connection, endpoint_id: str, user: User) -> list[Level]:
    """What is granted on an endpoint to a user or service principal and to its groups."""
    granted = _known(connection, endpoint_id).levels
    concerned = (user.id, *(each.id for each in user.groups))
    return [Level(granted[each][1]) for each in concerned if each in granted]


def endpoint_grants(connection: Connection, endpoint_id: str) -> list[EndpointGrant]:
    """All that is granted on an endpoint, in the order in which it was first granted."""
    granted = _known(connection, endpoint_id).levels
    rows = connection.execute(f"{ACCOUNT} WHERE {IS_AMONG}", (json.dumps(list(granted)),)).fetchall()
    for row in rows:
        store.verify_principal(connection, row)
    known = {row[0]: row for row in rows}
    for principal_id in granted.keys() - known.keys():
        raise RightsDamaged("principal", str(principal_id))
    return [
        EndpointGrant(Kind(known[each][1]), known[each][2], known[each][8] or "", Level(level))
        for each, (_, level) in granted.items()
    ]


def put_level(connection: Connection, endpoint_id: str, principal_id: int, level: Level) -> None:
    """Grants a level in place of the principal's older one, which keeps its place in the list."""
    before = _known(connection, endpoint_id)
    row_id = connection.execute(
        "INSERT INTO endpoint_permissions (endpoint_id, principal_id, level) VALUES (?, ?, ?)"
        " ON CONFLICT (endpoint_id, principal_id) DO UPDATE SET level = excluded.level RETURNING id",
        (endpoint_id, principal_id, int(level)),
    ).fetchone()[0]
    _authenticate(connection, replace(before, levels={**before.levels, principal_id: (row_id, int(level))}))


def keep_levels(connection: Connection, endpoint_id: str, principal_ids: Collection[int]) -> None:
    """Takes away what is granted to all other principals."""
    before = _known(connection, endpoint_id)
    connection.execute(
        "DELETE FROM endpoint_permissions WHERE endpoint_id = ?"
        " AND principal_id NOT IN (SELECT CAST(value AS BIGINT) FROM json_each(?))",
        (endpoint_id, json.dumps(list(principal_ids))),
    )
    kept = {each: row for each, row in before.levels.items() if each in principal_ids}
    _authenticate(connection, replace(before, levels=kept))


def take_away_everywhere(connection: Connection, principal_id: int) -> None:
    """Takes away what is granted to a principal on any endpoint. One that is damaged stays so, and nobody has it."""
    rows = connection.execute(
        "SELECT endpoint_id FROM endpoint_permissions WHERE principal_id = ?", (principal_id,)
    ).fetchall()
    for row in rows:
        with contextlib.suppress(RightsDamaged):
            keep_levels(connection, row[0], _known(connection, row[0]).levels.keys() - {principal_id})


def count_levels(connection: Connection, endpoint_id: str) -> int:
    """To how many principals something is granted on an endpoint."""
    return len(_known(connection, endpoint_id).levels)


# --- launches ---


def launch_grants(connection: Connection, endpoint_id: str) -> list[LaunchGrant]:
    """Everything that may be launched for an endpoint with secrets."""
    found = _verified(connection, endpoint_id)
    return [
        LaunchGrant(
            version,
            digest,
            author_id,
            tuple(GrantedReference(scope, key, bytes.fromhex(uuid)) for scope, key, uuid in json.loads(refs)),
        )
        for (version, digest), (author_id, refs) in sorted(found.launches.items() if found else ())
    ]


def put_launch_grant(connection: Connection, endpoint_id: str, grant: LaunchGrant) -> None:
    """Records what may be launched, in place of an older grant for the same."""
    before = _known(connection, endpoint_id)
    refs = json.dumps([[each.scope, each.key, each.scope_uuid.hex()] for each in grant.references])
    connection.execute(
        "INSERT INTO launch_grants (endpoint_id, version, digest, author_id, refs) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (endpoint_id, version, digest)"
        " DO UPDATE SET author_id = excluded.author_id, refs = excluded.refs",
        (endpoint_id, grant.version, grant.digest, grant.author_id, refs),
    )
    launches = {**before.launches, (grant.version, grant.digest): (grant.author_id, refs)}
    _authenticate(connection, replace(before, launches=launches))


def drop_launch_grants(connection: Connection, endpoint_id: str, versions: Collection[int]) -> None:
    """Takes back what may be launched of some configurations."""
    _filter_launches(connection, endpoint_id, lambda version: version not in versions)


def keep_launch_grants(connection: Connection, endpoint_id: str, versions: Collection[int]) -> None:
    """Takes back what may be launched of all other configurations."""
    _filter_launches(connection, endpoint_id, lambda version: version in versions)


def _filter_launches(connection: Connection, endpoint_id: str, is_kept: Callable[[int], bool]) -> None:
    try:
        before = _verified(connection, endpoint_id)
    except RightsDamaged:  # nothing can be launched there, whatever is stored
        return
    if before is None:
        return
    kept = {what: granted for what, granted in before.launches.items() if is_kept(what[0])}
    if len(kept) == len(before.launches):
        return
    connection.executemany(
        "DELETE FROM launch_grants WHERE endpoint_id = ? AND version = ? AND digest = ?",
        [(endpoint_id, *what) for what in before.launches.keys() - kept.keys()],
    )
    _authenticate(connection, replace(before, launches=kept))


# --- what those who enforce rights are told ---


def access_table(connection: Connection) -> dict[str, dict[int, Level]]:
    """What is granted on every endpoint that is not deleted, by principal id. One that is damaged is not there."""
    table: dict[str, dict[int, Level]] = {}
    for endpoint_id in live_endpoints(connection):
        with contextlib.suppress(RightsDamaged):
            table[endpoint_id] = _told(_known(connection, endpoint_id))
    return table


def _told(found: _GrantedEndpoint) -> dict[int, Level]:
    return {principal_id: Level(level) for principal_id, (_, level) in found.levels.items()}


def take_access_changes(connection: Connection) -> AccessChange | None:
    """What the transaction under way changed about who may do what; None when nothing."""
    rows = connection.execute("SELECT kind, id FROM access_changes").fetchall()
    if not rows:
        return None
    connection.execute("DELETE FROM access_changes")
    changed: Mapping[str, set[str]] = {kind: {row[1] for row in rows if row[0] == kind} for kind in _CHANGED}
    endpoints: dict[str, dict[int, Level]] = {}
    for endpoint_id in changed["endpoint"]:
        with contextlib.suppress(RightsDamaged):  # as if it were deleted
            found = _verified(connection, endpoint_id)
            if found is not None and not found.endpoint.is_deleted:
                endpoints[endpoint_id] = _told(found)
    return AccessChange(
        endpoints=endpoints,
        removed_endpoints=frozenset(changed["endpoint"] - endpoints.keys()),
        principals=frozenset(changed["principal"]),
        tokens=frozenset(changed["token"]),
    )


_CHANGED = ("endpoint", "principal", "token")


# --- all MACs anew ---


def authenticate_endpoint(connection: Connection, row_id: int, *, believed: bool) -> None:
    """Makes the MAC of an endpoint anew, as `store.authenticate_scope` does that of a scope."""
    row = connection.execute(
        "SELECT id, creator_id, is_inherited, is_deleted, mac FROM endpoints WHERE rowid = ?", (row_id,)
    ).fetchone()
    found = _stored(connection, row)
    if believed or integrity.of(connection).is_intact(row[4], "endpoint", *found.content):
        _authenticate(connection, found)


def forget_access_changes(connection: Connection) -> None:
    """Tells those who enforce rights nothing of the transaction under way, which has changed none."""
    connection.execute("DELETE FROM access_changes")


def damaged_rights(connection: Connection) -> list[tuple[str, str]]:
    """The endpoints that do not fit their MACs: kind and id."""
    made = integrity.of(connection)
    rows = connection.execute("SELECT id, creator_id, is_inherited, is_deleted, mac FROM endpoints").fetchall()
    return [
        ("endpoint", row[0])
        for row in rows
        if not ({row[2], row[3]} <= {0, 1} and made.is_intact(row[4], "endpoint", *_stored(connection, row).content))
    ]
