"""Replicas as real processes: started, asked, adopted, stopped, and never left behind."""

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving_service.cgroups import Cgroups, Hierarchy, Limits
from serving_service.launcher import (
    Launch,
    LaunchError,
    LocalLauncher,
    LocalReplica,
    Observation,
    ReplicaGoneError,
    ReplicaState,
)
from serving_service.shim import __main__ as shim_program
from tests.support.eventually import eventually
from tests.support.mlflow_models import fingerprint, save_model
from tests.support.model_servers import answer, command, found_by, privileges

SECRET = "sk-0123456789-abcdefghij"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def a_launcher(
    directory: Path, supervisor_lock: Path | None = None, orphan_seconds: float = 1, epoch: int = 0
) -> LocalLauncher:
    return LocalLauncher(
        directory / "replicas",
        supervisor_lock,
        service_environment={"PATH": "/usr/bin:/bin", "SERVICE_TOKEN": SECRET},
        orphan_seconds=orphan_seconds,
        epoch=epoch,
    )


def a_launch(manner: str = "ready", replica_id: str = "r1", **environment: str) -> Launch:
    return Launch(
        replica_id=replica_id,
        model_path=Path("/nonexistent"),
        environment=environment,
        masked_values=(SECRET,),
        command=command(manner),
    )


@pytest.fixture
async def launcher(directory: Path) -> AsyncIterator[LocalLauncher]:
    launcher = a_launcher(directory)
    yield launcher
    for replica in (await launcher.adopt()).values():
        await replica.stop(0)


async def ready(replica: LocalReplica) -> Observation:
    async with asyncio.timeout(60):
        seen = await replica.wait(ReplicaState.STARTING)
    assert seen.state == ReplicaState.READY, seen
    return seen


async def stopped(replica: LocalReplica) -> Observation:
    async with asyncio.timeout(60):
        seen = await replica.state()
        while seen.state != ReplicaState.STOPPED:
            seen = await replica.wait(seen.state)
    return seen


def shim_of(directory: Path, replica_id: str = "r1") -> int:
    pid: int = json.loads((directory / "replicas" / replica_id / "lock").read_bytes())["pid"]
    return pid


async def gone(*pids: int | None, within: float = 10) -> None:
    await eventually(lambda: not any(is_alive(pid) for pid in pids if pid), within=within, what=f"{pids} have ended")


def is_alive(pid: int) -> bool:
    """Not so for what has ended and only waits for init to look at it, which is none of ours."""
    try:
        process = psutil.Process(pid)
        return not (process.status() == psutil.STATUS_ZOMBIE and process.ppid() == 1)
    except psutil.NoSuchProcess:
        return False


# --- starting -------------------------------------------------------------------------------------------------------


async def test_a_replica_becomes_ready_and_answers_on_its_socket(launcher: LocalLauncher) -> None:
    replica = await launcher.start(a_launch())
    seen = await ready(replica)
    assert (seen.replica_id, seen.cause, seen.exit_code, seen.load_seconds) == ("r1", "", None, 0.25)
    assert abs(seen.since - time.time()) < 60
    assert (await found_by(replica.address))["pid"] == seen.pid


