"""What launches did when: stored also where the database cannot be written for a while."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from servicekit.storage import StorageError
from serving_service import timeline as module
from serving_service.phases import LaunchEvent, LaunchPhase, Outcome
from serving_service.reconcile import Replica
from serving_service.timeline import Timeline
from tests.support.eventually import eventually


class FullAtFirst:
    """A database whose disk is full at the first write."""

    def __init__(self) -> None:
        self.writes = 0
        self.stored: list[LaunchEvent] = []

    async def write(self, *arguments: Any) -> None:
        self.writes += 1
        if self.writes == 1:
            raise StorageError
        self.stored += arguments[-1]


async def test_the_last_event_of_a_launch_is_stored_when_the_database_is_well_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    database: Any = FullAtFirst()
    launched: Any = SimpleNamespace(ended=lambda *_: None, phase_ended=lambda *_: None)
    timeline = Timeline("e", database, launched)
    timeline.enter(Replica(id="r", version=1, entity="m"), LaunchPhase.LOAD)
    timeline.end("r", Outcome.SUCCEEDED)
    job = asyncio.create_task(timeline.run())
    await eventually(lambda: bool(database.stored))
    assert [(event.phase, event.outcome) for event in database.stored] == [(LaunchPhase.LOAD, Outcome.SUCCEEDED)]
    assert timeline.unstored() == []
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
