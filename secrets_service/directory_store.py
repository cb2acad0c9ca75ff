"""SQL of the directory: pages of principals, and their changes. Names arrive folded; whether the caller may is decided
above, in the same transaction.

A page is found by ids alone and then filled with two more queries, so its cost depends on its size, not on what it
skips.

A principal is authenticated by itself, an account together with the groups that it belongs to (integrity.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secrets_service import grant_store, integrity, names, store
from secrets_service.errors import RightsDamaged
from secrets_service.model import DetailedGroup, Group, GroupProfile, Kind, Member, Page, Profile, User
from secrets_service.scim_filter import AllOf, AnyOf, Comparison, Filter, Operator
from secrets_service.store import ACCOUNT, IS_AMONG, PRINCIPAL
from servicekit.context import ADMINS
from servicekit.storage import Connection

FUNCTIONS = {"folded": names.folded_principal}
"""What statements here call besides what databases have."""

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


def _ids(connection: Connection, kind: Kind, selection: Selection) -> tuple[list[int], int]:
    """The ids of a page, and how many principals match in all."""
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


def account_page(connection: Connection, kind: Kind, selection: Selection) -> Page[User]:
    """Some users, or some service principals."""
    ids, total = _ids(connection, kind, selection)
    listed = json.dumps(ids)
    belongs = connection.execute(
        "SELECT member_id, group_id FROM memberships"
        " WHERE member_id IN (SELECT CAST(value AS BIGINT) FROM json_each(?)) ORDER BY group_id",
        (listed,),
    ).fetchall()
    known = _groups_of_ids(connection, {group_id for _, group_id in belongs})
    groups: dict[int, list[Group]] = {each: [] for each in ids}
    for member_id, group_id in belongs:
        groups[member_id].append(known[group_id])
    rows = connection.execute(f"{ACCOUNT} WHERE {IS_AMONG}", (listed,))
    found = {row[0]: store.account(connection, row, tuple(groups[row[0]])) for row in rows}
    return Page(tuple(found[each] for each in ids), selection.start, total)


def _groups_of_ids(connection: Connection, ids: set[int]) -> dict[int, Group]:
    rows = connection.execute(f"{PRINCIPAL} WHERE {IS_AMONG}", (json.dumps(sorted(ids)),))
    found = {row[0]: store.group(connection, row) for row in rows}
    for missing in ids - found.keys():
        raise RightsDamaged("group", str(missing))
    return found


def insert_account(
    connection: Connection, profile: Profile, *, folded: str, groups: Sequence[str], kind: Kind = Kind.USER
) -> User:
    """Adds a user or service principal who belongs to the named groups."""
    account_id = _insert_principal(connection, kind, profile, folded)
    connection.execute(
        "INSERT INTO accounts (id, display_name, given_name, family_name, emails, is_active)"
        " VALUES (?, '', '', '', '[]', 0)",
        (account_id,),
    )
    belongs = frozenset(_group_named(connection, name) for name in groups)
    connection.executemany(
        "INSERT INTO memberships (member_id, group_id) VALUES (?, ?)", [(account_id, each) for each in belongs]
    )
    _write_account(connection, account_id, _columns(profile), belongs)
    return User(account_id, profile, store.groups_of(connection, account_id), kind)


def update_account(connection: Connection, account_id: int, profile: Profile, *, folded: str) -> None:
    """Replaces all that is recorded about a user or service principal but its groups."""
    _update_principal(connection, account_id, profile, folded)
    _, belongs = _verified_account(connection, account_id)
    _write_account(connection, account_id, _columns(profile), belongs)


def _columns(profile: Profile) -> tuple[Any, ...]:
    """A profile as the table of accounts holds it."""
    emails = json.dumps([[email.type, email.value, email.is_primary] for email in profile.emails])
    return (profile.display_name, profile.given_name, profile.family_name, emails, int(profile.is_active))


def _verified_account(connection: Connection, account_id: int) -> tuple[tuple[Any, ...], frozenset[int]]:
    """An account as the table holds it, and the groups that it belongs to; raises RightsDamaged."""
    row = connection.execute(
        "SELECT display_name, given_name, family_name, emails, is_active, mac FROM accounts WHERE id = ?", (account_id,)
    ).fetchone()
    if row is None:
        raise RightsDamaged("account", str(account_id))
    belongs = _stored_groups(connection, account_id)
    integrity.of(connection).require(row[5], "account", account_id, *row[:5], sorted(belongs))
    return tuple(row[:5]), belongs


def _stored_groups(connection: Connection, account_id: int) -> frozenset[int]:
    rows = connection.execute("SELECT group_id FROM memberships WHERE member_id = ?", (account_id,))
    return frozenset(row[0] for row in rows)


def _write_account(connection: Connection, account_id: int, columns: tuple[Any, ...], belongs: frozenset[int]) -> None:
    connection.execute(
        "UPDATE accounts SET display_name = ?, given_name = ?, family_name = ?, emails = ?, is_active = ?, mac = ?"
        " WHERE id = ?",
        (*columns, integrity.of(connection).mac("account", account_id, *columns, sorted(belongs)), account_id),
    )


def _join(connection: Connection, account_id: int, group_id: int) -> None:
    columns, belongs = _verified_account(connection, account_id)
    connection.execute("INSERT INTO memberships (member_id, group_id) VALUES (?, ?)", (account_id, group_id))
    _write_account(connection, account_id, columns, belongs | {group_id})


def _leave(connection: Connection, account_id: int, group_id: int) -> None:
    columns, belongs = _verified_account(connection, account_id)
    connection.execute("DELETE FROM memberships WHERE member_id = ? AND group_id = ?", (account_id, group_id))
    _write_account(connection, account_id, columns, belongs - {group_id})


def _group_named(connection: Connection, name: str) -> int:
    """The id of a group that is always there; raises RightsDamaged when it is not."""
    row = connection.execute(f"{PRINCIPAL} WHERE p.kind = 'group' AND p.name = ?", (name,)).fetchone()
    if row is None:
        raise RightsDamaged("group", name)
    return store.group(connection, row).id


def count_accounts(connection: Connection) -> int:
    """How many users and service principals there are."""
    return int(connection.execute("SELECT count(*) FROM accounts").fetchone()[0])


def has_active_admin(connection: Connection) -> bool:
    """Whether somebody can administer the workspace."""
    return bool(
        connection.execute(
            "SELECT EXISTS (SELECT 1 FROM memberships m JOIN accounts a ON a.id = m.member_id AND a.is_active = 1"
            " WHERE m.group_id = (SELECT id FROM principals WHERE kind = 'group' AND folded = ?))",
            (ADMINS,),
        ).fetchone()[0]
    )


def restore_admin(connection: Connection, account_id: int) -> None:
    """Makes a user or service principal an active admin, whatever it was."""
    admins = _group_named(connection, ADMINS)
    columns, belongs = _verified_account(connection, account_id)
    connection.execute(
        "INSERT INTO memberships (member_id, group_id) VALUES (?, ?) ON CONFLICT DO NOTHING", (account_id, admins)
    )
    _write_account(connection, account_id, (*columns[:4], 1), belongs | {admins})


def delete_principal(connection: Connection, principal_id: int) -> None:
    """Deletes a principal with its memberships, tokens and permissions.

    What is damaged among them does not stop it, and stays damaged.
    """
    for member_id in members_of(connection, principal_id):
        with contextlib.suppress(RightsDamaged):
            _leave(connection, member_id, principal_id)
    store.take_away_everywhere(connection, principal_id)
    grant_store.take_away_everywhere(connection, principal_id)
    connection.execute("DELETE FROM principals WHERE id = ?", (principal_id,))


# --- groups ---


def group_page(
    connection: Connection, selection: Selection, *, with_members: bool, most_members: int
) -> Page[DetailedGroup]:
    """Some groups; the page ends before their members exceed a number, but holds one group where it asks for any."""
    ids, total = _ids(connection, Kind.GROUP, selection)
    if with_members:
        sizes = dict(
            connection.execute(
                "SELECT group_id, count(*) FROM memberships"
                " WHERE group_id IN (SELECT CAST(value AS BIGINT) FROM json_each(?)) GROUP BY group_id",
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


def find_group(connection: Connection, group_id: int, *, with_members: bool = True) -> DetailedGroup | None:
    """The group of that id."""
    return next(iter(_groups(connection, [group_id], with_members=with_members)), None)


def _groups(connection: Connection, ids: Sequence[int], *, with_members: bool) -> Iterable[DetailedGroup]:
    """The groups of these ids, in their order."""
    listed = json.dumps(ids)
    members: dict[int, list[Member]] = {each: [] for each in ids}
    if with_members:
        for group_id, member_id, kind, display_name in connection.execute(
            "SELECT m.group_id, p.id, p.kind, a.display_name FROM memberships m JOIN principals p ON p.id = m.member_id"
            " JOIN accounts a ON a.id = p.id WHERE m.group_id IN (SELECT CAST(value AS BIGINT) FROM json_each(?))"
            " ORDER BY m.group_id, m.member_id",
            (listed,),
        ):
            members[group_id].append(Member(member_id, Kind(kind), display_name))
    rows = connection.execute(
        f"{PRINCIPAL} WHERE p.kind = 'group' AND {IS_AMONG}",
        (listed,),
    )
    found = {row[0]: _detailed_group(connection, row, tuple(members[row[0]])) for row in rows}
    return [found[each] for each in ids if each in found]


def _detailed_group(connection: Connection, row: Sequence[Any], members: tuple[Member, ...]) -> DetailedGroup:
    store.verify_principal(connection, row)
    group_id, _, name, _, external_id, roles, entitlements, _ = row
    return DetailedGroup(
        id=group_id,
        name=name,
        members=members,
        roles=tuple(json.loads(roles)),
        entitlements=tuple(json.loads(entitlements)),
        external_id=external_id,
    )


def insert_group(connection: Connection, name: str, *, folded: str) -> int:
    """Adds a group without members; its id."""
    return _insert_principal(connection, Kind.GROUP, GroupProfile(name=name), folded)


def update_group(connection: Connection, group_id: int, profile: GroupProfile, *, folded: str) -> None:
    """Replaces all that is recorded about a group but its members."""
    _update_principal(connection, group_id, profile, folded)


def members_of(connection: Connection, group_id: int) -> set[int]:
    """The ids of a group's members."""
    return {row[0] for row in connection.execute("SELECT member_id FROM memberships WHERE group_id = ?", (group_id,))}


