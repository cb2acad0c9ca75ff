"""The smallest service there can be, with a manner: `python -m tests.support.tiny_service`."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from servicekit import background, process
from servicekit.errors import StartError
from servicekit.settings import ServiceSettings, count, one_of, setting

log = logging.getLogger(__name__)

CANARY = "canary-0123456789"
MANNERS = (
    "good",
    "hangs-when-stopped",
    "blocks-when-stopped",
    "blocked",
    "dying-job",
    "ending-job",
    "cancelled-job",
    "obliging-job",
    "cannot-start",
    "crashes",
    "telling",
)


@dataclass(frozen=True, kw_only=True)
class TinySettings(ServiceSettings):
    """How to behave."""

    manner: str = setting("TINY_MANNER", one_of(*MANNERS), default="good", help="How to behave.")
    places: int = setting("TINY_PLACES", count, default=0, help="A number.")


@asynccontextmanager
async def running(settings: TinySettings) -> AsyncIterator[None]:
    """Opens nothing, and closes it as the manner says."""
    if settings.manner == "cannot-start":
        raise StartError("The shop is closed. Open it first.")
    if settings.manner == "crashes":
        raise ValueError(CANARY)
    if settings.manner == "telling":
        log.info("interpreter", extra=_interpreter())
    async with background.running({"work": lambda: _work(settings.manner)}):
        if settings.manner == "blocked":
            asyncio.get_running_loop().call_later(0.1, _block)
        yield
        if settings.manner == "hangs-when-stopped":
            await asyncio.sleep(60)
        if settings.manner == "blocks-when-stopped":
            time.sleep(60)  # noqa: ASYNC251 (the point of this manner)


def _interpreter() -> dict[str, object]:
    """Which aids to debugging are on, and where programs come from."""
    return {
        "aids": [
            *(name for name in ("dev_mode", "inspect", "interactive", "verbose", "debug") if getattr(sys.flags, name)),
            *(["faulthandler"] if faulthandler.is_enabled() else []),
            *(["tracemalloc"] if tracemalloc.is_tracing() else []),
            *(["asyncio"] if asyncio.get_running_loop().get_debug() else []),
            *(["importtime"] if sys._xoptions else []),
        ],
        "is_isolated": bool(sys.flags.isolated),
        "path": sys.path,
        "variables": sorted(os.environ),
    }


def _block() -> None:
    log.info("blocked")
    time.sleep(60)


async def _work(manner: str) -> None:
    if manner == "dying-job":
        raise ValueError(CANARY)
    if manner == "ending-job":
        return
    if manner == "cancelled-job":
        other = asyncio.ensure_future(asyncio.sleep(60))
        other.cancel()
        await other
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        if manner != "obliging-job":
            raise


if __name__ == "__main__":
    sys.exit(process.run("tiny_service", "A service for tests.", TinySettings, running))
