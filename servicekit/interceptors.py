"""What happens around every RPC, in this order: request context, access log, errors, deadline, room, audit, identity,
pace, arrival of the message, first answer, record.

The log comes first so that refused calls are seen too; errors wrap identity because a refusal is an error like any
other. For a call without room nothing else is done, and one whose deadline has passed is not begun. Of whoever is not
known no message is received: it would be kept while it arrives. Whatever a handler raises that is no ServiceError
reaches the caller as a fixed text and a request id.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from servicekit import audit, channels, context, once
from servicekit.arrivals import Arrivals
from servicekit.audit import AuditUnavailable, Entry, Trail
from servicekit.errors import (
    DeadlineExceeded,
    InvalidParameter,
    MalformedRequest,
    ServiceError,
    TooManyRequests,
    Unauthenticated,
    to_status,
)
from servicekit.failed_logins import FailedLogins
from servicekit.identity import CREDENTIAL_REFUSED, Identify, refuse_bound
from servicekit.metrics import Calls
from servicekit.pace import HEARD_PER_MINUTE, Flood, Pace
from servicekit.policy import OPEN, Decision, Row, Undecided
from servicekit.safe_repr import safe_repr
from servicekit.shedding import Overloaded, Place, Room
from servicekit.source import Source, grpc_peer, is_address, owner

log = logging.getLogger("servicekit.access")

DEFAULT_DEADLINE = 10.0
"""Seconds for a call that came without a deadline; Python servers see none at all."""

LONGEST_DEADLINE = 60.0

UNKNOWN_METHOD = "(unknown)"
"""Stands for the name of a method that is not there: a caller's own text, so neither logged nor compared."""

MOST_ELEMENTS = 10_000
"""How many elements a list in a request may have."""

MOST_METADATA = 100
"""How many fields the metadata of a call may have; gRPC itself bounds their bytes."""

MOST_AWAITED = 200
"""Of how many calls of one address the message may be on its way at a time; of most it is there with the call."""

ARRIVAL_SECONDS = 0.25
"""How long a call keeps its place while its message is on its way. Later it is asked anew who calls, too."""

SourceOf = Callable[[grpc.aio.ServicerContext[Any, Any]], Source]
"""Tells where a call comes from."""


