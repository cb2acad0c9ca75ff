"""What was read is used again until something is written, and not a moment longer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from secrets_service import memory
from secrets_service.feed import AccessFeed
from secrets_service.memory import RememberingDatabase
from secrets_service.model import AccessChange
from servicekit import database
from servicekit.storage import Connection
from tests.support.answers import plain_answers
from tests.support.eventually import eventually
from tests.support.half_way import HalfWay

SCRIPTS = """
CREATE TABLE t (name TEXT PRIMARY KEY, value INTEGER) STRICT;
INSERT INTO t VALUES ('a', 1), ('b', 1);
CREATE TABLE access_changes (kind TEXT, id TEXT);
"""


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[RememberingDatabase]:
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "0001_t.sql").write_text(SCRIPTS)
    async with database.opened(tmp_path / "t.db", tmp_path / "migrations") as opened:
        yield RememberingDatabase(opened, plain_answers(), AccessFeed())


class Reading:
    """A read that counts how often it went to the database, and can be held up after it has read."""

    def __init__(self) -> None:
        self.times = 0
        self.may_return = threading.Event()
        self.may_return.set()
        self.has_read = threading.Event()

    def __call__(self, connection: Connection, name: str) -> int | None:
        self.times += 1
        row = connection.execute("SELECT value FROM t WHERE name = ?", (name,)).fetchone()
        self.has_read.set()
        assert self.may_return.wait(10)
        return row[0] if row else None


def put(connection: Connection, value: int) -> None:
    connection.execute("UPDATE t SET value = ?", (value,))


async def test_read_is_made_once_until_something_is_written(opened: RememberingDatabase) -> None:
    reading = Reading()
    assert [await opened.remembered(reading, "a") for _ in range(3)] == [1, 1, 1]
    assert reading.times == 1
    assert await opened.remembered(reading, "b") == 1
    assert reading.times == 2
    await opened.write(put, 2)
    assert [await opened.remembered(reading, "a") for _ in range(3)] == [2, 2, 2]
    assert reading.times == 3


async def test_result_that_is_not_worth_it_is_not_remembered(opened: RememberingDatabase) -> None:
    reading = Reading()
    for _ in range(2):
        assert await opened.remembered(reading, "none", if_kept=lambda value: value is not None) is None
    assert reading.times == 2


async def test_memory_is_bounded(opened: RememberingDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CAPACITY", 2)
    reading = Reading()
    for name in ("a", "b", "a", "c", "a"):  # `b` was used longest ago when `c` came
        await opened.remembered(reading, name)
    assert reading.times == 3
    await opened.remembered(reading, "b")
    assert reading.times == 4


async def test_read_that_a_write_overtook_is_not_remembered(opened: RememberingDatabase) -> None:
    reading = Reading()
    reading.may_return.clear()
    under_way = asyncio.create_task(opened.remembered(reading, "a"))
    assert await asyncio.to_thread(reading.has_read.wait, 10)
    await opened.write(put, 2)
    reading.may_return.set()
    assert await under_way == 1  # as it was when it was read
    assert await opened.remembered(reading, "a") == 2


async def test_nothing_is_taken_from_memory_during_a_write(opened: RememberingDatabase) -> None:
    half_way = HalfWay()

    def slow(connection: Connection) -> None:
        put(connection, 2)
        half_way.stay()

    reading, late = Reading(), Reading()
    await opened.remembered(reading, "a")
    writing = asyncio.create_task(opened.write(slow))
    await half_way.reached()
    assert [await opened.remembered(reading, "a") for _ in range(2)] == [1, 1]
    assert reading.times == 3
    late.may_return.clear()
    under_way = asyncio.create_task(opened.remembered(late, "a"))
    assert await asyncio.to_thread(late.has_read.wait, 10)
    half_way.go_on()
    await writing
    assert await opened.read(reading, "a") == 2
    late.may_return.set()
    assert await under_way == 1  # read before the end of the write
    assert await opened.remembered(late, "a") == 2


async def test_what_was_read_together_is_remembered_apart_unless_a_write_came_between(
    opened: RememberingDatabase,
) -> None:
    reading = Reading()
    since = opened.mark()
    opened.remember(7, since, reading, "a")
    assert await opened.remembered(reading, "a") == opened.recalled(reading, "a") == 7
    assert opened.recalled(reading, "b") is None
    await opened.write(put, 2)
    assert not opened.is_unchanged(since)
    opened.remember(7, since, reading, "a")
    assert opened.recalled(reading, "a") is None
    assert await opened.remembered(reading, "a") == 2


async def test_nothing_that_is_read_during_a_write_is_of_one_state(opened: RememberingDatabase) -> None:
    half_way = HalfWay()

    def slow(connection: Connection) -> None:
        half_way.stay()

    before = opened.mark()
    writing = asyncio.create_task(opened.write(slow))
    await half_way.reached()
    during = opened.mark()
    assert not opened.is_unchanged(before)
    assert not opened.is_unchanged(during)
    half_way.go_on()
    await writing
    assert not opened.is_unchanged(during)
    assert opened.is_unchanged(opened.mark())


async def test_write_whose_caller_is_gone_still_counts(opened: RememberingDatabase) -> None:
    half_way = HalfWay()

    def slow(connection: Connection) -> None:
        half_way.stay()
        put(connection, 2)

    reading = Reading()
    writing = asyncio.create_task(opened.write(slow))
    await half_way.reached()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await opened.remembered(reading, "a") == 1
    half_way.go_on()

    async def is_written() -> bool:
        return await opened.read(Reading(), "a") == 2

    await eventually(is_written)
    assert await opened.remembered(reading, "a") == 2


async def test_change_of_a_right_is_told_also_when_nobody_waits_for_it_any_more(
    opened: RememberingDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_way = HalfWay()
    told: list[AccessChange] = []

    def publish(feed: AccessFeed, change: AccessChange) -> int:
        told.append(change)
        return 1

    monkeypatch.setattr(AccessFeed, "publish", publish)

    def slow(connection: Connection) -> None:
        half_way.stay()
        connection.execute("INSERT INTO access_changes VALUES ('token', 't1'), ('token', 't1')")

    writing = asyncio.create_task(opened.write(slow))
    await half_way.reached()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    half_way.go_on()
    await eventually(lambda: told == [AccessChange(tokens=frozenset({"t1"}))])
    await opened.write(put, 3)
    assert len(told) == 1  # it is told once


async def test_refused_write_raises_and_reads_go_on(opened: RememberingDatabase) -> None:
    def refused(connection: Connection) -> None:
        put(connection, 2)
        raise LookupError("refused")

    reading = Reading()
    with pytest.raises(LookupError):
        await opened.write(refused)
    assert [await opened.remembered(reading, "a") for _ in range(2)] == [1, 1]
    assert reading.times == 1


async def test_write_that_leaves_rights_alone_has_values_forgotten_and_nothing_else(
    opened: RememberingDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, value = Reading(), Reading()
    monkeypatch.setattr(memory, "RIGHTS", {right})
    await opened.remembered(right, "a")
    await opened.remembered(value, "a")
    since = opened.mark()

    def change(connection: Connection) -> tuple[bool, int]:
        put(connection, 2)
        return opened.has_same_rights(since), 0

    assert await opened.destroy(change, leaves_rights=True), "rights were not as they are remembered"
    assert not opened.is_unchanged(since)
    assert [await opened.remembered(each, "a") for each in (right, value)] == [1, 2]
    assert not await opened.destroy(change), "rights that may change were taken for what is remembered"
    assert [await opened.remembered(each, "a") for each in (right, value)] == [2, 2]
    assert not await opened.destroy(change, leaves_rights=True), "rights of before a change were used after it"


async def test_rights_are_not_used_in_a_transaction_behind_one_that_may_change_them(
    opened: RememberingDatabase,
) -> None:
    half_way = HalfWay()

    def slow(connection: Connection) -> None:
        half_way.stay()

    since = opened.mark()
    changing = asyncio.create_task(opened.write(slow))
    await half_way.reached()
    behind = asyncio.create_task(
        opened.destroy(lambda connection: (opened.has_same_rights(since), 0), leaves_rights=True)
    )
    await asyncio.sleep(0)
    half_way.go_on()
    await changing
    assert not await behind


async def test_reads_that_wait_are_made_together_and_fail_alone(
    opened: RememberingDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips = 0
    read = opened._database.read

    async def counted(*args: Any) -> Any:
        nonlocal trips
        trips += 1
        return await read(*args)

    monkeypatch.setattr(opened._database, "read", counted)
    first = Reading()
    first.may_return.clear()

    def damaged(connection: Connection, name: str) -> int:
        raise LookupError(name)

    async def all_of(*reads: Callable[[Connection, str], Any]) -> list[Any]:
        waiting = [asyncio.create_task(opened.remembered(each, "b")) for each in reads]
        await asyncio.sleep(0)
        return waiting

    (begun,) = await all_of(first)
    assert await asyncio.to_thread(first.has_read.wait, 10)
    waiting = await all_of(*(Reading() for _ in range(5)))
    waiting[0].cancel()
    first.may_return.set()
    assert await asyncio.gather(begun, *waiting[1:]) == [1] * 5
    assert trips == 2
    first.may_return.clear()
    (begun,) = await all_of(lambda connection, name: first(connection, name))
    failing = await all_of(Reading(), damaged, Reading())
    first.may_return.set()
    answers = await asyncio.gather(begun, *failing, return_exceptions=True)
    assert [answers[at] for at in (0, 1, 3)] == [1, 1, 1]
    assert isinstance(answers[2], LookupError)
    assert await opened.remembered(Reading(), "b") == 1
