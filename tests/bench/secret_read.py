"""Reading a secret over gRPC: the public listener of Secrets, against a server that only checks a token and echoes."""

from __future__ import annotations

from functools import partial

import grpc

from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc
from tests.bench import programs, tables
from tests.bench.load import Grpc, Subject, measured
from tests.bench.platform import KEY, SCOPE
from tests.bench.run import Run
from tests.bench.servers import SECRET_VALUE
from tests.bench.tables import Table

_LOADS = {(1, 1): "added p50 <= 1 ms", (16, 2): "ratio >= 0.4"}
"""Connections and streams of each, and the limit."""

_METHOD = "/tessera.secrets.v1.Secrets/GetSecret"
_REQUEST = pb.GetSecretRequest(scope=SCOPE, key=KEY)
_ANSWER = pb.GetSecretResponse(key=KEY, value=SECRET_VALUE)


def measure(run: Run) -> Table:
    """Measures the table."""
    stack, token = run.platform.stack, run.platform.reader_token
    with programs.server("echo", str(run.directory / "echo.sock"), token=token, log=run.log) as echo:
        subjects = {
            "echo": (echo.report["address"], Subject(echo.pid)),
            "Secrets": (stack.secrets_address, Subject(stack.pids()["secrets"])),
        }
        rows = []
        for (connections, streams), limit in _LOADS.items():
            loads = {}
            for name, (address, subject) in subjects.items():
                _check(address, token)
                load = Grpc(
                    address=address,
                    method=_METHOD,
                    message=_REQUEST.SerializeToString(),
                    answer_bytes=_ANSWER.ByteSize(),
                    authorization=f"Bearer {token}",
                    connections=connections,
                    streams=streams,
                )
                loads[name] = partial(measured, load, subject, run)
            results = tables.interleaved(loads, run.rounds)
            rows += tables.load_rows(f"{connections}x{streams}", results, {"Secrets": limit})
    return Table(
        title="Secret read over gRPC",
        note="h2load, connections x streams; a caller with READ, a value of 100 bytes.",
        columns=tables.LOAD_COLUMNS,
        rows=rows,
    )


def _check(address: str, token: str) -> None:
    with grpc.insecure_channel(address) as channel:
        answer = rpc.SecretsStub(channel).GetSecret(
            _REQUEST, metadata=(("authorization", f"Bearer {token}"),), timeout=5
        )
    if answer != _ANSWER:
        raise RuntimeError(f"the server at {address} answers something else than the secret")
