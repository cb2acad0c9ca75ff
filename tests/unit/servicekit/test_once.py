"""A change is made once and answered alike: what is recorded, for whom, for how long, and how much of it."""

from __future__ import annotations

import contextvars
import json
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import StringValue

from secrets_service.app import MIGRATIONS
from servicekit import context, once
from servicekit.context import Principal, RequestContext
from servicekit.database import SqliteConnection
from servicekit.errors import DataLoss, InvalidParameter
from servicekit.once import Answered, Answers
from servicekit.storage import Connection
from servicekit.warnings import warn
from tests.support.answers import plain_answers

T = TypeVar("T")

DAY = 24 * 3600
ADA, BEN = (Principal(one, "name", frozenset(), "t", None) for one in ("1000000000000001", "1000000000000002"))


@pytest.fixture
def connection() -> Iterator[Connection]:
    opened = sqlite3.connect(":memory:", isolation_level=None, factory=SqliteConnection)
    opened.execute("CREATE TABLE principals (id INTEGER PRIMARY KEY) STRICT")
    opened.executescript((MIGRATIONS / "0005_answers.sql").read_text())
    opened.execute("CREATE TABLE changes (text TEXT NOT NULL) STRICT")
    yield opened
    opened.close()


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def answers(clock: Clock) -> Answers:
    return plain_answers(clock)


def serving(
    function: Callable[[], T],
    request_id: str = "r-1",
    *,
    caller: Principal | None = ADA,
    message: Any = None,
    method: str = "/Shop/Sell",
    may_be_repeated: bool = True,
) -> T:
    """What `function` returns while it serves a request."""

    def serve() -> T:
        context.enter(RequestContext(request_id, caller, may_be_repeated=may_be_repeated))
        once.enter(method, StringValue() if message is None else message)
        return function()

    return contextvars.Context().run(serve)


def change(connection: Connection, text: str = "x") -> None:
    connection.execute("INSERT INTO changes VALUES (?)", (text,))


