"""Listeners: what exists on which of them, who is let in, and what a caller learns when something goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from servicekit import arrivals, channels, context, errors, grpc_server, interceptors
from servicekit.errors import NotFound, StartError, from_rpc_error
from servicekit.grpc_server import CallLimits, Listener
from servicekit.identity import Identity, InvalidToken, TokenExchange, by_assertion, by_token
from servicekit.policy import AUTHENTICATED, OPEN, Row, Table, on_behalf, permission
from servicekit.sockets import socket_address
from tessera.identity.v1 import identity_pb2 as identity_pb
from tessera.identity.v1 import identity_pb2_grpc as identity_rpc
from tessera.policy import ENDPOINT, POLICY
from tessera.serving.v1 import serving_pb2 as serving_pb
from tessera.serving.v1 import serving_pb2_grpc as serving_rpc
from tests.support.authority import ADA, GRACE, ScriptedAuthority, authority_server
from tests.support.eventually import eventually
from tests.support.faulty_link import faulty
from tests.support.sockets import short_directory
from tests.support.written_logs import written

CANARY = "canary-0123456789"
TOKEN = (("authorization", "Bearer ada-token"),)
LIMIT = 10_000
UNLIMITED = CallLimits(calls=0, changes=0)

Metadata = tuple[tuple[str, str | bytes], ...]


async def whoever_calls(_: Any) -> identity_pb.User:
    return identity_pb.User(id=context.current_caller().id, user_name=context.current_caller().name)


class Scim(identity_rpc.ScimServicer):
    """Answers GetMe as the test says, by default with the caller; GetUser fails with `failure`, if there is one."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.answer: Callable[[Any], Awaitable[identity_pb.User]] = whoever_calls

    async def GetMe(self, request: identity_pb.GetMeRequest, rpc: Any) -> identity_pb.User:
        return await self.answer(rpc)

    async def GetUser(self, request: identity_pb.GetRequest, rpc: Any) -> identity_pb.User:
        if self.failure is not None:
            raise self.failure
        return identity_pb.User(id=str(len(request.id)))

    async def DeleteUser(self, request: identity_pb.DeleteRequest, rpc: Any) -> identity_pb.DeleteResponse:
        return identity_pb.DeleteResponse()


class Authority(identity_rpc.AuthorityServicer):
    async def ExchangeToken(self, request: Any, rpc: Any) -> identity_pb.ExchangeTokenResponse:
        return identity_pb.ExchangeTokenResponse(assertion="none")

    async def IssueToken(self, request: Any, rpc: Any) -> identity_pb.IssueTokenResponse:
        return identity_pb.IssueTokenResponse(access_token="none")

    async def GetPlatform(self, request: Any, rpc: Any) -> identity_pb.GetPlatformResponse:
        request_context = context.current()
        assert request_context is not None
        caller = request_context.caller
        return identity_pb.GetPlatformResponse(workspace_id="nobody" if caller is None else caller.name)

    async def RenewAdminToken(self, request: Any, rpc: Any) -> identity_pb.RenewAdminTokenResponse:
        return identity_pb.RenewAdminTokenResponse(path="/admin.token")


