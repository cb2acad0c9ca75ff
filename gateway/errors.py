"""Every error of the control plane as the documented answer: status, headers and body.

The rule: only texts that we wrote reach a client. A peer's message counts as ours when it comes with our ErrorInfo;
everything else (the transport, a foreign server, a bug) becomes a neutral text of this module.
"""

from __future__ import annotations

from typing import NamedTuple

import grpc
import orjson
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from gateway.json_codec import CodecError
from servicekit.errors import DOMAIN, HTTP_STATUS, NotFound, ServiceError
from tessera.options.v1 import options_pb2

_SCIM_SCHEMA = "urn:ietf:params:scim:api:messages:2.0:Error"
# RFC 7644, table 9: what a reason means where the service does not say it in the metadata `scim_type`.
_SCIM_TYPES = {
    "RESOURCE_ALREADY_EXISTS": "uniqueness",
    "INVALID_PARAMETER_VALUE": "invalidValue",
    "MALFORMED_REQUEST": "invalidSyntax",
}

# What a code means when no ErrorInfo of ours comes with it. Clients retry on certain phrases ("deadline exceeded"
# among them) for minutes, so these texts avoid them.
_NEUTRAL: dict[grpc.StatusCode, tuple[str, str]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ("INVALID_PARAMETER_VALUE", "The request holds a value that is not allowed."),
    grpc.StatusCode.NOT_FOUND: ("RESOURCE_DOES_NOT_EXIST", "The requested object does not exist."),
    grpc.StatusCode.PERMISSION_DENIED: ("PERMISSION_DENIED", "You may not do this."),
    grpc.StatusCode.UNAUTHENTICATED: ("UNAUTHENTICATED", "The credential was not accepted."),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        "REQUEST_LIMIT_EXCEEDED",
        "The request is too large, or too many are running.",
    ),
    grpc.StatusCode.UNAVAILABLE: (
        "TEMPORARILY_UNAVAILABLE",
        "The {service} service does not answer just now. Try again in a moment.",
    ),
    # What a service that is about to end does not begin any more; who hung up on us is not answered.
    grpc.StatusCode.CANCELLED: (
        "TEMPORARILY_UNAVAILABLE",
        "The {service} service was being stopped. Try again in a moment.",
    ),
    grpc.StatusCode.DEADLINE_EXCEEDED: (
        "DEADLINE_EXCEEDED",
        "The {service} service did not answer in time. Whether a change was made is unknown.",
    ),
    grpc.StatusCode.UNIMPLEMENTED: ("NOT_IMPLEMENTED", "The {service} service does not offer this operation."),
}
_BUG = ("INTERNAL_ERROR", "The request failed inside the server. Its request id leads to the log.")


class ErrorResponse(NamedTuple):
    """An HTTP answer; `headers` without the length."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class NoSuchRoute(NotFound):
    """Nothing is bound to a path, or to this verb of a known path."""

    reason = "ENDPOINT_NOT_FOUND"


class OAuthError(ServiceError):
    """A refusal by the OAuth endpoints, which has a shape of its own (RFC 6749, 5.2): `error` is one of its words."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_PARAMETER_VALUE"

    def __init__(self, error: str, description: str, *, status: int = 400, retry_after: int | None = None) -> None:
        super().__init__(description, retry_after=retry_after)
        self.error = error
        self.http_status = status

    def answer(self) -> ErrorResponse:
        """The error as its clients expect it."""
        headers = [(b"content-type", b"application/json")]
        if self.http_status == 401:
            headers.append((b"www-authenticate", b'Basic realm="tessera"'))
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        document = {"error": self.error, "error_description": self.message}
        return ErrorResponse(self.http_status or 400, headers, orjson.dumps(document))


def no_such_route(method: str, path: str) -> NoSuchRoute:
    """The error for a request that no binding matches; `path` is shown short, as plain ASCII."""
    shown = path[:200].encode("ascii", "backslashreplace").decode()
    return NoSuchRoute(f"No API found for '{method} {shown}'")


def render(error: Exception, service: ServiceDescriptor | None = None) -> ErrorResponse:
    """The answer for any exception: ours and a peer's as documented, everything else as a bare INTERNAL_ERROR.

    `service` is the service that was called; it names itself in texts and chooses the shape of the body. The caller
    logs what it does not expect: nothing of a foreign exception is in the answer.
    """
    if isinstance(error, OAuthError):
        return error.answer()
    said = _said(error, service)
    headers = [(b"content-type", b"application/json")]
    if said.retry_after is not None and said.status in (429, 503):
        headers.append((b"retry-after", str(said.retry_after).encode()))
    return ErrorResponse(said.status, headers, orjson.dumps(_document(said, service)))


class _Said(NamedTuple):
    """What an error says to the client, whatever it came as."""

    status: int
    reason: str
    message: str
    retry_after: int | None = None
    scim_type: str | None = None


def _said(error: Exception, service: ServiceDescriptor | None) -> _Said:
    if isinstance(error, ServiceError):
        status = error.http_status or _status(error.reason, error.code)
        return _Said(status, error.reason, error.message, error.retry_after, error.facts.get("scim_type"))
    if isinstance(error, CodecError):
        reason = "MALFORMED_REQUEST" if error.malformed else "INVALID_PARAMETER_VALUE"
        return _Said(HTTP_STATUS[reason], reason, str(error))
    if not isinstance(error, grpc.aio.AioRpcError):
        return _Said(HTTP_STATUS[_BUG[0]], *_BUG)
    reason, text = _NEUTRAL.get(error.code(), _BUG)
    info = _error_info(error)
    if info is None:
        return _Said(HTTP_STATUS[reason], reason, text.format(service=service.name if service else "called"))
    override = _number(info, "http_status")
    status = override if override and 400 <= override <= 599 else _status(info.reason, error.code())
    return _Said(
        status,
        info.reason,
        error.details() or _BUG[1],
        _number(info, "retry_after"),
        info.metadata.get("scim_type"),
    )


def _status(reason: str, code: grpc.StatusCode) -> int:
    """The status of a reason; one that is newer than this gateway still has its gRPC code."""
    return HTTP_STATUS.get(reason) or HTTP_STATUS[_NEUTRAL.get(code, _BUG)[0]]


def _error_info(error: grpc.aio.AioRpcError) -> ErrorInfo | None:
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # details that contradict the status, or are none: as if there were no details
        return None
    for detail in status.details if status is not None else ():
        info = ErrorInfo()
        if detail.Is(ErrorInfo.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN and info.reason:
            return info
    return None


def _number(info: ErrorInfo, key: str) -> int | None:
    text = info.metadata.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _document(said: _Said, service: ServiceDescriptor | None) -> dict[str, object]:
    if service is not None and service.GetOptions().Extensions[options_pb2.error_shape] == options_pb2.ERROR_SHAPE_SCIM:
        document: dict[str, object] = {
            "schemas": [_SCIM_SCHEMA],
            "status": str(said.status),
            "detail": said.message,
        }
        if scim_type := said.scim_type or _SCIM_TYPES.get(said.reason):
            document["scimType"] = scim_type
        return document
    return {"error_code": said.reason, "message": said.message}
