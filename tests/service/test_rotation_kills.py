"""A hundred requests a second, while keys of all kinds are rotated and the process is killed: nothing is lost (S5).

A process of its own, over its sockets. A call may fail only if the process was killed while it was under way; a put may
have been made then or not. In the end the old root key is withdrawn, and all that was acknowledged must open.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from servicekit import channels, sockets
from tessera.identity.v1 import identity_pb2
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.eventually import eventually
from tests.support.secrets import DIGEST, Caller, as_messages, data_directory, running_secrets, settings_for
from tests.support.seed import seeded
from tests.support.service_process import ServiceProcess, service_process

RATE = 100.0
"""Requests in a second."""

CLIENTS = 8
KINDS = ("root", "store", "scopes")
PATIENCE = 60.0


_OF_THE_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Gone(Exception):
    """The process was killed while it had the call."""


class Scene:
    """The process, who calls it, and what it has acknowledged."""

    def __init__(self, process: ServiceProcess, admin_token: str, peers: dict[str, grpc.aio.Channel]) -> None:
        self.endpoint_id = uuid.uuid4().hex
        self.answered = 0
        self.given_up = 0
        self.possible: dict[str, set[bytes]] = {}
        """What may be read of each key."""
        self._process = process
        self._token = admin_token
        self._peers = peers
        self._is_up = asyncio.Event()
        self._is_up.set()
        self._kills = 0
        self._under_way = 0

    async def call(self, calling: Callable[[], Awaitable[Any]]) -> Any:
        """Makes a call of a client; raises Gone when the process was killed meanwhile."""
        await self._is_up.wait()
        kills = self._kills
        self._under_way += 1
        try:
            answer = await calling()
        except grpc.aio.AioRpcError as error:
            if self._kills > kills and error.code() in _OF_THE_GONE:
                self.given_up += 1
                raise Gone from None
            raise
        finally:
            self._under_way -= 1
        self.answered += 1
        return answer

    async def admin(self, peer: str = "gateway") -> Caller:
        """The admin, at a socket, with a fresh assertion."""
        gateway = Caller(self._peers["gateway"])
        request = identity_pb2.ExchangeTokenRequest(token=self._token)
        answer = await self.call(lambda: gateway(gateway.authority.ExchangeToken, request))
        return Caller(self._peers[peer], (channels.ASSERTION, answer.assertion))

    async def prepare(self) -> None:
        """Makes what the clients use."""
        admin = await self.admin()
        await admin.create_scope("Shop")
        await admin.put("Shop", "granted", "granted")
        for number in range(CLIENTS):
            await admin.put("Shop", f"k{number}", b"first")
            self.possible[f"k{number}"] = {b"first"}
        serving = await self.admin("serving")
        entity = pb.GrantedEntity(digest=DIGEST, references=as_messages([("Shop", "granted")]))
        request = pb.GrantLaunchesRequest(endpoint_id=self.endpoint_id, is_new=True, version=1, entities=[entity])
        await serving(serving.resolver.GrantLaunches, request)

    async def client(self, number: int) -> None:
        """Makes requests of every kind, one after the other, each at its time."""
        key, began = f"k{number}", time.monotonic()
        turn = 0
        while True:
            for request in (self._put, self._get, self._list, self._grant, self._resolve, self._token_of_its_own):
                due = began + turn * CLIENTS / RATE
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                try:
                    await request(key, turn)
                except Gone:
                    began, turn = time.monotonic(), 0
                turn += 1

    async def _put(self, key: str, turn: int) -> None:
        value = uuid.uuid4().bytes
        admin = await self.admin()
        self.possible[key] = self.possible[key] | {value}
        await self.call(lambda: admin.put("Shop", key, value))
        self.possible[key] = {value}

    async def _get(self, key: str, turn: int) -> None:
        admin = await self.admin()
        assert await self.call(lambda: admin.get("Shop", key)) in self.possible[key]

    async def _list(self, key: str, turn: int) -> None:
        admin = await self.admin()
        await self.call(lambda: admin.keys("Shop"))

    async def _grant(self, key: str, turn: int) -> None:
        admin = await self.admin()
        await self.call(lambda: admin.grant("Shop", "users", pb.READ))

    async def _resolve(self, key: str, turn: int) -> None:
        serving = Caller(self._peers["serving"])
        request = pb.ResolveRequest(
            endpoint_id=self.endpoint_id,
            version=1,
            digest=DIGEST,
            replica_id=key,
            references=as_messages([("Shop", "granted")]),
        )
        answer = await self.call(lambda: serving(serving.resolver.Resolve, request))
        assert list(answer.values) == [b"granted"]

    async def _token_of_its_own(self, key: str, turn: int) -> None:
        admin = await self.admin()
        request = identity_pb2.CreateTokenRequest(lifetime_seconds=600)
        made = await self.call(lambda: admin(admin.tokens.CreateToken, request))
        gone = identity_pb2.DeleteTokenRequest(token_id=made.token_info.token_id)
        await self.call(lambda: admin(admin.tokens.DeleteToken, gone))

    async def rotate(self, kind: str) -> None:
        """Rotates the keys of a kind."""
        operator = Caller(self._peers["operator"])
        calls: dict[str, tuple[Callable[..., Any], Any]] = {
            "root": (operator.key_rotation.RotateRootKey, pb.RotateRootKeyRequest()),
            "store": (operator.key_rotation.RotateStoreKey, pb.RotateStoreKeyRequest()),
            "scopes": (operator.key_rotation.RotateScopeKeys, pb.RotateScopeKeysRequest()),
        }
        await self.call(lambda: operator(*calls[kind]))

    async def status(self) -> pb.KeyStatus:
        """Which keys there are."""
        operator = Caller(self._peers["operator"])
        answer: pb.KeyStatus = await operator(operator.key_rotation.GetKeyStatus, pb.GetKeyStatusRequest())
        return answer

    async def restart(self) -> None:
        """Kills the process and starts the next one, for which the clients wait."""
        self._is_up.clear()
        self._kills += 1
        await self._process.kill()
        await eventually(lambda: not self._under_way, within=PATIENCE, what="the callers hear that it is gone")
        await self._process.start()
        for channel in self._peers.values():
            await asyncio.wait_for(channel.channel_ready(), PATIENCE)
        self._is_up.set()


@asynccontextmanager
async def a_scene(directory: Path) -> AsyncIterator[Scene]:
    settings = settings_for(directory)
    environment = {
        "PATH": os.environ["PATH"],
        "TESSERA_DATA_DIR": str(directory),
        "TESSERA_SECRETS_LISTEN": "127.0.0.1:0",
        "TESSERA_TOKENS_PER_MINUTE": "0",
        "TESSERA_LOG_LEVEL": "error",
    }

    def address(peer: str) -> str:
        return sockets.socket_address(settings.sockets, callee="secrets", caller=peer)

    async with AsyncExitStack() as stack:
        peers = {
            peer: await stack.enter_async_context(channels.opened(address(peer)))
            for peer in ("gateway", "serving", "operator")
        }
        command = [sys.executable, "-I", "-m", "secrets_service"]
        process = await stack.enter_async_context(service_process(address("gateway"), command, environment))
        scene = Scene(process, settings.admin_token.read_text().strip(), peers)
        await scene.prepare()
        yield scene


async def rotated_and_killed(*, rotations: int, kills: int, requests: int) -> Scene:
    """Kills so often while it rotates, then rotates each kind so often to its end, with so many requests each time."""
    chance = seeded()
    with data_directory() as directory:
        async with a_scene(directory) as scene:
            clients = [asyncio.create_task(scene.client(number)) for number in range(CLIENTS)]
            try:
                for number in range(kills):
                    await answered(scene, requests, clients)
                    await killed_in_a_rotation(scene, KINDS[number % len(KINDS)], chance)
                for kind in KINDS * rotations:
                    await answered(scene, requests, clients)
                    await scene.rotate(kind)
                await answered(scene, requests, clients)
            finally:
                for client in clients:
                    client.cancel()
                ended = await asyncio.gather(*clients, return_exceptions=True)
            assert [each for each in ended if not isinstance(each, asyncio.CancelledError)] == []
            await eventually(lambda: is_settled(scene), within=PATIENCE)
        (directory / "root.key.previous").unlink()  # withdrawn
        await opens(directory, scene)
    return scene


async def answered(scene: Scene, requests: int, clients: list[asyncio.Task[None]]) -> None:
    until = scene.answered + requests
    await eventually(
        lambda: scene.answered >= until or any(client.done() for client in clients), within=PATIENCE + requests
    )
    for failed in (client for client in clients if client.done()):
        failed.result()


async def killed_in_a_rotation(scene: Scene, kind: str, chance: random.Random) -> None:
    """Half of the moments are in the call, the others mostly in what follows in the background."""

    async def rotate() -> None:
        with contextlib.suppress(Gone):
            await scene.rotate(kind)

    rotating = asyncio.create_task(rotate())
    await asyncio.sleep(chance.choice((chance.uniform(0, 0.03), chance.uniform(0, 0.3))))
    await scene.restart()
    await rotating


async def is_settled(scene: Scene) -> bool:
    status = await scene.status()
    return not (status.values_behind or sum(key.scope_keys + key.rights for key in status.store_keys[:-1]))


async def opens(directory: Path, scene: Scene) -> None:
    # Room for what is restored beside what it is restored from.
    async with running_secrets(directory, secret_versions=20) as service:
        for key, possible in scene.possible.items():
            assert await service.admin.get("Shop", key) in possible
            versions = [each.version for each in await service.admin.versions("Shop", key)]
            for version in versions[1:]:
                await service.admin.restore("Shop", key, version)
                await service.admin.get("Shop", key)
        answer = await service.resolve(scene.endpoint_id, ("Shop", "granted"))
        assert list(answer.values) == [b"granted"]
        assert ("users", "READ") in await service.admin.acls("Shop")


async def test_nothing_is_lost_when_the_process_is_killed_in_rotations_under_load() -> None:
    scene = await rotated_and_killed(rotations=1, kills=3, requests=20)
    assert scene.answered > 80


@pytest.mark.long
async def test_nothing_is_lost_at_fifty_kills_in_rotations_under_load() -> None:
    scene = await rotated_and_killed(rotations=3, kills=50, requests=200)
    sys.stdout.write(f"{scene.answered} calls answered, {scene.given_up} in flight on a killed process\n")
    assert scene.answered > 10_000
