"""Our model server against MLflow's own around the same model, asked directly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from tessera.cli.rest import Rest
from tests.bench import platform, programs, tables
from tests.bench.load import Http, Result, Subject, measured
from tests.bench.run import Run
from tests.bench.tables import Cells, Table

_CONNECTIONS = (1, 16)
BODIES = {
    "dataframe_split": '{"dataframe_split":{"columns":["a","b","c"],"data":[[1.5,2.5,3.5]]}}',
    "inputs": '{"inputs":[[1.5,2.5,3.5]]}',
}
"""What the models of `signed_models` are asked, by the kind of the body."""

_FOLDERS = {"dataframe_split": "doubles", "inputs": "double_tensor"}


def measure(run: Run) -> Table:
    """Measures the table."""
    folders = saved(run)
    rows: list[Cells] = []
    for name, body in BODIES.items():
        with (
            programs.server("mlflow", str(folders[name]), log=run.log) as theirs,
            platform.model_server(folders[name], run.directory) as ours,
        ):
            servers = {f"MLflow: {name}, signature": theirs, f"ours: {name}, signature": ours}
            answers = [Rest(each.report["address"], "").call("POST", "/invocations", body) for each in servers.values()]
            if answers[0] != answers[1]:
                raise RuntimeError(f"the servers answer differently: {answers}")
            for connections in _CONNECTIONS:
                loads = {}
                for server, started in servers.items():
                    url = f"http://{started.report['address']}/invocations"
                    load = Http(url=url, authorization="", connections=connections, body=body)
                    loads[server] = partial(measured, load, Subject(started.pid), run)
                rows += _rows(connections, tables.interleaved(loads, run.rounds), is_frame=name == "dataframe_split")
    return Table(
        title="Model server",
        note="wrk, keep-alive connections, one row of three numbers, a model that doubles them. Baseline: MLflow's "
        "scoring server in uvicorn with httptools and uvloop.",
        columns=tables.LOAD_COLUMNS,
        rows=rows,
    )


def saved(run: Run) -> dict[str, Path]:
    """The folders of the models, by the kind of the body that they take."""
    folder = run.directory / "signed"
    if not folder.exists():
        program = [sys.executable, "-W", "ignore", "-m", "tests.bench.signed_models", str(folder)]
        subprocess.run(program, check=True, capture_output=True, cwd=programs.ROOT)
    return {kind: folder / name for kind, name in _FOLDERS.items()}


def _rows(connections: int, results: dict[str, list[Result]], *, is_frame: bool) -> Sequence[Cells]:
    theirs, ours = results.values()
    times = median(tables.ratios([each.p99_ms for each in ours], [each.p99_ms for each in theirs]))
    limits = ["ratio >= 1.5"] if is_frame else []
    limits += [f"p99 x {times:.2f}, <= 0.5"] if connections > 1 else []
    return tables.load_rows(f"c{connections}", results, {list(results)[1]: "; ".join(limits)})
