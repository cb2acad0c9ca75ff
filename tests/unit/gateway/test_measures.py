"""Reports of a gateway to a Serving that answers, does not answer, and forgets."""

from __future__ import annotations

import pytest

from gateway.measures import MOST_KEPT, Reporter
from servicekit.errors import Unavailable
from servicekit.measures import Measures
from tessera.serving.v1 import serving_pb2 as pb


class Serving:
    """Counts requests, as Serving does; `stored` is what a restart leaves of it."""

    def __init__(self) -> None:
        self.is_gone = False
        self.loses_answers = False
        self.received = self.stored = 0
        self.requests = self.stored_requests = 0

    async def report(self, message: pb.MeasuresReport) -> pb.MeasuresReceipt:
        if self.is_gone:
            raise Unavailable("gone")
        expected = max(self.received + 1, message.oldest_sequence)
        if message.sequence == expected:
            self.received = message.sequence
            self.requests += sum(entity.requests for entity in message.entities)
            expected += 1
        if self.loses_answers:
            raise Unavailable("lost")
        return pb.MeasuresReceipt(expected_sequence=expected, stored_sequence=self.stored)

    def store(self) -> None:
        self.stored, self.stored_requests = self.received, self.requests

    def restart(self) -> None:
        self.received, self.requests = self.stored, self.stored_requests


@pytest.fixture
def measures() -> Measures:
    return Measures()


def ask(measures: Measures, times: int = 1) -> None:
    for _ in range(times):
        with measures.began("e") as invocation:
            invocation.answered(200)


async def tell(reporter: Reporter, serving: Serving) -> None:
    try:
        await reporter.tell(serving.report)
    except Unavailable:
        assert serving.is_gone or serving.loses_answers


async def test_each_request_is_reported_once(measures: Measures) -> None:
    reporter, serving = Reporter(measures), Serving()
    for _ in range(3):
        ask(measures, 2)
        await tell(reporter, serving)
    assert serving.requests == 6
    await tell(reporter, serving)
    assert serving.requests == 6


async def test_report_whose_receipt_was_lost_is_counted_once(measures: Measures) -> None:
    reporter, serving = Reporter(measures), Serving()
    serving.loses_answers = True
    for _ in range(3):
        ask(measures)
        await tell(reporter, serving)
    serving.loses_answers = False
    await tell(reporter, serving)
    assert serving.requests == 3


async def test_what_a_restart_of_serving_forgot_is_reported_again(measures: Measures) -> None:
    reporter, serving = Reporter(measures), Serving()
    for number in range(1, 6):
        ask(measures)
        await tell(reporter, serving)
        if number == 2:
            serving.store()
    serving.restart()
    assert serving.requests == 2
    await tell(reporter, serving)  # nothing new to tell
    assert serving.requests == 5


async def test_nothing_is_lost_while_serving_is_gone_for_long(measures: Measures) -> None:
    reporter, serving = Reporter(measures), Serving()
    serving.is_gone = True
    for _ in range(3 * MOST_KEPT):
        ask(measures)
        await tell(reporter, serving)
    assert len(reporter._kept) == MOST_KEPT
    serving.is_gone = False
    await tell(reporter, serving)
    serving.store()
    await tell(reporter, serving)
    await tell(reporter, serving)
    assert serving.requests == 3 * MOST_KEPT


async def test_what_is_stored_is_not_kept(measures: Measures) -> None:
    reporter, serving = Reporter(measures), Serving()
    ask(measures)
    await tell(reporter, serving)
    assert len(reporter._kept) == 1
    serving.store()
    await tell(reporter, serving)
    assert len(reporter._kept) == 0


async def test_new_serving_without_a_memory_takes_what_there_is(measures: Measures) -> None:
    reporter, serving = Reporter(measures), Serving()
    for _ in range(3):
        ask(measures)
        await tell(reporter, serving)
        serving.store()
    ask(measures)
    other = Serving()
    await tell(reporter, other)
    assert other.requests == 2  # the third was not known to be stored
