"""A store of many secrets: what a read costs, how long a start takes and how much memory the service has.

The store is filled through its own use of keys and rows, in transactions of a scope each: a hundred thousand calls
would measure something else. Reads are of keys drawn anew for each, and of one key, which the service has in memory.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import psutil

from secrets_service import app, foundation, rootsource, store
from secrets_service.model import USERS, Permission, SecretBytes
from secrets_service.settings import SecretsSettings
from secrets_service.values import SecretValues
from servicekit import database
from servicekit.storage import Connection
from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc
from tests.bench import programs, tables
from tests.bench.run import Run
from tests.bench.services import Services
from tests.bench.tables import Cells, Table

_SIZES = ((1, 10), (1_000, 100))
"""Scopes, and secrets in each."""

_AT_ONCE = 32
_READS = 5_000
_LIMITS = "any key <= 1.1 x of few; start <= 3 s; RSS < 150 MiB"

Draw = Callable[[], pb.GetSecretRequest]


def measure(run: Run) -> Table:
    """Measures the table."""
    return Table(
        title="Many secrets",
        note=f"Microseconds of the service's processor time per read, {_AT_ONCE} at a time, {_READS} of keys drawn anew"
        " and as many of one key; seconds from spawning to health SERVING; MiB after the reads. Values of 100 bytes.",
        columns=("secrets", "any key us", "one key us", "start s", "RSS MiB", "others", "limit"),
        rows=list(_rows(run)),
    )


def _rows(run: Run) -> Iterator[Cells]:
    for scopes, each in _SIZES:
        directory = run.directory / f"secrets-{scopes * each}"
        services = Services.of(directory, run.log)
        with services.running("secrets"):  # the first start makes what is not there yet
            pass
        asyncio.run(_fill(directory, scopes, each))
        with services.running("secrets") as started:
            token = (directory / "admin.token").read_text().strip()
            reads = partial(_read, services.addresses.secrets, token)
            draws: dict[str, Draw] = {"any": partial(_any, scopes, each), "one": partial(_request, 0, 0)}
            others = programs.Bystanders([started.pid])
            costs = tables.interleaved(
                {name: partial(_cost, started.pid, partial(reads, draw)) for name, draw in draws.items()}, run.rounds
            )
            memory = psutil.Process(started.pid).memory_info().rss / 2**20
            yield (
                f"{scopes * each}",
                *(tables.spread(costs[name], 0) for name in draws),
                f"{started.seconds:.2f}",
                f"{memory:.0f}",
                f"{others.percent():.0f} %",
                _LIMITS if scopes > 1 else "",
            )


def _cost(pid: int, reads: Callable[[], None]) -> float:
    """Microseconds of processor time per read."""
    with programs.pinned([pid], []):
        reads()
        before = programs.cpu_seconds([pid])
        reads()
        return (programs.cpu_seconds([pid]) - before) / _READS * 1e6


def _read(address: str, token: str, draw: Draw) -> None:
    async def reading() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = rpc.SecretsStub(channel)
            left = iter(range(_READS))

            async def reader() -> None:
                for _ in left:
                    answer = await stub.GetSecret(draw(), metadata=(("authorization", f"Bearer {token}"),), timeout=30)
                    if len(answer.value) != len(_value()):
                        raise RuntimeError("a read was answered with something else")

            await asyncio.gather(*(reader() for _ in range(_AT_ONCE)))

    asyncio.run(reading())


def _any(scopes: int, each: int) -> pb.GetSecretRequest:
    return _request(random.randrange(scopes), random.randrange(each))


def _request(scope: int, key: int) -> pb.GetSecretRequest:
    return pb.GetSecretRequest(scope=f"scope-{scope}", key=f"key-{key}")


def _value() -> bytes:
    return b"v" * 100


async def _fill(directory: Path, scopes: int, each: int) -> None:
    settings = SecretsSettings(data_dir=directory)
    async with database.opened(settings.database, app.MIGRATIONS) as opened:
        base = await foundation.opened(settings, rootsource.chosen(settings), opened, time.time)
        values = SecretValues(base.keyring, keep=settings.secret_versions, now=time.time)

        def fill(connection: Connection, number: int) -> None:
            name = f"scope-{number}"
            scope = store.insert_scope(connection, name, folded=name, uuid=uuid.uuid4().bytes)
            values.prepare(connection, scope)
            principal = store.find_principal(connection, USERS)
            assert principal is not None  # the first start made the group
            store.put_grant(connection, scope, principal, Permission.MANAGE)
            for key in range(each):
                values.add(connection, scope, f"key-{key}", SecretBytes(_value()))

        for number in range(scopes):
            await opened.write(fill, number)
