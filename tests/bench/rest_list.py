"""The longest lists over REST: all the scopes that a workspace may have, and all the keys that a scope may have."""

from __future__ import annotations

import json
from functools import partial

from tessera.cli.rest import Rest
from tests.bench import tables
from tests.bench.load import Http, Subject, measured
from tests.bench.platform import SCOPE
from tests.bench.run import Run
from tests.bench.tables import Table

_LENGTH = 1_000
_PATHS = {"scopes/list": "/api/2.0/secrets/scopes/list", "list": f"/api/2.0/secrets/list?scope={SCOPE}"}
_LIMIT = "50 ms"


def measure(run: Run) -> Table:
    """Measures the table."""
    stack, token = run.platform.stack, run.platform.reader_token
    address, pids = stack.url.removeprefix("http://"), stack.pids()
    _fill(Rest(address, stack.token))
    subject = Subject(pids["gateway"], behind=[pids["secrets"]])
    rows = []
    for name, path in _PATHS.items():
        (items,) = Rest(address, token).call("GET", path).values()
        if len(items) != _LENGTH:
            raise RuntimeError(f"{path} has {len(items)} items instead of {_LENGTH}")
        load = Http(url=f"http://{address}{path}", authorization=f"Bearer {token}", connections=1)
        loads = {name: partial(measured, load, subject, run)}
        rows += tables.load_rows("c1", tables.interleaved(loads, run.rounds), {name: _LIMIT})
    return Table(
        title=f"REST lists of {_LENGTH}",
        note="wrk, one keep-alive connection; gateway with Secrets behind it.",
        columns=tables.LOAD_COLUMNS,
        rows=rows,
    )


def _fill(admin: Rest) -> None:
    """Makes scopes and keys until there are as many as there may be."""

    def post(path: str, **fields: str) -> None:
        admin.call("POST", f"/api/2.0/secrets/{path}", json.dumps(fields))

    for number in range(_LENGTH - len(admin.call("GET", _PATHS["scopes/list"])["scopes"])):
        post("scopes/create", scope=f"bench-{number}")
    for number in range(_LENGTH - len(admin.call("GET", _PATHS["list"])["secrets"])):
        post("put", scope=SCOPE, key=f"bench-{number}", string_value="value")
