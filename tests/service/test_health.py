"""Whether a service is well, as it tells itself: ready while it can do its work, and live as long as it runs (R28)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit import channels, database, grpc_server
from servicekit.errors import Unavailable
from servicekit.grpc_server import CallLimits, Listener
from servicekit.health import LIVE, READY, Health
from tessera.policy import POLICY
from tests.support.eventually import eventually
from tests.support.secrets import RunningSecrets, running_secrets

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[RunningSecrets]:
    async with running_secrets() as running:
        yield running


async def status(channel: grpc.aio.Channel, name: str = READY) -> Any:
    request = health_pb2.HealthCheckRequest(service=name)
    return (await health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)).status


async def until(channel: grpc.aio.Channel, wanted: Any) -> None:
    async def is_so() -> bool:
        assert await status(channel, LIVE) == SERVING
        return bool(await status(channel) == wanted)

    await eventually(is_so, within=30, what=f"readiness is {wanted}")


def test_readiness_is_looked_at_so_often_that_it_shows_within_two_seconds() -> None:
    """A look is as long as it may last, then the pause: the next one has its answer by then."""
    assert 2 * grpc_server.READINESS_SECONDS < 2


async def test_a_service_whose_database_is_gone_is_live_and_not_ready(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    look: Callable[[Path], Any] = database._place

    def counted(path: Path) -> Any:
        nonlocal looks
        looks += 1
        return look(path)

    monkeypatch.setattr(database, "_place", counted)
    await until(service.public_channel, SERVING)
    file = service.settings.database
    away = file.rename(file.with_suffix(".away"))
    await until(service.public_channel, NOT_SERVING)
    file.write_bytes(b"another file")
    before = looks
    await eventually(lambda: looks > before + 2, what="it was looked at again, and what was seen is told")
    assert await status(service.public_channel) == NOT_SERVING
    away.rename(file)
    await until(service.public_channel, SERVING)


async def test_a_service_whose_disk_is_full_is_live_and_not_ready(
    service: RunningSecrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(service.public_channel, SERVING)
    with monkeypatch.context() as patch:
        patch.setattr(database, "LEAST_FREE", 1 << 62)
        await until(service.public_channel, NOT_SERVING)
    await until(service.public_channel, SERVING)


async def test_a_service_that_is_sealed_is_live_and_not_ready(service: RunningSecrets) -> None:
    address = f"unix:{service.settings.sockets}/sealed.sock"
    async with grpc_server.refusing([(address, None)], Unavailable("sealed")), channels.opened(address) as channel:
        assert [await status(channel, name) for name in (READY, LIVE)] == [NOT_SERVING, SERVING]


async def test_whoever_watches_is_told_that_a_service_is_about_to_end_and_holds_it_up_no_longer() -> None:
    stop, addresses = asyncio.Event(), asyncio.Queue[str]()

    async def identify(metadata: Any, row: Any) -> None:
        return None

    async def serve() -> None:
        listener = Listener(address="127.0.0.1:0", identify=identify)
        serving = grpc_server.serving(
            [listener],
            services=[],
            table=POLICY,
            readiness={},
            message_limit=1_000,
            limits=CallLimits(calls=0, changes=0),
            drain_seconds=5.0,
        )
        async with serving as found:
            addresses.put_nowait(found[0])
            await stop.wait()

    running = asyncio.create_task(serve())
    async with channels.opened(await addresses.get()) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        told: dict[str, list[Any]] = {}

        async def watch(name: str) -> None:
            told[name] = []
            async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=60):
                told[name].append(answer.status)

        watching = [asyncio.create_task(watch(name)) for name in (READY, LIVE)]
        await eventually(lambda: len(told) == 2 and told[READY][-1:] == [SERVING] and bool(told[LIVE]), within=30)
        stop.set()
        await asyncio.gather(*watching)
        await running
        assert told[READY][-2:] == [SERVING, NOT_SERVING]
        assert told[LIVE] == [SERVING]


async def test_a_watcher_that_reads_nothing_keeps_nobody_from_hearing() -> None:
    health = Health()
    silent = aiter(health.Watch(health_pb2.HealthCheckRequest(), None))
    assert (await anext(silent)).status == NOT_SERVING  # and no more is read of it
    other = aiter(health.Watch(health_pb2.HealthCheckRequest(), None))
    assert (await anext(other)).status == NOT_SERVING
    for is_ready, expected in ((True, SERVING), (False, NOT_SERVING)):
        health.ready(is_ready)
        assert (await anext(other)).status == expected
    health.end()
    health.ready(True)
    assert [answer.status async for answer in other] == []
    assert (await health.Check(health_pb2.HealthCheckRequest(), None)).status == NOT_SERVING


async def test_of_what_is_not_there_a_check_says_so(service: RunningSecrets) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status(service.public_channel, "nothing")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
