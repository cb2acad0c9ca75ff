"""How much of the machine replicas use: their processors' time, memory and GPUs, looked at every few seconds.

The rule: all processes of the machine are looked at once for all replicas, beside the event loop, and not at all while
none runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving_service import cgroups, gpu_loads
from serving_service.gpu_loads import GpuLoads
from serving_service.nvidia_smi import Load

log = logging.getLogger(__name__)

SAMPLE_SECONDS = 10.0
WINDOW_SECONDS = 60.0

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

_PARENT, _SESSION, _FIRST_TIME, _PAGES = 1, 3, 11, 21
"""Where the fields of /proc/PID/stat are, counted from behind the program's name."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How much replicas used on average in the last minute, in percent; None where that is not known yet."""

    cpu: float | None
    """Of all processors that this machine lets us use."""
    memory: float | None
    """Of what one replica may use."""
    gpu: float | None = None
    """The time in which its GPUs had something to do; None for replicas without any, too."""
    gpu_memory: float | None = None
    """Of its GPUs."""


NOTHING = Usage(0.0, 0.0)
"""What is used where nothing runs."""


NO_LOAD = Load(None, None)


@dataclass(frozen=True, slots=True)
class Sample:
    """What one replica had used at one moment, on the clock of whoever sampled."""

    at: float
    cpu_seconds: float
    memory: float
    """The share that is in use, 0 to 1."""
    gpus: Load = NO_LOAD
    """Of its GPUs on average."""


class Consumption:
    """Samples of all replicas that run: `running` tells the process of each, `memory_limit` what one may use, in bytes.

    `gpus` tells how busy those of each are; None: there are none. `now` tells seconds on a clock that nobody can set.
    """

    def __init__(
        self,
        running: Callable[[], Mapping[str, int]],
        *,
        memory_limit: int,
        gpus: GpuLoads | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._running = running
        self._memory_limit = memory_limit
        self._gpus = gpus
        self._now = now
        self._samples: dict[str, deque[Sample]] = {}

    async def run(self) -> None:
        """Samples until cancelled."""
        while True:
            await self.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def sample(self) -> None:
        """Looks once; a look that fails is left out."""
        running = dict(self._running())
        self._samples = {each: samples for each, samples in self._samples.items() if each in running}
        if not running:
            return
        try:
            found = await asyncio.to_thread(_look, running, self._memory_limit)
        except OSError as error:  # out of descriptors, most likely
            log.warning("what replicas use is not known", extra={"cause": error.strerror})
            return
        now = self._now()
        loads = await self._gpus.look() if self._gpus else {}
        for replica_id, (cpu_seconds, memory) in found.items():
            samples = self._samples.setdefault(replica_id, deque())
            samples.append(Sample(now, cpu_seconds, memory, loads.get(replica_id, NO_LOAD)))
            # One of them is older than the window, so that the whole window lies between two.
            while len(samples) > 2 and samples[1].at <= now - WINDOW_SECONDS:
                samples.popleft()

    def of(self, replica_ids: Iterable[str]) -> Usage:
        """What these replicas used on average."""
        return average(self._samples[each] for each in replica_ids if each in self._samples)


def average(replicas: Iterable[Iterable[Sample]]) -> Usage:
    """What replicas used on average, by the samples of each in the order of time."""
    cpu, memory, gpu, gpu_memory = [], [], [], []
    for samples in map(list, replicas):
        first, last = samples[0], samples[-1]
        memory.append(sum(sample.memory for sample in samples) / len(samples))
        if last.at > first.at:
            # A process that has ended took its time along.
            cpu.append(max(last.cpu_seconds - first.cpu_seconds, 0.0) / (last.at - first.at) / _processors())
        load = gpu_loads.average(sample.gpus for sample in samples)
        gpu += [] if load.use is None else [load.use]
        gpu_memory += [] if load.memory is None else [load.memory]
    return Usage(_percent(cpu), _percent(memory), _percent(gpu), _percent(gpu_memory))


def _percent(shares: list[float]) -> float | None:
    return 100 * sum(shares) / len(shares) if shares else None


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _look(running: Mapping[str, int], memory_limit: int) -> dict[str, tuple[float, float]]:
    """Seconds of processors and share of memory of each replica whose process is there; raises OSError."""
    processes = _processes()
    children: dict[int, set[int]] = defaultdict(set)
    for pid, fields in processes.items():
        for above in (fields[_PARENT], fields[_SESSION]):
            children[int(above)].add(pid)
    found = {}
    for replica_id, root in running.items():
        tree = [processes[pid] for pid in _below(root, children) if pid in processes]
        if tree:
            ticks = sum(int(time) for fields in tree for time in fields[_FIRST_TIME : _FIRST_TIME + 4])
            resident = sum(int(fields[_PAGES]) for fields in tree) * _PAGE
            used, limit = cgroups.memory_of(root) or (resident, memory_limit)
            found[replica_id] = (ticks * _TICK, used / limit)
    return found


def _below(root: int, children: Mapping[int, set[int]]) -> set[int]:
    """A process with all that it started, and all of the sessions that these lead."""
    found, due = set(), [root]
    while due:
        pid = due.pop()
        if pid not in found:
            found.add(pid)
            due.extend(children.get(pid, ()))
    return found


def _processes() -> dict[int, list[str]]:
    """The fields of every process, without number and name; raises OSError."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it has ended meanwhile, or is hidden from us
            found[int(entry.name)] = stat.rpartition(")")[2].split()
    return found
