"""From an HTTP request to a call and back, over a real channel."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.api.httpbody_pb2 import HttpBody

from gateway.http_rules import RouteTable, bindings
from gateway.json_codec import CodecError
from gateway.transcoding import MAX_QUERY_FIELDS, Transcoded, Transcoder
from tests.support.descriptors import ProtoFile, service
from tests.support.echo import EchoServer, echo_server


class Client:
    """Sends requests through a transcoder, as the gateway's app does."""

    def __init__(self, server: EchoServer, routes: RouteTable) -> None:
        self.server = server
        self.asked_for_channel: list[str] = []
        self.warnings: tuple[str, ...] = ()
        self._routes = routes
        self._transcoder = Transcoder(self._channel_for, routes)

    async def send(self, verb: str, path: str, **request: Any) -> Any:
        transcoded = await self.transcoded(verb, path, **request)
        self.warnings = transcoded.warnings
        assert transcoded.content_type == "application/json"
        return json.loads(transcoded.body)

    async def transcoded(
        self,
        verb: str,
        path: str,
        *,
        query: bytes = b"",
        body: bytes = b"",
        metadata: tuple[tuple[str, str], ...] = (),
        timeout: float | None = 5,
    ) -> Transcoded:
        match = self._routes.match(verb, path)
        assert match is not None
        return await self._transcoder.handle(*match, query, body, metadata, timeout)

    def _channel_for(self, method: Any) -> grpc.aio.Channel:
        self.asked_for_channel.append(method.full_name)
        return self.server.channel


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Client]:
    services = [service("Library"), service("People")]
    async with echo_server(*services) as server:
        yield Client(server, bindings(services))


async def test_body_fills_the_message_and_the_answer_is_json(client: Client) -> None:
    body = b'{"name": "a", "big": "7", "flag": "True", "old_entities": [{"title": "t"}]}'
    assert await client.send("POST", "/api/things", body=body) == {
        "name": "a",
        "big": 7,
        "flag": True,
        "entities": [{"title": "t"}],
    }
    assert client.server.methods == [f"{service('Library').full_name}.Create"]


async def test_empty_messages_travel_as_empty_objects(client: Client) -> None:
    assert await client.send("POST", "/api/things") == {}
    assert await client.send("DELETE", "/api/things/x") == {}


async def test_query_fills_the_message_where_there_is_no_body(client: Client) -> None:
    query = (
        b"big=7&flag=TRUE&words=a&words=b%20c&counts=1&item.title=t&child.item.count=2&note=&release=3&stray=1&x.y=2"
    )
    assert await client.send("GET", "/api/things/n", query=query, body=b"not read") == {
        "name": "n",
        "big": 7,
        "flag": True,
        "note": "",
        "words": ["a", "b c"],
        "counts": [1],
        "item": {"title": "t"},
        "child": {"item": {"count": 2}},
        "version": "3",
    }


@pytest.mark.parametrize(
    "query", [b"", b"&", b"stray=%zz", b"words.x=1", b"free.x=1", b"big.x=1", b"child." * 5000 + b"big=1"]
)
async def test_query_that_names_no_field_is_ignored(client: Client, query: bytes) -> None:
    answer = await client.send("GET", "/api/things/n", query=query)
    assert answer == {"name": "n"} or "big" not in json.dumps(answer)


async def test_path_is_stronger_than_body_and_body_than_query(client: Client) -> None:
    body = b'{"name": "body", "small": 5, "flag": true}'
    assert await client.send("PUT", "/api/things/path/small/0", body=body) == {"name": "path", "flag": True}
    answer = await client.send(
        "PUT", "/api/things/path/item", query=b"name=q&item.title=q&item.count=3&flag=true", body=b'{"title": "body"}'
    )
    assert answer == {"name": "path", "flag": True, "item": {"title": "body"}}


async def test_empty_body_leaves_a_body_field_unset(client: Client) -> None:
    assert await client.send("PUT", "/api/things/n/item") == {"name": "n"}
    assert await client.send("PUT", "/api/things/n/item", body=b"{}") == {"name": "n", "item": {}}


async def test_query_is_not_read_where_the_body_is_the_message(client: Client) -> None:
    assert await client.send("POST", "/api/things", query=b"name=q", body=b'{"flag": true}') == {"flag": True}


