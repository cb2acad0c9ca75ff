"""Storage that fails: what cannot be stored is refused, and a sync that fails ends the process for good (R20)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from servicekit import channels, database
from tessera.identity.v1 import identity_pb2
from tests.support.eventually import eventually
from tests.support.mortal import MortalService
from tests.support.mortal_secrets import Fault, mortal_secrets
from tests.support.secrets import Caller, data_directory, refusal, settings_for

WITHIN = 30.0
REFUSED = (grpc.StatusCode.UNAVAILABLE, "TEMPORARILY_UNAVAILABLE")


class Store:
    """Secrets as a process, the admin, and what was acknowledged."""

    def __init__(self, directory: Path, process: MortalService) -> None:
        self.directory = directory
        self.process = process
        self.admin: Caller
        self.values: dict[str, str] = {}

    async def start(self, **settings: float) -> None:
        """Starts it, after the one that may still live."""
        await self.process.kill()
        self.process.settings = settings
        await self.process.start()
        gateway = Caller(self.process.channel)
        token = settings_for(self.directory).admin_token.read_text().strip()
        request = identity_pb2.ExchangeTokenRequest(token=token)
        assertion = (await gateway(gateway.authority.ExchangeToken, request)).assertion
        self.admin = Caller(self.process.channel, (channels.ASSERTION, assertion))

    async def put(self, key: str) -> None:
        """Stores a value, and remembers that it was acknowledged."""
        value = f"{key}, {len(self.values)}"
        await self.admin.put("shop", key, value)
        self.values[key] = value

    async def require_all(self) -> None:
        """Fails unless everything is there that was acknowledged."""
        for key, value in self.values.items():
            assert await self.admin.get("shop", key) == value.encode()

    def log(self) -> str:
        return (self.directory / "log").read_text()


@pytest.fixture(scope="module")
async def nursed() -> AsyncIterator[Store]:
    """One that was started before, with a scope."""
    with data_directory() as directory:
        async with mortal_secrets(directory) as process:
            store = Store(directory, process)
            await store.start()
            await store.admin.create_scope("shop")
            yield store


@pytest.fixture
def store(nursed: Store) -> Iterator[Store]:
    yield nursed
    for name in ("fault", "log", "synced again"):
        (nursed.directory / name).unlink(missing_ok=True)


@pytest.mark.parametrize("of", ["a transaction", "a checkpoint", "an erasure", "a directory"])
async def test_sync_that_fails_ends_the_process_which_never_syncs_again(store: Store, of: str) -> None:
    await store.start(checkpoint_bytes=0 if of == "a checkpoint" else 1 << 30)
    for number in range(3):
        await store.put(f"k{number}")
    name = "secrets.db" if of in ("a checkpoint", "an erasure") else "secrets.db-wal"
    Fault("sync", name, "IOERR_DIR_FSYNC" if of == "a directory" else "IOERR_FSYNC").arm(store.directory)
    if of == "an erasure":
        del store.values["k0"]
        doomed = store.admin.delete("shop", "k0")
    else:
        doomed = store.admin.put("shop", "doomed", "x")
    assert (await refusal(doomed)).code is grpc.StatusCode.UNAVAILABLE
    await asyncio.wait_for(store.process.ended.wait(), WITHIN)
    assert os.waitstatus_to_exitcode(store.process.status) == database.STATUS_NOT_SYNCED
    assert "cannot be synced, so this process ends" in store.log()
    assert not (store.directory / "synced again").exists()
    Fault.disarm(store.directory)
    await store.start()
    await store.require_all()
    await store.put("after")
    await store.require_all()


async def test_start_whose_sync_fails_ends_the_same_way(store: Store) -> None:
    await store.start()
    await store.put("before")
    await store.process.kill()
    Fault("sync", "secrets.db", "IOERR_FSYNC").arm(store.directory)
    await store.process.start()  # which returns when it has ended, too
    assert store.process.ended.is_set()
    assert os.waitstatus_to_exitcode(store.process.status) == database.STATUS_NOT_SYNCED
    assert not (store.directory / "synced again").exists()
    Fault.disarm(store.directory)
    await store.start()
    await store.require_all()


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        ("FULL", "no room left for the database"),
        ("IOERR_WRITE", "the database's storage fails"),
        ("IOERR", "the database's storage fails"),
    ],
)
async def test_what_cannot_be_stored_is_refused_and_all_is_well_afterwards(
    store: Store, error: str, logged: str
) -> None:
    await store.start()
    for number in range(3):
        await store.put(f"k{number}")
    pid = store.process.pid
    Fault("write", "", error).arm(store.directory)
    for _ in range(3):
        # No value leaves that nobody can record, and that is said of each.
        for call in (store.admin.put("shop", "refused", "x"), store.admin.get("shop", "k0")):
            assert (await refusal(call)).answer[:2] == REFUSED
        assert {"k0", "k1", "k2"} <= set(await store.admin.keys("shop"))
    assert logged in store.log()
    Fault.disarm(store.directory)
    await eventually(lambda: _is_well(store), within=WITHIN)
    assert (await refusal(store.admin.get("shop", "refused"))).code is grpc.StatusCode.NOT_FOUND
    await store.require_all()
    assert store.process.pid == pid
    await store.start()
    await store.require_all()


async def _is_well(store: Store) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await store.put("after")
        return True
    return False
