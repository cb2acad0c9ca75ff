"""How the environment of each served entity came about at its latest launch: read while it does, and kept afterwards.

Kept for as long as the configuration is, whatever became of the launch and whether or not anything runs.
"""

from __future__ import annotations

import asyncio
import logging

from servicekit.storage import Storage, StorageError
from serving_service import store
from serving_service.model_environments import EnvironmentLog

log = logging.getLogger(__name__)


class BuildLogs:
    """The build logs of all served entities."""

    def __init__(self, database: Storage) -> None:
        self._database = database
        self._open: dict[tuple[str, int, str], EnvironmentLog] = {}
        self._writes: set[asyncio.Task[None]] = set()

    def begin(self, endpoint_id: str, version: int, entity: str) -> EnvironmentLog:
        """The log of a launch that begins, in place of the one before."""
        said = self._open[endpoint_id, version, entity] = EnvironmentLog()
        return said

    def end(self, endpoint_id: str, version: int, entity: str, said: EnvironmentLog) -> None:
        """Keeps the log of a launch whose environment is there or never will be; the launch does not wait for that."""
        said.is_over = True
        task = asyncio.create_task(self._keep(endpoint_id, version, entity, said), name="build log")
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _keep(self, endpoint_id: str, version: int, entity: str, said: EnvironmentLog) -> None:
        text = said.text()
        try:
            if await self._database.read(store.build_log, endpoint_id, version, entity) != text:
                await self._database.write(store.keep_build_log, endpoint_id, version, entity, text)
        except StorageError:
            log.warning("a build log cannot be kept", extra={"endpoint": endpoint_id, "entity": entity})
        if self._open.get((endpoint_id, version, entity)) is said:  # else that of another launch, which goes on
            del self._open[endpoint_id, version, entity]

    def opened(self, endpoint_id: str, version: int, entity: str) -> EnvironmentLog | None:
        """The log that is being written, or was a moment ago."""
        return self._open.get((endpoint_id, version, entity))

    async def text(self, endpoint_id: str, version: int, entity: str) -> str:
        """The log as it is now; empty before anything was said."""
        said = self._open.get((endpoint_id, version, entity))
        if said is not None:
            return said.text()
        return await self._database.read(store.build_log, endpoint_id, version, entity)
