"""The exporter: moves audit records from the database to files that are kept.

A record leaves the database when the file that has it was synced; whether a crash came in between, the next start sees
at the end of the file. The oldest files go when all are too large or too old, and the log says so before they do, so
that nobody can take them away unnoticed.

A file that cannot be written has values and changes refused until it can. A sync that fails ends the process: what it
left on the disk, nobody knows before the next start has read it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from servicekit import audit, audit_store
from servicekit.audit import Trail
from servicekit.audit_files import Diverged, FileSink, first_of
from servicekit.audit_records import EXPIRED
from servicekit.database import Database

LOOK_SECONDS = 0.5
"""How often the database is looked at."""

AT_ONCE = 2_000
"""Records that are moved together."""

MOST_UNEXPORTED = 1_000_000
"""Records that the database may hold; from there on nothing more is done that needs one."""


class Exporter:
    """Moves the records of a trail. `now` tells Unix seconds."""

    def __init__(
        self,
        trail: Trail,
        database: Database,
        sink: FileSink,
        *,
        now: Callable[[], float] = time.time,
        most_unexported: int = MOST_UNEXPORTED,
    ) -> None:
        self._trail = trail
        self._database = database
        self._sink = sink
        self._now = now
        self._most_unexported = most_unexported
        self._moving = asyncio.Lock()

    async def run(self) -> None:
        """Moves records until cancelled; what is left then is moved after the next start. Raises SyncFailed."""
        while True:
            async with self._moving:
                await self.move()
            await asyncio.sleep(LOOK_SECONDS)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[list[Path]]:
        """Moves nothing until the context is left: what is in the files, which it yields, and what is in the database
        are one log."""
        async with self._moving:
            yield await asyncio.to_thread(self._sink.files)

    async def move(self) -> None:
        """Moves what there is, and drops the files that are too old or too much."""
        try:
            self._look(await self._database.read(audit_store.backlog))
            while records := await self._database.read(audit_store.unexported, AT_ONCE):
                await asyncio.to_thread(self._sink.add, records)
                await self._database.write(audit_store.is_exported, records[-1][0])
            await self._expire()
            self._look(await self._database.read(audit_store.backlog))
        except OSError as error:
            self._trail.fails(audit.SINK, f"its files cannot be written: {error.strerror}")
        except Diverged as error:
            self._trail.fails(audit.SINK, f"its files cannot be continued, and have to be moved away: {error}")
        except sqlite3.Error:
            self._trail.fails(audit.SINK, "its database cannot be used")
        else:
            self._trail.works(audit.SINK)

    def _look(self, backlog: int) -> None:
        self._trail.backlog = backlog
        if backlog >= self._most_unexported:
            self._trail.fails(audit.BACKLOG, "too many records wait for the files")
        else:
            self._trail.works(audit.BACKLOG)

    async def _expire(self) -> None:
        going = await asyncio.to_thread(partial(self._sink.superfluous, self._now()))
        if not going or self._trail.key is None:
            return
        files = await asyncio.to_thread(self._sink.files)
        through = first_of(files[len(going)]) - 1
        await self._trail.event(EXPIRED, through=through)
        # The record is in the files, too, before what it speaks of is gone.
        records = await self._database.read(audit_store.unexported, AT_ONCE)
        await asyncio.to_thread(self._sink.add, records)
        await self._database.write(audit_store.is_exported, records[-1][0])
        for path in going:
            await asyncio.to_thread(path.unlink)
