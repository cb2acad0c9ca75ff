"""Whatever crashes, nobody finds its memory in a file afterwards, with either kind of core pattern (S22)."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from serving_service.launcher import Launch, LocalLauncher, ReplicaState
from tests.support import tiny_runner
from tests.support.eventually import eventually
from tests.support.secrets import data_directory
from tests.support.service_process import ServiceProcess, secrets_process

PATTERN = Path("/proc/sys/kernel/core_pattern")
CRASHING = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


@asynccontextmanager
async def a_service() -> AsyncIterator[ServiceProcess]:
    """Secrets, which all that services have in common is looked at in."""
    with data_directory() as directory:
        async with secrets_process(directory, [sys.executable, "-I", "-m", "secrets_service"]) as process:
            yield process


@asynccontextmanager
async def a_model() -> AsyncIterator[int]:
    """The process number of a model; its shim's parent is nobody of ours."""
    with data_directory() as directory:
        launcher = LocalLauncher(directory / "replicas", None, service_environment={})
        launch = Launch(replica_id="r", model_path=directory, environment={}, command=tiny_runner.command())
        replica = await launcher.start(launch)
        try:
            seen = await replica.wait(ReplicaState.STARTING)
            assert seen.pid is not None
            yield seen.pid
        finally:
            await replica.stop(0)


@contextmanager
def core_pattern(pattern: str) -> Iterator[None]:
    """Has this machine write cores as `pattern` says; one test at a time, since there is one such machine."""
    with Path(tempfile.gettempdir(), "tessera-tests-core-pattern.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = PATTERN.read_text()
        PATTERN.write_text(pattern)
        try:
            yield
        finally:
            PATTERN.write_text(before)


def _file(directory: Path) -> str:
    return f"{directory}/core.%p"


def _pipe(directory: Path) -> str:
    program = directory / "dump"
    program.write_text(f'#!/bin/sh\ncat > "{directory}/core.$1"\n')
    program.chmod(0o755)
    return f"|{program} %p"


def _crash_that_may_dump() -> int:
    """A process without any care for cores crashes; its number."""
    process = subprocess.Popen(
        [sys.executable, "-c", CRASHING],
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_CORE)[1])
        ),
    )
    process.wait()
    return process.pid


@pytest.mark.skipif(os.getuid() != 0, reason="only root may change the core pattern")
@pytest.mark.parametrize("kind", [_file, _pipe], ids=["file", "pipe"])
async def test_neither_a_service_nor_a_model_that_crashes_leaves_a_core(kind: Callable[[Path], str]) -> None:
    async with a_service() as service, a_model() as model:
        with tempfile.TemporaryDirectory(dir="/tmp") as name, core_pattern(kind(directory := Path(name))):
            control = directory / f"core.{await asyncio.to_thread(_crash_that_may_dump)}"
            try:
                await eventually(control.exists)
            except AssertionError:
                pytest.skip(f"this kernel writes no core by a {kind.__name__[1:]} here, of anybody")
            pid = service.pid
            service.send(signal.SIGSEGV)
            os.kill(model, signal.SIGSEGV)
            await service.ended()
            await eventually(lambda: not Path(f"/proc/{model}").exists())
            # What dumps is waited for by the kernel before the process is gone, so there is nothing to come.
            assert not [pid for pid in (pid, model) if (directory / f"core.{pid}").exists()]


async def test_the_kernel_is_told_so_of_services_and_models() -> None:
    async with a_service() as service, a_model() as model:
        for pid in (service.pid, model):
            limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
            (core,) = (line.split()[4:6] for line in limits if line.startswith("Max core file size"))
            assert core == ["1", "1"]
