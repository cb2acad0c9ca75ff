"""Secrets as a process that dies where it is told to (`tests/support/mortal.py`), on a disk that can be told to fail.

The disk fails while there is a file `fault` in the data directory, which says how (`Fault`). What is synced after a
sync has failed is noted in the file `synced again`.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secrets_service import app
from secrets_service.feed import AccessFeed
from secrets_service.memory import RememberingDatabase
from servicekit import database, logs, sockets
from servicekit.database import Database
from tests.support import disk
from tests.support.disk import Disk
from tests.support.failpoints import Door, step_of, written
from tests.support.mortal import MortalService, mortal_service, nurse
from tests.support.secrets import settings_for

_writing: dict[int, bool] = {}
"""Whether the transaction of a connection writes."""


def _statement(args: Sequence[Any]) -> str | None:
    """Commits of what was written, and checkpoints."""
    connection, sql = id(args[0]), str(args[1])
    if sql.startswith("BEGIN"):
        _writing[connection] = sql == "BEGIN IMMEDIATE"
    if sql == "COMMIT" and _writing.get(connection):
        return "commit"
    return "checkpoint" if sql.startswith("PRAGMA wal_checkpoint") else None


DOORS = (
    Door(RememberingDatabase, "write", written),
    Door(RememberingDatabase, "destroy", written),
    Door(database.SqliteConnection, "execute", _statement),
    Door(Database, "erase", step_of("erase")),
    Door(AccessFeed, "followed", step_of("tell followers")),
    Door(os, "fsync", step_of("fsync")),
    Door(pathlib.Path, "replace", step_of("rename")),
    Door(pathlib.Path, "hardlink_to", step_of("link")),
)


@dataclass(frozen=True)
class Fault:
    """How the disk fails."""

    kind: str
    """As of `disk.Event`."""
    name: str
    """How the name of the file ends."""
    error: str
    """As of `disk.error`."""

    def arm(self, directory: Path) -> None:
        """Has the disk of a service fail from now on."""
        staged = directory / "fault.new"
        staged.write_text(json.dumps(asdict(self)))
        staged.replace(directory / "fault")

    @staticmethod
    def disarm(directory: Path) -> None:
        """Has it succeed again."""
        (directory / "fault").unlink()


def mortal_secrets(directory: Path, **settings: float) -> AbstractAsyncContextManager[MortalService]:
    """The service on a data directory, with these settings, not started yet, and killed in the end."""
    address = sockets.socket_address(settings_for(directory).sockets, callee="secrets", caller="gateway")
    return mortal_service("tests.support.mortal_secrets", directory, address, settings)


@asynccontextmanager
async def _living(changes: Mapping[str, Any]) -> AsyncIterator[None]:
    directory = Path(sys.argv[1])
    own = dict(changes)
    database.CHECKPOINT_BYTES = own.pop("checkpoint_bytes", database.CHECKPOINT_BYTES)
    sys.stderr = (directory / "log").open("a")
    logs.configure("secrets", "info")
    settings = settings_for(directory, tokens_per_minute=0, **own)
    with disk.installed(Disk(directory / "secrets", failing=_failing(directory))):
        async with app.running(settings):
            yield


def _failing(directory: Path) -> disk.Failing:
    has_failed = False

    def code(kind: str, name: str) -> int:
        nonlocal has_failed
        if kind == "sync" and has_failed:
            (directory / "synced again").write_text(name)
        try:
            fault = Fault(**json.loads((directory / "fault").read_text()))
        except FileNotFoundError:
            return 0
        if kind != fault.kind or not name.endswith(fault.name):
            return 0
        has_failed = kind == "sync"
        return disk.error(fault.error)

    return code


if __name__ == "__main__":
    nurse(_living, DOORS)
