"""SQL of the directory: pages of principals, and their changes. Names arrive folded; whether the caller may is decided
above, in the same transaction.

A page is found by ids alone and then filled with two more queries, so its cost depends on its size, not on what it
skips.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from secrets_service import names, store
from secrets_service.model import DetailedGroup, Group, GroupProfile, Kind, Member, Page, Profile, User
from secrets_service.scim_filter import AllOf, AnyOf, Comparison, Filter, Operator
from secrets_service.store import ACCOUNT
from servicekit.context import ADMINS

# --- what can be filtered and sorted by ---


@dataclass(frozen=True, slots=True)
class _Column:
    """The folded text of an attribute; `among` wraps the condition where an attribute has several."""

    text: str
    among: str = ""


_EVERY = {"id": _Column("CAST(p.id AS TEXT)"), "externalId": _Column("folded(p.external_id)")}
_ACCOUNTS = {
    "displayName": _Column("folded(a.display_name)"),
    "active": _Column("CASE a.is_active WHEN 0 THEN 'false' ELSE 'true' END"),
}
_COLUMNS: Mapping[Kind, Mapping[str, _Column]] = {
    Kind.USER: {
        **_EVERY,
        **_ACCOUNTS,
        "userName": _Column("p.folded"),
        "name.givenName": _Column("folded(a.given_name)"),
        "name.familyName": _Column("folded(a.family_name)"),
        "emails.value": _Column(
            "folded(json_extract(e.value, '$[1]'))", among="EXISTS (SELECT 1 FROM json_each(a.emails) e WHERE {})"
        ),
    },
    Kind.GROUP: {**_EVERY, "displayName": _Column("p.folded")},
    Kind.SERVICE_PRINCIPAL: {**_EVERY, **_ACCOUNTS, "applicationId": _Column("p.folded")},
}

FILTERED = {kind: tuple(columns) for kind, columns in _COLUMNS.items()}
"""The attributes that each kind of principal can be filtered by."""

SORTED = {kind: tuple(name for name, each in columns.items() if not each.among) for kind, columns in _COLUMNS.items()}
"""The attributes that each kind of principal can be sorted by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which principals, in which order, and which of them; `start` is one-based."""

    filter: Filter | None
    sort_by: str
    is_descending: bool
    start: int
    count: int


def _condition(filter: Filter, columns: Mapping[str, _Column], parameters: list[str]) -> str:
    """The filter as SQL; its texts are added to the parameters."""
    match filter:
        case AllOf(parts):
            return "(" + " AND ".join(_condition(part, columns, parameters) for part in parts) + ")"
        case AnyOf(parts):
            return "(" + " OR ".join(_condition(part, columns, parameters) for part in parts) + ")"
        case Comparison(attribute, operator, value):
            column = columns[attribute]
            parameters.append(value)
            match operator:
                case Operator.EQ | Operator.NE:
                    condition = f"{column.text} = ?"
                case Operator.CO:
                    condition = f"instr({column.text}, ?) > 0"
                case Operator.SW:
                    parameters.append(value)
                    condition = f"substr({column.text}, 1, length(?)) = ?"
            if column.among:
                condition = column.among.format(condition)
            return f"NOT {condition}" if operator is Operator.NE else condition


def _ids(connection: sqlite3.Connection, kind: Kind, selection: Selection) -> tuple[list[int], int]:
    """The ids of a page, and how many principals match in all."""
    connection.create_function("folded", 1, names.folded_principal, deterministic=True)
    columns = _COLUMNS[kind]
    parameters: list[str] = [kind]
    source = "FROM principals p LEFT JOIN accounts a ON a.id = p.id WHERE p.kind = ?"
    if selection.filter is not None:
        source += f" AND {_condition(selection.filter, columns, parameters)}"
    order = "p.id"
    if selection.sort_by:
        order = f"{columns[selection.sort_by].text} {'DESC' if selection.is_descending else 'ASC'}, p.id"
    total = connection.execute(f"SELECT count(*) {source}", parameters).fetchone()[0]
    rows = connection.execute(
        f"SELECT p.id {source} ORDER BY {order} LIMIT ? OFFSET ?", (*parameters, selection.count, selection.start - 1)
    )
    return [row[0] for row in rows], total


# --- users and service principals ---


def account_page(connection: sqlite3.Connection, kind: Kind, selection: Selection) -> Page[User]:
    """Some users, or some service principals."""
    ids, total = _ids(connection, kind, selection)
    listed = json.dumps(ids)
    groups: dict[int, list[Group]] = {each: [] for each in ids}
    for member_id, *group in connection.execute(
        "SELECT m.member_id, p.id, p.name FROM memberships m JOIN principals p ON p.id = m.group_id"
        " WHERE m.member_id IN (SELECT value FROM json_each(?)) ORDER BY p.id",
        (listed,),
    ):
        groups[member_id].append(Group(*group))
    rows = connection.execute(f"{ACCOUNT} WHERE p.id IN (SELECT value FROM json_each(?))", (listed,))  # noqa: S608
    found = {row[0]: store.account(row, tuple(groups[row[0]])) for row in rows}
    return Page(tuple(found[each] for each in ids), selection.start, total)


def insert_account(
    connection: sqlite3.Connection, profile: Profile, *, folded: str, groups: Sequence[str], kind: Kind = Kind.USER
) -> User:
    """Adds a user or service principal who belongs to the named groups."""
    account_id = _insert_principal(connection, kind, profile.name, folded)
    connection.execute(
        "INSERT INTO accounts (id, display_name, given_name, family_name, emails, is_active)"
        " VALUES (?, '', '', '', '[]', 0)",
        (account_id,),
    )
    update_account(connection, account_id, profile, folded=folded)
    connection.executemany(
        "INSERT INTO memberships (member_id, group_id) SELECT ?, id FROM principals WHERE kind = 'group' AND name = ?",
        [(account_id, group) for group in groups],
    )
    return User(account_id, profile, store.groups_of(connection, account_id), kind)


def update_account(connection: sqlite3.Connection, account_id: int, profile: Profile, *, folded: str) -> None:
    """Replaces all that is recorded about a user or service principal but its groups."""
    _update_principal(connection, account_id, profile, folded)
    connection.execute(
        "UPDATE accounts SET display_name = ?, given_name = ?, family_name = ?, emails = ?, is_active = ? WHERE id = ?",
        (
            profile.display_name,
            profile.given_name,
            profile.family_name,
            json.dumps([[email.type, email.value, email.is_primary] for email in profile.emails]),
            profile.is_active,
            account_id,
        ),
    )


def count_accounts(connection: sqlite3.Connection) -> int:
    """How many users and service principals there are."""
    return int(connection.execute("SELECT count(*) FROM accounts").fetchone()[0])


def has_active_admin(connection: sqlite3.Connection) -> bool:
    """Whether somebody can administer the workspace."""
    return bool(
        connection.execute(
            "SELECT EXISTS (SELECT 1 FROM memberships m JOIN accounts a ON a.id = m.member_id AND a.is_active"
            " WHERE m.group_id = (SELECT id FROM principals WHERE kind = 'group' AND folded = ?))",
            (ADMINS,),
        ).fetchone()[0]
    )


def restore_admin(connection: sqlite3.Connection, account_id: int) -> None:
    """Makes a user or service principal an active admin, whatever it was."""
    connection.execute("UPDATE accounts SET is_active = 1 WHERE id = ?", (account_id,))
    connection.execute(
        "INSERT OR IGNORE INTO memberships (member_id, group_id)"
        " SELECT ?, id FROM principals WHERE kind = 'group' AND folded = ?",
        (account_id, ADMINS),
    )


def delete_principal(connection: sqlite3.Connection, principal_id: int) -> None:
    """Deletes a principal with its memberships, tokens and ACLs."""
    connection.execute("DELETE FROM principals WHERE id = ?", (principal_id,))


# --- groups ---


def group_page(
    connection: sqlite3.Connection, selection: Selection, *, with_members: bool, most_members: int
) -> Page[DetailedGroup]:
    """Some groups; the page ends before their members exceed a number, but holds one group where it asks for any."""
    ids, total = _ids(connection, Kind.GROUP, selection)
    if with_members:
        sizes = dict(
            connection.execute(
                "SELECT group_id, count(*) FROM memberships WHERE group_id IN (SELECT value FROM json_each(?))"
                " GROUP BY group_id",
                (json.dumps(ids),),
            ).fetchall()
        )
        room = most_members
        for place, each in enumerate(ids):
            room -= sizes.get(each, 0)
            if room < 0 and place > 0:
                del ids[place:]
                break
    return Page(tuple(_groups(connection, ids, with_members=with_members)), selection.start, total)


def find_group(connection: sqlite3.Connection, group_id: int, *, with_members: bool = True) -> DetailedGroup | None:
    """The group of that id."""
    return next(iter(_groups(connection, [group_id], with_members=with_members)), None)


def _groups(connection: sqlite3.Connection, ids: Sequence[int], *, with_members: bool) -> Iterable[DetailedGroup]:
    """The groups of these ids, in their order."""
    listed = json.dumps(ids)
    members: dict[int, list[Member]] = {each: [] for each in ids}
    if with_members:
        for group_id, member_id, kind, display_name in connection.execute(
            "SELECT m.group_id, p.id, p.kind, a.display_name FROM memberships m JOIN principals p ON p.id = m.member_id"
            " JOIN accounts a ON a.id = p.id WHERE m.group_id IN (SELECT value FROM json_each(?))"
            " ORDER BY m.group_id, m.member_id",
            (listed,),
        ):
            members[group_id].append(Member(member_id, Kind(kind), display_name))
    rows = connection.execute(
        "SELECT id, name, roles, entitlements, external_id FROM principals"
        " WHERE kind = 'group' AND id IN (SELECT value FROM json_each(?))",
        (listed,),
    )
    found = {
        group_id: DetailedGroup(
            id=group_id,
            name=name,
            members=tuple(members[group_id]),
            roles=tuple(json.loads(roles)),
            entitlements=tuple(json.loads(entitlements)),
            external_id=external_id,
        )
        for group_id, name, roles, entitlements, external_id in rows
    }
    return [found[each] for each in ids if each in found]


def insert_group(connection: sqlite3.Connection, name: str, *, folded: str) -> int:
    """Adds a group without members; its id."""
    return _insert_principal(connection, Kind.GROUP, name, folded)


def update_group(connection: sqlite3.Connection, group_id: int, profile: GroupProfile, *, folded: str) -> None:
    """Replaces all that is recorded about a group but its members."""
    _update_principal(connection, group_id, profile, folded)


def members_of(connection: sqlite3.Connection, group_id: int) -> set[int]:
    """The ids of a group's members."""
    return {row[0] for row in connection.execute("SELECT member_id FROM memberships WHERE group_id = ?", (group_id,))}


