"""From settings to a running service, until a signal: everything that the three `__main__.py` have in common."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

from servicekit import background, logs, settings, tracing
from servicekit.errors import StartError

log = logging.getLogger(__name__)

S = TypeVar("S", bound=settings.ServiceSettings)

_PR_SET_DUMPABLE = 4

STATUS_BAD_SETTINGS = 2
STATUS_FAILED = 1

COLLECT_AFTER = 10_000
"""How many objects more there have to be before the garbage collector looks at the new ones."""

MOST_FILES = 65_536
"""How many files a service may have open; each connection is one."""

DEBUGGING = {
    "GRPC_TRACE": "writes what callers send to the log, assertions too",
    "GRPC_VERBOSITY": "is at a level at which the library writes down what it works on",
}
"""Variables with which gRPC tells what it is not asked for, and what each does."""

KEY_LOG = "SSLKEYLOGFILE"
"""Names a file that libraries write the keys of TLS sessions to."""

START_GRACE_SECONDS = 1.0
"""How long a start that is under way may go on when the service is to stop: mostly long enough for an orderly end."""

SUPERVISOR_GONE_SECONDS = 4.0
"""How long a service may take to end when its supervisor is gone."""


def run(
    name: str,
    summary: str,
    cls: type[S],
    running: Callable[[S], AbstractAsyncContextManager[Any]],
) -> int:
    """Runs the service `name` until TERM or INT and returns the exit status. A second signal ends it at once.

    It runs in Python's isolated mode, in which variables change nothing about the interpreter: started otherwise, it
    starts itself again.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -I -m {name}",
        description=summary,
        epilog=f"Settings (environment variables):\n{settings.described(cls)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    if aids := debugging_aids(os.environ):  # too late to unset them: they were read before we were here
        for variable, why in aids.items():
            print(f"{name}: {variable} {why}: unset it", file=sys.stderr)  # noqa: T201
        return STATUS_BAD_SETTINGS
    _isolate()
    dropped = _dropped(os.environ)
    try:
        configured = settings.load(cls)
    except settings.SettingsError as error:
        for problem in error.problems:
            print(f"{name}: {problem}", file=sys.stderr)  # noqa: T201 (logs are not configured yet)
        return STATUS_BAD_SETTINGS
    os.umask(0o077)
    _leave_no_core()
    _open_more_files()
    logs.configure(name, configured.log_level)
    if dropped:
        log.warning("variables are ignored", extra={"variables": dropped})
    with (
        tracing.recording(name.removesuffix("_service"), configured.otlp_endpoint, configured.trace_ratio),
        asyncio.Runner(loop_factory=_loop_factory()) as runner,
    ):
        return runner.run(_main(name, configured, running))


def debugging_aids(environ: Mapping[str, str]) -> dict[str, str]:
    """Which aids to debugging are switched on that tell what callers send, and what each does (S21)."""
    aids = {variable: why for variable, why in DEBUGGING.items() if environ.get(variable)}
    if aids.get("GRPC_VERBOSITY") and environ["GRPC_VERBOSITY"].lower() != "debug":
        del aids["GRPC_VERBOSITY"]
    return aids


def _isolate() -> None:
    """Starts this process's program again, with the same arguments, unless the interpreter is in its isolated mode.

    Only there it heeds no `PYTHON...` variable and imports nothing from the current directory. Whoever starts services
    all the time says `python -I` and spares the detour.
    """
    if not sys.flags.isolated:
        os.execv(sys.executable, [sys.executable, "-I", *sys.orig_argv[1:]])  # noqa: S606 (which is what it is for)


def _dropped(environ: MutableMapping[str, str]) -> list[str]:
    """Takes out the variables that the interpreter does not heed, so that no program of ours does; the names of those
    that would mean something to it.
    """
    found = sorted(variable for variable in environ if variable.startswith("PYTHON") or variable == KEY_LOG)
    for variable in found:
        del environ[variable]
    return [variable for variable in found if not variable.startswith("PYTHON_")]  # as images of containers have them


def _leave_no_core() -> None:
    """Has the kernel never write this process's memory down; nor may other processes of its user look into it."""
    # One, not zero: with a core pattern that is a pipe the kernel dumps in spite of a limit of zero.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, *map(ctypes.c_ulong, (0, 0, 0, 0)))


def _open_more_files() -> None:
    """Lets this process have as many files open as its user may: what many systems begin with is for tools."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < (wanted := min(most, MOST_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _collect_less_often() -> None:
    """Spares the garbage collector what is there for good; a request leaves few cycles, and short-lived objects many.

    Measured at the gateway: with Python's own threshold a twentieth of its time went into looking at what still lived.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _main(name: str, configured: S, running: Callable[[S], AbstractAsyncContextManager[Any]]) -> int:
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None
    started, stopping = asyncio.Event(), asyncio.Event()
    failures: list[BaseException] = []

    def stop() -> None:
        """Asks the service to end; a start that waits for something, such as its key, is given up."""
        stopping.set()
        loop.call_later(START_GRACE_SECONDS, lambda: None if started.is_set() else main.cancel())

    def on_signal(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stop()

    def on_exception(loop: asyncio.AbstractEventLoop, facts: dict[str, Any]) -> None:
        error = facts.get("exception")
        if isinstance(error, background.JobDied):
            failures.append(error)
            stopping.set()
        else:
            kind = (type(error), error, error.__traceback__) if error is not None else None
            log.error("unhandled exception in the event loop", exc_info=kind)

    loop.set_exception_handler(on_exception)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    if configured.supervised:
        _watch_supervisor(loop, stop)
    try:
        async with running(configured):
            with _pid_file(configured.data_dir / "run" / f"{name.removesuffix('_service')}.pid"):
                started.set()
                log.info("started")
                _collect_less_often()
                await stopping.wait()
                log.info("stopping")
    except StartError as error:
        log.error("cannot start", extra={"cause": str(error)})
        return STATUS_FAILED
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise
        log.info("stopped before it was started")
        return 0
    except Exception as error:
        # Not left to the interpreter, which would print the text of the error.
        log.critical("failed", exc_info=(type(error), error, error.__traceback__))
        return STATUS_FAILED
    log.info("stopped")
    return STATUS_FAILED if failures else 0


def _watch_supervisor(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    """Ends the process when the supervisor is gone: it holds the other end of standard input, and never writes.

    In a thread of its own: whatever hangs, the event loop too, must not keep a service without a supervisor alive.
    """

    def orphaned() -> None:
        log.warning("the supervisor is gone")
        stop()

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the process about to end
            loop.call_soon_threadsafe(orphaned)
        time.sleep(SUPERVISOR_GONE_SECONDS)
        os._exit(STATUS_FAILED)

    threading.Thread(target=watch, name="supervisor", daemon=True).start()


@contextlib.contextmanager
def _pid_file(path: Path) -> Iterator[None]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(f"{os.getpid()}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
