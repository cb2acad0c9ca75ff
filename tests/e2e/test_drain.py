"""A service that is told to end while it has work to do: what is under way is finished, and then it ends (R18)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit import channels, sockets
from servicekit.context import Level
from servicekit.http_client import HttpError
from tessera.identity.v1 import identity_pb2
from tests.service.test_gateway import body_of, reply
from tests.support.eventually import eventually
from tests.support.gateway import OWNER, ScriptedAccess, ScriptedAuthority, ScriptedServing, neighbours, replica, routes
from tests.support.http import fetch
from tests.support.secrets import Caller, data_directory, running_secrets, settings_for
from tests.support.service_process import ServiceProcess, service_process
from tests.support.serving import TINY, ServingCaller, no_replicas
from tests.support.serving_process import serving_process
from tests.support.stack import UNHURRIED

END_SECONDS = 30.0
MOST_DRAIN = 20.0
"""Less than a service waits for what is under way."""
AT_ONCE = 8
PATIENCE = 120.0
AT_A_REPLICA = 4
"""So many queries a replica takes at a time; the others wait in Serving."""
SCOPE = "shop"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Gate:
    """A replica that answers when it is let."""

    def __init__(self) -> None:
        self.waiting = 0
        self.open = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = await body_of(receive)
        self.waiting += 1
        await self.open.wait()
        await reply(send, body)


@asynccontextmanager
async def gateway_process(directory: Path, listen: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A gateway on a data directory, killed in the end if it is still there."""
    environment = {
        "PATH": os.environ["PATH"],
        "TESSERA_DATA_DIR": str(directory),
        "TESSERA_GATEWAY_LISTEN": listen,
        "TESSERA_LOG_LEVEL": "error",
    }
    process = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-I", "-m", "gateway"], env=environment, cwd=Path(__file__).parents[2]
    )
    try:
        yield process
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


async def _gateways_end(restarts: int, *, hold: float = 0) -> None:
    # An address of this process's own, so that the port is nobody else's.
    listen = f"127.{os.getpid() >> 16 & 127}.{os.getpid() >> 8 & 255}.{os.getpid() & 255 or 1}:18080"
    with data_directory() as directory:
        authority, serving, access = ScriptedAuthority(), ScriptedServing(), ScriptedAccess()
        access.granted["id-churn"] = {OWNER.id: Level.CAN_MANAGE}
        async with neighbours(directory, authority, serving, access):
            for _ in range(restarts):
                async with gateway_process(directory, listen) as process:
                    await _gateway_ends(directory, f"http://{listen}", serving, process, hold)


async def _gateway_ends(
    directory: Path, url: str, serving: ScriptedServing, process: subprocess.Popen[bytes], hold: float
) -> None:
    gate = Gate()
    async with replica(directory, gate) as address:
        await eventually(lambda: _is_answered(url), within=60, what="the gateway is there")
        await eventually(lambda: serving.acknowledged == serving.revision > 0, within=60, what="it follows the routes")
        # Of a name of its own, as every replica has: whoever knows one goes by its first address.
        await serving.publish(routes("churn", ("m-1", 100, [(address.rpartition("/")[0][-8:], address)])))
        await eventually(lambda: _is_known(url), within=60, what="it knows who asks, also when Secrets is slow to say")
        queries = [asyncio.create_task(_query(url)) for _ in range(AT_ONCE)]
        await eventually(lambda: gate.waiting == AT_ONCE, within=60, what="all queries are under way")
        process.send_signal(signal.SIGTERM)
        await eventually(lambda: _is_refused(url), within=MOST_DRAIN, what="nothing new is taken")
        await asyncio.sleep(hold)  # so much longer the model takes
        gate.open.set()
        assert await asyncio.gather(*queries) == [200] * AT_ONCE
        assert await asyncio.to_thread(process.wait, END_SECONDS) == 0


async def _query(url: str) -> int:
    return (await fetch(url, "POST", "/serving-endpoints/churn/invocations", token="owner-token", body=b"{}")).status


