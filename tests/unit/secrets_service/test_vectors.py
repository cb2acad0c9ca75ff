"""Stored records of every format go on to open, and a second implementation agrees with the first in every byte.

Whoever changes a format adds its vectors to `vectors.json` and leaves those that are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secrets_service import tokens
from secrets_service.cipher import Cipher, Damaged, Place
from secrets_service.first_format import FirstFormat
from secrets_service.integrity import Integrity
from secrets_service.keyring import Keyring
from secrets_service.model import SealedKeyring, SecretBytes, TokenKind, WrappedKey
from secrets_service.rootkey import RootKey
from tests.support import second_cipher

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors.json").read_text())

STORE = b"s" * 16


def place_of(vector: dict[str, Any]) -> Place:
    place = vector["place"]
    return Place(place["kind"], bytes.fromhex(place["scope"]), place["key"], place["version"], place["field"])


def as_vector(place: Place) -> dict[str, Any]:
    return {
        "kind": place.kind,
        "scope": place.scope.hex(),
        "key": place.key,
        "version": place.version,
        "field": place.field,
    }


@pytest.mark.parametrize("vector", VECTORS["records"], ids=lambda vector: vector["name"])
def test_stored_record_opens_in_both_implementations(vector: dict[str, Any]) -> None:
    key, store, record = (bytes.fromhex(vector[name]) for name in ("key", "store", "record"))
    place, value = place_of(vector), bytes.fromhex(vector["value"])
    assert second_cipher.open_record(key, store, vector["place"], record) == value
    if vector["format"] == 1:
        ours: Any = FirstFormat(SecretBytes(key), store)
    else:
        ours = Cipher(SecretBytes(key), store, vector["key_version"])
    assert ours.open(record, place).reveal() == value


@pytest.mark.parametrize("vector", VECTORS["records"], ids=lambda vector: vector["name"])
def test_stored_record_is_what_the_second_implementation_makes_of_the_same_salt_and_nonce(
    vector: dict[str, Any],
) -> None:
    record = bytes.fromhex(vector["record"])
    start = 1 if vector["format"] == 1 else 5
    assert record == second_cipher.seal(
        vector["format"],
        bytes.fromhex(vector["key"]),
        bytes.fromhex(vector["store"]),
        vector["place"],
        bytes.fromhex(vector["value"]),
        key_version=vector["key_version"],
        salt=record[start : start + 32],
        nonce=record[start + 32 : start + 44],
    )


def test_stored_keyring_leads_to_what_it_led_to() -> None:
    """From the root key down to a value, in both implementations."""
    vector = VECTORS["keyring"]
    root = RootKey.of(bytes.fromhex(vector["root_key"]))
    store, scope = bytes.fromhex(vector["store"]), bytes.fromhex(vector["scope"])
    assert root.id == second_cipher.root_key_id(root.key.reveal()) == vector["root_key_id"]
    sealed = SealedKeyring(vector["root_key_id"], bytes.fromhex(vector["keyring"]))
    keyring = Keyring.opened(sealed, root, store)
    macs = tokens.TokenMacs(keyring.token_mac_keys())
    presented = tokens.parse(vector["token"], TokenKind.PERSONAL)
    assert presented is not None
    assert {each.version: each.mac.hex() for each in macs.candidates(presented)} == {
        int(version): mac for version, mac in vector["token_macs"].items()
    }
    wrapped = WrappedKey(vector["scope_key_version"], bytes.fromhex(vector["scope_key"]))
    opened = keyring.of_scope(scope, wrapped).open(bytes.fromhex(vector["record"]), place_of(vector))
    assert opened.reveal().hex() == vector["value"]

    # Once more, without the service's own code.
    place = {"kind": "keyring", "scope": "", "key": root.id, "version": 0, "field": ""}
    content = second_cipher.open_record(root.key.reveal(), store, place, sealed.record)
    entries = [content[start : start + 45] for start in range(0, len(content), 45)]
    keys = {(each[0], int.from_bytes(each[1:5], "big")): each[13:] for each in entries}
    assert sorted(keys) == [(1, 1), (1, 2), (2, 0), (3, 1)]
    for stated in (1, 2):
        key = second_cipher.derived(2, keys[1, stated], store, "token-mac", key_version=stated)
        assert second_cipher.hmac_sha256(key, vector["token_mac_text"]) == vector["token_macs"][str(stated)]
    place = {"kind": "scope-key", "scope": scope.hex(), "key": "", "version": wrapped.version, "field": ""}
    stated = int.from_bytes(wrapped.record[1:5], "big")
    scope_key = second_cipher.open_record(keys[1, stated], store, place, wrapped.record)
    value = second_cipher.open_record(scope_key, store, vector["place"], bytes.fromhex(vector["record"]))
    assert value.hex() == vector["value"]


def test_stored_mac_of_rights_is_good_in_both_implementations() -> None:
    vector = VECTORS["rights"]
    store, mac = bytes.fromhex(vector["store"]), bytes.fromhex(vector["mac"])
    store_key, version = bytes.fromhex(vector["store_key"]), vector["key_version"]
    keyring = Keyring(store, {version: (0, SecretBytes(store_key))})
    content = [bytes.fromhex(each[4:]) if str(each).startswith("hex:") else each for each in vector["content"]]
    assert Integrity(keyring.rights_keys()).is_intact(mac, vector["kind"], *content)

    key = second_cipher.derived(2, store_key, store, "rights", key_version=version)
    text = vector["text"].encode().hex()
    assert mac.hex() == "01" + f"{version:08x}" + second_cipher.hmac_sha256(key, text)


@given(
    key=st.binary(min_size=32, max_size=32),
    value=st.binary(max_size=200),
    scope=st.binary(max_size=16),
    name=st.text(max_size=20),
    version=st.integers(0, 2**63 - 1),
    key_version=st.integers(0, 2**32 - 1),
)
def test_both_implementations_open_what_the_other_seals(
    key: bytes, value: bytes, scope: bytes, name: str, version: int, key_version: int
) -> None:
    place = Place("secret", scope, name, version, "value")
    ours = Cipher(SecretBytes(key), STORE, key_version)
    assert second_cipher.open_record(key, STORE, as_vector(place), ours.seal(SecretBytes(value), place)) == value
    theirs = second_cipher.seal(
        2, key, STORE, as_vector(place), value, key_version=key_version, salt=b"1" * 32, nonce=b"2" * 12
    )
    assert ours.open(theirs, place).reveal() == value
    assert ours.derive("label").reveal() == second_cipher.derived(2, key, STORE, "label", key_version=key_version)


@pytest.mark.parametrize("vector", VECTORS["records"], ids=lambda vector: vector["name"])
def test_record_of_one_format_is_none_of_the_other(vector: dict[str, Any]) -> None:
    key, record = SecretBytes(bytes.fromhex(vector["key"])), bytes.fromhex(vector["record"])
    store = bytes.fromhex(vector["store"])
    other: Any = Cipher(key, store, 0) if vector["format"] == 1 else FirstFormat(key, store)
    for text in (record, bytes([3 - record[0]]) + record[1:]):
        with pytest.raises(Damaged):
            other.open(text, place_of(vector))