class TooManyChanges(TooManyRequests):
    """The caller changes things faster than anybody may."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(
            f"Too many changes in a short time by the same caller. Try again in {retry_after} s.",
            retry_after=retry_after,
        )


class TooMuchMetadata(InvalidParameter):
    """The metadata of a call has more fields than anybody needs."""

    def __init__(self) -> None:
        super().__init__(f"The metadata of a call may have {MOST_METADATA} fields at the most.")


class NothingCame(DeadlineExceeded):
    """A call was opened, and its message did not follow, or not all of it."""

    def __init__(self) -> None:
        super().__init__("The request did not come, or not all of it, before the deadline.")


TURNED_AWAY = {
    Overloaded: "too many requests",
    TooMuchMetadata: "too much metadata",
    NothingCame: "no request",
}
"""What a call is refused with before it is whole, and how that is counted: a flood fills no log."""


@dataclass(frozen=True, slots=True)
class Method:
    """What a listener knows about one of its RPCs."""

    row: Row
    room: Room
    """What it takes a place in."""
    longest_request: int
    """Bytes of a request."""
    is_change: bool = False
    """Whether it counts among the changes of its caller."""


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """The chain of one listener.

    `methods` holds what is known of each method there is, by its path, `elsewhere` the room for calls of any other;
    `changes` is how fast each principal may change things. Error messages are cut after `longest_message` bytes.
    `source` tells where public calls come from, and `failed_logins` counts those whose credential is refused; `source`
    is None on a listener for the one `peer`, which says it itself. Calls are recorded in `trail`, or nowhere.
    """

    def __init__(
        self,
        identify: Identify,
        *,
        methods: Mapping[str, Method],
        elsewhere: Room,
        changes: Pace | None,
        longest_message: int,
        source: SourceOf | None,
        failed_logins: FailedLogins,
        calls: Calls | None = None,
        peer: str | None = None,
        trail: Trail | None = None,
    ) -> None:
        self._identify = identify
        self._methods = methods
        self._elsewhere = elsewhere
        self._changes = changes
        self.peer = peer or ""
        self.trail = trail
        self.longest_message = longest_message
        self.calls = calls
        self.source = source
        self.failed_logins = failed_logins
        self.passed_on = Flood(HEARD_PER_MINUTE)
        self.arrivals = Arrivals(0 if source is None else MOST_AWAITED)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        known = self._methods.get(handler_call_details.method)
        if known is None:
            handler = None  # what nobody said anything about is not there
        method = handler_call_details.method if handler is not None else UNKNOWN_METHOD
        fields = handler_call_details.invocation_metadata or ()
        metadata = {key: value for key, value in fields if isinstance(value, str)}
        room = self._elsewhere if known is None else known.room
        call = _Call(self, method, metadata, room)
        try:
            room.check()
            _check_fields(fields)
        except (Overloaded, TooMuchMetadata) as error:
            # As a stream, of which nothing is received before somebody reads it.
            return grpc.stream_stream_rpc_method_handler(call.refused(error))
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(call.streaming(_no_such_method))
        read, write = handler.request_deserializer, handler.response_serializer
        if handler.response_streaming and handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(call.streaming(handler.stream_stream), read, write)
        # A single message is received, read and written within the chain: gRPC would wait for it without end, it is not
        # read before its caller is known, and when any of that fails, it fails like everything else.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(call.streaming(handler.unary_stream, read), None, write)
        if handler.request_streaming:
            raise NotImplementedError(f"{method} streams requests only, which no RPC of ours does")
        return grpc.stream_unary_rpc_method_handler(call.unary(handler.unary_unary, read, write), None, None)

    async def authenticate(self, method: str, metadata: dict[str, str], request_id: str) -> context.RequestContext:
        """The context of a call whose caller is known; raises Unauthenticated or PermissionDenied."""
        row = self.row(method)
        decision = None if row is None else Decision(row)
        if row == OPEN:
            return context.RequestContext(request_id, decision=decision)
        identity = await self._identify(metadata, row)
        if identity is None:
            if row is None or row.needs_caller:
                raise Unauthenticated
            return context.RequestContext(request_id, decision=decision)
        if row is None or not row.is_inference:
            refuse_bound(identity.principal)

        async def again() -> context.Principal:
            known = await self._identify(metadata, row)
            if known is None:
                raise Unauthenticated
            return known.principal

        return context.RequestContext(
            request_id,
            identity.principal,
            identity.assertion,
            self._may_be_repeated(row, metadata),
            again=again if row is not None and row.is_inference else None,
            decision=decision,
        )

    def row(self, method: str) -> Row | None:
        """The policy's row for a method; None when there is no such method."""
        known = self._methods.get(method)
        return None if known is None else known.row

    def check_size(self, method: str, request: bytes) -> None:
        """Raises InvalidParameter for what is too long to be read: a message may take a hundred times its bytes."""
        if len(request) > (longest := self._methods[method].longest_request):
            raise InvalidParameter(f"The request has more than {longest} bytes, which is the limit here.")

    def check_parts(self, method: str, message: Message) -> None:
        """Raises InvalidParameter for lists that nobody means: use cases go through them element by element."""
        row = self.row(method)
        if row is None or row.peers or row.is_inference:
            return
        for field, content in message.ListFields():
            if field.is_repeated and len(content) > MOST_ELEMENTS:
                raise InvalidParameter(f"{field.name}: a list may have {MOST_ELEMENTS} elements at the most.")

    def check_pace(self, method: str, caller: context.Principal | None) -> None:
        """Counts a change of the caller's, if it is one; raises TooManyChanges."""
        known = self._methods.get(method)
        if self._changes is None or caller is None or known is None or not known.is_change:
            return
        if wait := self._changes.wait(caller.id):
            raise TooManyChanges(math.ceil(wait))

    def _may_be_repeated(self, row: Row | None, metadata: dict[str, str]) -> bool:
        """Whether the caller chose the request's id; raises InvalidParameter when what it chose is none.

        A peer says so of its own caller's id, which it passes on with further calls that are no retries.
        """
        if (channels.REQUEST_ID if self.source is not None else channels.CHOSEN) not in metadata:
            return False
        channels.check_request_id(metadata.get(channels.REQUEST_ID, ""))
        return row is not None and not row.peers