async def test_path_variable_is_named_as_in_the_proto_whatever_its_json_name(client: Client) -> None:
    assert await client.send("GET", "/scim/People/ada") == {"userName": "ada"}


@pytest.mark.parametrize(
    ("verb", "path", "query", "body", "message", "malformed"),
    [
        ("POST", "/api/things", b"", b"{", "The body is not valid JSON (line 1, column 2).", True),
        ("POST", "/api/things", b"", b"[]", "The body must be a JSON object, not a list.", True),
        ("PUT", "/api/things/n/item", b"", b'{"count": []}', "item.count: expected an integer, got a list", False),
        ("GET", "/api/things/n", b"flag=5", b"", "flag: expected true or false, got a string", False),
        ("GET", "/api/things/n", b"item=5", b"", "item: expected an object, got a string", False),
        ("GET", "/api/things/n", b"big=1&big=2", b"", "big: given more than once in the query", False),
        ("GET", "/api/things/n", b"item=1&item.title=2", b"", "item.title: given more than once in the query", False),
        ("GET", "/api/things/n", b"item.title=2&item=1", b"", "item: given more than once in the query", False),
        ("GET", "/api/things/n", b"name=%ff", b"", "The query is not UTF-8 or has more than 1000 parameters.", True),
        ("GET", "/api/things/n", b"name=\xff", b"", "The query is not UTF-8 or has more than 1000 parameters.", True),
        ("GET", "/api/things/n", b"a&" * (MAX_QUERY_FIELDS + 1), b"", "The query is not UTF-8 or has more", True),
        ("PUT", "/api/things/n/small/x", b"", b"", "small: expected an integer, got a string", False),
    ],
)
async def test_request_that_does_not_fit_is_refused_before_the_call(
    client: Client, verb: str, path: str, query: bytes, body: bytes, message: str, malformed: bool
) -> None:
    with pytest.raises(CodecError) as caught:
        await client.send(verb, path, query=query, body=body)
    assert str(caught.value).startswith(message)
    assert caught.value.malformed is malformed
    assert client.server.methods == []


async def test_metadata_and_deadline_go_with_the_call(client: Client) -> None:
    await client.send("POST", "/api/things", metadata=(("x-request-id", "r1"),), timeout=30)
    assert client.server.metadata[0]["x-request-id"] == "r1"
    assert client.server.time_left[0] is not None
    assert 20 < client.server.time_left[0] < 31  # the server rounds up


async def test_failed_call_raises_the_status_of_the_peer(client: Client) -> None:
    async def refuse(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no")

    client.server.answer = refuse
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.send("GET", "/api/things/n")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_answer_of_bytes_is_passed_on_as_it_is(client: Client) -> None:
    async def print_it(request: Any, context: Any) -> Any:
        return HttpBody(content_type="text/plain; charset=utf-8", data=b"\xff {}\n")

    client.server.answer = print_it
    answer = await client.transcoded("GET", "/api/things/n/print")
    assert (answer.body, answer.content_type) == (b"\xff {}\n", "text/plain; charset=utf-8")


async def test_warnings_of_the_peer_come_with_the_answer(client: Client) -> None:
    async def warn(request: Any, context: Any) -> Any:
        context.set_trailing_metadata((("x-tessera-warning", "one"), ("other", "no"), ("x-tessera-warning", "two")))
        return request

    await client.send("GET", "/api/things/n")
    assert list(client.warnings) == []
    client.server.answer = warn
    await client.send("GET", "/api/things/n")
    assert list(client.warnings) == ["one", "two"]


async def test_channel_is_asked_for_once_per_rpc(client: Client) -> None:
    for _ in range(2):
        await client.send("GET", "/api/things/n")
    assert len(client.asked_for_channel) == len(set(client.asked_for_channel)) == 8


async def test_binding_is_compiled_at_the_start_not_at_the_first_call() -> None:
    file = ProtoFile()
    file.message("Timed", "google.protobuf.Timestamp at")
    file.rpc("Clock", "Get", "Timed", "Timed", http=[{"get": "/clock"}])
    routes = bindings([file.build().services_by_name["Clock"]])
    with pytest.raises(ValueError, match="has no spelling"):
        Transcoder(lambda method: grpc.aio.insecure_channel("unix:/nowhere"), routes)
