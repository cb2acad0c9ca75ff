"""Channels to peer services: every call has a deadline, the request's id and the caller's assertion.

A peer that was restarted is found again within a second. Whoever opens a channel says which methods are retried on it:
those that only read, and at one layer of all that a request goes through, which is the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor

from servicekit import context, tracing
from servicekit.errors import DeadlineExceeded, InvalidParameter, from_rpc_error
from servicekit.rpc_tracing import ClientTracing

log = logging.getLogger(__name__)

Q = TypeVar("Q")
A = TypeVar("A")

ASSERTION = "x-tessera-assertion"
REQUEST_ID = "x-tessera-request-id"
CHOSEN = "x-tessera-request-id-chosen"
"""Says, on internal listeners alone, that the caller chose the request's id and may use it for a retry."""

SOURCE = "x-tessera-source"
"""Says, on internal listeners alone, which address the peer's own caller comes from; for the audit log."""

WARNING = "x-tessera-warning"
"""Trailing metadata of an answer: what the caller should know although all went well; once per warning."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

RESTART_SECONDS = 3.0
"""How long a call waits for a peer that is just being started, before it is refused."""

OVERDUE_SECONDS = 1.0
"""After its deadline a call that gRPC has not ended by then is given up."""

METADATA_LIMIT = 64 * 1024
"""Bytes of headers or trailers that we take from a peer: room for a long error message."""

KEEPALIVE_SECONDS = 30.0
"""How often a silent peer is asked whether it is there."""

KEEPALIVE_TIMEOUT = 10.0
"""How long it has to answer; then the connection is given up, with what was under way on it."""

ATTEMPTS = 3
"""How often a call that may be retried is made, all in all."""

_RETRIES = {
    "maxAttempts": ATTEMPTS,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 3,  # each pause is drawn from around 0.1 s and 0.3 s
    "retryableStatusCodes": ["UNAVAILABLE"],
}

_THROTTLE = {"maxTokens": 10, "tokenRatio": 0.1}
"""A failure takes a token, an answer gives a tenth of one, and with half of them gone nothing is retried: a peer that
does not answer at all is not asked three times as much."""

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    # How long one attempt may take, whatever its name: on a busy machine, longer than between two that are refused.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    # A peer on this machine costs nothing to ask again, and while a channel backs off its calls fail.
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.keepalive_time_ms", round(KEEPALIVE_SECONDS * 1000)),
    ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT * 1000)),
    # The same for any other ping: gRPC sends some to measure with, and while one of those is not answered it asks no
    # other question. By default it would wait for a minute.
    ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_TIMEOUT * 1000)),
    ("grpc.max_receive_message_length", 17 * 1024 * 1024),
    ("grpc.max_send_message_length", 17 * 1024 * 1024),
    ("grpc.max_metadata_size", METADATA_LIMIT),
    # A Unix socket's path is no host name.
    ("grpc.default_authority", "localhost"),
    # Environment proxies are for the internet, not for our own sockets.
    ("grpc.enable_http_proxy", 0),
]


@asynccontextmanager
async def opened(address: str, *, retried: Iterable[MethodDescriptor] = ()) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to `unix:/path` or `host:port`, closed in the end. It connects when first used.

    Calls of `retried` are made again when the peer does not answer just now; they must change nothing.
    """
    interceptors = [ClientTracing()] if tracing.is_on() else None
    options = [*_OPTIONS, ("grpc.service_config", _service_config(retried))]
    channel = grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    try:
        yield channel
    finally:
        await channel.close()


def _service_config(retried: Iterable[MethodDescriptor]) -> str:
    names = [{"service": each.containing_service.full_name, "method": each.name} for each in retried]
    if not names:
        return "{}"
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": _RETRIES}], "retryThrottling": _THROTTLE})


async def until_connected(channel: grpc.aio.Channel, *, within: float) -> None:
    """Returns when the peer is there, or after `within` seconds; a call made then says by itself what is wrong.

    A call that meets a peer in the middle of a restart would fail at once, though it can do no harm to wait.
    """
    state = channel.get_state(try_to_connect=True)
    if state is grpc.ChannelConnectivity.READY:
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within):
            while state is not grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)


_ids: list[str] = []
"""Ids that were not given to any request yet."""


def is_request_id(text: str) -> bool:
    """Whether a caller's request id is taken over: 1 to 64 letters, digits, `.`, `_` or `-`."""
    return _REQUEST_ID.fullmatch(text) is not None


def check_request_id(given: str) -> None:
    """Raises InvalidParameter for an id that is not taken over: whoever chose one must not be deceived about it."""
    if not is_request_id(given):
        raise InvalidParameter("X-Tessera-Request-Id: 1 to 64 letters, digits, `.`, `_` or `-`, or leave it out.")


def new_request_id() -> str:
    """An id for a request that came without one."""
    # The kernel is asked for many at once: on some machines that is the dearest part of it.
    if not _ids:
        random = os.urandom(16 * 256).hex()
        _ids.extend(random[at : at + 32] for at in range(0, len(random), 32))
    return _ids.pop()


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """What a call on behalf of the current request carries: its id, its caller's assertion, and where it comes from."""
    request = context.current()
    if request is None:
        return ((REQUEST_ID, new_request_id()),)
    carried = [(REQUEST_ID, request.request_id)]
    if request.assertion is not None:
        carried.append((ASSERTION, request.assertion))
    if source := context.source():
        carried.append((SOURCE, source))
    return tuple(carried)


async def call(
    method: Callable[..., Awaitable[A]],
    message: Q,
    *,
    peer: str,
    timeout: float,
    waiting_for: grpc.aio.Channel | None = None,
) -> A:
    """Calls a stub's unary method for the current request; raises the ServiceError that the peer answered.

    `peer` is the service's name for people, `timeout` is in seconds. With `waiting_for`, the channel of the stub, a
    peer that is just being started is waited for first.
    """
    if waiting_for is not None:
        await until_connected(waiting_for, within=RESTART_SECONDS)
    try:
        # It is for gRPC to end a call at its deadline. Should it fail to, whoever waits here is not to hang with it.
        async with asyncio.timeout(timeout + OVERDUE_SECONDS):
            return await method(message, timeout=timeout, metadata=outgoing_metadata())
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, peer=peer) from None
    except TimeoutError:
        log.warning("call was not ended at its deadline and is given up", extra={"peer": peer})
        raise DeadlineExceeded(f"The {peer} service did not answer in time.") from None
