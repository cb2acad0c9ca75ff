"""The servers that ours are compared with: each does the least that can be called the same work.

`python -m tests.bench.servers NAME REPORT_FD [ARGUMENT...]` listens on a free port of loopback and writes its address,
as one line of JSON, to the inherited pipe REPORT_FD.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import grpc
import orjson
import uvicorn
import uvloop

from servicekit.context import Level
from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc
from tests.support.gateway import OWNER, ScriptedAccess, ScriptedAuthority, ScriptedServing, neighbours
from tests.support.gateway import routes as endpoint_routes

SECRET_VALUE = b"s" * 100
MODEL_ANSWER = b'{"predictions":[{"answer":"always the same, forty-two letters long"}]}'

Ready = Callable[[str], None]


async def echo(ready: Ready, path: str) -> None:
    """gRPC: checks the token as cheaply as is decent and answers from memory, on TCP and on the Unix socket `path`."""
    server = grpc.aio.server(interceptors=[_Authentication(os.environ["BENCH_TOKEN"])])
    get_secret = grpc.unary_unary_rpc_method_handler(
        _get_secret,
        request_deserializer=pb.GetSecretRequest.FromString,
        response_serializer=pb.GetSecretResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("tessera.secrets.v1.Secrets", {"GetSecret": get_secret}),)
    )
    server.add_insecure_port(f"unix:{path}")
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready(f"127.0.0.1:{port}")
    await server.wait_for_termination()


class _Authentication(grpc.aio.ServerInterceptor):
    def __init__(self, token: str) -> None:
        self._expected = hashlib.sha256(f"Bearer {token}".encode()).digest()
        self._refusal: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(_refuse)

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        given = str(dict(details.invocation_metadata or ()).get("authorization", ""))
        if hmac.compare_digest(hashlib.sha256(given.encode()).digest(), self._expected):
            return await continuation(details)
        return self._refusal


async def _refuse(request: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")


async def _get_secret(request: pb.GetSecretRequest, context: Any) -> pb.GetSecretResponse:
    return pb.GetSecretResponse(key=request.key, value=SECRET_VALUE)


async def bare_gateway(ready: Ready, target: str) -> None:
    """HTTP: turns the query string into one call of the gRPC server at `target`, and its answer into JSON."""
    async with grpc.aio.insecure_channel(target) as channel:
        secrets = rpc.SecretsStub(channel)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            query = dict(parse_qsl(scope["query_string"].decode()))
            authorization = dict(scope["headers"])[b"authorization"].decode()
            answer = await secrets.GetSecret(
                pb.GetSecretRequest(scope=query["scope"], key=query["key"]),
                metadata=(("authorization", authorization),),
                timeout=10,
            )
            body = orjson.dumps({"key": answer.key, "value": base64.b64encode(answer.value).decode()})
            await _answer(send, body)

        await _serve(app, [_free_port()], ready)


async def trivial_replica(ready: Ready, path: str) -> None:
    """HTTP: reads the body and always answers the same, on TCP and on the Unix socket `path`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await _answer(send, MODEL_ANSWER)

    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    unix.listen(512)
    await _serve(app, [_free_port(), unix], ready)


async def mlflow(ready: Ready, model: str) -> None:
    """MLflow's own scoring server around a model, as its command runs it but without the access log."""
    from mlflow.pyfunc import load_model, scoring_server  # which the other servers are not to pay for

    await _serve(scoring_server.init(load_model(model)), [_free_port()], ready)


async def scripted_neighbours(ready: Ready, data_dir: str, replica: str) -> None:
    """Stands in for Secrets and Serving beside a gateway: one caller is known, and one endpoint with one replica."""
    authority, serving, access = ScriptedAuthority(), ScriptedServing(), ScriptedAccess()
    routes = endpoint_routes("bench", ("model", 100, [("replica", replica)]))
    serving.endpoints[routes.endpoint_id] = routes
    access.granted[routes.endpoint_id] = {OWNER.id: Level.CAN_QUERY}
    async with neighbours(Path(data_dir), authority, serving, access):
        ready(data_dir)
        await asyncio.Event().wait()


def _free_port() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=2048)


async def _answer(send: Any, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _serve(app: Any, listening: list[socket.socket], ready: Ready) -> None:
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="off", access_log=False, log_config=None, timeout_keep_alive=75
    )
    ready(f"127.0.0.1:{listening[0].getsockname()[1]}")  # whoever connects before the first accept waits in the queue
    await uvicorn.Server(config).serve(sockets=listening)


def main() -> None:
    programs: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
        "echo": echo,
        "bare-gateway": bare_gateway,
        "trivial-replica": trivial_replica,
        "mlflow": mlflow,
        "neighbours": scripted_neighbours,
    }
    name, report_fd, *arguments = sys.argv[1:]

    def ready(address: str) -> None:
        with os.fdopen(int(report_fd), "wb") as pipe:
            pipe.write(orjson.dumps({"address": address}) + b"\n")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(programs[name](ready, *arguments))


if __name__ == "__main__":
    main()
