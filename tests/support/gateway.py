"""A real gateway between scripted neighbours: an Authority that knows two tokens, a Serving that says what it is told,
and replicas that behave as they are called."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import jwt
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.descriptor import ServiceDescriptor

from gateway import app
from gateway.settings import GatewaySettings
from servicekit import grpc_server
from servicekit.context import Level, Principal, current
from servicekit.errors import Unavailable
from servicekit.identity import ALGORITHM, AssertionVerifier, InvalidToken, by_assertion, claims_of
from servicekit.sockets import socket_address, socket_directory
from tessera.identity.v1 import identity_pb2, permissions_pb2
from tessera.policy import POLICY
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.secrets import DRAIN_SECONDS

WORKSPACE_ID = "1234567890123456"
OWNER = Principal("11", "owner@example.com", frozenset({"users"}), "t1", None)
STRANGER = Principal("12", "stranger@example.com", frozenset({"users"}), "t2", None)
ADMIN = Principal("13", "admin", frozenset({"users", "admins"}), "t3", None)
BOUND = Principal("11", "owner@example.com", frozenset({"users"}), "t1", None, endpoint_id="id-churn")
TOKENS = {"owner-token": OWNER, "stranger-token": STRANGER, "admin-token": ADMIN, "bound-token": BOUND}
CLIENT = ("the-client", "the-secret")

Application = Callable[[Any, Any, Any], Awaitable[None]]


class ScriptedAuthority:
    """Knows the tokens and the client above, forgets those in `revoked`, and does not answer while it `is_gone`.

    What it was asked to issue is in `issued`.
    """

    def __init__(self) -> None:
        self.exchanges = 0
        self.tokens = dict(TOKENS)
        self.issued: list[Any] = []
        self.is_gone = False
        self.revoked: set[str] = set()
        self._key = Ed25519PrivateKey.generate()

    async def ExchangeToken(self, request: Any, context: Any) -> Any:
        self.exchanges += 1
        if self.is_gone:
            raise Unavailable("gone")
        principal = self.tokens.get(request.token)
        if principal is None or request.token in self.revoked:
            raise InvalidToken
        claims = claims_of(principal, issued_at=time.time())
        return identity_pb2.ExchangeTokenResponse(
            assertion=jwt.encode(claims, self._key, algorithm=ALGORITHM, headers={"kid": "k1"})
        )

    async def IssueToken(self, request: Any, context: Any) -> Any:
        self.issued.append(request)
        if self.is_gone:
            raise Unavailable("gone", retry_after=1)
        if (request.client.client_id, request.client.client_secret) != CLIENT and request.assertion not in TOKENS:
            raise InvalidToken
        return identity_pb2.IssueTokenResponse(access_token="issued", expires_in=3600)

    async def GetPlatform(self, request: Any, context: Any) -> Any:
        raw = self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return identity_pb2.GetPlatformResponse(
            workspace_id=WORKSPACE_ID, keys=[identity_pb2.VerificationKey(key_id="k1", public_key=raw)]
        )

    async def public_keys(self) -> dict[str, Any]:
        return {"k1": self._key.public_key()}


class ScriptedServing:
    """Sends the tables it is given, and keeps what the gateway reports; `gate` holds other answers back while clear."""

    def __init__(self) -> None:
        self.endpoints: dict[str, pb.EndpointRoutes] = {}
        self.revision = 0
        self.acknowledged = 0
        self.reports: list[pb.RouteReport] = []
        self.reported = asyncio.Condition()
        self.measures: list[pb.MeasuresReport] = []
        self.seen: list[tuple[str, str | None]] = []
        self.chosen_ids: list[str | None] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._streams: set[asyncio.Queue[pb.RouteTable | None]] = set()

    async def Watch(self, requests: Any, context: Any) -> AsyncIterator[pb.RouteTable]:
        queue: asyncio.Queue[pb.RouteTable | None] = asyncio.Queue()
        self._streams.add(queue)
        self.revision += 1
        yield pb.RouteTable(revision=self.revision, complete=True, endpoints=list(self.endpoints.values()))
        reader = asyncio.create_task(self._read(requests))
        try:
            while (table := await queue.get()) is not None:
                yield table
        finally:
            self._streams.discard(queue)
            reader.cancel()

    async def _read(self, requests: Any) -> None:
        async for report in requests:
            async with self.reported:
                self.reports.append(report)
                self.acknowledged = report.acknowledged_revision
                self.reported.notify_all()

    async def Report(self, request: pb.MeasuresReport, context: Any) -> pb.MeasuresReceipt:
        self.measures.append(request)
        return pb.MeasuresReceipt(expected_sequence=request.sequence + 1, stored_sequence=request.sequence)

    def __getattr__(self, name: str) -> Any:
        async def refuse(request: Any, context: Any) -> Any:
            request_context = current()
            assert request_context is not None
            self.seen.append((name, request_context.caller.name if request_context.caller else None))
            self.chosen_ids.append(request_context.request_id if request_context.may_be_repeated else None)
            await self.gate.wait()
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "canary text of a foreign server")

        return refuse

    async def publish(self, *endpoints: pb.EndpointRoutes, removed: tuple[str, ...] = ()) -> None:
        """Sends a change and returns when the gateway follows it."""
        for endpoint in endpoints:
            self.endpoints[endpoint.endpoint_id] = endpoint
        for endpoint_id in removed:
            self.endpoints.pop(endpoint_id, None)
        self.revision += 1
        table = pb.RouteTable(revision=self.revision, endpoints=endpoints, removed_endpoint_ids=removed)
        for queue in self._streams:
            queue.put_nowait(table)
        await self.until(lambda: self.acknowledged >= table.revision)

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Waits until the reports make `is_true` true."""
        async with asyncio.timeout(30), self.reported:
            await self.reported.wait_for(is_true)

    def hang_up(self) -> None:
        """Ends every stream."""
        for queue in self._streams:
            queue.put_nowait(None)


