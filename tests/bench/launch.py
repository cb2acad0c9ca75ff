"""From the order to serve a model to its being served: the platform, our model server by hand, and MLflow's command.

The platform forks a replica from a process that has everything in memory, where it may; what a replica costs that is a
program of its own, as for a model with an environment of its own, is measured with a variable that has to be there when
Python starts.
The model is in the platform's cache and its registry helper has been used before: what is measured is a launch, not a
download. Each way has been gone once before it is measured, so that every file is in memory.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench import platform, programs, tables
from tests.bench.platform import until
from tests.bench.run import Run
from tests.bench.tables import Table
from tests.support.stack import clean_environment

_START_SECONDS = 60.0
_LOOK_SECONDS = 0.02
_CREATE = "<= 1.25 x model server, <= 0.6 x MLflow"
_CHANGE = "<= 1.4 x model server"
_BEFORE_PYTHON = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class _Launched:
    """A launch that is done; its processes still run."""

    seconds: float
    pids: Sequence[int]


_Way = Callable[[Run], AbstractContextManager[_Launched]]


def measure(run: Run) -> Table:
    """Measures the table."""
    ways: dict[str, tuple[_Way, str]] = {
        "model server by hand": (_by_hand, ""),
        "mlflow models serve": (_by_mlflow, ""),
        "platform: create to READY": (partial(_created, {}), _CREATE),
        "platform: create, executed": (partial(_created, _BEFORE_PYTHON), _CREATE),
        "platform: another variable to READY": (partial(_changed, {}), _CHANGE),
        "platform: another variable, executed": (partial(_changed, _BEFORE_PYTHON), _CHANGE),
        "platform: from zero to an answer": (_from_zero, "<= 0.5 s"),
    }
    for way, _ in ways.values():
        with way(run):
            pass
    results = tables.interleaved(
        {
            name: partial(programs.undisturbed, partial(_measured, way, run), run.patience)
            for name, (way, _) in ways.items()
        },
        run.rounds,
    )
    seconds = {name: [each[0] for each in rounds] for name, rounds in results.items()}
    bare, mlflow, *_ = seconds.values()
    rows = [
        [
            name,
            tables.spread(seconds[name]),
            tables.spread(tables.ratios(seconds[name], bare)),
            tables.spread(tables.ratios(seconds[name], mlflow)),
            f"{max(each[1] for each in rounds):.0f} %",
            ways[name][1],
        ]
        for name, rounds in results.items()
    ]
    return Table(
        title="Launch",
        note="Seconds: to `ready` on the report pipe, to the first 200 of /ping, to READY as the REST API says it."
        " Executed: not forked from the template.",
        columns=("measured", "seconds", "x model server", "x mlflow models serve", "others", "limit"),
        rows=rows,
    )


def _measured(way: _Way, run: Run) -> tuple[float, float]:
    """Seconds of a launch, and how much of the machine was used by others meanwhile."""
    others = programs.Bystanders(list(run.platform.stack.pids().values()))
    with way(run) as launched:
        return launched.seconds, others.percent(newcomers=launched.pids)


@contextmanager
def _by_hand(run: Run) -> Iterator[_Launched]:
    with platform.model_server(run.platform.model_path, run.directory) as server:
        yield _Launched(server.seconds, [server.pid])


@contextmanager
def _by_mlflow(run: Run) -> Iterator[_Launched]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    place = ["--model-uri", str(run.platform.model_path), "--host", "127.0.0.1", "--port", str(port)]
    # The command starts `uvicorn` by that name alone, in a shell.
    environment = {**clean_environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    began = time.monotonic()
    with programs.running([*command, *place], environment=environment, log=run.log) as pid:
        until(lambda: _is_up(port), _START_SECONDS, f"{' '.join(command[2:5])} answers", period=_LOOK_SECONDS)
        yield _Launched(time.monotonic() - began, [pid])


@contextmanager
def _created(variables: Mapping[str, str], run: Run) -> Iterator[_Launched]:
    seconds = run.platform.create_endpoint(variables=variables)
    try:
        yield _Launched(seconds, run.platform.replica_pids())
    finally:
        run.platform.delete_endpoint()


@contextmanager
def _changed(variables: Mapping[str, str], run: Run) -> Iterator[_Launched]:
    with _created(variables, run):
        seconds = run.platform.update_endpoint({**variables, "COLOUR": "blue"})
        yield _Launched(seconds, run.platform.replica_pids())


@contextmanager
def _from_zero(run: Run) -> Iterator[_Launched]:
    run.platform.create_endpoint(may_be_at_zero=True)
    try:
        run.platform.wait_for_zero()
        seconds = run.platform.ask()
        yield _Launched(seconds, run.platform.replica_pids())
    finally:
        run.platform.delete_endpoint()


def _is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
