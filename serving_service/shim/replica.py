"""The model process: started, watched, ended, and its state told to whoever waits for it.

Rule: the process's number is used for a signal only under the lock and only while it has not been waited for, and
STOPPED is said only when no descendant is left.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from serving_service.shim import cgroups, confinement, processes
from serving_service.shim.masking import Masker
from serving_service.shim.ring import LineRing, LineWriter
from serving_service.shim.spec import Spec

STARTING, READY, FAILED, STOPPED = "STARTING", "READY", "FAILED", "STOPPED"
_LISTEN_FD, _REPORT_FD = 3, 4
_REPORT_BYTES = 65_536
_CAUSE_BYTES = 4_096
_SILENCE_SECONDS = 2.0
"""How long after its report was closed a program that was not ready goes on before that counts as a failure."""

Become = Callable[[list[str], dict[bytes, bytes]], None]
"""How a process that is confined already becomes the program of a command, with just these variables.

It closes what is open beside the five descriptors of a model process. It raises while nothing has been run, and never
returns."""


class Replica:
    """One model process with its log and its state."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._masker = Masker(spec.masked_values)
        self._changed = threading.Condition()
        self._state, self._cause, self._since = STARTING, "", time.time()
        self._load_seconds: float | None = None
        self._pid: int | None = None
        self._exit_code: int | None = None
        self._stopping = False
        self._readers: list[threading.Thread] = []
        self.log = LineRing(spec.log_bytes)

    def start(self, listener: socket.socket, become: Become) -> None:
        """Starts the model server on `listener`; a program that cannot be started is a STOPPED replica with a cause."""
        output, output_end = _pipe()
        errors, errors_end = _pipe()
        report, report_end = _pipe()
        listen = _out_of_the_way(listener.detach())
        try:
            self._pid = _forked(self._spec, (output_end, errors_end, listen, report_end), become)
        except OSError as error:
            self._become(STOPPED, f"the model server could not be started: {error}")
        finally:
            # Only the model holds these now: its end is the end of the pipes, and nobody queues at a dead server.
            for fd in (output_end, errors_end, report_end, listen):
                os.close(fd)
        self._read(lambda: self._capture(output))
        self._read(lambda: self._capture(errors))
        self._read(lambda: self._listen_to(report))

    def identity(self) -> dict[str, Any]:
        """Number and mark of the model process and its groups, for whoever finds the replica without its shim."""
        mark = processes.started(self._pid) if self._pid else None
        return {"model_pid": self._pid, "model_mark": mark, "cgroups": self._spec.confinement.cgroups}

    def reap(self) -> None:
        """Waits for every descendant; returns when none is left. To be called by the main thread only."""
        if self._pid is None:
            cgroups.remove(self._spec.confinement.cgroups)
            return
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                break
            assert ended is not None
            with self._changed:
                status = os.waitpid(ended.si_pid, 0)[1]
                if ended.si_pid == self._pid:
                    self._exit_code = os.waitstatus_to_exitcode(status)
                if self._exit_code is not None:
                    cgroups.kill(self._spec.confinement.cgroups)
                    processes.kill_children()
        for reader in self._readers:
            reader.join(timeout=1)
        cause = self._cause or self._cause_of_exit()
        cgroups.remove(self._spec.confinement.cgroups)
        self._become(STOPPED, cause)

    def stop(self, grace_seconds: float) -> None:
        """TERM to the process group, KILL to everything after `grace_seconds`; returns when nothing is left."""
        with self._changed:
            self._stopping = True
            self._signal(signal.SIGTERM)
            if not self._changed.wait_for(lambda: self._state == STOPPED, timeout=grace_seconds):
                self._signal(signal.SIGKILL)
            self._changed.wait_for(lambda: self._state == STOPPED)

    def snapshot(self) -> dict[str, Any]:
        with self._changed:
            return {
                "replica_id": self._spec.replica_id,
                "state": self._state,
                "cause": self._cause,
                "pid": self._pid,
                "exit_code": self._exit_code,
                "since": self._since,
                "load_seconds": self._load_seconds,
            }

    def wait_for_change(self, known: str, timeout: float) -> dict[str, Any]:
        """The snapshot as soon as the state is not `known`, and after `timeout` seconds in any case."""
        with self._changed:
            self._changed.wait_for(lambda: self._state != known, timeout=timeout)
        return self.snapshot()

    def _read(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._readers.append(thread)

    def _capture(self, pipe: int) -> None:
        writer = LineWriter(self.log, self._masker, self._spec.log_line_bytes)
        while data := os.read(pipe, 65_536):
            writer.feed(data)
        writer.close()

    def _listen_to(self, pipe: int) -> None:
        """Takes the first report that makes sense. The model is not trusted: anything else is passed over."""
        with os.fdopen(pipe, "rb") as reports:
            while self._state == STARTING and (line := reports.readline(_REPORT_BYTES)):
                # Numbers beyond a float and brackets beyond the stack are among what a hostile writer can send.
                with contextlib.suppress(ValueError, OverflowError, RecursionError):
                    self._take(json.loads(line))
        with self._changed:
            # A program that ends closes it too, and how it ended says more.
            is_over = self._changed.wait_for(
                lambda: self._state != STARTING or self._exit_code is not None, timeout=_SILENCE_SECONDS
            )
            if not is_over and not self._stopping:
                self._become(FAILED, "the model server closed its report without saying that it is ready")

    def _take(self, report: Any) -> None:
        match report:
            case {"event": "ready", "load_seconds": int() | float() as seconds}:
                self._load_seconds = float(seconds)
                self._become(READY)
            case {"event": "failed", "cause": str() as cause}:
                self._become(FAILED, self._masked(cause))

    def _become(self, state: str, cause: str = "") -> None:
        with self._changed:
            if self._state != STOPPED:
                self._state, self._cause, self._since = state, cause, time.time()
                self._changed.notify_all()

    def _signal(self, number: signal.Signals) -> None:
        if self._pid is not None and self._exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, number)

    def _masked(self, text: str) -> str:
        return self._masker.mask(text.encode("utf-8", "replace"), limit=_CAUSE_BYTES).decode("utf-8", "replace")

    def _cause_of_exit(self) -> str:
        code = self._exit_code
        if self._stopping or code is None:
            return ""
        how = f"exited with status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL and cgroups.has_run_out_of_memory(self._spec.confinement.cgroups):
            how = "used all the memory that it may"
        return f"the model server {how}" + (" before it was ready" if self._state == STARTING else "")


