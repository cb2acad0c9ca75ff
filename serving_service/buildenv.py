"""How an environment is made: each step is a program of its own, uv for the most part, and what it says is the log.

The rule: nothing of a package runs here. Packages are unpacked and compiled, never executed, so sources, which run
their author's program in order to be built, are refused; and the new environment's own interpreter, which would run
what a package has left for its start, is not used either.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import uv

from serving_service.shim.masking import Masker
from serving_service.shim.ring import Excerpt, LineRing, LineWriter

LOG_BYTES = 256 << 10
LINE_BYTES = 4_096

_HELD_IN = Path(__file__).parent / "held_in.py"
_DESCRIBE = """
import json, platform, sys, sysconfig
places = {sys.base_prefix, sys.base_exec_prefix, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))}
print(json.dumps([platform.python_version(), sorted(places)]))
"""
_TESTS = r"[/\\]tests?[/\\]"
"""Modules that nobody imports who serves a model, and a third of all."""
_NETWORK = ("Request failed", "Failed to fetch", "error sending request", "operation timed out", "dns error")
_REFUSED = "HTTP status client error"
_NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")
_CAUSE_LENGTH = 600


class BuildImpossible(Exception):
    """The environment cannot be made as it was asked for; the message says what is wrong and what helps."""


class BuildDelayed(Exception):
    """Something that the build needs is not there just now."""


@dataclass(frozen=True)
class Interpreter:
    """An installed Python, without any packages."""

    executable: Path
    version: str
    places: tuple[Path, ...]
    """Where it and its standard library lie."""


class BuildLog:
    """What a build says, line by line; the newest lines, without what is secret."""

    def __init__(self, masker: Masker) -> None:
        self._ring = LineRing(LOG_BYTES)
        self._masker = masker

    def say(self, line: str) -> None:
        """One line of our own."""
        writer = self.writer()
        writer.feed(line.encode())
        writer.close()

    def writer(self) -> LineWriter:
        """For the output of one program."""
        return LineWriter(self._ring, self._masker, LINE_BYTES)

    def masked(self, text: str) -> str:
        """A text without what is secret."""
        return self._masker.mask(text.encode()).decode(errors="replace")

    def text(self) -> str:
        return self._ring.tail(LOG_BYTES)

    def since(self, position: int) -> Excerpt:
        """What came after the first `position` lines."""
        return self._ring.since(position, LOG_BYTES)


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Takes the steps of one build; each raises BuildImpossible or BuildDelayed."""

    folder: Path
    """Where it works; everything that it leaves there is its own."""
    packages: Path
    """uv's cache."""
    environment: Mapping[str, str]
    """What comes from outside: certificates, and where packages are."""
    largest_file: int
    """Bytes."""
    log: BuildLog

    async def interpreter(self, version: str) -> Interpreter | None:
        """An installed Python of this `major.minor` version; None when there is none."""
        found, said = await self._run([*self._uv("python", "find"), "--no-project", version], is_logged=False)
        if found != 0:
            return None
        return await self.described(Path(said.strip().rpartition("\n")[2]))

    async def described(self, executable: Path) -> Interpreter | None:
        """What an interpreter says of itself; None when it does not work."""
        status, said = await self._run([str(executable), "-I", "-S", "-c", _DESCRIBE], is_logged=False)
        if status != 0:
            return None
        version, places = json.loads(said)
        own = executable.resolve()
        return Interpreter(own, version, (own.parent, *(Path(place) for place in places if Path(place).exists())))

    async def resolved(self, interpreter: Interpreter, requirements: Iterable[str], constraints: Iterable[str]) -> str:
        """The exact packages, with their hashes, that requirements lead to."""
        asked, limits, lock = (self.folder / name for name in ("asked.txt", "constraints.txt", "lock.txt"))
        asked.write_text("".join(f"{line}\n" for line in requirements))
        limits.write_text("".join(f"{line}\n" for line in constraints))
        options = ["--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--generate-hashes", "--no-build"]
        status, said = await self._run(
            [
                *self._uv("pip", "compile"),
                *options,
                *("--python", str(interpreter.executable)),
                *("--constraints", str(limits)),
                *("--output-file", str(lock)),
                str(asked),
            ]
        )
        if status != 0:
            raise self._failure(said, f"uv ended with status {status}.")
        return lock.read_text()

    async def installed(self, interpreter: Interpreter, lock: Path) -> None:
        """A virtual environment `venv` with the packages of a lock: from uv's cache if they are all there."""
        venv = self.folder / "venv"
        # Relocatable: it is renamed in the end, and the programs in it must not know where it was made.
        create = [*self._uv("venv"), "--quiet", "--relocatable", "--no-project"]
        status, said = await self._run([*create, "--python", str(interpreter.executable), str(venv)])
        if status != 0:
            raise self._failure(said, f"uv ended with status {status}.")
        install = [*self._uv("pip", "install"), "--python", str(venv / "bin" / "python"), "--no-deps", "--no-build"]
        install += ["--require-hashes", "--requirements", str(lock)]
        status, said = await self._run([*install, "--offline"], is_logged=False)
        if status == 0:
            self._log_output(said)
        else:
            status, said = await self._run(install)
        if status != 0:
            raise self._failure(said, f"uv ended with status {status}.")
        (venv / ".lock").unlink(missing_ok=True)  # anybody may write that

    async def compiled(self, interpreter: Interpreter) -> None:
        """Byte code beside every module, since nobody can write it later; without it a start takes twice as long."""
        self.log.say("Compiling modules")
        compile_all = [str(interpreter.executable), "-I", "-S", "-m", "compileall", "-qq", "-x", _TESTS]
        status, said = await self._run([*compile_all, str(self.folder / "venv" / "lib")], is_logged=False)
        if status < 0 or any(sign in said for sign in _NO_ROOM):
            raise self._failure(said, f"The compiler ended with status {status}.")
        # Otherwise some module is for another Python, which is nobody's concern before it is imported.

    def _failure(self, said: str, otherwise: str) -> BuildImpossible | BuildDelayed:
        return failure(self.log.masked(said), otherwise)

    def _uv(self, *command: str) -> list[str]:
        return [uv.find_uv_bin(), *command, "--no-config", "--color", "never"]

    def _log_output(self, said: str) -> None:
        writer = self.log.writer()
        writer.feed(said.encode())
        writer.close()

    async def _run(self, command: list[str], *, is_logged: bool = True) -> tuple[int, str]:
        """Runs a program to its end: its status, and the end of what it said."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(_HELD_IN), str(os.getpid()), str(self.largest_file), *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={
                **self.environment,
                "HOME": str(self.folder),
                "TMPDIR": str(self.folder),
                "UV_CACHE_DIR": str(self.packages),
                "UV_PYTHON_DOWNLOADS": "never",
                "UV_NO_PROGRESS": "1",
            },
            cwd=self.folder,
            start_new_session=True,
        )
        assert process.stdout is not None
        writer, tail = self.log.writer(), b""
        try:
            while piece := await process.stdout.read(65_536):
                tail = (tail + piece)[-65_536:]
                if is_logged:
                    writer.feed(piece)
            if is_logged:
                writer.close()
            return await process.wait(), tail.decode(errors="replace")
        finally:
            # Whole: with whatever it has started, whether it has ended itself or not.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())


def failure(said: str, otherwise: str) -> BuildImpossible | BuildDelayed:
    """What a failed program of a build means, by what it said; `otherwise` when it said nothing."""
    cause = cause_of(said) or otherwise
    if any(sign in said for sign in _NO_ROOM):
        return BuildDelayed("The disk that environments are kept on is full. Make room on it.")
    if any(sign in said for sign in _NETWORK) and _REFUSED not in said:
        return BuildDelayed(f"The package index cannot be reached just now: {cause}")
    if "no usable wheels" in said:
        cause += " Only wheels are installed, since a source runs its author's program: put a wheel into the index."
    return BuildImpossible(f"{cause} The build log says more.")


def cause_of(said: str) -> str:
    """The first error in the output of uv as one line: what it was, and why, where both are needed."""
    error, causes = "", list[str]()
    for line in said.splitlines():
        if line.startswith("error: ") and not error:
            error = line.removeprefix("error: ").strip()
        elif error and line.startswith("  cause: "):
            causes.append(line.removeprefix("  cause: ").strip())
        elif error and causes and line.startswith("         "):
            causes[-1] += f" {line.strip()}"
        elif error and not line.startswith(" "):
            break
    if not error:
        return ""
    told = causes[:1] if error.startswith("No solution found") and causes else [error, *causes[:1]]
    return f"{': '.join(told)[:_CAUSE_LENGTH].rstrip('.')}."
