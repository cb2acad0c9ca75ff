"""Serving's audit key: Secrets derives it, and hands it over when Serving starts. It is kept in memory alone.

With a new store key comes a new audit key. Secrets tells the id of the one in use as often as it is asked, and the key
itself, which is recorded, only when it is another one.
"""

from __future__ import annotations

import asyncio
from functools import partial

import grpc

from servicekit import channels
from servicekit.audit import Trail
from servicekit.audit_records import AuditKey
from servicekit.errors import ServiceError
from tessera.identity.v1 import audit_pb2 as pb
from tessera.identity.v1 import audit_pb2_grpc as rpc
from tessera.identity.v1 import identity_pb2 as identity_pb
from tessera.identity.v1 import identity_pb2_grpc as identity_rpc

TIMEOUT = 5.0
PAUSE = 0.5
"""Seconds until Secrets is asked again when it did not answer."""

LOOK_SECONDS = 4.0
"""How often it is asked whether there is another key."""


async def follow(trail: Trail, channel: grpc.aio.Channel) -> None:
    """Opens the trail once Secrets tells the key, and goes on with each that comes after it, until cancelled."""
    call = partial(channels.call, peer="Secrets", timeout=TIMEOUT, waiting_for=channel)
    keys, authority = rpc.AuditKeysStub(channel), identity_rpc.AuthorityStub(channel)

    async def is_known() -> bool:
        if trail.key is None:
            return False
        platform = await call(authority.GetPlatform, identity_pb.GetPlatformRequest())
        return platform.serving_audit_key_id in ("", trail.key.id)  # "": a Secrets of before does not tell

    while True:
        try:
            if not await is_known():
                trail.open(AuditKey((await call(keys.GetKey, pb.GetAuditKeyRequest())).key))
            await asyncio.sleep(LOOK_SECONDS)
        except ServiceError:
            await asyncio.sleep(PAUSE)
