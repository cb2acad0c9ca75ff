"""The part of Secrets that says who is calling, as a script: real gRPC, real assertions, and it can be made to fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from servicekit import channels
from servicekit.context import Principal
from servicekit.errors import PermissionDenied, ServiceError, to_status
from servicekit.identity import ALGORITHM, claims_of
from tessera.identity.v1 import identity_pb2 as pb
from tessera.identity.v1 import identity_pb2_grpc as rpc
from tests.support.sockets import short_directory

ADA = Principal("7", "ada@example.com", frozenset({"users"}), "t-ada", None)
GRACE = Principal("8", "grace@example.com", frozenset({"users", "admins"}), "t-grace", None)


@dataclass
class Signer:
    """A key of Secrets, and what is signed with it."""

    key_id: str = "k1"
    private: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate, repr=False)

    @property
    def public(self) -> Ed25519PublicKey:
        return self.private.public_key()

    @property
    def raw(self) -> bytes:
        return self.public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    def assertion(self, principal: Principal = ADA, **claims: Any) -> str:
        """A valid assertion about `principal`, but for the `claims` given; None leaves one out."""
        payload = claims_of(principal, issued_at=time.time()) | claims
        payload = {name: value for name, value in payload.items() if value is not None}
        return jwt.encode(payload, self.private, algorithm=ALGORITHM, headers={"kid": self.key_id})


class ScriptedAuthority(rpc.AuthorityServicer):
    """Knows the tokens in `tokens`; `failure` is what it answers instead, `gate` holds its answers back while clear."""

    def __init__(self) -> None:
        self.signer = Signer()
        self.tokens: dict[str, Principal] = {"ada-token": ADA, "grace-token": GRACE}
        self.failure: ServiceError | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.exchanges: list[str] = []
        self.key_fetches = 0

    async def ExchangeToken(self, request: pb.ExchangeTokenRequest, context: Any) -> pb.ExchangeTokenResponse:
        self.exchanges.append(request.token)
        principal = self.tokens.get(request.token)
        await self.gate.wait()
        await self._fail(context, self.failure)
        if principal is None:
            await self._fail(context, PermissionDenied("Invalid access token."))
        assert principal is not None
        return pb.ExchangeTokenResponse(assertion=self.signer.assertion(principal))

    async def IssueToken(self, request: pb.IssueTokenRequest, context: Any) -> pb.IssueTokenResponse:
        raise NotImplementedError

    async def GetPlatform(self, request: pb.GetPlatformRequest, context: Any) -> pb.GetPlatformResponse:
        self.key_fetches += 1
        await self._fail(context, self.failure)
        return pb.GetPlatformResponse(
            workspace_id="42", keys=[pb.VerificationKey(key_id=self.signer.key_id, public_key=self.signer.raw)]
        )

    async def RenewAdminToken(self, request: pb.RenewAdminTokenRequest, context: Any) -> pb.RenewAdminTokenResponse:
        raise NotImplementedError

    async def _fail(self, context: Any, error: ServiceError | None) -> None:
        if error is not None:
            await context.abort_with_status(to_status(error))


@asynccontextmanager
async def authority_server(authority: ScriptedAuthority) -> AsyncIterator[grpc.aio.Channel]:
    """Serves `authority` on a Unix socket, and yields a channel to it."""
    with short_directory() as directory:
        address = f"unix:{directory}/authority.sock"
        server = grpc.aio.server()
        rpc.add_AuthorityServicer_to_server(authority, server)
        server.add_insecure_port(address)
        await server.start()
        try:
            async with channels.opened(address) as channel:
                yield channel
        finally:
            authority.gate.set()
            await server.stop(0)