def execute(command: list[str], environment: dict[bytes, bytes]) -> None:
    """Executes the program; every descriptor but the five is closed by that."""
    os.execve(command[0], command, environment)  # noqa: S606 (no shell is what is meant)


def _forked(spec: Spec, inherited: tuple[int, int, int, int], become: Become) -> int:
    """Starts the model process and returns its number; raises OSError with what was in the way.

    A fork, not a spawn, because there is much to give up before the program runs. This process has one thread so far.
    """
    told, tells = _pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _become_model(spec, inherited, become)
        except BaseException as error:
            cause = error.strerror if isinstance(error, OSError) else str(error)
            os.write(tells, (cause or type(error).__name__).encode("utf-8", "replace"))
        finally:
            os._exit(127)
    os.close(tells)
    with os.fdopen(told, "rb") as pipe:
        cause = pipe.read().decode("utf-8", "replace")  # its end is the start of the program, which closes it
    if cause:
        os.waitpid(pid, 0)
        raise OSError(cause)
    return pid


def _become_model(spec: Spec, inherited: tuple[int, int, int, int], become: Become) -> None:
    """Becomes the model server, in the forked process; raises where that cannot be."""
    os.setsid()
    output_end, errors_end, listen, report_end = inherited
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for source, number in ((output_end, 1), (errors_end, 2), (listen, _LISTEN_FD), (report_end, _REPORT_FD)):
        os.dup2(source, number)
    words = {"{listen_fd}": str(_LISTEN_FD), "{report_fd}": str(_REPORT_FD)}
    command = [words.get(word, word) for word in spec.command]
    confinement.enter(spec.confinement)
    os.chdir(spec.working_directory)  # again, for it may be another one in the model's own view
    environment = {name.encode(): value.encode() for name, value in spec.environment.items()}
    become(command, environment)


def _pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    return reading, _out_of_the_way(writing)


def _out_of_the_way(fd: int) -> int:
    """Moves `fd` above the numbers that the model process gets, so that no duplication overwrites a source."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved
