"""The log ring: bounded in memory, whole lines, masked however the pipe splits what was written."""

import pytest

from serving_service.shim.masking import Masker
from serving_service.shim.ring import CUT_MARK, LineRing, LineWriter

SECRET = b"sk-0123456789abcdef"


def a_writer(ring: LineRing, *, max_line: int = 100) -> LineWriter:
    return LineWriter(ring, Masker([SECRET.decode()]), max_line)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_a_secret_split_over_reads_is_masked(size: int) -> None:
    ring = LineRing(10_000)
    writer = a_writer(ring)
    text = b"first\nthe key is " + SECRET + b"!\nlast\n"
    for start in range(0, len(text), size):
        writer.feed(text[start : start + size])
    assert ring.tail(10_000) == "first\nthe key is [secret]!\nlast\n"


def test_an_unfinished_line_is_kept_only_when_nothing_more_can_come() -> None:
    ring = LineRing(10_000)
    writer = a_writer(ring)
    writer.feed(b"whole\nhalf of " + SECRET[:10])
    assert ring.tail(10_000) == "whole\n"
    writer.feed(SECRET[10:])
    writer.close()
    assert ring.tail(10_000) == "whole\nhalf of [secret]\n"


@pytest.mark.parametrize("before", range(80, 101))
@pytest.mark.parametrize("size", [1, 1_000])
def test_a_long_line_is_cut_without_leaving_half_a_secret(before: int, size: int) -> None:
    ring = LineRing(10_000)
    writer = a_writer(ring)
    text = b"." * before + SECRET + b"-" * 500 + b"\nnext\n"
    for start in range(0, len(text), size):
        writer.feed(text[start : start + size])
    line, following, _ = ring.tail(10_000).split("\n")
    assert line.endswith(CUT_MARK.decode())
    assert "sk-" not in line
    assert len(line) <= 100 + len("[secret]") + len(CUT_MARK)
    assert following == "next"


def test_a_line_of_exactly_the_longest_length_is_not_cut() -> None:
    ring = LineRing(10_000)
    writer = a_writer(ring)
    writer.feed(b"x" * 100 + b"\n" + b"y" * 101 + b"\n")
    assert ring.tail(10_000) == "x" * 100 + "\n" + "y" * 100 + CUT_MARK.decode() + "\n"


def test_the_ring_keeps_the_newest_lines_within_its_capacity() -> None:
    ring = LineRing(1_000)
    for number in range(1_000):
        ring.append(b"line %d" % number)
    kept = ring.tail(10_000).splitlines()
    assert kept[-1] == "line 999"
    assert 5 <= len(kept) <= 1_000 // 48


def test_the_tail_holds_whole_lines_only() -> None:
    ring = LineRing(1_000)
    for line in (b"one", b"two", b"three"):
        ring.append(line)
    assert ring.tail(11) == "two\nthree\n" == ring.tail(10)
    assert ring.tail(9) == "three\n"
    assert ring.tail(0) == ""


def test_what_comes_after_a_place_is_told_with_where_to_go_on_and_what_is_missing() -> None:
    ring = LineRing(200)
    assert ring.since(0, 100) == ("", 0, 0)
    ring.append(b"one")
    ring.append(b"two")
    assert ring.since(0, 100) == ("one\ntwo\n", 2, 0)
    assert ring.since(1, 100) == ("two\n", 2, 0)
    assert ring.since(2, 100) == ("", 2, 0)
    assert ring.since(7, 100) == ("", 2, 0)
    for number in range(100):
        ring.append(b"line %d" % number)
    text, position, missing = ring.since(2, 1_000)
    assert position == 102
    assert text.endswith("line 98\nline 99\n")
    assert text.count("\n") + missing == 100
    assert missing > 0
    assert ring.since(99, 16) == ("line 98\nline 99\n", 102, 1)


def test_bytes_that_are_no_text_do_not_break_the_log() -> None:
    ring = LineRing(1_000)
    ring.append(b"\xff\x00ok")
    assert ring.tail(100) == "\ufffd\x00ok\n"
