"""What replicas hold in Secrets: the versions of the secrets that they were started with.

Secrets records a hold when it hands out the values of a launch; that the launch has ended is said from here. The rule:
nothing is resolved before Secrets knows which replicas a predecessor of this process has left, so that what it forgets
by then can never be a launch of ours. Ends that cannot be told now are told later, or by the next start.
"""

from __future__ import annotations

import asyncio
import logging

import grpc

from servicekit import channels
from servicekit.database import Database
from servicekit.errors import ServiceError
from serving_service import store
from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc

log = logging.getLogger(__name__)

TELL_SECONDS = 5.0

RETRY_SECONDS = 1.0
"""Until Secrets is told again what it did not hear."""


class SecretHolds:
    """Tells Secrets which launches there are no more."""

    def __init__(self, channel: grpc.aio.Channel, database: Database) -> None:
        self._resolver = rpc.SecretResolverStub(channel)
        self._database = database
        self._reconciling = asyncio.Lock()
        self._is_reconciled = False
        self._ended: set[str] = set()
        self._woken = asyncio.Event()

    async def reconciled(self) -> None:
        """Returns when Secrets knows what a predecessor left; raises ServiceError when it does not answer."""
        async with self._reconciling:
            if self._is_reconciled:
                return
            live = [replica.id for replica in await self._database.read(store.all_replicas)]
            await channels.call(
                self._resolver.KeepLaunches,
                pb.KeepLaunchesRequest(replica_ids=live),
                peer="Secrets",
                timeout=TELL_SECONDS,
            )
            self._is_reconciled = True

    def ended(self, replica_id: str) -> None:
        """Has Secrets told that a launch has ended; also of one that it never heard of, and more than once."""
        self._ended.add(replica_id)
        self._woken.set()

    async def run(self) -> None:
        """Tells Secrets, now and whenever launches have ended, until cancelled."""
        while True:
            self._woken.clear()
            try:
                await self.reconciled()
                await self._tell()
            except ServiceError as error:
                log.debug("ends of launches are not told yet", extra={"reason": error.reason})
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await self._woken.wait()

    async def _tell(self) -> None:
        told = frozenset(self._ended)
        if told:
            await channels.call(
                self._resolver.EndLaunches,
                pb.EndLaunchesRequest(replica_ids=sorted(told)),
                peer="Secrets",
                timeout=TELL_SECONDS,
            )
            self._ended -= told
