"""The only door to replica processes: starting them, finding them again, asking and stopping them.

A replica is a shim with a model server (`serving_service/shim`). Its directory is its identity: the lock in it is held
for as long as the shim lives, and the control socket in it answers with the replica's id. A process number alone is
never believed. Replicas are nobody's children here; they belong to init, and go on when this process ends.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from serving_service import gpus as gpu_rules
from serving_service.cgroups import Cgroups
from serving_service.shim import cgroups as members
from serving_service.shim import processes
from serving_service.shim.confinement import Confinement
from serving_service.shim.ring import Excerpt
from serving_service.shim.spec import Spec
from serving_service.shim.supervisor import is_held
from serving_service.template import ShimRefusedError, Template

log = logging.getLogger(__name__)

_SHIM = Path(__file__).parent / "shim" / "__main__.py"
_START_SECONDS = 20.0
_ANSWER_SECONDS = 5.0
_LONG_POLL_SECONDS = 40.0  # the shim answers a wait after 30 s
_ANSWER_BYTES = 64 * 2**20  # a full log, with every byte escaped

OPEN_FILES = 1_024
"""How many files a model process may have open."""

USER_PROCESSES = 2_048
"""How many processes and threads the user of an endpoint may have, in all its replicas together."""

OWN_VARIABLES = frozenset({"PATH", "HOME", "TMPDIR", "PYTHONUNBUFFERED"})
"""The variables that every replica gets from us and that nobody may declare."""

_CODE_VARIABLES = frozenset({"PYTHONWARNINGS", "BROWSER"})
_CODE_PREFIXES = ("LD_", "_PYTHON")
"""Variables through which a value alone is code: they make the interpreter load a module of the value's choice, and the
standard library has one that runs `BROWSER`. Who deploys a model is to get that model's code and none of its own."""

_CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


class ReplicaState(StrEnum):
    STARTING = "STARTING"
    READY = "READY"
    FAILED = "FAILED"
    """The model server said why it cannot start; it is about to end."""
    STOPPED = "STOPPED"
    """No process of the replica is left; its log can be read until it is dismissed."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A replica as its shim sees it at one moment."""

    replica_id: str
    state: ReplicaState
    cause: str
    """Why it failed or ended unasked; empty when there is nothing to say."""
    pid: int | None
    exit_code: int | None
    """The exit status of the model server, negative for the signal that ended it; None while it runs."""
    since: float
    """When the state began, in seconds since the epoch."""
    load_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class ModelPython:
    """The Python environment of a model that does not run in the service's own."""

    folder: Path
    """The environment itself: it is there, unchanged, for as long as it is used."""
    executable: Path
    program: Path
    """A folder that holds our model server, which is run with it, and nothing else of ours."""
    places: tuple[Path, ...]
    """Where all that it imports lies, the program included."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Everything a replica is started from."""

    replica_id: str
    model_path: Path
    environment: Mapping[str, str] = field(repr=False)
    """The declared variables with their references resolved; the launcher adds its own."""
    masked_values: tuple[str, ...] = field(default=(), repr=False)
    command: tuple[str, ...] | None = None
    """Another program than our model server: an absolute path and arguments; see `Spec.command`."""
    user: int | None = None
    """The user and group that it runs as, and that is nobody else's; None: the service's own."""
    python: ModelPython | None = None
    """The environment that it runs in; None: the service's own."""
    gpus: tuple[str, ...] | None = None
    """The GPUs that it has, by UUID; None: this machine has no driver for any, and it is told nothing of them."""


class LaunchError(Exception):
    """The shim itself could not be started; nothing runs."""


class ReplicaGoneError(Exception):
    """Nobody answers for the replica: its shim has ended."""

    def __init__(self, replica_id: str) -> None:
        super().__init__(f"Replica {replica_id} is gone: its process does not answer any more.")


class ReplicaHandle(Protocol):
    """One replica. Every method but `stop` raises ReplicaGoneError when its shim has ended.

    All raise OSError where it cannot be asked just now, which says nothing about it.
    """

    @property
    def replica_id(self) -> str: ...
    @property
    def address(self) -> str:
        """Where the model server answers HTTP: `unix:<path>`."""

    async def state(self) -> Observation: ...
    async def wait(self, known: ReplicaState) -> Observation:
        """Returns as soon as the state is another one than `known`, however long that takes."""

    async def logs(self, max_bytes: int) -> str:
        """The newest whole lines of output that fit into `max_bytes`; secrets of the launch are masked."""

    async def output(self, max_bytes: int, *, after: int = 0) -> Excerpt:
        """As `logs`, of what came after the first so many lines."""

    async def stop(self, grace_seconds: float, *, dismiss: bool = True) -> None:
        """Ends the replica and all its descendants: TERM, and KILL after `grace_seconds`; safe to repeat.

        With `dismiss` the shim, the log and the directory are gone too when this returns.
        """


