"""Putting a secret over gRPC, one after the other, against an echo and against what the disk takes for a commit.

A put is on stable storage, with its audit record, when it is answered; so it cannot be had for less than a commit.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median

import grpc

from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc
from tests.bench import programs, tables
from tests.bench.platform import KEY, SCOPE
from tests.bench.run import Run
from tests.bench.tables import Table

_TIMES = 100
_SUBJECTS = ("echo", "bare commit", "put")


def measure(run: Run) -> Table:
    """Measures the table."""
    stack, reader = run.platform.stack, run.platform.reader_token
    with (
        programs.server("echo", str(run.directory / "write-echo.sock"), token=reader, log=run.log) as echo,
        grpc.insecure_channel(echo.report["address"]) as echoing,
        grpc.insecure_channel(stack.secrets_address) as putting,
        closing(_database(run.directory / "commits.db")) as database,
    ):
        subjects: dict[str, Callable[[], float]] = {
            "echo": partial(_median, partial(_read, rpc.SecretsStub(echoing), reader)),
            "bare commit": partial(_median, partial(_commit, database)),
            "put": partial(_median, partial(_put, rpc.SecretsStub(putting), stack.token)),
        }
        others = programs.Bystanders([echo.pid, *stack.pids().values()])
        found = tables.interleaved(subjects, run.rounds)
        foreign = f"{others.percent():.0f} %"
        limits = [a + 2 * b for a, b in zip(found["echo"], found["bare commit"], strict=True)]
    return Table(
        title="Secret write over gRPC",
        note=f"Milliseconds at p50 of {_TIMES} calls, one at a time from Python, each put of a new key and 100 bytes; a"
        " bare commit is one row in SQLite with synchronous=FULL on the same file system.",
        columns=("subject", "p50 ms", "of the limit", "others", "limit"),
        rows=[
            [
                name,
                tables.spread(found[name]),
                tables.spread(tables.ratios(found[name], limits)),
                foreign if name == "put" else "",
                "echo + 2 commits" if name == "put" else "",
            ]
            for name in _SUBJECTS
        ],
    )


def _median(once: Callable[[], None]) -> float:
    times = []
    for _ in range(_TIMES):
        began = time.monotonic()
        once()
        times.append(time.monotonic() - began)
    return median(times) * 1000


def _read(stub: rpc.SecretsStub, token: str) -> None:
    stub.GetSecret(pb.GetSecretRequest(scope=SCOPE, key=KEY), metadata=_credential(token), timeout=10)


def _put(stub: rpc.SecretsStub, token: str) -> None:
    request = pb.PutSecretRequest(scope=SCOPE, key=f"write-{uuid.uuid4().hex}", string_value="v" * 100)
    stub.PutSecret(request, metadata=_credential(token), timeout=10)


def _credential(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def _database(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE rows (content BLOB)")
    return connection


def _commit(connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO rows (content) VALUES (?)", (b"v" * 100,))
