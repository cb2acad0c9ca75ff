"""From settings to a running service, until a signal: everything that the three `__main__.py` have in common."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

from servicekit import background, logs, settings
from servicekit.errors import StartError

log = logging.getLogger(__name__)

S = TypeVar("S", bound=settings.ServiceSettings)

STATUS_BAD_SETTINGS = 2
STATUS_FAILED = 1


def run(
    name: str,
    summary: str,
    cls: type[S],
    running: Callable[[S], AbstractAsyncContextManager[Any]],
) -> int:
    """Runs the service `name` until TERM or INT and returns the exit status. A second signal ends it at once."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=summary,
        epilog=f"Settings (environment variables):\n{settings.described(cls)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        configured = settings.load(cls)
    except settings.SettingsError as error:
        for problem in error.problems:
            print(f"{name}: {problem}", file=sys.stderr)  # noqa: T201 (logs are not configured yet)
        return STATUS_BAD_SETTINGS
    os.umask(0o077)
    logs.configure(name, configured.log_level)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_main(name, configured, running))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _main(name: str, configured: S, running: Callable[[S], AbstractAsyncContextManager[Any]]) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    failures: list[BaseException] = []

    def on_signal(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

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
        _watch_supervisor(loop, stopping)
    try:
        async with running(configured):
            with _pid_file(configured.data_dir / "run" / f"{name.removesuffix('_service')}.pid"):
                log.info("started")
                await stopping.wait()
                log.info("stopping")
    except StartError as error:
        log.error("cannot start", extra={"cause": str(error)})
        return STATUS_FAILED
    log.info("stopped")
    return STATUS_FAILED if failures else 0


def _watch_supervisor(loop: asyncio.AbstractEventLoop, stopping: asyncio.Event) -> None:
    """Ends the process when the supervisor is gone: it holds the other end of standard input, and never writes."""

    def on_readable() -> None:
        if os.read(sys.stdin.fileno(), 1024) == b"":
            loop.remove_reader(sys.stdin.fileno())
            log.warning("the supervisor is gone")
            stopping.set()
            # Whatever hangs must not keep a service without a supervisor alive.
            loop.call_later(4.0, os._exit, STATUS_FAILED)

    loop.add_reader(sys.stdin.fileno(), on_readable)


@contextlib.contextmanager
def _pid_file(path: Path) -> Any:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(f"{os.getpid()}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
