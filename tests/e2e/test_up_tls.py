"""`tessera up` with a certificate: every public listener speaks TLS, and a pair that is wrong stops the start."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tessera.cli.service_process import module
from tests.support.certificates import CertificateAuthority, Files
from tests.support.stack import clean_environment, command, running_stack

AUTHORITY = CertificateAuthority()


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    files = Files(tmp_path)
    one = AUTHORITY.issue()
    files.hold(one.cert, one.key)
    return files


async def test_every_public_listener_speaks_tls_and_up_says_https(files: Files, directory: Path) -> None:
    arguments = ("--tls-cert", str(files.cert), "--tls-key", str(files.key), "--host", "0.0.0.0")
    # A stranger who does not speak TLS is no event of ours, and leaves no line of a library either.
    with running_stack(directory, arguments=arguments) as stack:
        assert stack.url.startswith("https://127.0.0.1:")
        assert f"export DATABRICKS_HOST={stack.url}\n" in stack.output()
        assert _discovered(stack.url)["oidc_endpoint"].startswith("https://")
        assert _container_is_healthy(files, "http", stack.url.removeprefix("https://"))
        assert _container_is_healthy(files, "grpc", f"unix:{directory}/run/sockets/secrets-for-gateway.sock")
        for address in (stack.secrets_address, stack.serving_address):
            trusted = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(AUTHORITY.pem))
            assert await _health(trusted) == "SERVING"
            assert await _health(grpc.aio.insecure_channel(address)) == "UNAVAILABLE"
    for log in (directory / "run").glob("*.log"):
        for line in log.read_text().splitlines():
            assert json.loads(line)["event"], log.name


def test_public_address_that_is_configured_is_the_one_that_clients_are_told() -> None:
    with running_stack(environment={"TESSERA_PUBLIC_URL": "https://tessera.example"}) as stack:
        assert "export DATABRICKS_HOST=https://tessera.example\n" in stack.output()
        assert stack.url.startswith("http://127.0.0.1:")


def test_wrong_pair_ends_up_in_one_line_before_anything_is_started(files: Files, directory: Path) -> None:
    files.hold(AUTHORITY.issue().cert, AUTHORITY.issue().key)
    both = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    assert _refused(directory, *both) == (
        1,
        f"tessera: The TLS key {files.key} is not the key of the certificate {files.cert}.",
    )
    status, text = _refused(directory, *both[:2])
    assert (status, text) == (2, "tessera: TESSERA_TLS_CERT and TESSERA_TLS_KEY belong together: set both, or none.")
    assert list((directory / "run").glob("*.log")) == []


def _refused(directory: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([*command(directory), *arguments], capture_output=True, text=True, env=clean_environment())
    return done.returncode, done.stderr.strip()


def _container_is_healthy(files: Files, *check: str) -> bool:
    environment = {**clean_environment(), "TESSERA_TLS_CERT": str(files.cert), "TESSERA_TLS_KEY": str(files.key)}
    return subprocess.run([*module("tessera.cli.readiness"), *check], env=environment).returncode == 0


def _discovered(url: str) -> dict[str, str]:
    connection = http.client.HTTPSConnection(
        url.removeprefix("https://"), timeout=10, context=AUTHORITY.client_context()
    )
    try:
        connection.request("GET", "/.well-known/databricks-config")
        return dict(json.loads(connection.getresponse().read()))
    finally:
        connection.close()


async def _health(opened: grpc.aio.Channel) -> str:
    async with opened as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
