"""Whether replicas answer: each is asked before its first request, and again and again for as long as it lives.

The rule: what a model server says of itself is believed once it answers over its socket, and only for as long as it
does. Any answer in HTTP will do; a server that is busy in all its threads still gives one. Time alone condemns nobody:
while this process stood still, it asked nobody either.
"""

from __future__ import annotations

import asyncio
import time

from servicekit.http_client import AnswerTooLarge, HttpError, HttpPool

READINESS_SECONDS = 30.0
"""How long a model server that says it is ready may take to answer."""

PERIOD_SECONDS = 10.0
"""How often a replica is asked whether it lives."""

_LEAST_TRIES = 3
"""How often a replica is asked in vain before it counts as silent, however much time has passed."""

_PATH = "/ping"
_BODY_BYTES = 64 << 10
"""Of an answer; the rest of a longer one is given up with its connection, and it is an answer all the same."""

_PAUSE_SECONDS = 0.05


class Probes:
    """Asks replicas. `patience` is for how many seconds one that was ready may not answer."""

    def __init__(self, pool: HttpPool, *, patience: float) -> None:
        self._pool = pool
        self.patience = patience

    async def ready(self, address: str) -> bool:
        """Returns once a replica answers, and False when it does not in time."""
        deadline, tries = time.monotonic() + READINESS_SECONDS, 0
        while time.monotonic() < deadline or tries < _LEAST_TRIES:
            if await self._answers(address, timeout=READINESS_SECONDS / _LEAST_TRIES):
                return True
            tries += 1
            await asyncio.sleep(_PAUSE_SECONDS)
        return False

    async def silent(self, address: str) -> None:
        """Returns when a replica has not answered for longer than is borne; for one that lives, never."""
        period = min(PERIOD_SECONDS, self.patience / _LEAST_TRIES)
        heard_at, tries = time.monotonic(), 0
        while time.monotonic() < heard_at + self.patience or tries < _LEAST_TRIES:
            asked_at = time.monotonic()
            if await self._answers(address, timeout=period):
                heard_at, tries = time.monotonic(), 0
            else:
                tries += 1
            await asyncio.sleep(max(asked_at + period - time.monotonic(), 0))

    async def _answers(self, address: str, *, timeout: float) -> bool:
        try:
            async with await self._pool.send(address, "GET", _PATH, [], b"", timeout=timeout) as response:
                await response.read(limit=_BODY_BYTES)
        except AnswerTooLarge:
            return True
        except HttpError:
            return False
        return True
