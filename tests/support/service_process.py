"""A service as a process of its own, to be killed without warning and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from secrets_service.settings import SecretsSettings
from servicekit import channels, sockets
from tests.support.eventually import eventually


class ServiceProcess:
    """The service; `channel` leads to its gateway socket, before and after a restart."""

    def __init__(
        self, channel: grpc.aio.Channel, command: Sequence[str], environment: Mapping[str, str] | None
    ) -> None:
        self.channel = channel
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Starts it and returns when it is ready."""
        self._process = await asyncio.to_thread(subprocess.Popen, self._command, env=self._environment)
        await eventually(self._is_ready)

    async def kill(self) -> None:
        """Ends it as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            self._process = None

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        """Its process number."""
        assert self._process is not None
        return self._process.pid

    async def ended(self) -> int:
        """The exit status, when it has ended by itself, or by a signal."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait)

    async def _is_ready(self) -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            answer = await health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False


@contextlib.asynccontextmanager
async def service_process(
    address: str, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> AsyncIterator[ServiceProcess]:
    """The service whose gateway socket is at `address`, started, and killed in the end."""
    async with channels.opened(address) as channel:
        process = ServiceProcess(channel, command, environment)
        try:
            await process.start()
            yield process
        finally:
            await process.kill()


@contextlib.asynccontextmanager
async def secrets_process(directory: Path, command: Sequence[str]) -> AsyncIterator[ServiceProcess]:
    """Secrets alone on a data directory, as `command` runs it, with nothing of this process's own environment."""
    address = sockets.socket_address(SecretsSettings(data_dir=directory).sockets, callee="secrets", caller="gateway")
    environment = {
        "PATH": os.environ["PATH"],
        "TESSERA_DATA_DIR": str(directory),
        "TESSERA_SECRETS_LISTEN": "127.0.0.1:0",
        "TESSERA_LOG_LEVEL": "error",
    }
    async with service_process(address, command, environment) as process:
        yield process
