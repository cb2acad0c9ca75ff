"""A stream by which somebody follows what we know: it is woken to be told, says what it acts by, and can be cut off."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any


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