async def _is_answered(url: str) -> bool:
    try:
        return (await fetch(url, "GET", "/health")).status == 200
    except (HttpError, OSError):
        return False


async def _is_known(url: str) -> bool:
    answer = await fetch(url, "GET", "/api/2.0/serving-endpoints", token="owner-token")
    return answer.status == 501  # what the scripted Serving says of everything


async def _is_refused(url: str) -> bool:
    return not await _is_answered(url)


async def _secrets_end(restarts: int) -> None:
    with data_directory() as directory:
        settings = settings_for(directory)
        environment = {
            "PATH": os.environ["PATH"],
            **UNHURRIED,
            "TESSERA_DATA_DIR": str(directory),
            "TESSERA_SECRETS_LISTEN": "127.0.0.1:0",
            "TESSERA_LOG_LEVEL": "error",
        }
        address = sockets.socket_address(settings.sockets, callee="secrets", caller="gateway")
        async with service_process(address, [sys.executable, "-I", "-m", "secrets_service"], environment) as process:
            token = settings.admin_token.read_text().strip()
            caller = Caller(process.channel)
            made = await caller(caller.authority.ExchangeToken, identity_pb2.ExchangeTokenRequest(token=token))
            admin = Caller(process.channel, (channels.ASSERTION, made.assertion))
            await admin.create_scope(SCOPE)
            writers = [Writer(admin, f"key-{number}") for number in range(AT_ONCE)]
            for _ in range(restarts):
                await renewed(process.channel, token, writers)
                working = [asyncio.create_task(writer.work()) for writer in writers]
                await eventually(
                    lambda: all(writer.done > writer.done_before + 3 for writer in writers), within=60, what="all write"
                )
                process.send(signal.SIGTERM)
                async with asyncio.timeout(END_SECONDS):
                    assert await process.ended() == 0
                await asyncio.gather(*working)
                await process.start()
                await renewed(process.channel, token, writers)
                for writer in writers:
                    await writer.check()


async def renewed(channel: grpc.aio.Channel, token: str, writers: list[Writer]) -> None:
    """Gives the writers an assertion that is good for another minute."""
    caller = Caller(channel)
    made = await caller(caller.authority.ExchangeToken, identity_pb2.ExchangeTokenRequest(token=token))
    for writer in writers:
        writer.caller = Caller(channel, (channels.ASSERTION, made.assertion))
        writer.done_before = writer.done


class Writer:
    """Puts one secret again and again, until a call is not taken any more."""

    def __init__(self, caller: Caller, key: str) -> None:
        self.caller = caller
        self.done = self.done_before = 0
        self._key = key

    @property
    def is_busy(self) -> bool:
        """Whether it has written since the last restart."""
        return self.done > self.done_before + 3

    async def work(self) -> None:
        for number in itertools.count():
            try:
                await self.caller.put(SCOPE, self._key, str(number))
            except grpc.aio.AioRpcError as error:
                # gRPC cancels what came in the moment of the end and was not handed to anybody.
                assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # noqa: PT017
                return
            self.done += 1

    async def check(self) -> None:
        """What was refused was not done: no call that had begun was cut off before its answer."""
        versions = await self.caller.versions(SCOPE, self._key)
        assert max(each.version for each in versions) == self.done


