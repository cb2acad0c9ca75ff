"""Inference: from a request to a replica and back, without any other service on the way.

The body is passed on as it comes, in both directions, and not looked at (the OpenAI-style paths excepted, where the
endpoint's name stands in it). A replica's place is taken when the first part of it is there, which mostly is the whole.
What a model sees of a request's headers is a short list: never the caller's token.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator

import grpc
import orjson

from gateway.admission import Admission, EndpointNotFound, Place
from gateway.http import STATUSES, Answer, Headers, Request, WhileWanted, read_body, too_large
from gateway.json_codec import MOST_CONTAINERS, is_crowded
from gateway.routes import Endpoint, RoutingTable
from servicekit import tracing
from servicekit.access import AccessTable
from servicekit.arrivals import Arrivals, Arriving
from servicekit.context import Principal, caller_again, current_decision
from servicekit.errors import HTTP_STATUS, BadRequest, DeadlineExceeded, ServiceError, Unavailable
from servicekit.http_client import ConnectFailed, HttpError, HttpPool, HttpResponse, HttpTimeout, ProtocolError
from servicekit.measures import TIMING, Invocation, Measures, Tokens
from servicekit.rate_limits import Charge, Ledger
from tessera import policy

log = logging.getLogger(__name__)

TRACE = (b"traceparent", b"tracestate")
TO_MODEL = (b"content-type", b"content-encoding", b"accept", *TRACE)
"""Headers of a request that its model sees; with traces on, those of TRACE are of our own span."""

FROM_MODEL = frozenset((b"content-type", b"content-encoding", b"content-length", b"cache-control"))
"""Headers of an answer that its caller sees."""

SPAN = "invocation"
"""What the way to a model is called in a trace."""

FIRST_BYTES = 1024 * 1024
"""So much of a body, or the whole, is waited for before a place of a replica's is taken: who is slow keeps none."""

MOST_KEPT = 16
"""So many of the longest bodies are kept in all, of requests that wait for the rest, a place, or their answer."""

PIECE_SECONDS = 30.0
"""How long the body of a request may pause once it has begun to arrive."""

REST_SECONDS = 120.0
"""How long all of it may take that comes when the place is taken."""

FIRST_TABLE_SECONDS = 5.0
"""How long a request waits for the first table of a gateway that has just started."""


class ModelServerFailed(ServiceError):
    """The model server ended or spoke nonsense in the middle of a request."""

    code = grpc.StatusCode.INTERNAL

    def __init__(self, entity: str) -> None:
        super().__init__(f"The model server of {entity} ended while it was answering. Its logs say why.")


