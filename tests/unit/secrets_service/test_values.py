"""Sealed values open where they were put and nowhere else, whatever is done to the rows (S2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from secrets_service import store
from secrets_service.errors import ScopeDamaged, SecretDamaged
from secrets_service.model import Scope, SecretBytes
from secrets_service.values import SecretValues
from servicekit.storage import Connection
from tests.support.seed import seeded
from tests.support.stores import KEYRING, a_store

SWAPS = 1_000


@dataclass(frozen=True)
class Store:
    """Three scopes with the same five keys, each with three versions; a value says where it was put."""

    connection: Connection
    values: SecretValues
    scopes: list[Scope]

    def opened(self, scope: Scope, key: str, version: int) -> bytes:
        known = store.find_key(self.connection, scope, key)
        assert known is not None
        sealed = store.find_version(self.connection, known, version)
        assert sealed is not None
        return self.values.open(scope, sealed).reveal()


KEYS = ["a", "b", "c", "d", "e"]


@pytest.fixture
def filled() -> Iterator[Store]:
    with a_store() as connection:
        values = SecretValues(KEYRING, keep=3, now=lambda: 0.0)
        scopes = [store.insert_scope(connection, name, folded=name, uuid=name.encode() * 16) for name in "xyz"]
        for scope in scopes:
            values.prepare(connection, scope)
            for key in KEYS:
                for version in (1, 2, 3):
                    values.add(connection, scope, key, value_of(scope, key, version))
        yield Store(connection, values, scopes)


def value_of(scope: Scope, key: str, version: int) -> SecretBytes:
    return SecretBytes(f"{scope.name}/{key}/{version}".encode())


def test_no_value_opens_in_the_place_of_another(filled: Store) -> None:
    """Random pairs of rows, whose records change places; also together with the version of the key that opens them."""
    chance = seeded()
    rows = filled.connection.execute("SELECT rowid FROM versions").fetchall()
    where = {
        row[0]: (scope, row[1], row[2])
        for scope in filled.scopes
        for row in filled.connection.execute(
            "SELECT v.rowid, k.folded, v.version FROM versions v JOIN keys k ON k.id = v.key_id WHERE k.scope_id = ?",
            (scope.id,),
        )
    }
    for _ in range(SWAPS):
        one, other, third = (row[0] for row in chance.sample(rows, 3))
        filled.connection.execute("BEGIN")
        for row, record in ((one, record_of(filled, other)), (other, record_of(filled, one))):
            filled.connection.execute("UPDATE versions SET record = ? WHERE rowid = ?", (record, row))
        for row in (one, other):
            with pytest.raises(SecretDamaged) as caught:
                filled.opened(*where[row])
            assert caught.value.reason == "DATA_LOSS"
        assert filled.opened(*where[third]) == value_of(*where[third]).reveal()
        filled.connection.execute("ROLLBACK")


def test_no_single_changed_bit_of_ten_stored_records_opens_and_all_others_do(filled: Store) -> None:
    rows = filled.connection.execute(
        "SELECT v.rowid, k.scope_id, k.folded, v.version, v.record FROM versions v JOIN keys k ON k.id = v.key_id"
    ).fetchall()
    scopes = {scope.id: scope for scope in filled.scopes}
    for row, scope_id, folded, version, record in seeded().sample(rows, 10):
        scope = scopes[scope_id]
        others = [each for each in rows if each[0] != row]
        for position in range(len(record) * 8):
            changed = bytearray(record)
            changed[position // 8] ^= 1 << position % 8
            filled.connection.execute("UPDATE versions SET record = ? WHERE rowid = ?", (bytes(changed), row))
            with pytest.raises(SecretDamaged):
                filled.opened(scope, folded, version)
            _, other_id, other, older, _ = others[position % len(others)]
            assert filled.opened(scopes[other_id], other, older) == value_of(scopes[other_id], other, older).reveal()
        filled.connection.execute("UPDATE versions SET record = ? WHERE rowid = ?", (record, row))
        assert filled.opened(scope, folded, version) == value_of(scope, folded, version).reveal()


def record_of(filled: Store, row: int) -> bytes:
    return bytes(filled.connection.execute("SELECT record FROM versions WHERE rowid = ?", (row,)).fetchone()[0])


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE scope_keys SET record = (SELECT record FROM scope_keys WHERE scope_id = 2) WHERE scope_id = 1",
        "UPDATE scope_keys SET version = 2 WHERE scope_id = 1",
        "DELETE FROM scope_keys WHERE scope_id = 1",
        "UPDATE scope_keys SET record = x'' WHERE scope_id = 1",
        "UPDATE scope_keys SET record = substr(record, 1, 60) WHERE scope_id = 1",
        "UPDATE versions SET key_version = 0 WHERE key_id <= 5",
        "UPDATE versions SET key_version = 2 WHERE key_id <= 5",
        "UPDATE versions SET record = x'' WHERE key_id <= 5",
        "UPDATE keys SET folded = folded || 'x', key = key || 'x' WHERE scope_id = 1",
    ],
)
def test_scope_whose_keys_or_places_are_changed_is_closed_and_others_are_not(filled: Store, edit: str) -> None:
    filled.connection.execute(edit)
    harmed = store.find_scope(filled.connection, "x")
    assert harmed is not None
    suffix = "x" if "folded" in edit else ""
    for key in KEYS:
        with pytest.raises(SecretDamaged):
            filled.opened(harmed, key + suffix, 3)
        for scope in filled.scopes[1:]:
            assert filled.opened(scope, key, 3) == value_of(scope, key, 3).reveal()


@pytest.mark.parametrize(
    "edit", ["DELETE FROM scope_keys", "UPDATE scope_keys SET record = x'00'", "UPDATE scope_keys SET version = 9"]
)
def test_nothing_is_sealed_under_a_key_that_is_damaged_or_gone(filled: Store, edit: str) -> None:
    filled.connection.execute(edit)
    with pytest.raises(ScopeDamaged):
        filled.values.add(filled.connection, filled.scopes[0], "new", SecretBytes(b"value"))


def test_value_opens_under_the_version_of_the_key_that_it_was_sealed_under(filled: Store) -> None:
    scope = filled.scopes[0]
    second = KEYRING.new_scope_key(scope.uuid, 2)
    store.insert_scope_key(filled.connection, scope, second, created_ms=0)
    filled.values.add(filled.connection, scope, "a", SecretBytes(b"under the second"))
    assert filled.opened(scope, "a", 4) == b"under the second"
    assert filled.opened(scope, "a", 3) == b"x/a/3"
    filled.connection.execute("DELETE FROM scope_keys WHERE scope_id = ? AND version = 1", (scope.id,))
    assert filled.opened(scope, "a", 4) == b"under the second"
    with pytest.raises(SecretDamaged):
        filled.opened(scope, "a", 3)