class Endpoints(serving_rpc.ServingEndpointsServicer):
    """Streams the caller's name, then `failure` if there is one; `closed` is set when a stream has cleaned up."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.is_deciding = True
        self.closed = asyncio.Event()
        self.hold: asyncio.Event | None = None

    async def Query(self, request: serving_pb.QueryRequest, rpc: Any) -> AsyncIterator[httpbody_pb2.HttpBody]:
        if self.is_deciding:
            context.current_decision(ENDPOINT).allow()
        try:
            yield httpbody_pb2.HttpBody(data=context.current_caller().name.encode())
            if self.hold is not None:
                await self.hold.wait()
            if self.failure is not None:
                raise self.failure
        finally:
            self.closed.set()


class Routes(serving_rpc.RoutesServicer):
    async def Watch(self, reports: AsyncIterator[Any], rpc: Any) -> AsyncIterator[serving_pb.RouteTable]:
        async for report in reports:
            yield serving_pb.RouteTable(revision=report.acknowledged_revision)


@dataclass
class Platform:
    """A service with a public listener and sockets for two peers, and a channel to each."""

    scim: Scim = field(default_factory=Scim)
    endpoints: Endpoints = field(default_factory=Endpoints)
    authority: ScriptedAuthority = field(default_factory=ScriptedAuthority)
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)

    def assertion(self, **claims: Any) -> Metadata:
        return ((channels.ASSERTION, self.authority.signer.assertion(**claims)),)

    async def me(self, where: str = "public", metadata: Metadata = TOKEN, timeout: float | None = 5) -> str:
        stub = identity_rpc.ScimStub(self.channels[where])
        user = await stub.GetMe(identity_pb.GetMeRequest(), metadata=metadata, timeout=timeout)
        return str(user.user_name)

    async def raw(self, where: str, method: str, metadata: Metadata = (), message: bytes = b"") -> bytes:
        call: Any = self.channels[where].unary_unary(method)
        return bytes(await call(message, metadata=metadata, timeout=20))

    async def health(self, where: str = "public", service: str = "") -> Any:
        stub = health_pb2_grpc.HealthStub(self.channels[where])
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        return answer.status


@asynccontextmanager
async def running(
    *,
    readiness: dict[str, grpc_server.Check] | None = None,
    reflection: bool = False,
    identify: Any = None,
    table: Table = POLICY,
    limits: CallLimits = UNLIMITED,
    drain_seconds: float = 5.0,
    jobs: dict[str, Callable[[], Awaitable[None]]] | None = None,
) -> AsyncIterator[Platform]:
    """The platform, served by the code under test."""
    platform = Platform()
    with short_directory() as directory:
        async with authority_server(platform.authority) as to_secrets:
            exchange = TokenExchange(to_secrets, stale_seconds=0)
            listeners = [
                Listener(address="127.0.0.1:0", identify=identify or by_token(exchange), reflection=reflection),
                *(
                    Listener(
                        address=socket_address(directory, callee="shop", caller=peer),
                        identify=by_assertion(exchange.verifier),
                        peer=peer,
                    )
                    for peer in ("gateway", "serving")
                ),
            ]
            identity_services = identity_pb.DESCRIPTOR.services_by_name
            serving_services = serving_pb.DESCRIPTOR.services_by_name
            async with grpc_server.serving(
                listeners,
                services=[
                    (identity_services["Scim"], platform.scim),
                    (identity_services["Authority"], Authority()),
                    (serving_services["ServingEndpoints"], platform.endpoints),
                    (serving_services["Routes"], Routes()),
                ],
                table=table,
                readiness=readiness or {},
                jobs=jobs,
                message_limit=LIMIT,
                limits=limits,
                drain_seconds=drain_seconds,
            ) as addresses:
                platform.addresses = addresses
                async with (
                    channels.opened(addresses[0]) as public,
                    channels.opened(addresses[1]) as gateway,
                    channels.opened(addresses[2]) as serving,
                ):
                    platform.channels = {"public": public, "gateway": gateway, "serving": serving}
                    yield platform


@pytest.fixture(name="platform")
async def a_platform() -> AsyncIterator[Platform]:
    async with running() as running_platform:
        yield running_platform


@pytest.fixture
def logged() -> Iterator[Callable[[], str]]:
    with written() as tell:
        yield tell


async def refusal(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    return (await refusal(call)).code()


UNAUTHENTICATED, UNIMPLEMENTED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED
GET_PLATFORM = "/tessera.identity.v1.Authority/GetPlatform"
RENEW = "/tessera.identity.v1.Authority/RenewAdminToken"
WATCH = "/tessera.serving.v1.Routes/Watch"


# --- the policy is what is enforced


def with_row(name: str, row: Row | None) -> dict[str, Row]:
    """The policy with another row for one RPC, or with none."""
    rows = {each: POLICY[each] for each in POLICY if each != name}
    return rows if row is None else rows | {name: row}


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("tessera.identity.v1.Scim/GetMe", None, "tessera.identity.v1.Scim/GetMe has no row"),
        ("tessera.identity.v1.Scim/GetYou", AUTHENTICATED, "the row tessera.identity.v1.Scim/GetYou is for no RPC"),
        ("tessera.serving.v1.Routes/Watch", AUTHENTICATED, "tessera.serving.v1.Routes/Watch is exposed to gateway"),
        ("grpc.health.v1.Health/Checks", OPEN, "the row grpc.health.v1.Health/Checks is for no RPC"),
    ],
)
async def test_nothing_is_served_when_the_policy_does_not_fit(name: str, row: Row | None, problem: str) -> None:
    with pytest.raises(StartError, match=problem):
        async with running(table=with_row(name, row)):
            pass


async def test_method_of_grpc_without_a_row_is_not_there(platform: Platform) -> None:
    for method, metadata, code in (
        ("/grpc.health.v1.Health/List", (), UNAUTHENTICATED),
        ("/grpc.health.v1.Health/List", TOKEN, UNIMPLEMENTED),
    ):
        assert await code_of(platform.raw("public", method, metadata)) is code


async def test_open_rpc_is_answered_without_looking_at_a_credential() -> None:
    async def identify(metadata: Any, row: Row | None) -> Any:
        raise AssertionError("nobody asked who calls")

    async with running(table=with_row("tessera.identity.v1.Scim/GetUser", OPEN), identify=identify) as platform:
        assert await platform.raw("public", "/tessera.identity.v1.Scim/GetUser") == b"\x12\x010"


async def test_internal_rpc_whose_row_asks_for_a_caller_needs_an_assertion() -> None:
    on_behalf_of_somebody = on_behalf("gateway", "serving")
    async with running(table=with_row("tessera.identity.v1.Authority/GetPlatform", on_behalf_of_somebody)) as platform:
        assert await code_of(platform.raw("gateway", GET_PLATFORM)) is UNAUTHENTICATED
        assert await platform.raw("gateway", GET_PLATFORM, platform.assertion())


async def test_answer_without_the_decision_that_its_row_asks_for_is_withheld(logged: Callable[[], str]) -> None:
    async with running(table=with_row("tessera.identity.v1.Scim/GetMe", permission("shelf", "READ"))) as platform:
        error = await refusal(platform.me())
        assert error.code() is grpc.StatusCode.INTERNAL
        assert (error.details() or "").startswith("Internal error. Request id: ")
        assert "Undecided" in logged()

        async def decide(rpc: Any) -> identity_pb.User:
            context.current_decision("shelf").allow()
            return await whoever_calls(rpc)

        platform.scim.answer = decide
        assert await platform.me() == ADA.name
        # The decision was made for that call alone.
        platform.scim.answer = whoever_calls
        assert await code_of(platform.me()) is grpc.StatusCode.INTERNAL


async def test_stream_without_the_decision_that_its_row_asks_for_is_withheld() -> None:
    name = "tessera.serving.v1.ServingEndpoints/Query"
    async with running(table=with_row(name, permission(ENDPOINT, "CAN_QUERY"))) as platform:
        platform.endpoints.is_deciding = False
        assert await code_of(platform.raw("public", f"/{name}", TOKEN)) is grpc.StatusCode.INTERNAL


async def test_decision_that_the_row_does_not_ask_for_is_a_failure_of_ours(platform: Platform) -> None:
    async def decide(rpc: Any) -> identity_pb.User:
        context.current_decision("shelf").allow()
        return identity_pb.User(user_name=CANARY)

    platform.scim.answer = decide
    assert await code_of(platform.me()) is grpc.StatusCode.INTERNAL


# --- what exists where


@pytest.mark.parametrize("method", [GET_PLATFORM, RENEW, WATCH])
async def test_internal_rpc_does_not_exist_on_the_public_listener(platform: Platform, method: str) -> None:
    assert await code_of(platform.raw("public", method, TOKEN)) is UNIMPLEMENTED
    assert await code_of(platform.raw("public", method)) is UNAUTHENTICATED


async def test_internal_rpc_exists_for_the_named_peers_and_needs_no_assertion(platform: Platform) -> None:
    for peer in ("gateway", "serving"):
        stub = identity_rpc.AuthorityStub(platform.channels[peer])
        assert (await stub.GetPlatform(identity_pb.GetPlatformRequest(), timeout=20)).workspace_id == "nobody"
        answer = await stub.GetPlatform(identity_pb.GetPlatformRequest(), metadata=platform.assertion(), timeout=20)
        assert answer.workspace_id == ADA.name


async def test_internal_rpc_does_not_exist_for_other_peers(platform: Platform) -> None:
    for peer in ("gateway", "serving"):
        assert await code_of(platform.raw(peer, RENEW, platform.assertion())) is UNIMPLEMENTED
        assert await code_of(platform.raw(peer, RENEW)) is UNAUTHENTICATED
    assert await code_of(platform.raw("serving", WATCH, platform.assertion())) is UNIMPLEMENTED


async def test_invalid_assertion_is_refused_on_an_internal_rpc_too(platform: Platform) -> None:
    assert await code_of(platform.raw("gateway", GET_PLATFORM, ((channels.ASSERTION, "a.b.c"),))) is UNAUTHENTICATED


async def test_public_rpc_on_a_peer_socket_needs_an_assertion(platform: Platform) -> None:
    assert await platform.me("gateway", platform.assertion()) == ADA.name
    assert await code_of(platform.me("gateway", ())) is UNAUTHENTICATED
    assert await code_of(platform.me("gateway", TOKEN)) is UNAUTHENTICATED
    assert await code_of(platform.me("gateway", platform.assertion(aud="elsewhere"))) is UNAUTHENTICATED


async def test_public_rpc_on_the_public_listener_needs_a_token(platform: Platform) -> None:
    assert await platform.me() == ADA.name
    assert await code_of(platform.me(metadata=())) is UNAUTHENTICATED
    wrong = (("authorization", "Bearer wrong"),)
    assert await code_of(platform.me(metadata=wrong)) is grpc.StatusCode.PERMISSION_DENIED


async def test_assertion_on_the_public_listener_is_ignored(platform: Platform) -> None:
    assertion = platform.assertion(sub=GRACE.id, name=GRACE.name, groups=["admins"])
    assert await code_of(platform.me(metadata=assertion)) is UNAUTHENTICATED
    assert await platform.me(metadata=assertion + TOKEN) == ADA.name


@pytest.mark.parametrize(
    "method",
    [
        "/tessera.identity.v1.Scim/Nothing",
        "/tessera.identity.v1.Scim/getme",
        "/tessera.identity.v1.Scim/GetMe/",
        "/tessera.secrets.v1.Secrets/GetSecret",
        "/grpc.health.v1.Health/Nothing",
        "/grpc.health.v1.Health",
        "/",
        "//",
    ],
)
async def test_unknown_method_is_only_told_to_known_callers(platform: Platform, method: str) -> None:
    assert await code_of(platform.raw("public", method)) is UNAUTHENTICATED
    error = await refusal(platform.raw("public", method, TOKEN))
    assert (error.code(), error.details()) == (UNIMPLEMENTED, "This listener has no such method.")
    assert await code_of(platform.raw("gateway", method)) is UNAUTHENTICATED


async def test_name_of_an_unknown_method_is_not_logged(platform: Platform, logged: Callable[[], str]) -> None:
    await refusal(platform.raw("public", f"/{CANARY}/{CANARY}"))
    await eventually(lambda: "credential refused" in logged())
    assert CANARY not in logged()


async def test_request_is_not_read_before_its_caller_is_known(platform: Platform) -> None:
    broken = b"\xff\xff\xff"
    assert await code_of(platform.raw("public", "/tessera.identity.v1.Scim/GetUser", (), broken)) is UNAUTHENTICATED
    assert await code_of(platform.raw("public", "/tessera.serving.v1.ServingEndpoints/Query", (), broken)) is (
        UNAUTHENTICATED
    )


async def test_request_that_is_no_message_is_malformed(platform: Platform) -> None:
    error = await refusal(platform.raw("public", "/tessera.identity.v1.Scim/GetUser", TOKEN, b"\xff\xff\xff"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(error, peer="shop").reason == "MALFORMED_REQUEST"


# --- streams


async def test_streaming_rpc_goes_through_the_same_chain(platform: Platform, logged: Callable[[], str]) -> None:
    stub = serving_rpc.ServingEndpointsStub(platform.channels["public"])
    answers = [body.data async for body in stub.Query(serving_pb.QueryRequest(), metadata=TOKEN, timeout=20)]
    assert answers == [ADA.name.encode()]
    assert await code_of(anext(aiter(stub.Query(serving_pb.QueryRequest(), timeout=20)))) is UNAUTHENTICATED
    await eventually(lambda: "call answered" in logged())
    lines = [json.loads(line) for line in logged().splitlines()]
    (answered,) = [line for line in lines if line["event"] == "call answered" and "Query" in line["method"]]
    assert answered["caller"] == ADA.name


async def test_both_sides_of_a_stream_go_on_until_one_ends_it(platform: Platform) -> None:
    async def reports() -> AsyncIterator[serving_pb.RouteReport]:
        for revision in (1, 2):
            yield serving_pb.RouteReport(acknowledged_revision=revision)

    stub = serving_rpc.RoutesStub(platform.channels["gateway"])
    assert [table.revision async for table in stub.Watch(reports(), timeout=20)] == [1, 2]


async def test_stream_that_its_caller_leaves_is_cleaned_up(platform: Platform) -> None:
    platform.endpoints.hold = asyncio.Event()
    stub = serving_rpc.ServingEndpointsStub(platform.channels["public"])
    call = stub.Query(serving_pb.QueryRequest(), metadata=TOKEN, timeout=20)
    await anext(aiter(call))
    assert not platform.endpoints.closed.is_set()
    call.cancel()
    await asyncio.wait_for(platform.endpoints.closed.wait(), 5)


async def test_error_within_a_stream_reaches_its_caller(platform: Platform) -> None:
    platform.endpoints.failure = NotFound("No such endpoint.")
    stub = serving_rpc.ServingEndpointsStub(platform.channels["public"])
    answers = aiter(stub.Query(serving_pb.QueryRequest(), metadata=TOKEN, timeout=20))
    await anext(answers)
    error = from_rpc_error(await refusal(anext(answers)), peer="shop")
    assert (error.reason, error.message) == ("RESOURCE_DOES_NOT_EXIST", "No such endpoint.")


# --- health


async def test_health_is_open_on_every_listener(platform: Platform) -> None:
    for where in platform.channels:
        await eventually(partial(_serves, platform, where), within=10)


async def _serves(platform: Platform, where: str = "public") -> bool:
    return bool(await platform.health(where) == health_pb2.HealthCheckResponse.SERVING)


async def test_health_follows_the_readiness_checks_within_two_seconds() -> None:
    broken: set[str] = set()

    async def database() -> None:
        if "database" in broken:
            raise OSError("gone")

    async def key() -> None:
        if "key" in broken:
            await asyncio.Event().wait()

    async def index() -> None:
        if "index" in broken:
            await asyncio.Event().wait()

    async def fails() -> bool:
        return not await _serves(platform)

    async with running(readiness={"database": database, "key": key, "index": index}) as platform:
        for what in ({"database"}, {"key", "index"}):
            await eventually(lambda: _serves(platform), within=10)
            broken |= what
            await eventually(fails, within=10)
            broken.clear()
        await eventually(lambda: _serves(platform), within=10)


async def test_service_is_not_ready_before_it_was_looked_at() -> None:
    looked = asyncio.Event()

    async def database() -> None:
        await looked.wait()

    async with running(readiness={"database": database}) as platform:
        assert not await _serves(platform)
        looked.set()
        await eventually(lambda: _serves(platform), within=10)


# --- reflection


async def reflected(platform: Platform, metadata: Metadata) -> list[str]:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(platform.channels["public"])
    call = stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=20)
    return [service.name async for answer in call for service in answer.list_services_response.service]


async def test_reflection_needs_a_token_and_lists_what_is_public() -> None:
    async with running(reflection=True) as platform:
        assert await code_of(reflected(platform, ())) is UNAUTHENTICATED
        assert sorted(await reflected(platform, TOKEN)) == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "tessera.identity.v1.Scim",
            "tessera.serving.v1.ServingEndpoints",
        ]


async def test_who_follows_health_takes_no_place_of_who_has_a_token() -> None:
    async with running(reflection=True, limits=CallLimits(calls=1, changes=0)) as platform:
        stub = health_pb2_grpc.HealthStub(platform.channels["public"])
        followed = aiter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60))
        await anext(followed)
        another = aiter(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60))
        assert (await refusal(anext(another))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await reflected(platform, TOKEN)


async def test_reflection_is_absent_when_it_is_off(platform: Platform) -> None:
    assert await code_of(reflected(platform, TOKEN)) is UNIMPLEMENTED


# --- failures


class CarriesSecret(Exception):
    pass


async def raise_canary(rpc: Any) -> identity_pb.User:
    try:
        raise KeyError(CANARY)
    except KeyError as error:
        raise CarriesSecret(CANARY) from error


async def answer_nonsense(rpc: Any) -> Any:
    return {CANARY: CANARY}


async def time_out(rpc: Any) -> identity_pb.User:
    raise TimeoutError(CANARY)


@pytest.mark.parametrize("answer", [raise_canary, time_out, answer_nonsense])
async def test_exception_of_a_handler_stays_in_the_service(
    platform: Platform, logged: Callable[[], str], answer: Any
) -> None:
    platform.scim.answer = answer
    error = await refusal(platform.me(metadata=(*TOKEN, (channels.REQUEST_ID, "r-1"))))
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "Internal error. Request id: r-1.")
    assert CANARY not in repr(error.trailing_metadata()) + repr(error.initial_metadata()) + str(
        error.debug_error_string()
    )
    await eventually(lambda: "call failed" in logged())
    assert CANARY not in logged()
    (line,) = [line for line in map(json.loads, logged().splitlines()) if line["event"] == "call failed"]
    assert (line["request_id"], line["caller"]) == ("r-1", ADA.name)
    assert line["method"] == "/tessera.identity.v1.Scim/GetMe"


async def test_log_tells_what_the_request_of_a_call_was_made_of_and_not_what_it_said(
    platform: Platform, logged: Callable[[], str]
) -> None:
    stub = identity_rpc.ScimStub(platform.channels["public"])
    for event, failure in (("call failed", CarriesSecret(CANARY)), ("call refused", NotFound("There is nobody."))):
        platform.scim.failure = failure
        await refusal(stub.GetUser(identity_pb.GetRequest(id=CANARY), metadata=TOKEN, timeout=20))
        (line,) = [line for line in map(json.loads, logged().splitlines()) if line["event"] == event]
        assert line["request"] == f"GetRequest(id=<{len(CANARY)} characters>)"
    assert CANARY not in logged()
    logging.getLogger().setLevel(logging.INFO)
    await refusal(stub.GetUser(identity_pb.GetRequest(id=CANARY), metadata=TOKEN, timeout=20))
    assert "request" not in json.loads(logged().splitlines()[-1]), "refusals are many, and their message says enough"


async def test_exception_of_a_streaming_handler_stays_in_the_service(
    platform: Platform, logged: Callable[[], str]
) -> None:
    platform.endpoints.failure = CarriesSecret(CANARY)
    stub = serving_rpc.ServingEndpointsStub(platform.channels["public"])
    answers = aiter(stub.Query(serving_pb.QueryRequest(), metadata=TOKEN, timeout=20))
    await anext(answers)
    error = await refusal(anext(answers))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert (error.details() or "").startswith("Internal error. Request id: ")
    assert CANARY not in repr(error.trailing_metadata()) + str(error.debug_error_string())
    await eventually(lambda: "call failed" in logged())
    assert CANARY not in logged()


async def test_exception_while_a_caller_is_identified_lets_nobody_in(logged: Callable[[], str]) -> None:
    async def identify(metadata: Any, row: Row | None) -> Any:
        raise CarriesSecret(CANARY)

    async with running(identify=identify) as platform:
        for call in (platform.me(), platform.raw("public", "/nothing/here")):
            error = await refusal(call)
            assert error.code() is grpc.StatusCode.INTERNAL
            assert CANARY not in repr(error.trailing_metadata()) + (error.details() or "")
    assert CANARY not in logged()


async def test_error_of_ours_reaches_the_caller_whole(platform: Platform) -> None:
    async def answer(rpc: Any) -> identity_pb.User:
        raise NotFound("There is no such user.", retry_after=3)

    platform.scim.answer = answer
    error = from_rpc_error(await refusal(platform.me()), peer="shop")
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_DOES_NOT_EXIST")
    assert (error.message, error.retry_after) == ("There is no such user.", 3)


@pytest.mark.parametrize("character", ["x", "é", "\n"])
async def test_long_error_reaches_a_peer_whole_and_the_public_cut(platform: Platform, character: str) -> None:
    message = character * (errors.LONGEST_PEER_MESSAGE // len(character.encode()))

    async def refuse(rpc: Any) -> identity_pb.User:
        raise NotFound(message)

    platform.scim.answer = refuse
    to_peer = await refusal(platform.me("gateway", platform.assertion()))
    to_public = await refusal(platform.me())
    assert from_rpc_error(to_peer, peer="Shop").message == message
    assert len(from_rpc_error(to_public, peer="Shop").message.encode()) < errors.LONGEST_MESSAGE + 10


ODD_IDS = ["", "a" * 65, "a b", "../x", "{}"]


@pytest.mark.parametrize("odd", ODD_IDS)
async def test_odd_request_id_is_refused_of_a_caller_that_is_known(platform: Platform, odd: str) -> None:
    """Who relies on its id must not be deceived: under another one, a retry would be a new request."""
    error = await refusal(platform.me(metadata=(*TOKEN, (channels.REQUEST_ID, odd))))
    assert (error.code(), "X-Tessera-Request-Id" in (error.details() or "")) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    error = await refusal(platform.me(metadata=((channels.REQUEST_ID, odd),)))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("odd", ODD_IDS)
async def test_odd_request_id_of_a_peer_is_replaced(platform: Platform, odd: str) -> None:
    platform.scim.answer = raise_canary
    metadata = (*platform.assertion(), (channels.REQUEST_ID, odd))
    details = (await refusal(platform.me("gateway", metadata))).details() or ""
    given = details.removeprefix("Internal error. Request id: ").removesuffix(".")
    assert len(given) == 32
    assert given.isalnum()


async def test_request_may_be_repeated_when_its_caller_chose_the_id(platform: Platform) -> None:
    found = []

    async def answer(rpc: Any) -> identity_pb.User:
        request = context.current()
        assert request is not None
        found.append(request.may_be_repeated)
        return await whoever_calls(rpc)

    platform.scim.answer = answer
    given, chosen = (channels.REQUEST_ID, "r-1"), (channels.CHOSEN, "true")
    for sent in ((), (given,), (chosen,)):
        await platform.me(metadata=(*TOKEN, *sent))
    assert found == [False, True, False]
    for passed_on in ((), (given,), (given, chosen)):
        await platform.me("gateway", (*platform.assertion(), *passed_on))
    assert found[3:] == [False, False, True]


async def test_calls_at_the_same_time_each_have_their_own_caller(platform: Platform) -> None:
    both = asyncio.Barrier(2)

    async def answer(rpc: Any) -> identity_pb.User:
        await both.wait()
        return await whoever_calls(rpc)

    platform.scim.answer = answer
    grace = (("authorization", "Bearer grace-token"),)
    assert tuple(await asyncio.gather(platform.me(), platform.me(metadata=grace))) == (ADA.name, GRACE.name)


# --- deadlines and limits


@dataclass
class Hanging:
    """An answer that never comes."""

    remaining: float | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, rpc: Any) -> identity_pb.User:
        self.remaining = rpc.time_remaining()
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()
        raise AssertionError


def test_deadlines_are_ten_seconds_by_default_and_sixty_at_the_most() -> None:
    assert (interceptors.DEFAULT_DEADLINE, interceptors.LONGEST_DEADLINE) == (10.0, 60.0)


@pytest.mark.parametrize(("constant", "timeout"), [("DEFAULT_DEADLINE", None), ("LONGEST_DEADLINE", 30.0)])
async def test_call_without_a_deadline_or_with_a_long_one_ends_at_ours(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, constant: str, timeout: float | None
) -> None:
    monkeypatch.setattr(interceptors, constant, 0.2)
    platform.scim.answer = hanging = Hanging()
    async with asyncio.timeout(20):
        error = from_rpc_error(await refusal(platform.me(timeout=timeout)), peer="shop")
    assert error.reason == "DEADLINE_EXCEEDED"
    assert error.message == "The deadline passed before the answer was ready."
    assert hanging.ended.is_set()


async def test_deadline_of_the_caller_is_kept(platform: Platform) -> None:
    platform.scim.answer = hanging = Hanging()
    assert await code_of(platform.me(timeout=0.2)) is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(hanging.ended.wait(), 5)
    assert hanging.remaining is not None
    assert hanging.remaining <= 0.2


async def test_call_that_its_caller_gives_up_is_given_up_here(platform: Platform) -> None:
    platform.scim.answer = hanging = Hanging()
    call = asyncio.create_task(platform.me())
    await asyncio.wait_for(hanging.begun.wait(), 5)
    call.cancel()
    await asyncio.wait_for(hanging.ended.wait(), 5)


async def test_message_at_the_limit_is_taken_and_one_byte_more_is_refused(platform: Platform) -> None:
    overhead = identity_pb.GetRequest(id="x" * LIMIT).ByteSize() - LIMIT
    stub = identity_rpc.ScimStub(platform.channels["public"])
    fits = identity_pb.GetRequest(id="x" * (LIMIT - overhead))
    assert (await stub.GetUser(fits, metadata=TOKEN, timeout=20)).id == str(LIMIT - overhead)
    too_long = identity_pb.GetRequest(id=fits.id + "x")
    code = await code_of(stub.GetUser(too_long, metadata=TOKEN, timeout=20))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_at_the_limit_is_taken_and_one_byte_more_is_refused(platform: Platform) -> None:
    async def is_taken(size: int) -> bool:
        try:
            return await platform.me(metadata=(*TOKEN, ("x-long", "x" * size)), timeout=None) == ADA.name
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return False

    # What gRPC sends of its own counts, and a deadline would differ in length, so the limit has to be looked for.
    fits, refused = grpc_server.LONGEST_METADATA - 1_000, grpc_server.LONGEST_METADATA
    while refused - fits > 1:
        middle = (fits + refused) // 2
        fits, refused = (middle, refused) if await is_taken(middle) else (fits, middle)
    # Each time, and not by chance.
    assert [await is_taken(size) for size in (fits, refused) * 10] == [True, False] * 10
    long = ("x-long", "x" * 2 * grpc_server.LONGEST_METADATA)
    assert await platform.me("gateway", (*platform.assertion(), long), timeout=30) == ADA.name


class HalfSender:
    """A client that opens calls, sends a part of their messages, and stays: HTTP/2 as it is on the wire."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self._stream = -1
        self.ended: list[int] = []
        """Streams that the server has ended."""

    @classmethod
    @asynccontextmanager
    async def connected(cls, address: str, *, source: str = "127.0.0.1") -> AsyncIterator[HalfSender]:
        host, port = address.rsplit(":", 1)
        sender = cls(*await asyncio.open_connection(host, int(port), local_addr=(source, 0)))
        sender.writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
        hearing = asyncio.create_task(sender._hear())
        try:
            yield sender
        finally:
            hearing.cancel()
            sender.writer.transport.abort()

    def open(self, method: str, *metadata: tuple[str, str], part: bytes = b"") -> int:
        """Opens a call, and sends a part of its message; the stream's number."""
        self._stream += 2
        headers = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x", "te": "trailers"}
        headers |= {"content-type": "application/grpc", **dict(metadata)}
        block = b"".join(
            bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in headers.items()
        )
        self.writer.write(frame(1, 4, self._stream, block) + (frame(0, 0, self._stream, part) if part else b""))
        return self._stream

    def go_on(self, stream: int, rest: bytes) -> None:
        """Sends the rest of a call's message, and the end of the stream."""
        self.writer.write(frame(0, 1, stream, rest))

    async def _hear(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(9)
                await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                if kind == 4 and not flags & 1:
                    self.writer.write(frame(4, 1, 0))
                if (kind == 1 and flags & 1) or kind == 3:
                    self.ended.append(stream)


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


HALF = b"\0\0\0\0\x64abc"
"""Of a message of a hundred bytes."""

GET_ME = "/tessera.identity.v1.Scim/GetMe"
QUERY = "/tessera.serving.v1.ServingEndpoints/Query"


@pytest.mark.parametrize("part", [b"", b"\0", HALF])
async def test_half_a_request_is_given_up_at_its_deadline(
    platform: Platform, part: bytes, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], str]
) -> None:
    monkeypatch.setattr(interceptors, "DEFAULT_DEADLINE", 0.3)
    monkeypatch.setattr(interceptors, "LONGEST_DEADLINE", 0.5)
    async with HalfSender.connected(platform.addresses[0]) as sender:
        for _ in range(10):
            sender.open(GET_ME, *TOKEN, part=part)
            sender.open(GET_ME, *TOKEN, ("grpc-timeout", "1H"), part=part)
            sender.open(QUERY, *TOKEN, part=part)
        await eventually(lambda: len(set(sender.ended)) == 30, what="every call is ended")
    assert "call refused" not in logged(), "it is counted"
    monkeypatch.undo()
    assert await platform.me(timeout=30) == ADA.name


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer of-nobody"),)])
async def test_of_whom_nobody_knows_no_message_is_waited_for(platform: Platform, metadata: Any) -> None:
    async with HalfSender.connected(platform.addresses[0]) as sender:
        for _ in range(10):
            sender.open(GET_ME, *metadata, ("grpc-timeout", "1H"), part=HALF)
            sender.open(QUERY, *metadata, ("grpc-timeout", "1H"), part=HALF)
        await eventually(lambda: len(set(sender.ended)) == 20, what="every call is refused")


