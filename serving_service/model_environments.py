"""The environment that each model runs in: the service's own where that has what the model was logged to need, else one
that is built for what it needs, once, and shared by all who need the same.

What is needed leads to a lock, the exact packages; a lock is kept for good, so that what is needed again needs no
index and gets the same packages. Lock, interpreter and what our model server needs are the name of the environment.
Variables and secrets of a served entity play no part.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import platform
import shutil
import sys
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

from serving_service import caches, requirements
from serving_service.buildenv import Builder, BuildImpossible, BuildLog, Interpreter
from serving_service.caches import FolderCache
from serving_service.helper_variables import HelperVariables
from serving_service.launcher import ModelPython
from serving_service.requirements import Needs, UnusableRequirements
from serving_service.shim.ring import Excerpt

log = logging.getLogger(__name__)

CONTENT = "venv"

RUNNER = (
    "httptools",
    "numpy",
    "orjson",
    "pandas",
    "uvicorn>=0.30",
    "uvloop; sys_platform != 'win32'",
)
"""What our model server needs beside MLflow, as far as the model does not say otherwise."""

OLDEST_PYTHON = (3, 11)
"""That our model server runs in."""

MOST_LOCKS = 2_000

_PROGRAM = Path(__file__).parent / "model_server"
_MAIN = """import sys

from serving_service.model_server.__main__ import main

sys.exit(main())
"""
_FORMAT = 1
"""Of locks and environments: raised when what was made before is not to be used any more."""


@dataclass
class _Build:
    """One build, and who waits for it."""

    task: asyncio.Task[str]
    log: BuildLog
    waiting: int = 0


@dataclass(frozen=True, kw_only=True)
class Places:
    """The folders that environments need, on one file system."""

    environments: Path
    packages: Path
    """uv's cache."""
    locks: Path
    runner: Path
    """Our model server, alone."""

    @classmethod
    def below(cls, directory: Path) -> Places:
        """All of them in one folder."""
        return cls(**{name: directory / name for name in ("environments", "packages", "locks", "runner")})


@dataclass(kw_only=True)
class EnvironmentLog:
    """How the environment of one launch comes about; may be read meanwhile."""

    decision: list[str] = field(default_factory=list)
    """Complete when the build begins, if there is one."""
    build: BuildLog | None = None
    outcome: str = ""
    """The cause of a failure, once it is over."""
    is_over: bool = False
    """Whether the environment is there, or never will be."""

    def text(self) -> str:
        """All of it as it is now."""
        built = self.build.text() if self.build else ""
        return "".join([*(f"{line}\n" for line in self.decision), built, f"{self.outcome}\n".lstrip()])

    def since(self, position: int) -> Excerpt:
        """What was said after the first `position` lines; the outcome, where there is one, comes in the end."""
        decided = self.decision[position:]
        built = self.build.since(max(position - len(self.decision), 0)) if self.build else Excerpt("", 0, 0)
        text = "".join([*(f"{line}\n" for line in decided), built.text, f"{self.outcome}\n".lstrip()])
        return Excerpt(text, len(self.decision) + built.position, built.missing)


