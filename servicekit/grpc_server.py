"""A service's gRPC listeners: a public one, and one for each peer.

A listener is built from the policy: an RPC that may not be called there is not there. Requests to the public listener
carry tokens; on a peer's socket they carry assertions, and the RPCs that are internal to that peer exist too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from servicekit import background, channels, policy, tracing
from servicekit.audit import Trail
from servicekit.errors import LONGEST_MESSAGE, LONGEST_PEER_MESSAGE, ServiceError, StartError, to_status
from servicekit.exposure import is_read
from servicekit.failed_logins import FailedLogins
from servicekit.health import Health
from servicekit.identity import Identify
from servicekit.interceptors import LONGEST_DEADLINE, Method, RequestInterceptor, SourceOf
from servicekit.metrics import ServiceMetrics
from servicekit.pace import Pace
from servicekit.policy import Row
from servicekit.rpc_tracing import ServerTracing
from servicekit.shedding import Lag, Room
from servicekit.source import FORWARDED_FOR, FORWARDED_PROTO, Network, Source, grpc_peer, is_trusted, source
from servicekit.tls import Certificate

log = logging.getLogger(__name__)

READINESS_SECONDS = 0.9
"""How often readiness is looked at, and how long a check may take: both together are the 2 s within which it shows."""

MOST_RPCS = 2_000
"""How many RPCs of all kinds a listener has at the most, those included whose request is still on its way (of which
`interceptors.MOST_AWAITED` for each address)."""

LONGEST_REQUEST = 1 << 20
"""Bytes of a request that anybody may send, but for queries of models."""

CONNECTION_AGE_SECONDS = 1800.0
"""How long a connection takes new calls, give or take a tenth that gRPC adds, so that not all end at once."""

KEEPALIVE_SECONDS = 20.0
"""How often a client may ask whether we are there; ours do every `channels.KEEPALIVE_SECONDS`."""

STREAMS = 100
"""How many calls one connection may have at a time, in public."""

PEER_STREAMS = 1_000
"""The same of a peer, which has one connection for all that its callers ask: rooms decide what is too much."""

LONGEST_METADATA = 16 * 1024
"""Bytes of a call's metadata, as HTTP/2 counts them (32 for each field, and those of gRPC itself), in public."""

LONGEST_PEER_METADATA = channels.METADATA_LIMIT
"""The same of a peer, whose assertions name all groups of a caller."""

_OPTIONS = (
    # Without this two servers silently share a port.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", round(KEEPALIVE_SECONDS * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
)

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]

