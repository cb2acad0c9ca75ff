"""`tessera up`: keeps three services running, refuses what cannot work in one line, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
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
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import pytest

from servicekit.errors import StartError
from tessera.cli import platform, replicas
from tessera.cli.platform import Config, Platform
from tessera.cli.rest import RefusedError, Rest
from tessera.cli.service_log import ServiceLog
from tests.support import processes, stand_ins
from tests.support.eventually import eventually
from tests.support.registered_models import fingerprint, stack_environment
from tests.support.stack import Stack, clean_environment, command, running_stack


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


class Rehearsal:
    """A platform of stand-ins on a directory, and what it tells."""

    def __init__(self, directory: Path, *, ports: Mapping[str, int] | None = None, **behaviours: str) -> None:
        self.directory = directory
        self.hurry = asyncio.Event()
        self.told: list[str] = []
        self.config = Config(
            environment={**clean_environment(), "TESSERA_DATA_DIR": str(directory)},
            ports=ports or dict.fromkeys(stand_ins.SERVICES, 0),
            commands=stand_ins.commands(**behaviours),
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Platform]:
        async with platform.running(self.config, self.told.append, hurry=self.hurry) as running:
            yield running

    def pids(self, service: str) -> list[int]:
        found = processes.of_directory(self.directory).items()
        return [pid for pid, arguments in found if f"stand_ins.py {service} " in arguments]


async def test_service_that_is_killed_is_started_again(directory: Path) -> None:
    rehearsal = Rehearsal(directory)
    async with rehearsal.running():
        (before,) = rehearsal.pids("serving")
        os.kill(before, signal.SIGKILL)
        await eventually(lambda: rehearsal.pids("serving") not in ([], [before]), what="a new Serving")
        assert any("serving was ended by SIGKILL" in line and "0.2 s" in line for line in rehearsal.told)
        assert len(rehearsal.pids("secrets")) == len(rehearsal.pids("gateway")) == 1


async def test_service_that_cannot_start_ends_the_start_with_its_reason(directory: Path) -> None:
    rehearsal = Rehearsal(directory, secrets="dying")
    with pytest.raises(StartError, match=stand_ins.CAUSE):
        async with rehearsal.running():
            pytest.fail("a platform without Secrets is not ready")
    assert sum("starting it again" in line for line in rehearsal.told) == 1  # as often as the reason is another one
    assert (directory / "run" / "secrets.log").read_text().count(stand_ins.CAUSE) > 1
    assert processes.of_directory(directory) == {}


async def test_service_that_waits_is_told_with_what_it_waits_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "_SILENT_SECONDS", 0.2)
    monkeypatch.setattr(platform, "_READY_SECONDS", 4.0)
    rehearsal = Rehearsal(directory, secrets="waiting")
    with pytest.raises(StartError, match=rf"not ready after 4 s: secrets \({stand_ins.CAUSE} Its log: "):
        async with rehearsal.running():
            pytest.fail("a platform without Secrets is not ready")
    assert [line for line in rehearsal.told if "not ready" in line] == [
        f"  … secrets  is not ready yet: {stand_ins.CAUSE}"
    ]
    assert processes.of_directory(directory) == {}


def test_last_words_are_those_of_the_last_start(directory: Path) -> None:
    log = ServiceLog(directory / "one.log")
    for line in ('{"event": "cannot start", "cause": "no disk"}\n', ""):
        descriptor = log.open()
        os.write(descriptor, line.encode())
        os.close(descriptor)
        cause = "no disk" if line else ""
        assert (log.last_words(), log.waits_for()) == (cause, cause)
    with log.path.open("a") as file:
        file.write("Killed\n")
    assert (log.last_words(), log.waits_for()) == ("Killed", "")


async def test_service_that_ignores_term_is_killed_within_ten_seconds(directory: Path) -> None:
    rehearsal = Rehearsal(directory, gateway="stubborn", serving="stubborn", secrets="stubborn")
    async with rehearsal.running():
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert processes.of_directory(directory) == {}


async def test_second_signal_ends_everything_at_once(directory: Path) -> None:
    rehearsal = Rehearsal(directory, gateway="stubborn")
    async with rehearsal.running():
        rehearsal.hurry.set()
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert processes.of_directory(directory) == {}


async def test_interruption_of_the_end_leaves_nothing_either(directory: Path) -> None:
    rehearsal = Rehearsal(directory, gateway="stubborn")

    async def work() -> None:
        async with rehearsal.running():
            pass

    task = asyncio.create_task(work())
    await eventually(lambda: "Stopping" in rehearsal.told, within=30, what="the end to begin")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert processes.of_directory(directory) == {}


async def test_data_directory_is_made_for_its_owner_alone(directory: Path) -> None:
    made = directory / "below" / "data"
    async with Rehearsal(made).running():
        assert made.stat().st_mode & 0o777 == 0o700


async def test_replicas_are_told_that_the_platform_runs_and_then_that_it_stops(directory: Path) -> None:
    word = directory / "run" / "up.lock"
    async with Rehearsal(directory).running():
        assert word.read_text() == "running"
    assert word.read_text() == "stopping"


async def test_second_platform_on_the_same_directory_is_refused_and_names_the_first(directory: Path) -> None:
    async with Rehearsal(directory).running():
        with pytest.raises(StartError, match=f"in use by another `tessera up` .process {os.getpid()}.*--data-dir"):
            async with Rehearsal(directory).running():
                pytest.fail("two platforms on one directory")


async def test_glance_of_a_replica_at_the_lock_does_not_turn_a_successor_away(directory: Path) -> None:
    (directory / "run").mkdir()
    with (directory / "run" / "up.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        glance = asyncio.create_task(_let_go(lock.fileno(), after=0.2))
        async with Rehearsal(directory).running():
            await glance


async def test_new_start_waits_for_the_services_of_one_that_was_killed(directory: Path) -> None:
    holds_a_port = (
        "import socket, sys; listener = socket.create_server(('127.0.0.1', 0)); "
        "print(listener.getsockname()[1], flush=True); sys.stdin.read()"
    )
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", holds_a_port), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert service.stdin is not None
    assert service.stdout is not None
    port = int(await service.stdout.readline())
    run = directory / "run"
    run.mkdir()
    (run / "gateway.pid").write_text(str(service.pid))

    async def end_of_the_service(stdin: asyncio.StreamWriter) -> None:
        await eventually(lambda: (run / "up.lock").exists(), what="a successor")
        stdin.close()
        await service.wait()

    end = asyncio.create_task(end_of_the_service(service.stdin))
    async with Rehearsal(directory, ports={"gateway": port, "secrets": 0, "serving": 0}).running() as running:
        await end
        assert running.addresses.gateway == f"127.0.0.1:{port}"


async def test_ports_in_use_are_all_named_in_one_line(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = {"gateway": first.getsockname()[1], "secrets": second.getsockname()[1], "serving": 0}
        with pytest.raises(StartError) as refused:
            async with Rehearsal(directory, ports=ports).running():
                pytest.fail("started on ports of others")
    text = str(refused.value)
    assert "\n" not in text
    assert f"port {ports['gateway']} on 127.0.0.1 is in use; choose another with --port" in text
    assert f"port {ports['secrets']} on 127.0.0.1 is in use; choose another with --secrets-port" in text


async def test_full_log_moves_to_a_second_file_and_the_service_writes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal = Rehearsal(directory)
    log = directory / "run" / "secrets.log"
    async with rehearsal.running():
        with log.open("ab") as file:
            file.truncate(11 * 2**20)
        await eventually(lambda: log.stat().st_size == 0, what="an empty log")
        assert log.with_name("secrets.log.1").stat().st_size == 11 * 2**20
        assert log.with_name("secrets.log.1").stat().st_mode & 0o777 == 0o600
        (pid,) = rehearsal.pids("secrets")
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: "stand-in started" in log.read_text(), what="a line in the log")


async def _let_go(lock: int, *, after: float) -> None:
    await asyncio.sleep(after)
    fcntl.flock(lock, fcntl.LOCK_UN)


def test_host_beyond_loopback_needs_permission_that_says_what_it_allows(directory: Path) -> None:
    refused = subprocess.run([*command(directory), "--host", "0.0.0.0"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "tokens and secrets would travel in clear" in refused.stderr
    assert "--allow-plaintext" in refused.stderr
    assert list(directory.iterdir()) == []


# The real services from here on.


def test_summary_names_everything_and_never_shows_the_token() -> None:
    with running_stack() as stack:
        text = stack.output()
        assert f"export DATABRICKS_HOST={stack.url}" in text
        assert f"export DATABRICKS_TOKEN=$(cat {stack.data_dir}/admin.token)" in text
        assert f"MLFLOW_REGISTRY_URI={stack.registry_uri}" in text
        for file in (stack.output_file, *(stack.data_dir / "run").glob("*.log")):
            assert stack.token not in file.read_text(), file.name
            assert file.name == "up.out" or file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_leaves_no_process_and_no_file_of_a_running_platform(number: signal.Signals) -> None:
    with running_stack() as stack:
        assert len(stack.pids()) == 3
        began = time.monotonic()
        assert stack.stop(number) == 0
        assert time.monotonic() - began < 10
        assert stack.processes() == {}
        assert stack.pids() == {}
        assert "Stopped." in stack.output()


async def test_services_end_within_five_seconds_when_up_is_killed_and_a_new_start_succeeds(directory: Path) -> None:
    with running_stack(directory) as stack:
        assert stack.stop(signal.SIGKILL) == -signal.SIGKILL
        await eventually(lambda: stack.processes() == {}, within=5, what="no process of the platform")
    with running_stack(directory) as stack:
        assert len(stack.pids()) == 3


async def test_stop_ends_replicas_too_and_the_next_start_brings_the_endpoint_back(directory: Path) -> None:
    with running_stack(directory, environment=stack_environment()) as stack:
        await _deploy(stack)
        assert stack.stop() == 0
        assert stack.processes() == {}
        assert replicas.living(directory / "run" / "sockets") == []
    with running_stack(directory, environment=stack_environment()) as stack:
        await eventually(lambda: _answers(stack), within=30, what="an answer from the same endpoint")


async def test_replica_goes_on_when_up_is_killed_and_the_next_start_keeps_it(directory: Path) -> None:
    with running_stack(directory, environment=stack_environment()) as stack:
        await _deploy(stack)
        stack.stop(signal.SIGKILL)
        (before,) = replicas.living(directory / "run" / "sockets")
    with running_stack(directory, environment=stack_environment()) as stack:
        await eventually(lambda: _answers(stack), within=30, what="an answer from the same replica")
        assert replicas.living(directory / "run" / "sockets") == [before]
    assert replicas.living(directory / "run" / "sockets") == []


async def _deploy(stack: Stack) -> None:
    body = (files("tessera.cli") / "demo_bodies" / "create_with_plain_text.json").read_text()
    with _rest(stack) as rest:
        rest.call("POST", "/api/2.0/serving-endpoints", body)
    await eventually(lambda: _answers(stack), within=60, what="an answer from the endpoint")


def _answers(stack: Stack) -> bool:
    question = json.dumps({"dataframe_records": [{"ask": "fingerprint:TEXT_ENV_VAR_NAME"}]})
    with contextlib.suppress(RefusedError), _rest(stack) as rest:
        answer = rest.call("POST", "/serving-endpoints/endpoint-name/invocations", question)
        return bool(answer["predictions"] == [fingerprint("plain-text-env-value")])
    return False


def _rest(stack: Stack) -> Rest:
    return Rest(stack.url.removeprefix("http://"), stack.token)


def test_admin_token_is_renewed_without_being_shown() -> None:
    with running_stack() as stack:
        renewed = _tessera("admin-token", "--data-dir", str(stack.data_dir))
        assert renewed.returncode == 0, renewed.stderr
        token = (stack.data_dir / "admin.token").read_text().strip()
        assert token != stack.token
        assert str(stack.data_dir / "admin.token") in renewed.stdout
        assert token not in renewed.stdout + renewed.stderr


def test_admin_token_says_so_when_nothing_runs(directory: Path) -> None:
    refused = _tessera("admin-token", "--data-dir", str(directory))
    assert refused.returncode == 1
    assert f"No platform is running on {directory}" in refused.stderr
    assert "Traceback" not in refused.stderr


def _tessera(*arguments: str) -> subprocess.CompletedProcess[str]:
    program: Sequence[str] = (*command(Path("unused"))[:4], *arguments)
    return subprocess.run(program, capture_output=True, text=True, env=clean_environment())
