"""The gateway between scripted neighbours: who gets in, where requests go, and what callers are told."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gc
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gateway import app, http, invocations
from gateway.json_codec import MOST_CONTAINERS
from gateway.settings import GatewaySettings
from servicekit import access, channels, identity
from servicekit.context import Level
from servicekit.errors import StartError
from servicekit.http_client import ConnectionLost, HttpPool
from servicekit.policy import AUTHENTICATED, OPEN, Row, internal, permission
from tessera.policy import POLICY
from tests.support.eventually import eventually
from tests.support.gateway import (
    OWNER,
    STRANGER,
    WORKSPACE_ID,
    Platform,
    ScriptedAccess,
    ScriptedAuthority,
    ScriptedServing,
    neighbours,
    platform,
    routes,
)
from tests.support.http import Answer, fetch
from tests.support.sockets import short_directory

GONE = {
    "error_code": "ENDPOINT_NOT_FOUND",
    "message": "The given endpoint does not exist, please retry after checking the specified model and version"
    " deployment exists.",
}


async def body_of(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body", False):
            return body


async def reply(send: Any, body: bytes, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


class Echo:
    """A replica that tells what it was sent, and counts its connections."""

    def __init__(self, name: str = "echo") -> None:
        self.name = name
        self.clients: set[Any] = set()
        self.requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += 1
        seen = {key.decode(): value.decode() for key, value in scope["headers"]}
        body = await body_of(receive)
        document = {
            "name": self.name,
            "path": scope["path"],
            "headers": seen,
            "size": len(body),
            "body": body.decode()[:80],
        }
        await reply(send, json.dumps(document).encode(), headers=((b"content-type", b"application/json"),))


class Held:
    """A replica that answers when it is released, and notices callers that hang up."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.release = asyncio.Event()
        self.gone = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await body_of(receive)
        self.arrived.set()
        waiting = asyncio.create_task(self.release.wait())
        hang_up = asyncio.create_task(receive())
        done, pending = await asyncio.wait({waiting, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if hang_up in done:
            self.gone.set()
            return
        await reply(send, b"{}")


class DiesMidAnswer:
    """A replica that promises more than it sends."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await body_of(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
async def stack() -> AsyncIterator[Platform]:
    async with platform() as running:
        yield running


async def serve(stack: Platform, name: str, application: Any) -> None:
    address = await stack.add_replica(application)
    await stack.publish(routes(name, ("m-1", 100, [(f"r-{name}", address)])))


async def invoke(stack: Platform, name: str, token: str | None = "owner-token", **more: Any) -> Answer:
    return await fetch(stack.url, "POST", f"/serving-endpoints/{name}/invocations", token=token, **more)


async def serve_unheard(stack: Platform) -> None:
    """Serves `ep`, while nobody tells the gateway who may query it."""
    address = await stack.add_replica(Echo())
    await stack.serving.publish(routes("ep", ("m-1", 100, [("r-ep", address)])))
    stack.access.granted["id-ep"] = {OWNER.id: Level.CAN_QUERY}
    assert (await invoke(stack, "ep")).json() == GONE


async def invoked_with(stack: Platform, status: int) -> bool:
    return (await invoke(stack, "ep")).status == status


class CountingProxy:
    """Stands in front of a replica and counts the connections that it is given."""

    def __init__(self, directory: Path, behind: str) -> None:
        self.address = f"unix:{directory}/proxy.sock"
        self.accepted = 0
        self._behind = behind

    async def __aenter__(self) -> CountingProxy:
        self._server = await asyncio.start_unix_server(self._serve, self.address.removeprefix("unix:"))
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        there, back = await asyncio.open_unix_connection(self._behind.removeprefix("unix:"))
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer), return_exceptions=True)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            writer.write(piece)
        writer.close()


# --- the policy is what is enforced


def with_row(monkeypatch: pytest.MonkeyPatch, name: str, row: Row | None) -> None:
    """Gives the gateway the policy with another row for one route, or with none."""
    rows = {each: POLICY[each] for each in POLICY if each != name}
    monkeypatch.setattr(app, "POLICY", rows if row is None else rows | {name: row})


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("GET /health", None, "GET /health has no row"),
        ("GET /healthy", OPEN, "the row GET /healthy is for no route"),
        ("tessera.secrets.v1.Secrets/PutSecret", None, "tessera.secrets.v1.Secrets/PutSecret has no row"),
        ("tessera.secrets.v1.Secrets/PutSecret", internal("serving"), "PutSecret is exposed to the public"),
    ],
)
async def test_gateway_does_not_start_when_the_policy_does_not_fit(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, row: Row | None, problem: str
) -> None:
    with_row(monkeypatch, name, row)
    with pytest.raises(StartError, match=problem):
        async with app.running(GatewaySettings(data_dir=directory, listen="127.0.0.1:0")):
            pass


async def test_route_needs_a_credential_unless_its_row_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    with_row(monkeypatch, "GET /health", AUTHENTICATED)
    async with platform() as stack:
        assert (await fetch(stack.url, "GET", "/health")).status == 401
        assert (await fetch(stack.url, "GET", "/health", token="stranger-token")).status == 200
    with_row(monkeypatch, "POST /telemetry-ext", OPEN)
    async with platform() as stack:
        assert (await fetch(stack.url, "POST", "/telemetry-ext", json={})).status == 200


async def test_answer_of_a_route_without_the_decision_that_its_row_asks_for_is_withheld(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_row(monkeypatch, "GET /health", permission("shelf", "READ"))
    async with platform() as stack:
        answer = await fetch(stack.url, "GET", "/health", token="owner-token")
        assert (answer.status, answer.json()["error_code"]) == (500, "INTERNAL_ERROR")


async def test_decision_about_an_endpoint_belongs_to_a_row_that_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_row(monkeypatch, "POST /serving-endpoints/{name}/invocations", AUTHENTICATED)
    async with platform() as stack:
        await serve(stack, "ep", Echo())
        assert (await invoke(stack, "ep")).status == 500


# --- who gets in


@pytest.mark.parametrize(
    "path", ["/api/2.0/secrets/scopes/list", "/serving-endpoints/ep/invocations", "/nowhere", "/", "/telemetry-ext"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH"])
async def test_nobody_learns_anything_without_a_credential(stack: Platform, method: str, path: str) -> None:
    answer = await fetch(stack.url, method, path)
    assert answer.status == 401
    assert answer.json()["error_code"] == "UNAUTHENTICATED"


async def test_a_wrong_token_is_refused_with_the_documented_text(stack: Platform) -> None:
    answer = await fetch(stack.url, "GET", "/api/2.0/serving-endpoints", token="dapi-wrong")
    assert (answer.status, answer.json()) == (
        403,
        {"error_code": "PERMISSION_DENIED", "message": "Invalid access token."},
    )


async def test_basic_credentials_with_user_token_are_taken(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    credential = base64.b64encode(b"token:owner-token").decode()
    answer = await invoke(stack, "ep", token=None, headers={"authorization": f"Basic {credential}"})
    assert answer.status == 200


async def test_discovery_and_health_need_no_credential(stack: Platform) -> None:
    async def discovered() -> bool:
        path = "/.well-known/databricks-config"
        discovery = (await fetch(stack.url, "GET", path, headers={"host": "evil.example"})).json()
        assert discovery["oidc_endpoint"] == f"{stack.url}/oidc"
        return bool(discovery.get("workspace_id") == WORKSPACE_ID)

    await eventually(discovered, what="the gateway has asked Secrets for the workspace")
    assert (await fetch(stack.url, "GET", "/health")).status == 200


async def test_every_answer_names_the_workspace_and_the_request(stack: Platform) -> None:
    answer = await fetch(stack.url, "GET", "/nowhere", token="owner-token", headers={"x-tessera-request-id": "mine-1"})
    assert answer.headers["x-databricks-org-id"] == WORKSPACE_ID
    assert answer.headers["x-tessera-request-id"] == "mine-1"


async def test_an_unknown_path_or_verb_gets_the_envelope(stack: Platform) -> None:
    for method, path in [
        ("GET", "/api/2.0/nothing"),
        ("DELETE", "/api/2.0/secrets/scopes/list"),
        ("HEAD", "/api/2.0/x"),
    ]:
        answer = await fetch(stack.url, method, path, token="owner-token")
        assert answer.status == 404
        if method != "HEAD":
            assert answer.json() == {
                "error_code": "ENDPOINT_NOT_FOUND",
                "message": f"No API found for '{method} {path}'",
            }


async def test_telemetry_is_counted_and_dropped(stack: Platform) -> None:
    answer = await fetch(stack.url, "POST", "/telemetry-ext", token="owner-token", json={"protoLogs": ["{}", "{}"]})
    assert answer.json() == {"errors": [], "numProtoSuccess": 2}


async def test_a_token_is_exchanged_once_for_many_requests(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    for _ in range(20):
        assert (await invoke(stack, "ep")).status == 200
    assert stack.authority.exchanges == 1


# --- the control plane


async def test_a_call_reaches_its_service_as_the_caller_and_foreign_texts_stay_there(stack: Platform) -> None:
    answer = await fetch(stack.url, "GET", "/api/2.0/serving-endpoints/ep", token="owner-token")
    assert stack.serving.seen == [("GetServingEndpoint", OWNER.name)]
    assert answer.status == 501
    assert "canary" not in answer.body.decode()


async def test_a_service_is_told_which_request_ids_the_caller_chose(stack: Platform) -> None:
    for headers in (
        {},
        {"x-tessera-request-id": "mine-1"},
        {"x-tessera-request-id-chosen": "true"},  # between our own services, a caller's word for it counts nothing
    ):
        await fetch(stack.url, "DELETE", "/api/2.0/serving-endpoints/ep", token="owner-token", headers=headers)
    assert stack.serving.chosen_ids == [None, "mine-1", None]


@pytest.mark.parametrize("odd", ["", "a" * 65, "a b", "\xe9"])
async def test_an_odd_request_id_is_refused_in_the_shape_of_the_service(stack: Platform, odd: str) -> None:
    headers = {"x-tessera-request-id": odd}
    for path in ("/api/2.0/secrets/scopes/list", "/api/2.0/preview/scim/v2/Me"):
        answer = await fetch(stack.url, "GET", path, token="owner-token", headers=headers)
        assert answer.status == 400
        document = answer.json()
        assert ("error_code" in document) is ("scim" not in path)
        assert "X-Tessera-Request-Id" in (document.get("message") or document["detail"])
        assert len(answer.headers["x-tessera-request-id"]) == 32
    assert (await fetch(stack.url, "GET", path, headers=headers)).status == 401


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 100_000, b'"x"'])
async def test_a_body_that_is_no_json_object_is_malformed(stack: Platform, body: bytes) -> None:
    answer = await fetch(stack.url, "POST", "/api/2.0/secrets/put", token="owner-token", body=body)
    assert (answer.status, answer.json()["error_code"]) == (400, "MALFORMED_REQUEST")


async def test_a_control_plane_body_over_the_limit_is_refused(stack: Platform) -> None:
    at_the_limit = b"{%b}" % (b" " * (1024 * 1024 - 2))
    put = "/api/2.0/secrets/put"
    assert (await fetch(stack.url, "POST", put, token="owner-token", body=at_the_limit)).status == 501, (
        "it is passed on"
    )
    answer = await fetch(stack.url, "POST", put, token="owner-token", body=at_the_limit + b" ")
    assert (answer.status, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert "1048576 bytes" in answer.json()["message"]


async def test_a_control_plane_body_that_never_ends_is_refused(
    stack: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS", 0.2)

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    answer = await fetch(stack.url, "POST", "/api/2.0/secrets/put", token="owner-token", body=endless())
    assert (answer.status, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert "not complete after" in answer.json()["message"]


# --- where requests go


async def test_the_body_reaches_the_model_and_its_answer_the_caller(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    answer = await invoke(stack, "ep", json={"inputs": [1]})
    assert answer.status == 200
    assert answer.headers["served-model-name"] == "m-1"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["body"] == '{"inputs":[1]}'
    assert answer.json()["path"] == "/invocations"


async def test_requests_leave_nothing_to_the_garbage_collector(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    paths = ("/serving-endpoints/ep/invocations", "/serving-endpoints/gone/invocations", "/nowhere")
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(*stack.url.removeprefix("http://").split(":"))
        for is_counted in (False, True):  # the first ones make what is kept
            gc.collect()
            gc.disable()
            try:
                for path in paths * 50:
                    head = f"POST {path} HTTP/1.1\r\nhost: t\r\nauthorization: Bearer owner-token\r\ncontent-length: 2"
                    writer.write(f"{head}\r\ncontent-type: application/json\r\n\r\n{{}}".encode())
                    answer = await reader.readuntil(b"\r\n\r\n")
                    (length,) = re.findall(rb"content-length: (\d+)", answer)
                    await reader.readexactly(int(length))
                if is_counted:
                    assert gc.collect() < 50, "what leads to itself has all others wait, some time later"
            finally:
                gc.enable()
        writer.close()


async def test_the_model_never_sees_the_callers_credentials(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    sent = {
        "cookie": "session=1",
        "x-forwarded-for": "10.0.0.1",
        "x-tessera-assertion": "forged",
        "accept": "text/plain",
    }
    answer = await invoke(stack, "ep", headers=sent, json={})
    assert answer.json()["headers"].keys() == {"host", "content-type", "content-length", "accept"}


async def test_an_endpoint_of_somebody_else_looks_like_none(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    hidden = await invoke(stack, "ep", token="stranger-token")
    missing = await invoke(stack, "none", token="stranger-token")
    assert (hidden.status, hidden.json()) == (missing.status, missing.json()) == (404, GONE)
    assert hidden.headers.keys() == missing.headers.keys()
    assert (await invoke(stack, "ep", token="admin-token")).status == 200


@pytest.mark.parametrize("level", [Level.CAN_QUERY, Level.CAN_MANAGE])
async def test_whoever_may_query_is_answered(stack: Platform, level: Level) -> None:
    await serve(stack, "ep", Echo())
    await stack.access.change({"id-ep": {STRANGER.id: level}})
    assert (await invoke(stack, "ep", token="stranger-token")).status == 200
    assert (await invoke(stack, "ep", token="owner-token")).json() == GONE  # it was not named this time


async def test_whoever_may_only_see_an_endpoint_is_told_so(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    await stack.access.change({"id-ep": {STRANGER.id: Level.CAN_VIEW}})
    for name, body in (("ep/invocations", {}), ("chat/completions", {"model": "ep"})):
        refused = await fetch(stack.url, "POST", f"/serving-endpoints/{name}", token="stranger-token", json=body)
        assert (refused.status, refused.json()["error_code"]) == (403, "PERMISSION_DENIED")
        assert "CAN_QUERY" in refused.json()["message"]


async def test_a_permission_of_a_group_counts_for_its_members(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    await stack.access.change({"id-ep": {"900": Level.CAN_QUERY, STRANGER.id: Level.CAN_VIEW}})
    member = dataclasses.replace(STRANGER, group_ids=frozenset({"900", "901"}))
    stack.authority.tokens["member-token"] = member
    assert (await invoke(stack, "ep", token="member-token")).status == 200
    assert (await invoke(stack, "ep", token="stranger-token")).status == 403


async def test_a_permission_that_is_taken_away_is_gone_at_once(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    assert (await invoke(stack, "ep")).status == 200
    await stack.access.change({"id-ep": {}})
    assert (await invoke(stack, "ep")).json() == GONE


async def test_before_the_first_deployment_there_is_no_endpoint(stack: Platform) -> None:
    await stack.publish(routes("new"))
    assert (await invoke(stack, "new")).json() == GONE


async def test_an_entity_can_be_asked_directly_also_one_without_traffic(stack: Platform) -> None:
    addresses = [await stack.add_replica(Echo(name)) for name in ("a", "b")]
    await stack.publish(routes("ep", ("a", 100, [("r1", addresses[0])]), ("b", 0, [("r2", addresses[1])])))
    assert {(await invoke(stack, "ep")).json()["name"] for _ in range(20)} == {"a"}
    direct = await fetch(stack.url, "POST", "/serving-endpoints/ep/served-models/b/invocations", token="owner-token")
    assert (direct.json()["name"], direct.headers["served-model-name"]) == ("b", "b")
    unknown = await fetch(stack.url, "POST", "/serving-endpoints/ep/served-models/c/invocations", token="owner-token")
    assert unknown.json() == GONE


async def test_traffic_is_split_by_the_percentages(stack: Platform) -> None:
    addresses = [await stack.add_replica(Echo(name)) for name in ("a", "b")]
    await stack.publish(routes("ep", ("a", 80, [("r1", addresses[0])]), ("b", 20, [("r2", addresses[1])])))
    answers = await asyncio.gather(*(invoke(stack, "ep") for _ in range(200)))
    share = sum(answer.json()["name"] == "b" for answer in answers)
    assert 10 <= share <= 80  # 40 expected; beyond these bounds once in a billion runs


async def test_an_endpoint_whose_replica_is_missing_is_a_400(stack: Platform) -> None:
    await stack.publish(routes("ep", ("m-1", 100, [])))
    answer = await invoke(stack, "ep")
    assert (answer.status, answer.json()["error_code"]) == (400, "BAD_REQUEST")
    assert "m-1" in answer.json()["message"]


async def test_a_replica_that_does_not_accept_is_passed_over(stack: Platform) -> None:
    good = await stack.add_replica(Echo())
    nobody = f"unix:{stack.directory}/nobody.sock"
    await stack.publish(routes("ep", ("m-1", 100, [("r0", nobody), ("r1", good)])))
    assert [(await invoke(stack, "ep")).status for _ in range(5)] == [200] * 5
    await stack.publish(routes("ep", ("m-1", 100, [("r0", nobody)])))
    assert (await invoke(stack, "ep")).status == 400


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings", "responses"])
async def test_openai_style_paths_name_the_endpoint_in_the_body(stack: Platform, path: str) -> None:
    await serve(stack, "chat", Echo())
    answer = await fetch(stack.url, "POST", f"/serving-endpoints/{path}", token="owner-token", json={"model": "chat"})
    assert (answer.status, answer.json()["path"]) == (200, "/invocations")
    bodies: list[Any] = [{"model": 1}, {}, [], "x"]
    for body in bodies:
        bad = await fetch(stack.url, "POST", f"/serving-endpoints/{path}", token="owner-token", json=body)
        assert (bad.status, bad.json()["error_code"]) == (400, "BAD_REQUEST")


async def test_an_openai_style_body_of_very_many_lists_is_refused_before_it_is_read(stack: Platform) -> None:
    body: Any = {"model": "absent", "input": [[]] * MOST_CONTAINERS}
    bad = await fetch(stack.url, "POST", "/serving-endpoints/embeddings", token="owner-token", json=body)
    assert (bad.status, bad.json()["error_code"]) == (400, "BAD_REQUEST")
    assert "objects and lists" in bad.json()["message"]


# --- bodies, times, and people who hang up


async def test_a_streamed_body_is_passed_on_piece_by_piece(stack: Platform) -> None:
    await serve(stack, "ep", Echo())

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 65536

    assert (await invoke(stack, "ep", body=pieces())).json()["size"] == 40 * 65536


async def test_a_body_over_the_limit_is_refused_whether_it_is_declared_or_not(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    limit = 16 * 1024 * 1024

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(limit // 65536):
            yield b"x" * 65536
        yield b"x"

    for body in (b"x" * (limit + 1), pieces()):
        answer = await invoke(stack, "ep", body=body)
        assert (answer.status, answer.json()["error_code"]) == (400, "BAD_REQUEST")
        assert str(limit) in answer.json()["message"]
    assert (await invoke(stack, "ep", body=b"x" * limit)).json()["size"] == limit


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings", "responses"])
async def test_an_openai_style_body_may_be_as_long_as_any_other_and_no_longer(stack: Platform, path: str) -> None:
    await serve(stack, "ep", Echo())
    limit = 16 * 1024 * 1024
    longest = b'{"model": "ep", "input": "%b"}' % (b"x" * (limit - len(b'{"model": "ep", "input": ""}')))
    answer = await fetch(stack.url, "POST", f"/serving-endpoints/{path}", token="owner-token", body=longest)
    assert (answer.status, answer.json()["size"]) == (200, limit)
    answer = await fetch(stack.url, "POST", f"/serving-endpoints/{path}", token="owner-token", body=longest + b" ")
    assert (answer.status, answer.json()["error_code"]) == (400, "BAD_REQUEST")
    assert str(limit) in answer.json()["message"]


class Whole:
    """A replica that takes one request at a time, and keeps the bodies that came whole."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.set()
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await reply(send, b"{}")


async def serve_one_at_a_time(stack: Platform) -> Whole:
    whole = Whole()
    endpoint = routes("ep", ("m-1", 100, [("r-ep", await stack.add_replica(whole))]))
    endpoint.entities[0].replicas[0].concurrency = 1
    await stack.publish(endpoint)
    return whole


@asynccontextmanager
async def half_sent(stack: Platform, half: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """A connection on which a body does not come whole."""
    host, _, port = stack.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = b"POST /serving-endpoints/ep/invocations HTTP/1.1\r\nauthorization: Bearer owner-token\r\n"
    writer.write(head + b"content-length: %d\r\n\r\n" % (len(half) + 6) + half)
    try:
        yield reader
    finally:
        writer.close()


async def test_who_hangs_up_in_the_middle_of_a_body_leaves_its_place_and_nothing_of_it_is_asked(
    stack: Platform,
) -> None:
    whole = await serve_one_at_a_time(stack)
    async with half_sent(stack, bytes(invocations.FIRST_BYTES)):
        await whole.begun.wait()
    assert (await invoke(stack, "ep", body=b"whole")).status == 200
    assert whole.bodies == [b"whole"]


async def test_who_sends_half_of_a_short_body_takes_no_place(stack: Platform) -> None:
    whole = await serve_one_at_a_time(stack)
    async with half_sent(stack, b"half"), half_sent(stack, b"half"):
        assert (await invoke(stack, "ep", body=b"whole")).status == 200
    assert whole.bodies == [b"whole"]


async def test_a_long_body_that_is_slow_gives_its_place_back(stack: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invocations, "REST_SECONDS", 0.3)
    whole = await serve_one_at_a_time(stack)
    async with half_sent(stack, bytes(invocations.FIRST_BYTES)) as reader:
        await whole.begun.wait()
        async with asyncio.timeout(30):
            answer = await reader.readuntil(b"}")
        assert answer.startswith(b"HTTP/1.1 504 ")
        assert (await invoke(stack, "ep", body=b"whole")).status == 200
    assert whole.bodies == [b"whole"]


@pytest.mark.parametrize("half", [b"", b"half", bytes(invocations.FIRST_BYTES)], ids=["nothing", "half", "much"])
async def test_a_body_that_does_not_come_whole_in_time_is_a_504_that_says_so_and_leaves_its_place(half: bytes) -> None:
    async with platform(inference_deadline=0.3) as quick:
        whole = await serve_one_at_a_time(quick)
        async with half_sent(quick, half) as reader, asyncio.timeout(30):
            answer = await reader.readuntil(b"}")
        assert answer.startswith(b"HTTP/1.1 504 ")
        assert b"DEADLINE_EXCEEDED" in answer
        assert b"body" in answer
        assert (await invoke(quick, "ep", body=b"whole")).status == 200
    assert whole.bodies == [b"whole"]


async def test_a_model_that_is_too_slow_is_a_504(stack: Platform) -> None:
    async with platform(inference_deadline=0.2) as quick:
        held = Held()
        await serve(quick, "ep", held)
        answer = await invoke(quick, "ep")
    assert (answer.status, answer.json()["error_code"]) == (504, "DEADLINE_EXCEEDED")
    assert held.gone.is_set()


async def test_a_model_that_dies_before_its_answer_is_a_500_that_names_the_entity(stack: Platform) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    path = stack.directory / "dies.sock"
    async with await asyncio.start_unix_server(die, path):
        await stack.publish(routes("ep", ("m-1", 100, [("r-1", f"unix:{path}")])))
        answer = await invoke(stack, "ep")
    assert (answer.status, answer.json()["error_code"]) == (500, "INTERNAL_ERROR")
    assert "m-1" in answer.json()["message"]


async def test_an_answer_that_breaks_off_is_seen_as_broken(stack: Platform) -> None:
    await serve(stack, "ep", DiesMidAnswer())
    with pytest.raises(ConnectionLost):
        await invoke(stack, "ep")


async def test_a_caller_that_hangs_up_spares_the_model_the_work(stack: Platform) -> None:
    held = Held()
    await serve(stack, "ep", held)
    request = asyncio.create_task(invoke(stack, "ep"))
    await held.arrived.wait()
    request.cancel()
    with suppress(asyncio.CancelledError):
        await request
    async with asyncio.timeout(30):
        await held.gone.wait()


class Flood:
    """A replica whose first answer is longer than anybody would keep."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        await body_of(receive)
        if self.asked > 1:
            await reply(send, b"{}")
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})


async def test_a_caller_that_stops_reading_gives_its_place_back_when_the_time_is_over() -> None:
    async with platform(inference_deadline=1.0) as strict:
        endpoint = routes("ep", ("m-1", 100, [("r1", await strict.add_replica(Flood()))]))
        endpoint.entities[0].replicas[0].concurrency = 1
        await strict.publish(endpoint)
        host, port = strict.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(
            b"POST /serving-endpoints/ep/invocations HTTP/1.1\r\nauthorization: Bearer owner-token\r\n"
            b"content-length: 2\r\n\r\n{}"
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        assert (await invoke(strict, "ep")).status == 200
        writer.close()


async def test_a_body_that_stops_in_the_middle_gives_its_place_back(
    stack: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invocations, "PIECE_SECONDS", 0.2)
    await serve(stack, "ep", Echo())
    may_go_on = asyncio.Event()

    async def stopping() -> AsyncIterator[bytes]:
        yield b"{"
        await may_go_on.wait()

    answer = await invoke(stack, "ep", body=stopping())
    assert answer.status == 400
    assert "body" in answer.json()["message"]


async def test_a_status_that_is_none_is_the_model_servers_failure(stack: Platform) -> None:
    async def odd(scope: Any, receive: Any, send: Any) -> None:
        await body_of(receive)
        await reply(send, b"{}", status=520)

    await serve(stack, "ep", odd)
    answer = await invoke(stack, "ep")
    assert (answer.status, answer.json()["error_code"]) == (500, "INTERNAL_ERROR")


class Chat:
    """A replica that says how many tokens each answer took, at once or at the end of a stream that is held."""

    def __init__(self, *, is_stream: bool = False) -> None:
        self.is_stream = is_stream
        self.release = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await body_of(receive)
        usage = b'{"usage": {"total_tokens": 7}}'
        if not self.is_stream:
            await reply(send, usage, headers=((b"content-type", b"application/json"),))
            return
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await self.release.wait()
        await send({"type": "http.response.body", "body": b"data: " + usage + b"\n\ndata: [DONE]\n\n"})


async def serve_limited(stack: Platform, application: Any, **most: int) -> None:
    address = await stack.add_replica(application)
    limited = routes("ep", ("m-1", 100, [("r-ep", address)]))
    limited.rate_limits.add(renewal_period="minute", **most)
    await stack.publish(limited)


async def test_tokens_are_counted_when_an_answer_has_ended(stack: Platform) -> None:
    await serve_limited(stack, Chat(), tokens=10)
    assert [(await invoke(stack, "ep")).status for _ in range(3)] == [200, 200, 429]
    body = {"model": "ep", "messages": []}
    answer = await fetch(stack.url, "POST", "/serving-endpoints/chat/completions", token="owner-token", json=body)
    assert (answer.status, answer.json()["error_code"]) == (429, "REQUEST_LIMIT_EXCEEDED")
    assert "10 tokens per minute" in answer.json()["message"]


async def test_tokens_of_a_stream_are_counted_by_what_it_says(stack: Platform) -> None:
    chat = Chat(is_stream=True)
    chat.release.set()
    await serve_limited(stack, chat, tokens=7)
    assert [(await invoke(stack, "ep")).status for _ in range(2)] == [200, 429]


async def test_a_stream_that_its_caller_gives_up_counts_what_was_sent(stack: Platform) -> None:
    chat = Chat(is_stream=True)
    await serve_limited(stack, chat, tokens=3)
    pool = HttpPool()
    response = await pool.send(
        stack.url.removeprefix("http://"),
        "POST",
        "/serving-endpoints/ep/invocations",
        [(b"authorization", b"Bearer owner-token")],
        b"{}",
        timeout=20,
    )
    seen = b""
    while seen.count(b"data:") < 3:
        seen += await anext(response)
    await response.close()
    await pool.close()
    await stack.serving.until(lambda: [u.amount for r in stack.serving.reports for u in r.uses] == [3])
    chat.release.set()
    assert (await invoke(stack, "ep")).status == 429


async def test_a_limited_call_does_not_reach_the_model_and_is_reported(stack: Platform) -> None:
    echo = Echo()
    await serve_limited(stack, echo, calls=2)
    assert [(await invoke(stack, "ep")).status for _ in range(4)] == [200, 200, 429, 429]
    assert echo.requests == 2

    def told() -> dict[int, int]:
        """What was used in each second, as it was told last."""
        return {use.second: use.amount for report in stack.serving.reports for use in report.uses}

    await stack.serving.until(lambda: sum(told().values()) == 2)
    use = next(use for report in stack.serving.reports for use in report.uses)
    assert (use.endpoint_id, use.kind, use.subject, use.measure) == ("id-ep", "endpoint", "", "calls")


async def test_limits_hold_while_serving_is_gone(stack: Platform) -> None:
    await serve_limited(stack, Echo(), calls=2)
    stack.serving.hang_up()
    assert [(await invoke(stack, "ep")).status for _ in range(4)] == [200, 200, 429, 429]


async def test_connections_to_a_replica_are_used_again(stack: Platform) -> None:
    address = await stack.add_replica(Echo())
    async with CountingProxy(stack.directory, address) as proxy:
        await stack.publish(routes("ep", ("m-1", 100, [("r-1", proxy.address)])))
        for _ in range(50):
            assert (await invoke(stack, "ep")).status == 200
        assert proxy.accepted == 1


# --- the table


async def test_a_retired_replica_gets_no_new_request_and_its_last_one_is_reported(stack: Platform) -> None:
    held, after = Held(), Echo("new")
    await serve(stack, "ep", held)
    under_way = asyncio.create_task(invoke(stack, "ep"))
    await held.arrived.wait()
    address = await stack.add_replica(after)
    await stack.publish(routes("ep", ("m-2", 100, [("r-new", address)])))
    latest = stack.serving.reports[-1]
    assert [(load.replica_id, load.in_flight) for load in latest.retired] == [("r-ep", 1)]
    assert (await invoke(stack, "ep")).json()["name"] == "new"
    held.release.set()
    assert (await under_way).status == 200
    await stack.serving.until(lambda: not stack.serving.reports[-1].retired)


@pytest.mark.parametrize("change", ["an update", "a revocation"])
async def test_a_body_that_comes_after_a_change_is_treated_by_what_holds_then(
    stack: Platform, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The replica that was there at the head may have been drained, since nobody used it, and stopped."""
    await serve(stack, "ep", Echo("old"))
    address = await stack.add_replica(Echo("new"))
    has_head, may_go_on = asyncio.Event(), asyncio.Event()
    permitted = invocations.Invocations._permitted

    async def noted(*args: Any) -> Any:
        has_head.set()
        return await permitted(*args)

    async def slow_body() -> AsyncIterator[bytes]:
        await may_go_on.wait()
        yield b"{}"

    monkeypatch.setattr(invocations.Invocations, "_permitted", noted)
    under_way = asyncio.create_task(invoke(stack, "ep", body=slow_body()))
    await has_head.wait()
    if change == "an update":
        await stack.publish(routes("ep", ("m-2", 100, [("r-new", address)])))
    else:
        await stack.access.change({"id-ep": {}})
    may_go_on.set()
    answer = await under_way
    assert answer.json() == GONE if change == "a revocation" else answer.json()["name"] == "new"


async def test_the_last_table_stays_in_force_while_serving_is_gone(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    stack.serving.hang_up()
    assert [(await invoke(stack, "ep")).status for _ in range(10)] == [200] * 10


async def test_after_a_lost_stream_the_whole_table_is_fetched_anew(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    acknowledged = stack.serving.acknowledged
    del stack.serving.endpoints["id-ep"]
    stack.serving.hang_up()
    await stack.serving.until(lambda: stack.serving.acknowledged > acknowledged)
    assert (await invoke(stack, "ep")).json() == GONE


async def test_a_name_can_pass_to_a_new_endpoint(stack: Platform) -> None:
    await serve(stack, "ep", Echo("old"))
    address = await stack.add_replica(Echo("new"))
    successor = routes("ep", ("m-1", 100, [("r-2", address)]))
    successor.endpoint_id = "id-second"
    await stack.access.change({"id-second": {}}, removed_endpoint_ids=["id-ep"])
    await stack.serving.publish(successor, removed=("id-ep",))
    assert (await invoke(stack, "ep", token="owner-token")).json() == GONE
    assert (await invoke(stack, "ep", token="admin-token")).json()["name"] == "new"


# --- while Secrets is gone


async def test_known_callers_go_on_with_inference_while_secrets_is_gone(
    stack: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    await serve(stack, "ep", Echo())
    assert (await invoke(stack, "ep")).status == 200
    monkeypatch.setattr(identity, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(identity, "REFRESH_SECONDS", 0.0)
    stack.authority.is_gone = True
    assert [(await invoke(stack, "ep")).status for _ in range(5)] == [200] * 5
    assert (await fetch(stack.url, "GET", "/api/2.0/serving-endpoints", token="owner-token")).status == 503
    assert (await invoke(stack, "ep", token="stranger-token")).status == 503


async def test_a_revoked_token_stops_working(stack: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    await serve(stack, "ep", Echo())
    assert (await invoke(stack, "ep")).status == 200
    stack.authority.revoked.add("owner-token")
    monkeypatch.setattr(identity, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(identity, "REFRESH_SECONDS", 0.0)
    assert (await invoke(stack, "ep")).status == 403


async def test_a_revocation_that_is_told_needs_no_time_to_pass(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    changes: list[dict[str, Any]] = [{"token_ids": [OWNER.token_id]}, {"principal_ids": [OWNER.id]}]
    for changed in changes:
        stack.authority.revoked.clear()
        assert (await invoke(stack, "ep")).status == 200
        stack.authority.revoked.add("owner-token")
        assert (await invoke(stack, "ep")).status == 200  # known for some seconds, and nobody said otherwise
        await stack.access.change(**changed)
        assert (await invoke(stack, "ep")).status == 403


@pytest.mark.parametrize(
    "path", ["/api/2.0/serving-endpoints", "/serving-endpoints/ep/invocations", "/serving-endpoints/chat/completions"]
)
async def test_whose_token_is_revoked_while_a_body_is_on_its_way_is_not_served(
    stack: Platform, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    await serve(stack, "ep", Echo())
    is_known, may_go_on = asyncio.Event(), asyncio.Event()
    identify = app.Gateway._identify

    async def noted(*args: Any, **kwargs: Any) -> Any:
        found = await identify(*args, **kwargs)
        is_known.set()
        return found

    async def slow_body() -> AsyncIterator[bytes]:
        await may_go_on.wait()
        yield b'{"model": "ep"}'

    monkeypatch.setattr(app.Gateway, "_identify", noted)
    under_way = asyncio.create_task(fetch(stack.url, "POST", path, token="owner-token", body=slow_body()))
    await is_known.wait()
    stack.authority.revoked.add("owner-token")
    await stack.access.change(token_ids=[OWNER.token_id])
    may_go_on.set()
    assert (await under_way).status == 403
    assert stack.serving.seen == []


async def test_the_last_permissions_stay_in_force_for_inference_while_the_feed_is_gone(
    stack: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    await serve(stack, "ep", Echo())
    monkeypatch.setattr(access, "CURRENT_SECONDS", 0.0)
    stack.access.is_silent = True
    assert [(await invoke(stack, "ep")).status for _ in range(5)] == [200] * 5
    assert (await invoke(stack, "ep", token="stranger-token")).json() == GONE


async def test_without_a_window_permissions_that_nobody_confirms_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with platform(stale_identity_seconds=0.0) as stack:
        await serve(stack, "ep", Echo())
        stack.access.is_silent = True
        monkeypatch.setattr(access, "CURRENT_SECONDS", 0.0)
        for name in ("ep", "none"):  # nor does the answer say which endpoints there are
            assert (await invoke(stack, name)).status == 503


async def test_a_feed_that_falls_silent_is_opened_anew(stack: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "SILENCE_SECONDS", 0.1)
    stack.access.is_silent = True
    await serve_unheard(stack)
    stack.access.is_silent = False
    await eventually(lambda: invoked_with(stack, 200))


async def test_after_a_lost_feed_the_whole_table_is_fetched_anew(stack: Platform) -> None:
    await serve(stack, "ep", Echo())
    stack.access.granted["id-ep"] = {}
    revision = stack.access.revision
    stack.access.hang_up()
    await stack.access.until_followed(revision + 1)
    assert (await invoke(stack, "ep")).json() == GONE


# --- while neighbours restart


async def test_a_request_waits_for_a_service_that_is_just_being_restarted(directory: Path) -> None:
    # The gateway is up and Serving is not yet; a moment later it is.
    authority, serving, feed = ScriptedAuthority(), ScriptedServing(), ScriptedAccess()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(neighbours(directory, authority, serving, feed, only=("secrets",)))
        url = await stack.enter_async_context(app.running(GatewaySettings(data_dir=directory, listen="127.0.0.1:0")))
        asked = [
            asyncio.create_task(fetch(url, "GET", "/api/2.0/serving-endpoints", token="owner-token")),
            asyncio.create_task(fetch(url, "POST", "/serving-endpoints/none/invocations", token="owner-token")),
        ]
        await eventually(lambda: authority.exchanges > 0)
        assert not any(task.done() for task in asked)
        await stack.enter_async_context(neighbours(directory, authority, serving, feed, only=("serving",)))
        assert [(await task).status for task in asked] == [501, 404]


async def test_the_first_request_of_a_caller_waits_for_secrets_that_is_just_being_started(directory: Path) -> None:
    authority, serving, feed = ScriptedAuthority(), ScriptedServing(), ScriptedAccess()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(neighbours(directory, authority, serving, feed, only=("serving",)))
        url = await stack.enter_async_context(app.running(GatewaySettings(data_dir=directory, listen="127.0.0.1:0")))
        asked = asyncio.create_task(fetch(url, "GET", "/api/2.0/serving-endpoints", token="owner-token"))
        for _ in range(5):  # after the first of these at the latest, the question has met nobody
            assert (await fetch(url, "GET", "/health")).status == 200
        assert not asked.done()
        await stack.enter_async_context(neighbours(directory, authority, serving, feed, only=("secrets",)))
        assert (await asked).status == 501


async def test_a_service_that_stays_away_is_a_503_that_asks_to_retry(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "RESTART_SECONDS", 0.1)
    monkeypatch.setattr(invocations, "FIRST_TABLE_SECONDS", 0.1)
    async with (
        neighbours(directory, ScriptedAuthority(), ScriptedServing(), ScriptedAccess(), only=("secrets",)),
        app.running(GatewaySettings(data_dir=directory, listen="127.0.0.1:0")) as url,
    ):
        for method, path in [("GET", "/api/2.0/serving-endpoints"), ("POST", "/serving-endpoints/ep/invocations")]:
            answer = await fetch(url, method, path, token="owner-token")
            assert (answer.status, answer.json()["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
            assert "moment" in answer.json()["message"]