class Launcher(Protocol):
    async def start(self, launch: Launch) -> ReplicaHandle:
        """Starts a replica and returns while its model still loads; raises LaunchError."""

    async def adopt(self) -> dict[str, ReplicaHandle]:
        """The replicas that run, by id, whoever started them; what dead ones left behind is removed."""


def is_reserved(name: str) -> bool:
    """Whether a variable of this name belongs to the platform, so that a served entity may not declare it."""
    return name in OWN_VARIABLES | _CODE_VARIABLES or name.startswith(_CODE_PREFIXES)


def model_environment(
    declared: Mapping[str, str],
    *,
    directory: Path,
    service: Mapping[str, str],
    python: ModelPython | None = None,
    gpus: tuple[str, ...] | None = None,
) -> dict[str, str]:
    """The whole environment of a model process: the declared variables and a short set of our own, nothing else.

    Of `service`, the environment of this service, only the search path and the certificate bundle are passed on: the
    rest may hold anything. The programs of `python` come first in the search path. `gpus` are those that it may use;
    None: nothing is said of them. Raises ValueError for a reserved name.
    """
    path = service.get("PATH", os.defpath)
    if reserved := sorted(filter(is_reserved, declared)):
        raise ValueError(f"reserved environment variables cannot be declared: {', '.join(reserved)}")
    return {
        "LANG": "C.UTF-8",
        "LC_CTYPE": "C.UTF-8",
        **{name: service[name] for name in _CERTIFICATES if name in service},
        **declared,
        "PATH": f"{python.executable.parent}{os.pathsep}{path}" if python else path,
        "HOME": str(directory / "work"),
        "TMPDIR": str(directory / "tmp"),
        "PYTHONUNBUFFERED": "1",
        **({} if gpus is None else {gpu_rules.VISIBLE: ",".join(gpus)}),
    }


def replica_socket(directory: Path) -> Path:
    """Where the model server of the replica in a directory listens."""
    return directory / "http.sock"


class LocalReplica:
    """A replica on this machine, reached through the control socket in its directory."""

    def __init__(self, directory: Path, epoch: int) -> None:
        self._directory = directory
        self._epoch = epoch

    @property
    def replica_id(self) -> str:
        return self._directory.name

    @property
    def address(self) -> str:
        return f"unix:{replica_socket(self._directory)}"

    async def state(self) -> Observation:
        return _observation(await self._ask({"op": "state"}))

    async def wait(self, known: ReplicaState) -> Observation:
        while True:
            seen = _observation(await self._ask({"op": "wait", "state": known}, timeout=_LONG_POLL_SECONDS))
            if seen.state != known:
                return seen

    async def logs(self, max_bytes: int) -> str:
        return (await self.output(max_bytes)).text

    async def output(self, max_bytes: int, *, after: int = 0) -> Excerpt:
        said = await self._ask({"op": "logs", "max_bytes": max_bytes, "after": after})
        return Excerpt(said["logs"], said["position"], said["missing"])

    async def stop(self, grace_seconds: float, *, dismiss: bool = True) -> None:
        request = {"op": "stop", "grace_seconds": grace_seconds, "dismiss": dismiss}
        try:
            await self._ask(request, timeout=grace_seconds + _ANSWER_SECONDS, until_closed=dismiss)
        except ReplicaGoneError:
            await asyncio.to_thread(_remove_dead, self._directory)

    async def _ask(
        self, request: dict[str, Any], *, timeout: float = _ANSWER_SECONDS, until_closed: bool = False
    ) -> dict[str, Any]:
        """One request and its answer; raises ReplicaGoneError, and OSError when that is not known.

        A shim that lives and does not answer is a TimeoutError.
        """
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_unix_connection(
                    self._directory / "control.sock", limit=_ANSWER_BYTES
                )
                try:
                    writer.write(json.dumps({**request, "epoch": self._epoch}).encode() + b"\n")
                    writer.write_eof()  # what is refused is not followed by an end of the shim: it closes then
                    line = await reader.readline()
                    if until_closed:
                        await reader.read()
                finally:
                    writer.close()
        except (FileNotFoundError, ConnectionError):  # any other error, such as of having no descriptor left, is ours
            raise ReplicaGoneError(self.replica_id) from None
        if not line.endswith(b"\n"):
            raise ReplicaGoneError(self.replica_id)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"Replica {self.replica_id} refused a request: {answer['error']}")
        return answer