Check = Callable[[], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Where and for whom to listen."""

    address: str
    """`host:port` or `unix:/path`."""

    identify: Identify
    """How callers are known here."""

    peer: str | None = None
    """The one service that this listener is for; None: the public."""

    certificate: Certificate | None = None
    """What the listener proves itself with; None: no TLS."""

    trusted_proxies: Sequence[Network] = ()
    """Whose forwarding metadata is believed about where a call comes from."""

    failed_logins: FailedLogins = field(default_factory=lambda: FailedLogins(0))
    """Counts wrong credentials of the public."""

    reflection: bool = False
    """Whether callers may ask for descriptors."""


@dataclass(frozen=True, kw_only=True)
class CallLimits:
    """How much may be asked of a service; 0: any number."""

    calls: int
    """Calls at a time, of each kind and on each listener (`servicekit.shedding`)."""

    changes: int
    """Changes of one principal in a second, and twice as many at once."""

    longest: float = LONGEST_DEADLINE
    """Seconds that the longest call takes: so long it may go on when its connection takes no new ones."""


@asynccontextmanager
async def serving(
    listeners: Sequence[Listener],
    *,
    services: Sequence[tuple[ServiceDescriptor, object]],
    table: policy.Table,
    readiness: Mapping[str, Check],
    jobs: Mapping[str, Callable[[], Awaitable[None]]] | None = None,
    message_limit: int,
    limits: CallLimits,
    drain_seconds: float,
    metrics: ServiceMetrics | None = None,
    trail: Trail | None = None,
) -> AsyncIterator[list[str]]:
    """Listens until the context is left, then lets calls under way finish, within so many seconds.

    `services` pairs descriptors with servicers, `table` is the policy, `readiness` holds a check per dependency of our
    own (it raises when the dependency is not well), `jobs` runs beside the requests, `message_limit` is in bytes,
    `limits` says how much may be asked, and calls are counted in `metrics` and recorded in `trail`. Yields the
    addresses, with the ports that the system chose. Raises StartError when the table does not fit the services, or an
    address cannot be listened on.
    """
    policy.check(table, [service for service, _ in services], standard=[HEALTH, REFLECTION])
    health = Health()  # not ready before the first look
    async with AsyncExitStack() as stack:
        servers: list[grpc.aio.Server] = []
        lag = Lag()
        # One for all listeners: whoever changes things, through the gateway or not, is one principal.
        changes = Pace(limits.changes, 2 * limits.changes) if limits.changes else None
        addresses = []
        stopping: list[asyncio.Task[None]] = []

        def take_no_more() -> None:
            stopping.extend(asyncio.create_task(server.stop(drain_seconds)) for server in servers)

        async def stop() -> None:
            if not stopping:  # it did not get as far as to its jobs
                take_no_more()
            await asyncio.gather(*stopping)

        stack.push_async_callback(stop)
        for listener in listeners:
            rooms = _Rooms(listener, limits.calls, lag)
            server, address = _server(
                listener, services, table, health, rooms, changes, message_limit, limits.longest, metrics, trail
            )
            servers.append(server)
            await server.start()
            addresses.append(address)
        stack.callback(health.end)
        watch = _watching(health, readiness)
        await stack.enter_async_context(background.running({"readiness": watch, "lag": lag.run, **(jobs or {})}))
        # Before the jobs end: some end streams, whose followers would come back at once and be ended by nobody.
        stack.callback(take_no_more)
        yield addresses


@asynccontextmanager
async def refusing(listeners: Sequence[tuple[str, Certificate | None]], error: ServiceError) -> AsyncIterator[None]:
    """Listens at these addresses for a service that is not there yet: it is not ready, and each call gets the error.

    Raises StartError when an address cannot be listened on.
    """

    class Refusing(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
            return grpc.stream_stream_rpc_method_handler(refuse)

    async def refuse(requests: object, rpc: grpc.aio.ServicerContext[Any, Any]) -> None:
        await rpc.abort_with_status(to_status(error))

    async with AsyncExitStack() as stack:
        for address, certificate in listeners:
            bounds = [("grpc.max_concurrent_streams", STREAMS), *_longest_metadata(LONGEST_METADATA)]
            server = grpc.aio.server(options=[*_OPTIONS, *bounds])
            health_pb2_grpc.add_HealthServicer_to_server(Health(), server)
            server.add_generic_rpc_handlers([Refusing()])
            _listen(server, address, certificate)
            await server.start()
            stack.push_async_callback(server.stop, None)
        yield


class _Rooms:
    """The rooms of one listener: whose calls take places from whose."""

    def __init__(self, listener: Listener, most: int, lag: Lag) -> None:
        self._most = most
        self._lag = lag
        self._name = listener.peer or "public"
        self.public = self._room("callers", most)
        self._follow = self._room("streams", most)
        self._internal = self._room("own services", most)
        self._health = self._room("health", most)
        self._health_streams = self._room("health streams", most)
        self._unbounded = self._room("any", 0)

    def of(self, method: MethodDescriptor, row: Row) -> Room:
        """Where calls of a method take their places."""
        if row.is_inference or (row.peers and method.server_streaming):
            return self._unbounded  # queues of their own, and what our own services follow for as long as they live
        if method.server_streaming:  # anybody may follow health, which is to keep nobody from what they may follow
            return self._health_streams if method.containing_service == HEALTH else self._follow
        if method.containing_service in (HEALTH, REFLECTION):
            return self._health
        return self._internal if row.peers else self.public

    def _room(self, whose: str, most: int) -> Room:
        return Room(f"{self._name}: {whose}", most, self._lag)


def _server(
    listener: Listener,
    services: Sequence[tuple[ServiceDescriptor, object]],
    table: policy.Table,
    health: Health,
    rooms: _Rooms,
    changes: Pace | None,
    message_limit: int,
    longest_call: float,
    metrics: ServiceMetrics | None,
    trail: Trail | None,
) -> tuple[grpc.aio.Server, str]:
    known = {
        f"/{name}": Method(table[name], rooms.of(method, table[name]), LONGEST_REQUEST)
        for service in (HEALTH, REFLECTION)
        for method in service.methods
        if (name := policy.rpc_name(method)) in table
    }
    # All generic: for each method that is registered by itself, grpc.aio awaits the next call anew with every call.
    handlers = [_generic(HEALTH, health, known)]
    names = []
    for service, servicer in services:
        methods = {}
        for method in service.methods:
            name = policy.rpc_name(method)
            row = table[name]
            if row.peers and listener.peer not in row.peers:
                continue
            is_change = not (row.peers or row.is_inference or is_read(method))
            is_ours = bool(row.peers) or row.is_inference  # or bytes that nobody reads here
            longest = message_limit if is_ours else min(message_limit, LONGEST_REQUEST)
            known[f"/{name}"] = Method(row, rooms.of(method, row), longest, is_change)
            methods[method.name] = _handler(method, getattr(servicer, method.name))
        if methods:
            handlers.append(grpc.method_handlers_generic_handler(service.full_name, methods))
            names.append(service.full_name)
    # Outermost, so that a trace tells of refused calls too; health is asked all the time, by those who trace nothing.
    untraced = [each for service, _ in services for each in service.methods if each.client_streaming]
    traced = [ServerTracing(known.keys() - {f"/{policy.rpc_name(each)}" for each in (*HEALTH.methods, *untraced)})]
    server = grpc.aio.server(
        interceptors=[
            *(traced if tracing.is_on() else ()),
            RequestInterceptor(
                listener.identify,
                methods=known,
                elsewhere=rooms.public,
                changes=changes,
                longest_message=LONGEST_MESSAGE if listener.peer is None else LONGEST_PEER_MESSAGE,
                source=_source_on(listener) if listener.peer is None else None,
                failed_logins=listener.failed_logins,
                peer=listener.peer,
                trail=trail,
                calls=None if metrics is None else metrics.rpcs,
            ),
        ],
        maximum_concurrent_rpcs=MOST_RPCS,
        options=[
            *_OPTIONS,
            ("grpc.max_receive_message_length", message_limit),
            ("grpc.max_send_message_length", message_limit),
            ("grpc.max_concurrent_streams", STREAMS if listener.peer is None else PEER_STREAMS),
            *_longest_metadata(LONGEST_METADATA if listener.peer is None else LONGEST_PEER_METADATA),
            # Against strangers who open streams only to reset them, gRPC refuses a new one while an old one is still
            # being put away. A peer that keeps to the number of streams would be refused calls by that, at random.
            ("grpc.http.overload_protection", int(listener.peer is None)),
            ("grpc.max_connection_age_ms", round(CONNECTION_AGE_SECONDS * 1000)),
            ("grpc.max_connection_age_grace_ms", round(longest_call * 1000)),
        ],
    )
    if listener.reflection:
        reflecting = reflection.aio.ReflectionServicer([*names, HEALTH.full_name, REFLECTION.full_name])
        handlers.append(_generic(REFLECTION, reflecting, known))
    server.add_generic_rpc_handlers(handlers)
    return server, _listen(server, listener.address, listener.certificate)


def _longest_metadata(size: int) -> list[tuple[str, int]]:
    """Options that bound it: by the first alone gRPC refuses at random what is nearly as long, or longer."""
    return [("grpc.max_metadata_size", size), ("grpc.absolute_max_metadata_size", size)]


def _listen(server: grpc.aio.Server, address: str, certificate: Certificate | None) -> str:
    """The address, with the port that the system chose."""
    try:
        if certificate is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, certificate.grpc_credentials())
    except RuntimeError:
        raise StartError(f"Cannot listen on {address}: it is in use, or not an address of ours.") from None
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _source_on(listener: Listener) -> SourceOf:
    scheme = "http" if listener.certificate is None else "https"

    @lru_cache(maxsize=1_024)
    def immediate(peer: str) -> Source | None:
        """Where the calls of a connection come from, by gRPC's name for its other end; None where a proxy may say."""
        address = grpc_peer(peer)
        return None if is_trusted(address, listener.trusted_proxies) else source(address, scheme)

    def of(rpc: grpc.aio.ServicerContext[Any, Any]) -> Source:
        if (known := immediate(peer := rpc.peer())) is not None:
            return known
        metadata = [(key, value) for key, value in rpc.invocation_metadata() or () if isinstance(value, str)]
        return source(
            grpc_peer(peer),
            scheme,
            forwarded_for=[value for key, value in metadata if key == FORWARDED_FOR],
            forwarded_proto=[value for key, value in metadata if key == FORWARDED_PROTO],
            trusted=listener.trusted_proxies,
        )

    return of


def _generic(service: ServiceDescriptor, servicer: object, known: Mapping[str, Method]) -> grpc.GenericRpcHandler:
    methods = {
        method.name: _handler(method, getattr(servicer, method.name))
        for method in service.methods
        if f"/{policy.rpc_name(method)}" in known
    }
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def _handler(method: MethodDescriptor, behavior: Any) -> grpc.RpcMethodHandler[Any, Any]:
    request = GetMessageClass(method.input_type)
    response = GetMessageClass(method.output_type)
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make: Any = kinds[method.client_streaming, method.server_streaming]
    handler: grpc.RpcMethodHandler[Any, Any] = make(
        behavior, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )
    return handler


def _watching(health: Health, readiness: Mapping[str, Check]) -> Callable[[], Awaitable[None]]:
    async def watch() -> None:
        well: bool | None = None
        while True:
            answers = await asyncio.gather(*map(_is_well, readiness.values()))
            failing = [name for name, is_well in zip(readiness, answers, strict=True) if not is_well]
            if well != (not failing):
                well = not failing
                log.info("ready" if well else "not ready", extra={"failing": failing} if failing else {})
                health.ready(well)
            await asyncio.sleep(READINESS_SECONDS)

    return watch


async def _is_well(check: Check) -> bool:
    try:
        async with asyncio.timeout(READINESS_SECONDS):
            await check()
    except Exception:
        return False
    return True
