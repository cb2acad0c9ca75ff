"""How many launches go on at a time, so that a machine that has just started is not asked for all of them at once.

A launch gives its slot back when it is over. One that takes long makes room too: what hangs must not hold up others.
"""

from __future__ import annotations

import asyncio

LONGEST_SECONDS = 30.0


class LaunchSlots:
    """The slots, in the order in which launches ask for them."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._taken: dict[str, asyncio.TimerHandle] = {}

    async def take(self, replica_id: str) -> None:
        """Waits for a slot."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        self._taken[replica_id] = loop.call_later(LONGEST_SECONDS, self.give_back, replica_id)

    def give_back(self, replica_id: str) -> None:
        """The launch is over, or there was none; idempotent."""
        timer = self._taken.pop(replica_id, None)
        if timer is not None:
            timer.cancel()
            self._free.release()