def change_members(connection: Connection, group_id: int, *, added: Iterable[int], removed: Iterable[int]) -> None:
    """Adds principals to a group and takes others out of it."""
    for each in removed:
        _leave(connection, each, group_id)
    for each in added:
        _join(connection, each, group_id)


def kinds_and_names_of(connection: Connection, ids: Iterable[int]) -> dict[int, tuple[Kind, str]]:
    """What those of the principals are that exist, and what they are called."""
    rows = connection.execute(
        "SELECT id, kind, name FROM principals WHERE id IN (SELECT CAST(value AS BIGINT) FROM json_each(?))",
        (json.dumps(list(ids)),),
    )
    return {principal_id: (Kind(kind), name) for principal_id, kind, name in rows}


def count_groups(connection: Connection) -> int:
    """How many groups there are."""
    return int(connection.execute("SELECT count(*) FROM principals WHERE kind = 'group'").fetchone()[0])


# --- every kind ---


def _insert_principal(connection: Connection, kind: Kind, profile: Profile | GroupProfile, folded: str) -> int:
    row = connection.execute(
        "INSERT INTO principals (kind, name, folded) VALUES (?, ?, ?) RETURNING id", (kind, profile.name, folded)
    ).fetchone()
    _write_principal(connection, row[0], kind, profile, folded)
    return int(row[0])


