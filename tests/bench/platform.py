"""The platform under measurement, as `tessera up` runs it, filled with what the tables need; entered once per run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_service.launcher import model_environment
from tessera.cli.rest import RefusedError, Rest
from tests.bench import programs
from tests.bench.programs import Started
from tests.bench.servers import SECRET_VALUE
from tests.support.http import fetch
from tests.support.stack import Stack, clean_environment, running_stack

SCOPE, KEY = "bench", "key"
MODEL, ENDPOINT = "bench", "bench"
QUESTION = '{"dataframe_records":[{"question":"What were you given?"}]}'

IDLE_SECONDS = 1
"""After which an endpoint that may be at zero goes there."""

_ENDPOINTS = "/api/2.0/serving-endpoints"
_READY_SECONDS = 60.0
_LOOK_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A platform that runs, with a secret, somebody who may read it, and a registered model."""

    stack: Stack
    start_seconds: float
    """From spawning `tessera up` to its saying that it is ready."""
    model_path: Path
    """The folder that the model was registered from."""
    reader_token: str = field(repr=False)
    """Of a user who may READ the scope and nothing else; worthless once the platform has ended."""

    def register(self, model: str, folder: Path) -> None:
        """Registers the MLflow model of a folder as the first version of another one."""
        program = "import mlflow, sys; mlflow.register_model(f'file://{sys.argv[1]}', sys.argv[2])"
        subprocess.run(
            [sys.executable, "-P", "-c", program, str(folder), model],
            env={**clean_environment(), **_registry(self.stack)},
            cwd=folder,
            capture_output=True,
            check=True,
        )

    def create_endpoint(
        self,
        *,
        model: str = MODEL,
        endpoint: str = ENDPOINT,
        variables: Mapping[str, str] | None = None,
        may_be_at_zero: bool = False,
    ) -> float:
        """Creates an endpoint for a model; returns the seconds until it was READY."""
        config = _config(model, variables, may_be_at_zero=may_be_at_zero)
        return self._ordered("POST", _ENDPOINTS, {"name": endpoint, "config": config}, endpoint)

    def update_endpoint(self, variables: Mapping[str, str], *, model: str = MODEL, endpoint: str = ENDPOINT) -> float:
        """Gives an endpoint's entity other variables; returns the seconds until the update was done."""
        return self._ordered("PUT", f"{_ENDPOINTS}/{endpoint}/config", _config(model, variables), endpoint)

    def wait_for_zero(self) -> None:
        """Returns when no replica runs."""
        until(lambda: not self.replica_pids(), _READY_SECONDS, "there is no replica", period=_LOOK_SECONDS)

    def ask(self, endpoint: str = ENDPOINT) -> float:
        """Asks the demo's model once; returns the seconds until the answer."""
        admin = self._admin()
        began = time.monotonic()
        admin.call("POST", f"/serving-endpoints/{endpoint}/invocations", QUESTION)
        return time.monotonic() - began

    def _ordered(self, method: str, path: str, body: object, endpoint: str) -> float:
        admin = self._admin()
        began = time.monotonic()
        admin.call(method, path, json.dumps(body))
        until(lambda: _is_ready(admin, endpoint), _READY_SECONDS, "the endpoint is READY", period=_LOOK_SECONDS)
        return time.monotonic() - began

    def delete_endpoint(self, endpoint: str = ENDPOINT) -> None:
        """Deletes an endpoint; returns when its replica has ended."""
        self._admin().call("DELETE", f"{_ENDPOINTS}/{endpoint}")
        self.wait_for_zero()

    def replica_pids(self) -> list[int]:
        """The model servers that run."""
        return [
            pid for pid, arguments in self.stack.processes().items() if "-m serving_service.model_server" in arguments
        ]

    def _admin(self) -> Rest:
        # A new connection each time: the gateway closes one that is not used for a minute.
        return Rest(self.stack.url.removeprefix("http://"), self.stack.token)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Platform]:
    """Runs a platform and fills it. `directory` is for the files of the model."""
    began = time.monotonic()
    with running_stack(environment={"TESSERA_IDLE_SECONDS": str(IDLE_SECONDS)}) as stack:
        start_seconds = time.monotonic() - began
        admin = Rest(stack.url.removeprefix("http://"), stack.token)
        until(lambda: _answers(admin), _READY_SECONDS, "the gateway has found Secrets", period=_LOOK_SECONDS)
        yield Platform(
            stack=stack,
            start_seconds=start_seconds,
            reader_token=_secret_and_reader(stack),
            model_path=_registered(stack, directory),
        )