class ModelEnvironments:
    """Finds and builds environments."""

    def __init__(
        self,
        places: Places,
        variables: HelperVariables,
        *,
        bound: int,
        used: Callable[[], Awaitable[Collection[str]]],
        runner: tuple[str, ...] | None = None,
        find: Callable[[str], metadata.Distribution] = metadata.distribution,
    ) -> None:
        """`bound` is for environments and packages together, in bytes; `used` reads what replicas use.

        `runner` is what the model server needs, by default ours; `find` tells what the service's own environment has.
        """
        self._places = places
        self._variables = variables
        self._cache = FolderCache(
            places.environments,
            content=CONTENT,
            bound=bound,
            used=used,
            spare=places.packages,
            is_spare_busy=lambda: bool(self._builds),
        )
        self._runner = runner
        self._find = find
        self._builds: dict[str, _Build] = {}
        self._program: Path | None = None
        self._is_untidy = asyncio.Event()
        self._interpreters: dict[str, Interpreter] = {}

    async def run(self) -> None:
        """Clears up after a predecessor; ends every build when cancelled."""
        try:
            await asyncio.to_thread(self._cache.clear_leftovers)
            await asyncio.to_thread(self._drop_old_locks)
            while True:
                await self._cache.tidy()
                await self._is_untidy.wait()
                self._is_untidy.clear()
        finally:
            for build in self._builds.values():
                build.task.cancel()
            await asyncio.gather(*(build.task for build in self._builds.values()), return_exceptions=True)

    async def of(self, model: Path, said: EnvironmentLog) -> ModelPython | None:
        """The environment for the model in a folder, None for the service's own; what is decided and done is `said`.

        Raises BuildImpossible, BuildDelayed, and OSError. A build goes on for as long as anybody waits for it.
        """
        own = platform.python_version()
        try:
            needs, reasons = await asyncio.to_thread(self._decided, model, own)
        except UnusableRequirements as error:
            raise BuildImpossible(str(error)) from None
        if not reasons:
            said.decision.append(
                f"The service's own environment (Python {own}) has what the model was logged to need; nothing is built."
            )
            return None
        said.decision.append("The service's own environment is not what the model was logged to need:")
        said.decision += [f"  {reason}" for reason in reasons]
        name = await self._built(needs, said)
        return await asyncio.to_thread(self._python, name)

    def _decided(self, model: Path, own: str) -> tuple[Needs, list[str]]:
        """What a model needs, and why the service's own environment with its Python `own` is not that."""
        needs = requirements.read(model)
        return needs, requirements.missing(needs, python=own, find=self._find)

    async def _built(self, needs: Needs, said: EnvironmentLog) -> str:
        """The name of the environment for these needs, once it is there."""
        asked = _hash([needs.python, needs.requirements, needs.constraints, [str(each) for each in needs.wheels]])
        build = self._builds.get(asked)
        if build is None:
            build = self._begun(asked, needs)
        said.build = build.log
        build.waiting += 1
        try:
            return await asyncio.shield(build.task)
        finally:
            build.waiting -= 1
            if not build.waiting and not build.task.done():
                self._builds.pop(asked, None)  # nobody may join what is being given up
                build.task.cancel()
                await asyncio.wait([build.task])

    def _begun(self, asked: str, needs: Needs) -> _Build:
        self._variables.refresh()
        said = BuildLog(self._variables.masker)
        task = asyncio.create_task(self._make(needs, said), name=f"environment {asked[:8]}")
        build = self._builds[asked] = _Build(task, said)
        task.add_done_callback(partial(self._ended, asked))
        return build

    def _ended(self, asked: str, task: asyncio.Task[str]) -> None:
        if asked in self._builds and self._builds[asked].task is task:
            del self._builds[asked]
        if not task.cancelled():
            task.exception()  # whoever still waits has it

    async def _make(self, needs: Needs, said: BuildLog) -> str:
        async with self._cache.unfinished() as folder:
            builder = Builder(
                folder=folder,
                packages=self._places.packages,
                environment=self._variables.for_packages(),
                largest_file=self._cache.bound,
                log=said,
            )
            interpreter = await self._interpreter(builder, needs.python)
            lock = await self._locked(builder, interpreter, needs)
            name = _hash([lock.read_text(), interpreter.version, str(interpreter.executable), self._needed(needs)])
            if await self._is_there(name):
                said.say(f"Environment {name} was built before, and this is how:")
                for line in (self._cache.directory / name / "build.log").read_text().splitlines():
                    said.say(line)
                return name
            said.say(f"Building environment {name} with Python {interpreter.version}")
            await builder.installed(interpreter, lock)
            await builder.compiled(interpreter)
            said.say(f"Built environment {name}")
            await asyncio.to_thread(self._keep, folder, name, interpreter, said.text())
        log.info("environment built", extra={"environment": name, "python": interpreter.version})
        self._is_untidy.set()
        return name

    def _keep(self, folder: Path, name: str, interpreter: Interpreter, said: str) -> None:
        entry = folder / "entry"
        entry.mkdir()
        (folder / CONTENT).rename(entry / CONTENT)
        (entry / "build.log").write_text(said)
        (entry / "places.json").write_text(json.dumps([str(place) for place in interpreter.places]))
        self._cache.keep(entry, name)

    async def _locked(self, builder: Builder, interpreter: Interpreter, needs: Needs) -> Path:
        """The file of the exact packages that these needs lead to."""
        asked = [_FORMAT, needs.requirements, needs.constraints, [str(each) for each in needs.wheels]]
        name = _hash([asked, self._needed(needs), interpreter.version, platform.platform()])
        lock = self._places.locks / f"{name}.txt"
        if not caches.mark_used(lock):
            for requirement in needs.requirements:
                builder.log.say(f"Requirement {requirement}")
            builder.log.say("Resolving what the requirements lead to")
            wanted = (*needs.requirements, *(str(wheel) for wheel in needs.wheels), *self._needed(needs))
            content = await builder.resolved(interpreter, wanted, needs.constraints)
            await asyncio.to_thread(_write_whole, lock, content)
        return lock

    def _needed(self, needs: Needs) -> tuple[str, ...]:
        """What the model server needs, in this model's company."""
        if self._runner is not None:
            return self._runner
        if needs.names & {"mlflow", "mlflow-skinny"}:
            return RUNNER
        return (*RUNNER, f"mlflow-skinny=={metadata.version('mlflow-skinny')}")

    async def _interpreter(self, builder: Builder, wanted: str | None) -> Interpreter:
        """An installed interpreter of that minor version, the service's own if it is one."""
        own = ".".join(platform.python_version_tuple()[:2])
        wanted = wanted or own
        known = self._interpreters.get(wanted)
        if known is not None and known.executable.exists():
            return known
        if tuple(map(int, wanted.split("."))) < OLDEST_PYTHON:
            raise BuildImpossible(
                f"The model was logged with Python {wanted}, and models are served with Python"
                f" {'.'.join(map(str, OLDEST_PYTHON))} or newer. Log it with one of these."
            )
        if wanted == own:
            found = await builder.described(Path(sys.executable).resolve())
        else:
            found = await builder.interpreter(wanted)
        if found is None:
            raise BuildImpossible(
                f"The model was logged with Python {wanted}, which is not installed here; Python {own} is. Install"
                f" Python {wanted} where Serving runs, or log the model with Python {own}."
            )
        self._interpreters[wanted] = found
        return found

    async def _is_there(self, name: str) -> bool:
        """Whether an environment is there and its interpreter works; one whose interpreter has gone is dropped."""
        if (self._cache.path(name) / "bin" / "python").exists():
            return caches.mark_used(self._cache.path(name))
        await self._cache.dropped(name)
        return False

    def _python(self, name: str) -> ModelPython:
        venv, program = self._cache.path(name), self._runner_program()
        places = json.loads((venv.parent / "places.json").read_text())
        return ModelPython(
            folder=venv,
            executable=venv / "bin" / "python",
            program=program,
            places=(*map(Path, places), venv, program),
        )

    def _runner_program(self) -> Path:
        """A folder that holds our model server and nothing else, to be run by any interpreter."""
        if self._program is None:
            sources = {path.name: path.read_bytes() for path in sorted(_PROGRAM.glob("*.py"))}
            name = _hash([[each, content.decode()] for each, content in sources.items()])
            program = self._places.runner / name
            if not program.is_dir():
                with caches.unfinished(self._places.runner) as folder:
                    made = folder / name
                    shutil.copytree(_PROGRAM, made / "serving_service" / _PROGRAM.name, ignore=_CACHES)
                    (made / "serving_service" / "__init__.py").touch()
                    (made / "__main__.py").write_text(_MAIN)
                    for path in (made, *made.rglob("*")):
                        path.chmod(0o755 if path.is_dir() else 0o644)
                    caches.keep(made, program)
            self._program = program
        return self._program

    def _drop_old_locks(self) -> None:
        locks = sorted(self._places.locks.glob("*.txt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in locks[MOST_LOCKS:]:
            path.unlink()


_CACHES = shutil.ignore_patterns("__pycache__")


def _hash(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write_whole(path: Path, content: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{id(content)}.new")
    try:
        unfinished.write_text(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