@pytest.fixture
def odd_starter() -> Iterator[None]:
    """What a starter may be: in the background of a shell, so that it ignores signals, and a member of groups."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGQUIT, signal.SIGUSR1)}
    groups = os.getgroups()
    if os.getuid() == 0:
        os.setgroups([*groups, 54_321])
    yield
    if os.getuid() == 0:
        os.setgroups(groups)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("odd_starter")
async def test_a_model_is_started_with_exactly_what_it_is_entitled_to(launcher: LocalLauncher, directory: Path) -> None:
    replica = await launcher.start(a_launch(OPENAI_API_KEY=SECRET, EMPTY="", NAME="ü \n"))
    await ready(replica)
    own = directory / "replicas" / "r1"
    found = await found_by(replica.address)
    pid = found.pop("pid")
    del found["headers"]  # of the request that asked
    assert found == {
        "environment": {
            "OPENAI_API_KEY": SECRET,
            "EMPTY": "",
            "NAME": "ü \n",
            "PATH": "/usr/bin:/bin",
            "HOME": f"{own}/work",
            "TMPDIR": f"{own}/tmp",
            "LANG": "C.UTF-8",
            "LC_CTYPE": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
        },
        "fds": [0, 1, 2, 3, 4],
        "standard_input": "/dev/null",
        "directory": f"{own}/work",
        "user_base": str(own / "work" / ".local"),
        "umask": 0o077,
        "core": [1, 1],
        "files": [1_024, 1_024],
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": [] if os.getuid() == 0 else os.getgroups(),
        "privileges": {
            **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapAmb"), "0" * 16),
            # Without rights the bounding set stays what it was, and nothing can be made of it.
            "CapBnd": "0" * 16 if os.getuid() == 0 else privileges()["CapBnd"],
            "NoNewPrivs": "1",
        },
        "leads_session": True,
        "threads": 1,
        "ignored_signals": ["SIGPIPE", "SIGXFSZ"],  # what Python itself ignores
    }
    declared = Path(f"/proc/{pid}/environ").read_bytes()
    assert declared.count(SECRET.encode()) == 1


async def test_nothing_of_a_launch_is_on_a_command_line_or_on_disk_or_in_the_shims_environment(
    launcher: LocalLauncher, directory: Path
) -> None:
    await ready(await launcher.start(a_launch(OPENAI_API_KEY=SECRET)))
    for pid in psutil.pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert Path(f"/proc/{shim_of(directory)}/environ").read_bytes() == b""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    own = directory / "replicas" / "r1"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (own, *own.iterdir())}
    assert modes == {
        "r1": 0o700, "work": 0o700, "tmp": 0o700, "http.sock": 0o600, "control.sock": 0o600, "lock": 0o600
    }  # fmt: skip


async def test_a_shim_is_nobodys_child_and_keeps_nothing_of_its_starter(
    launcher: LocalLauncher, directory: Path
) -> None:
    await ready(await launcher.start(a_launch()))
    shim = psutil.Process(shim_of(directory))
    assert os.getpid() not in [parent.pid for parent in shim.parents()]
    assert os.getsid(shim.pid) == shim.pid
    assert [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE] == []
    kept = {str(path.readlink()) for path in Path(f"/proc/{shim.pid}/fd").iterdir()}
    assert {entry for entry in kept if not entry.startswith(("socket:", "pipe:"))} == {
        "/dev/null",
        str(directory / "replicas" / "r1" / "lock"),
    }


async def test_a_second_replica_of_the_same_id_is_refused(launcher: LocalLauncher) -> None:
    replica = await launcher.start(a_launch())
    first = await ready(replica)
    with pytest.raises(LaunchError, match="r1 exists already"):
        await launcher.start(a_launch())
    assert (await replica.state()).pid == first.pid


async def test_a_directory_too_deep_for_a_socket_is_a_clear_failure_and_leaves_nothing(directory: Path) -> None:
    deep = directory / ("d" * 100)
    with pytest.raises(LaunchError, match="too long"):
        await a_launcher(deep).start(a_launch())
    assert list((deep / "replicas").iterdir()) == []


@pytest.mark.parametrize("door", ["os.chown", "subprocess.Popen", "fcntl.flock"])
async def test_a_launch_that_fails_anywhere_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    (directory / "groups").mkdir()
    groups = Cgroups(
        hierarchies=(Hierarchy(parent=directory / "groups", kinds=(), is_unified=False),),
        limits=Limits(processes=1, memory=1),
    )
    launcher = LocalLauncher(directory / "replicas", None, service_environment={}, cgroups=groups)
    with monkeypatch.context() as broken:
        broken.setattr(f"serving_service.launcher.{door}", fails)
        broken.setattr("serving_service.launcher.members.kill", lambda _: None)  # these are plain folders
        with pytest.raises(OSError, match="temporarily"):
            await launcher.start(replace(a_launch(), user=65_534 if door == "os.chown" else None))
    assert list((directory / "replicas").iterdir()) == []
    assert list((directory / "groups").iterdir()) == []


async def test_a_truncated_spec_starts_nothing(directory: Path) -> None:
    frame = (len(b"{}") + 1).to_bytes(4) + b"{}"
    shim = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", shim_program.__file__),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd=directory,
    )
    _, errors = await shim.communicate(frame)
    assert shim.returncode == 1
    assert b"ended after 2 of 3 bytes" in errors
    assert list(directory.iterdir()) == []


async def test_a_program_that_is_not_there_is_named_as_the_cause(launcher: LocalLauncher) -> None:
    launch = Launch(replica_id="r1", model_path=Path("/m"), environment={}, command=("/nonexistent/python",))
    replica = await launcher.start(launch)
    seen = await stopped(replica)
    assert seen.cause == "the model server could not be started: No such file or directory"
    with pytest.raises(ConnectionRefusedError):
        await answer(replica.address)


# --- how it goes on -------------------------------------------------------------------------------------------------


async def test_a_model_server_that_dies_early_is_stopped_and_its_log_stays(launcher: LocalLauncher) -> None:
    replica = await launcher.start(a_launch("dying"))
    seen = await stopped(replica)
    assert (seen.exit_code, seen.cause) == (3, "the model server exited with status 3 before it was ready")
    assert await replica.logs(1_000) == "about to die\n"


async def test_a_reported_failure_is_the_cause_and_holds_no_secret(launcher: LocalLauncher) -> None:
    replica = await launcher.start(a_launch("failing", SAID=SECRET))
    seen = await stopped(replica)
    assert (seen.exit_code, seen.cause) == (1, "KeyError: [secret]")


async def test_a_ready_replica_that_dies_says_how(launcher: LocalLauncher) -> None:
    replica = await launcher.start(a_launch())
    pid = (await ready(replica)).pid
    assert pid is not None
    os.kill(pid, signal.SIGSEGV)
    seen = await stopped(replica)
    assert (seen.exit_code, seen.cause) == (-11, "the model server was ended by SIGSEGV")
    assert not list(Path("/proc").glob(f"{pid}"))
    with pytest.raises(ConnectionRefusedError):
        await answer(replica.address)


async def test_a_replica_that_is_slow_to_load_is_starting_until_it_is_stopped(launcher: LocalLauncher) -> None:
    replica = await launcher.start(a_launch("slow"))
    waiting = asyncio.create_task(replica.wait(ReplicaState.STARTING))
    assert (await replica.state()).state == ReplicaState.STARTING
    await replica.stop(5, dismiss=False)
    seen = await waiting
    assert (seen.state, seen.exit_code, seen.cause) == (ReplicaState.STOPPED, -15, "")


async def test_reports_that_make_no_sense_are_passed_over(launcher: LocalLauncher) -> None:
    assert (await ready(await launcher.start(a_launch("babbling")))).load_seconds == 0.25


async def test_secrets_that_a_model_prints_are_masked_in_its_log(launcher: LocalLauncher) -> None:
    pieces = ["key=", SECRET[:9], SECRET[9:], "\n", "Basic ", "dXNlcjpzay0wMTIzNDU2Nzg5LWFiY2RlZmdoaWo=\n"]
    replica = await launcher.start(a_launch("speaking", PIECES=json.dumps(pieces)))
    await ready(replica)
    text = await replica.logs(10_000)
    first, second = text.splitlines()
    assert first == "key=[secret]"
    assert second.startswith("Basic dXNlcj")
    assert "[secret]" in second
    assert "MTIzNDU2Nzg5" not in second


# --- ending ---------------------------------------------------------------------------------------------------------


async def test_a_dismissed_replica_leaves_neither_process_nor_folder(launcher: LocalLauncher, directory: Path) -> None:
    replica = await launcher.start(a_launch())
    seen, shim = await ready(replica), shim_of(directory)
    await replica.stop(5)
    assert seen.pid not in psutil.pids()
    await gone(shim, within=2)
    assert list((directory / "replicas").iterdir()) == []
    with pytest.raises(ReplicaGoneError, match="r1 is gone"):
        await replica.state()
    await replica.stop(5)


async def test_a_dismissed_replica_ends_also_when_nobody_waits_for_the_answer(
    launcher: LocalLauncher, directory: Path
) -> None:
    replica = await launcher.start(a_launch("stubborn"))
    seen, shim = await ready(replica), shim_of(directory)
    _, writer = await asyncio.open_unix_connection(directory / "replicas" / "r1" / "control.sock")
    writer.write(b'{"epoch":0,"op":"stop","grace_seconds":0.2,"dismiss":true}\n')
    await writer.drain()
    writer.close()
    await gone(seen.pid, shim)
    assert list((directory / "replicas").iterdir()) == []


async def test_a_replica_that_ignores_term_is_killed_when_its_grace_is_over(launcher: LocalLauncher) -> None:
    replica = await launcher.start(a_launch("stubborn"))
    seen = await ready(replica)
    began = time.monotonic()
    await replica.stop(0.5, dismiss=False)
    assert time.monotonic() - began >= 0.5
    after = await replica.state()
    assert (after.state, after.exit_code) == (ReplicaState.STOPPED, -9)
    assert seen.pid not in psutil.pids()


async def test_a_daemon_that_left_the_group_ends_with_its_replica(launcher: LocalLauncher) -> None:
    replica = await launcher.start(a_launch("forking"))
    await ready(replica)
    daemon = (await found_by(replica.address))["daemon"]
    assert psutil.pid_exists(daemon)
    await replica.stop(5, dismiss=False)
    assert not psutil.pid_exists(daemon)


async def test_a_daemon_ends_when_its_model_server_dies(launcher: LocalLauncher) -> None:
    replica = await launcher.start(a_launch("forking"))
    await ready(replica)
    daemon = (await found_by(replica.address))["daemon"]
    with contextlib.suppress(ConnectionError, IndexError):
        await answer(replica.address, path="/die")
    assert (await stopped(replica)).exit_code == 7
    assert not psutil.pid_exists(daemon)


async def test_a_running_replica_cannot_be_dismissed(launcher: LocalLauncher, directory: Path) -> None:
    replica = await launcher.start(a_launch())
    await ready(replica)
    for request, refusal in [
        (b'{"epoch":0,"op":"dismiss"}', "stop it before"),
        (b'{"epoch":0,"op":"explode"}', "unknown operation"),
        (b"nonsense", "not a request"),
        (b'{"op":"state"}', "not a request"),
        (b'{"epoch":0,"op":"logs"}', "not a request"),
    ]:
        reader, writer = await asyncio.open_unix_connection(directory / "replicas" / "r1" / "control.sock")
        writer.write(request + b"\n")
        assert refusal in json.loads(await reader.readline())["error"]
        writer.close()
    assert (await replica.state()).state == ReplicaState.READY


@pytest.mark.skipif(os.getuid() != 0, reason="only root can connect as somebody else")
async def test_another_user_gets_no_answer_even_where_the_files_let_him_in(
    launcher: LocalLauncher, directory: Path
) -> None:
    replica = await launcher.start(a_launch())
    control = directory / "replicas" / "r1" / "control.sock"
    for path in (directory, *list(control.parents)[:2]):
        path.chmod(0o755)
    control.chmod(0o666)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        os.seteuid(65_534)
        try:
            stranger.connect(str(control))
        finally:
            os.seteuid(0)
        stranger.settimeout(10)
        with contextlib.suppress(BrokenPipeError):
            stranger.sendall(b'{"epoch":0,"op":"state"}\n')
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1_000) == b""
    await ready(replica)


# --- adopting -------------------------------------------------------------------------------------------------------

STARTER = """
import asyncio, sys
from pathlib import Path
from serving_service.launcher import ReplicaState
from tests.e2e.test_launch import a_launch, a_launcher

