"""Concurrent clients of a Secrets process that is killed, and calls that are given up: still one thing at a time (R4).

Every history is recorded, and a checker looks for an order that explains it, key by key; a list of a scope's keys is a
statement about each of them. So an acknowledged write is never lost, versions strictly rise, nothing is read that was
not written, and a call whose outcome its caller does not know was done once or not at all.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from servicekit import channels, sockets
from tessera.identity.v1 import identity_pb2
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.eventually import eventually
from tests.support.linearizable import UNKNOWN, Call, flaw
from tests.support.secrets import TIMEOUT, Caller, data_directory, settings_for
from tests.support.secrets_model import Secret
from tests.support.seed import seeded
from tests.support.service_process import ServiceProcess, service_process
from tests.support.stack import UNHURRIED

SCOPE = "Shop"
KEYS = ("one", "two", "three", "four")
CLIENTS = 8
KEEP = 3
IMPATIENT = 40
"""How many calls before each kill are made by impatient clients."""

_UNKNOWN_CODES = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
_REFUSALS = {grpc.StatusCode.NOT_FOUND: "missing", grpc.StatusCode.ABORTED: "conflict"}


def step(secret: Secret, action: tuple[Any, ...]) -> tuple[Secret, Any]:
    """The model of one key."""
    match action:
        case ("put", value, if_version):
            if if_version not in (None, secret.current):
                return secret, "conflict"
            return secret.put("", value, keep=KEEP), "done"
        case ("versions",):
            return secret, tuple(each[:2] for each in secret.versions()) or "missing"
        case ("listed",):
            return secret, bool(secret.current)
        case _ if not secret.current:
            return secret, "missing"
        case ("get",):
            return secret, secret.value(secret.current)
        case ("delete",):
            return secret.deleted(keep=KEEP), "done"
        case ("restore", version):
            value = secret.value(version)
            restored = secret if value is None else secret.put("", value, keep=KEEP)
            return restored, "missing" if value is None else restored.current
    raise ValueError(action)


class History:
    """What clients do to a service that is killed now and then, and what they see."""

    def __init__(self, process: ServiceProcess, token: str) -> None:
        self.calls: dict[str, list[Call]] = {key: [] for key in KEYS}
        self.done = 0
        self.unknown = 0
        self.is_impatient = False
        """Whether clients give half of their calls up."""
        self._process = process
        self._token = token
        self._under_way = 0
        self._ticks = itertools.count()
        self._open: list[tuple[list[Call], Call]] = []
        """Calls of unknown outcome that the living process may still do."""
        self._is_up = asyncio.Event()
        self._caller: Caller

    async def enter(self) -> None:
        """Gets an assertion from the process that was just started, and lets the clients go on."""
        gateway = Caller(self._process.channel)
        request = identity_pb2.ExchangeTokenRequest(token=self._token)
        assertion = (await gateway(gateway.authority.ExchangeToken, request)).assertion
        self._caller = Caller(self._process.channel, (channels.ASSERTION, assertion))
        self._is_up.set()

    async def until(self, calls: int) -> None:
        """Returns when so many calls have ended."""
        await eventually(lambda: self.done >= calls, within=60, what=f"{calls} calls have ended")

    async def create_scope(self) -> None:
        await self._caller.create_scope(SCOPE)

    async def kill(self) -> None:
        """Kills the process; nothing that it was asked happens after that, and nothing was asked of the next one."""
        self._is_up.clear()
        await self._process.kill()
        await eventually(lambda: not self._under_way, what="whoever called the process hears that it is gone")
        dead = next(self._ticks)
        for calls, call in self._open:
            calls.append(Call(call.client, call.action, call.began, dead, UNKNOWN))
        self._open.clear()

    async def restart(self) -> None:
        """Kills the process and starts the next one."""
        await self.kill()
        self.is_impatient = False
        await self._process.start()
        await self.enter()

    async def client(self, number: int, chance: random.Random, operations: int) -> None:
        """Makes so many calls, one after the other."""
        seen = dict.fromkeys(KEYS, 0)
        for turn in range(operations):
            key = chance.choice(KEYS)
            kind = chance.choices(
                ("put", "put if", "get", "delete", "restore", "versions", "list"), (20, 20, 22, 6, 8, 14, 10)
            )[0]
            action: tuple[Any, ...] = (kind,)
            if kind.startswith("put"):
                action = ("put", f"{number}.{turn}".encode(), seen[key] if kind == "put if" else None)
            elif kind == "restore":
                action = ("restore", max(1, seen[key] - chance.randrange(KEEP)))
            outcome = await self._call(f"client {number}", key, action, chance)
            self.done += 1
            if kind == "versions" and outcome is not UNKNOWN:
                seen[key] = outcome[0][0] if outcome != "missing" and outcome[0][1] else 0
            elif kind == "restore" and isinstance(outcome, int):
                seen[key] = outcome

    async def _call(self, client: str, key: str, action: tuple[Any, ...], chance: random.Random) -> Any:
        await self._is_up.wait()
        patience = chance.uniform(0, 0.01) if self.is_impatient and chance.random() < 0.5 else None
        began = next(self._ticks)
        self._under_way += 1
        outcome = await self._outcome(key, action, patience, cancels=chance.random() < 0.5)
        self._under_way -= 1
        ended = next(self._ticks)
        if action[0] == "list":
            if outcome is not UNKNOWN:
                for each in KEYS:
                    self.calls[each].append(Call(client, ("listed",), began, ended, each in outcome))
        elif outcome is not UNKNOWN:
            self.calls[key].append(Call(client, action, began, ended, outcome))
        elif action[0] not in ("get", "versions"):
            self.unknown += 1
            self._open.append((self.calls[key], Call(client, action, began, ended, outcome)))
        return outcome

    async def _outcome(self, key: str, action: tuple[Any, ...], patience: float | None, *, cancels: bool) -> Any:
        method, request, read = self._sent(key, action)
        by_deadline = patience is not None and not cancels
        call = method(request, metadata=self._caller.metadata, timeout=patience if by_deadline else TIMEOUT)
        if patience is not None and cancels:
            asyncio.get_running_loop().call_later(patience, call.cancel)
        try:
            return read(await call)
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            return UNKNOWN
        except grpc.aio.AioRpcError as error:
            if error.code() in _UNKNOWN_CODES:
                return UNKNOWN
            return _REFUSALS[error.code()]

    def _sent(self, key: str, action: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        stub, named = self._caller.secrets, {"scope": SCOPE, "key": key}
        match action:
            case ("put", value, if_version):
                put = pb.PutSecretRequest(**named, bytes_value=value, if_version=if_version)
                return stub.PutSecret, put, lambda answer: "done"
            case ("get",):
                return stub.GetSecret, pb.GetSecretRequest(**named), lambda answer: answer.value
            case ("delete",):
                return stub.DeleteSecret, pb.DeleteSecretRequest(**named), lambda answer: "done"
            case ("restore", version):
                restore = pb.RestoreSecretRequest(**named, version=version)
                return stub.RestoreSecret, restore, lambda answer: answer.version
            case ("versions",):
                return stub.ListSecretVersions, pb.ListSecretVersionsRequest(**named), _versions
            case _:
                return stub.ListSecrets, pb.ListSecretsRequest(scope=SCOPE), _keys


def _versions(answer: pb.ListSecretVersionsResponse) -> tuple[tuple[int, bool], ...]:
    return tuple((each.version, each.current) for each in answer.versions)


def _keys(answer: pb.ListSecretsResponse) -> frozenset[str]:
    return frozenset(each.key for each in answer.secrets)


@asynccontextmanager
async def recorded(directory: Path) -> AsyncIterator[History]:
    """A history that begins with a new store and an empty scope."""
    settings = settings_for(directory)
    environment = {
        "PATH": os.environ["PATH"],
        **UNHURRIED,
        "TESSERA_DATA_DIR": str(directory),
        "TESSERA_SECRETS_LISTEN": "127.0.0.1:0",
        "TESSERA_SECRET_VERSIONS": str(KEEP),
        "TESSERA_LOG_LEVEL": "error",
    }
    address = sockets.socket_address(settings.sockets, callee="secrets", caller="gateway")
    async with service_process(address, [sys.executable, "-I", "-m", "secrets_service"], environment) as process:
        history = History(process, settings.admin_token.read_text().strip())
        await history.enter()
        await history.create_scope()
        yield history


async def played(operations: int, kills: int) -> History:
    """A history of so many calls, with kills at moments that are drawn."""
    chance = seeded()
    with data_directory() as directory:
        async with recorded(directory) as history:
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    client = random.Random(chance.random())
                    group.create_task(history.client(number, client, operations // CLIENTS))
                for moment in sorted(chance.sample(range(operations // 10, operations * 9 // 10), kills)):
                    await history.until(moment)
                    history.is_impatient = True
                    await history.until(moment + IMPATIENT)
                    await history.restart()
            await history.kill()
    return history


def assert_linearizable(history: History) -> None:
    for key, calls in history.calls.items():
        found = flaw(calls, initial=Secret(""), step=step)
        assert found is None, f"key {key}: {found}"


async def test_eight_clients_see_one_service_whatever_is_killed_or_given_up() -> None:
    history = await played(operations=5_000, kills=4)
    assert history.done == 5_000
    assert history.unknown > 20  # else nothing was tried
    assert_linearizable(history)


@pytest.mark.long
async def test_many_histories_with_many_kills() -> None:
    for _ in range(10):
        assert_linearizable(await played(operations=10_000, kills=20))