class BodyOverdue(DeadlineExceeded):
    """The body of a request did not come whole in time: its caller has stopped in the middle, or is very slow."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The body of the request was not complete after {seconds:g} s. Send it at once.")


class Invocations:
    """Answers inference requests. `deadline` is in seconds, `body_limit` in bytes."""

    def __init__(
        self,
        table: RoutingTable,
        admission: Admission,
        access: AccessTable,
        pool: HttpPool,
        ledger: Ledger,
        measures: Measures,
        *,
        deadline: float,
        body_limit: int,
    ) -> None:
        self._table = table
        self._admission = admission
        self._access = access
        self._pool = pool
        self._ledger = ledger
        self._measures = measures
        self._deadline = deadline
        self._body_limit = body_limit
        self._bodies = Arrivals(most_bytes=MOST_KEPT * body_limit)

    async def invoke(
        self, request: Request, answer: Answer, caller: Principal, name: str, entity_name: str | None
    ) -> None:
        """Answers with what the endpoint `name`, or one entity of it, makes of the request's body.

        Raises the ServiceErrors of contract 6.7 as long as nothing was answered, and ClientGone.
        """
        endpoint = await self._permitted(name, caller)
        with (
            self._began(endpoint, caller) as measured,
            tracing.within(SPAN),
            self._bodies.of(caller.id) as arriving,
        ):
            charge = self._ledger.admit(endpoint.limits, caller)
            is_here = request.is_complete
            body = await self._body(request, arriving)
            # Looked for again: the body may come so late that the first one's replicas are gone, or the permission.
            if not is_here:
                caller = await caller_again()
            endpoint = await self._permitted(name, caller)
            await self._forward(request, answer, endpoint, entity_name, body, charge, measured)

    def _began(self, endpoint: Endpoint, caller: Principal) -> Invocation:
        return self._measures.began(endpoint.id, tracked=caller if endpoint.is_usage_tracked else None)

    async def _body(self, request: Request, arriving: Arriving) -> bytes | AsyncIterator[bytes]:
        """The whole body or, of a long one, its first part and then piece by piece what follows."""
        if (request.declared_length() or 0) > self._body_limit:
            raise BadRequest(too_large(self._body_limit))
        body = await self._first(request, arriving)
        if len(body) > self._body_limit:
            raise BadRequest(too_large(self._body_limit))
        return body if request.is_complete else self._rest(request, body)

    async def invoke_named_in_body(self, request: Request, answer: Answer, caller: Principal) -> None:
        """As `invoke`, for OpenAI-style requests: `model` in the body names the endpoint."""
        with self._bodies.of(caller.id) as arriving:
            is_here = request.is_complete
            body = await read_body(request, self._body_limit, arriving, BadRequest)
            if not is_here:
                caller = await caller_again()
            await self._invoke_named_in(body, request, answer, caller)

    async def _invoke_named_in(self, body: bytes, request: Request, answer: Answer, caller: Principal) -> None:
        if is_crowded(body):
            raise BadRequest(f"The body has more than {MOST_CONTAINERS} objects and lists.")
        try:
            name = orjson.loads(body)["model"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            name = None
        if not isinstance(name, str):
            raise BadRequest("The body must be a JSON object whose field `model` names the serving endpoint.")
        endpoint = await self._permitted(name, caller)
        with self._began(endpoint, caller) as measured, tracing.within(SPAN):
            charge = self._ledger.admit(endpoint.limits, caller)
            await self._forward(request, answer, endpoint, None, body, charge, measured)

    async def _permitted(self, name: str, caller: Principal) -> Endpoint:
        """The endpoint called `name`, if the caller may query it; decided from tables that are here already."""
        decision = current_decision(policy.ENDPOINT)
        await self._access.known()
        if not self._table.known.is_set():
            await self._first_table()
        endpoint = self._table.endpoint(name)
        level = self._access.decide(decision, caller, name=name, endpoint_id=endpoint.id if endpoint else None)
        if endpoint is None or level is None or not endpoint.entities:
            raise EndpointNotFound
        return endpoint

    async def _first_table(self) -> None:
        try:
            async with asyncio.timeout(FIRST_TABLE_SECONDS):
                await self._table.known.wait()
        except TimeoutError:
            raise Unavailable(
                "This gateway has just started and knows no endpoint yet. Try again in a moment.", retry_after=1
            ) from None

    async def _first(self, request: Request, arriving: Arriving) -> bytes:
        """What is waited for before a place is taken. The rest has the time that the model has."""
        if request.is_complete:
            return await request.more()  # it is here already
        try:
            async with asyncio.timeout(self._deadline):
                return await _first_part(request, arriving)
        except TimeoutError:
            raise BodyOverdue(self._deadline) from None

    async def _rest(self, request: Request, first: bytes) -> AsyncIterator[bytes]:
        size = len(first)
        until = asyncio.get_running_loop().time() + REST_SECONDS
        yield first
        while piece := await _more(request, until):
            size += len(piece)
            if size > self._body_limit:
                raise BadRequest(too_large(self._body_limit))
            yield piece

    async def _forward(
        self,
        request: Request,
        answer: Answer,
        endpoint: Endpoint,
        entity_name: str | None,
        body: bytes | AsyncIterator[bytes],
        charge: Charge,
        measured: Invocation,
    ) -> None:
        sent_headers = _to_model(request, endpoint)
        if not isinstance(body, bytes) and (length := request.headers.get(b"content-length")) is not None:
            sent_headers.append((b"content-length", length))
        place = self._admission.place(endpoint, entity_name, measured)
        # The model is spared work that nobody waits for.
        with WhileWanted(request):
            await self._sent(request, place, answer, endpoint, sent_headers, body, charge, measured)

    async def _sent(
        self,
        request: Request,
        place: Place,
        answer: Answer,
        endpoint: Endpoint,
        headers: Headers,
        body: bytes | AsyncIterator[bytes],
        charge: Charge,
        measured: Invocation,
    ) -> None:
        while True:
            try:
                async with place as replica:
                    if place.has_waited:
                        await self._permitted(endpoint.name, await caller_again())
                    response = await self._pool.send(
                        replica.address, "POST", "/invocations", headers, body, timeout=self._deadline
                    )
                    async with response:
                        if response.status not in STATUSES:
                            raise ProtocolError(f"{response.status} is no status that there is.")
                        answer.headers.append((b"served-model-name", place.entity.name.encode()))
                        measured.answered(response.status, response.header(TIMING))
                        await _pass_on(response, answer, charge, measured)
                        return
            except ConnectFailed:
                # Nothing was sent, so another replica may be asked; this one's end will reach the table soon.
                place.avoid(replica)
                self._pool.forget(replica.address)
            except HttpTimeout:
                if not request.is_complete:
                    raise BodyOverdue(self._deadline) from None
                raise DeadlineExceeded(f"The model did not answer within {self._deadline:g} s.") from None
            except HttpError as error:
                log.warning(
                    "model server failed",
                    extra={"endpoint": endpoint.name, "replica": replica.id, "problem": type(error).__name__},
                )
                raise ModelServerFailed(place.entity.name) from None


async def _first_part(request: Request, arriving: Arriving) -> bytes:
    """The whole body, or the first of a long one."""
    pieces: list[bytes] = []
    size = 0
    piece = await request.more()  # which may be long in coming
    while piece:
        pieces.append(piece)
        size += len(piece)
        arriving.keep(len(piece))
        if size >= FIRST_BYTES and not request.is_complete:
            break
        piece = await _more(request)
    return b"".join(pieces)


async def _more(request: Request, until: float = math.inf) -> bytes:
    """The next piece of a body; raises BadRequest when none comes, and BodyOverdue at `until`, on the loop's clock."""
    left = until - asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(min(left, PIECE_SECONDS)):
            return await request.more()
    except TimeoutError:
        if left < PIECE_SECONDS:
            raise BodyOverdue(REST_SECONDS) from None
        raise BadRequest(f"Nothing of the body came for {PIECE_SECONDS:g} s. Send it at once.") from None


