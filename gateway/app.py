"""The gateway, wired: routes from the protos, the few that are no messages, and the HTTP server around them."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import orjson
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.descriptor import MethodDescriptor

from gateway import errors, http_server
from gateway.admission import Admission
from gateway.http import MOST_AWAITED, Answer, ClientGone, Request, read_body
from gateway.http_rules import RouteTable, bindings
from gateway.http_tracing import Traced, routed
from gateway.invocations import Invocations
from gateway.json_codec import is_crowded
from gateway.measures import Reporter
from gateway.oauth import CredentialRefused, OAuth
from gateway.openapi.document import Document
from gateway.routes import RoutingTable
from gateway.settings import GatewaySettings
from gateway.streams import Streams
from gateway.transcoding import Transcoder
from servicekit import background, channels, context, peers, policy, relay, tls, tracing
from servicekit.access import AccessTable
from servicekit.arrivals import Arrivals
from servicekit.context import Principal, RequestContext
from servicekit.errors import ServiceError
from servicekit.exposure import is_read
from servicekit.failed_logins import FailedLogins
from servicekit.http_client import HttpPool
from servicekit.identity import CREDENTIAL_REFUSED, Identity, TokenExchange, refuse_bound, token_from
from servicekit.measures import Measures
from servicekit.metrics import Calls, ServiceMetrics
from servicekit.metrics import listening as metrics_at
from servicekit.policy import Decision, Row
from servicekit.rate_limits import Ledger
from servicekit.relay import Way
from servicekit.shedding import Lag, Room
from servicekit.sockets import socket_address, socket_path
from servicekit.source import FORWARDED_FOR, FORWARDED_PROTO, Network, Source, owner, source
from tessera.identity.v1 import audit_pb2, identity_pb2, permissions_pb2
from tessera.policy import POLICY
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2

log = logging.getLogger(__name__)

CONTROL_BODY_LIMIT = 1024 * 1024
"""Bytes of a control-plane body."""

CONTROL_DEADLINE = 60.0
"""Seconds for a control-plane call; clients give up at about this time."""

_OWNED = {
    "secrets": (audit_pb2.DESCRIPTOR, identity_pb2.DESCRIPTOR, permissions_pb2.DESCRIPTOR, secrets_pb2.DESCRIPTOR),
    "serving": (serving_pb2.DESCRIPTOR,),
}
"""Which service answers the RPCs of which proto files."""

AT_ANY_TIME = ("GET /health", "GET /.well-known/databricks-config")
"""Routes that are answered however much there is to do: a supervisor asks for the one, and clients that are refused the
other do not begin."""

AWAITS_BODY = ("POST /oidc/v1/token", "POST /telemetry-ext")
"""Routes that are no messages, and whose body we read ourselves: what has not arrived keeps no place."""

MOST_BODY_BYTES = 64 * 1024 * 1024
"""Of control-plane bodies that are on their way, in all."""

NO_ROUTE, GONE = "(none)", "(none)"
"""What requests are counted under that no route takes, and that nobody was answered."""

_JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")
_ORG_ID = b"x-databricks-org-id"
_VARIABLE = re.compile(r"\\{([a-z_]+)\\}")


@asynccontextmanager
async def running(settings: GatewaySettings) -> AsyncIterator[str]:
    """The whole gateway: entering opens it and yields the URL it listens on, leaving drains and closes it."""
    async with AsyncExitStack() as stack:
        directory = settings.sockets
        ways = await stack.enter_async_context(_ways(settings))
        open_channel = {
            name: await stack.enter_async_context(
                channels.opened(socket_address(directory, callee=name, caller="gateway"), retried=_reads_of(name))
            )
            for name in ("secrets", "serving")
        }
        owners = {
            service: open_channel[name]
            for name, files in _OWNED.items()
            for file in files
            for service in file.services_by_name.values()
        }
        rules = bindings(list(owners))
        pool = HttpPool(dial=ways["serving"].dial) if "serving" in ways else HttpPool()
        stack.push_async_callback(pool.close)
        ledger = Ledger()
        table = RoutingTable(
            ledger,
            queue_length=settings.queue_length,
            address_of=_behind_a_door if "serving" in ways else _on_this_machine,
        )
        metrics = ServiceMetrics()
        lag = Lag()
        room = Room("callers", settings.calls, lag)
        measures = Measures(gone=ClientGone)
        exchange = TokenExchange(open_channel["secrets"], stale_seconds=settings.stale_identity_seconds)
        access = AccessTable(forget=exchange.forget, stale_seconds=settings.stale_identity_seconds)
        certificate = await stack.enter_async_context(tls.followed(settings))
        listening = stack.enter_context(http_server.bound(settings.listen))
        scheme = "http" if certificate is None else "https"
        url = f"{scheme}://{settings.listen.rpartition(':')[0]}:{listening.getsockname()[1]}"
        public_url = settings.public_url or url
        gateway = Gateway(
            table=POLICY,
            rules=rules,
            transcoder=Transcoder(lambda method: owners[method.containing_service], rules),
            exchange=exchange,
            invocations=Invocations(
                table,
                Admission(table, seconds=settings.queue_seconds),
                access,
                pool,
                ledger,
                measures,
                deadline=settings.inference_deadline,
                body_limit=settings.inference_body_limit,
            ),
            oauth=OAuth(open_channel["secrets"], public_url, room),
            document=Document(rules, public_url),
            public_url=public_url,
            trusted_proxies=settings.trusted_proxies,
            failed_logins=FailedLogins(settings.failed_logins),
            room=room,
            calls=Calls(metrics.registry, "tessera_http_requests", "Requests over HTTP", kind="route", ending="status"),
        )
        metrics.watch("tessera_endpoints", "Endpoints that this gateway knows.", table.count)
        metrics.watch("tessera_requests_in_flight", "Requests that replicas are answering.", table.in_flight)
        metrics.watch("tessera_identities", "Callers that are known without asking.", exchange.known_count)
        await stack.enter_async_context(
            background.running(
                {
                    "routes": partial(table.follow, open_channel["serving"]),
                    "measures": partial(Reporter(measures).run, open_channel["serving"]),
                    "access": partial(access.follow, open_channel["secrets"]),
                    "workspace": partial(_learn_workspace, exchange),
                    "lag": lag.run,
                }
            )
        )
        application = Traced(gateway) if tracing.is_on() else gateway
        tls_context = None if certificate is None else certificate.http_context
        await stack.enter_async_context(
            http_server.serving(application, listening, tls_context, drain_seconds=settings.drain_seconds)
        )
        stack.callback(gateway.streams.stop)  # before the server waits for what is under way
        await stack.enter_async_context(metrics_at(settings.metrics_listen, metrics))
        yield url


def _reads_of(name: str) -> list[MethodDescriptor]:
    """The RPCs of a service that may be called again when it does not answer."""
    services = [service for file in _OWNED[name] for service in file.services_by_name.values()]
    methods = [method for service in services for method in service.methods]
    return [method for method in methods if is_read(method) and not method.server_streaming]


@asynccontextmanager
async def _ways(settings: GatewaySettings) -> AsyncIterator[Mapping[str, Way]]:
    """The ways to those services that are on other machines, by name."""
    addresses = {"secrets": settings.secrets_address, "serving": settings.serving_address}
    async with AsyncExitStack() as stack:
        certificate = await stack.enter_async_context(peers.followed(settings, "gateway"))
        ways = {}
        for name, address in addresses.items():
            if certificate is not None and address:
                ways[name] = Way(address, name, certificate)
                path = socket_path(settings.sockets, callee=name, caller="gateway")
                await stack.enter_async_context(ways[name].leading_from(path))
        yield ways


def _on_this_machine(replica: serving_pb2.ReplicaRoute) -> str:
    return replica.address


def _behind_a_door(replica: serving_pb2.ReplicaRoute) -> str:
    """What a replica on Serving's machine is reached by from another one."""
    return f"{relay.REPLICA}{replica.replica_id}"


