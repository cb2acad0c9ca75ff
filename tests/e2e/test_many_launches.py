"""Very many replicas at once, and what is left when all have ended, each in its own way: nothing (R11, R13, S19)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from serving_service import cgroups
from serving_service.launcher import Launch, LocalLauncher, LocalReplica, ReplicaState
from tests.support import processes, tiny_runner
from tests.support.eventually import eventually
from tests.support.model_servers import answer

ROOT = Path(__file__).parents[2]
WAYS = 5
"""In which a replica comes to its end; see `_end`."""

STRACE = shutil.which("strace")
NAMING = "execve,openat,?mkdir,mkdirat,?symlink,symlinkat,?link,linkat,?rename,?renameat,renameat2,mknodat,bind,connect"
"""The calls that start a program or make a name; looking for files is left out, for it is most of what there is."""


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def launcher(directory: Path) -> AsyncIterator[LocalLauncher]:
    """With groups where this machine lets us have them."""
    groups = cgroups.found(cgroups.Limits(processes=100, memory=256 << 20)) if os.getuid() == 0 else None
    launcher = LocalLauncher(directory / "replicas", None, service_environment={}, cgroups=groups)
    yield launcher
    for replica in (await launcher.adopt()).values():
        await replica.stop(0)


def a_launch(replica_id: str, **environment: str) -> Launch:
    return Launch(replica_id=replica_id, model_path=ROOT, environment=environment, command=tiny_runner.command())


def left_of_us() -> Counter[str]:
    """What a launch could leave with whoever launches, or on the machine."""
    gc.collect()  # what tests before this one left to the collector is not to go while this one counts
    return Counter(
        [
            *(f"descriptor of {kind}" for kind in map(_kind, Path("/proc/self/fd").iterdir())),
            *(f"child {child.pid}" for child in psutil.Process().children()),
            *(f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines()),
            *(f"group {path}" for tree in _trees() for path in tree.glob(f"tessera-{os.getpid()}-*")),
        ]
    )


def _kind(descriptor: Path) -> str:
    """What a descriptor is open for, without the number that tells it from another of its kind."""
    try:
        return descriptor.readlink().as_posix().partition("[")[0]
    except FileNotFoundError:  # the one by which the folder was read
        return "nothing"


def _trees() -> list[Path]:
    return [hierarchy.parent for hierarchy in cgroups._hierarchies()]


async def _end(launcher: LocalLauncher, directory: Path, replica: LocalReplica, way: int) -> None:
    seen = await replica.state()
    assert seen.pid is not None
    if way == 1:  # the model crashes
        os.kill(seen.pid, signal.SIGKILL)
        while seen.state is not ReplicaState.STOPPED:
            seen = await replica.wait(seen.state)
    elif way == 2:  # the shim crashes, and the model is left behind
        os.kill(psutil.Process(seen.pid).ppid(), signal.SIGKILL)
    elif way == 3:  # its log is kept for a while
        await replica.stop(0.1, dismiss=False)
    elif way == 4:  # somebody ends the shim
        os.kill(psutil.Process(seen.pid).ppid(), signal.SIGTERM)
        await eventually(lambda: not (directory / "replicas" / replica.replica_id).exists(), within=60)
        return
    await replica.stop(0.1)


async def _cycle(launcher: LocalLauncher, directory: Path, count: int, first: int) -> None:
    """So many at once; every one of them is itself, and then none is there."""
    names = [f"{os.getpid()}-{number}" for number in range(first, first + count)]
    forking = [{"FORKS": "yes"} if number % 2 else {} for number in range(count)]
    launches = [a_launch(name, SAYS=name, **more) for name, more in zip(names, forking, strict=True)]
    replicas = await asyncio.gather(*map(launcher.start, launches))

    async def is_itself(replica: LocalReplica) -> None:
        async with asyncio.timeout(120):
            assert (await replica.wait(ReplicaState.STARTING)).state is ReplicaState.READY
            assert (await answer(replica.address))[2].decode() == replica.replica_id

    await asyncio.gather(*map(is_itself, replicas))
    assert len({replica.address for replica in replicas}) == count
    ends = (_end(launcher, directory, replica, number % WAYS) for number, replica in enumerate(replicas))
    await asyncio.gather(*ends)


async def _none_is_left(launcher: LocalLauncher, directory: Path, counts: list[int]) -> None:
    await _cycle(launcher, directory, 2, first=0)  # whatever is made once for all is there now
    before = left_of_us()
    for number, count in enumerate(counts):
        await _cycle(launcher, directory, count, first=1_000 * (number + 1))
    await eventually(lambda: not processes.of_directory(directory), within=30, what="no process is left")
    assert list((directory / "replicas").iterdir()) == []
    with contextlib.suppress(AssertionError):
        await eventually(lambda: not left_of_us() - before)
    assert left_of_us() - before == Counter()


async def test_two_hundred_launches_at_once_do_not_meet_and_leave_nothing(
    launcher: LocalLauncher, directory: Path
) -> None:
    await _none_is_left(launcher, directory, [200])


@pytest.mark.long
async def test_a_thousand_launches_leave_nothing(launcher: LocalLauncher, directory: Path) -> None:
    await _none_is_left(launcher, directory, [100] * 10)


LAUNCHING = """
import asyncio, os, sys
from pathlib import Path
from serving_service.launcher import LocalLauncher, ReplicaState
from tests.e2e.test_many_launches import a_launch

async def main():
    launcher = LocalLauncher(Path(sys.argv[1]) / "replicas", None, service_environment={})
    for number in range(20):
        replica = await launcher.start(a_launch(str(number), SAYS=os.environ["CANARY"]))
        await replica.wait(ReplicaState.STARTING)
        await replica.stop(0.1)

asyncio.run(main())
"""


@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
async def test_no_call_of_a_launch_has_a_secret_among_its_arguments_or_in_a_path(directory: Path) -> None:
    canary, trace = f"canary-{secrets.token_hex(16)}", directory / "trace"
    traced = await asyncio.create_subprocess_exec(
        *(str(STRACE), "-f", "--seccomp-bpf", "-s", "65536", "-e", f"trace={NAMING}"),
        *("-o", str(trace), sys.executable, "-c", LAUNCHING, str(directory)),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "CANARY": canary},
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(traced.communicate(), 120)
    if b"ptrace" in errors and traced.returncode:
        pytest.skip("strace may not trace here: " + errors.decode().splitlines()[0])
    assert traced.returncode == 0, errors.decode()
    calls = trace.read_text(errors="replace").splitlines()
    executed = [call for call in calls if "execve(" in call]
    assert sum("tiny_runner.py" in call for call in executed) == 20
    assert not [call for call in calls if canary in call]
