"""Notices of ended updates: noted with the end, tried until they are taken, and dropped in the open."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from servicekit import background, database
from servicekit.database import Database
from servicekit.storage import Connection, StorageError
from serving_service import notices, store
from serving_service.app import MIGRATIONS
from serving_service.model import Deployment, Endpoint, EndpointConfig, EntityState, ModelVersion, Notice, ServedEntity
from serving_service.notices import NotTaken, NotTakenYet, Outbox
from tests.support.eventually import eventually

ADA, BOB = "ada@example.com", "bob@example.com"
TOLD = {"on_update_failure": [ADA, BOB], "on_update_success": [ADA]}
FAILED = {"churn": EntityState(Deployment.FAILED, "It raised.")}


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class ScriptedCourier:
    """Does with each notice what it was told to do for its recipient, at last takes it."""

    name = "scripted"

    def __init__(self, **failures: list[Exception]) -> None:
        self.failures = failures
        self.attempts: list[str] = []
        self.taken: list[Notice] = []

    def recipients(self, addresses: list[str]) -> list[str]:
        return addresses

    async def deliver(self, notice: Notice) -> None:
        self.attempts.append(notice.recipient)
        if failures := self.failures.get(notice.recipient.partition("@")[0]):
            raise failures.pop(0)
        self.taken.append(notice)


def an_endpoint() -> tuple[Endpoint, EndpointConfig]:
    entity = ServedEntity(
        name="churn",
        model=ModelVersion(name="model", version="3", source="s", created_at=1),
        environment={"KEY": "a value"},
        instance_profile_arn="",
        workload_size="Small",
        workload_type="CPU",
        scale_to_zero=False,
        min_concurrency=None,
        max_concurrency=None,
        creator="ada",
        created_at=1,
    )
    endpoint = Endpoint(
        id="e1",
        name="demo",
        creator_id="1",
        creator="ada",
        creator_kind="User",
        description="",
        tags=(),
        created_at=1,
        updated_at=1,
        email_notifications=TOLD,
    )
    return endpoint, EndpointConfig(version=2, created_at=1, entities=(entity,), routes=())


@asynccontextmanager
async def opened(tmp_path: Path) -> AsyncIterator[Database]:
    async with database.opened(tmp_path / "serving.db", MIGRATIONS) as found:
        endpoint, _ = an_endpoint()
        await found.write(store.reserve_endpoint, endpoint)
        await found.write(store.commit_endpoint, endpoint)
        yield found


async def noted(found: Database, outbox: Outbox, failures: dict[str, EntityState]) -> None:
    endpoint, config = an_endpoint()
    await found.write(outbox.note, endpoint, config, failures)
    outbox.noted()


async def waiting(found: Database) -> list[tuple[Any, ...]]:
    def read(connection: Connection) -> list[tuple[Any, ...]]:
        return connection.execute("SELECT recipient, attempts, due_at FROM notices ORDER BY rowid").fetchall()

    return await found.read(read)


async def test_each_is_told_of_what_they_asked_for_and_once(tmp_path: Path) -> None:
    courier = ScriptedCourier()
    async with opened(tmp_path) as found:
        outbox = Outbox(found, courier, now=Clock())
        async with background.running({"notices": outbox.run}):
            await noted(found, outbox, FAILED)
            await eventually(partial(_is_empty, found))
            await noted(found, outbox, {})
            await eventually(partial(_is_empty, found))
        assert courier.attempts == [ADA, BOB, ADA]
    failed, _, succeeded = (notice.content for notice in courier.taken)
    assert failed == {
        "event": "update_failed",
        "endpoint": "demo",
        "endpoint_id": "e1",
        "config_version": 2,
        "ended_at": 1_000_000_000,
        "served_entities": [{"name": "churn", "entity_name": "model", "entity_version": "3", "problem": "It raised."}],
    }
    assert succeeded["event"] == "update_succeeded"
    assert "problem" not in succeeded["served_entities"][0]


async def test_what_is_rolled_back_is_not_told(tmp_path: Path) -> None:
    async with opened(tmp_path) as found:
        outbox = Outbox(found, ScriptedCourier())

        def ends_badly(connection: Connection) -> None:
            outbox.note(connection, *an_endpoint(), FAILED)
            raise StorageError

        with pytest.raises(StorageError):
            await found.write(ends_badly)
        assert await waiting(found) == []


async def test_without_a_way_to_tell_nothing_is_noted(tmp_path: Path) -> None:
    async with opened(tmp_path) as found:
        outbox = Outbox(found)
        await noted(found, outbox, FAILED)
        assert not outbox.is_open
        assert await waiting(found) == []


async def test_one_who_is_refused_for_good_keeps_nobody_waiting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    courier = ScriptedCourier(ada=[NotTaken("refused with 550")])
    async with opened(tmp_path) as found:
        outbox = Outbox(found, courier)
        async with background.running({"notices": outbox.run}):
            await noted(found, outbox, FAILED)
            await eventually(partial(_is_empty, found))
        assert courier.attempts == [ADA, BOB]
        assert len(courier.taken) == 1
    assert "notice is dropped: it was refused" in caplog.messages
    assert ADA not in caplog.text


async def test_one_who_is_put_off_is_tried_again_while_others_are_told(tmp_path: Path) -> None:
    clock = Clock()
    courier = ScriptedCourier(ada=[NotTakenYet("450"), NotTakenYet("450")])
    async with opened(tmp_path) as found:
        outbox = Outbox(found, courier, now=clock)
        async with background.running({"notices": outbox.run}):
            await noted(found, outbox, FAILED)
            for attempts, pause in enumerate((notices.FIRST_PAUSE_SECONDS, 2 * notices.FIRST_PAUSE_SECONDS), 1):
                due_at = round((clock.now + pause) * 1000)
                await eventually(partial(_are_left, found, [(ADA, attempts, due_at)]))
                clock.now += pause
                outbox.noted()
            await eventually(partial(_is_empty, found))
        assert courier.attempts == [ADA, BOB, ADA, ADA]


async def test_when_nobody_takes_notices_one_attempt_is_made_for_all(tmp_path: Path) -> None:
    clock = Clock()
    courier = ScriptedCourier(ada=[ConnectionRefusedError()])
    async with opened(tmp_path) as found:
        outbox = Outbox(found, courier, now=clock)
        async with background.running({"notices": outbox.run}):
            await noted(found, outbox, FAILED)
            await eventually(partial(_is_not_due, found, clock))
            clock.now += notices.FIRST_PAUSE_SECONDS
            outbox.noted()
            await eventually(partial(_is_empty, found))
        assert sorted(courier.attempts) == [ADA, ADA, BOB]


async def test_what_could_not_be_delivered_for_a_day_is_dropped_in_the_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    courier = ScriptedCourier(ada=[OSError("gone")] * 10_000)
    async with opened(tmp_path) as found:
        outbox = Outbox(found, courier, now=clock)
        await noted(found, outbox, {})
        async with background.running({"notices": outbox.run}):
            while left := await waiting(found):
                clock.now = max(clock.now, left[0][2] / 1000)
                outbox.noted()
                await eventually(partial(_is_not_due, found, clock))
    assert "notice is dropped: it could not be delivered for a day" in caplog.messages
    assert 100 < len(courier.attempts) < 200


async def _is_not_due(found: Database, clock: Clock) -> bool:
    left = await waiting(found)
    return not left or left[0][2] / 1000 > clock.now


async def _is_empty(found: Database) -> bool:
    return await _are_left(found, [])


async def _are_left(found: Database, expected: list[tuple[Any, ...]]) -> bool:
    return await waiting(found) == expected


async def test_no_more_wait_than_there_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notices, "MOST_NOTICES", 3)
    async with opened(tmp_path) as found:
        outbox = Outbox(found, ScriptedCourier())
        for _ in range(3):
            await noted(found, outbox, FAILED)
        assert len(await waiting(found)) == 2
    assert caplog.messages.count("notices are dropped: too many wait") == 2


async def test_one_endpoint_leaves_room_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "MOST_OF_ONE", 3)
    async with opened(tmp_path) as found:
        outbox = Outbox(found, ScriptedCourier())
        for _ in range(3):
            await noted(found, outbox, FAILED)
        assert len(await waiting(found)) == 2
        endpoint, config = an_endpoint()
        other = replace(endpoint, id="e2", name="other")
        await found.write(store.reserve_endpoint, other)
        await found.write(outbox.note, other, config, FAILED)
        assert len(await waiting(found)) == 4


async def test_what_waits_for_a_courier_that_there_is_no_longer_is_dropped_after_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    async with opened(tmp_path) as found:
        await noted(found, Outbox(found, ScriptedCourier(), now=clock), FAILED)
        without = Outbox(found, now=clock)
        await without.clear()
        assert len(await waiting(found)) == 2
        clock.now += notices.KEPT_SECONDS + 1
        await without.clear()
        assert await waiting(found) == []
    assert "notices are dropped: nothing is set any more that delivers them" in caplog.messages


async def test_a_database_that_cannot_be_written_does_not_have_somebody_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notices, "UNREADABLE_SECONDS", 0.01)
    caplog.set_level(logging.WARNING)
    courier = ScriptedCourier()
    async with opened(tmp_path) as found:
        outbox = Outbox(found, courier)
        await noted(found, outbox, {})
        write, failures = found.write, [StorageError("full")] * 3

        async def failing(*arguments: Any, **named: Any) -> Any:
            if failures:
                raise failures.pop()
            return await write(*arguments, **named)

        monkeypatch.setattr(found, "write", failing)
        async with background.running({"notices": outbox.run}):
            await eventually(partial(_is_empty, found))
        assert courier.attempts == [ADA]
