"""The same small model behind the whole platform, and in every other server that installs, each asked directly.

Nothing is pinned to a core here: this is what a machine with all its cores makes of each of them. The platform's rows
have the gateway in them, with authentication, permission and limits; the others have nothing before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from tests.bench import model_server, peer_servers, programs, tables
from tests.bench.load import Http, Result, Subject, measured
from tests.bench.model_server import BODIES
from tests.bench.peer_servers import PEERS, NotInstalledError
from tests.bench.run import Run
from tests.bench.tables import Cells, Table

_CONNECTIONS = (1, 16, 64)


def measure(run: Run) -> Table:
    """Measures the table."""
    folders = model_server.saved(run)
    results: dict[int, dict[str, list[Result]]] = {connections: {} for connections in _CONNECTIONS}
    missing = []
    for kind in BODIES:
        for name, subject in (("MLflow", _mlflow), ("ours, through the gateway", _ours)):
            with subject(run, kind, folders[kind]) as (load, loaded):
                _measure(run, f"{name}: {kind}", load, loaded, results)
    for name, peer in PEERS.items():
        try:
            with peer_servers.running(name, folders["inputs"], run) as server:
                load = Http(url=server.report["url"], authorization="", connections=1, body=peer.body)
                _measure(run, name, load, Subject(server.pid, is_pinned=False), results)
        except NotInstalledError as error:
            missing.append(f"{name} could not be installed and is left out ({error}).")
    rows = [row for connections, measured_at in results.items() for row in _rows(connections, measured_at)]
    return Table(
        title="Other servers",
        note="wrk, keep-alive connections, one row of three numbers, a pyfunc model that doubles them, one worker, no "
        f"process pinned to a core. Baseline: MLflow's scoring server given a dataframe. {' '.join(missing)}",
        columns=tables.LOAD_COLUMNS,
        rows=rows,
    )


def _measure(run: Run, name: str, load: Http, subject: Subject, results: Mapping[int, dict[str, list[Result]]]) -> None:
    """All rounds of one server: to start it anew for each of them would take longer than the loads."""
    for connections, of_all in results.items():
        with_connections = Http(url=load.url, authorization=load.authorization, connections=connections, body=load.body)
        figures = tables.interleaved({name: partial(measured, with_connections, subject, run)}, run.rounds)
        of_all[name] = figures[name]


def _rows(connections: int, results: Mapping[str, list[Result]]) -> list[Cells]:
    theirs, ours = results["MLflow: dataframe_split"], results["ours, through the gateway: dataframe_split"]
    times = median(tables.ratios([each.p99_ms for each in ours], [each.p99_ms for each in theirs]))
    limit = "ratio >= 1.5" + (f"; p99 x {times:.2f}, <= 0.5" if connections == 16 else "")
    return tables.load_rows(f"c{connections}", results, {"ours, through the gateway: dataframe_split": limit})


@contextmanager
def _mlflow(run: Run, kind: str, folder: Path) -> Iterator[tuple[Http, Subject]]:
    with programs.server("mlflow", str(folder), log=run.log) as server:
        url = f"http://{server.report['address']}/invocations"
        load = Http(url=url, authorization="", connections=1, body=BODIES[kind])
        yield load, Subject(server.pid, is_pinned=False)


@contextmanager
def _ours(run: Run, kind: str, folder: Path) -> Iterator[tuple[Http, Subject]]:
    platform = run.platform
    model = f"signed-{kind}"
    platform.register(model, folder)
    with ExitStack() as stack:
        platform.create_endpoint(model=model, endpoint=model)
        stack.callback(platform.delete_endpoint, model)
        load = Http(
            url=f"{platform.stack.url}/serving-endpoints/{model}/invocations",
            authorization=f"Bearer {platform.stack.token}",
            connections=1,
            body=BODIES[kind],
        )
        yield load, Subject(platform.stack.pids()["gateway"], behind=platform.replica_pids(), is_pinned=False)
