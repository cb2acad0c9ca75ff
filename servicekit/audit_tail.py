"""Reads an audit log back: its files, and behind them the records that are in no file yet."""

from __future__ import annotations

import asyncio
from itertools import islice, zip_longest
from pathlib import Path

from servicekit import audit_store
from servicekit.audit_files import FileSink, first_of
from servicekit.storage import Storage

MOST_RECORDS = 1_000
MOST_BYTES = 512 * 1024
"""Of one answer; a single record that is longer is an answer by itself."""

Record = tuple[int, str]
"""Its number, and its line."""


class AuditTail:
    """The log of one service."""

    def __init__(self, database: Storage, sink: FileSink) -> None:
        self._database = database
        self._sink = sink

    async def newest(self, count: int) -> list[Record]:
        """The last records, the oldest of them first; fewer than `count` where they are long."""
        head = await self._database.read(audit_store.head)
        return _fitting(await self._from(max(head.seq - count, 0), count), newest=True)

    async def after(self, seq: int, count: int) -> list[Record]:
        """The records behind number `seq` that there still are, the oldest first."""
        return _fitting(await self._from(seq, count), newest=False)

    async def _from(self, seq: int, count: int) -> list[Record]:
        # The database first: what is moved to a file in the meantime is found there, and nowhere is a gap.
        waiting = await self._database.read(audit_store.after, seq, count)
        until = waiting[0][0] if waiting else None
        filed = await asyncio.to_thread(_filed, self._sink.files(), seq, count, until)
        return [*filed, *waiting][:count]


def _filed(files: list[Path], seq: int, count: int, until: int | None) -> list[Record]:
    """Records of the files behind number `seq`, and before number `until` where that is said."""
    found: list[Record] = []
    for path, following in zip_longest(files, files[1:]):
        if following is not None and first_of(following) <= seq + 1:
            continue
        first = first_of(path)
        try:
            file = path.open("rb")
        except FileNotFoundError:  # it expired meanwhile, which stands in the log, and what is older did before
            found.clear()
            continue
        with file:
            for number, raw in enumerate(islice(file, max(seq + 1 - first, 0), None), start=max(seq + 1, first)):
                if len(found) == count or number == until or not raw.endswith(b"\n"):
                    return found
                found.append((number, raw[:-1].decode("ascii", "replace")))
    return found


def _fitting(records: list[Record], *, newest: bool) -> list[Record]:
    """As many of the records as fit into an answer, from the one end or the other; one at least."""
    total = 0
    for taken, (_, text) in enumerate(reversed(records) if newest else records):
        total += len(text)
        if taken and total > MOST_BYTES:
            return records[-taken:] if newest else records[:taken]
    return records
