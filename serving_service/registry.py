"""Where models come from: the MLflow registry, asked through a helper process, and a folder of what was fetched.

The helper is started with the service, so that it is warm, and again when it died or its credentials have changed;
every request has a deadline. A model version is fetched once, into a cache; what is there is looked through before it
is used for the first time, and fetched anew when it is not whole.

The rule: what a version's files were when they were first fetched is recorded, and no others are ever launched. Who may
write to a model store, or into the cache, gets no secrets of those who chose the version when it held something else.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import sys
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from servicekit.errors import ServiceError, Unavailable
from servicekit.storage import Storage
from serving_service import caches, store
from serving_service.caches import DamagedError, FolderCache
from serving_service.errors import DiskFull, ModelBroken, ModelChanged, ModelNotFound, RegistryUnusable
from serving_service.helper_variables import HelperVariables
from serving_service.model import ModelVersion

log = logging.getLogger(__name__)

DESCRIBE_SECONDS = 30.0
"""Less than the gateway waits for an answer; the very first request may have to wait for the helper's imports."""
FETCH_SECONDS = 1_500.0
RESTART_SECONDS = 1.0
STDERR_BYTES = 2_000
ANSWER_BYTES = 1 << 20

MODEL_FOLDER = "model"
"""Of a cached version."""


class Registry(Protocol):
    """A place that models come from."""

    async def describe(self, name: str, version: str) -> ModelVersion:
        """The registered version; raises ModelNotFound, RegistryUnusable, or Unavailable where a retry helps."""

    async def fetch(self, model: ModelVersion) -> Path:
        """The folder with the version's files; raises as `describe` does, ModelBroken and ModelChanged."""

    async def run(self) -> None:
        """Keeps the registry at hand until cancelled."""


