"""Three levels of keys: each opens what is below it, by a stated version, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secrets_service import places
from secrets_service.cipher import Cipher, Damaged
from secrets_service.keyring import Keyring
from secrets_service.model import Scope, SecretBytes
from secrets_service.rootkey import RootKey

STORE = b"s" * 16
ROOT = RootKey.of(b"r" * 32)
SCOPE = Scope(1, b"u" * 16, "Shop")
OTHER = Scope(2, b"v" * 16, "Other")
VALUE = SecretBytes(b"the value")


def test_keyring_comes_back_with_all_its_keys() -> None:
    made = Keyring(STORE, {1: (5, SecretBytes(b"a" * 32)), 2: (6, SecretBytes(b"b" * 32))}, SecretBytes(b"o" * 32))
    opened = Keyring.opened(made.sealed(ROOT), ROOT, STORE)
    assert opened.current == 2
    keys = {version: key.reveal() for version, key in made.token_mac_keys().items()}
    assert {version: key.reveal() for version, key in opened.token_mac_keys().items()} == keys
    assert sorted(keys) == [0, 1, 2]
    assert len(set(keys.values())) == 3
    place = places.answer("1/r")
    assert opened.open(made.seal(VALUE, place), place).reveal() == VALUE.reveal()


def test_keyring_opens_under_its_own_root_key_in_its_own_store_only() -> None:
    sealed = Keyring.made(STORE, 0).sealed(ROOT)
    other = RootKey.of(b"R" * 32)
    for root, store in ((other, STORE), (ROOT, b"S" * 16), (replace(ROOT, id=other.id), STORE)):
        with pytest.raises(Damaged):
            Keyring.opened(sealed, root, store)
    for position in range(len(sealed.record)):
        record = bytearray(sealed.record)
        record[position] ^= 1
        with pytest.raises(Damaged):
            Keyring.opened(replace(sealed, record=bytes(record)), ROOT, STORE)


def test_root_key_is_called_by_an_id_that_does_not_show_it() -> None:
    assert ROOT.id == RootKey.of(b"r" * 32).id != RootKey.of(b"R" * 32).id
    assert len(ROOT.id) == 16
    assert "rrrr" not in repr(ROOT)


def test_scope_key_opens_for_its_own_scope_and_version_only() -> None:
    keyring = Keyring.made(STORE, 0)
    wrapped = keyring.new_scope_key(SCOPE.uuid, 1)
    place = places.secret(SCOPE, "key", 1)
    record = keyring.of_scope(SCOPE.uuid, wrapped).seal(VALUE, place)
    assert keyring.of_scope(SCOPE.uuid, wrapped).open(record, place).reveal() == VALUE.reveal()
    for scope, key in ((OTHER, wrapped), (SCOPE, replace(wrapped, version=2)), (SCOPE, replace(wrapped, record=b""))):
        with pytest.raises(Damaged):
            keyring.of_scope(scope.uuid, key)


def test_value_opens_under_no_other_version_of_its_scopes_key() -> None:
    keyring = Keyring.made(STORE, 0)
    first, second = (keyring.new_scope_key(SCOPE.uuid, version) for version in (1, 2))
    place = places.secret(SCOPE, "key", 1)
    record = keyring.of_scope(SCOPE.uuid, first).seal(VALUE, place)
    with pytest.raises(Damaged):
        keyring.of_scope(SCOPE.uuid, second).open(record, place)


def test_what_an_older_store_key_sealed_opens_and_new_things_are_sealed_under_the_newest() -> None:
    first = SecretBytes(b"a" * 32)
    old = Keyring(STORE, {1: (0, first)})
    new = Keyring(STORE, {1: (0, first), 2: (0, SecretBytes(b"b" * 32))})
    wrapped, place = old.new_scope_key(SCOPE.uuid, 1), places.answer("1/r")
    record = old.seal(VALUE, place)
    new.of_scope(SCOPE.uuid, wrapped)
    assert new.open(record, place).reveal() == VALUE.reveal()
    with pytest.raises(Damaged):
        old.open(new.seal(VALUE, place), place)
    with pytest.raises(Damaged):
        old.of_scope(SCOPE.uuid, new.new_scope_key(SCOPE.uuid, 2))


def test_records_of_no_scope_are_not_sealed_under_the_store_key_itself() -> None:
    key = SecretBytes(b"a" * 32)
    place = places.answer("1/r")
    record = Keyring(STORE, {1: (0, key)}).seal(VALUE, place)
    with pytest.raises(Damaged):
        Cipher(key, STORE, 1).open(record, place)


@pytest.mark.parametrize("record", [b"", b"\x01" * 100, b"\x02" + bytes(60), b"\x02" + b"\xff" * 60])
def test_what_is_no_record_is_damaged(record: bytes) -> None:
    with pytest.raises(Damaged):
        Keyring.made(STORE, 0).open(record, places.answer("1/r"))
