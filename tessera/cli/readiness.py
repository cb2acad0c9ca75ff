"""Whether a service answers: the health check of gRPC, `GET /health` for the gateway.

As a program, `python -m tessera.cli.readiness grpc|http HOST:PORT`, it is the health check of a container.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit import channels

_PERIOD_SECONDS = 0.05
_ANSWER_SECONDS = 2.0
_CONTAINER_SECONDS = 3.0


async def until_grpc_is_ready(address: str) -> None:
    """Returns when the service at `host:port` says that it is serving."""
    async with channels.opened(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass  # not there yet
            await asyncio.sleep(_PERIOD_SECONDS)


async def until_http_is_ready(address: str) -> None:
    """Returns when `GET /health` at `host:port` is answered with 200."""
    while True:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                if await _status(address) == b"200":
                    return
        except OSError:
            pass  # not there yet
        await asyncio.sleep(_PERIOD_SECONDS)


async def _status(address: str) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    try:
        writer.write(f"GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        return line.split(b" ", 2)[1] if line.count(b" ") > 1 else b""
    finally:
        writer.close()


async def _main(kind: str, address: str) -> int:
    until_ready = {"grpc": until_grpc_is_ready, "http": until_http_is_ready}[kind]
    try:
        async with asyncio.timeout(_CONTAINER_SECONDS):
            await until_ready(address)
    except TimeoutError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(*sys.argv[1:])))
