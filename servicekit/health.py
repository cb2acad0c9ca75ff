"""Whether a service is well, told over `grpc.health.v1.Health` to whoever asks.

Two things are told: under the empty name whether it is ready to be asked, and as `live` whether it runs at all, which a
supervisor looks at before it starts it anew. That a database is gone, or the service about to end, is no reason to.

The rule: whoever watches and does not read keeps nobody else from hearing, or the service from ending. The servicer of
the library tells its watchers one after the other, and waits for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit.errors import NotFound

READY, LIVE = "", "live"
"""The names of services that can be asked about."""

_STATUS = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Not ready until it is told otherwise."""

    def __init__(self) -> None:
        self._is_ready = False
        self._is_over = False
        self._changed = asyncio.Event()

    def ready(self, is_ready: bool) -> None:
        """Says whether the service is ready; without effect on one that ends."""
        self._is_ready = is_ready and not self._is_over
        self._tell()

    def end(self) -> None:
        """Says that the service is about to end; whoever watches is told, and then no more."""
        self._is_over, self._is_ready = True, False
        self._tell()

    async def Check(self, request: Any, rpc: object) -> Any:
        """The status of one name; raises NotFound for any other."""
        if (status := self._status(request.service)) is None:
            raise NotFound("There is no such service. Ask about '' or 'live'.")
        return _STATUS(status=status)

    async def Watch(self, request: Any, rpc: object) -> AsyncIterator[Any]:
        """The status of one name, and each other one that it comes to have."""
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told or told is None:
                yield _STATUS(status=_STATUS.SERVICE_UNKNOWN if status is None else status)
                told = status
            if self._is_over:
                return
            await changed.wait()

    def _status(self, name: str) -> int | None:
        if name == LIVE:
            return int(_STATUS.SERVING)
        if name == READY:
            return int(_STATUS.SERVING if self._is_ready else _STATUS.NOT_SERVING)
        return None

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
