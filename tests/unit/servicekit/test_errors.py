"""An error keeps its code, reason, text and facts on the way to its caller; foreign texts do not travel."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from servicekit import channels, errors
from servicekit.errors import (
    AlreadyExists,
    DeadlineExceeded,
    NotFound,
    ServiceError,
    Unauthenticated,
    Unavailable,
    to_status,
)
from tessera.errors.v1.errors_pb2 import ErrorReason
from tests.support.descriptors import service
from tests.support.echo import echo_server

CANARY = "canary-0123456789"


class ScopeExists(AlreadyExists):
    http_status = 400


async def answered(status: Any, *, timeout: float = 5) -> ServiceError:
    """What a caller meets when a real peer ends a call with `status`."""

    async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(status, BaseException) and not isinstance(status, ServiceError):
            raise status
        await context.abort_with_status(to_status(status) if isinstance(status, ServiceError) else status)

    async with echo_server(service("Library")) as server:
        server.answer = answer
        with pytest.raises(ServiceError) as caught:
            await channels.call(
                server.channel.unary_unary(f"/{service('Library').full_name}/Create"),
                b"",
                peer="Library",
                timeout=timeout,
            )
        return caught.value


def foreign_status(code: grpc.StatusCode, *details: Any, message: str = CANARY) -> grpc.Status:
    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    status: grpc.Status = rpc_status.to_status(Status(code=code.value[0], message=message, details=packed))
    return status


def all_kinds() -> list[type[ServiceError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError)]


@pytest.mark.parametrize("kind", all_kinds())
async def test_every_kind_of_error_survives_the_way_to_its_caller(kind: type[ServiceError]) -> None:
    error = await answered(kind("Scope 'é\n%' is missing."))
    assert (error.code, error.reason, error.message) == (kind.code, kind.reason, "Scope 'é\n%' is missing.")
    assert (error.http_status, error.retry_after) == (None, None)


async def test_http_status_and_retry_after_survive_the_way_to_the_caller() -> None:
    error = await answered(ScopeExists("Taken.", retry_after=7))
    assert (error.reason, error.http_status, error.retry_after) == ("RESOURCE_ALREADY_EXISTS", 400, 7)


@pytest.mark.parametrize("kind", all_kinds())
def test_every_reason_is_one_of_the_documented_ones(kind: type[ServiceError]) -> None:
    assert ErrorReason.Value(kind.reason)


async def test_error_can_be_passed_on_unchanged() -> None:
    first = await answered(ScopeExists("Taken.", retry_after=7))
    second = await answered(first)
    assert vars(first) == vars(second)


@pytest.mark.parametrize("character", ["a", "é", "😀", "%", "\n"])
async def test_message_that_would_not_fit_into_the_trailers_is_cut(character: str) -> None:
    error = await answered(NotFound(character * 20_000))
    assert error.code is grpc.StatusCode.NOT_FOUND
    assert error.message.startswith(character * 100)
    assert error.message.endswith(" ...")


async def test_message_with_a_lone_surrogate_is_sent_all_the_same() -> None:
    assert (await answered(NotFound("file \udcff"))).message == "file ?"


@pytest.mark.parametrize(
    "status",
    [
        foreign_status(grpc.StatusCode.NOT_FOUND),
        foreign_status(grpc.StatusCode.NOT_FOUND, ErrorInfo(domain="elsewhere", reason=CANARY)),
        foreign_status(grpc.StatusCode.INTERNAL, Status(message=CANARY)),
        RuntimeError(CANARY),
    ],
)
async def test_text_of_a_foreign_error_is_not_passed_on(status: grpc.Status | BaseException) -> None:
    error = await answered(status)
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")
    assert error.message == "The Library service failed."


@pytest.mark.parametrize("details", [b"\xff\xff", foreign_status(grpc.StatusCode.OK).trailing_metadata[0][1]])
async def test_details_that_are_no_status_or_contradict_the_code_are_an_error_of_the_peer(details: bytes) -> None:
    broken = SimpleNamespace(
        code=grpc.StatusCode.NOT_FOUND,
        details=CANARY,
        trailing_metadata=(("grpc-status-details-bin", details),),
    )
    error = await answered(broken)
    assert (error.code, error.message) == (grpc.StatusCode.INTERNAL, "The Library service failed.")


@pytest.mark.parametrize("number", ["many", "-1", "", "٣", "9" * 10])
async def test_facts_that_are_no_numbers_are_left_out(number: str) -> None:
    info = ErrorInfo(domain="tessera", reason="BAD_REQUEST", metadata={"http_status": number, "retry_after": number})
    error = await answered(foreign_status(grpc.StatusCode.FAILED_PRECONDITION, info, message="No."))
    assert (error.message, error.http_status, error.retry_after) == ("No.", None, None)


async def test_peer_that_is_gone_is_unavailable_and_worth_a_retry() -> None:
    async with channels.opened("unix:/tmp/t-nobody-listens-here.sock") as channel:
        with pytest.raises(Unavailable) as caught:
            await channels.call(channel.unary_unary("/a.B/C"), b"", peer="Secrets", timeout=20)
    assert caught.value.message == "The Secrets service does not answer just now. Try again in a moment."
    assert caught.value.retry_after == 1


async def test_peer_that_is_late_is_a_deadline_exceeded() -> None:
    error = await answered(foreign_status(grpc.StatusCode.DEADLINE_EXCEEDED))
    assert (error.code, error.reason) == (DeadlineExceeded.code, DeadlineExceeded.reason)
    assert error.message == "The Library service did not answer in time."


async def test_call_that_its_library_does_not_end_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "OVERDUE_SECONDS", 0.05)

    async def endless(*_: object, **__: object) -> bytes:
        await asyncio.Event().wait()
        return b""

    with pytest.raises(DeadlineExceeded) as caught:
        async with asyncio.timeout(30):
            await channels.call(endless, b"", peer="Library", timeout=0.05)
    assert caught.value.message == "The Library service did not answer in time."


def test_missing_credential_says_what_to_send() -> None:
    assert "bearer token" in Unauthenticated().message