async def test_whose_credential_ends_while_a_message_is_on_its_way_is_not_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interceptors, "ARRIVAL_SECONDS", 0.0)
    asked = asyncio.Event()
    served: list[Any] = []
    is_good = True

    async def identify(metadata: Any, row: Row | None) -> Identity:
        asked.set()
        if not is_good:
            raise InvalidToken
        return Identity(ADA)

    async def answer(rpc: Any) -> identity_pb.User:
        served.append(rpc)
        return await whoever_calls(rpc)

    async with running(identify=identify) as platform:
        platform.scim.answer = answer
        async with HalfSender.connected(platform.addresses[0]) as sender:
            stream = sender.open(GET_ME, *TOKEN, part=b"\0")
            await asked.wait()
            is_good = False
            sender.go_on(stream, b"\0\0\0\0")
            await eventually(lambda: stream in sender.ended, what="the call is refused")
    assert served == []


async def test_where_a_call_came_from_is_known_when_it_is_over() -> None:
    """Tasks that it began may still call others; gRPC itself ends the process when it is asked then."""
    is_over = asyncio.Event()
    sources: list[str] = []

    async def later() -> None:
        await is_over.wait()
        sources.append(context.source())

    async def identify(metadata: Any, row: Row | None) -> Identity:
        tasks.append(asyncio.create_task(later()))
        return Identity(ADA)

    tasks: list[asyncio.Task[None]] = []
    async with running(identify=identify) as platform:
        await platform.me()
        is_over.set()
        await asyncio.gather(*tasks)
    assert sources == ["127.0.0.1"]


