"""Calls that are given up at any moment: each is done once or not at all, and the service is as before (R17)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from servicekit import database
from servicekit.database import Database
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.eventually import eventually
from tests.support.secrets import Caller, running_secrets
from tests.support.seed import seeded

SCOPE = "shop"
AT_ONCE = 20
LONGEST_SECONDS = 0.02
"""Until when a caller gives up: about as long as a change takes."""


def some_call(caller: Caller, chance: random.Random) -> Any:
    """A read or a change, drawn, as it is under way."""
    key = f"key-{chance.randrange(20)}"
    calls: list[tuple[Callable[..., Any], Any]] = [
        (caller.secrets.PutSecret, pb.PutSecretRequest(scope=SCOPE, key=key, string_value="value")),
        (caller.secrets.GetSecret, pb.GetSecretRequest(scope=SCOPE, key=key)),
        (caller.secrets.DeleteSecret, pb.DeleteSecretRequest(scope=SCOPE, key=key)),
        (caller.secrets.ListSecrets, pb.ListSecretsRequest(scope=SCOPE)),
        (caller.secrets.PutAcl, pb.PutAclRequest(scope=SCOPE, principal="users", permission=pb.READ)),
    ]
    method, request = chance.choice(calls)
    return method(request, metadata=caller.metadata, timeout=60)


async def given_up(caller: Caller, calls: int) -> int:
    """Makes so many calls, and gives each up at some moment; how many were cancelled before they had an answer."""
    chance = seeded()
    cancelled = 0

    async def one() -> None:
        nonlocal cancelled
        call = some_call(caller, chance)
        await asyncio.sleep(chance.random() * LONGEST_SECONDS)
        cancelled += call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            pass
        except grpc.aio.AioRpcError as error:
            # Whoever resets many streams at once is told by gRPC that it does not get another one just now.
            allowed = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)
            assert error.code() in allowed  # noqa: PT017 (one of several endings)

    left = calls
    while left:
        now = min(left, AT_ONCE)
        await asyncio.gather(*(one() for _ in range(now)))
        left -= now
    return cancelled


async def _is_as_before(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    databases: list[Database] = []
    opened: Callable[..., Any] = database.opened

    @asynccontextmanager
    async def kept(*args: Any, **kwargs: Any) -> AsyncIterator[Database]:
        async with opened(*args, **kwargs) as found:
            databases.append(found)
            yield found

    monkeypatch.setattr(database, "opened", kept)
    async with running_secrets(calls=AT_ONCE) as service:  # so that one place that is not given back would be missed
        admin = service.admin
        await admin.create_scope(SCOPE)
        before = len(asyncio.all_tasks())
        assert await given_up(admin, calls) > calls / 10
        (found,) = databases

        async def is_idle() -> bool:
            return not any(each.in_transaction for each in (found._writer, *found._readers))

        await eventually(is_idle, within=60, what="no transaction is open")
        await eventually(lambda: len(asyncio.all_tasks()) <= before, within=60, what="nothing is under way")
        for number in range(50):
            await admin.put(SCOPE, f"later-{number % 10}", str(number))
            assert await admin.get(SCOPE, f"later-{number % 10}") == str(number).encode()
        # All places are there again: so many calls at the same time are answered.
        await asyncio.gather(*(admin.keys(SCOPE) for _ in range(AT_ONCE)))


async def test_calls_that_are_given_up_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    await _is_as_before(200, monkeypatch)


@pytest.mark.long
async def test_ten_thousand_calls_that_are_given_up_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    await _is_as_before(10_000, monkeypatch)