def _to_model(request: Request, endpoint: Endpoint) -> Headers:
    """The headers that the model sees."""
    span = tracing.current()
    span.set("tessera.endpoint", endpoint.name)
    own = [(name.encode(), value.encode("latin-1")) for name, value in span.headers()]
    without = TRACE if own else ()
    return own + [(name, request.headers[name]) for name in TO_MODEL if name in request.headers and name not in without]


async def _pass_on(response: HttpResponse, answer: Answer, charge: Charge, measured: Invocation) -> None:
    kept = [(name, value) for name, value in response.headers if name in FROM_MODEL]
    with Tokens(response.header(b"content-type"), charge, measured) as tokens:
        if (body := response.whole()) is not None:
            tokens.feed(body)
            answer.whole(response.status, [header for header in kept if header[0] != b"content-length"], body)
            return
        answer.begin(response.status, kept)
        try:
            # Whoever does not read keeps a place of the model server's all the same.
            async with asyncio.timeout_at(response.deadline):
                async for piece in response:
                    tokens.feed(piece)
                    await answer.piece(piece)
        except (HttpError, TimeoutError) as error:
            # The status is gone already: ending before the end is all that is left.
            log.warning("answer cut short", extra={"problem": type(error).__name__})
            measured.status = HTTP_STATUS[ModelServerFailed.reason]
        else:
            answer.end()