async def test_who_sends_half_of_many_requests_keeps_nobody_else_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "MOST_RPCS", 20)
    monkeypatch.setattr(interceptors, "MOST_AWAITED", 10)
    monkeypatch.setattr(interceptors, "ARRIVAL_SECONDS", 0.0)
    async with running(limits=CallLimits(calls=5, changes=0)) as platform, AsyncExitStack() as stack:
        senders = [
            await stack.enter_async_context(HalfSender.connected(platform.addresses[0], source="127.0.0.2"))
            for _ in range(4)
        ]
        for _ in range(10):
            for sender in senders:
                sender.open(GET_ME, *TOKEN, ("grpc-timeout", "1H"), part=HALF)
                assert await platform.me(timeout=30) == ADA.name
        # Ten are waited for, and the others refused at once.
        await eventually(lambda: sum(len(set(sender.ended)) for sender in senders) == 30)
        assert await platform.me(timeout=30) == ADA.name
        assert sum(len(set(sender.ended)) for sender in senders) == 30


async def test_half_senders_who_go_leave_nothing(platform: Platform, logged: Callable[[], str]) -> None:
    assert await platform.me(timeout=30) == ADA.name
    before = len(asyncio.all_tasks())
    for _ in range(5):
        async with HalfSender.connected(platform.addresses[0]) as sender:
            for _ in range(20):
                sender.open(GET_ME, *TOKEN, ("grpc-timeout", "1H"), part=HALF)
            await sender.writer.drain()
            await eventually(lambda: len(asyncio.all_tasks()) > before + 20)
    await eventually(lambda: len(asyncio.all_tasks()) <= before, what="no call is left")
    assert [line for line in logged().splitlines() if json.loads(line)["level"] in ("warning", "error")] == []


