"""The start of one replica, without the platform around it: as a program of its own, and forked from the template.

Replicas are started by the launcher as Serving starts them, ordered one after the other. The model is in memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from statistics import median

import psutil

from serving_service.launcher import Launch, LocalLauncher, LocalReplica, ReplicaState
from serving_service.template import Template
from tests.bench import tables
from tests.bench.run import Run
from tests.bench.tables import Cells, Table
from tests.support.mlflow_models import save_model
from tests.support.templates import SERVICE, is_forked, pid_of, running_template

_LAUNCHES_PER_ROUND = 3
_TOGETHER = 4
_LIMIT = "<= 0.5 s"


def measure(run: Run) -> Table:
    """Measures the table."""
    return asyncio.run(_measured(run.directory / "start", run.rounds * _LAUNCHES_PER_ROUND))


async def _measured(directory: Path, launches: int) -> Table:
    model = save_model(directory)
    async with running_template() as template:
        starts = {
            "executed": _Starts(directory / "executed", model, None),
            "forked": _Starts(directory / "forked", model, template),
        }
        seconds: dict[str, list[float]] = {name: [] for name in starts}
        for number in range(launches + 1):
            for name, each in starts.items():
                took = await each.once()
                if number:  # the first of each brings files into memory
                    seconds[name].append(took)
        memory = {name: await each.memory_together() for name, each in starts.items()}
    base = median(seconds["executed"])
    rows: list[Cells] = [
        [name, tables.spread(each), f"{median(each) / base:.2f}", *memory[name], _LIMIT if name == "forked" else ""]
        for name, each in seconds.items()
    ]
    return Table(
        title="Start of a replica",
        note=f"Seconds from the order to READY, {launches} starts each, in turn. Memory in MiB beside {_TOGETHER}"
        " such replicas, their shims included; PSS counts what several processes share once.",
        columns=("measured", "seconds", "x executed", "PSS of a replica", "its own", "PSS of the template", "limit"),
        rows=rows,
    )


class _Starts:
    """Starts replicas of one model in one way."""

    def __init__(self, directory: Path, model: Path, template: Template | None) -> None:
        self._directory = directory
        self._model = model
        self._template = template
        self._launcher = LocalLauncher(directory, None, service_environment=SERVICE, template=template)
        self._number = 0

    async def once(self) -> float:
        """Seconds of a start; the replica is ended again."""
        began = time.monotonic()
        replica = await self._started()
        took = time.monotonic() - began
        await replica.stop(10)
        return took

    async def memory_together(self) -> Cells:
        """What each of several replicas costs, at the median: shared memory by its part, and what is its own.

        And what the template costs beside them.
        """
        replicas = [await self._started() for _ in range(_TOGETHER)]
        pairs = [self._memory(replica) for replica in replicas]
        template = _memory(pid_of(self._template))[0] if self._template else None
        for replica in replicas:
            await replica.stop(10)
        return [f"{median(each):.0f}" for each in zip(*pairs, strict=True)] + [f"{template:.0f}" if template else ""]

    def _memory(self, replica: LocalReplica) -> tuple[float, float]:
        identity = json.loads((self._directory / replica.replica_id / "lock").read_bytes())
        shim, model = (_memory(identity[key]) for key in ("pid", "model_pid"))
        return shim[0] + model[0], shim[1] + model[1]

    async def _started(self) -> LocalReplica:
        self._number += 1
        replica = await self._launcher.start(
            Launch(replica_id=f"r{self._number}", model_path=self._model, environment={})
        )
        seen = await replica.wait(ReplicaState.STARTING)
        if seen.state is not ReplicaState.READY:
            raise RuntimeError(f"a replica is {seen.state}: {seen.cause}")
        if await is_forked(self._directory / replica.replica_id) != (self._template is not None):
            raise RuntimeError("a replica was not started in the way that is measured")
        return replica


def _memory(pid: int) -> tuple[float, float]:
    """PSS and what is a process's own, in MiB."""
    info = psutil.Process(pid).memory_full_info()
    return info.pss / 2**20, info.uss / 2**20