class _Call:
    """One RPC under way."""

    def __init__(self, chain: RequestInterceptor, method: str, metadata: dict[str, str], room: Room) -> None:
        self._chain = chain
        self._room = room
        self._method = method
        self._metadata = metadata
        self._decision: Decision | None = None
        self._entry: Entry | None = None
        self._message: Message | None = None
        self._sender = ""
        self._source: Source | None = None
        self._reason = ""
        self._lacks_audit = False
        self._is_credential = False
        self._started = time.perf_counter()
        self._code = grpc.StatusCode.CANCELLED
        """How it ended, unless somebody says otherwise."""
        given = metadata.get(channels.REQUEST_ID, "")
        self._request_id = given if channels.is_request_id(given) else channels.new_request_id()

    def refused(self, error: ServiceError) -> Any:
        async def handle(requests: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._meet(rpc)
            try:
                await self._refuse(rpc, error)
            finally:
                self._ended(None)

        return handle

    def unary(self, behavior: Any, read: Any, write: Any) -> Any:
        async def handle(_: object, rpc: grpc.aio.ServicerContext[Any, Any]) -> Any:
            self._meet(rpc)
            try:
                answer = await self._served(rpc, behavior, read, write)
            except once.Answered as first:  # which was decided about at the time
                self._code = grpc.StatusCode.OK
                log.info("first answer given again", extra=self._facts())
                _pass_warnings(rpc, first.warnings)
                return first.answer
            except ServiceError as error:
                await self._refuse(rpc, error)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                await self._crash(rpc, error)
            else:
                self._log_success()
                request_context = context.current()
                _pass_warnings(rpc, request_context.warnings if request_context else ())
                return answer
            finally:
                # Told in a moment, when the answer is on its way: nobody waits for it with what is told about it.
                seconds = time.perf_counter() - self._started
                asyncio.get_running_loop().call_soon(self._ended, seconds)

        return handle

    def streaming(self, behavior: Any, read: Any = None) -> Any:
        async def handle(requests: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            self._meet(rpc)
            try:
                with Place(self._room) as place:
                    await self._begin()
                    request = requests if read is None else await self._received_in_time(rpc, place)
                    answers = behavior(request if read is None else self._decoded(request, read), rpc)
                    if hasattr(answers, "__aiter__"):
                        async for answer in answers:
                            self._require_decision()
                            if self._is_judged_anew():
                                await self._authenticate()
                            yield answer
                    else:  # health and reflection write through the context
                        self._require_decision()
                        await answers
            except ServiceError as error:
                await self._refuse(rpc, error)
            except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
                raise
            except Exception as error:
                await self._crash(rpc, error)
            else:
                self._log_success()
            finally:
                self._ended(None)  # a stream takes as long as somebody follows it

        return handle

    async def _served(self, rpc: grpc.aio.ServicerContext[Any, Any], behavior: Any, read: Any, write: Any) -> bytes:
        """The answer to a request, when all of it comes in time."""
        is_arriving = False
        try:
            async with asyncio.timeout(_time_left(rpc)) as limit:
                with Place(self._room) as place:
                    await self._begin()
                    is_arriving = True
                    request = await self._received(rpc, place)
                    is_arriving = False
                    _time_left(rpc)
                    message = self._decoded(request, read)
                    once.enter(self._method, message)
                    return await self._answered(behavior(message, rpc), write)
        except TimeoutError:
            if not limit.expired():  # a time-out inside the handler, which should have dealt with it
                raise
            if is_arriving:
                raise NothingCame from None
            raise DeadlineExceeded("The deadline passed before the answer was ready.") from None

    async def _received_in_time(self, rpc: grpc.aio.ServicerContext[Any, Any], place: Place) -> bytes:
        """As `_received`, for a call that lasts as long as somebody follows it; raises NothingCame."""
        try:
            async with asyncio.timeout(LONGEST_DEADLINE):
                return await self._received(rpc, place)
        except TimeoutError:
            raise NothingCame from None

    async def _received(self, rpc: grpc.aio.ServicerContext[Any, Any], place: Place) -> bytes:
        """The one message of a call; raises NothingCame, or Overloaded for a sender whom too many are waited for of.

        One that does not come at once gives its place away meanwhile: whoever sends half of a request keeps nobody else
        out. What does not come is counted and has no record.
        """
        entry, self._entry = self._entry, None
        leaving = asyncio.get_running_loop().call_later(ARRIVAL_SECONDS, place.leave)
        try:
            with self._chain.arrivals.of(self._sender):
                request = await rpc.read()
        finally:
            leaving.cancel()
        if not isinstance(request, bytes):  # the end of what the caller sends
            raise NothingCame
        was_late = place.take()
        self._entry = entry
        if was_late:
            await self._authenticate()
        return request

    def _meet(self, rpc: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Takes down where the call comes from. Of one that is over gRPC must not be asked: that ends the process."""
        self._sender = _sender(rpc.peer())
        if self._chain.source is not None:
            self._source = self._chain.source(rpc)

    async def _begin(self) -> None:
        chain = self._chain
        context.enter(context.RequestContext(self._request_id))
        context.came_from(self._address())
        row = chain.row(self._method)
        if chain.trail is not None and (row is None or row.is_audited):
            self._entry = chain.trail.begin(
                self._method.removeprefix("/"),
                row,
                request_id=self._request_id,
                source=self._address(),
                via=chain.peer,
            )
            await chain.trail.ready()
        caller = await self._authenticate()
        chain.check_pace(self._method, caller)

    async def _authenticate(self) -> context.Principal | None:
        request = await self._chain.authenticate(self._method, self._metadata, self._request_id)
        self._decision = request.decision
        if self._entry is not None:
            self._entry.caller = request.caller
        context.enter(request)
        return request.caller

    def _is_judged_anew(self) -> bool:
        """Whether each message of a stream is decided about by itself, for a caller who is asked for again (S12).

        So it is where a token says who calls; a peer looks after its own caller. The answer to a query is one answer.
        """
        row = None if self._decision is None else self._decision.row
        return self._chain.source is not None and row is not None and bool(row.subject) and not row.is_inference

    def _address(self) -> str:
        """The address that the call comes from; on a peer's socket, the one that the peer says."""
        if self._source is not None:
            return self._source.address
        given = self._metadata.get(channels.SOURCE, "")
        return given if is_address(given) else ""

    def _decoded(self, request: bytes, read: Callable[[bytes], Any]) -> Any:
        self._chain.check_size(self._method, request)
        message = self._message = _decoded(request, read)
        self._chain.check_parts(self._method, message)
        if self._entry is not None:
            self._entry.object = audit.about(message)
        return message

    async def _answered(self, work: Awaitable[Any], write: Callable[[Any], bytes]) -> bytes:
        """The answer, once it may leave: after its decision, and after its record where it holds a value."""
        try:
            answer = write(await work)
            self._require_decision()
        except once.Answered:
            audit.note(is_repeated=True)
            audit.sensitive()
            if self._entry is not None:
                await self._entry.allowed()
            raise
        if self._entry is not None:
            await self._entry.allowed()
        return answer

    def _require_decision(self) -> None:
        """Keeps an answer back for which nobody asked whether the caller may have it."""
        if self._decision is not None and not self._decision.is_allowed:
            raise Undecided

    async def _refuse(self, rpc: grpc.aio.ServicerContext[Any, Any], error: ServiceError) -> None:
        self._reason = error.reason
        self._is_credential = isinstance(error, CREDENTIAL_REFUSED)
        self._lacks_audit = isinstance(error, AuditUnavailable)
        if self._source is not None and isinstance(error, CREDENTIAL_REFUSED):
            error = self._chain.failed_logins.refusal(error, self._source, self._facts())
        elif type(error) not in TURNED_AWAY:
            # Of credentials that a peer was given, it says itself when there are too many.
            if not self._is_credential or not self._chain.passed_on.wait(owner(self._address())):
                shape = self._shape() if log.isEnabledFor(logging.DEBUG) else {}
                log.info("call refused", extra={**self._facts(), "reason": error.reason, **shape})
        elif self._chain.trail is not None:
            self._chain.trail.count(self._address() or self._chain.peer, TURNED_AWAY[type(error)])
        self._code = error.code
        await rpc.abort_with_status(to_status(error, longest=self._chain.longest_message))

    async def _crash(self, rpc: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
        self._code = grpc.StatusCode.INTERNAL
        facts = {**self._facts(), **self._shape()}
        log.error("call failed", extra=facts, exc_info=(type(error), error, error.__traceback__))
        await rpc.abort_with_status(to_status(ServiceError(f"Internal error. Request id: {self._request_id}.")))

    def _ended(self, seconds: float | None) -> None:
        if self._chain.calls is not None:
            self._chain.calls.ended(self._method.removeprefix("/"), self._code.name, seconds)
        if self._entry is not None:
            self._entry.ended(
                self._code.name,
                self._reason,
                is_lack_of_audit=self._lacks_audit,
                is_credential=self._is_credential,
            )

    def _log_success(self) -> None:
        self._code = grpc.StatusCode.OK
        if log.isEnabledFor(logging.DEBUG):
            log.debug("call answered", extra=self._facts())

    def _facts(self) -> dict[str, Any]:
        return {"method": self._method, "milliseconds": round((time.perf_counter() - self._started) * 1000, 2)}

    def _shape(self) -> dict[str, str]:
        """What the request is made of, when it was read."""
        return {} if self._message is None else {"request": safe_repr(self._message)}


def _sender(peer: str) -> str:
    """Whom a call comes from, by gRPC's name for the other end: without the port, which is each connection's own."""
    return _owner_of(peer.rpartition(":")[0])


@lru_cache(maxsize=1_024)
def _owner_of(peer: str) -> str:
    return owner(grpc_peer(peer))


def _check_fields(metadata: Sequence[object]) -> None:
    """Raises TooMuchMetadata."""
    if len(metadata) > MOST_METADATA:
        raise TooMuchMetadata


def _decoded(request: bytes, read: Callable[[bytes], Any]) -> Any:
    try:
        return read(request)
    except DecodeError:
        raise MalformedRequest("The request is not a message of the type that this method takes.") from None


def _time_left(rpc: grpc.aio.ServicerContext[Any, Any]) -> float:
    """The caller's time if that is not too long, ours if the caller set none; raises DeadlineExceeded when it is over.

    What nobody waits for any more is not begun.
    """
    remaining = rpc.time_remaining()
    if remaining is None:
        return DEFAULT_DEADLINE
    if remaining <= 0:
        raise DeadlineExceeded("The deadline passed before the request was looked at.")
    return min(remaining, LONGEST_DEADLINE)


def _pass_warnings(rpc: grpc.aio.ServicerContext[Any, Any], warnings: Sequence[str]) -> None:
    if warnings:
        rpc.set_trailing_metadata(tuple((channels.WARNING, text) for text in warnings))


async def _no_such_method(request: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Answers for a method that a listener does not have; only callers that we know learn as much."""
    await rpc.abort(grpc.StatusCode.UNIMPLEMENTED, "This listener has no such method.")
