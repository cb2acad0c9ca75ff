"""Copies of what a service keeps, handed to the operator of the machine while the service runs.

The rule: everything of a copy is of one moment, and nothing is remembered of it afterwards. It is made in a folder of
the service's own, whole before the first byte of it leaves; so it is made as fast as the disk allows, and a caller who
reads slowly keeps nobody waiting. What a killed process leaves there is gone with the next start.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servicekit.audit_export import Exporter
from servicekit.errors import BadRequest, Conflict, DeadlineExceeded
from servicekit.storage import Storage, StorageError
from tessera.backups.v1 import backups_pb2 as pb
from tessera.backups.v1 import backups_pb2_grpc as rpc

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 10.0
"""How long a caller waits for another one's copy, which may be that of one that is just gone."""

HELD_SECONDS = 600.0
"""How long a caller may take from the copy's being there to saying so: another service copies itself meanwhile."""

PART_BYTES = 256 * 1024

AUDIT = "audit"
"""The folder of audit logs in a backup."""


@dataclass(frozen=True)
class Copied:
    """A file of a copy; what it may have grown by since does not belong to it."""

    path: Path
    size: int

    @classmethod
    def of(cls, path: Path) -> Copied:
        """A file as it is now."""
        return cls(path, path.stat().st_size)


@dataclass(frozen=True)
class Copy:
    """What was copied."""

    files: Mapping[str, Copied]
    """By the name that each has in a backup."""
    facts: Mapping[str, str]
    """What else a restore has to know."""


Take = Callable[[Path], AbstractAsyncContextManager[Copy]]
"""Copies into an empty folder; the context is left when the caller has what else belongs to the same moment."""


async def with_audit_log(database: Storage, exporter: Exporter, copy: Path) -> dict[str, Copied]:
    """Copies a database, and the files of its audit log as they are at the same moment.

    Raises StorageError and OSError.
    """
    async with exporter.paused() as files:
        await database.copy(copy)
        folder = copy.parent / AUDIT
        log = await asyncio.to_thread(lambda: {f"{AUDIT}/{path.name}": _kept(path, folder) for path in files})
    return {copy.name: Copied.of(copy), **log}


def _kept(path: Path, folder: Path) -> Copied:
    """A file of a log, under a name of our own: it may grow, and go when it is old, but is never changed."""
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / path.name
    try:
        kept.hardlink_to(path)
    except OSError:  # on another file system
        shutil.copyfile(path, kept)
    return Copied.of(kept)


class BackupsServicer(rpc.BackupsServicer):
    """Hands out copies that `take` makes, one at a time, in a folder below `directory`."""

    def __init__(self, directory: Path, take: Take) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        self._directory = directory
        self._take = take
        self._one_at_a_time = asyncio.Lock()

    async def Copy(self, request_iterator: AsyncIterator[pb.CopyRequest], context: Any) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            await self._alone(stack)
            began = time.monotonic()
            try:
                self._directory.mkdir(mode=0o700, exist_ok=True)
                folder = stack.enter_context(tempfile.TemporaryDirectory(dir=self._directory))
                held = await stack.enter_async_context(AsyncExitStack())
                copy = await held.enter_async_context(self._take(Path(folder)))
            except (OSError, StorageError) as error:
                raise BadRequest(f"No copy can be made: {_cause(error)}.") from None
            files = [pb.CopiedFile(name=name, size=copied.size) for name, copied in copy.files.items()]
            yield pb.CopyResponse(snapshot=pb.Snapshot(files=files, facts=copy.facts))
            await _closed(request_iterator)
            await held.aclose()
            for copied in copy.files.values():
                async for part in _read(copied):
                    yield pb.CopyResponse(content=part)
            log.info(
                "copied for a backup",
                extra={
                    "files": len(files),
                    "bytes": sum(file.size for file in files),
                    "seconds": round(time.monotonic() - began, 3),
                },
            )

    async def _alone(self, stack: AsyncExitStack) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await stack.enter_async_context(self._one_at_a_time)
        except TimeoutError:
            raise Conflict("Another backup is being made; try again when it is done.") from None


async def _closed(requests: AsyncIterator[pb.CopyRequest]) -> None:
    try:
        async with asyncio.timeout(HELD_SECONDS):
            async for _ in requests:
                pass
    except TimeoutError:
        raise DeadlineExceeded("The caller did not go on within ten minutes of the copy.") from None


async def _read(copied: Copied) -> AsyncIterator[bytes]:
    left = copied.size
    with copied.path.open("rb") as file:
        while left:
            part = await asyncio.to_thread(file.read, min(left, PART_BYTES))
            if not part:
                raise BadRequest("What was copied is cut off.")
            left -= len(part)
            yield part


def _cause(error: OSError | StorageError) -> str:
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
