"""What Serving adds to a backup: database and audit log, the registry beside it, and which packages models led to.

Neither models nor environments: they are caches, and the registry and the locks say what belongs in them. Secrets must
not forget a grant that the copy still refers to before it has copied itself, so until then it hears of no end.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from servicekit import backups, database
from servicekit.audit_export import Exporter
from servicekit.backups import Copied, Copy
from servicekit.storage import Storage
from serving_service.settlement import Settlement

DATABASE = "serving.db"
REGISTRY = "registry.db"
LOCKS = "locks"


class ServingBackups:
    """Backups of a service that runs. `registry` is the embedded registry's file, None where another is used."""

    def __init__(
        self, opened: Storage, exporter: Exporter, settlement: Settlement, *, registry: Path | None, locks: Path
    ) -> None:
        self._database = opened
        self._exporter = exporter
        self._settlement = settlement
        self._registry = registry
        self._locks = locks

    @asynccontextmanager
    async def taken(self, directory: Path) -> AsyncIterator[Copy]:
        """Copies what there is now; until the context is left, everything that is granted stays granted."""
        async with self._settlement.held():
            files = await backups.with_audit_log(self._database, self._exporter, directory / DATABASE)
            # After the database: what an endpoint serves was registered before.
            if self._registry is not None and self._registry.exists():
                await asyncio.to_thread(database.copied, self._registry, directory / REGISTRY)
                files[REGISTRY] = Copied.of(directory / REGISTRY)
            files |= await asyncio.to_thread(self._copied_locks, directory / LOCKS)
            yield Copy(files, {"model_registry": "elsewhere" if self._registry is None else "embedded"})

    def _copied_locks(self, directory: Path) -> dict[str, Copied]:
        directory.mkdir(mode=0o700)
        for lock in sorted(self._locks.glob("*.txt")):
            with contextlib.suppress(FileNotFoundError):  # one that was not used for long may go meanwhile
                shutil.copyfile(lock, directory / lock.name)
        return {f"{LOCKS}/{copy.name}": Copied.of(copy) for copy in sorted(directory.iterdir())}
