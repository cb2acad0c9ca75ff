"""Which replica has which GPUs: given before its launch begins, taken back when no process of it is left.

The rule: what is given is recorded first, and goes with the replica's record at the latest. So a restart knows what the
replicas have that go on, and nothing is given twice, whoever was killed in between.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from servicekit.storage import Storage, StorageError
from serving_service import gpus, store
from serving_service.gpus import Machine
from serving_service.model import Endpoint, ServedEntity

log = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0


class GpusImpossible(Exception):
    """What was asked for cannot be had on this machine; the message says what helps."""


class GpusTaken(Exception):
    """There are as many as are needed, and others have them; the message says what helps."""


class GpuPool:
    """The GPUs of this machine, and who has them."""

    def __init__(self, database: Storage, machine: Machine) -> None:
        self._database = database
        self.machine = machine

    async def take(self, endpoint: Endpoint, entity: ServedEntity, replica_id: str) -> tuple[str, ...] | None:
        """The GPUs of a replica, which are its own from now on; none for those of another kind.

        None where there is no driver, so that nothing has to be said of GPUs. Raises GpusImpossible, GpusTaken, and
        StorageError.
        """
        count, total = gpus.needed(entity.workload_type), len(self.machine.devices)
        if count > total:
            raise GpusImpossible(
                f"A replica of {entity.workload_type} takes {_gpus(count)}, and this machine had {_gpus(total)} to give"
                " when Serving started, whose log says more. Update the endpoint to another workload_type."
            )
        if self.machine.has_driver and gpus.VISIBLE in entity.environment:
            raise GpusImpossible(
                f"{gpus.VISIBLE} belongs to the platform where there are GPUs. Update the endpoint without it."
            )
        if not count:
            return () if self.machine.has_driver else None
        taken, own = await self._database.write(
            store.take_gpus, replica_id, endpoint.id, devices=self.machine.devices, count=count
        )
        if taken is None:
            raise GpusTaken(_excuse(count, total, own))
        return taken

    async def give_back(self, replica_id: str) -> None:
        """Takes back what a replica had of which no process is left, or never was one; idempotent."""
        while self.machine.devices:
            try:
                await self._database.write(store.give_gpus_back, replica_id)
            except StorageError:
                log.warning("gpus cannot be taken back yet", extra={"replica": replica_id})
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                return

    async def holders(self) -> Mapping[str, tuple[str, ...]]:
        """Which GPUs each replica has that has any."""
        return await self._database.read(store.gpu_holders) if self.machine.devices else {}


def _excuse(count: int, total: int, own: int) -> str:
    """Why a replica that needs so many gets none; `own` are those that its endpoint has already."""
    problem = f"A replica takes {_gpus(count)}, and of the {total} of this machine too few are free."
    if own:
        return (
            f"{problem} The endpoint's own replicas have {own}, and keep them until an update is ready. Stop another"
            " endpoint that has some; or stop this one, then update it."
        )
    return f"{problem} Stop or delete an endpoint that has some."


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"
