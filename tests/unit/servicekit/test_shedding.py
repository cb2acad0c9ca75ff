"""When one more call is too many."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack

import pytest

from servicekit import shedding
from servicekit.shedding import ALWAYS_TAKEN, LAG_SECONDS, LATE_LOOKS, Lag, Overloaded, Room
from tests.support.eventually import eventually


def taken(room: Room, calls: int) -> ExitStack:
    """Has so many calls be under way."""
    stack = ExitStack()
    for _ in range(calls):
        stack.enter_context(room)
    return stack


def is_full(room: Room) -> bool:
    try:
        room.check()
    except Overloaded:
        return True
    return False


def test_as_many_as_there_is_room_for_and_none_more() -> None:
    room = Room("callers", 200, Lag())
    with taken(room, 199):
        assert not is_full(room)
        with room:
            assert is_full(room)
            with pytest.raises(Overloaded) as refused, room:
                pass
            assert (refused.value.reason, refused.value.retry_after) == ("REQUEST_LIMIT_EXCEEDED", 1)
        assert not is_full(room)


def test_a_place_is_given_back_whatever_happens() -> None:
    room = Room("callers", 1, Lag())
    for _ in range(3):
        with pytest.raises(ValueError, match="x"), room:
            raise ValueError("x")
    assert not is_full(room)


def test_without_a_limit_nothing_is_refused() -> None:
    lag = Lag()
    for _ in range(LATE_LOOKS):
        lag.looked(1.0)
    with taken(Room("any", 0, lag), 1_000) as _:
        pass


def test_only_a_lasting_lag_counts() -> None:
    lag = Lag()
    for _ in range(LATE_LOOKS - 1):
        lag.looked(LAG_SECONDS * 2)
    assert not lag.is_lasting
    lag.looked(60.0)
    assert lag.is_lasting
    lag.looked(LAG_SECONDS)
    assert not lag.is_lasting


def test_while_the_loop_is_late_little_is_taken_but_never_nothing() -> None:
    lag = Lag()
    room, narrow = Room("callers", 200, lag), Room("callers", 2, lag)
    for _ in range(LATE_LOOKS):
        lag.looked(0.2)
    with taken(room, ALWAYS_TAKEN - 1), taken(narrow, 1):
        assert not is_full(room)
        assert not is_full(narrow)
        with room, narrow:
            assert is_full(room)
            assert is_full(narrow)
            lag.looked(0.0)
            assert not is_full(room)


def test_the_log_is_told_when_it_begins_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    room = Room("callers", 4, Lag())
    with caplog.at_level(logging.INFO), taken(room, 4):
        for _ in range(100):
            assert is_full(room)
    said = [record.message for record in caplog.records]
    assert said == ["calls are refused: too many are under way", "calls are taken again"]


async def test_a_loop_that_is_kept_busy_is_found_late_and_then_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shedding, "LAG_SECONDS", 0.02)
    monkeypatch.setattr(shedding, "LATE_LOOKS", 3)
    lag = Lag()
    looking = asyncio.create_task(lag.run())
    is_busy = True

    async def keep_busy() -> None:
        while is_busy:
            time.sleep(0.15)  # noqa: ASYNC251 (the point of it)
            await asyncio.sleep(0)

    working = asyncio.create_task(keep_busy())
    await eventually(lambda: lag.is_lasting, within=60)
    is_busy = False
    monkeypatch.setattr(shedding, "LAG_SECONDS", 5.0)  # however busy the machine is
    await eventually(lambda: not lag.is_lasting, within=60)
    looking.cancel()
    await working
