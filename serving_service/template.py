"""Keeps the template (`serving_service/warm`) running, and has shims forked from it.

It is a way to be quick and never a condition: whoever asks is told where there is none just now, or where it ended over
the question, and starts programs instead. Replicas that were forked do not need it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from serving_service.shim.spec import Spec
from serving_service.warm import OK

log = logging.getLogger(__name__)

_FILL_SECONDS = 120.0
_ANSWER_SECONDS = 5.0
_MESSAGE_BYTES = 1 << 20
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 300.0
_GOOD_SECONDS = 600.0

_ROOM = "_" * 1_024

_ITS_OWN = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it is nobody's session
}
"""What only the template is told: to have one thread above all. What is forked from it looks again."""

_READ_AT_START = frozenset({"TZ", "TZDIR", "LANG", "LANGUAGE"})
_PREFIXES_READ_AT_START = (
    "PYTHON", "LD_", "OMP_", "OPENBLAS_", "MKL_", "MALLOC_", "MLFLOW_", "LC_",
    # What the libraries read that are loaded by then: found by looking at every call of `getenv` while they are.
    "GFORTRAN_", "GLIBC_", "GOTO_", "NPY_", "NUMPY_", "OPENSSL_", "PSUTIL_",
)  # fmt: skip
"""How the names of variables begin that an interpreter or a library reads once, when it starts or is loaded."""


def is_read_at_start(name: str, read: Set[str]) -> bool:
    """Whether a variable has an effect only where it is set before the start; `read` is what was looked at since."""
    return name in read | _READ_AT_START or name.startswith(_PREFIXES_READ_AT_START)


class ShimRefusedError(Exception):
    """A shim was forked and could not begin; the message says what was in the way."""


@dataclass(frozen=True)
class _Life:
    """A template that is ready."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    read: frozenset[str]
    """The variables that were looked at while it imported."""


class Template:
    """The template of one Serving. `start` and `suits` may be called from any thread."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment` is what a model without declared variables would get; all forked models share what is made of
        it, but for HOME and TMPDIR."""
        self._environment = {**environment, **_ITS_OWN}
        self._lock = threading.Lock()
        self._life: _Life | None = None
        self._said = ""

    async def run(self) -> None:
        """Keeps a template running until cancelled."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = time.monotonic()
            await self._live()
            pause = _FIRST_PAUSE_SECONDS if time.monotonic() - began > _GOOD_SECONDS else pause
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def suits(self, declared: Iterable[str]) -> bool:
        """Whether a model with variables of these names can be forked: none is read before it is set."""
        life = self._life
        return life is not None and not any(is_read_at_start(name, life.read) for name in declared)

    def start(self, spec: Spec) -> bool:
        """Has a shim forked; it owns its sockets when this returns.

        False: there is none, and nothing else is left of the attempt but perhaps sockets in the replica's directory.
        Raises ShimRefusedError, and TimeoutError when nobody knows.
        """
        told, telling = os.pipe()
        with os.fdopen(told, "rb", buffering=0) as pipe:
            try:
                life = self._sent(spec, telling)
            finally:
                os.close(telling)  # the shim alone holds it now: when it is closed, the shim has begun or is gone
            if life is None:
                return False
            said = _all(pipe.fileno(), _ANSWER_SECONDS)
            if said is None:
                self._kill(life)
                said = _all(pipe.fileno(), _ANSWER_SECONDS)
        if said is None:
            raise TimeoutError("a shim that was forked says nothing")
        if said not in (b"", OK):
            raise ShimRefusedError(said.decode("utf-8", "replace"))
        return said == OK

    def _sent(self, spec: Spec, telling: int) -> _Life | None:
        """The template that has got the order; None when there is none to take it."""
        # Not a pipe: a template that does not read it must not hold anybody up.
        with os.fdopen(os.memfd_create("spec", os.MFD_CLOEXEC), "r+b") as document:
            document.write(spec.to_frame())
            document.seek(0)
            with self._lock, contextlib.suppress(OSError):
                if self._life is not None:
                    socket.send_fds(self._life.control, [b"launch"], [spec.lock_fd, document.fileno(), telling])
                    return self._life
        return None

    async def _live(self) -> None:
        """One life of the template."""
        loop = asyncio.get_running_loop()
        control, its_own = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        process: subprocess.Popen[bytes] | None = None
        try:
            with its_own:
                process = _spawned(self._environment, its_own)
            async with asyncio.timeout(_FILL_SECONDS):
                said = json.loads(await loop.sock_recv(control, _MESSAGE_BYTES) or b'{"event":"ended"}')
            if said["event"] == "ready":
                self._life = _Life(process, control, frozenset(said["read"]))
                self._tell("ready", logging.INFO)
                await loop.sock_recv(control, 1)
                self._tell("it ended", logging.WARNING)
            else:
                self._tell(said.get("cause", "it ended before it was ready"), logging.WARNING)
        except TimeoutError:
            self._tell(f"it was not ready after {_FILL_SECONDS:.0f} s", logging.WARNING)
        except OSError as error:
            self._tell(f"it cannot be used: {error.strerror}", logging.WARNING)
        finally:
            with self._lock:
                self._life = None
                control.close()
            if process is not None:
                process.kill()
                process.wait()

    def _tell(self, what: str, level: int) -> None:
        """Says it in the log, once until something else is to be said."""
        if what != self._said:
            self._said = what
            log.log(level, "template for model servers", extra={"said": what, "forks": what == "ready"})

    def _kill(self, life: _Life) -> None:
        """Ends a template that does not do what it should, and what it has forked that is no shim yet."""
        with self._lock:
            if self._life is life:  # so it has not been waited for, and its number is still its own
                os.killpg(life.process.pid, signal.SIGKILL)


def _spawned(environment: Mapping[str, str], control: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-u", "-m", "serving_service.warm", _ROOM],
        stdin=control.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,
    )


def _all(pipe: int, seconds: float) -> bytes | None:
    """What is written to a pipe until it is closed; None when that takes longer."""
    deadline, said = time.monotonic() + seconds, b""
    readable = select.poll()  # which knows numbers of any size
    readable.register(pipe, select.POLLIN)
    while readable.poll(max(0.0, deadline - time.monotonic()) * 1_000):
        piece = os.read(pipe, 65_536)
        if not piece:
            return said
        said += piece
    return None