class ScriptedAccess:
    """Says what is `granted`, by endpoint and principal id; says nothing at all while it `is_silent`."""

    def __init__(self) -> None:
        self.granted: dict[str, dict[str, Level]] = {}
        self.is_silent = False
        self.revision = 0
        self.acknowledged = asyncio.Condition()
        self._streams: set[asyncio.Queue[permissions_pb2.AccessChanges | None]] = set()
        self._followed = 0

    async def Watch(self, requests: Any, context: Any) -> AsyncIterator[permissions_pb2.AccessChanges]:
        queue: asyncio.Queue[permissions_pb2.AccessChanges | None] = asyncio.Queue()
        self._streams.add(queue)
        self.revision += 1
        queue.put_nowait(
            permissions_pb2.AccessChanges(
                revision=self.revision, complete=True, endpoints=self._endpoints(self.granted)
            )
        )
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                try:
                    async with asyncio.timeout(0.5):
                        changes = await queue.get()
                except TimeoutError:
                    changes = permissions_pb2.AccessChanges(revision=self.revision)
                if changes is None:
                    return
                if not self.is_silent:
                    yield changes
        finally:
            self._streams.discard(queue)
            reader.cancel()

    async def change(self, granted: dict[str, dict[str, Level]] | None = None, **changes: Any) -> None:
        """Sends what is granted now on some endpoints, and other fields of a change; returns when it is followed."""
        self.granted |= granted or {}
        self.revision += 1
        message = permissions_pb2.AccessChanges(
            revision=self.revision, endpoints=self._endpoints(granted or {}), **changes
        )
        for queue in self._streams:
            queue.put_nowait(message)
        await self.until_followed(message.revision)

    async def until_followed(self, revision: int = 1) -> None:
        async with asyncio.timeout(30), self.acknowledged:
            await self.acknowledged.wait_for(lambda: self._followed >= revision)

    def hang_up(self) -> None:
        """Ends every stream."""
        for queue in self._streams:
            queue.put_nowait(None)

    def _endpoints(self, granted: dict[str, dict[str, Level]]) -> list[permissions_pb2.EndpointAccess]:
        return [
            permissions_pb2.EndpointAccess(
                endpoint_id=endpoint_id,
                grants=[
                    permissions_pb2.PrincipalAccess(
                        principal_id=principal_id, level=permissions_pb2.PermissionLevel.Value(level.name)
                    )
                    for principal_id, level in levels.items()
                ],
            )
            for endpoint_id, levels in granted.items()
        ]

    async def _read(self, requests: Any) -> None:
        async for report in requests:
            async with self.acknowledged:
                self._followed = report.acknowledged_revision
                self.acknowledged.notify_all()


def routes(name: str, *entities: tuple[str, int, list[tuple[str, str]]]) -> pb.EndpointRoutes:
    """The routes of endpoint `name` (its id is `id-<name>`): entities as (name, share, [(replica id, address)])."""
    return pb.EndpointRoutes(
        endpoint_id=f"id-{name}",
        name=name,
        entities=[
            pb.EntityRoutes(
                name=entity,
                entity_version="1",
                traffic_percentage=percentage,
                replicas=[pb.ReplicaRoute(replica_id=one, address=address) for one, address in replicas],
            )
            for entity, percentage, replicas in entities
        ],
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_accepting = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.is_accepting.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the tests."""
        yield


@asynccontextmanager
async def replica(directory: Path, application: Application) -> AsyncIterator[str]:
    """Serves an ASGI application as a replica would, and yields its address."""
    path = Path(tempfile.mkdtemp(dir=directory)) / "http.sock"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen(64)
    config = uvicorn.Config(application, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=1)
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    await server.is_accepting.wait()
    try:
        yield f"unix:{path}"
    finally:
        server.should_exit = True
        await task
        listening.close()


@dataclass
class Platform:
    """A gateway with its neighbours."""

    url: str
    directory: Path
    authority: ScriptedAuthority
    serving: ScriptedServing
    access: ScriptedAccess
    stack: AsyncExitStack = field(repr=False)

    async def publish(self, endpoint: pb.EndpointRoutes) -> None:
        """Has the gateway know an endpoint, with which OWNER may do everything."""
        await self.access.change({endpoint.endpoint_id: {OWNER.id: Level.CAN_MANAGE}})
        await self.serving.publish(endpoint)

    async def add_replica(self, application: Application) -> str:
        """Starts a replica that lives as long as the platform; returns its address."""
        return await self.stack.enter_async_context(replica(self.directory, application))


@asynccontextmanager
async def neighbours(
    directory: Path,
    authority: ScriptedAuthority,
    serving: ScriptedServing,
    access: ScriptedAccess,
    *,
    only: tuple[str, ...] = ("secrets", "serving"),
) -> AsyncIterator[None]:
    """The scripted services, on the sockets where a gateway of that data directory looks for them."""
    identify = by_assertion(AssertionVerifier(authority.public_keys))
    services: dict[str, list[tuple[ServiceDescriptor, object]]] = {
        "secrets": [
            (identity_pb2.DESCRIPTOR.services_by_name["Authority"], authority),
            (permissions_pb2.DESCRIPTOR.services_by_name["AccessFeed"], access),
        ],
        "serving": [
            (pb.DESCRIPTOR.services_by_name["Routes"], serving),
            (pb.DESCRIPTOR.services_by_name["Metering"], serving),
            (pb.DESCRIPTOR.services_by_name["ServingEndpoints"], serving),
        ],
    }
    async with AsyncExitStack() as stack:
        for name in only:
            address = socket_address(socket_directory(directory), callee=name, caller="gateway")
            listener = grpc_server.Listener(address=address, identify=identify, peer="gateway")
            await stack.enter_async_context(
                grpc_server.serving(
                    [listener],
                    services=services[name],
                    table=POLICY,
                    readiness={},
                    message_limit=1 << 20,
                    limits=grpc_server.CallLimits(calls=0, changes=0),
                    drain_seconds=DRAIN_SECONDS,
                )
            )
        yield


@asynccontextmanager
async def platform(**settings: Any) -> AsyncIterator[Platform]:
    """A gateway with scripted neighbours, on a free port."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="t-", dir="/tmp")))
        authority, serving, access = ScriptedAuthority(), ScriptedServing(), ScriptedAccess()
        await stack.enter_async_context(neighbours(directory, authority, serving, access))
        configured = GatewaySettings(
            **{
                "data_dir": directory,
                "listen": "127.0.0.1:0",
                "failed_logins": 0,
                "drain_seconds": DRAIN_SECONDS,
                **settings,
            }
        )
        url = await stack.enter_async_context(app.running(configured))
        await serving.until(lambda: serving.acknowledged > 0)
        await access.until_followed()
        yield Platform(url, directory, authority, serving, access, stack)
