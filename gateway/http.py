"""Reading an ASGI request and writing an answer; the part of HTTP that uvicorn leaves to its application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor

from servicekit.errors import InvalidParameter, ServiceError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The caller hung up before its request was complete."""


@dataclass(slots=True)
class Request:
    """One request. `path` is still percent-encoded; `service` is who answers, once that is known."""

    method: str
    path: str
    query_string: bytes
    headers: dict[bytes, bytes]
    receive: Receive
    id: str
    service: ServiceDescriptor | None = None
    route: str = ""
    """The method and the path's template, once that is known."""

    def header(self, name: bytes) -> str | None:
        """A header's value; the name in lower case."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def declared_length(self) -> int | None:
        """The length that the request declares for its body, if it does."""
        value = self.headers.get(b"content-length", b"")
        return int(value) if value.isdigit() else None


BODY_SECONDS = 60.0
"""How long a body that we read ourselves may take to arrive."""


async def read_body(request: Request, limit: int, error: Callable[[str], ServiceError] = InvalidParameter) -> bytes:
    """The whole body; raises `error` for one of more than `limit` bytes or that takes too long, and ClientGone."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read_body(request, limit, error)
    except TimeoutError:
        raise error(f"The body was not complete after {BODY_SECONDS:g} s. Send it at once.") from None


async def _read_body(request: Request, limit: int, error: Callable[[str], ServiceError]) -> bytes:
    if (request.declared_length() or 0) > limit:
        raise error(too_large(limit))
    pieces = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise error(too_large(limit))
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def too_large(limit: int) -> str:
    """The text that goes with a body of more than `limit` bytes."""
    return f"The body has more than {limit} bytes, which is the limit here. Send less at a time."


async def answer(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Sends a whole answer."""
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
