"""Twenty endpoints whose models crash again and again cost next to nothing, and are still tried (R19)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from servicekit import channels, sockets
from tessera.serving.v1 import serving_pb2 as pb
from tests.support import serving_process
from tests.support.eventually import eventually
from tests.support.secrets import running_secrets
from tests.support.serving import TINY, ServingCaller, no_replicas, serving_settings

pytestmark = pytest.mark.long

LOOPING = 20
SECONDS = 300.0
MOST = 0.05
"""Of one processor."""


class Measured:
    """Serving as a process, and what it has taken with every replica that it started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def seconds(self) -> float:
        """Of processor time, so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        return float(await self._process.stdout.readline())


@asynccontextmanager
async def measured_serving(directory: Path) -> AsyncIterator[Measured]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.reaper", *serving_process.COMMAND),
        env=serving_process.environment(directory),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Measured(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def test_twenty_endpoints_that_crash_again_and_again_cost_next_to_nothing(tmp_path: Path) -> None:
    names = [f"looping-{number}" for number in range(LOOPING)]
    async with running_secrets() as secrets, no_replicas(directory := secrets.settings.data_dir):
        address = sockets.socket_address(serving_settings(directory).sockets, callee="serving", caller="gateway")
        async with measured_serving(directory) as serving, channels.opened(address) as channel:
            await channels.until_connected(channel, within=30)
            admin = ServingCaller(channel, (channels.ASSERTION, await secrets.assertion(secrets.admin_token)))
            doom = tmp_path / "doom"
            for name in names:
                await admin.create(name, TINY, environment={"DOOM": str(doom)})
            for name in names:
                await admin.until(name, lambda each: each.state.ready == pb.EndpointState.READY)
            doom.touch()

            async def have_crashed_again() -> bool:
                return all([len(await _launches(admin, name)) > 1 for name in names])

            await eventually(have_crashed_again, within=60, what="each was started again")
            launches = {name: await _launches(admin, name) for name in names}
            before = await serving.seconds()
            await asyncio.sleep(SECONDS)  # what is proved is how little happens meanwhile
            used = await serving.seconds() - before
            admin = ServingCaller(channel, (channels.ASSERTION, await secrets.assertion(secrets.admin_token)))
            for name in names:
                assert len(await _launches(admin, name) - launches[name]) >= 3, "it is still tried"
    assert used / SECONDS <= MOST, f"{used:.1f} s of processor time in {SECONDS:g} s"


async def _launches(admin: ServingCaller, name: str) -> set[str]:
    return {event.replica_id for event in await admin.events(name)}