class LocalLauncher:
    """Replicas as processes of this machine, each with its directory below one `directory`."""

    def __init__(
        self,
        directory: Path,
        supervisor_lock: Path | None,
        *,
        service_environment: Mapping[str, str],
        epoch: int = 0,
        cgroups: Cgroups | None = None,
        template: Template | None = None,
        orphan_seconds: float = 60,
        idle_seconds: float = 24 * 3600,
        log_bytes: int = 10 * 2**20,
        log_line_bytes: int = 16 * 2**10,
    ) -> None:
        """`service_environment` is what `model_environment` may take from, `cgroups` where every replica gets groups.

        `template`: what replicas are forked from that may be; None: every one is a program of its own. `epoch`: shims
        obey none that is lower than one that they have heard of. For the rest see `Spec`.
        """
        self._epoch = epoch
        self._cgroups = cgroups
        self._template = template
        self._directory = directory
        self._supervisor_lock = supervisor_lock
        self._service_environment = service_environment
        bundles = [Path(service_environment[name]) for name in _CERTIFICATES if name in service_environment]
        self._certificates = [bundle for bundle in bundles if bundle.is_absolute() and bundle.exists()]
        self._orphan_seconds, self._idle_seconds = orphan_seconds, idle_seconds
        self._log_bytes, self._log_line_bytes = log_bytes, log_line_bytes

    async def start(self, launch: Launch) -> LocalReplica:
        # A caller that is cancelled leaves a replica behind that `adopt` finds: a started one is never half there.
        return await asyncio.to_thread(self._start, launch)

    async def adopt(self) -> dict[str, ReplicaHandle]:
        found = await asyncio.gather(*map(self._adopted, await asyncio.to_thread(self._directories)))
        return {replica.replica_id: replica for replica in found if replica is not None}

    def _start(self, launch: Launch) -> LocalReplica:
        directory = self._directory / launch.replica_id
        service = self._service_environment
        environment = model_environment(
            launch.environment, directory=directory, service=service, python=launch.python, gpus=launch.gpus
        )
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            raise LaunchError(f"A replica {launch.replica_id} exists already.") from None
        groups = self._cgroups.named(launch.replica_id) if self._cgroups else []
        try:
            self._begin(launch, directory, environment, groups)
        except BaseException:  # whatever it is: the next try has another directory
            members.kill(groups)
            members.remove(groups)
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return LocalReplica(directory, self._epoch)

    def _begin(self, launch: Launch, directory: Path, environment: dict[str, str], groups: list[str]) -> None:
        """Starts a replica in a directory that was made; what a failure leaves is the caller's to remove."""
        for name in ("work", "tmp"):
            (directory / name).mkdir(mode=0o700)
            if launch.user is not None:
                os.chown(directory / name, launch.user, launch.user)
        with _locked(directory / "lock") as lock:
            # Before they are made, so that a successor of this process finds them whenever it ends.
            os.write(lock, json.dumps({"model_pid": None, "cgroups": groups}).encode())
            spec = Spec(
                replica_id=launch.replica_id,
                epoch=self._epoch,
                directory=str(directory),
                lock_fd=lock,
                working_directory=str(directory / "work"),
                command=list(launch.command or _model_server(launch)),
                environment=environment,
                masked_values=list(launch.masked_values),
                confinement=_confinement(launch, directory, self._certificates, groups),
                supervisor_lock=str(self._supervisor_lock) if self._supervisor_lock else None,
                orphan_seconds=self._orphan_seconds,
                idle_seconds=self._idle_seconds,
                log_bytes=self._log_bytes,
                log_line_bytes=self._log_line_bytes,
            )
            self._make_groups(launch.replica_id)
            if not self._forked(launch, spec):
                _spawn_shim(spec)

    def _forked(self, launch: Launch, spec: Spec) -> bool:
        """Has a shim forked from the template, if that is possible; else nothing runs, and nothing is in the way."""
        is_own_program = launch.command is not None or launch.python is not None
        # What speaks to a GPU reads its variables once, and is forked from nothing.
        if is_own_program or launch.gpus or self._template is None or not self._template.suits(launch.environment):
            return False
        try:
            is_forked = self._template.start(spec)
        except (ShimRefusedError, TimeoutError) as error:
            raise LaunchError(f"Replica {spec.replica_id} did not start: {error}") from None
        if not is_forked:
            for name in ("http.sock", "control.sock"):
                Path(spec.directory, name).unlink(missing_ok=True)
        return is_forked

    def _make_groups(self, replica_id: str) -> None:
        try:
            if self._cgroups:
                self._cgroups.make(replica_id)
        except OSError as error:
            raise LaunchError(f"Replica {replica_id} gets no control group: {error.strerror}.") from None

    def _directories(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(path for path in self._directory.iterdir() if path.is_dir())
        return []

    async def _adopted(self, directory: Path) -> LocalReplica | None:
        """The replica of a directory; None after the remains of a dead one were removed."""
        replica = LocalReplica(directory, self._epoch)
        try:
            async with asyncio.timeout(_START_SECONDS):
                while await asyncio.to_thread(is_held, directory / "lock"):
                    with contextlib.suppress(ReplicaGoneError, OSError):
                        if (await replica.state()).replica_id == replica.replica_id:
                            return replica
                    await asyncio.sleep(0.05)  # a shim that was started a moment ago has its lock before its socket
        except TimeoutError:
            log.warning("replica does not answer, though its lock is held", extra={"replica": replica.replica_id})
            return None
        await asyncio.to_thread(_remove_dead, directory)
        return None


def _model_server(launch: Launch) -> list[str]:
    # -P: the model's working directory must not provide modules.
    if launch.python is None:
        program = [sys.executable, "-P", "-u", "-m", "serving_service.model_server"]
    else:
        program = [str(launch.python.executable), "-P", "-u", str(launch.python.program)]
    return [*program, "--model", str(launch.model_path), "--fd", "{listen_fd}", "--report-fd", "{report_fd}"]


def _spawn_shim(spec: Spec) -> None:
    """Hands the spec over; returns when the shim has detached, owning its sockets."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_SHIM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        pass_fds=[spec.lock_fd],
        start_new_session=True,  # an interrupt from the terminal must not reach it on its way either
    )
    try:
        _, errors = process.communicate(spec.to_frame(), timeout=_START_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise LaunchError(f"Replica {spec.replica_id} did not start within {_START_SECONDS:.0f} s.") from None
    if process.returncode != 0:
        reason = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise LaunchError(f"Replica {spec.replica_id} did not start: {reason or 'its shim ended'}")


def _confinement(launch: Launch, directory: Path, certificates: list[Path], groups: list[str]) -> Confinement:
    if launch.user is None:
        return Confinement(open_files=OPEN_FILES, cgroups=groups)
    if launch.command is None:
        _let_read(launch.model_path)
    interpreter = launch.python.places if launch.python else _interpreter()
    return Confinement(
        open_files=OPEN_FILES,
        cgroups=groups,
        user=launch.user,
        user_processes=USER_PROCESSES,
        readable=[str(path) for path in (*interpreter, *certificates, launch.model_path.absolute())],
        writable=[str(directory / "work"), str(directory / "tmp")],
    )


def _interpreter() -> list[Path]:
    """Where this interpreter and all that it imports lie."""
    places = {Path(sys.executable).resolve().parent, *map(Path, (sys.prefix, sys.base_prefix, *sys.path))}
    return sorted(place for place in places if place.is_absolute() and place.exists())


def _let_read(model: Path) -> None:
    """Lets whoever comes as far read a model's files, and nobody else than us write them."""
    for _, _, files, directory in os.fwalk(model):
        os.fchmod(directory, 0o755)
        for name in files:
            mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
            if stat.S_ISREG(mode):  # what a link leads to is not the model's
                os.chmod(name, 0o644 | (mode & 0o111), dir_fd=directory)


@contextlib.contextmanager
def _locked(path: Path) -> Any:
    """Holds a lock for the caller; a process that inherits the number goes on holding it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _remove_dead(directory: Path) -> None:
    """Clears up after a shim that ended without doing so: its model, if that still runs, and the directory."""
    if is_held(directory / "lock"):
        return
    with contextlib.suppress(OSError, ValueError, KeyError):
        identity = json.loads((directory / "lock").read_bytes())
        if identity["model_pid"] is not None:
            processes.kill_session(identity["model_pid"], identity["model_mark"])
        members.kill(identity["cgroups"])
        members.remove(identity["cgroups"])
    shutil.rmtree(directory, ignore_errors=True)


def _observation(answer: dict[str, Any]) -> Observation:
    return Observation(**{**answer, "state": ReplicaState(answer["state"])})