def change_members(
    connection: sqlite3.Connection, group_id: int, *, added: Iterable[int], removed: Iterable[int]
) -> None:
    """Adds principals to a group and takes others out of it."""
    connection.executemany(
        "DELETE FROM memberships WHERE group_id = ? AND member_id = ?", [(group_id, each) for each in removed]
    )
    connection.executemany(
        "INSERT INTO memberships (group_id, member_id) VALUES (?, ?)", [(group_id, each) for each in added]
    )


def kinds_of(connection: sqlite3.Connection, ids: Iterable[int]) -> dict[int, Kind]:
    """What those of the principals are that exist."""
    rows = connection.execute(
        "SELECT id, kind FROM principals WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(list(ids)),)
    )
    return {principal_id: Kind(kind) for principal_id, kind in rows}


def count_groups(connection: sqlite3.Connection) -> int:
    """How many groups there are."""
    return int(connection.execute("SELECT count(*) FROM principals WHERE kind = 'group'").fetchone()[0])


# --- every kind ---


def _insert_principal(connection: sqlite3.Connection, kind: Kind, name: str, folded: str) -> int:
    cursor = connection.execute("INSERT INTO principals (kind, name, folded) VALUES (?, ?, ?)", (kind, name, folded))
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _update_principal(
    connection: sqlite3.Connection, principal_id: int, profile: Profile | GroupProfile, folded: str
) -> None:
    connection.execute(
        "UPDATE principals SET name = ?, folded = ?, external_id = ?, roles = ?, entitlements = ? WHERE id = ?",
        (
            profile.name,
            folded,
            profile.external_id,
            json.dumps(profile.roles),
            json.dumps(profile.entitlements),
            principal_id,
        ),
    )
