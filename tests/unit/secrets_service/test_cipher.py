"""Records open at their own place, under their own key, unchanged; and nowhere else."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
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

places = st.builds(
    Place,
    kind=st.sampled_from(["secret", "answer", "scope-key"]),
    scope=st.binary(max_size=16),
    key=st.text(max_size=20),
    version=st.integers(0, 2**63 - 1),
    field=st.text(max_size=5),
)


def a_cipher(key: bytes = b"k" * 32, store: bytes = STORE, version: int = 3) -> Cipher:
    return Cipher(SecretBytes(key), store, version)


@given(st.binary(max_size=300), places)
def test_value_comes_back(value: bytes, place: Place) -> None:
    record = a_cipher().seal(SecretBytes(value), place)
    assert a_cipher().open(record, place).reveal() == value
    assert cipher.stated_version(record) == 3


@given(places, places)
def test_record_opens_at_no_other_of_any_two_places(one: Place, other: Place) -> None:
    record = a_cipher().seal(VALUE, one)
    if one != other:
        with pytest.raises(Damaged):
            a_cipher().open(record, other)


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


def test_record_opens_under_no_other_key_or_version_and_in_no_other_store() -> None:
    record = a_cipher().seal(VALUE, PLACE)
    for other in (a_cipher(key=b"K" * 32), a_cipher(store=b"S" * 16), a_cipher(version=4)):
        with pytest.raises(Damaged):
            other.open(record, PLACE)


def test_record_that_states_another_version_does_not_open_under_that_one() -> None:
    """Also where both versions are the same key, which nobody makes them."""
    record = a_cipher().seal(VALUE, PLACE)
    renamed = record[:1] + (4).to_bytes(4, "big") + record[5:]
    assert cipher.stated_version(renamed) == 4
    with pytest.raises(Damaged):
        a_cipher(version=4).open(renamed, PLACE)


def test_no_single_changed_bit_of_ten_records_opens() -> None:
    for length in range(10):
        record = a_cipher().seal(SecretBytes(os.urandom(length)), PLACE)
        for position in range(len(record) * 8):
            changed = bytearray(record)
            changed[position // 8] ^= 1 << position % 8
            with pytest.raises(Damaged):
                a_cipher().open(bytes(changed), PLACE)


@settings(max_examples=200)
@given(st.binary(max_size=120))
def test_arbitrary_bytes_do_not_open(record: bytes) -> None:
    for text in (record, cipher.FORMAT + record, cipher.FORMAT + bytes((0, 0, 0, 3)) + record):
        with pytest.raises(Damaged):
            a_cipher().open(text, PLACE)


def test_no_two_records_share_salt_or_nonce() -> None:
    records = [a_cipher().seal(VALUE, PLACE) for _ in range(20_000)]
    assert len({record[5:37] for record in records}) == len(records)
    assert len({record[37:49] for record in records}) == len(records)


@pytest.mark.long
def test_no_two_of_a_million_records_share_salt_or_nonce() -> None:
    sealing, pairs = a_cipher(), set[bytes]()
    for _ in range(1_000_000):
        pairs.add(sealing.seal(VALUE, PLACE)[5:49])
    assert len({pair[:32] for pair in pairs}) == len({pair[32:] for pair in pairs}) == 1_000_000


def test_two_copies_of_one_process_share_neither_salt_nor_nonce() -> None:
    """What a snapshot that is started twice comes to: all memory is the same, the sealing cipher included."""
    ended = subprocess.run([sys.executable, "-c", COPIES], capture_output=True, check=True, timeout=60, text=True)
    heads = [bytes.fromhex(line) for line in ended.stdout.split()]
    assert len({head[5:37] for head in heads}) == len({head[37:49] for head in heads}) == len(heads) == 2_000


COPIES = """
import os, sys
from secrets_service.cipher import Cipher, Place
from secrets_service.model import SecretBytes

sealing, value = Cipher(SecretBytes(bytes(32)), b"s", 1), SecretBytes(b"v")
sealing.seal(value, Place("secret"))
for _ in range(2):
    if os.fork() == 0:
        for _ in range(1_000):
            print(sealing.seal(value, Place("secret"))[:49].hex())
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def test_record_does_not_hold_its_value() -> None:
    assert VALUE.reveal() not in a_cipher().seal(VALUE, PLACE)


def test_derived_keys_differ_by_label_store_version_and_key() -> None:
    keys = [
        a_cipher().derive("one"),
        a_cipher().derive("two"),
        a_cipher(store=b"S" * 16).derive("one"),
        a_cipher(key=b"K" * 32).derive("one"),
        a_cipher(version=4).derive("one"),
    ]
    assert len({key.reveal() for key in keys}) == 5
    assert a_cipher().derive("one").reveal() == keys[0].reveal()
    assert all(len(key) == 32 for key in keys)


def test_secret_bytes_are_masked_and_not_pickled() -> None:
    for text in (repr(VALUE), str(VALUE), f"{VALUE}", f"{VALUE!r}", "{}".format(VALUE), repr([VALUE])):  # noqa: UP032
        assert "the value" not in text
        assert "***" in text
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leak(VALUE)
