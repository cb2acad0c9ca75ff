"""Work that goes on beside the requests. Each job has a name; when one dies, the process dies, loudly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

log = logging.getLogger(__name__)


class JobDied(Exception):
    """A background job ended on its own, which none of them should."""


@asynccontextmanager
async def running(jobs: Mapping[str, Callable[[], Awaitable[None]]]) -> AsyncIterator[None]:
    """Runs the jobs while the context is open, then cancels them.

    The event loop's exception handler hears of a job that ends before that; `servicekit.process` ends the process.
    """
    tasks = [asyncio.create_task(_run(name, job), name=name) for name, job in jobs.items()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(name: str, job: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.current_task()
    assert task is not None
    cause: BaseException | None = None
    try:
        await job()
    except (Exception, asyncio.CancelledError) as error:
        cause = error
    # A job may also catch a cancellation of something that it waited for: only our own is an orderly end.
    if task.cancelling() and (cause is None or isinstance(cause, asyncio.CancelledError)):
        return
    trace = None if cause is None else (type(cause), cause, cause.__traceback__)
    log.critical("background job died", extra={"job": name}, exc_info=trace)
    died = JobDied(f"the background job {name!r} ended on its own")
    died.__cause__ = cause
    asyncio.get_running_loop().call_exception_handler({"message": str(died), "exception": died})
