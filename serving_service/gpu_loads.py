"""How busy the GPUs of replicas are, as the driver says.

A GPU is one replica's alone, so what runs on it is that replica's. The driver is not asked while no replica has a GPU,
and left alone for a while when it does not answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from servicekit.storage import StorageError
from serving_service import nvidia_smi
from serving_service.gpu_pool import GpuPool
from serving_service.nvidia_smi import DriverError, Load

log = logging.getLogger(__name__)

PAUSE_SECONDS = 300.0
"""For which a driver is not asked that did not answer."""


class GpuLoads:
    """The loads of the GPUs that replicas have.

    `program` is asked, `pool` says who has which; `now` tells seconds on a clock that nobody can set.
    """

    def __init__(self, program: Path, pool: GpuPool, *, now: Callable[[], float] = time.monotonic) -> None:
        self._program = program
        self._pool = pool
        self._now = now
        self._not_before = 0.0

    async def look(self) -> Mapping[str, Load]:
        """How busy the GPUs of each replica are on average; nothing of those of which nothing is known."""
        try:
            holders = await self._pool.holders()
        except StorageError:
            log.warning("loads of gpus are not known", extra={"cause": "the database failed"})
            return {}
        if not holders or self._now() < self._not_before:
            return {}
        try:
            loads = await nvidia_smi.loads(self._program)
        except DriverError as error:
            log.warning("loads of gpus are not known", extra={"cause": str(error)})
            self._not_before = self._now() + PAUSE_SECONDS
            return {}
        return {
            replica_id: average([loads[device] for device in devices if device in loads])
            for replica_id, devices in holders.items()
        }


def average(loads: Iterable[Load]) -> Load:
    """The average of several GPUs, of those of which something is known."""
    known = list(loads)
    return Load(_mean(each.use for each in known), _mean(each.memory for each in known))


def _mean(shares: Iterable[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None
