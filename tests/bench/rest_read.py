"""Reading a secret over REST: the gateway with Secrets behind it, against a bare HTTP-to-gRPC echo."""

from __future__ import annotations

import base64
from functools import partial

from tessera.cli.rest import Rest
from tests.bench import programs, tables
from tests.bench.load import Http, Subject, measured
from tests.bench.platform import KEY, SCOPE
from tests.bench.run import Run
from tests.bench.servers import SECRET_VALUE
from tests.bench.tables import Table

_CONNECTIONS = (1, 32)
_PATH = f"/api/2.0/secrets/get?scope={SCOPE}&key={KEY}"
_ANSWER = {"key": KEY, "value": base64.b64encode(SECRET_VALUE).decode()}


def measure(run: Run) -> Table:
    """Measures the table."""
    stack, token, socket = run.platform.stack, run.platform.reader_token, run.directory / "bare.sock"
    pids = stack.pids()
    with (
        programs.server("echo", str(socket), token=token, log=run.log) as echo,
        programs.server("bare-gateway", f"unix:{socket}", log=run.log) as bare,
    ):
        subjects = {
            "bare gateway, echo": (bare.report["address"], Subject(bare.pid, behind=[echo.pid])),
            "gateway, Secrets": (stack.url.removeprefix("http://"), Subject(pids["gateway"], behind=[pids["secrets"]])),
        }
        rows = []
        for connections in _CONNECTIONS:
            loads = {}
            for name, (address, subject) in subjects.items():
                if Rest(address, token).call("GET", _PATH) != _ANSWER:
                    raise RuntimeError(f"the server at {address} answers something else than the secret")
                load = Http(url=f"http://{address}{_PATH}", authorization=f"Bearer {token}", connections=connections)
                loads[name] = partial(measured, load, subject, run)
            rows += tables.load_rows(f"c{connections}", tables.interleaved(loads, run.rounds), {})
    return Table(
        title="REST secrets/get",
        note="wrk, keep-alive connections; the same caller and value.",
        columns=tables.LOAD_COLUMNS,
        rows=rows,
    )