@contextlib.contextmanager
def model_server(model: Path, directory: Path) -> Iterator[Started]:
    """Runs our model server by hand, as the launcher starts it, but on TCP; its report has the `address` too."""
    home = directory / "home"
    for each in (home / "work", home / "tmp"):
        each.mkdir(parents=True, exist_ok=True)
    environment = model_environment({}, directory=home, service=clean_environment())
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        program = [sys.executable, "-P", "-u", "-m", "serving_service.model_server", "--model", str(model)]
        descriptor = listener.fileno()
        with programs.reporting(
            lambda report: [*program, "--fd", str(descriptor), "--report-fd", str(report)],
            environment=environment,
            pass_fds=[descriptor],
            log=directory / "model_server.log",
        ) as started:
            started.report["address"] = f"127.0.0.1:{listener.getsockname()[1]}"
            yield started


def until(claim: Callable[[], bool], within: float, what: str, *, period: float) -> None:
    """Returns once `claim()` holds; it is asked every `period` seconds, for so many seconds."""
    deadline = time.monotonic() + within
    while not claim():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within:.0f} s: {what}")
        time.sleep(period)


def _is_ready(admin: Rest, endpoint: str) -> bool:
    state = admin.call("GET", f"{_ENDPOINTS}/{endpoint}")["state"]
    if state["config_update"] == "UPDATE_FAILED":
        raise RuntimeError(f"the update of {endpoint} failed")
    return bool(state["ready"] == "READY" and state["config_update"] == "NOT_UPDATING")


def _config(model: str, variables: Mapping[str, str] | None, *, may_be_at_zero: bool = False) -> object:
    entity = {
        "entity_name": model,
        "entity_version": "1",
        "workload_size": "Small",
        "scale_to_zero_enabled": may_be_at_zero,
        "environment_vars": dict(variables or {}),
    }
    return {"served_entities": [entity]}


def _registry(stack: Stack) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": stack.registry_uri, "MLFLOW_REGISTRY_URI": stack.registry_uri}


def _answers(admin: Rest) -> bool:
    try:
        admin.call("GET", "/api/2.0/secrets/scopes/list")
    except RefusedError:
        return False
    return True


def _secret_and_reader(stack: Stack) -> str:
    """Puts the secret and makes a user who may read it; returns the user's token."""

    def post(path: str, **fields: object) -> Any:
        answer = asyncio.run(fetch(stack.url, "POST", path, token=stack.token, json=fields))
        if answer.status >= 300:
            raise RuntimeError(f"{path} was answered with {answer.status}: {answer.body!r}")
        return answer.json()

    name = "reader@example.com"
    post("/api/2.0/secrets/scopes/create", scope=SCOPE)
    post("/api/2.0/secrets/put", scope=SCOPE, key=KEY, string_value=SECRET_VALUE.decode())
    post("/api/2.0/preview/scim/v2/Users", userName=name)
    post("/api/2.0/secrets/acls/put", scope=SCOPE, principal=name, permission="READ")
    made = post("/api/2.0/token-management/on-behalf-of/tokens", application_id=name, lifetime_seconds=3600)
    return str(made["token_value"])


def _registered(stack: Stack, directory: Path) -> Path:
    """Registers the demo's model in the platform's registry; returns the folder of its first version."""
    artifacts = directory / "artifacts"
    subprocess.run(
        [sys.executable, "-P", "-m", "tessera.cli.demo_model", str(artifacts), MODEL],
        env={**clean_environment(), **_registry(stack)},
        cwd=directory,
        capture_output=True,
        check=True,
    )
    return min(artifacts.rglob("MLmodel"), key=lambda file: file.stat().st_mtime_ns).parent