class Endpoint:
    """An endpoint at a Serving that can be told to end, with a model that answers when the gate is open."""

    def __init__(self, directory: Path, process: ServiceProcess) -> None:
        self.process = process
        self._gate = directory / "gate"
        self._tally = directory / "tally"
        self.caller: ServingCaller
        self.told: list[Any] = []

    async def create(self) -> None:
        self._tally.touch()
        await self.caller.create("demo", TINY, environment={"TALLY": str(self._tally), "GATE": str(self._gate)})
        await self.caller.settled("demo")

    def open(self) -> None:
        self._gate.touch()

    def close(self) -> None:
        self._gate.unlink(missing_ok=True)

    @property
    def asked(self) -> int:
        """How many queries have got to the model so far."""
        return self._tally.stat().st_size

    async def is_answered(self) -> bool:
        """Asks the model. Whether it answered; if not, Serving said that it takes nothing any more."""
        try:
            await self.caller.query("demo", timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED), error  # noqa: PT017
            return False
        return True

    async def watched(self) -> None:
        """Notes in `told` what Serving says of its readiness, until it says no more."""
        self.told.clear()
        with contextlib.suppress(grpc.aio.AioRpcError):
            stub = health_pb2_grpc.HealthStub(self.process.channel)
            async for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=300):
                self.told.append(answer.status)

    async def is_told(self, status: Any) -> None:
        """Returns when that is what Serving said last."""
        await eventually(lambda: self.told[-1:] == [status], within=MOST_DRAIN, what=f"Serving says {status}")


async def _serving_ends(restarts: int, *, hold: float = 0) -> None:
    with data_directory() as directory:
        async with (
            running_secrets(directory) as secrets,
            no_replicas(directory),
            serving_process(directory) as process,
        ):
            endpoint = Endpoint(directory, process)
            for number in range(restarts):
                endpoint.caller = ServingCaller(
                    process.channel, (channels.ASSERTION, await secrets.assertion(secrets.admin_token))
                )
                if not number:
                    await endpoint.create()
                await _serving_ends_once(endpoint, hold)
                await process.start()
            await _serving_ends_at_once(endpoint)


async def _serving_ends_at_once(endpoint: Endpoint) -> None:
    """At the second signal, whatever is under way."""
    endpoint.close()
    asked = endpoint.asked
    watching = asyncio.create_task(endpoint.watched())
    query = asyncio.create_task(endpoint.is_answered())
    await endpoint.is_told(SERVING)
    await eventually(lambda: endpoint.asked > asked, within=60, what="a query is under way")
    endpoint.process.send(signal.SIGTERM)
    await endpoint.is_told(NOT_SERVING)
    endpoint.process.send(signal.SIGTERM)
    assert await endpoint.process.ended() == 128 + signal.SIGTERM
    assert not await query
    await watching


async def _serving_ends_once(endpoint: Endpoint, hold: float) -> None:
    endpoint.close()
    asked = endpoint.asked
    watching = asyncio.create_task(endpoint.watched())
    queries = [asyncio.create_task(endpoint.is_answered()) for _ in range(AT_ONCE)]
    await endpoint.is_told(SERVING)
    await eventually(lambda: endpoint.asked == asked + AT_A_REPLICA, within=60, what="a replica has all it takes")
    endpoint.process.send(signal.SIGTERM)
    await endpoint.is_told(NOT_SERVING)
    await asyncio.sleep(hold)  # so much longer the model takes
    endpoint.open()
    answered = sum(await asyncio.gather(*queries))
    async with asyncio.timeout(END_SECONDS):
        assert await endpoint.process.ended() == 0
    await watching
    # No query was cut off that had got to the model; those that waited in Serving may have come too late for it.
    assert answered == endpoint.asked - asked >= AT_A_REPLICA


_Ends = Callable[[int], Awaitable[None]]


@pytest.mark.parametrize("end", [_gateways_end, _secrets_end, _serving_ends])
async def test_what_is_under_way_is_finished_when_a_service_is_told_to_end(end: _Ends) -> None:
    await end(2)


@pytest.mark.long
@pytest.mark.parametrize("end", [_gateways_end, _secrets_end, _serving_ends])
async def test_nothing_under_way_is_lost_in_twenty_restarts(end: _Ends) -> None:
    await end(20)


@pytest.mark.long
@pytest.mark.parametrize("end", [_gateways_end, _serving_ends])
async def test_queries_that_take_long_are_waited_for(end: Callable[..., Awaitable[None]]) -> None:
    await end(1, hold=MOST_DRAIN)
