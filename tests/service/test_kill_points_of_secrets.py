"""Secrets is killed at any moment of its work: what it acknowledged is there, and each change is whole or not at all
(R1, R2)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from servicekit import channels
from tessera.identity.v1 import identity_pb2
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.mortal import MortalService
from tests.support.mortal_secrets import mortal_secrets
from tests.support.secrets import Caller, data_directory, settings_for
from tests.support.seed import seeded

WITHIN = 60.0
WRITERS = 8
MOST_WRITES = 10
"""How many writes are acknowledged at the most before a kill."""
ASSERTION_SECONDS = 20.0
"""How long an assertion, which is good for a minute, is used for; also over restarts."""


class Store:
    """Secrets as a process, and its admin."""

    def __init__(self, directory: Path, process: MortalService) -> None:
        self.directory = directory
        self.process = process
        self.admin: Caller
        self._assertion = ""
        self._renewal = 0.0

    async def start(self) -> None:
        await self.process.start()
        if time.monotonic() >= self._renewal:
            gateway = Caller(self.process.channel)
            token = settings_for(self.directory).admin_token.read_text().strip()
            request = identity_pb2.ExchangeTokenRequest(token=token)
            self._assertion = (await gateway(gateway.authority.ExchangeToken, request)).assertion
            self._renewal = time.monotonic() + ASSERTION_SECONDS
        self.admin = Caller(self.process.channel, (channels.ASSERTION, self._assertion))

    def under(self, request_id: str) -> Caller:
        """The admin, with a request id of its own choice."""
        chosen = (channels.REQUEST_ID, request_id), (channels.CHOSEN, "true")
        return Caller(self.admin.channel, *self.admin.metadata, *chosen)

    def content(self) -> Mapping[str, Any]:
        """All rows but those of the audit log, which has records of refused and repeated calls, too."""
        with closing(sqlite3.connect(settings_for(self.directory).database)) as connection:
            tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
            return {
                table: connection.execute(f"SELECT * FROM {table}").fetchall()
                for table in tables
                if not table.startswith("audit")
            }


@pytest.fixture(scope="module")
async def store() -> AsyncIterator[Store]:
    with data_directory() as directory:
        async with mortal_secrets(directory) as process:
            running = Store(directory, process)
            await running.start()
            yield running


class Writer:
    """Puts one version after the other under a key of its own."""

    def __init__(self, number: int) -> None:
        self.key = f"k{number}"
        self.acknowledged = 0
        self.tried = 0

    async def write(self, store: Store, count: Callable[[], None]) -> None:
        """Looks what there is, and goes on from there until the service is gone."""
        try:
            await self.check(store)
            while True:
                self.tried += 1
                await store.admin.put("shop", self.key, f"{self.tried}")
                self.acknowledged = self.tried
                count()
        except grpc.aio.AioRpcError as error:
            # Anything else is said by a service that lives: that a key is not there, say.
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017 (one of several endings)

    async def check(self, store: Store) -> None:
        """Fails unless the newest value is the last that was acknowledged, or the one that nobody knows of."""
        if self.acknowledged:
            found = int(await store.admin.get("shop", self.key))
            assert found in (self.acknowledged, self.tried), (
                f"{self.key}: {self.acknowledged} is lost, there is {found}"
            )
            self.acknowledged = self.tried = found


@pytest.mark.parametrize("kills", [100, pytest.param(1_000, marks=pytest.mark.long)])
async def test_no_acknowledged_write_is_lost_when_the_process_is_killed(store: Store, kills: int) -> None:
    chance = seeded()
    await store.admin.create_scope("shop")
    writers = [Writer(number) for number in range(WRITERS)]
    for _ in range(kills):
        await one_life(store, writers, chance)
        await store.start()
    await asyncio.gather(*(writer.check(store) for writer in writers))
    assert sum(writer.acknowledged for writer in writers) > kills


async def one_life(store: Store, writers: list[Writer], chance: random.Random) -> None:
    """All write until so many writes are acknowledged as chance says; then the process is killed.

    Each looks first whether what it was told is stored survived the last kill; one that does not get to it before this
    kill has changed nothing, and looks in the next life.
    """
    left = itertools.count(chance.randrange(MOST_WRITES), -1)
    enough = asyncio.Event()

    def count() -> None:
        if next(left) <= 0:
            enough.set()

    writing = [asyncio.create_task(writer.write(store, count)) for writer in writers]
    await asyncio.wait_for(enough.wait(), WITHIN)
    await asyncio.sleep(chance.uniform(0, 0.003))  # the moment is the case, nothing is waited for
    await store.process.kill()
    async with asyncio.timeout(WITHIN):
        await asyncio.gather(*writing)


# --- at every step of a change ---


async def _a_scope(admin: Caller, name: str) -> None:
    await admin.create_scope(name)
    await admin.put(name, "key", "one")
    await admin.create_user(name)


Act = Callable[[Caller, str], Awaitable[object]]

CHANGES: dict[str, Act] = {
    "create a scope": lambda admin, name: admin.create_scope(f"{name}-new"),
    "put": lambda admin, name: admin.put(name, "key", "two"),
    "delete, which erases": lambda admin, name: admin.delete(name, "key"),
    "grant": lambda admin, name: admin.grant(name, name, pb.WRITE),
    "make a token": lambda admin, name: admin(admin.tokens.CreateToken, identity_pb2.CreateTokenRequest(comment=name)),
}


@pytest.mark.parametrize(
    "change",
    # What the others pass, these pass too.
    [pytest.param(each, marks=pytest.mark.long) if each in ("grant", "make a token") else each for each in CHANGES],
)
async def test_change_that_is_cut_short_is_whole_or_not_at_all(store: Store, change: str) -> None:
    act = CHANGES[change]
    deadly = {point for point in await points_of(store, act) if await proved(store, act, point)}
    assert {f"{side} {step}" for side in ("before", "after") for step in ("commit", "tell followers")} <= deadly


async def points_of(store: Store, act: Act) -> list[str]:
    """The points that a change passes, each once."""
    name = uuid.uuid4().hex
    await _a_scope(store.admin, name)
    await store.process.watch()
    await act(store.under(name), name)
    return list(dict.fromkeys(await store.process.passed()))


async def proved(store: Store, act: Act, point: str) -> bool:
    """Makes the change, which is cut short at the point, and looks at what is left of it after a start.

    Whether it was cut short: the work in the background passes points, too.
    """
    name = uuid.uuid4().hex
    await _a_scope(store.admin, name)
    before = store.content()
    await store.process.watch(point)
    is_answered = False
    with contextlib.suppress(grpc.aio.AioRpcError):
        await act(store.under(name), name)
        is_answered = True
    if is_answered:
        await store.process.kill()
    await asyncio.wait_for(store.process.ended.wait(), WITHIN)
    await store.start()
    left = store.content()
    await act(store.under(name), name)
    done = store.content()
    assert done != before, point
    # Nothing of it was there, or all of it with the answer to a retry, which then changed nothing.
    assert left in (before, done), point
    await act(store.under(name), name)
    assert store.content() == done, point
    return not is_answered
