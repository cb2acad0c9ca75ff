"""Whether a service answers: the health check of gRPC, `GET /health` for the gateway.

As a program it is the health check of a container: `python -m tessera.cli.readiness grpc unix:/path`, or `http
host:port`, which speaks TLS when this container's settings name a certificate.
"""

from __future__ import annotations

import asyncio
import ssl
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit import channels, settings

_PERIOD_SECONDS = 0.05
_ANSWER_SECONDS = 2.0
_CONTAINER_SECONDS = 3.0


async def until_grpc_is_ready(address: str) -> None:
    """Returns when the service at `unix:/path`, or at `host:port` without TLS, says that it is serving."""
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


async def until_http_is_ready(address: str, *, has_tls: bool) -> None:
    """Returns when `GET /health` at `host:port` is answered with 200."""
    while True:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                if await _status(address, has_tls=has_tls) == b"200":
                    return
        except OSError:
            pass  # not there yet
        await asyncio.sleep(_PERIOD_SECONDS)


async def _status(address: str, *, has_tls: bool) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=_unverified() if has_tls else None)
    try:
        writer.write(f"GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        return line.split(b" ", 2)[1] if line.count(b" ") > 1 else b""
    finally:
        writer.close()


def _unverified() -> ssl.SSLContext:
    """For a question without a secret whose answer is believed by nobody else: the name in the certificate is public,
    and not the one that a service has on its own machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _main(kind: str, address: str) -> int:
    try:
        async with asyncio.timeout(_CONTAINER_SECONDS):
            if kind == "grpc":
                await until_grpc_is_ready(address)
            else:
                await until_http_is_ready(address, has_tls=settings.load(settings.ServiceSettings).has_tls)
    except TimeoutError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(*sys.argv[1:])))
