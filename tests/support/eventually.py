"""Waiting in tests: for something to become true, with a deadline, instead of for some time to pass."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def eventually(
    claim: Callable[[], bool] | Callable[[], Awaitable[bool]],
    *,
    within: float = 30.0,
    what: str | Callable[[], str] = "",
) -> None:
    """Returns once `claim()` holds; fails, naming `what`, when it does not within so many seconds."""
    deadline = time.monotonic() + within
    while True:
        result = claim()
        if await result if isinstance(result, Awaitable) else result:
            return
        assert time.monotonic() < deadline, f"not within {within} s: {(what() if callable(what) else what) or claim}"
        await asyncio.sleep(0.02)
