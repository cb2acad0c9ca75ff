"""Streams by which one process follows what another knows; both sides of them.

Who is followed wakes each stream when there is something to tell, hears what the other acts by, and can cut it off. Who
follows opens its stream anew for as long as it lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import grpc

log = logging.getLogger(__name__)

RECONNECT_SECONDS = (0.05, 0.5)
"""The first and the longest pause before a stream is opened anew."""


@dataclass(eq=False)
class Follower:
    """One who follows; subclasses add what it still has to be told."""

    acknowledged: int = 0
    """The latest revision that it acts by."""

    is_over: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    """What sends to it."""

    _is_waiting: bool = False

    async def wait(self, *, longest: float | None = None) -> None:
        """Returns when there is something to tell, or after `longest` seconds."""
        self._is_waiting = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest):
                await self.woken.wait()
        self._is_waiting = False

    def end(self) -> None:
        """Has the stream end once it looks."""
        self.is_over = True
        self.woken.set()

    def cut(self) -> None:
        """Ends the stream also when it hangs in a send to somebody who does not read."""
        self.end()
        if self.task is not None and not self._is_waiting:
            self.task.cancel()


async def cut_at_end(streams: Collection[Follower]) -> None:
    """Waits to be cancelled, and ends every stream then, so that a service that stops does not wait for them."""
    try:
        await asyncio.Event().wait()
    finally:
        for stream in list(streams):
            stream.cut()


async def follow(name: str, once: Callable[[], Awaitable[None]], *, heard: Callable[[], object]) -> None:
    """Follows until cancelled: `once` opens a stream and returns, or raises AioRpcError, when that has ended.

    The pauses before it is called again grow for as long as `heard`, which tells what was heard last, stays the same.
    """
    first, longest = RECONNECT_SECONDS
    pause = first
    while True:
        before = heard()
        try:
            await once()
        except grpc.aio.AioRpcError as error:
            log.info("stream ended", extra={"stream": name, "code": error.code().name})
        pause = first if heard() != before else min(pause * 2, longest)
        await asyncio.sleep(pause)
