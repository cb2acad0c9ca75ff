"""Serving's audit key: Secrets derives it, and hands it over when Serving starts. It is kept in memory alone."""

from __future__ import annotations

import asyncio

import grpc

from servicekit import channels
from servicekit.audit import Trail
from servicekit.audit_records import AuditKey
from servicekit.errors import ServiceError
from tessera.identity.v1 import audit_pb2 as pb
from tessera.identity.v1 import audit_pb2_grpc as rpc

TIMEOUT = 5.0
PAUSE = 0.5
"""Seconds until Secrets is asked again."""


async def follow(trail: Trail, channel: grpc.aio.Channel) -> None:
    """Asks Secrets for the key until it answers, and opens the trail; then nothing, until cancelled."""
    stub = rpc.AuditKeysStub(channel)
    while trail.key is None:
        try:
            answer = await channels.call(
                stub.GetKey, pb.GetAuditKeyRequest(), peer="Secrets", timeout=TIMEOUT, waiting_for=channel
            )
        except ServiceError:
            await asyncio.sleep(PAUSE)
        else:
            trail.open(AuditKey(answer.key))
    await asyncio.Event().wait()
