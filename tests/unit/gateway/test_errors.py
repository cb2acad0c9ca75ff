"""Errors as clients see them: status, headers, body; and what they never see."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, ClassVar

import grpc
import orjson
import pytest
import pytest_asyncio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from gateway.errors import no_such_route, render
from gateway.http_rules import RouteTable, bindings
from gateway.json_codec import CodecError
from gateway.transcoding import Transcoder
from servicekit import errors as peer
from servicekit.errors import HTTP_STATUS
from tessera.errors.v1 import errors_pb2
from tests.support.descriptors import service
from tests.support.echo import EchoServer, echo_server

CANARY = "canary-7c2d"

Failing = Callable[..., Any]


class Caller:
    """Calls a peer that fails as told and returns what the channel raised."""

    def __init__(self, server: EchoServer, routes: RouteTable) -> None:
        self._server = server
        self._routes = routes
        self._transcoder = Transcoder(lambda method: server.channel, routes)

    async def error(
        self, status: grpc.Status | None = None, *, timeout: float = 5, **abort: Any
    ) -> grpc.aio.AioRpcError:
        async def fail(request: Any, context: Any) -> None:
            if status is not None:
                await context.abort_with_status(status)
            await context.abort(abort["code"], abort["details"])

        self._server.answer = fail
        match = self._routes.match("GET", "/api/things/n")
        assert match is not None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._transcoder.handle(*match, b"", b"", (), timeout)
        return caught.value


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    async with echo_server(service("Library")) as server:
        yield Caller(server, bindings([service("Library")]))


def answer(error: Exception, of: str = "Library") -> tuple[int, dict[str, str], Any]:
    status, headers, body = render(error, service(of))
    return status, {name.decode(): value.decode() for name, value in headers}, orjson.loads(body)


def status_with(code: grpc.StatusCode, message: str, *infos: error_details_pb2.ErrorInfo) -> grpc.Status:
    details = []
    for info in infos:
        detail = any_pb2.Any()
        detail.Pack(info)
        details.append(detail)
    status: grpc.Status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=details))
    return status


async def test_error_of_a_service_keeps_reason_and_message(caller: Caller) -> None:
    error = await caller.error(peer.to_status(peer.NotFound("Scope x does not exist!")))
    assert answer(error) == (
        404,
        {"content-type": "application/json"},
        {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Scope x does not exist!"},
    )


async def test_status_belongs_to_the_reason_unless_the_error_says_otherwise(caller: Caller) -> None:
    taken = peer.AlreadyExists("Scope x already exists!")
    assert answer(await caller.error(peer.to_status(taken)))[0] == 409
    taken.http_status = 400
    status, _, body = answer(await caller.error(peer.to_status(taken)))
    assert (status, body["error_code"]) == (400, "RESOURCE_ALREADY_EXISTS")


@pytest.mark.parametrize("value", ["200", "9000", "x", "", "-400"])
async def test_status_override_that_is_no_error_is_ignored(caller: Caller, value: str) -> None:
    info = error_details_pb2.ErrorInfo(
        reason="RESOURCE_DOES_NOT_EXIST", domain="tessera", metadata={"http_status": value}
    )
    assert answer(await caller.error(status_with(grpc.StatusCode.NOT_FOUND, "gone", info)))[0] == 404


async def test_retry_after_is_sent_with_429_and_503_only(caller: Caller) -> None:
    busy = peer.Unavailable("busy", retry_after=7)
    status, headers, _ = answer(await caller.error(peer.to_status(busy)))
    assert (status, headers["retry-after"]) == (503, "7")
    busy.http_status = 500
    assert "retry-after" not in answer(await caller.error(peer.to_status(busy)))[1]
    info = error_details_pb2.ErrorInfo(
        reason="REQUEST_LIMIT_EXCEEDED", domain="tessera", metadata={"retry_after": "1.5"}
    )
    status, headers, _ = answer(await caller.error(status_with(grpc.StatusCode.RESOURCE_EXHAUSTED, "slow", info)))
    assert status == 429
    assert "retry-after" not in headers, "clients read whole seconds only"


async def test_reason_that_is_newer_than_the_gateway_has_the_status_of_its_code(caller: Caller) -> None:
    info = error_details_pb2.ErrorInfo(reason="BRAND_NEW", domain="tessera")
    status, _, body = answer(await caller.error(status_with(grpc.StatusCode.NOT_FOUND, "gone", info)))
    assert (status, body) == (404, {"error_code": "BRAND_NEW", "message": "gone"})


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 400, "INVALID_PARAMETER_VALUE"),
        (grpc.StatusCode.NOT_FOUND, 404, "RESOURCE_DOES_NOT_EXIST"),
        (grpc.StatusCode.PERMISSION_DENIED, 403, "PERMISSION_DENIED"),
        (grpc.StatusCode.UNAUTHENTICATED, 401, "UNAUTHENTICATED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "REQUEST_LIMIT_EXCEEDED"),
        (grpc.StatusCode.UNAVAILABLE, 503, "TEMPORARILY_UNAVAILABLE"),
        (grpc.StatusCode.CANCELLED, 503, "TEMPORARILY_UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 504, "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.UNIMPLEMENTED, 501, "NOT_IMPLEMENTED"),
        (grpc.StatusCode.INTERNAL, 500, "INTERNAL_ERROR"),
        (grpc.StatusCode.UNKNOWN, 500, "INTERNAL_ERROR"),
        (grpc.StatusCode.ABORTED, 500, "INTERNAL_ERROR"),
    ],
)
async def test_error_without_our_details_gets_a_text_of_ours(
    caller: Caller, code: grpc.StatusCode, status: int, reason: str
) -> None:
    foreign = error_details_pb2.ErrorInfo(reason="THEIRS", domain="elsewhere.example", metadata={"http_status": "418"})
    for error in (
        await caller.error(code=code, details=f"KeyError: {CANARY}"),
        await caller.error(status_with(code, CANARY, foreign)),
    ):
        given, headers, body = answer(error)
        assert (given, body["error_code"]) == (status, reason)
        assert CANARY not in str(body) + str(headers)
        assert body["message"].endswith(".")
        assert "{" not in body["message"]


async def test_details_that_cannot_be_read_count_as_none(caller: Caller) -> None:
    for trailer in (b"\xff\xff", status_pb2.Status(code=5, message="other").SerializeToString()):
        error = grpc.aio.AioRpcError(
            grpc.StatusCode.INTERNAL,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(("grpc-status-details-bin", trailer)),
            details=CANARY,
        )
        status, _, body = answer(error)
        assert status == 500
        assert CANARY not in str(body)


async def test_service_that_is_away_is_named() -> None:
    routes = bindings([service("Library")])
    match = routes.match("GET", "/api/things/n")
    assert match is not None
    async with grpc.aio.insecure_channel("unix:/tmp/t-nobody-listens-here.sock") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Transcoder(lambda method: channel, routes).handle(*match, b"", b"", (), 5)
    status, _, body = answer(caught.value)
    assert status == 503
    assert body == {
        "error_code": "TEMPORARILY_UNAVAILABLE",
        "message": "The Library service does not answer just now. Try again in a moment.",
    }


def test_scim_errors_have_the_shape_of_rfc_7644() -> None:
    schemas = ["urn:ietf:params:scim:api:messages:2.0:Error"]
    assert answer(peer.NotFound("gone"), of="People")[2] == {
        "schemas": schemas,
        "status": "404",
        "detail": "gone",
    }
    assert answer(peer.AlreadyExists("taken"), of="People")[::2] == (
        409,
        {"schemas": schemas, "status": "409", "detail": "taken", "scimType": "uniqueness"},
    )

    class InvalidFilter(peer.InvalidParameter):
        facts: ClassVar[Mapping[str, str]] = {"scim_type": "invalidFilter"}

    assert answer(InvalidFilter("filter"), of="People")[2]["scimType"] == "invalidFilter"


def test_codec_errors_say_whether_the_shape_or_a_value_is_wrong() -> None:
    assert answer(CodecError("a.b", "expected text, got null"))[::2] == (
        400,
        {"error_code": "INVALID_PARAMETER_VALUE", "message": "a.b: expected text, got null"},
    )
    assert answer(CodecError("", "no JSON", malformed=True))[2]["error_code"] == "MALFORMED_REQUEST"


def test_errors_of_the_gateway_itself_need_no_service() -> None:
    status, headers, body = render(no_such_route("GET", "/x"))
    assert status == 404
    assert headers == [(b"content-type", b"application/json")]
    assert orjson.loads(body) == {"error_code": "ENDPOINT_NOT_FOUND", "message": "No API found for 'GET /x'"}
    assert render(peer.Unauthenticated()).status == 401
    assert (b"retry-after", b"2") in render(peer.Unavailable("slow down", retry_after=2)).headers


def test_strange_paths_are_shown_short_and_writable() -> None:
    shown = orjson.loads(render(no_such_route("GET", "/\udcff" + "x" * 1000)).body)["message"]
    assert shown.startswith(r"No API found for 'GET /\udcffxxx")
    assert len(shown) < 300


def test_foreign_exception_leaves_nothing_of_itself() -> None:
    status, _, body = answer(RuntimeError(CANARY))
    assert (status, body["error_code"]) == (500, "INTERNAL_ERROR")
    assert CANARY not in str(body)


def test_every_reason_has_an_error_status() -> None:
    sendable = {name: status for name, status in HTTP_STATUS.items() if name != "ERROR_REASON_UNSPECIFIED"}
    assert len(sendable) == len(errors_pb2.ErrorReason.keys()) - 1
    assert all(400 <= status <= 599 for status in sendable.values())
