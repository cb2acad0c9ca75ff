"""A place in a function that runs in another thread: it stays there until a test has done what comes in between."""

from __future__ import annotations

import asyncio
import threading

SECONDS = 60.0
"""After which somebody waits in vain."""


class HalfWay:
    """One such place."""

    def __init__(self) -> None:
        self._is_reached = threading.Event()
        self._may_go_on = threading.Event()

    def stay(self) -> None:
        """In the function: stays here until `go_on`."""
        self._is_reached.set()
        assert self._may_go_on.wait(SECONDS)

    async def reached(self) -> None:
        """In the test: returns when the function is there."""
        assert await asyncio.to_thread(self._is_reached.wait, SECONDS)

    def go_on(self) -> None:
        """In the test: has the function go on."""
        self._may_go_on.set()