def _update_principal(connection: Connection, principal_id: int, profile: Profile | GroupProfile, folded: str) -> None:
    kind = store.kind_of(connection, principal_id)  # verified, like all of its row
    _write_principal(connection, principal_id, kind, profile, folded)


def _write_principal(
    connection: Connection, principal_id: int, kind: Kind, profile: Profile | GroupProfile, folded: str
) -> None:
    columns = (
        profile.name,
        folded,
        profile.external_id,
        json.dumps(profile.roles),
        json.dumps(profile.entitlements),
    )
    connection.execute(
        "UPDATE principals SET name = ?, folded = ?, external_id = ?, roles = ?, entitlements = ?, mac = ?"
        " WHERE id = ?",
        (*columns, integrity.of(connection).mac("principal", principal_id, kind, *columns), principal_id),
    )


# --- all MACs ---


def damaged_rights(connection: Connection) -> list[tuple[str, str]]:
    """What does not fit its MAC, of principals and accounts: kind and id."""
    made = integrity.of(connection)
    principals = connection.execute(PRINCIPAL).fetchall()
    found = [("principal", str(row[0])) for row in principals if not made.is_intact(row[7], "principal", *row[:7])]
    accounts = connection.execute(
        "SELECT id, display_name, given_name, family_name, emails, is_active, mac FROM accounts"
    )
    return found + [
        ("account", str(account_id))
        for account_id, *columns, mac in accounts.fetchall()
        if not made.is_intact(mac, "account", account_id, *columns, sorted(_stored_groups(connection, account_id)))
    ]


def authenticate_principal(connection: Connection, row_id: int, *, believed: bool) -> None:
    """Makes the MAC of a principal anew, as `store.authenticate_scope` does that of a scope."""
    row = connection.execute(f"{PRINCIPAL} WHERE id = ?", (row_id,)).fetchone()
    made = integrity.of(connection)
    if believed or made.is_intact(row[7], "principal", *row[:7]):
        connection.execute("UPDATE principals SET mac = ? WHERE id = ?", (made.mac("principal", *row[:7]), row_id))


def authenticate_account(connection: Connection, row_id: int, *, believed: bool) -> None:
    """Makes the MAC of an account with its groups anew, as `store.authenticate_scope` does that of a scope."""
    *columns, mac = connection.execute(
        "SELECT display_name, given_name, family_name, emails, is_active, mac FROM accounts WHERE id = ?", (row_id,)
    ).fetchone()
    belongs = _stored_groups(connection, row_id)
    if believed or integrity.of(connection).is_intact(mac, "account", row_id, *columns, sorted(belongs)):
        _write_account(connection, row_id, tuple(columns), belongs)
