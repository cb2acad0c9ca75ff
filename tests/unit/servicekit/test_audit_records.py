"""The chain of an audit log: whatever is done to it is found."""

from __future__ import annotations

import os

import pytest

from servicekit.audit_records import EXPIRED, AuditKey, Head, line, verify

KEY = AuditKey(bytes(range(32)))
KEYS = {"secrets": [KEY]}
AT = 1_800_000_000.123


def a_log(
    count: int, *, after: Head | None = None, key: AuditKey = KEY, **facts: object
) -> tuple[list[bytes], list[Head]]:
    """That many records, and the head behind each."""
    head = after or Head()
    lines, heads = [], []
    for number in range(count):
        text, head = line(key, head, {"service": "secrets", "object": f"number {number}", **facts}, at=AT)
        lines.append(text.encode())
        heads.append(head)
    return lines, heads


def test_a_log_that_nobody_touched_is_whole() -> None:
    lines, heads = a_log(5)
    verdict = verify(lines, KEYS, heads)
    assert verdict.is_whole
    assert (verdict.first, verdict.records, verdict.head) == (1, 5, heads[-1])


def test_every_edit_of_any_byte_is_found() -> None:
    lines, _ = a_log(2)
    for place in range(len(lines[0])):
        for other in (b" ", b"0", b"}"):
            edited = lines[0][:place] + other + lines[0][place + 1 :]
            if edited != lines[0]:
                assert not verify([edited, lines[1]], KEYS).is_whole, edited


@pytest.mark.parametrize("place", range(5))
def test_a_record_that_is_taken_out_is_found(place: int) -> None:
    lines, heads = a_log(5)
    del lines[place]
    assert not verify(lines, KEYS, heads[-1:]).is_whole


@pytest.mark.parametrize("place", range(4))
def test_records_that_change_places_are_found(place: int) -> None:
    lines, _ = a_log(5)
    lines[place], lines[place + 1] = lines[place + 1], lines[place]
    assert not verify(lines, KEYS).is_whole


def test_an_invented_record_is_found() -> None:
    lines, heads = a_log(3)
    other = AuditKey(os.urandom(32))
    text, _ = line(other, heads[-1], {"service": "secrets"}, at=AT)
    assert not verify([*lines, text.encode()], KEYS).is_whole


@pytest.mark.parametrize("service", ["secrets", "serving"])
def test_the_key_of_another_service_makes_no_record_of_this_log(service: str) -> None:
    other = AuditKey(os.urandom(32))
    keys = {"secrets": [KEY], "serving": [other]}
    lines, heads = a_log(5)
    for count in range(1, 5):
        forged, _ = a_log(3, after=heads[count - 1], key=other, service=service)
        verdict = verify([*lines[:count], *forged], keys)
        assert (verdict.is_whole, verdict.records) == (False, count)
    own, _ = a_log(5, key=other, service="serving")
    assert [verify(log, keys).service for log in (lines, own)] == ["secrets", "serving"]


def test_a_chain_goes_on_with_a_newer_key_and_never_with_an_older_one_again() -> None:
    keys = [AuditKey(os.urandom(32)) for _ in range(3)]
    lines: list[bytes] = []
    heads: list[Head] = [Head()]
    for key in keys:
        more, heads = a_log(2, after=heads[-1], key=key)
        lines += more
    assert verify(lines, {"secrets": keys}).is_whole
    repeated = verify([*lines[:3], *lines[1:]], {"secrets": keys})  # what is there twice goes back to nothing
    assert (repeated.is_whole, repeated.repeated) == (True, 2)
    for older in keys[:2]:
        forged, _ = a_log(1, after=heads[-1], key=older)
        verdict = verify([*lines, *forged], {"secrets": keys})
        assert verdict.problems == ["line 7: record 7 was made with a key from before the last one"]


def test_an_end_that_was_cut_off_is_found_by_what_was_published() -> None:
    lines, heads = a_log(5)
    assert verify(lines[:3], KEYS).is_whole  # nothing says that there was more
    assert verify(lines[:3], KEYS, heads[:3]).is_whole
    assert not verify(lines[:3], KEYS, [heads[3]]).is_whole
    assert not verify([], KEYS, [heads[3]]).is_whole
    assert not verify([], KEYS).is_whole


def test_a_log_with_another_history_is_found_by_what_was_published() -> None:
    _, heads = a_log(5)
    forged, _ = a_log(5, actor="nobody")
    assert verify(forged, KEYS).is_whole
    assert not verify(forged, KEYS, [heads[2]]).is_whole


def test_two_histories_that_were_published_are_found() -> None:
    lines, heads = a_log(5)
    _, others = a_log(5, actor="nobody")
    for published in ([heads[2], others[2]], [others[2], heads[2]]):
        assert not verify(lines, KEYS, published).is_whole


def test_a_beginning_may_be_gone_only_where_the_log_says_so() -> None:
    lines, heads = a_log(4)
    assert not verify(lines[2:], KEYS).is_whole
    text, _ = line(KEY, heads[-1], {"service": "secrets", "method": EXPIRED, "through": 2}, at=AT)
    assert verify([*lines[2:], text.encode()], KEYS).is_whole
    assert not verify([*lines[3:], text.encode()], KEYS).is_whole


def test_a_beginning_may_be_gone_where_somebody_else_says_so() -> None:
    lines, _ = a_log(5)
    assert [verify(lines[2:], KEYS, begin=begin).is_whole for begin in (1, 2, 3, 4)] == [False, False, True, True]
    assert not verify([lines[2], lines[4]], KEYS, begin=3).is_whole


def test_what_an_exporter_wrote_twice_counts_once() -> None:
    lines, heads = a_log(4)
    verdict = verify([*lines[:3], *lines[1:]], KEYS, heads)
    assert (verdict.is_whole, verdict.records, verdict.repeated) == (True, 4, 2)


def test_no_value_makes_the_mac_of_a_record() -> None:
    lines, heads = a_log(1)
    signed = lines[0].rpartition(b',"mac":')[0]
    assert KEY.of_value(signed) != heads[0].mac
    assert KEY.of_line(signed.decode()) == heads[0].mac


def test_a_record_is_one_line_of_ascii_whatever_it_tells() -> None:
    hostile = 'a"\n\r\u2028\x00é{}'
    text, _ = line(KEY, Head(), {"service": "secrets", "object": hostile}, at=AT)
    assert text.isascii()
    assert text.isprintable()
    assert verify([text.encode()], KEYS).is_whole
