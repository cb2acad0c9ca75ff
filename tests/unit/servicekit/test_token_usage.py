"""Tokens that an answer says it took, however it is cut into pieces."""

from __future__ import annotations

import itertools
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit import token_usage
from servicekit.token_usage import Usage

JSON, EVENTS = b"application/json", b"text/event-stream; charset=utf-8"
CHAT = {"choices": [{"message": {"content": 'a "usage": {"total_tokens": 99} b'}}], "usage": {}}


def read(content_type: bytes, *pieces: bytes) -> Usage | None:
    reader = token_usage.reader(content_type)
    for piece in pieces:
        reader.feed(piece)
    return reader.usage()


def chat(**usage: Any) -> bytes:
    return orjson.dumps({**CHAT, "usage": usage})


def events(*documents: Any) -> bytes:
    return b"".join(b"data: " + orjson.dumps(each) + b"\n\n" for each in documents) + b"data: [DONE]\n\n"


def test_chat_and_responses_spell_it_differently() -> None:
    assert read(JSON, chat(prompt_tokens=3, completion_tokens=4, total_tokens=7)) == Usage(3, 4, 7)
    assert read(JSON, chat(input_tokens=3, output_tokens=4)) == Usage(3, 4, 7)
    assert read(JSON, chat(prompt_tokens=3, total_tokens=3, prompt_tokens_details={"cached": 0})) == Usage(3, 0, 3)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{",
        b'"usage"',
        b'{"predictions": [1]}',
        b'{"usage": 5}',
        b'{"usage": null}',
        b'{"usage": {"total_tokens": -5, "prompt_tokens": true, "completion_tokens": "9"}}',
        b'{"predictions": [{"usage": {"total_tokens": 5}}]}',
    ],
)
def test_what_does_not_say_it_counts_nothing(answer: bytes) -> None:
    reader = token_usage.reader(JSON)
    reader.feed(answer)
    assert reader.usage() is None
    assert reader.total() == 0


def test_of_a_long_answer_the_end_is_read() -> None:
    long = orjson.dumps(
        {"data": ["x" * token_usage.LONGEST], **CHAT, "usage": {"total_tokens": 12, "details": {"a": 1}}}
    )
    assert read(JSON, *(long[at : at + 65536] for at in range(0, len(long), 65536))) == Usage(0, 0, 12)
    without = orjson.dumps({"data": ["x" * token_usage.LONGEST], "choices": CHAT["choices"]})
    assert read(JSON, without) is None


def test_a_stream_says_it_in_its_last_event_that_has_it() -> None:
    body = events({"usage": None, "choices": []}, {"usage": {"total_tokens": 3}}, {"usage": {"total_tokens": 8}})
    assert read(EVENTS, body) == Usage(0, 0, 8)
    done = {"type": "response.completed", "response": {"usage": {"input_tokens": 1, "output_tokens": 2}}}
    assert read(EVENTS, events({"type": "delta"}, done)) == Usage(1, 2, 3)


def test_a_stream_that_does_not_say_it_counts_its_events() -> None:
    assert read(EVENTS, events({"a": 1}, "b", {"usage": None})) == Usage(0, 3, 3)
    assert read(EVENTS, b": comment\n\ndata: 1\r\n\r\ndata: unfinished") == Usage(0, 1, 1)
    assert read(EVENTS, b"data: " + b"x" * (token_usage.LONGEST + 5), b"\n\ndata: y\n") == Usage(0, 2, 2)


@pytest.mark.parametrize("said", [token_usage.MOST + 1, 2**53, 2**64 - 1])
def test_no_answer_counts_more_than_one_can_have_taken(said: int) -> None:
    most = token_usage.MOST
    assert read(JSON, chat(prompt_tokens=said, completion_tokens=said, total_tokens=said)) == Usage(most, most, most)
    assert read(EVENTS, events({"usage": {"prompt_tokens": said}})) == Usage(most, 0, most)


@given(st.lists(st.integers(1, 400), max_size=6))
def test_it_does_not_matter_where_an_answer_is_cut(cuts: list[int]) -> None:
    for content_type, body, expected in (
        (JSON, chat(total_tokens=5), Usage(0, 0, 5)),
        (EVENTS, events(CHAT, {"usage": {"total_tokens": 6}}), Usage(0, 0, 6)),
        (EVENTS, events(1, 2), Usage(0, 2, 2)),
    ):
        places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
        pieces = [body[start:end] for start, end in itertools.pairwise(places)]
        assert read(content_type, *pieces) == expected
