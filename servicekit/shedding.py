"""What is more than a listener can do at a time is refused at once, so that the rest is done in time.

The rule: whoever is refused has cost next to nothing; so it is decided before anybody asks who calls, and before the
request is read. What a request waits for may not be refused because of requests: so health checks, calls among our own
services, and those of callers have an allowance each, and each listener has its own of them. Queries of models have
none: their queues are bounded by themselves.

A process also does too much when its event loop is late for a while. Then little is let in, but never nothing.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType

from servicekit.errors import TooManyRequests

log = logging.getLogger(__name__)

LAG_SECONDS = 0.1
"""How late the event loop may be."""

LOOK_SECONDS = 0.05
"""How often it is looked at."""

LATE_LOOKS = 8
"""So many times in a row it has to be late. One look that is late is somebody's long breath and over by the next."""

ALWAYS_TAKEN = 10
"""So many requests are let in however late the loop is: so few are not what makes it late."""

RETRY_SECONDS = 1


class Overloaded(TooManyRequests):
    """As many calls are under way as may, or what is under way takes too long."""

    def __init__(self) -> None:
        super().__init__("Too many requests are under way. Try again in a moment.", retry_after=RETRY_SECONDS)


class Lag:
    """Whether the event loop is late, and has been for a while."""

    def __init__(self) -> None:
        self._late = 0

    @property
    def is_lasting(self) -> bool:
        """Whether it was late every time that it was looked at of late."""
        return self._late >= LATE_LOOKS

    def looked(self, late: float) -> None:
        """Hears by how many seconds the loop was late."""
        self._late = self._late + 1 if late > LAG_SECONDS else 0

    async def run(self) -> None:
        """Looks until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LOOK_SECONDS
            await asyncio.sleep(LOOK_SECONDS)
            self.looked(loop.time() - due)


class Room:
    """Room for `most` calls at a time, 0: for any number; each of them is a context. `name` is for the log."""

    __slots__ = ("_is_shedding", "_lag", "_most", "_name", "_taken")

    def __init__(self, name: str, most: int, lag: Lag) -> None:
        self._name = name
        self._most = most
        self._lag = lag
        self._taken = 0
        self._is_shedding = False

    def check(self) -> None:
        """Raises Overloaded when one more call would be too many."""
        most = min(self._most, ALWAYS_TAKEN) if self._lag.is_lasting else self._most
        if self._taken < most or not self._most:
            return
        if not self._is_shedding:
            self._is_shedding = True
            facts = {"room": self._name, "calls": self._taken, "is_late": self._lag.is_lasting}
            log.warning("calls are refused: too many are under way", extra=facts)
        raise Overloaded

    def __enter__(self) -> None:
        """Raises Overloaded."""
        self.check()
        self._taken += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taken -= 1
        # Said once for each time that it was full, not for each call.
        if self._is_shedding and 2 * self._taken <= self._most and not self._lag.is_lasting:
            self._is_shedding = False
            log.warning("calls are taken again", extra={"room": self._name})


class Place:
    """A place in a room, as a context; it may be left for a while."""

    __slots__ = ("_is_taken", "_room")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._is_taken = False

    def take(self) -> bool:
        """Whether it had been left; raises Overloaded."""
        if self._is_taken:
            return False
        self._room.__enter__()
        self._is_taken = True
        return True

    def leave(self) -> None:
        """Leaves it, if it is taken."""
        if self._is_taken:
            self._is_taken = False
            self._room.__exit__(None, None, None)

    def __enter__(self) -> Place:
        """Raises Overloaded."""
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