async def main():
    replica = await a_launcher(Path(sys.argv[1])).start(a_launch(NAME="value"))
    await replica.wait(ReplicaState.STARTING)
    print("started", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_replica_outlives_the_killed_process_that_started_it(launcher: LocalLauncher, directory: Path) -> None:
    starter = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STARTER, str(directory), stdout=subprocess.PIPE, cwd=ROOT
    )
    assert starter.stdout is not None
    assert await starter.stdout.readline() == b"started\n"
    before = await found_by(f"unix:{directory}/replicas/r1/http.sock")
    starter.kill()
    await starter.wait()
    found = await launcher.adopt()
    assert list(found) == ["r1"]
    assert (await found["r1"].state()).state == ReplicaState.READY
    after = await found_by(found["r1"].address)
    assert after == before
    assert after["environment"]["NAME"] == "value"


async def test_what_a_killed_shim_left_behind_is_ended_and_removed(launcher: LocalLauncher, directory: Path) -> None:
    left = await launcher.start(a_launch("stubborn", "left"))
    kept = await launcher.start(a_launch("ready", "kept"))
    model = (await ready(left)).pid
    await ready(kept)
    waiting = asyncio.create_task(left.wait(ReplicaState.READY))
    await left.state()
    os.kill(shim_of(directory, "left"), signal.SIGKILL)
    with pytest.raises(ReplicaGoneError):
        await waiting
    assert list(await launcher.adopt()) == ["kept"]
    await gone(model)
    assert [path.name for path in (directory / "replicas").iterdir()] == ["kept"]


