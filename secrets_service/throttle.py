"""How many tokens one owner may get within a minute. Counted here and not in the database: a token that was deleted
again counts too."""

from __future__ import annotations

import math
from collections.abc import Callable

from secrets_service.errors import TooManyNewTokens
from servicekit.pace import Window

WINDOW = 60.0
"""Seconds."""


class Throttle:
    """Admits `limit` tokens per owner and minute, or any number when it is 0. `now` tells Unix seconds."""

    def __init__(self, limit: int, now: Callable[[], float]) -> None:
        self._limit = limit
        self._window = Window(limit, WINDOW, now=now) if limit else None

    def admit(self, owner_id: int) -> None:
        """Counts a token that is to be made; raises TooManyNewTokens, which says when to come back."""
        if self._window is not None and (wait := self._window.wait(str(owner_id))):
            raise TooManyNewTokens(self._limit, retry_after=max(1, math.ceil(wait)))