class MlflowRegistry:
    """The registry at `uri`; what is fetched goes into `models`, and what it was into `database`.

    Nothing is taken from `closed`, folders of the platform on this machine, whatever the registry says.
    """

    def __init__(
        self,
        uri: str,
        models: FolderCache,
        variables: HelperVariables,
        database: Storage,
        *,
        closed: Collection[Path],
    ) -> None:
        self._uri = uri
        self._closed = [str(folder) for folder in closed]
        self._database = database
        self._models = models
        self._variables = variables
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._helper: asyncio.subprocess.Process | None = None
        self._started = asyncio.Event()
        self._is_outdated = False
        self._is_untidy = asyncio.Event()
        self._fetches: dict[str, asyncio.Task[Path]] = {}
        self._checked: set[str] = set()
        """What was looked through, byte by byte, since this process began."""

    async def run(self) -> None:
        """Keeps a helper running until cancelled."""
        await asyncio.to_thread(self._models.clear_leftovers)
        try:
            async with asyncio.TaskGroup() as both:  # neither goes on without the other, unnoticed
                both.create_task(self._tidy(), name="tidying models")
                both.create_task(self._keep_helper(), name="registry helper")
        finally:
            for task in self._fetches.values():
                task.cancel()

    async def _keep_helper(self) -> None:
        while True:
            try:
                await self._run_helper()
            except (OSError, RuntimeError) as error:  # no process to be had just now, or one that ended as it began
                facts = {"problem": type(error).__name__, "number": getattr(error, "errno", None)}
                log.warning("registry helper cannot be started", extra=facts)
            await asyncio.sleep(RESTART_SECONDS)

    async def _tidy(self) -> None:
        while True:
            await self._models.tidy()
            await self._is_untidy.wait()
            self._is_untidy.clear()

    async def describe(self, name: str, version: str) -> ModelVersion:
        answer = await self._ask({"op": "describe", "name": name, "version": version}, timeout=DESCRIBE_SECONDS)
        known = {each: answer[each] for each in ("source", "created_at", "location")}
        return ModelVersion(name=name, version=version, **known)

    async def fetch(self, model: ModelVersion) -> Path:
        key = self._key(model)
        task = self._fetches.get(key)
        if task is None:
            digest = await asyncio.to_thread(self._whole, key)
            if digest is not None and await self._is_as_first(model, digest):
                return self._models.path(key)
            task = self._fetches.get(key)
        if task is None:
            task = asyncio.create_task(self._fetch(model, key), name=f"fetch {model.name} {model.version}")
            self._fetches[key] = task
            task.add_done_callback(lambda done: self._fetched(key, done))
        # Others may wait for the same files: one who gives up does not end the download.
        return await asyncio.shield(task)

    def _fetched(self, key: str, task: asyncio.Task[Path]) -> None:
        del self._fetches[key]
        if not task.cancelled():
            task.exception()  # whoever still waits has it

    def _whole(self, key: str) -> str | None:
        """The digest of a version that is there as it was fetched."""
        try:
            digest = caches.check(self._models.path(key), digests=key not in self._checked)
        except DamagedError as error:
            if (self._models.directory / key).exists():
                log.warning("a cached model is fetched anew", extra={"folder": key, "cause": str(error)})
            return None
        self._checked.add(key)
        return digest

    async def _is_as_first(self, model: ModelVersion, digest: str) -> bool:
        """Whether files are those that were fetched first; files that nobody knows are, from now on."""
        first = await self._database.read(store.first_digest, model)
        if first is None:
            first = await self._database.write(store.keep_first_digest, model, digest)
        if digest != first:
            facts = {"model": model.name, "model_version": model.version}
            log.warning("files of a model are not those that were fetched first", extra=facts)
        return digest == first

    async def _fetch(self, model: ModelVersion, key: str) -> Path:
        async with self._models.unfinished() as folder:
            request = {"op": "fetch", "name": model.name, "version": model.version, "destination": str(folder)}
            answer = await self._ask(request, timeout=FETCH_SECONDS)
            if (answer["source"], answer["created_at"]) != (model.source, model.created_at):
                raise RegistryUnusable(
                    f"Version {model.version} of model '{model.name}' was registered anew since this configuration was "
                    f"made. Update the endpoint's configuration to use the new one."
                )
            if model.location not in (None, answer["location"]):
                raise RegistryUnusable(
                    f"The model registry has version {model.version} of model '{model.name}' at another place than "
                    f"when this configuration was made. Update the endpoint's configuration to use what is there now."
                )
            try:
                entry, digest = await asyncio.to_thread(_sealed, folder, Path(answer["path"]))
            except DamagedError as error:
                raise ModelBroken(model.name, model.version, str(error)) from None
            # Before they have their name: what is found under it is launched.
            if not await self._is_as_first(model, digest):
                raise ModelChanged(model.name, model.version)
            await asyncio.to_thread(self._keep, entry, key)
        log.info("model fetched", extra={"model": model.name, "model_version": model.version})
        self._is_untidy.set()
        return self._models.path(key)

    def _keep(self, entry: Path, key: str) -> None:
        self._models.drop(key)  # what is there is not whole, or not what it was
        self._models.keep(entry, key)
        self._checked.add(key)

    def _key(self, model: ModelVersion) -> str:
        parts = [self._uri, model.name, model.version, model.source, str(model.created_at)]
        parts += [] if model.location is None else [model.location]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    async def _ask(self, request: dict[str, Any], *, timeout: float) -> dict[str, Any]:
        self._refresh()
        number = next(self._ids)
        answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._started.wait()
                self._waiting[number] = answered
                self._write({"id": number, **request})
                answer = await answered
        except TimeoutError:
            raise Unavailable("The model registry did not answer in time. Try again.", retry_after=1) from None
        except RuntimeError:  # uvloop knows of the helper's end before we do
            raise _helper_ended() from None
        finally:
            self._waiting.pop(number, None)
        if "error" in answer:
            raise self._error(request, answer)
        return answer

    def _refresh(self) -> None:
        """Has a helper with the old credentials ended, once nobody waits for its answers."""
        self._is_outdated = self._variables.refresh() or self._is_outdated
        if self._is_outdated and not self._waiting and self._helper is not None and self._helper.returncode is None:
            self._started.clear()
            self._helper.kill()

    def _error(self, request: dict[str, Any], answer: dict[str, Any]) -> ServiceError:
        problem = self._variables.redacted(answer["message"].replace(self._uri, shown(self._uri)))
        match answer["error"]:
            case "missing":
                return ModelNotFound(request["name"], request["version"])
            case "broken":
                return ModelBroken(request["name"], request["version"], problem.partition(": ")[2])
            case "unreachable":
                return Unavailable("The model registry cannot be reached just now. Try again.", retry_after=1)
            case "incomplete":
                return Unavailable(f"The download was not complete: {problem}. Try again.", retry_after=1)
            case "full":
                return DiskFull()
            case _:
                return RegistryUnusable(
                    f"The model registry at {shown(self._uri)} cannot be used: {problem}. Check TESSERA_MODEL_REGISTRY."
                )

    def _write(self, message: dict[str, Any]) -> None:
        assert self._helper is not None
        assert self._helper.stdin is not None
        self._helper.stdin.write(json.dumps(message).encode() + b"\n")

    async def _run_helper(self) -> None:
        """One life of the helper; whoever waits for an answer when it ends may try again."""
        self._is_outdated = False
        helper = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "serving_service.registry_helper",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._variables.for_registry(),
            limit=ANSWER_BYTES,
        )
        assert helper.stdout is not None
        assert helper.stderr is not None
        self._helper = helper
        errors = asyncio.create_task(_tail(helper.stderr))
        try:
            self._write({"registry": self._uri, "closed": self._closed})
            self._started.set()
            async for line in helper.stdout:
                answer = json.loads(line)
                waiting = self._waiting.get(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
            said = self._variables.redacted(await errors)
            log.warning("registry helper ended", extra={"exit_code": await helper.wait(), "stderr": said})
        finally:
            self._started.clear()
            errors.cancel()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(_helper_ended())
            if helper.returncode is None:
                helper.kill()
            await asyncio.shield(helper.wait())


def _helper_ended() -> Unavailable:
    return Unavailable("The model registry's helper ended. Try again.", retry_after=1)


def _sealed(folder: Path, fetched: Path) -> tuple[Path, str]:
    """Makes an entry of the cache in a folder, and tells its digest."""
    entry = folder / f"entry-{uuid.uuid4().hex}"
    entry.mkdir()
    fetched.rename(entry / MODEL_FOLDER)
    return entry, caches.seal(entry / MODEL_FOLDER)


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
