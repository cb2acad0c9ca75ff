"""The image and the composed platform: built, started, and given the documented create with a secret."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import pytest

from tessera.cli.rest import RefusedError, Rest

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 1200
READY_SECONDS = 180.0


class Composition:
    """`docker-compose` on files of ours, under a project name and a port of its own."""

    def __init__(self, *files: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._project = f"tessera-test-{secrets.token_hex(4)}"
        program = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
        self._program = [*program, *(argument for file in files for argument in ("--file", file))]

    def __call__(self, *arguments: str, timeout: float = 600) -> str:
        """Runs a subcommand; fails with its output when it fails."""
        done = subprocess.run(
            [*self._program, "--project-name", self._project, *arguments],
            cwd=ROOT,
            # An engine that copies whole images for each container takes its time.
            env={**os.environ, "TESSERA_PORT": str(self.port), "COMPOSE_HTTP_TIMEOUT": "300"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def healthy(self) -> set[str]:
        """The services whose health check succeeds."""
        found = set()
        for service in ("secrets", "serving", "gateway"):
            container = self("ps", "-q", service).strip()
            form = "{{.State.Health.Status}}"
            seen = subprocess.run(["docker", "inspect", "--format", form, container], capture_output=True, text=True)
            if seen.stdout.strip() == "healthy":
                found.add(service)
        return found


def _engine_answers() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "version"], capture_output=True).returncode == 0


@contextlib.contextmanager
def _composed(*files: str) -> Iterator[Composition]:
    """The composed platform, newly built; its logs are shown when something fails."""
    compose = Composition(*files)
    try:
        compose("build", timeout=BUILD_SECONDS)
        compose("up", "--detach")
        yield compose
    except BaseException:
        sys.stderr.write(compose("logs", "--no-color"))
        raise
    finally:
        compose("down", "--volumes")


pytestmark = pytest.mark.skipif(not _engine_answers(), reason="no Docker engine answers `docker version`")


def test_documented_create_serves_a_secret_from_the_composed_platform() -> None:
    with _composed("docker-compose.yml") as composed:
        _check(composed)


def test_documented_create_serves_a_secret_where_the_services_share_nothing() -> None:
    with _composed("docker-compose.yml", "docker-compose.mtls.yml") as composed:
        _check(composed)
        # What Secrets has for the gateway is where Secrets is, and the gateway reached it otherwise.
        listed = {name: composed("exec", "-T", name, "ls", "/sockets").split() for name in ("secrets", "serving")}
        assert ["secrets-for-gateway.sock" in listed[name] for name in ("secrets", "serving")] == [True, False]


def _check(composed: Composition) -> None:
    _wait(lambda: composed.healthy() == {"secrets", "serving", "gateway"}, "three healthy services")
    token = composed("exec", "-T", "secrets", "cat", "/data/admin.token").strip()
    registry = "sqlite:////data/registry.db"
    composed(
        *("exec", "-T", "-e", f"MLFLOW_TRACKING_URI={registry}", "-e", f"MLFLOW_REGISTRY_URI={registry}", "serving"),
        *("python", "-P", "-m", "tessera.cli.demo_model", "/data/artifacts", "model-name"),
    )
    with Rest(f"127.0.0.1:{composed.port}", token) as rest:
        _deploy_and_ask(composed, rest)


def _deploy_and_ask(composed: Composition, rest: Rest) -> None:
    value = secrets.token_hex(16)
    rest.call("POST", "/api/2.0/secrets/scopes/create", json.dumps({"scope": "my_secret_scope"}))
    secret = {"scope": "my_secret_scope", "key": "my_secret_key", "string_value": value}
    rest.call("POST", "/api/2.0/secrets/put", json.dumps(secret))
    body = (files("tessera.cli") / "demo_bodies" / "create_with_secret.json").read_text()
    rest.call("POST", "/api/2.0/serving-endpoints", body)
    fingerprint = sha256(value.encode()).hexdigest()[:12]
    _wait(lambda: _is_ready(rest), "an endpoint that is ready")
    assert _answered(rest) == fingerprint

    # Replicas end with Serving's container, and are launched anew with the values as they are then.
    composed("restart", "serving")
    _wait(lambda: _is_answered(rest, fingerprint), "the same answer after a restart of Serving")


def _is_ready(rest: Rest) -> bool:
    state = rest.call("GET", "/api/2.0/serving-endpoints/endpoint-name")["state"]
    assert state["config_update"] != "UPDATE_FAILED", state
    return bool(state["ready"] == "READY")


def _answered(rest: Rest) -> str:
    question = json.dumps({"dataframe_records": [{"question": "What were you given?"}]})
    answer = rest.call("POST", "/serving-endpoints/endpoint-name/invocations", question)
    return str(answer["predictions"][0]["key_fingerprint"])


def _is_answered(rest: Rest, fingerprint: str) -> bool:
    try:
        return _answered(rest) == fingerprint
    except RefusedError:
        return False


def _wait(claim: object, what: str) -> None:
    assert callable(claim)
    deadline = time.monotonic() + READY_SECONDS
    while not claim():
        assert time.monotonic() < deadline, f"not within {READY_SECONDS:.0f} s: {what}"
        time.sleep(0.2)
