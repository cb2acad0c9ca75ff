"""What Secrets has to hear of Serving, sooner or later: what there is, once, and then what is over.

A launch holds the versions of the secrets that it was started with, and a configuration is granted its references: both
end when we say so. The rule: nothing is granted or resolved before Secrets knows what a predecessor of this process has
left, so that what it forgets by then can never be ours. Ends that cannot be told now are told later, or by the next
start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from servicekit import channels
from servicekit.errors import ServiceError
from servicekit.storage import Storage
from serving_service import store
from serving_service.model import Endpoint
from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc

log = logging.getLogger(__name__)

TELL_SECONDS = 5.0

RETRY_SECONDS = 1.0
"""Until Secrets is told again what it did not hear."""


@dataclass
class _Over:
    """What Secrets was not told yet."""

    replicas: set[str] = field(default_factory=set)
    configs: set[tuple[str, int]] = field(default_factory=set)
    endpoints: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.replicas or self.configs or self.endpoints)


class Settlement:
    """Tells Secrets which launches, configurations and endpoints there are no more."""

    def __init__(self, channel: grpc.aio.Channel, database: Storage) -> None:
        self._channel = channel
        self._resolver = rpc.SecretResolverStub(channel)
        self._database = database
        self._reconciling = asyncio.Lock()
        self._is_reconciled = False
        self._over = _Over()
        self._woken = asyncio.Event()
        self._telling = asyncio.Lock()

    async def reconciled(self) -> None:
        """Returns when Secrets knows what a predecessor left; raises ServiceError when it does not answer."""
        if self._is_reconciled:
            return
        async with self._reconciling:
            if self._is_reconciled:
                return
            replicas = await self._database.read(store.all_replicas)
            endpoints = await self._database.read(store.all_endpoints, deleted=False)
            await channels.call(
                self._resolver.Reconcile,
                pb.ReconcileRequest(
                    replica_ids=[replica.id for replica in replicas], endpoints=map(_existing, endpoints)
                ),
                peer="Secrets",
                timeout=TELL_SECONDS,
                waiting_for=self._channel,
            )
            self._is_reconciled = True

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Keeps to itself what is over until the context is left, so that Secrets forgets nothing that is there now.

        Raises ServiceError when Secrets does not answer.
        """
        await self.reconciled()
        async with self._telling:
            yield

    def ended(self, replica_id: str) -> None:
        """Has Secrets told that a launch has ended; also of one that it never heard of, and more than once."""
        self._over.replicas.add(replica_id)
        self._woken.set()

    def dropped(self, endpoint_id: str, version: int) -> None:
        """Has Secrets told that a configuration is not going to be launched any more."""
        self._over.configs.add((endpoint_id, version))
        self._woken.set()

    def deleted(self, endpoint_id: str) -> None:
        """Has Secrets told that there is no such endpoint, and never will be again."""
        self._over.endpoints.add(endpoint_id)
        self._woken.set()

    async def run(self) -> None:
        """Tells Secrets, now and whenever something is over, until cancelled."""
        while True:
            self._woken.clear()
            try:
                await self.reconciled()
                async with self._telling:
                    await self._tell()
            except ServiceError as error:
                log.debug("ends are not told yet", extra={"reason": error.reason})
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await self._woken.wait()

    async def _tell(self) -> None:
        if not self._over:
            return
        told, self._over = self._over, _Over()
        try:
            await channels.call(
                self._resolver.Settle,
                pb.SettleRequest(
                    ended_replica_ids=sorted(told.replicas),
                    dropped_configs=[
                        pb.ConfigVersions(endpoint_id=endpoint_id, versions=[version])
                        for endpoint_id, version in sorted(told.configs)
                    ],
                    deleted_endpoint_ids=sorted(told.endpoints),
                ),
                peer="Secrets",
                timeout=TELL_SECONDS,
            )
        except ServiceError:
            self._over.replicas |= told.replicas
            self._over.configs |= told.configs
            self._over.endpoints |= told.endpoints
            raise


def _existing(endpoint: Endpoint) -> pb.ExistingEndpoint:
    configs = (endpoint.active, endpoint.pending)
    return pb.ExistingEndpoint(
        endpoint_id=endpoint.id,
        creator_id=endpoint.creator_id,
        versions=[config.version for config in configs if config is not None],
    )