@pytest.mark.parametrize("where", ["public", "gateway"])
async def test_metadata_has_as_many_fields_as_it_may_and_no_more(
    platform: Platform, where: str, logged: Callable[[], str]
) -> None:
    credential = TOKEN if where == "public" else platform.assertion()
    # The user agent is one, too.
    most = (*credential, *(("x-many", "x") for _ in range(interceptors.MOST_METADATA - 2)))
    assert await platform.me(where, most, timeout=30) == ADA.name
    exchanges = len(platform.authority.exchanges)
    for metadata in ((*most, ("x-many", "x")), (*most, ("x-more-bin", b"x")), (("x-many", "x"),) * 120):
        error = from_rpc_error(await refusal(platform.me(where, metadata, timeout=30)), peer="shop")
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER_VALUE")
        assert error.message == "The metadata of a call may have 100 fields at the most."
    assert len(platform.authority.exchanges) == exchanges, "nobody is asked who calls"
    assert "call refused" not in logged(), "it is counted"


async def test_call_whose_deadline_has_passed_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop was busy for so long that nobody waits any more, and gRPC could not say so yet."""
    begun = []
    arrived = arrivals.Arriving.__exit__

    def slow(*args: Any) -> None:
        arrived(*args)
        time.sleep(0.3)  # the point of it

    async def answer(rpc: Any) -> identity_pb.User:
        begun.append(rpc)
        return await whoever_calls(rpc)

    async with running() as platform:
        platform.scim.answer = answer
        assert await platform.me(timeout=30) == ADA.name
        monkeypatch.setattr(arrivals.Arriving, "__exit__", slow)
        assert await code_of(platform.me(timeout=0.1)) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await platform.me(timeout=30) == ADA.name
        assert len(begun) == 2


# --- more than can be done


async def test_more_calls_than_there_is_room_for_are_refused_at_once_and_before_anybody_asks_who_calls() -> None:
    go_on, asked = asyncio.Event(), 0

    async def answer(rpc: Any) -> identity_pb.User:
        await go_on.wait()
        return await whoever_calls(rpc)

    async def identify(metadata: Any, row: Row | None) -> Identity:
        nonlocal asked
        asked += 1
        return Identity(ADA)

    async with running(identify=identify, limits=CallLimits(calls=3, changes=0)) as platform:
        await eventually(lambda: _serves(platform), within=30)
        platform.scim.answer = answer
        first = [asyncio.create_task(platform.me(timeout=60)) for _ in range(3)]
        await eventually(lambda: asked == 3, within=30)
        for call in (
            platform.me(metadata=()),
            platform.me(),
            platform.raw("public", "/nothing/here", (), b"\xff"),
            # Not even received: it is larger than a message may be.
            platform.raw("public", "/tessera.identity.v1.Scim/GetUser", (), bytes(2 * LIMIT)),
        ):
            error = from_rpc_error(await refusal(call), peer="shop")
            assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUEST_LIMIT_EXCEEDED")
            assert error.retry_after == 1
        assert asked == 3
        # A health check, and another listener, have room of their own.
        assert await _serves(platform)
        stub = identity_rpc.ScimStub(platform.channels["gateway"])
        assert await stub.GetUser(identity_pb.GetRequest(id="1"), metadata=platform.assertion(), timeout=30)
        go_on.set()
        assert await asyncio.gather(*first) == [ADA.name] * 3
        assert await platform.me() == ADA.name


async def test_internal_calls_of_a_peer_have_room_beside_those_of_its_callers() -> None:
    go_on, begun = asyncio.Event(), asyncio.Event()

    async def answer(rpc: Any) -> identity_pb.User:
        begun.set()
        await go_on.wait()
        return await whoever_calls(rpc)

    async with running(limits=CallLimits(calls=1, changes=0)) as platform:
        platform.scim.answer = answer
        first = asyncio.create_task(platform.me("gateway", platform.assertion(), timeout=60))
        await asyncio.wait_for(begun.wait(), 30)
        assert await code_of(platform.me("gateway", platform.assertion())) is grpc.StatusCode.RESOURCE_EXHAUSTED
        stub = identity_rpc.AuthorityStub(platform.channels["gateway"])
        assert await stub.GetPlatform(identity_pb.GetPlatformRequest(), timeout=30)
        go_on.set()
        assert await first == ADA.name


async def test_queries_of_models_take_no_room() -> None:
    async with running(limits=CallLimits(calls=1, changes=0)) as platform:
        platform.endpoints.hold = asyncio.Event()
        stub = serving_rpc.ServingEndpointsStub(platform.channels["public"])
        queries = [aiter(stub.Query(serving_pb.QueryRequest(), metadata=TOKEN, timeout=60)) for _ in range(5)]
        for query in queries:
            assert (await anext(query)).data == ADA.name.encode()
        assert await platform.me() == ADA.name
        platform.endpoints.hold.set()


async def test_calls_that_are_given_up_or_fail_give_their_room_back() -> None:
    async with running(limits=CallLimits(calls=2, changes=0)) as platform:
        platform.scim.answer = raise_canary
        for _ in range(5):
            assert await code_of(platform.me()) is grpc.StatusCode.INTERNAL
        for _ in range(5):
            platform.scim.answer = hanging = Hanging()
            call = asyncio.create_task(platform.me(timeout=60))
            await asyncio.wait_for(hanging.begun.wait(), 30)
            call.cancel()
            await asyncio.wait_for(hanging.ended.wait(), 30)
        platform.scim.answer = whoever_calls
        assert await platform.me() == ADA.name


async def test_changes_of_one_caller_are_counted_over_all_listeners_and_reads_are_not() -> None:
    table = with_row("tessera.identity.v1.Scim/DeleteUser", AUTHENTICATED)
    async with running(table=table, limits=CallLimits(calls=0, changes=1)) as platform:

        async def is_refused(where: str, metadata: Metadata) -> bool:
            stub = identity_rpc.ScimStub(platform.channels[where])
            try:
                await stub.DeleteUser(identity_pb.DeleteRequest(id="1"), metadata=metadata, timeout=30)
            except grpc.aio.AioRpcError as error:
                known = from_rpc_error(error, peer="shop")
                assert (known.reason, known.retry_after) == ("REQUEST_LIMIT_EXCEEDED", 1)
                return True
            return False

        places = (("public", TOKEN), ("gateway", platform.assertion()))
        began = time.monotonic()
        refusals = [await is_refused(*place) for place in places * 20]
        assert not any(refusals[:2])
        # Two at once, and one for each second that this took.
        assert refusals.count(False) <= 2 + (time.monotonic() - began)
        for _ in range(20):
            assert await platform.me() == ADA.name
        assert not await is_refused("public", (("authorization", "Bearer grace-token"),))


# --- connections


async def test_a_connection_takes_new_calls_for_a_while_only_and_nobody_notices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call in the middle of its connection's end is finished; a stream beyond that ends, and can be opened anew."""
    monkeypatch.setattr(grpc_server, "CONNECTION_AGE_SECONDS", 0.2)
    hold, ended = asyncio.Event(), asyncio.Event()

    async def answer(rpc: Any) -> identity_pb.User:
        await hold.wait()
        return await whoever_calls(rpc)

    async with running(limits=CallLimits(calls=0, changes=0, longest=2.0)) as platform:
        peers: set[str] = set()
        platform.scim.answer = answer
        slow = asyncio.create_task(platform.me(timeout=60))
        platform.endpoints.hold = asyncio.Event()
        stub = serving_rpc.ServingEndpointsStub(platform.channels["public"])
        stream = aiter(stub.Query(serving_pb.QueryRequest(), metadata=TOKEN, timeout=60))
        await anext(stream)

        async def note(rpc: Any) -> identity_pb.User:
            peers.add(rpc.peer())
            return await whoever_calls(rpc)

        async def follow() -> None:
            assert await code_of(anext(stream)) is grpc.StatusCode.UNAVAILABLE
            ended.set()

        following = asyncio.create_task(follow())

        async def connections(most: int) -> bool:
            platform.scim.answer = note
            assert await platform.me(timeout=30) == ADA.name
            return len(peers) >= most

        await eventually(partial(connections, 2), within=30)
        hold.set()
        assert await slow == ADA.name
        await asyncio.wait_for(ended.wait(), 30)
        await following
        await eventually(partial(connections, 3), within=30)


