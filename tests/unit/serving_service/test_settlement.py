"""Secrets hears what a predecessor left before anything is resolved, and of every end until it has heard it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from servicekit import channels, database
from servicekit.errors import Unavailable
from serving_service import app, settlement, store
from serving_service.environment import SecretReferences
from serving_service.model import ReplicaRecord
from serving_service.settlement import Settlement
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.builders import an_entity
from tests.support.eventually import eventually


class Secrets:
    """What was told to Secrets, which may be away."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, list[str]]] = []
        self.is_away = False

    async def call(self, method: Any, message: Any, **options: Any) -> Any:
        if self.is_away:
            raise Unavailable("away")
        if isinstance(message, pb.ResolveRequest):
            self.heard.append(("resolve", [message.replica_id]))
            return pb.ResolveResponse(values=[b"value"])
        if isinstance(message, pb.ReconcileRequest):
            self.heard.append(("keep", [*message.replica_ids, *(each.endpoint_id for each in message.endpoints)]))
        else:
            self.heard.append(("end", [*message.ended_replica_ids, *message.deleted_endpoint_ids]))
        return None


@pytest.fixture
async def secrets(monkeypatch: pytest.MonkeyPatch) -> Secrets:
    secrets = Secrets()
    monkeypatch.setattr(channels, "call", secrets.call)
    monkeypatch.setattr(settlement, "RETRY_SECONDS", 0.01)
    return secrets


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    async with channels.opened("unix:/nowhere") as channel:
        yield channel


@pytest.fixture
async def told(tmp_path: Path, channel: grpc.aio.Channel) -> AsyncIterator[Settlement]:
    """On a database that knows the replica `live`."""
    async with database.opened(tmp_path / "serving.db", app.MIGRATIONS) as opened:

        def add(connection: Any) -> None:
            connection.execute(
                "INSERT INTO endpoints (id, name, creator_id, creator, description, tags, created_at, updated_at,"
                " latest_version, config_update, failures, is_deleted)"
                " VALUES ('e', 'e', '1', 'a', '', '[]', 0, 0, 1, 'NOT_UPDATING', '{}', 0)"
            )
            store.add_replica(connection, ReplicaRecord("live", "e", 1, "one"))

        await opened.write(add)
        yield Settlement(channel, opened)


async def test_nothing_is_resolved_before_the_live_replicas_were_named(
    secrets: Secrets, told: Settlement, channel: grpc.aio.Channel
) -> None:
    entity = an_entity(environment={"A": "{{secrets/s/k}}"})
    references = SecretReferences(channel, told)
    secrets.is_away = True
    with pytest.raises(Unavailable):
        await references.resolve(entity, endpoint_id="e", version=1, replica_id="r1")
    secrets.is_away = False
    for replica_id in ("r1", "r2"):
        await references.resolve(entity, endpoint_id="e", version=1, replica_id=replica_id)
    assert secrets.heard == [("keep", ["live", "e"]), ("resolve", ["r1"]), ("resolve", ["r2"])]


async def test_ends_are_told_until_they_are_heard_and_then_no_more(secrets: Secrets, told: Settlement) -> None:
    secrets.is_away = True
    told.ended("r1")
    running = asyncio.create_task(told.run())
    try:
        told.ended("r2")
        secrets.is_away = False

        async def has_heard() -> bool:
            return len(secrets.heard) == 2

        await eventually(has_heard)
        assert secrets.heard == [("keep", ["live", "e"]), ("end", ["r1", "r2"])]
        told.ended("r3")
        told.deleted("e2")

        async def has_heard_more() -> bool:
            return len(secrets.heard) == 3

        await eventually(has_heard_more)
        assert secrets.heard[-1] == ("end", ["r3", "e2"])
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_ends_are_kept_back_while_they_are_held_and_told_afterwards(secrets: Secrets, told: Settlement) -> None:
    running = asyncio.create_task(told.run())
    try:
        async with told.held():
            assert secrets.heard == [("keep", ["live", "e"])]  # what is not named there may be forgotten at once
            told.ended("r1")
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(secrets.heard) == 1
        await eventually(lambda: secrets.heard[1:] == [("end", ["r1"])])
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_nothing_is_held_before_secrets_knows_what_there_is(secrets: Secrets, told: Settlement) -> None:
    secrets.is_away = True
    with pytest.raises(Unavailable):
        async with told.held():
            pytest.fail("Secrets may forget what is there")
