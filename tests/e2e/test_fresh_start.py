"""What a first start leaves open and lying about, and what the Secrets process is made of (S28, S29)."""

from __future__ import annotations

import ipaddress
import signal
import sqlite3
import stat
import sys
from contextlib import closing
from importlib.metadata import distributions
from pathlib import Path

import grpc
import psutil
import pytest

import secrets_service.app
from tessera.secrets.v1 import secrets_pb2, secrets_pb2_grpc
from tests.support.secrets import data_directory
from tests.support.service_process import secrets_process
from tests.support.stack import running_stack

DAY_MS = 24 * 3600 * 1000

DISTRIBUTIONS = {
    *("aiosqlite", "cffi", "cryptography", "googleapis-common-protos", "grpcio", "grpcio-health-checking"),
    *("grpcio-reflection", "grpcio-status", "prometheus_client", "protobuf", "PyJWT", "typing_extensions", "uvloop"),
}
"""What is imported into the process that holds the keys, besides Python's own modules and ours."""

OF_PYTHON = {"setuptools", "tessera"}
"""What the interpreter of a virtual environment imports by itself, and what we are."""

MOST_DISTRIBUTIONS = 15

REPORTING = """
import atexit, pathlib, runpy, sys
files = lambda: sorted({{file for each in sys.modules.values() if (file := getattr(each, "__file__", None))}})
atexit.register(lambda: pathlib.Path({path!r}).write_text("\\n".join(files())))
sys.argv = ["secrets_service"]
runpy.run_module("secrets_service", run_name="__main__")
"""


async def test_secrets_process_imports_few_packages_of_others() -> None:
    with data_directory() as directory:
        told = directory / "modules"
        command = [sys.executable, "-I", "-c", REPORTING.format(path=str(told))]
        async with secrets_process(directory, command) as process:
            process.send(signal.SIGTERM)
            await process.ended()
        files = {Path(line) for line in told.read_text().splitlines()}
    assert Path(secrets_service.app.__file__) in files
    found = set()
    for distribution in distributions():
        own = {Path(str(each.locate())) for each in distribution.files or () if each.suffix in (".py", ".so")}
        if files & own and distribution.name not in OF_PYTHON:
            found.add(distribution.name)
    assert found == DISTRIBUTIONS
    assert len(found) <= MOST_DISTRIBUTIONS


def test_first_start_opens_and_writes_nothing_but_what_is_expected() -> None:
    with running_stack() as stack:
        up = psutil.Process(stack.process.pid)
        assert_services_are_isolated(up)
        listening = {
            (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
            for process in (up, *up.children(recursive=True))
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert [host for host, _ in listening if not ipaddress.ip_address(host).is_loopback] == []
        public = {stack.url.rpartition(":")[2], stack.secrets_address.rpartition(":")[2]}
        public.add(stack.serving_address.rpartition(":")[2])
        assert {str(port) for _, port in listening} == public
        assert_files_are_closed(stack.data_dir)
        assert_first_token_expires(stack.data_dir)
        assert_nobody_gets_in_without(stack.secrets_address)


def assert_services_are_isolated(up: psutil.Process) -> None:
    """No variable and no directory says what they import."""
    modules = {"secrets_service", "serving_service", "gateway"}
    flags = {line[3]: line[1] for each in up.children() if len(line := each.cmdline()) > 3 and line[3] in modules}
    assert flags == dict.fromkeys(modules, "-I")


def assert_files_are_closed(directory: Path) -> None:
    """Nobody else may read anything, whatever is below the one closed directory."""
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    open_to_others = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o077
    }
    assert not {path for path in open_to_others if Path(path).parts[0] not in ("registry.db", "serving", "up.out")}
    credentials = {path.name for path in directory.iterdir() if path.is_file() and path.suffix in (".key", ".token")}
    assert credentials == {"root.key", "admin.token"}


def assert_first_token_expires(directory: Path) -> None:
    with closing(sqlite3.connect(f"file:{directory}/secrets/secrets.db?mode=ro", uri=True)) as connection:
        tokens = connection.execute("SELECT expires_ms - created_ms FROM tokens").fetchall()
        accounts = connection.execute("SELECT count(*) FROM principals WHERE kind != 'group'").fetchone()
    assert tokens == [(90 * DAY_MS,)]
    assert accounts == (1,)


def assert_nobody_gets_in_without(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = secrets_pb2_grpc.SecretsStub(channel)
        for metadata in ((), (("authorization", "Bearer admin"),), (("authorization", "Basic YWRtaW46YWRtaW4="),)):
            with pytest.raises(grpc.RpcError) as refused:
                stub.ListScopes(secrets_pb2.ListScopesRequest(), metadata=metadata, timeout=20)
            code: grpc.StatusCode = refused.value.code()
            assert code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