async def test_a_client_that_asks_all_the_time_whether_we_are_there_is_sent_away() -> None:
    """What ours do is allowed: the periods are compared, since waiting for them would take minutes."""
    assert grpc_server.KEEPALIVE_SECONDS <= channels.KEEPALIVE_SECONDS
    async with running() as platform:
        platform.endpoints.hold = asyncio.Event()
        options = (
            ("grpc.keepalive_time_ms", 20),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        )
        async with grpc.aio.insecure_channel(platform.addresses[0], options=options) as channel:
            stub = serving_rpc.ServingEndpointsStub(channel)
            stream = aiter(stub.Query(serving_pb.QueryRequest(), metadata=TOKEN, timeout=60))
            await anext(stream)
            error = await refusal(anext(stream))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "Too many pings")


async def test_a_peer_that_says_nothing_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its machine is gone: nobody closes the connection."""
    assert {30_000: "grpc.keepalive_time_ms", 10_000: "grpc.keepalive_timeout_ms"}.items() <= {
        value: name for name, value in channels._OPTIONS if "ping_timeout" not in name
    }.items()
    sooner = {30_000: 300, 10_000: 1_000}
    monkeypatch.setattr(channels, "_OPTIONS", [(name, sooner.get(value, value)) for name, value in channels._OPTIONS])
    async with (
        running() as platform,
        faulty(platform.addresses[1]) as link,
        channels.opened(link.address) as channel,
    ):
        stub = identity_rpc.ScimStub(channel)
        metadata = platform.assertion()

        async def is_there() -> bool:
            try:
                return bool(await stub.GetMe(identity_pb.GetMeRequest(), metadata=metadata, timeout=30))
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017 (it may come on the way there)
                return False

        await eventually(is_there, within=30)
        link.swallow()
        error = await refusal(stub.GetMe(identity_pb.GetMeRequest(), metadata=metadata, timeout=50))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        link.heal()
        await eventually(is_there, within=30)


@pytest.mark.parametrize("where", ["public", "gateway"])
async def test_a_connection_has_so_many_calls_at_a_time(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(grpc_server, "STREAMS", 3)
    monkeypatch.setattr(grpc_server, "PEER_STREAMS", 3)
    now, most, go_on = 0, 0, asyncio.Event()

    async def answer(rpc: Any) -> identity_pb.User:
        nonlocal now, most
        now += 1
        most = max(now, most)
        await go_on.wait()
        now -= 1
        return await whoever_calls(rpc)

    async with running() as platform:
        metadata = TOKEN if where == "public" else platform.assertion()
        assert await platform.me(where, metadata)  # before its first answer a client does not know how many it may have
        platform.scim.answer = answer
        calls = [asyncio.create_task(platform.me(where, metadata, timeout=60)) for _ in range(12)]
        await eventually(lambda: now == 3, within=30)
        options = (("grpc.default_authority", "localhost"),)
        index = list(platform.channels).index(where)
        async with grpc.aio.insecure_channel(platform.addresses[index], options=options) as another:
            assert await identity_rpc.ScimStub(another).GetUser(identity_pb.GetRequest(), metadata=metadata, timeout=30)
        go_on.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert most == 3
        refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        # A stranger may be told to come back; calls of a peer wait for each other, and none of them fails.
        assert {each.code() for each in refused} <= {grpc.StatusCode.UNAVAILABLE}
        assert where == "public" or not refused
        assert ADA.name in answers


# --- start and stop


def nothing_served(listeners: list[Listener]) -> Any:
    return grpc_server.serving(
        listeners,
        services=[],
        table=POLICY,
        readiness={},
        message_limit=LIMIT,
        limits=UNLIMITED,
        drain_seconds=5.0,
    )


async def start(address: str) -> None:
    async def identify(metadata: Any, row: Row | None) -> None:
        return None

    listener = Listener(address=address, identify=identify)
    async with nothing_served([listener]):
        pass


async def test_port_that_is_in_use_is_refused_by_name(platform: Platform) -> None:
    with pytest.raises(StartError, match=f"Cannot listen on {platform.addresses[0]}"):
        await start(platform.addresses[0])
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(StartError, match=f"Cannot listen on {address}"):
            await start(address)


async def test_address_that_is_not_ours_is_refused_by_name() -> None:
    for address in ("192.0.2.1:0", f"unix:{Path('/nowhere/shop.sock')}"):
        with pytest.raises(StartError, match=f"Cannot listen on {address}"):
            await start(address)


async def test_listener_that_fails_closes_the_ones_before_it(platform: Platform) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def identify(metadata: Any, row: Row | None) -> None:
        return None

    listeners = [Listener(address=at, identify=identify) for at in (f"127.0.0.1:{port}", platform.addresses[0])]
    with pytest.raises(StartError):
        async with nothing_served(listeners):
            pass
    with socket.create_server(("127.0.0.1", port)):
        pass


async def test_call_under_way_is_finished_when_the_service_stops() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def answer(rpc: Any) -> identity_pb.User:
        begun.set()
        await go_on.wait()
        return await whoever_calls(rpc)

    stop = asyncio.Event()
    started: asyncio.Future[Platform] = asyncio.get_running_loop().create_future()

    async def serve() -> None:
        async with running() as platform:
            started.set_result(platform)
            await stop.wait()
            platform.channels.clear()

    serving = asyncio.create_task(serve())
    platform = await started
    platform.scim.answer = answer
    async with channels.opened(platform.addresses[0]) as channel:
        stub = identity_rpc.ScimStub(channel)
        call = asyncio.create_task(_me(stub))
        await asyncio.wait_for(begun.wait(), 5)
        stop.set()
        await eventually(lambda: refuses_new_calls(platform.addresses[0]))
        go_on.set()
        assert await call == ADA.name
        await asyncio.wait_for(serving, 5)


async def test_no_call_is_taken_while_the_jobs_end() -> None:
    go_on = asyncio.Event()

    async def takes_its_time() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await go_on.wait()

    async def serve() -> None:
        async with running(jobs={"slow": takes_its_time}) as platform:
            started.set_result(platform.addresses[0])
            await stop.wait()

    stop = asyncio.Event()
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve())
    address = await started
    assert not await refuses_new_calls(address)
    stop.set()
    await eventually(lambda: refuses_new_calls(address))
    assert not serving.done()
    go_on.set()
    await asyncio.wait_for(serving, 5)


async def refuses_new_calls(address: str) -> bool:
    async with channels.opened(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.aio.AioRpcError:
            return True
        return False


async def _me(stub: Any) -> str:
    user = await stub.GetMe(identity_pb.GetMeRequest(), metadata=TOKEN, timeout=10)
    return str(user.user_name)


async def test_calls_that_do_not_finish_are_cut_off_on_all_listeners_at_once() -> None:
    hanging = [Hanging(), Hanging(), Hanging()]
    waiting = iter(hanging)

    async def answer(rpc: Any) -> identity_pb.User:
        return await next(waiting)(rpc)

    async with running(drain_seconds=0.5) as platform:
        platform.scim.answer = answer
        calls = []
        for where, address in zip(platform.channels, platform.addresses, strict=True):
            channel = grpc.aio.insecure_channel(address, options=(("grpc.default_authority", "localhost"),))
            metadata = TOKEN if where == "public" else platform.assertion()
            stub = identity_rpc.ScimStub(channel)
            calls.append((channel, stub.GetMe(identity_pb.GetMeRequest(), metadata=metadata, timeout=20)))
        for each in hanging:
            await asyncio.wait_for(each.begun.wait(), 5)
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 1.2
    for channel, call in calls:
        await refusal(call)
        await channel.close()
