"""Time by which tokens are made and expire."""

from __future__ import annotations

import time
from collections.abc import Callable


class Onward:
    """Unix seconds that never run backwards while the process runs, nor stand still.

    A clock that is set back makes nothing good again that has expired, and nothing last longer than it was to (R21):
    time goes on from where it was, until the clock has caught up.
    """

    def __init__(self, now: Callable[[], float], *, steady: Callable[[], float] = time.monotonic) -> None:
        """`steady` tells seconds on a clock that nobody can set."""
        self._now = now
        self._steady = steady
        self._latest, self._at = now(), steady()

    def __call__(self) -> float:
        at = self._steady()
        self._latest, self._at = max(self._now(), self._latest + at - self._at), at
        return self._latest