def changes(connection: Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM changes").fetchone()[0])


def recorded(connection: Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT request_id FROM answers ORDER BY id")]


def sell(answers: Answers, connection: Connection, request_id: str = "r-1", **request: Any) -> bytes | None:
    """Makes a change for a request; the first answer when there was one already."""
    try:
        serving(lambda: answers.once(connection, change), request_id, **request)
    except Answered as first:
        return first.answer
    return None


async def test_retry_changes_nothing_and_gives_the_first_answer(answers: Answers, connection: Connection) -> None:
    async def work(text: str) -> str:
        def function(connection: Connection) -> str:
            change(connection)
            warn("event", f"about {text}")
            return text

        return answers.once(connection, function)

    def serve(text: str) -> Any:
        """Runs the coroutine to its end: it waits for nothing."""
        asked = once.answer(work(text), lambda sold: StringValue(value=sold))
        try:
            asked.send(None)
        except StopIteration as stop:
            return stop.value
        raise AssertionError

    assert serving(lambda: serve("first")) == StringValue(value="first")
    with pytest.raises(Answered) as raised:
        serving(lambda: serve("second"))
    assert StringValue.FromString(raised.value.answer) == StringValue(value="first")
    assert raised.value.warnings == ["about first"]
    assert changes(connection) == 1


@pytest.mark.parametrize("request_", [{"may_be_repeated": False}, {"caller": None}])
def test_request_without_a_chosen_id_or_a_caller_is_not_recorded(
    answers: Answers, connection: Connection, request_: dict[str, Any]
) -> None:
    assert [sell(answers, connection, **request_) for _ in range(2)] == [None, None]
    assert (changes(connection), recorded(connection)) == (2, [])


def test_change_outside_of_a_request_is_just_made(answers: Answers, connection: Connection) -> None:
    contextvars.Context().run(answers.once, connection, change, text="y")
    contextvars.Context().run(answers.look, connection)
    assert (changes(connection), recorded(connection)) == (1, [])


def test_ids_belong_to_their_callers(answers: Answers, connection: Connection) -> None:
    assert sell(answers, connection, caller=ADA) is None
    assert sell(answers, connection, caller=BEN) is None
    assert sell(answers, connection, caller=BEN) == b""
    assert changes(connection) == 2


@pytest.mark.parametrize("other", [{"message": StringValue(value="other")}, {"method": "/Shop/Buy"}])
def test_id_of_another_request_is_refused(answers: Answers, connection: Connection, other: dict[str, Any]) -> None:
    sell(answers, connection)
    with pytest.raises(InvalidParameter, match="X-Tessera-Request-Id"):
        sell(answers, connection, **other)
    assert changes(connection) == 1


def test_method_and_message_are_told_apart(answers: Answers, connection: Connection) -> None:
    """Were they only joined, a part of one would pass for a part of the other."""
    sell(answers, connection, method="/Shop/Sell\n", message=StringValue())
    with pytest.raises(InvalidParameter):
        sell(answers, connection, method="/Shop/Sell", message=StringValue(value="\n"))


def test_same_message_is_the_same_in_whatever_order_it_was_filled(answers: Answers, connection: Connection) -> None:
    names = [f"name-{number}" for number in range(20)]
    for order in (names, names[::-1]):
        message = Struct()
        for name in order:
            message[name] = 1
        sell(answers, connection, message=message)
    assert changes(connection) == 1


def test_refused_change_is_not_recorded(answers: Answers, connection: Connection) -> None:
    def refuse(connection: Connection) -> None:
        raise DataLoss("no")

    with pytest.raises(DataLoss):
        serving(lambda: answers.once(connection, refuse))
    assert recorded(connection) == []
    assert sell(answers, connection) is None


def test_look_ahead_of_the_transaction_gives_the_answer_too(answers: Answers, connection: Connection) -> None:
    serving(lambda: answers.look(connection))
    sell(answers, connection)
    with pytest.raises(Answered):
        serving(lambda: answers.look(connection))
    with pytest.raises(InvalidParameter):
        serving(lambda: answers.look(connection), method="/Shop/Buy")


def test_answer_counts_for_a_day(answers: Answers, connection: Connection, clock: Clock) -> None:
    sell(answers, connection)
    clock.now += DAY - 1
    assert sell(answers, connection) == b""
    clock.now += 1
    assert sell(answers, connection) is None  # a retry did not make it younger
    assert sell(answers, connection) == b""
    assert (changes(connection), recorded(connection)) == (2, ["r-1"])


def test_old_records_go_with_new_ones_a_few_at_a_time(
    answers: Answers, connection: Connection, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once, "DROPPED_AT_ONCE", 2)
    for number in range(5):
        sell(answers, connection, f"old-{number}")
        clock.now += 1
    clock.now += DAY
    sell(answers, connection, "new-1", caller=BEN)
    assert recorded(connection) == ["old-2", "old-3", "old-4", "new-1"]
    sell(answers, connection, "new-2", caller=BEN)
    sell(answers, connection, "new-3", caller=BEN)
    assert recorded(connection) == ["new-1", "new-2", "new-3"]


def test_oldest_records_of_a_caller_go_when_they_are_too_many_bytes(
    answers: Answers, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    sell(answers, connection, "r-0", caller=BEN)
    size = connection.execute("SELECT length(record) FROM answers").fetchone()[0]
    monkeypatch.setattr(once, "MOST_BYTES", 3 * size)
    for number in range(1, 10):
        sell(answers, connection, f"r-{number}")
    assert recorded(connection) == ["r-0", "r-7", "r-8", "r-9"]
    assert sell(answers, connection, "r-9") == b""
    monkeypatch.setattr(once, "MOST_BYTES", size // 2)
    sell(answers, connection, "r-large")
    assert recorded(connection) == ["r-0", "r-large"]
    assert sell(answers, connection, "r-large") == b""


def test_result_that_nobody_made_into_a_message_is_a_bug_that_changes_nothing(
    answers: Answers, connection: Connection
) -> None:
    with pytest.raises(RuntimeError):
        serving(lambda: answers.once(connection, lambda connection: 7))
    assert recorded(connection) == []


def test_second_change_of_one_request_is_a_bug_and_no_retry(answers: Answers, connection: Connection) -> None:
    def twice() -> None:
        answers.once(connection, change)
        answers.once(connection, change)

    with pytest.raises(RuntimeError):
        serving(twice)
    assert changes(connection) == 1


def test_record_of_another_place_does_not_open(answers: Answers, connection: Connection) -> None:
    sell(answers, connection, caller=ADA)
    connection.execute("UPDATE answers SET principal_id = ?", (BEN.id,))
    with pytest.raises(DataLoss):
        sell(answers, connection, caller=BEN)


def test_answer_is_not_in_the_text_of_what_carries_it() -> None:
    carrier = Answered(b"canary", ["canary"])
    assert "canary" not in f"{carrier} {carrier!r}"


def test_record_has_a_head_of_one_line(answers: Answers, connection: Connection) -> None:
    def warned(connection: Connection) -> None:
        warn("event", "first line\nsecond line")

    serving(lambda: answers.once(connection, warned))
    head = connection.execute("SELECT record FROM answers").fetchone()[0].split(b"|", 1)[1].split(b"\n")[0]
    assert len(json.loads(head)) == 2
