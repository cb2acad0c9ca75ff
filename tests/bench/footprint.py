"""What the services cost before anybody asks them anything: memory, and the time until they are well.

Start times are of each service alone, which is well without the others, on a data directory that is not new; memory is
that of the platform's processes, after the other tables if those were measured.
"""

from __future__ import annotations

from functools import partial

import psutil

from tests.bench import programs, tables
from tests.bench.run import Run
from tests.bench.services import SERVICES, Services
from tests.bench.tables import Cells, Table

_LIMIT = "ready in 1 s"


def measure(run: Run) -> Table:
    """Measures the table."""
    stack = run.platform.stack
    services = Services.of(run.directory / "footprint", run.log)
    for name in SERVICES:  # the first start makes databases and keys
        with services.running(name):
            pass
    starts = tables.interleaved(
        {name: partial(programs.undisturbed, partial(_started, services, name), run.patience) for name in SERVICES},
        run.rounds,
    )
    rows: list[Cells] = [["tessera up, all three at once", f"{run.platform.start_seconds:.2f}", "", "", "", _LIMIT]]
    for name, pid in stack.pids().items():
        seconds, others = zip(*starts[name], strict=True)
        rows.append([name, tables.spread(seconds), *_memory([pid]), f"{max(others):.0f} %", _LIMIT])
        if helpers := [child.pid for child in psutil.Process(pid).children(recursive=True)]:
            rows.append([f"{name}: its helpers", "", *_memory(helpers), "", ""])
    run.platform.create_endpoint()
    replicas = run.platform.replica_pids()
    shims = [parent.pid for pid in replicas if (parent := psutil.Process(pid).parent())]
    rows.append(["a replica: the shim", "", *_memory(shims), "", ""])
    rows.append(["a replica: the model server", "", *_memory(replicas), "", ""])
    run.platform.delete_endpoint()
    return Table(
        title="Start and memory",
        note="Seconds from spawning to health SERVING. Memory in MiB; PSS counts what several processes share once.",
        columns=("process", "start s", "RSS MiB", "PSS MiB", "others", "limit"),
        rows=rows,
    )


def _started(services: Services, name: str) -> tuple[float, float]:
    """Seconds of one start, and how much of the machine was used by others meanwhile."""
    others = programs.Bystanders([])
    with services.running(name) as started:
        return started.seconds, others.percent(newcomers=[started.pid])


def _memory(pids: list[int]) -> Cells:
    infos = [psutil.Process(pid).memory_full_info() for pid in pids]
    return [f"{sum(getattr(info, kind) for info in infos) / 2**20:.0f}" for kind in ("rss", "pss")]
