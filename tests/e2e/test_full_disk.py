"""A disk that is full, a real one: the services say so, inference and reads go on, nothing is damaged (R28).

The disk is a small tmpfs, which root may mount, and everybody else in a user namespace, where there are any.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit import channels, database
from servicekit.health import LIVE, READY
from tessera.identity.v1 import identity_pb2
from tests.support.builders import an_input
from tests.support.eventually import eventually
from tests.support.secrets import Caller, data_directory, refusal, settings_for
from tests.support.service_process import ServiceProcess, secrets_process
from tests.support.serving import TINY, ServingCaller, no_replicas
from tests.support.serving_process import serving_process

ROOT = Path(__file__).parents[2]
MEBIBYTES = 24
LARGE = "x" * 100_000
"""A value that finds no room in what the databases have already."""
WITHIN = 60.0
OWN_MOUNTS = ("unshare", "--mount")
NAMESPACE = (*OWN_MOUNTS, "--user", "--map-root-user")

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """A data directory that is a disk of its own."""
    with data_directory() as directory:
        options = ("-t", "tmpfs", "-o", f"size={MEBIBYTES}m,mode=0700", "tmpfs")
        subprocess.run(["mount", *options, str(directory)], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


class Platform:
    """Secrets and Serving as processes on one disk."""

    def __init__(self, directory: Path, secrets: ServiceProcess, serving: ServiceProcess) -> None:
        self.processes = (secrets, serving)
        self._directory = directory
        self.admin: Caller
        self.endpoints: ServingCaller

    async def log_in(self) -> None:
        """Renews who the callers are, for another minute."""
        gateway = Caller(self.processes[0].channel)
        token = settings_for(self._directory).admin_token.read_text().strip()
        made = await gateway(gateway.authority.ExchangeToken, identity_pb2.ExchangeTokenRequest(token=token))
        self.admin = Caller(gateway.channel, (channels.ASSERTION, made.assertion))
        self.endpoints = ServingCaller(self.processes[1].channel, (channels.ASSERTION, made.assertion))

    async def are_all(self, status: Any) -> bool:
        """Whether both say that of their readiness; that they are live, they say at any time."""
        assert {await _health(each, LIVE) for each in self.processes} == {SERVING}
        return {await _health(each, READY) for each in self.processes} == {status}

    def fill(self) -> Path:
        """Leaves no room on the disk; the file that took it."""
        filler = self._directory / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        return filler


async def _health(process: ServiceProcess, name: str) -> Any:
    stub = health_pb2_grpc.HealthStub(process.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=WITHIN)).status


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Platform]:
    command = [sys.executable, "-I", "-m", "secrets_service"]
    async with (
        no_replicas(directory),
        secrets_process(directory, command) as secrets,
        serving_process(directory) as serving,
    ):
        platform = Platform(directory, secrets, serving)
        await platform.log_in()
        yield platform


async def _is_refused(work: Any) -> bool:
    """Whether a call is refused for want of room; what still found some was done."""
    try:
        await work
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017
        return True
    return False


async def _on_a_full_disk(directory: Path) -> None:
    async with running(directory) as platform:
        await platform.admin.create_scope("shop")
        await platform.admin.put("shop", "key", "before")
        await platform.endpoints.create("demo", TINY, environment={"SAYS": "hello"})
        await platform.endpoints.settled("demo")
        await eventually(lambda: platform.are_all(SERVING), within=WITHIN, what="both are ready")

        filler = platform.fill()
        await eventually(lambda: platform.are_all(NOT_SERVING), within=WITHIN, what="both say that they are not ready")
        admin, endpoints = platform.admin, platform.endpoints
        assert (await endpoints.query("demo"))[1] == b"hello"
        assert (await endpoints.get("demo")).name == "demo"
        assert await endpoints.names() == ["demo"]
        assert await admin.keys("shop") == ["key"]
        await _refused(admin.put("shop", "other", LARGE))
        await _refused(endpoints.create("other", TINY, environment={"LARGE": LARGE}))
        await _refused(endpoints.update("demo", an_input(TINY, environment_vars={"LARGE": LARGE})))
        # A record of the audit log may find room where the last one left some.
        await eventually(lambda: _is_refused(admin.get("shop", "key")), within=WITHIN, what="no value leaves")
        assert (await endpoints.query("demo"))[1] == b"hello"
        assert await platform.are_all(NOT_SERVING)

        filler.unlink()
        await eventually(lambda: platform.are_all(SERVING), within=WITHIN, what="both are ready again")
        await platform.log_in()
        assert await platform.admin.get("shop", "key") == b"before"
        await platform.admin.put("shop", "other", LARGE)
        await platform.endpoints.create("other", TINY, environment={"LARGE": LARGE})
        await platform.endpoints.settled("other")
        assert (await platform.endpoints.query("demo"))[1] == b"hello"
    for name in ("secrets", "serving"):
        assert database.faults(directory / name / f"{name}.db", None) == []
    async with running(directory) as platform:
        assert await platform.admin.get("shop", "key") == b"before"
        assert await platform.admin.get("shop", "other") == LARGE.encode()
        assert await platform.endpoints.names() == ["demo", "other"]


async def _refused(work: Any) -> None:
    assert (await refusal(work)).answer[:2] == (grpc.StatusCode.UNAVAILABLE, "TEMPORARILY_UNAVAILABLE")


async def _on_a_small_disk() -> None:
    with small_disk() as directory:
        await _on_a_full_disk(directory)


def _may_mount(way: Sequence[str], place: Path) -> bool:
    probe = [*way, "mount", "-t", "tmpfs", "tmpfs", str(place)]
    return not subprocess.run(probe, capture_output=True, check=False).returncode


def test_full_disk_is_told_and_stops_what_needs_room_alone(tmp_path: Path) -> None:
    if _may_mount(OWN_MOUNTS, tmp_path):
        asyncio.run(_on_a_small_disk())
        return
    if not _may_mount(NAMESPACE, tmp_path):
        pytest.skip("to mount a disk takes root, or user namespaces, which this machine does not give its users")
    again = [*NAMESPACE, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ended = subprocess.run(again, cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stdout.decode()
