"""Errors that callers meet: a gRPC code, a documented reason, a message, and facts.

A use case raises a subclass of ServiceError; the interceptor turns it into a `google.rpc.Status` once, and the other
end turns it back with `from_rpc_error`. The message names the thing and the way out and never holds secret material.
Every other exception is a bug: it is logged where it happens and reaches the caller as a bare INTERNAL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from tessera.errors.v1 import errors_pb2
from tessera.options.v1 import options_pb2

DOMAIN = "tessera"

HTTP_STATUS: dict[str, int] = {
    value.name: value.GetOptions().Extensions[options_pb2.http_status]
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values
}
"""The HTTP status of each reason, as errors.proto says."""

LONGEST_MESSAGE = 1_500
"""Bytes of a message that travel to anybody. It is sent twice, once percent-encoded, and clients refuse trailers beyond
8 KiB."""

LONGEST_PEER_MESSAGE = 12_000
"""Bytes of a message that travel between our services, whose channels take `channels.METADATA_LIMIT`."""


class StartError(Exception):
    """A service cannot start; the message tells the operator why and what to do."""


class ServiceError(Exception):
    """Base of all errors that a caller is told about. Subclasses set `code` and `reason`."""

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    reason: str = "INTERNAL_ERROR"
    http_status: int | None = None
    """Only where the documented HTTP status differs from the reason's own."""
    facts: ClassVar[Mapping[str, str]] = {}
    """Further metadata of ErrorInfo, where an API's error document has more to say than code and message."""

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        """Whole seconds after which a retry is worth while."""


class InvalidParameter(ServiceError):
    """A field holds a value that is not allowed."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_PARAMETER_VALUE"


class MalformedRequest(ServiceError):
    """The request contradicts itself or lacks its main part."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "MALFORMED_REQUEST"


class BadRequest(ServiceError):
    """The request is well formed and cannot be done."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "BAD_REQUEST"


class FeatureDisabled(ServiceError):
    """A documented feature that is not offered here."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "FEATURE_DISABLED"


class LimitExceeded(ServiceError):
    """A static quota is used up."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "RESOURCE_LIMIT_EXCEEDED"


class NotFound(ServiceError):
    """The named object does not exist, or the caller may not know that it does."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "RESOURCE_DOES_NOT_EXIST"


class AlreadyExists(ServiceError):
    """The name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "RESOURCE_ALREADY_EXISTS"


class Conflict(ServiceError):
    """Another change of the same object is under way, or was made since the caller looked."""

    code = grpc.StatusCode.ABORTED
    reason = "RESOURCE_CONFLICT"


class PermissionDenied(ServiceError):
    """The caller is known and may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class Unauthenticated(ServiceError):
    """No credential of a kind that is taken here."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"

    def __init__(
        self, message: str = "Credential was not sent or was of an unsupported type for this API. Send a bearer token."
    ) -> None:
        super().__init__(message)


class TooManyRequests(ServiceError):
    """More is asked than is allowed just now; a retry after a while is welcome."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "REQUEST_LIMIT_EXCEEDED"


class Unavailable(ServiceError):
    """A service that is needed does not answer just now; a retry cures it."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "TEMPORARILY_UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """The deadline passed; whether a change was made is unknown."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class DataLoss(ServiceError):
    """Stored data failed its integrity check and was not used."""

    code = grpc.StatusCode.DATA_LOSS
    reason = "DATA_LOSS"


def to_status(error: ServiceError, *, longest: int = LONGEST_MESSAGE) -> grpc.Status:
    """The gRPC status that carries an error, ErrorInfo included. A message is cut after `longest` bytes."""
    info = ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.facts)
    if error.http_status is not None:
        info.metadata["http_status"] = str(error.http_status)
    if error.retry_after is not None:
        info.metadata["retry_after"] = str(error.retry_after)
    detail = Any()
    detail.Pack(info)
    status: grpc.Status = rpc_status.to_status(
        Status(code=error.code.value[0], message=_fitting(error.message, longest), details=[detail])
    )
    return status


def from_rpc_error(error: grpc.aio.AioRpcError, *, peer: str) -> ServiceError:
    """The error that a peer service answered, to be passed on to our own caller.

    What the transport says (unreachable, time out) and what is not one of our errors becomes a text of our own that
    names only the peer.
    """
    info = _error_info(error)
    if info is not None:
        known = ServiceError(error.details() or "", retry_after=_number(info, "retry_after"))
        known.code, known.reason, known.http_status = error.code(), info.reason, _number(info, "http_status")
        return known
    # A service that is about to end cancels what it has not begun.
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return Unavailable(f"The {peer} service does not answer just now. Try again in a moment.", retry_after=1)
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"The {peer} service did not answer in time.")
    return ServiceError(f"The {peer} service failed.")


def _error_info(error: grpc.aio.AioRpcError) -> ErrorInfo | None:
    try:
        status = rpc_status.from_call(error)
        for detail in status.details if status is not None else ():
            info = ErrorInfo()
            if detail.Is(ErrorInfo.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
                return info
    except (ValueError, DecodeError):  # details that are no status, or contradict the code
        return None
    return None


def _number(info: ErrorInfo, key: str) -> int | None:
    text = info.metadata.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _fitting(message: str, longest: int) -> str:
    encoded = message.encode(errors="replace")
    if len(encoded) <= longest:
        return encoded.decode()
    return encoded[:longest].decode(errors="ignore") + " ..."
