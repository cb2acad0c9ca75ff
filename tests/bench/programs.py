"""Programs under measurement: started, pinned to a core, weighed and ended, by process number.

What is started here is ended here, with all its descendants.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.support.stack import clean_environment

T = TypeVar("T")

ROOT = Path(__file__).parents[2]

_CORES = sorted(os.sched_getaffinity(0))
FRONT_CORE = _CORES[0]
"""Where the process under measurement runs."""
LOAD_CORE = _CORES[-1]
"""Where the load comes from, and where everything behind the process under measurement runs."""

_FOREIGN_PERCENT = 10.0
_STOP_SECONDS = 10.0
_LOOK_SECONDS = 0.4
_CALM_PERCENT = 15.0


@dataclass(frozen=True)
class Started:
    """A program that has said that it is ready."""

    pid: int
    report: dict[str, Any]
    """What it said."""
    seconds: float
    """From spawning to that."""


@contextlib.contextmanager
def running(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
) -> Iterator[int]:
    """Runs a command in a session of its own, yields its number and ends it; its output is appended to `log`.

    `environment` is all that it gets; by default it gets ours, without what is said about another platform.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=clean_environment() if environment is None else environment,
            pass_fds=pass_fds,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        if process.poll() is None:
            family = tree([process.pid])
            process.terminate()
            for each in psutil.wait_procs(family, timeout=_STOP_SECONDS)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()


@contextlib.contextmanager
def reporting(
    command: Callable[[int], Sequence[str]],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[Started]:
    """Runs a command that writes one JSON line to a pipe when it is ready; `command` is given the pipe's number."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, contextlib.ExitStack() as stack:
        began = time.monotonic()
        try:
            pid = stack.enter_context(
                running(command(writing), log=log, environment=environment, pass_fds=[writing, *pass_fds])
            )
        finally:
            os.close(writing)
        line = pipe.readline()
        if not line:
            raise RuntimeError(f"a program ended before it was ready: {log.read_text(errors='replace')}")
        yield Started(pid, json.loads(line), time.monotonic() - began)


@contextlib.contextmanager
def server(name: str, *arguments: str, log: Path, token: str = "") -> Iterator[Started]:
    """Runs one of `tests.bench.servers`; its report has the `address` on loopback."""
    environment = {**clean_environment(), "BENCH_TOKEN": token}
    program = [sys.executable, "-m", "tests.bench.servers", name]
    with reporting(lambda fd: [*program, str(fd), *arguments], log=log, environment=environment) as started:
        yield started


@contextlib.contextmanager
def pinned(front: Sequence[int], behind: Sequence[int]) -> Iterator[None]:
    """Keeps processes and their descendants on one core each; afterwards they may run anywhere."""
    _pin(front, {FRONT_CORE})
    _pin(behind, {LOAD_CORE})
    try:
        yield
    finally:
        _pin([*front, *behind], set(_CORES))


def _pin(pids: Sequence[int], cores: set[int]) -> None:
    for process in tree(pids):
        for thread in process.threads():
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(thread.id, cores)


def tree(pids: Sequence[int]) -> list[psutil.Process]:
    """Some processes and all their descendants."""
    roots = [psutil.Process(pid) for pid in pids]
    return [process for root in roots for process in (root, *root.children(recursive=True))]


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of some processes and of their living descendants so far."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in tree(pids)))


class Bystanders:
    """How much of the machine others use from now on: another job, another guest of the host.

    `pids` take part, with their descendants, and so does whatever this process starts and waits for.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._before = self._read(())

    def percent(self, *, newcomers: Sequence[int] = ()) -> float:
        """Of all cores. `newcomers` take part too, and were started meanwhile."""
        total, foreign = (now - then for now, then in zip(self._read(newcomers), self._before, strict=True))
        return 100 * max(0.0, foreign) / total

    def _read(self, newcomers: Sequence[int]) -> tuple[float, float]:
        times = psutil.cpu_times()
        total = sum(times) - times.guest - times.guest_nice  # which are counted in user and nice, too
        used = times.user + times.nice + times.system + times.steal  # interrupts are nobody's
        own = os.times()
        ours = own.user + own.system + own.children_user + own.children_system
        return total, used - ours - cpu_seconds([*self._pids, *newcomers])


def undisturbed(measure: Callable[[], tuple[T, float]], patience: float) -> tuple[T, float]:
    """Measures while others, whose part is the second value, leave the machine alone.

    Waits for that, and measures again, for `patience` seconds in all; then what was found last has to do.
    """
    deadline = time.monotonic() + patience
    while True:
        while psutil.cpu_percent(_LOOK_SECONDS) > _CALM_PERCENT and time.monotonic() < deadline:
            pass
        found = measure()
        if found[1] < _FOREIGN_PERCENT or time.monotonic() > deadline:
            return found
