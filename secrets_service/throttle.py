"""How many tokens one owner may get within a minute. Counted here and not in the database: a token that was deleted
again counts too."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from secrets_service.errors import TooManyNewTokens

WINDOW = 60.0
"""Seconds."""

_MOST_OWNERS = 1_000
"""From here on, owners whose minute has passed are forgotten."""


class Throttle:
    """Admits `limit` tokens per owner and minute, or any number when it is 0. `now` tells Unix seconds."""

    def __init__(self, limit: int, now: Callable[[], float]) -> None:
        self._limit = limit
        self._now = now
        self._made: dict[int, deque[float]] = {}

    def admit(self, owner_id: int) -> None:
        """Counts a token that is to be made; raises TooManyNewTokens, which says when to come back."""
        if self._limit == 0:
            return
        now = self._now()
        made = self._made.setdefault(owner_id, deque())
        while made and not now - WINDOW < made[0] <= now:
            made.popleft()
        if len(made) >= self._limit:
            raise TooManyNewTokens(self._limit, retry_after=max(1, math.ceil(made[0] + WINDOW - now)))
        made.append(now)
        if len(self._made) > _MOST_OWNERS:
            self._made = {owner: times for owner, times in self._made.items() if times and times[-1] > now - WINDOW}
