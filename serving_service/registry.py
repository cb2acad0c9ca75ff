"""Where models come from: the MLflow registry, asked through a helper process, and a folder of what was fetched.

The helper is started with the service, so that it is warm, and again when it died; every request has a deadline. A
model version is fetched once, into a temporary folder that is renamed when it is whole; a folder with its final name
is complete and never changes.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from servicekit.errors import ServiceError, Unavailable
from serving_service.errors import ModelBroken, ModelNotFound, RegistryUnusable
from serving_service.model import ModelVersion

log = logging.getLogger(__name__)

DESCRIBE_SECONDS = 30.0
"""Less than the gateway waits for an answer; the very first request may have to wait for the helper's imports."""
FETCH_SECONDS = 1_500.0
RESTART_SECONDS = 1.0
STDERR_BYTES = 2_000
ANSWER_BYTES = 1 << 20

_INHERITED = ("HOME", "PATH", "LANG", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_INHERITED_PREFIXES = ("MLFLOW_", "AWS_", "AZURE_", "GOOGLE_", "DATABRICKS_")


class Registry(Protocol):
    """A place that models come from."""

    async def describe(self, name: str, version: str) -> ModelVersion:
        """The registered version; raises ModelNotFound, RegistryUnusable, or Unavailable where a retry helps."""

    async def fetch(self, model: ModelVersion) -> Path:
        """The folder with the version's files; raises as `describe` does, and ModelBroken."""

    async def run(self) -> None:
        """Keeps the registry at hand until cancelled."""


def helper_environment(service: Mapping[str, str]) -> dict[str, str]:
    """What the helper gets of this service's environment: credentials of registries and stores, and little else."""
    inherited = {
        name: value for name, value in service.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    # MLflow's own default keeps trying for minutes, long after whoever asked has gone.
    return {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", **inherited}


class MlflowRegistry:
    """The registry at `uri`; what is fetched goes to the folder `models`."""

    def __init__(self, uri: str, models: Path, *, service_environment: Mapping[str, str]) -> None:
        self._uri = uri
        self._models = models
        self._environment = helper_environment(service_environment)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._helper: asyncio.subprocess.Process | None = None
        self._started = asyncio.Event()
        self._fetches: dict[str, asyncio.Task[Path]] = {}

    async def run(self) -> None:
        """Keeps a helper running until cancelled."""
        await asyncio.to_thread(self._clear_unfinished)
        try:
            while True:
                await self._run_helper()
                await asyncio.sleep(RESTART_SECONDS)
        finally:
            for task in self._fetches.values():
                task.cancel()

    async def describe(self, name: str, version: str) -> ModelVersion:
        answer = await self._ask({"op": "describe", "name": name, "version": version}, timeout=DESCRIBE_SECONDS)
        return ModelVersion(name=name, version=version, source=answer["source"], created_at=answer["created_at"])

    async def fetch(self, model: ModelVersion) -> Path:
        folder = self._models / self._key(model)
        if await asyncio.to_thread(folder.is_dir):
            return folder
        task = self._fetches.get(folder.name)
        if task is None:
            task = asyncio.create_task(self._fetch(model, folder), name=f"fetch {model.name} {model.version}")
            self._fetches[folder.name] = task
            task.add_done_callback(lambda done: self._fetched(folder.name, done))
        # Others may wait for the same files: one who gives up does not end the download.
        return await asyncio.shield(task)

    def _fetched(self, key: str, task: asyncio.Task[Path]) -> None:
        del self._fetches[key]
        if not task.cancelled():
            task.exception()  # whoever still waits has it

    async def _fetch(self, model: ModelVersion, folder: Path) -> Path:
        unfinished = Path(await asyncio.to_thread(self._make_unfinished))
        try:
            answer = await self._ask(
                {"op": "fetch", "name": model.name, "version": model.version, "destination": str(unfinished)},
                timeout=FETCH_SECONDS,
            )
            if (answer["source"], answer["created_at"]) != (model.source, model.created_at):
                raise RegistryUnusable(
                    f"Version {model.version} of model '{model.name}' was registered anew since this configuration was "
                    f"made. Update the endpoint's configuration to use the new one."
                )
            await asyncio.to_thread(Path(answer["path"]).rename, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, unfinished, ignore_errors=True)
        log.info("model fetched", extra={"model": model.name, "model_version": model.version})
        return folder

    def _make_unfinished(self) -> str:
        self._models.mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".unfinished-", dir=self._models)

    def _clear_unfinished(self) -> None:
        for folder in self._models.glob(".unfinished-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _key(self, model: ModelVersion) -> str:
        parts = [self._uri, model.name, model.version, model.source, str(model.created_at)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    async def _ask(self, request: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        number = next(self._ids)
        answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answered
        try:
            async with asyncio.timeout(timeout):
                await self._started.wait()
                self._write({"id": number, **request})
                answer = await answered
        except TimeoutError:
            raise Unavailable("The model registry did not answer in time. Try again.", retry_after=1) from None
        finally:
            del self._waiting[number]
        if "error" in answer:
            raise self._error(request, answer)
        return answer

    def _error(self, request: dict[str, Any], answer: dict[str, Any]) -> ServiceError:
        match answer["error"]:
            case "missing":
                return ModelNotFound(request["name"], request["version"])
            case "broken":
                return ModelBroken(request["name"], request["version"], answer["message"].partition(": ")[2])
            case "unreachable":
                return Unavailable("The model registry cannot be reached just now. Try again.", retry_after=1)
            case _:
                problem = answer["message"].replace(self._uri, shown(self._uri))
                return RegistryUnusable(
                    f"The model registry at {shown(self._uri)} cannot be used: {problem}. Check TESSERA_MODEL_REGISTRY."
                )

    def _write(self, message: dict[str, Any]) -> None:
        assert self._helper is not None
        assert self._helper.stdin is not None
        self._helper.stdin.write(json.dumps(message).encode() + b"\n")

    async def _run_helper(self) -> None:
        """One life of the helper; whoever waits for an answer when it ends may try again."""
        helper = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "serving_service.registry_helper",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            limit=ANSWER_BYTES,
        )
        assert helper.stdout is not None
        assert helper.stderr is not None
        self._helper = helper
        errors = asyncio.create_task(_tail(helper.stderr))
        try:
            self._write({"registry": self._uri})
            self._started.set()
            async for line in helper.stdout:
                answer = json.loads(line)
                waiting = self._waiting.get(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
            log.warning("registry helper ended", extra={"exit_code": await helper.wait(), "stderr": await errors})
        finally:
            self._started.clear()
            errors.cancel()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(Unavailable("The model registry's helper ended. Try again.", retry_after=1))
            if helper.returncode is None:
                helper.kill()
            await asyncio.shield(helper.wait())


async def _tail(stream: asyncio.StreamReader) -> str:
    """Reads to the end and returns the last of it, for a log."""
    tail = b""
    while piece := await stream.read(65_536):
        tail = (tail + piece)[-STDERR_BYTES:]
    return tail.decode(errors="replace")


def shown(uri: str) -> str:
    """A registry's address without the user and password that may be in it."""
    netloc = urlsplit(uri).netloc
    return uri.partition("?")[0].replace(netloc, netloc.rpartition("@")[2], 1)