async def test_a_folder_whose_process_number_is_somebody_elses_now_harms_nobody(
    launcher: LocalLauncher, directory: Path
) -> None:
    stranger = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        folder = directory / "replicas" / "old"
        folder.mkdir(parents=True)
        identity = {"pid": stranger.pid, "mark": "x/1", "model_pid": stranger.pid, "model_mark": "x/1"}
        (folder / "lock").write_text(json.dumps(identity))
        assert await launcher.adopt() == {}
        assert not folder.exists()
    finally:
        await stranger.communicate(b"\n")
    assert stranger.returncode == 0


async def test_only_the_latest_that_was_heard_of_is_obeyed(launcher: LocalLauncher, directory: Path) -> None:
    first = a_launcher(directory, epoch=1)
    replica = await first.start(a_launch())
    await ready(replica)
    assert (await replica.state()).state == ReplicaState.READY
    (late,) = (await a_launcher(directory, epoch=2).adopt()).values()
    assert (await late.state()).state == ReplicaState.READY
    for act in (replica.state, lambda: replica.logs(1), lambda: replica.stop(0)):
        with pytest.raises(RuntimeError, match="a later Serving than that of epoch 1"):
            await act()
    assert (await late.state()).state == ReplicaState.READY
    assert (await found_by(late.address))["uid"] == os.getuid()
    await late.stop(5)


