"""An HTTP request becomes a message, the message a call, the answer JSON; the same way for every RPC.

An answer that is a google.api.HttpBody is passed on as it is, and a stream of them piece by piece.

The rule: what fills the message is decided by the binding alone; query, body and path, in this order, replace whole
fields of the one before. No operation has code of its own here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import grpc
import orjson
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gateway.http_rules import ALL, HTTP_BODY, Binding
from gateway.json_codec import MAX_DEPTH, Codec, CodecError, codec_for, parse
from servicekit import channels
from servicekit.errors import DeadlineExceeded

MAX_QUERY_FIELDS = 1000

JSON = "application/json"

_TWICE = "given more than once in the query"


@dataclass(frozen=True, slots=True)
class Transcoded:
    """The answer to a request."""

    body: bytes
    """A JSON object, unless the RPC answers with bytes."""

    content_type: str

    warnings: tuple[str, ...]
    """What the service that answered wants the caller to know besides: printable ASCII."""


@dataclass(frozen=True, slots=True)
class _Call:
    request: Codec
    read: Callable[[Any], tuple[bytes, str]]
    """Body and content type of what is answered."""
    channel: grpc.aio.Channel
    invoke: Any
    """The method of a stub: for one answer, or for a stream of them."""


class Transcoder:
    """Calls RPCs on behalf of HTTP requests.

    Everything is compiled here, at the start: raises ValueError when a message has a type without a JSON spelling.
    `channel_for` is asked once per RPC.
    """

    def __init__(
        self, channel_for: Callable[[MethodDescriptor], grpc.aio.Channel], bindings: Iterable[Binding]
    ) -> None:
        methods = {binding.method.full_name: binding.method for binding in bindings}
        self._calls = {name: _call(channel_for(method), method) for name, method in methods.items()}

    async def handle(
        self,
        binding: Binding,
        path_params: Mapping[str, str],
        query_string: bytes,
        body: bytes,
        metadata: Sequence[tuple[str, str]],
        timeout: float | None,
    ) -> Transcoded:
        """Makes the call and returns the answer; its status is `binding.success_status`.

        `body` is within the caller's limit; an empty one stands for `{}`. `timeout` is in seconds. Raises CodecError
        when the request does not fit the message and grpc.aio.AioRpcError when the call fails.
        """
        call = self._calls[binding.method.full_name]
        request = request_message(call.request, binding, path_params, query_string, body)
        await channels.until_connected(call.channel, within=channels.RESTART_SECONDS)
        answering = call.invoke(request, metadata=tuple(metadata), timeout=timeout)
        response = await answering
        trailers = await answering.trailing_metadata()
        warnings = tuple(str(value) for name, value in trailers or () if name == channels.WARNING)
        return Transcoded(*call.read(response), warnings)

    async def stream(
        self,
        binding: Binding,
        path_params: Mapping[str, str],
        query_string: bytes,
        metadata: Sequence[tuple[str, str]],
        *,
        longest_silence: float,
    ) -> AsyncGenerator[HttpBody, None]:
        """As `handle`, for a binding that is a stream: its pieces, until either side ends it.

        Raises DeadlineExceeded when nothing comes for so many seconds.
        """
        call = self._calls[binding.method.full_name]
        request = request_message(call.request, binding, path_params, query_string, b"")
        await channels.until_connected(call.channel, within=channels.RESTART_SECONDS)
        answering = call.invoke(request, metadata=tuple(metadata))
        try:
            while True:
                async with asyncio.timeout(longest_silence):
                    piece = await answering.read()
                if not isinstance(piece, HttpBody):  # the end of the stream
                    return
                yield piece
        except TimeoutError:
            raise DeadlineExceeded(f"The {binding.service.name} service does not go on with its answer.") from None
        finally:
            answering.cancel()


def request_message(
    codec: Codec, binding: Binding, path_params: Mapping[str, str], query_string: bytes, body: bytes
) -> Message:
    """The message that a request stands for. Raises CodecError."""
    if binding.body == ALL:
        message = codec.decode(parse(body) if body else {})
    else:
        message = codec.decode(_query(codec, query_string))
        if binding.body:
            _replace(codec, message, {binding.body: parse(body)} if body else {})
    if path_params:
        _replace(codec, message, path_params)
    return message


def _call(channel: grpc.aio.Channel, method: MethodDescriptor) -> _Call:
    request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    open_call: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
    return _Call(
        codec_for(method.input_type),
        _raw if method.output_type.full_name == HTTP_BODY else _encoder(method),
        channel,
        open_call(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        ),
    )


def _encoder(method: MethodDescriptor) -> Callable[[Any], tuple[bytes, str]]:
    codec = codec_for(method.output_type)
    return lambda message: (orjson.dumps(codec.encode(message)), JSON)


def _raw(body: HttpBody) -> tuple[bytes, str]:
    return body.data, body.content_type


def _replace(codec: Codec, message: Message, stronger: Mapping[str, Any]) -> None:
    """Puts whole fields, given by their names in the .proto, in place of what `message` holds."""
    source = codec.decode(stronger)
    for name in stronger:
        message.ClearField(name)
    message.MergeFrom(source)


def _query(codec: Codec, query_string: bytes) -> dict[str, Any]:
    """The object that a query stands for: `a.b=1` fills a field of a field, a repeated name fills a list."""
    pairs = None
    with suppress(ValueError):
        text = query_string.decode()
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS)
    if pairs is None:
        raise CodecError("", f"The query is not UTF-8 or has more than {MAX_QUERY_FIELDS} parameters.", malformed=True)
    out: dict[str, Any] = {}
    for name, value in pairs:
        _put(codec, out, name, value)
    return out


def _put(codec: Codec, out: dict[str, Any], name: str, value: str) -> None:
    """Stores one parameter; a name that leads to no field is ignored."""
    *parents, last = name.split(".", MAX_DEPTH)
    for parent in parents:
        field = codec.field(parent)
        inner = field.message_type if field is not None and not field.is_repeated else None
        if inner is None or inner.full_name.startswith("google."):  # free JSON has no names to know
            return
        codec, out = codec_for(inner), out.setdefault(parent, {})
        if not isinstance(out, dict):
            raise CodecError(name, _TWICE)
    field = codec.field(last)
    if field is None:
        return
    if field.is_repeated:
        out.setdefault(last, []).append(value)
    elif last in out:
        raise CodecError(name, _TWICE)
    else:
        out[last] = value
