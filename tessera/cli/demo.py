"""`tessera demo`: from nothing to a prediction by a model that was given a secret, then to its next version.

A platform of its own in a temporary directory, a real MLflow model, and the documented requests with their bodies as
printed (`demo_bodies/`). Every claim is checked: the status is 0 only if all of them held, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from servicekit import sockets
from servicekit.errors import StartError
from tessera.cli import interruptible, platform
from tessera.cli.platform import Config
from tessera.cli.rest import RefusedError, Rest
from tessera.cli.service_process import module

_ENDPOINTS = "/api/2.0/serving-endpoints"
_ENDPOINT = "endpoint-name"
_MODEL = "model-name"
_SCOPE, _KEY = "my_secret_scope", "my_secret_key"
_QUESTION = json.dumps({"dataframe_records": [{"question": "What were you given?"}]})

_READY_SECONDS = 60.0
_LOOK_SECONDS = 0.1
_QUERIES_AFTERWARDS = 50
_SHOWN_LINES = 15


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("demo", help="show everything in a minute, then clear up", description=__doc__)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; 0 if every step succeeded and every claim was true."""
    return interruptible.run(_main, interrupted=1)


async def _main(hurry: asyncio.Event) -> int:
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="tessera-demo-"))
    # Nothing that the user has set for other platforms or registries plays a part.
    foreign = ("TESSERA_", "MLFLOW_", "DATABRICKS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment["TESSERA_DATA_DIR"] = str(directory)
    config = Config(environment=environment, ports={"gateway": 0, "secrets": 0, "serving": 0})
    try:
        print("Tessera demo: start the platform, and log and register two versions of a model beside it")
        async with (
            _registration(directory, environment) as registered,
            platform.running(config, print, hurry=hurry) as running,
        ):
            await registered
            token = (directory / "admin.token").read_text().strip()
            try:
                with Rest(running.addresses.gateway, token) as one, Rest(running.addresses.gateway, token) as another:
                    await _steps(_Demo(one, another))
            except StartError:
                _show_logs(directory / "run")
                raise
    finally:
        shutil.rmtree(sockets.socket_directory(directory), ignore_errors=True)
        shutil.rmtree(directory)
    print(f"All of it was true; nothing is left running. {time.monotonic() - began:.0f} s in all.")
    return 0


async def _steps(demo: _Demo) -> None:
    await demo.plain_text_variable()
    await demo.secret_variable()
    await demo.update_without_outage()


@asynccontextmanager
async def _registration(directory: Path, environment: Mapping[str, str]) -> AsyncIterator[asyncio.Task[None]]:
    """A task that is done when both versions of the model are registered; the process behind it ends with us."""
    registry = f"sqlite:///{directory / 'registry.db'}"
    process = await asyncio.create_subprocess_exec(
        *module("tessera.cli.demo_model"),
        str(directory / "artifacts"),
        _MODEL,
        env={**environment, "MLFLOW_TRACKING_URI": registry, "MLFLOW_REGISTRY_URI": registry},
        cwd=directory,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    began = time.monotonic()

    async def registered() -> None:
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise StartError(f"the model could not be registered:\n{output.decode('utf-8', 'replace')}")
        print(f"  ✓ {_MODEL} versions 1 and 2 registered after {time.monotonic() - began:.1f} s")

    task = asyncio.create_task(registered())
    try:
        yield task
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.gather(task, return_exceptions=True)


class _Demo:
    """The documentation page's steps, in its order."""

    def __init__(self, rest: Rest, another: Rest) -> None:
        self._rest = rest
        self._another = another
        self._secret = f"demo-{secrets.token_hex(16)}"
        self._fingerprint = hashlib.sha256(self._secret.encode()).hexdigest()[:12]

    async def plain_text_variable(self) -> None:
        """Adds a plain text environment variable."""
        print("\nAdd plain text environment variables")
        async with _step(f"POST {_ENDPOINTS}: {_MODEL} version 1"):
            await self._call("POST", _ENDPOINTS, _body("create_with_plain_text"))
        await self._until_ready()
        answer = await self._ask()
        _claim(answer["text"] == "plain-text-env-value", f"the model was not given its plain text: {answer}")
        _claim(answer["key_fingerprint"] == "", f"the model holds a key that nobody gave it: {answer}")
        async with _step(f"DELETE {_ENDPOINTS}/{_ENDPOINT}: the next endpoint has the same name"):
            await self._call("DELETE", f"{_ENDPOINTS}/{_ENDPOINT}")

    async def secret_variable(self) -> None:
        """Adds an environment variable whose value is a secret."""
        print("\nAdd secrets-based environment variables")
        async with _step(f"create-scope {_SCOPE}"):
            await self._call("POST", "/api/2.0/secrets/scopes/create", json.dumps({"scope": _SCOPE}))
        async with _step(f"put-secret {_SCOPE} {_KEY}: a random value with fingerprint {self._fingerprint}"):
            secret = {"scope": _SCOPE, "key": _KEY, "string_value": self._secret}
            await self._call("POST", "/api/2.0/secrets/put", json.dumps(secret))
        async with _step(f"POST {_ENDPOINTS}: OPENAI_API_KEY is {{{{secrets/{_SCOPE}/{_KEY}}}}}"):
            await self._call("POST", _ENDPOINTS, _body("create_with_secret"))
        await self._until_ready()
        answer = await self._ask()
        _claim(answer["key_fingerprint"] == self._fingerprint, f"the model does not hold the secret: {answer}")
        _claim(answer["version"] == "1", f"another version answers: {answer}")

    async def update_without_outage(self) -> None:
        """Updates to version 2 while somebody queries without a pause."""
        print("\nUpdate the endpoint while it is being queried")
        enough = asyncio.Event()
        querying = asyncio.create_task(self._query_until(enough))
        try:
            async with _step(f"PUT {_ENDPOINTS}/{_ENDPOINT}/config: {_MODEL} version 2"):
                await self._call("PUT", f"{_ENDPOINTS}/{_ENDPOINT}/config", _body("update_to_version_2"))
            await self._until_ready()
        finally:
            enough.set()
            versions = await querying
        answer = await self._ask()
        _claim(answer["version"] == "2", f"version 2 did not take over: {answer}")
        _claim(answer["key_fingerprint"] == self._fingerprint, f"version 2 does not hold the secret: {answer}")
        _claim(versions == sorted(versions), "version 1 answered after version 2 had taken over")
        counts = " and ".join(f"{versions.count(version)} by version {version}" for version in sorted(set(versions)))
        _claim(set(versions) == {"1", "2"}, f"the switch was not seen: {counts}")
        print(f"  ✓ {len(versions)} queries during the update, answered {counts}; none failed\n")
        print(f"The model holds the secret: its fingerprint {answer['key_fingerprint']} is ours.")

    async def _until_ready(self) -> None:
        """Waits until the endpoint answers with its newest configuration; raises StartError when that failed."""
        async with _step("wait until it is ready") as progress:
            deadline = time.monotonic() + _READY_SECONDS
            while True:
                endpoint = await self._call("GET", f"{_ENDPOINTS}/{_ENDPOINT}")
                state = endpoint["state"]
                if (state["ready"], state["config_update"]) == ("READY", "NOT_UPDATING"):
                    return
                failed = state["config_update"] in ("UPDATE_FAILED", "UPDATE_CANCELED")
                if failed or time.monotonic() > deadline:
                    raise StartError(f"{_ENDPOINT} is not ready: {json.dumps(endpoint.get('pending_config', state))}")
                progress()
                await asyncio.sleep(_LOOK_SECONDS)

    async def _ask(self) -> dict[str, str]:
        async with _step("query it"):
            answer = await self._call("POST", f"/serving-endpoints/{_ENDPOINT}/invocations", _QUESTION)
        print(f"      {json.dumps(answer)}")
        return dict(answer["predictions"][0])

    async def _query_until(self, enough: asyncio.Event) -> list[str]:
        """The versions that answered, in order, one query after the other; raises RefusedError when one failed."""
        versions: list[str] = []
        rest = _QUERIES_AFTERWARDS
        while rest:
            rest -= enough.is_set()
            path = f"/serving-endpoints/{_ENDPOINT}/invocations"
            try:
                answer = await asyncio.to_thread(self._another.call, "POST", path, _QUESTION)
            except RefusedError as error:
                raise RefusedError(f"query {len(versions) + 1} failed during the update: {error}") from None
            versions.append(answer["predictions"][0]["version"])
        return versions

    async def _call(self, method: str, path: str, body: str | None = None) -> dict[str, Any]:
        return await asyncio.to_thread(self._rest.call, method, path, body)


@asynccontextmanager
async def _step(title: str) -> AsyncIterator[Any]:
    """Prints a step, what it does meanwhile, and how long it took; yields a function that shows progress."""
    began = shown = time.monotonic()
    print(f"    {title} ", end="", flush=True)

    def progress() -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(".", end="", flush=True)

    try:
        yield progress
    except BaseException:
        print(" ✗")
        raise
    print(f" ✓ {time.monotonic() - began:.2f} s", flush=True)


def _claim(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StartError(otherwise)


def _body(name: str) -> str:
    return (files("tessera.cli") / "demo_bodies" / f"{name}.json").read_text()


def _show_logs(run: Path) -> None:
    for log in sorted(run.glob("*.log")):
        with contextlib.suppress(OSError):
            print(f"--- {log.name}", *log.read_text().splitlines()[-_SHOWN_LINES:], sep="\n", file=sys.stderr)
