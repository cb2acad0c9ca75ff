"""What a replica's environment is made of, who may name what, and when a replica counts as gone."""

import asyncio
import errno
import fcntl
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serving_service import controllers
from serving_service.launcher import (
    Launch,
    LocalLauncher,
    LocalReplica,
    ModelPython,
    ReplicaGoneError,
    ReplicaState,
    is_reserved,
    model_environment,
)
from serving_service.shim.supervisor import is_held
from tests.support.exhaustion import no_descriptor_left
from tests.support.sockets import short_directory

DIRECTORY = Path("/run/replicas/r1")


def test_a_model_gets_what_was_declared_and_the_short_set_of_our_own() -> None:
    service = {"PATH": "/opt/bin:/bin", "TESSERA_TOKEN": "no", "HOME": "/root", "LANG": "de_DE", "PYTHONPATH": "/x"}
    assert model_environment({"KEY": "v"}, directory=DIRECTORY, service=service) == {
        "KEY": "v",
        "PATH": "/opt/bin:/bin",
        "HOME": "/run/replicas/r1/work",
        "TMPDIR": "/run/replicas/r1/tmp",
        "LANG": "C.UTF-8",
        "LC_CTYPE": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
    }


def test_a_certificate_bundle_is_passed_on_only_where_set() -> None:
    service = {"SSL_CERT_FILE": "/ca.pem", "REQUESTS_CA_BUNDLE": "/bundle.pem"}
    environment = model_environment({}, directory=DIRECTORY, service=service)
    assert environment["SSL_CERT_FILE"] == "/ca.pem"
    assert environment["REQUESTS_CA_BUNDLE"] == "/bundle.pem"


def test_a_declared_variable_wins_where_it_may_be_declared() -> None:
    declared = {"LANG": "fr_FR.UTF-8", "SSL_CERT_FILE": "/mine.pem"}
    environment = model_environment(declared, directory=DIRECTORY, service={"SSL_CERT_FILE": "/ca.pem"})
    assert environment["LANG"] == "fr_FR.UTF-8"
    assert environment["SSL_CERT_FILE"] == "/mine.pem"


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "TMPDIR", "PYTHONUNBUFFERED", "LD_PRELOAD", "LD_LIBRARY_PATH"),
        *("PYTHONWARNINGS", "_PYTHON_SYSCONFIGDATA_NAME", "BROWSER"),
    ],
)
def test_a_reserved_variable_is_refused_by_name_and_without_its_value(name: str) -> None:
    assert is_reserved(name)
    with pytest.raises(ValueError, match=name) as refusal:
        model_environment({name: "the-value"}, directory=DIRECTORY, service={})
    assert "the-value" not in str(refusal.value)


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "PYTHONPATH", "LANG", "path", "LDAP_HOST", "MLFLOW_TRACKING_URI"])
def test_other_variables_may_be_declared(name: str) -> None:
    assert not is_reserved(name)


def test_gpus_are_told_of_where_there_are_any() -> None:
    def environment(gpus: tuple[str, ...] | None) -> dict[str, str]:
        return model_environment({}, directory=DIRECTORY, service={}, gpus=gpus)

    assert "CUDA_VISIBLE_DEVICES" not in environment(None)
    assert environment(())["CUDA_VISIBLE_DEVICES"] == ""
    assert environment(("GPU-1", "GPU-2"))["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"


def test_the_programs_of_a_models_own_environment_come_first() -> None:
    folder = Path("/envs/1")
    python = ModelPython(folder=folder, executable=folder / "bin/python", program=Path("/runner"), places=())
    environment = model_environment({}, directory=DIRECTORY, service={"PATH": "/opt/bin:/bin"}, python=python)
    assert environment["PATH"] == "/envs/1/bin:/opt/bin:/bin"


def test_a_launch_does_not_show_its_values() -> None:
    launch = Launch(
        replica_id="r1", model_path=Path("/m"), environment={"K": "sk-012345"}, masked_values=("sk-012345",)
    )
    assert "sk-012345" not in repr(launch)


ANSWER = {"state": "READY", "cause": "", "pid": 1, "exit_code": None, "since": 0, "load_seconds": 1}


@asynccontextmanager
async def a_shim(directory: Path) -> AsyncIterator[None]:
    """What a shim is to whoever asks: its lock, held, and its control socket."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(json.dumps({"replica_id": directory.name, **ANSWER}).encode() + b"\n")
        writer.close()

    directory.mkdir(parents=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with await asyncio.start_unix_server(answer, directory / "control.sock"):
            yield


async def test_a_replica_that_cannot_be_asked_for_want_of_descriptors_is_not_gone() -> None:
    with short_directory() as folder:
        lock, replica = folder / "r1" / "lock", LocalReplica(folder / "r1", 0)
        async with a_shim(folder / "r1"):
            assert is_held(lock)
            assert (await replica.state()).state is ReplicaState.READY
            with no_descriptor_left():
                assert is_held(lock)
                assert await controllers._look(replica) is None
                await controllers._stop_orphan(replica)
                with pytest.raises(OSError, match="Too many open files"):
                    await replica.state()
        assert not is_held(lock)
        with pytest.raises(ReplicaGoneError):
            await replica.state()
    assert not is_held(lock)
    with pytest.raises(ReplicaGoneError):
        await replica.state()


async def test_a_replica_that_cannot_be_asked_at_first_is_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, problems = asyncio.open_unix_connection, [OSError(errno.EMFILE, "Too many open files")]

    async def connected(*arguments: Any, **options: Any) -> Any:
        if problems:
            raise problems.pop()
        return await connect(*arguments, **options)

    monkeypatch.setattr(asyncio, "open_unix_connection", connected)
    with short_directory() as folder:
        async with a_shim(folder / "r1"):
            assert list(await LocalLauncher(folder, None, service_environment={}).adopt()) == ["r1"]
