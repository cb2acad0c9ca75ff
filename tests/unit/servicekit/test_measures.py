"""What is measured of invocations, on a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from servicekit.context import Principal
from servicekit.errors import BadRequest, DeadlineExceeded
from servicekit.measures import Invocation, Key, Measured, Measures, UsageKey, Used, report, reported
from servicekit.token_usage import MOST_SUMMED, Usage

KEY = Key("e", "one", "3")
ADA = Principal("7", "ada", frozenset(), "t", None)
BOT = Principal("8", "bot", frozenset(), "t", None)


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Gone(Exception):
    pass


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def measures(clock: Clock) -> Measures:
    return Measures(gone=Gone, now=clock)


def invoke(measures: Measures, clock: Clock, *, status: int = 200, timing: bytes = b"", key: Key = KEY) -> None:
    """A request that waits 10 ms here and is answered 90 ms later."""
    with measures.began(key.endpoint_id) as invocation:
        invocation.chosen(key.entity, key.entity_version)
        clock.seconds += 0.010
        invocation.sent()
        clock.seconds += 0.090
        invocation.answered(status, timing)


def test_answer_is_counted_with_its_times(measures: Measures, clock: Clock) -> None:
    invoke(measures, clock, timing=b"5.0 20.5")
    measured = measures.take().entities[KEY]
    assert (measured.requests, measured.refused, measured.failed) == (1, 0, 0)
    assert measured.latency.sum == pytest.approx(100)
    assert measured.queue.sum == pytest.approx(15)  # here and in the model server
    assert measured.prediction.sum == pytest.approx(20.5)
    assert not measures.take()


@pytest.mark.parametrize(
    ("status", "counted"), [(200, (1, 0, 0)), (429, (1, 1, 0)), (500, (1, 0, 1)), (302, (1, 0, 0))]
)
def test_answers_are_counted_by_the_class_of_their_status(
    measures: Measures, clock: Clock, status: int, counted: tuple[int, int, int]
) -> None:
    invoke(measures, clock, status=status)
    measured = measures.take().entities[KEY]
    assert (measured.requests, measured.refused, measured.failed) == counted


def test_stream_keeps_its_model_busy_until_its_end(measures: Measures, clock: Clock) -> None:
    with measures.began("e") as invocation:
        invocation.chosen("one", "3")
        invocation.sent()
        clock.seconds += 0.010
        invocation.answered(200, b"4")
        clock.seconds += 2
    measured = measures.take().entities[KEY]
    assert measured.prediction.sum == pytest.approx(2006)
    assert measured.queue.sum == pytest.approx(4)


@pytest.mark.parametrize("timing", [b"", b"x", b"nan 1", b"-1 1", b"inf", b"1 1e308", b"1,2", b"\xff"])
def test_model_server_that_speaks_nonsense_of_its_times_is_not_believed(
    measures: Measures, clock: Clock, timing: bytes
) -> None:
    invoke(measures, clock, timing=timing)
    measured = measures.take().entities[KEY]
    assert measured.queue.sum == pytest.approx(10)
    assert measured.prediction.sum == pytest.approx(90)


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (BadRequest("no"), (1, 1, 0)),
        (DeadlineExceeded("late"), (1, 0, 1)),
        (RuntimeError("a bug"), (1, 0, 1)),
        (Gone(), (1, 0, 0)),
        (asyncio.CancelledError(), (1, 0, 0)),
    ],
)
def test_error_is_the_answer_that_it_becomes(
    measures: Measures, error: BaseException, counted: tuple[int, int, int]
) -> None:
    invocation = measures.began("e")
    invocation.chosen("one", "3")
    with pytest.raises(type(error)), invocation:
        raise error
    measured = measures.take().entities[KEY]
    assert (measured.requests, measured.refused, measured.failed) == counted
    assert measured.latency.count == (1 if counted[1:] != (0, 0) else 0)  # who is gone was not answered
    assert measured.prediction.count == 0


def test_request_that_reaches_no_entity_is_counted_for_the_endpoint(measures: Measures) -> None:
    with pytest.raises(BadRequest), measures.began("e"):
        raise BadRequest("stopped")
    assert [(key, one.refused) for key, one in measures.take().entities.items()] == [(Key("e"), 1)]


def test_time_under_way_is_counted_while_it_passes(measures: Measures, clock: Clock) -> None:
    def begun() -> Invocation:
        invocation = measures.began("e")
        invocation.__enter__()
        invocation.chosen("one", "3")
        return invocation

    first = begun()
    clock.seconds += 1
    second = begun()
    clock.seconds += 1
    assert measures.take().entities[KEY].busy == pytest.approx(3000)
    clock.seconds += 1
    for each in (first, second):
        each.__exit__(None, None, None)
    clock.seconds += 9
    measured = measures.take().entities[KEY]
    assert measured.busy == pytest.approx(2000)
    assert measured.requests == 2
    assert not measures.take()


def test_report_says_all_that_was_measured(measures: Measures, clock: Clock) -> None:
    for status in (200, 404, 503):
        invoke(measures, clock, status=status, timing=b"1 2")
    with measures.began("e", tracked=ADA) as invocation:
        invocation.used(Usage(7, 5, 12))
    taken = measures.take()
    read = reported(report(taken))
    assert read.entities.keys() == taken.entities.keys() == {KEY, Key("e")}
    assert _plain(read.entities[KEY]) == _plain(taken.entities[KEY])
    assert [(key, _counts(used)) for key, used in read.usage.items()] == [
        (UsageKey("e", "", "7", "ada"), [1, 0, 0, 7, 5])
    ]


def test_who_asked_is_counted_where_that_is_tracked_and_nowhere_else(measures: Measures) -> None:
    for tracked, status in ((ADA, 200), (ADA, 429), (BOT, 500), (None, 200)):
        with measures.began("e", tracked=tracked) as invocation:
            assert invocation.wants_tokens is (tracked is not None)
            invocation.chosen("one", "3")
            invocation.answered(status)
            invocation.used(Usage(2, 3, 5) if status == 200 else None)
    taken = measures.take()
    assert taken.entities[KEY].requests == 4
    assert {key: _counts(used) for key, used in taken.usage.items()} == {
        UsageKey("e", "one", "7", "ada"): [2, 1, 0, 2, 3],
        UsageKey("e", "one", "8", "bot"): [1, 0, 1, 0, 0],
    }


def test_tokens_add_up_to_what_a_message_holds(measures: Measures) -> None:
    for _ in range(3):
        with measures.began("demo-id", tracked=ADA) as request:
            request.used(Usage(2**62 - 5, 2**62 - 5, 2**62 - 5))
    taken = measures.take()
    (used,) = taken.usage.values()
    used.merge(used)
    assert used.input_tokens == used.output_tokens == MOST_SUMMED
    assert reported(report(taken)).usage.keys() == taken.usage.keys()


def _counts(used: Used) -> list[int]:
    return [used.requests, used.refused, used.failed, used.input_tokens, used.output_tokens]


def _plain(measured: Measured) -> list[object]:
    distributions = (measured.latency, measured.prediction, measured.queue)
    return [
        *(measured.requests, measured.refused, measured.failed, measured.busy),
        *((each.counts, each.sum) for each in distributions),
    ]
