"""The exporter: moves audit records from the database to the files that are kept, and to whoever gets them besides.

A record leaves the database when the file that has it was synced, and when it was taken over; how far each of them is
stands in the database, and what a crash left out of that, the next start sees at the end of the file. The oldest files
go when all are too large or too old, and the log says so before they do, so that nobody can take them away unnoticed.

A file that cannot be written, and records that nobody takes over, have values and changes refused until that is mended.
A sync that fails ends the process: what it left on the disk, nobody knows before the next start has read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from servicekit import audit, audit_store
from servicekit.audit import Trail
from servicekit.audit_files import Diverged, FileSink, first_of, other_records
from servicekit.audit_forward import Forwarder
from servicekit.audit_records import EXPIRED, mac_of
from servicekit.storage import Connection, Storage, StorageError

log = logging.getLogger(__name__)

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
        database: Storage,
        sink: FileSink,
        forwarder: Forwarder | None = None,
        *,
        now: Callable[[], float] = time.time,
        most_unexported: int = MOST_UNEXPORTED,
    ) -> None:
        self._trail = trail
        self._database = database
        self._sink = sink
        self._forwarder = forwarder
        self._now = now
        self._most_unexported = most_unexported
        self._moving = asyncio.Lock()
        self._fits = False

    async def compare(self) -> None:
        """Looks whether files and database are one log, without moving anything.

        To be called before the first call is taken: where they are not, it has changes refused. `move` looks again.
        Records that are gone from the end of the files are warned of, and refuse nothing: older ones may go, these not.
        """
        with self._files_told_of():
            await self._compare()

    async def run(self) -> None:
        """Moves records until cancelled. Raises SyncFailed."""
        try:
            while True:
                async with self._moving:
                    await self.move()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            if self._forwarder is not None:
                self._forwarder.close()

    async def finish(self) -> None:
        """Has the files hold all that was recorded, up to the head that the trail told last; to be called after that.

        Where that is more than is moved at once, as after the files failed for a while, the next start does it.
        """
        with self._files_told_of():
            if self._fits and await self._database.read(audit_store.waiting) <= AT_ONCE:
                await self._file_all()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[list[Path]]:
        """Moves nothing until the context is left: what is in the files, which it yields, and what is in the database
        are one log."""
        async with self._moving:
            yield await asyncio.to_thread(self._sink.files)

    async def move(self) -> None:
        """Moves what there is, and drops the files that are too old or too much."""
        await self._look()
        await self._file()
        if self._forwarder is not None:
            await self._forward(self._forwarder)
        await self._look()

    async def _file(self) -> None:
        with self._files_told_of():
            if not self._fits:
                await self._compare()
            await self._file_all()
            await self._expire()

    @contextlib.contextmanager
    def _files_told_of(self) -> Iterator[None]:
        """Has changes refused when what is done with the files fails, and no more when it does not."""
        try:
            yield
        except OSError as error:
            self._trail.fails(audit.SINK, f"its files cannot be written: {error.strerror}")
        except Diverged as error:
            self._trail.fails(audit.SINK, f"its files cannot be continued, and have to be moved away: {error}")
        except StorageError:
            self._trail.fails(audit.SINK, "its database cannot be used")
        else:
            self._trail.works(audit.SINK)

    async def _compare(self) -> None:
        last, text = await asyncio.to_thread(self._sink.end)
        head = await self._database.read(audit_store.head)
        mac = await self._database.read(audit_store.mac_at, last)
        if last > head.seq or (mac and text and mac != mac_of(text)):
            self._sink.forget()
            raise other_records(last)
        exported = (await self._database.read(audit_store.progress)).exported
        self._fits = True
        if last < exported:
            log.warning("audit files lack records", extra={"first": last + 1, "last": exported})

    async def _file_all(self) -> None:
        at = (await self._database.read(audit_store.progress)).exported
        async for records in self._after(at):
            await asyncio.to_thread(self._sink.add, records)
            await self._database.write(self._is_exported, records[-1][0])

    async def _forward(self, forwarder: Forwarder) -> None:
        try:
            at = (await self._database.read(audit_store.progress)).forwarded
            async for records in self._after(at):
                await asyncio.to_thread(forwarder.take, records)
                await self._database.write(self._is_forwarded, records[-1][0])
        except OSError as error:
            self._trail.fails(audit.FORWARD, f"nobody takes its records over: {error.strerror or 'no answer'}")
        except StorageError:
            self._trail.fails(audit.FORWARD, "its database cannot be used")
        else:
            self._trail.works(audit.FORWARD)

    async def _after(self, at: int) -> AsyncIterator[list[tuple[int, str]]]:
        """The records behind one that are there now, some at a time.

        Those that come meanwhile wait for the next look: while each call leaves one, they would else be moved one by
        one without a pause, each time with two syncs and a transaction that calls wait for.
        """
        while records := await self._database.read(audit_store.after, at, AT_ONCE):
            yield records
            if len(records) < AT_ONCE:
                return
            at = records[-1][0]

    def _is_exported(self, connection: Connection, seq: int) -> None:
        audit_store.is_exported(connection, seq)
        audit_store.drop(connection, self._done(audit_store.progress(connection)))

    def _is_forwarded(self, connection: Connection, seq: int) -> None:
        audit_store.is_forwarded(connection, seq)
        audit_store.drop(connection, self._done(audit_store.progress(connection)))

    def _done(self, progress: audit_store.Progress) -> int:
        """Up to which record everybody has all of them."""
        return progress.exported if self._forwarder is None else min(progress.exported, progress.forwarded)

    async def _look(self) -> None:
        with contextlib.suppress(StorageError):  # whoever uses it next says so
            self._trail.backlog = await self._database.read(audit_store.waiting)
        if self._trail.backlog >= self._most_unexported:
            self._trail.fails(audit.BACKLOG, "too many records wait to be taken over")
        else:
            self._trail.works(audit.BACKLOG)

    async def _expire(self) -> None:
        going = await asyncio.to_thread(partial(self._sink.superfluous, self._now()))
        if not going or self._trail.key is None:
            return
        files = await asyncio.to_thread(self._sink.files)
        through = first_of(files[len(going)]) - 1
        await self._trail.event(EXPIRED, through=through)
        await self._file_all()  # the record is in the files, too, before what it speaks of is gone
        for path in going:
            await asyncio.to_thread(path.unlink)
