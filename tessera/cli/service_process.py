"""One service as a process that is started again whenever it ends, until it is told to stop.

The service ends when its standard input closes, so it never outlives us, however we end. It leads a session of its
own: Ctrl-C at the terminal reaches us alone, and we decide the order in which things stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from servicekit.errors import StartError
from tessera.cli.service_log import ServiceLog

_BAD_SETTINGS = 2
_FAILED_STARTS = 5
"""So many ends before the service was ready for the first time mean that it never will be."""


@dataclass
class BackOff:
    """How long to wait before the next start, in seconds."""

    first: float = 0.2
    longest: float = 30.0
    well_after: float = 60.0
    """Who ran for so long was well, and starts again without delay next time."""
    _last: float = 0.0

    def after(self, lived: float) -> float:
        """The delay after a life of so many seconds."""
        self._last = self.first if lived >= self.well_after or not self._last else min(self._last * 2, self.longest)
        return self._last


class ServiceProcess:
    """Runs one service; `run` is its life, the other methods may be called beside it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: ServiceLog,
        tell: Callable[[str], None],
    ) -> None:
        self.name = name
        self.log = log
        self.was_ready = False
        self._command = command
        self._environment = environment
        self._tell = tell
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Starts the service, again and again, until `stop`; raises StartError when it cannot start at all."""
        back_off = BackOff()
        failures = 0
        told = ""
        while not self._stopping.is_set():
            began = time.monotonic()
            status = await self._live()
            if self._stopping.is_set():
                return
            failures += 1
            event = f"{self.name} {_described(status)}{_because(self.log)}"
            if not self.was_ready and (status == _BAD_SETTINGS or failures == _FAILED_STARTS):
                raise StartError(f"{event}\nIts log: {self.log.path}")
            delay = back_off.after(time.monotonic() - began)
            # A start may wait for something that goes by, such as a port in use; its cause need be told only once.
            if self.was_ready or event != told:
                self._tell(f"{event}; starting it again in {delay:.1f} s")
            told = event
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()

    def stop(self) -> None:
        """Asks the service to end, for good."""
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the service and the helpers in its session at once."""
        self._stopping.set()
        if not self.has_ended():
            assert self._process is not None
            os.killpg(self._process.pid, signal.SIGKILL)

    def has_ended(self) -> bool:
        """Whether no process of the service runs just now."""
        return self._process is None or self._process.returncode is not None

    async def _live(self) -> int:
        log = self.log.open()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        finally:
            os.close(log)
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)
        return await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if not self.has_ended():
            assert self._process is not None
            self._process.send_signal(number)


def module(name: str) -> tuple[str, ...]:
    """The command that runs an installed module, isolated from variables and the current directory."""
    return (sys.executable, "-I", "-m", name)


def _described(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _because(log: ServiceLog) -> str:
    words = log.last_words()
    return f": {words}" if words else ""