_Handle = Callable[[Request, Answer, re.Match[str]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Special:
    """A route that is no message: which requests it takes, who may send them, who answers them, and in what room."""

    method: str
    template: str
    path: re.Pattern[str]
    row: Row
    room: Room
    """For finding out who calls, and for the answer, too, unless that has to wait for a body."""
    awaits_body: bool
    handle: _Handle


def _special(name: str, row: Row, room: Room, handle: _Handle) -> _Special:
    """The route that the policy names so.

    One slash at the end is tolerated, as with routes that are messages; but what is open is open in one spelling only.
    """
    method, _, template = name.partition(" ")
    path = _VARIABLE.sub(r"(?P<\1>[^/]+)", re.escape(template))
    pattern = re.compile(f"{path}/?" if row.needs_caller else path)
    return _Special(method, template, pattern, row, room, name in AWAITS_BODY, handle)


class Gateway:
    """Answers every request. Raises StartError when the policy does not fit its routes."""

    def __init__(
        self,
        *,
        table: policy.Table,
        rules: RouteTable,
        transcoder: Transcoder,
        exchange: TokenExchange,
        invocations: Invocations,
        oauth: OAuth,
        document: Document,
        public_url: str,
        trusted_proxies: Sequence[Network],
        failed_logins: FailedLogins,
        room: Room,
        calls: Calls,
    ) -> None:
        self._rules = rules
        self._transcoder = transcoder
        self._exchange = exchange
        self._invocations = invocations
        self._document = document
        self._public_url = public_url
        self._trusted_proxies = trusted_proxies
        self._failed_logins = failed_logins
        self._room = room
        self._bodies = Arrivals(MOST_AWAITED, most_bytes=MOST_BODY_BYTES)
        self._calls = calls
        self._workspace: tuple[bytes, bytes] | None = None
        self.streams = Streams(exchange)
        # Everything that is not one message in and one message out, each with its reason; `openapi/base.json` describes
        # them to users.
        specials: dict[str, _Handle] = {
            # The body belongs to the model and is streamed.
            "POST /serving-endpoints/{name}/invocations": self._invoke,
            "POST /serving-endpoints/{name}/served-models/{served_model_name}/invocations": self._invoke,
            # As above; the endpoint is named in the body.
            "POST /serving-endpoints/chat/completions": self._invoke_openai_style,
            "POST /serving-endpoints/completions": self._invoke_openai_style,
            "POST /serving-endpoints/embeddings": self._invoke_openai_style,
            "POST /serving-endpoints/responses": self._invoke_openai_style,
            # Clients ask before they know where to log in; it must answer at once.
            "GET /.well-known/databricks-config": self._discovery,
            # For load balancers and supervisors.
            "GET /health": self._health,
            # The command line waits for the count of what it sent; nothing is kept.
            "POST /telemetry-ext": self._telemetry,
            # OAuth has forms for requests and a shape of its own for errors, and asks without a token.
            "GET /oidc/.well-known/oauth-authorization-server": oauth.metadata,
            "GET /oidc/accounts/{account_id}/.well-known/oauth-authorization-server": oauth.metadata,
            "GET /oidc/v1/authorize": oauth.authorize,
            "POST /oidc/v1/token": oauth.token,
            # It describes the others.
            "GET /api/openapi.json": self._openapi,
        }
        services = {binding.service.full_name: binding.service for binding in rules}
        policy.check(table, services.values(), routes=specials)
        # What costs nothing is answered at any time, and queries wait in queues of their own.
        free = Room("any", 0, Lag())
        self._special = tuple(
            _special(name, table[name], free if name in AT_ANY_TIME or table[name].is_inference else room, handle)
            for name, handle in specials.items()
        )

    async def __call__(self, request: Request, answer: Answer) -> None:
        given = request.header(b"x-tessera-request-id")
        request.id = given if given and channels.is_request_id(given) else channels.new_request_id()
        answer.headers.append((b"x-tessera-request-id", request.id.encode()))
        # Secrets records which credentials were refused: of which request, and where that came from.
        context.enter(RequestContext(request.id))
        context.came_from(self._address(request))
        self._name_workspace(answer)
        began = time.perf_counter()
        try:
            await self._route(request, answer)
        except ClientGone:
            log.debug("caller hung up", extra={"request_id": request.id})
        except Exception as error:
            self._refuse(request, answer, error)
        finally:
            # Of a path that is not there the name is the caller's own.
            seconds = None if request.is_stream else time.perf_counter() - began
            self._calls.ended(request.route or NO_ROUTE, str(answer.status or GONE), seconds)

    def _refuse(self, request: Request, answer: Answer, error: Exception) -> None:
        if isinstance(error, (*CREDENTIAL_REFUSED, CredentialRefused)):
            refused = self._failed_logins.refusal(error, self._source(request), {"request_id": request.id})
            too_many = refused is not error
            error = error.too_many(refused) if too_many and isinstance(error, CredentialRefused) else refused
        refusal = errors.render(error, request.service)
        if refusal.status == 500:
            log.error(
                "request failed",
                extra={"request_id": request.id, "method": request.method, "path": request.path},
                exc_info=(type(error), error, error.__traceback__),
            )
        if not answer.status:
            answer.decision = None
            self._name_workspace(answer)
            answer.whole(refusal.status, refusal.headers, refusal.body)

    def _source(self, request: Request) -> Source:
        """Where a request comes from: for logs, and for counting wrong credentials."""
        address, scheme = request.source()
        return source(
            address,
            scheme,
            forwarded_for=request.values(FORWARDED_FOR.encode()),
            forwarded_proto=request.values(FORWARDED_PROTO.encode()),
            trusted=self._trusted_proxies,
        )

    def _address(self, request: Request) -> str:
        return self._source(request).address

    async def _identify(self, request: Request, answer: Answer, *, for_inference: bool = False) -> Identity:
        """Who sent a request; the answer's headers name the workspace from here on.

        Only inference goes on with a caller that was known while Secrets does not answer, and only for inference a
        token that is bound to an endpoint is good.
        """
        identity = await self._exchange.identify(
            token_from(request.header(b"authorization")), may_be_stale=for_inference
        )
        self._name_workspace(answer)
        if not for_inference:
            refuse_bound(identity.principal)
        return identity

    def _name_workspace(self, answer: Answer) -> None:
        """Has the answer name the workspace, as clients expect of every one (contract 1.2), once its id is known."""
        workspace = self._workspace
        if workspace is None and (workspace_id := self._exchange.workspace_id) is not None:
            workspace = self._workspace = (_ORG_ID, workspace_id.encode())
        if workspace is not None and workspace not in answer.headers:
            answer.headers.append(workspace)

    async def _route(self, request: Request, answer: Answer) -> None:
        for special in self._special:
            if special.method == request.method and (match := special.path.fullmatch(request.path)):
                await self._answer_special(special, request, answer, match)
                return
        # Callers that we do not know learn nothing about which paths there are.
        with self._room:
            identity = await self._identify(request, answer)
        # What has not arrived keeps no place: whoever is slow keeps nobody else out.
        is_here = request.is_complete
        body = await self._body(request, identity.principal)
        with self._room:
            if not is_here:  # who sent it may be nobody by now
                identity = await self._identify(request, answer)
            pieces = await self._answer_message(request, answer, identity, body)
        if pieces is not None:  # which goes on for as long as somebody reads, and keeps no place either
            await self.streams.pass_on(request, answer, identity.principal, pieces)

    async def _body(self, request: Request, caller: Principal | None) -> bytes:
        with self._bodies.of(owner(context.source()) if caller is None else caller.id) as arriving:
            return await read_body(request, CONTROL_BODY_LIMIT, arriving)

    async def _answer_message(
        self, request: Request, answer: Answer, identity: Identity, body: bytes
    ) -> AsyncGenerator[HttpBody, None] | None:
        """Answers with a message; or returns the pieces of what is to be answered, where that is a stream."""
        found = self._rules.match(request.method, request.path)
        if found is None:
            raise errors.no_such_route(request.method, request.path)
        binding, parameters = found
        request.service = binding.service
        routed(binding.verb, binding.template)
        request.route = f"{binding.verb} {binding.template}"
        metadata = [(channels.REQUEST_ID, request.id), (channels.SOURCE, self._address(request))]
        if identity.assertion is not None:
            metadata.append((channels.ASSERTION, identity.assertion))
        if (chosen := request.header(b"x-tessera-request-id")) is not None:
            channels.check_request_id(chosen)
            metadata.append((channels.CHOSEN, "true"))
        if binding.is_stream:
            request.is_stream = True
            return self._transcoder.stream(
                binding, parameters, request.query_string, metadata, longest_silence=CONTROL_DEADLINE
            )
        transcoded = await self._transcoder.handle(
            binding, parameters, request.query_string, body, metadata, CONTROL_DEADLINE
        )
        warnings = [(channels.WARNING.encode(), text.encode("ascii")) for text in transcoded.warnings]
        content_type = (b"content-type", transcoded.content_type.encode("ascii"))
        answer.whole(binding.success_status, [*warnings, content_type], transcoded.body)
        return None

    async def _answer_special(self, special: _Special, request: Request, answer: Answer, match: re.Match[str]) -> None:
        """Answers as the route's row in the policy says; what the row leaves to decide, the handler has to."""
        routed(special.method, special.template)
        request.route = f"{special.method} {special.template}"
        decision = answer.decision = Decision(special.row)
        if not special.row.needs_caller:
            context.enter(RequestContext(request.id, decision=decision))
        else:

            async def again() -> Principal:
                return (await self._identify(request, answer, for_inference=special.row.is_inference)).principal

            with special.room:
                caller = await again()
            context.enter(RequestContext(request.id, caller, again=again, decision=decision))
        if special.awaits_body:
            await special.handle(request, answer, match)
        else:
            with special.room:
                await special.handle(request, answer, match)

    async def _invoke(self, request: Request, answer: Answer, match: re.Match[str]) -> None:
        named = match.groupdict()
        await self._invocations.invoke(
            request, answer, context.current_caller(), named["name"], named.get("served_model_name")
        )

    async def _invoke_openai_style(self, request: Request, answer: Answer, _: re.Match[str]) -> None:
        await self._invocations.invoke_named_in_body(request, answer, context.current_caller())

    async def _discovery(self, request: Request, answer: Answer, _: re.Match[str]) -> None:
        document = {"oidc_endpoint": f"{self._public_url}/oidc"}
        if self._exchange.workspace_id is not None:
            document["workspace_id"] = self._exchange.workspace_id
        answer.whole(200, [_JSON], orjson.dumps(document))

    async def _health(self, request: Request, answer: Answer, _: re.Match[str]) -> None:
        answer.whole(200, [_JSON], b'{"status":"ok"}')

    async def _openapi(self, request: Request, answer: Answer, _: re.Match[str]) -> None:
        answer.whole(200, [_JSON], self._document.text)

    async def _telemetry(self, request: Request, answer: Answer, _: re.Match[str]) -> None:
        request_context = context.current()
        body = await self._body(request, request_context.caller if request_context else None)
        try:
            logs = [] if is_crowded(body) else orjson.loads(body).get("protoLogs", [])
        except (orjson.JSONDecodeError, AttributeError):
            logs = []
        taken = len(logs) if isinstance(logs, list) else 0
        answer.whole(200, [_JSON], orjson.dumps({"errors": [], "numProtoSuccess": taken}))


async def _learn_workspace(exchange: TokenExchange) -> None:
    """Asks Secrets for the workspace id until it answers, so that discovery can tell it before anybody logs in."""
    while exchange.workspace_id is None:
        try:
            await exchange.platform()
        except ServiceError:
            await asyncio.sleep(0.1)
    await asyncio.Event().wait()
