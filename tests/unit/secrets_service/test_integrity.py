"""Whoever can write to the database, and nothing else, gains no right by it (S3).

Every column of every row that decides about rights is edited in several ways; rows are added, taken away and copied, as
with the command line of SQLite: without our functions, foreign keys and checks. After each edit, everything that can be
asked about rights is asked. An answer may be refused; it may never be another one than before.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from secrets_service import access, directory_store, grant_store, integrity, store, tokens
from secrets_service.errors import RightsDamaged
from secrets_service.integrity import Integrity
from secrets_service.model import (
    Endpoint,
    GrantedReference,
    GroupProfile,
    Kind,
    LaunchGrant,
    Permission,
    Platform,
    Profile,
    SecretBytes,
    TokenInfo,
    TokenKind,
)
from secrets_service.tokens import TokenMacs
from servicekit.context import ADMINS, Level
from servicekit.storage import Connection
from tests.support.seed import seeded
from tests.support.stores import KEYRING, a_store, equip

TABLES = (
    "principals",
    "accounts",
    "memberships",
    "tokens",
    "scopes",
    "acls",
    "endpoints",
    "endpoint_permissions",
    "launch_grants",
    "platform",
)
"""Every table whose rows decide about rights."""

NOT_AUTHORITY = {
    "access_changes": "what followers have to be told; empty between transactions",
    "answers": "sealed, each at its own place",
    "audit_records": "chained, and nothing is decided by what they say",
    "audit_state": "where the chain of audit records ends, which a verifier finds out by itself",
    "first_format": "empty, or what a root key is known by",
    "holds": "which versions must not be destroyed yet",
    "keyring": "sealed under the root key",
    "keys": "which version is read; versions open at their own place",
    "scope_keys": "sealed under a store key",
    "signing_keys": "sealed, each at its own place",
    "store_key_uses": "when a store key is renewed at the latest, which a yearly renewal does, too",
    "versions": "sealed, each at its own place",
}
"""All other tables, and why nobody gains a right by them."""

OWNERS = {
    "memberships": (0, "accounts"),
    "acls": (1, "scopes"),
    "endpoint_permissions": (1, "endpoints"),
    "launch_grants": (0, "endpoints"),
}
"""The lists: in which column a row says whose it is, and what that one is."""

REFUSED = "refused"
USERS = ("ann", "ben", "cat")
GROUPS = (ADMINS, "users", "staff")
SCOPES = ("one", "two", "three")
ENDPOINTS = ("e" * 32, "f" * 32)
DIGESTS = (b"1" * 32, b"2" * 32)

Answers = dict[str, Any]


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    with a_store() as connection:
        logging.getLogger(integrity.__name__).setLevel(logging.CRITICAL)  # thousands of damages
        fill(connection)
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        yield connection
        logging.getLogger(integrity.__name__).setLevel(logging.NOTSET)


def fill(connection: Connection) -> None:
    """Two or more of everything."""
    ids = {name: directory_store.insert_group(connection, name, folded=name) for name in GROUPS}
    groups = {"ann": ["users", ADMINS], "ben": ["users", "staff"], "cat": ["users"]}
    for name in USERS:
        kind = Kind.SERVICE_PRINCIPAL if name == "cat" else Kind.USER
        profile = Profile(name=name, display_name=name.title(), roles=("r",), entitlements=("e",))
        ids[name] = directory_store.insert_account(connection, profile, folded=name, groups=groups[name], kind=kind).id
    macs = TokenMacs(KEYRING.token_mac_keys())
    for number, name in enumerate(USERS):
        token = tokens.make()
        store.insert_token(
            connection,
            TokenInfo(f"token-{name}", number, 1_000 + number, f"of {name}"),
            owner_id=ids[name],
            creator_id=ids["ann"],
            mac=macs.of(token),
            kind=TokenKind.CLIENT_SECRET if name == "cat" else TokenKind.PERSONAL,
        )
    for name, granted in (
        ("one", {"ben": Permission.READ, "staff": Permission.WRITE}),
        ("two", {"cat": Permission.MANAGE, "users": Permission.READ}),
        ("three", {"ben": Permission.MANAGE}),
    ):
        scope = store.insert_scope(connection, name, folded=name, uuid=name.encode().ljust(16))
        for principal, permission in granted.items():
            store.put_grant(connection, scope, ids[principal], permission)
    for endpoint, creator, digest in zip(ENDPOINTS, ("ben", "cat"), DIGESTS, strict=True):
        grant_store.insert_endpoint(connection, Endpoint(endpoint, ids[creator]))
        grant_store.put_level(connection, endpoint, ids[creator], Level.CAN_MANAGE)
        grant_store.put_level(connection, endpoint, ids["users"], Level.CAN_VIEW)
        for version in (1, 2):
            references = (GrantedReference("one", "key", b"u" * 16),)
            grant_store.put_launch_grant(connection, endpoint, LaunchGrant(version, digest, ids[creator], references))
    grant_store.delete_endpoint(connection, "d" * 32)
    store.insert_platform(connection, Platform(b"s" * 16, "42", ids["ann"], "token-ann"))
    store.older_endpoints_are_known(connection)
    connection.execute("DELETE FROM access_changes")


def asked(connection: Connection) -> Answers:
    """Everything that decides about rights, as it is answered now."""
    people = stored(connection, "id", "principals")
    found: Answers = {}

    def ask(question: str, answer: Callable[..., Any], *about: Any) -> None:
        try:
            found[question] = answer(connection, *about) or REFUSED
        except RightsDamaged:
            found[question] = REFUSED

    ask("the platform", store.find_platform)
    ask("the endpoints-of-old", store.knows_older_endpoints)
    for token in stored(connection, "id", "tokens") | {f"token-{name}" for name in USERS}:
        ask(f"token {token}", store.find_token, token)
        ask(f"managed {token}", _managed, token)
    for name in stored(connection, "folded", "principals") | {*USERS, *GROUPS}:
        ask(f"user {name}", store.find_user_named, name)
        ask(f"principal {name}", store.find_principal, name)
    for principal_id in people:
        ask(f"group {principal_id}", _group, principal_id)
    for scope in stored(connection, "folded", "scopes") | {*SCOPES}:
        ask(f"scope {scope}", _grants, scope)
        for principal_id in people:
            ask(f"scope {scope} for {principal_id}", _effective, scope, principal_id)
    table = grant_store.access_table(connection)
    for endpoint in stored(connection, "id", "endpoints") | {*ENDPOINTS}:
        ask(f"endpoint {endpoint[:1]}", grant_store.find_endpoint, endpoint)
        ask(f"launches {endpoint[:1]}", grant_store.launch_grants, endpoint)
        found[f"told {endpoint[:1]}"] = table.get(endpoint, REFUSED)
        for name in USERS:
            ask(f"level {endpoint[:1]} of {name}", _level, endpoint, name)
    return found


def stored(connection: Connection, column: str, table: str) -> set[Any]:
    """What there is to ask about: what was made up, too."""
    return {row[0] for row in connection.execute(f"SELECT {column} FROM {table}")}


def _group(connection: Connection, principal_id: int) -> Any:
    found = directory_store.find_group(connection, principal_id, with_members=False)
    return found and (found.id, found.name, found.roles, found.entitlements, found.external_id)


def _grants(connection: Connection, name: str) -> Any:
    scope = store.find_scope(connection, name)
    return scope and (scope, store.grants(connection, scope))


def _effective(connection: Connection, scope: str, principal_id: int) -> Any:
    found = store.find_scope_and_standing(connection, scope, principal_id)
    held = found and access.effective(found[1])
    return held and (found, held)


def _level(connection: Connection, endpoint: str, name: str) -> Any:
    user = store.find_user_named(connection, name)
    found = grant_store.find_endpoint(connection, endpoint)
    return found and user and access.endpoint_level(user, grant_store.levels_of(connection, endpoint, user))


def _managed(connection: Connection, token_id: str) -> Any:
    found = store.find_managed_token(connection, token_id, now_ms=0)
    return found and replace(found, creator_name="")  # a name for people to read


@dataclass(frozen=True)
class Edit:
    """Something that a writer of the database does."""

    table: str
    text: str
    parameters: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} {self.parameters!r}"


def edits(connection: Connection) -> Iterator[Edit]:
    """Every column of every row, edited in several ways; every row deleted, doubled, and given what another one is."""
    for table in TABLES:
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        rows = connection.execute(f"SELECT * FROM {table}").fetchall()
        assert rows, table
        for row in rows:
            where = " AND ".join(f"{column} IS ?" for column in columns)
            yield Edit(table, f"DELETE FROM {table} WHERE {where}", tuple(row))
            for place, column in enumerate(columns):
                if column == "one":  # the number of the only row
                    continue
                others = {other[place] for other in rows if other[place] != row[place]}
                for value in {*others, *_changed(row[place])} - {row[place]}:
                    yield Edit(table, f"UPDATE {table} SET {column} = ? WHERE {where}", (value, *row))
                    yield Edit(table, *_doubled(table, columns, row, place, value))
            for other in rows:
                if other[1:] != row[1:]:  # all of it, its MAC too, under the key of the other
                    sets = ", ".join(f"{column} = ?" for column in columns[1:])
                    yield Edit(table, f"UPDATE {table} SET {sets} WHERE {where}", (*other[1:], *row))


def _changed(value: Any) -> set[Any]:
    match value:
        case None:
            return {b"x"}
        case int():
            return {value + 1, 0, 1, 3}
        case str():
            return {value + "x", "", ADMINS}
        case bytes():
            return {b"", value[:-1], value[:-1] + bytes([value[-1] ^ 1]) if value else b"x"}
    raise AssertionError(value)


def _doubled(table: str, columns: list[str], row: Any, place: int, value: Any) -> tuple[str, tuple[Any, ...]]:
    """A row that is another one but for one column."""
    values = [*row[:place], value, *row[place + 1 :]]
    marks = ", ".join("?" for _ in columns)
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", tuple(values)


@contextmanager
def made(connection: Connection, edit: Edit) -> Iterator[bool]:
    """Within, the edit is made, if the database lets it be made at all; then it is undone."""
    connection.execute("BEGIN")
    try:
        try:
            changed = connection.execute(edit.text, edit.parameters).rowcount
        except sqlite3.IntegrityError:
            changed = 0
        yield changed > 0
    finally:
        connection.execute("ROLLBACK")


def test_no_edit_gains_a_right_and_every_edit_of_what_decides_is_noticed(connection: Connection) -> None:
    before = asked(connection)
    assert REFUSED not in (before["user ann"], before["scope one"], before["endpoint e"], before["the platform"])
    count = 0
    for edit in list(edits(connection)):
        with made(connection, edit) as is_made:
            if not is_made:
                continue
            count += 1
            now = asked(connection)
            others = {
                question: answer
                for question, answer in now.items()
                if answer not in (before.get(question, REFUSED), REFUSED)
            }
            assert not others, edit
            assert noticed(before, now) or is_of_no_object(connection, edit), edit
    assert count > 900


def noticed(before: Answers, now: Answers) -> bool:
    """Whether something is refused that was not."""
    return any(now.get(question, REFUSED) == REFUSED != answer for question, answer in before.items())


def is_of_no_object(connection: Connection, edit: Edit) -> bool:
    """A row that was made up and belongs to nothing that is there. It was asked about like everything, and refused."""
    if not edit.text.startswith("INSERT"):
        return False
    if edit.table not in OWNERS:
        return True
    place, objects = OWNERS[edit.table]
    return edit.parameters[place] not in stored(connection, "id", objects)


def test_edit_of_a_scope_closes_that_scope_and_no_other(connection: Connection) -> None:
    before = asked(connection)
    for edit in list(edits(connection)):
        if edit.table not in ("acls", "scopes"):
            continue
        with made(connection, edit) as is_made:
            if is_made:
                now = asked(connection)
                closed = {name for name in SCOPES if now[f"scope {name}"] == REFUSED}
                if is_of_no_object(connection, edit):
                    assert not closed, edit
                    continue
                assert 1 <= len(closed) <= 2, edit  # two, where something moved from one to the other
                assert all(
                    now[question] == answer for question, answer in before.items() if question.split()[1] not in closed
                ), edit


def test_every_table_is_authority_or_there_is_a_reason_why_not(connection: Connection) -> None:
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    assert {row[0] for row in tables} == {*TABLES, *NOT_AUTHORITY}
    assert not set(TABLES) & NOT_AUTHORITY.keys()


EDITS = 20
"""Of those of one table, and of those of all others, how many are tried with each change."""

SCOPE, ENDPOINT, ACCOUNT = (
    ("scopes", "acls"),
    ("endpoints", "endpoint_permissions", "launch_grants"),
    ("accounts", "memberships"),
)

CHANGES: tuple[tuple[tuple[str, ...], Callable[[Connection], Any]], ...] = (
    (SCOPE, lambda c: store.put_grant(c, _scope(c), _id(c, "cat"), Permission.READ)),
    (SCOPE, lambda c: store.delete_grant(c, _scope(c), "ben")),
    (ENDPOINT, lambda c: grant_store.put_level(c, ENDPOINTS[0], _id(c, "cat"), Level.CAN_QUERY)),
    (ENDPOINT, lambda c: grant_store.keep_levels(c, ENDPOINTS[0], [])),
    (ENDPOINT, lambda c: grant_store.put_launch_grant(c, ENDPOINTS[0], LaunchGrant(3, DIGESTS[0], 1, ()))),
    (ENDPOINT, lambda c: grant_store.drop_launch_grants(c, ENDPOINTS[0], [1])),
    (ACCOUNT, lambda c: directory_store.change_members(c, _id(c, "staff"), added=[_id(c, "cat")], removed=[])),
    (ACCOUNT, lambda c: directory_store.change_members(c, _id(c, "staff"), added=[], removed=[_id(c, "ben")])),
    (ACCOUNT, lambda c: directory_store.update_account(c, _id(c, "ben"), Profile(name="ben"), folded="ben")),
    (
        ("principals",),
        lambda c: directory_store.update_group(c, _id(c, "staff"), GroupProfile(name="staff"), folded="staff"),
    ),
    (("tokens",), lambda c: store.comment_token(c, "token-ben", "another")),
    (("platform",), lambda c: store.replace_admin_token_id(c, "token-new")),
)
"""Changes of one object each, and the tables that it consists of: an edit there is what such a change could bless."""


def sampled(connection: Connection, concerned: tuple[str, ...]) -> list[Edit]:
    """Some edits of each table that is concerned, and some of all others."""
    chance, by_table = seeded(), defaultdict(list)
    for edit in edits(connection):
        by_table[edit.table if edit.table in concerned else ""].append(edit)
    return [edit for found in by_table.values() for edit in chance.sample(found, min(EDITS, len(found)))]


def _scope(connection: Connection) -> Any:
    scope = store.find_scope(connection, "one")
    assert scope is not None
    return scope


def _id(connection: Connection, name: str) -> int:
    found = store.find_principal(connection, name)
    assert found is not None
    return found


@pytest.mark.parametrize(("concerned", "change"), CHANGES)
def test_later_change_does_not_bless_an_edit(
    connection: Connection, concerned: tuple[str, ...], change: Callable[[Connection], Any]
) -> None:
    """What is refused after an edit is refused still when the service has changed something itself."""
    before = defaultdict(lambda: REFUSED, asked(connection))
    for edit in sampled(connection, concerned):
        with made(connection, edit) as is_made:
            if not is_made:
                continue
            refused = {
                question for question, answer in asked(connection).items() if answer == REFUSED != before[question]
            }
            try:
                change(connection)
            except (RightsDamaged, AssertionError, sqlite3.Error):  # refused, or not there any more
                continue
            now = asked(connection)
            assert not {question for question in refused if now.get(question, REFUSED) != REFUSED}, edit


def test_principal_is_deleted_whatever_else_is_damaged(connection: Connection) -> None:
    """Nobody keeps a right because somebody harmed the list that it is in."""
    lists = ("acls", "scopes", "endpoint_permissions", "endpoints", "launch_grants")
    for edit in seeded().sample([edit for edit in edits(connection) if edit.table in lists], 2 * EDITS):
        with made(connection, edit) as is_made:
            if is_made:
                before = asked(connection)
                ben = _id(connection, "ben")
                connection.execute("PRAGMA foreign_keys = ON")
                directory_store.delete_principal(connection, ben)
                now = asked(connection)
                assert {now.get(each, REFUSED) for each in ("user ben", "token token-ben")} == {REFUSED}
                assert before["user cat"] == now["user cat"]
                assert not {q for q, a in before.items() if a == REFUSED and now.get(q, REFUSED) != REFUSED}, edit


def test_group_that_is_deleted_takes_its_rights_along_and_nothing_else(connection: Connection) -> None:
    connection.execute("BEGIN")
    before = asked(connection)
    directory_store.delete_principal(connection, _id(connection, "users"))
    connection.execute("DELETE FROM memberships WHERE group_id NOT IN (SELECT id FROM principals)")
    connection.execute("DELETE FROM acls WHERE principal_id NOT IN (SELECT id FROM principals)")
    now = asked(connection)
    ann = store.find_user_named(connection, "ann")
    assert ann is not None
    assert [group.name for group in ann.groups] == [ADMINS]
    assert [grant.principal for grant in now["scope two"][1]] == ["cat"]
    assert now["scope one"] == before["scope one"]
    connection.execute("ROLLBACK")


# --- the MACs themselves ---


def an_integrity(**keys: bytes) -> Integrity:
    return Integrity({int(version[1:]): SecretBytes(key * 32) for version, key in keys.items()})


def test_mac_is_good_for_its_content_kind_and_key_only() -> None:
    made = an_integrity(k1=b"a")
    mac = made.mac("scope", "name", 1, b"u", [[1, 2, 3]])
    assert made.is_intact(mac, "scope", "name", 1, b"u", [[1, 2, 3]])
    for kind, *content in (
        ("token", "name", 1, b"u", [[1, 2, 3]]),
        ("scope", "nam", 1, b"u", [[1, 2, 3]]),
        ("scope", "name", 2, b"u", [[1, 2, 3]]),
        ("scope", "name", 1, b"v", [[1, 2, 3]]),
        ("scope", "name", 1, b"u", [[1, 2], [3]]),
        ("scope", "name", 1, b"u", [[1, 2, 3], []]),
        ("scope", "name", 1, b"u"),
        ("scope", "name", "1", b"u", [[1, 2, 3]]),
    ):
        assert not made.is_intact(mac, kind, *content)
    assert not an_integrity(k1=b"b").is_intact(mac, "scope", "name", 1, b"u", [[1, 2, 3]])
    for wrong in (None, b"", mac[:-1], mac + b"x", b"\x02" + mac[1:]):
        assert not made.is_intact(wrong, "scope", "name", 1, b"u", [[1, 2, 3]])


def test_mac_is_verified_under_the_version_that_it_states_and_new_ones_are_of_the_newest() -> None:
    old, new = an_integrity(k1=b"a"), an_integrity(k1=b"a", k2=b"b")
    assert new.is_intact(old.mac("token", "t"), "token", "t")
    assert not old.is_intact(new.mac("token", "t"), "token", "t")
    restated = b"\x01" + (2).to_bytes(4, "big") + old.mac("token", "t")[5:]
    assert not new.is_intact(restated, "token", "t")


def test_refusal_names_what_is_damaged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, integrity.__name__)
    with pytest.raises(RightsDamaged, match="about token t1 failed"):
        an_integrity(k1=b"a").require(b"", "token", "t1")
    assert [record.message for record in caplog.records] == ["stored rights are damaged"]


def test_connection_that_was_not_told_the_key_decides_nothing() -> None:
    with a_store() as connection:
        connection.equipment = None
        with pytest.raises(AssertionError):
            store.insert_scope(connection, "one", folded="one", uuid=b"u")
        equip(connection)
        store.insert_scope(connection, "two", folded="two", uuid=b"v")
