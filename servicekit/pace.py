"""How often something may happen, for each of many: at a pace, or so many times in a while.

The rule: to be refused counts nothing, so that asking in vain makes no wait longer.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable

MOST_KEPT = 10_000
"""How many are remembered; then the one that was let through the longest ago is forgotten."""

HEARD_PER_MINUTE = 20
"""Of what anybody can cause as often as he likes: how many events of one address the log hears of in the long run, and
of twice as many at once."""

_SECOND = 1_000_000_000
"""In nanoseconds, which add up exactly."""


class Pace:
    """The generic cell rate algorithm (ITU-T I.371), for each key.

    `per_second` is what is let through in the long run, `burst` what is at once. `now` tells seconds on a clock that
    nobody can set.
    """

    def __init__(self, per_second: float, burst: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._interval = round(_SECOND / per_second)
        self._tolerance = self._interval * (burst - 1)
        self._now = now
        self._on_time: OrderedDict[str, int] = OrderedDict()
        """Of each key, when the next one would be on time."""

    def wait(self, key: str) -> float:
        """Lets one through and returns 0, or returns the seconds until one would be."""
        now = round(self._now() * _SECOND)
        on_time = max(self._on_time.get(key, now), now)
        if on_time - now > self._tolerance:
            return (on_time - now - self._tolerance) / _SECOND
        self._on_time[key] = on_time + self._interval
        self._on_time.move_to_end(key)
        if len(self._on_time) > MOST_KEPT:
            self._on_time.popitem(last=False)
        return 0.0


class Flood(Pace):
    """What is said of each key: `per_minute` in the long run, twice that at once, and once that there is more."""

    def __init__(self, per_minute: int, *, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(per_minute / 60, 2 * per_minute, now=now)
        self._waiting: set[str] = set()

    def wait(self, key: str) -> float:
        """As of every pace."""
        if wait := super().wait(key):
            return wait
        self._waiting.discard(key)
        return 0.0

    def begins(self, key: str) -> bool:
        """Whether this is asked for the first time since one was let through, when one has to wait."""
        if key in self._waiting:
            return False
        if len(self._waiting) >= MOST_KEPT:
            self._waiting.clear()
        self._waiting.add(key)
        return True


class Window:
    """So many in any stretch of `seconds`, for each key. `now` tells seconds."""

    def __init__(self, most: int, seconds: float, *, now: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._seconds = seconds
        self._now = now
        self._passed: OrderedDict[str, deque[float]] = OrderedDict()
        """When those that still count were let through, by key."""

    def wait(self, key: str) -> float:
        """Lets one through and returns 0, or returns the seconds until one would be."""
        if wait := self.left(key):
            return wait
        self._passed.setdefault(key, deque()).append(self._now())
        self._passed.move_to_end(key)
        if len(self._passed) > MOST_KEPT:
            self._passed.popitem(last=False)
        return 0.0

    def left(self, key: str) -> float:
        """The seconds until one would be let through, 0 for at once; lets none through."""
        now = self._now()
        passed = self._passed.get(key, deque())
        # What lies ahead was let through before the clock was set back.
        while passed and not now - self._seconds < passed[0] <= now:
            passed.popleft()
        return passed[0] + self._seconds - now if len(passed) >= self._most else 0.0
