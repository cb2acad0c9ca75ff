"""The storages that there are, each as the tests of the contract need it, and a process that has one open.

A second storage is a second entry of `STORAGES`; nothing of the tests changes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from servicekit import database
from servicekit.storage import Connection, Storage

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Kind:
    """A storage: how it is opened, what tables are made with, and how a copy is looked at."""

    opened: Callable[[Path, Path], AbstractAsyncContextManager[Storage]]
    """In a place, with a folder of migrations; statements may call `backwards`. Raises StartError."""
    schema: str
    looked_at: Callable[[Path], AbstractContextManager[Connection]]


def backwards(text: str) -> str:
    """A function of the service's own."""
    return text[::-1]


STORAGES = {
    "sqlite": Kind(
        opened=lambda place, migrations: database.opened(
            place / "shop.db", migrations, functions={"backwards": backwards}
        ),
        schema="""
            CREATE TABLE shops (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE) STRICT;
            CREATE TABLE items (
              shop_id INTEGER NOT NULL REFERENCES shops (id) ON DELETE CASCADE,
              name TEXT NOT NULL,
              pieces INTEGER NOT NULL CHECK (pieces >= 0),
              PRIMARY KEY (shop_id, name)
            ) STRICT;
            CREATE TABLE kept (number INTEGER, measure REAL, text TEXT, content BLOB) STRICT;
        """,
        looked_at=database.looked_at,
    )
}


async def _work(kind: str, place: str, migrations: str) -> None:
    """Opens a storage, and when told so, writes to it for ever, two rows at a time; says what is stored."""
    async with STORAGES[kind].opened(Path(place), Path(migrations)) as storage:
        _say("open")
        await asyncio.to_thread(sys.stdin.readline)
        for number in range(1_000_000):
            await storage.write(_put_pair, number)
            _say(str(number))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _put_pair(connection: Connection, number: int) -> None:
    connection.execute("INSERT INTO shops (name) VALUES (?)", (f"{number}-a",))
    connection.execute("INSERT INTO shops (name) VALUES (?)", (f"{number}-b",))


@asynccontextmanager
async def another_process(kind: str, place: Path, migrations: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that has the storage open, and is killed in the end."""
    command = (sys.executable, "-m", "tests.support.storages", kind, str(place), str(migrations))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"open\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


if __name__ == "__main__":
    asyncio.run(_work(*sys.argv[1:]))