REUSE = """
import asyncio, json, os, shutil, signal, subprocess, sys
from pathlib import Path
from serving_service.launcher import ReplicaState
from tests.e2e.test_launch import a_launch, a_launcher

def started_as(pid):
    # The next process of this namespace gets the number that we want.
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    stranger = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    assert stranger.pid == pid, (stranger.pid, pid)
    return stranger

async def main():
    directory = Path(sys.argv[1])
    launcher = a_launcher(directory)
    replica = await launcher.start(a_launch())
    while (seen := await replica.state()).state != ReplicaState.READY:
        await replica.wait(seen.state)
    identity = json.loads((directory / "replicas" / "r1" / "lock").read_bytes())
    for pid in (identity["pid"], identity["model_pid"]):
        os.kill(pid, signal.SIGKILL)
        # Both come to us, the first process of the namespace.
        os.waitpid(pid, 0)
    strangers = [started_as(identity[name]) for name in ("pid", "model_pid")]
    assert await launcher.adopt() == {}
    assert [stranger.poll() for stranger in strangers] == [None, None]
    for stranger in strangers:
        stranger.kill()
        stranger.wait()

asyncio.run(main())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a pid namespace and choose numbers in it")
async def test_who_gets_the_number_of_a_dead_shim_or_model_is_neither_killed_nor_adopted(directory: Path) -> None:
    inside = await asyncio.create_subprocess_exec(
        *("unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", REUSE, str(directory)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(inside.communicate(), 60)
    assert inside.returncode == 0, errors.decode()
    assert list((directory / "replicas").iterdir()) == []


# --- supervision ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(lock: Path, word: str = "running") -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(word)
        file.flush()
        yield


async def test_a_replica_ends_when_nobody_holds_the_supervisors_lock_for_long(directory: Path) -> None:
    lock = directory / "up.lock"
    launcher = a_launcher(directory, lock)
    with held(lock):
        replica = await launcher.start(a_launch())
        seen, shim = await ready(replica), shim_of(directory)
    with held(lock):
        await asyncio.sleep(1.6)  # longer than the patience: that time passes is what is tested here
        assert (await replica.state()).state == ReplicaState.READY
    began = time.monotonic()
    await gone(seen.pid, shim)
    assert time.monotonic() - began > 0.4
    assert list((directory / "replicas").iterdir()) == []


async def test_a_replica_ends_at_once_when_the_platform_is_stopping(directory: Path) -> None:
    lock = directory / "up.lock"
    with held(lock):
        replica = await a_launcher(directory, lock, orphan_seconds=600).start(a_launch())
        seen, shim = await ready(replica), shim_of(directory)
        lock.write_text("stopping\n")
        await gone(seen.pid, shim, within=5)
    assert list((directory / "replicas").iterdir()) == []


async def test_a_stubborn_replica_is_gone_within_ten_seconds_of_the_platform_stopping(directory: Path) -> None:
    lock = directory / "up.lock"
    with held(lock):
        replica = await a_launcher(directory, lock, orphan_seconds=600).start(a_launch("stubborn"))
        seen, shim = await ready(replica), shim_of(directory)
        lock.write_text("stopping")
        await gone(seen.pid, shim, within=9)


async def test_a_replica_without_a_supervisor_ends_when_nobody_asks_for_it(directory: Path) -> None:
    launcher = LocalLauncher(directory / "replicas", None, service_environment={}, idle_seconds=1)
    replica = await launcher.start(a_launch())
    seen, shim = await ready(replica), shim_of(directory)
    await gone(seen.pid, shim)
    assert list((directory / "replicas").iterdir()) == []


async def test_term_to_the_shim_ends_the_replica(launcher: LocalLauncher, directory: Path) -> None:
    replica = await launcher.start(a_launch())
    seen, shim = await ready(replica), shim_of(directory)
    os.kill(shim, signal.SIGHUP)
    os.kill(shim, signal.SIGINT)
    assert (await replica.state()).state == ReplicaState.READY
    os.kill(shim, signal.SIGTERM)
    await gone(seen.pid, shim)


# --- a real model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def a_model_launch(model: Path, **environment: str) -> Launch:
    return Launch(replica_id="r1", model_path=model, environment=environment, masked_values=(SECRET,))


async def ask(replica: LocalReplica, body: Any) -> tuple[int, dict[str, Any]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, headers, content = await answer(replica.address, path="/invocations", body=raw)
    assert headers["content-type"] == "application/json"
    return status, json.loads(content)


async def test_a_model_answers_with_the_secret_it_was_given(launcher: LocalLauncher, model: Path) -> None:
    replica = await launcher.start(a_model_launch(model, OPENAI_API_KEY=SECRET, LIMIT="7"))
    assert (await ready(replica)).load_seconds is not None
    status, said = await ask(replica, {"dataframe_records": [{"name": "OPENAI_API_KEY"}, {"name": "LIMIT"}]})
    assert (status, said) == (200, {"predictions": [fingerprint(SECRET), fingerprint("7")]})
    assert "loaded with [secret]\n" in await replica.logs(100_000)

    # One launch serves the checks of what a real model server says: each launch costs seconds.
    for body, told in [
        (b"not json", "valid JSON"),
        ({"dataframe_records": [], "inputs": []}, "exactly one"),
        ({"dataframe_records": [{"name": "fail"}]}, "unexpected error while evaluating the model"),
        ({"messages": [{"content": "fail"}], "stream": True}, "unexpected error while evaluating the model"),
    ]:
        status, said = await ask(replica, body)
        assert (status, said["error_code"], set(said)) == (400, "BAD_REQUEST", {"error_code", "message"})
        assert told in said["message"]

    body = {"messages": [{"content": "canary-of-a-body"}, {"content": "fail"}], "stream": True}
    status, headers, content = await answer(replica.address, path="/invocations", body=json.dumps(body).encode())
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = _events(headers, content)
    assert json.loads(events[0]) == {"number": 0, "content": "canary-of-a-body"}
    assert json.loads(events[1])["error"]["error_code"] == "BAD_REQUEST"
    assert len(events) == 2
    body = {"messages": [{"content": "canary-of-a-body"}], "stream": True}
    status, headers, content = await answer(replica.address, path="/invocations", body=json.dumps(body).encode())
    assert _events(headers, content)[1:] == ["[DONE]"]
    many = json.dumps({"messages": [{"content": str(number)} for number in range(50)], "stream": True}).encode()
    for _, headers, content in await asyncio.gather(
        *(answer(replica.address, path="/invocations", body=many) for _ in range(4))
    ):
        assert [json.loads(event)["number"] for event in _events(headers, content)[:-1]] == list(range(50))
        assert _events(headers, content)[-1] == "[DONE]"

    log = await replica.logs(1_000_000)
    assert "The model raised RuntimeError" in log
    assert "cannot answer ['fail']" not in log
    assert "canary-of-a-body" not in log

    slow = asyncio.create_task(ask(replica, {"dataframe_records": [{"name": "slow"}]}))
    await eventually(lambda: _logged(replica, "slow predict begins"))
    await replica.stop(10, dismiss=False)
    assert (await slow)[0] == 200
    assert (await replica.state()).exit_code == 0


async def _logged(replica: LocalReplica, text: str) -> bool:
    return text in await replica.logs(1_000_000)


def _events(headers: dict[str, str], content: bytes) -> list[str]:
    assert headers["transfer-encoding"] == "chunked"
    chunks = content.decode().split("\r\n")[1::2]
    blocks = "".join(chunks).split("\n\n")
    assert blocks[-1] == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [block.removeprefix("data: ") for block in blocks[:-1]]


async def test_a_model_that_cannot_be_loaded_says_why(launcher: LocalLauncher, model: Path, directory: Path) -> None:
    broken = directory / "broken"
    shutil.copytree(model, broken)
    pickled = broken / "python_model.pkl"
    pickled.write_bytes(pickled.read_bytes()[:100])
    replica = await launcher.start(a_model_launch(broken))
    seen = await stopped(replica)
    assert (seen.exit_code, seen.cause) == (1, "UnpicklingError: pickle data was truncated")
    assert "Traceback" in await replica.logs(100_000)


async def test_a_folder_that_is_no_model_says_so(launcher: LocalLauncher, directory: Path) -> None:
    replica = await launcher.start(a_model_launch(directory / "nothing"))
    assert "nothing" in (await stopped(replica)).cause


def test_the_launcher_never_imports_mlflow() -> None:
    code = "import sys, serving_service.launcher; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
