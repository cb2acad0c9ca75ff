"""Records open at their own place, under their own key, unchanged; and nowhere else."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secrets_service import cipher
from secrets_service.cipher import Cipher, Damaged, Place
from secrets_service.model import SecretBytes

STORE = b"s" * 16
PLACE = Place(kind="secret", scope=b"u" * 16, key="key", version=7, field="value")
VALUE = SecretBytes(b"the value")


def a_cipher(key: bytes = b"k" * 32, store: bytes = STORE) -> Cipher:
    return Cipher(SecretBytes(key), store)


@given(st.binary(max_size=300))
def test_value_comes_back(value: bytes) -> None:
    assert a_cipher().open(a_cipher().seal(SecretBytes(value), PLACE), PLACE).reveal() == value


@pytest.mark.parametrize(
    "place",
    [
        replace(PLACE, kind="signing-key"),
        replace(PLACE, scope=b"v" * 16),
        replace(PLACE, scope=b""),
        replace(PLACE, key="Key"),
        replace(PLACE, version=8),
        replace(PLACE, field=""),
        # The same bytes, divided in another way.
        replace(PLACE, kind="secretu", scope=b"u" * 15),
        replace(PLACE, scope=b"u" * 16 + b"k", key="ey"),
    ],
)
def test_record_opens_at_no_other_place(place: Place) -> None:
    with pytest.raises(Damaged):
        a_cipher().open(a_cipher().seal(VALUE, PLACE), place)


def test_record_opens_under_no_other_key_and_in_no_other_store() -> None:
    record = a_cipher().seal(VALUE, PLACE)
    for other in (a_cipher(key=b"K" * 32), a_cipher(store=b"S" * 16)):
        with pytest.raises(Damaged):
            other.open(record, PLACE)


def test_no_single_changed_bit_opens() -> None:
    record = a_cipher().seal(VALUE, PLACE)
    for position in range(len(record) * 8):
        changed = bytearray(record)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(Damaged):
            a_cipher().open(bytes(changed), PLACE)


@settings(max_examples=200)
@given(st.binary(max_size=120))
def test_arbitrary_bytes_do_not_open(record: bytes) -> None:
    for text in (record, cipher.FORMAT + record):
        with pytest.raises(Damaged):
            a_cipher().open(text, PLACE)


def test_no_two_records_share_salt_or_nonce() -> None:
    records = [a_cipher().seal(VALUE, PLACE) for _ in range(2_000)]
    assert len({record[1:33] for record in records}) == len(records)
    assert len({record[33:45] for record in records}) == len(records)


def test_record_does_not_hold_its_value() -> None:
    assert VALUE.reveal() not in a_cipher().seal(VALUE, PLACE)


def test_derived_keys_differ_by_label_store_and_root_key() -> None:
    keys = [
        a_cipher().derive("one"),
        a_cipher().derive("two"),
        a_cipher(store=b"S" * 16).derive("one"),
        a_cipher(key=b"K" * 32).derive("one"),
    ]
    assert len({key.reveal() for key in keys}) == 4
    assert a_cipher().derive("one").reveal() == keys[0].reveal()
    assert all(len(key) == 32 for key in keys)


def test_record_of_the_first_format_still_opens() -> None:
    """A stored vector: whoever changes the format adds a new one and goes on reading this."""
    record = bytes.fromhex(VECTOR)
    assert a_cipher().open(record, PLACE).reveal() == b"the value"


def test_secret_bytes_are_masked_and_not_pickled() -> None:
    for text in (repr(VALUE), str(VALUE), f"{VALUE}", f"{VALUE!r}", "{}".format(VALUE), repr([VALUE])):  # noqa: UP032
        assert "the value" not in text
        assert "***" in text
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leak(VALUE)


VECTOR = (
    "01c27d9c3aaf362c98fd80ab4d6fd60011934b9472056c2aac066d15142991614e0d0e53eae27de993f2dd92033c17848d48"
    "a6cd108020be78186de5e8a756cdb982f5243e10"
)
