"""The Serving service of `tests/support/serving.py` as a process of its own, to be killed without warning.

`python -m tests.support.serving_process DIRECTORY` runs until it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit import channels, sockets
from serving_service import app
from tests.support.eventually import eventually
from tests.support.serving import MannerRegistry, a_launcher, serving_settings

ROUTE_ACK_SECONDS = 0.3


class ServingProcess:
    """The service on a data directory; `channel` leads to its gateway socket, before and after a restart."""

    def __init__(self, directory: Path, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Starts it and returns when it is ready."""
        command = [sys.executable, "-m", "tests.support.serving_process", str(self._directory)]
        self._process = await asyncio.to_thread(subprocess.Popen, command)
        await eventually(self._is_ready, within=20.0)

    async def kill(self) -> None:
        """Ends it as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._process = None

    async def _is_ready(self) -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            answer = await health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False


@contextlib.asynccontextmanager
async def serving_process(directory: Path) -> AsyncIterator[ServingProcess]:
    """The service as a process, started, and killed in the end."""
    address = sockets.socket_address(serving_settings(directory).sockets, callee="serving", caller="gateway")
    async with channels.opened(address) as channel:
        process = ServingProcess(directory, channel)
        try:
            await process.start()
            yield process
        finally:
            await process.kill()


async def main(directory: Path) -> None:
    settings = serving_settings(directory, route_ack_seconds=ROUTE_ACK_SECONDS)
    async with app.running(settings, launcher=a_launcher(settings), registry=MannerRegistry(directory)):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
