"""Runs a command's coroutine so that it always clears up: the first signal cancels it, a second one hurries it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, int]], *, interrupted: int) -> int:
    """Runs `main(hurry)` to its end and returns its status, or `interrupted` when a signal ended it.

    The first INT, TERM or HUP cancels `main`, which then clears up for as long as it needs; the second sets `hurry`.
    """
    return asyncio.run(_guarded(main, interrupted))


async def _guarded(main: Callable[[asyncio.Event], Coroutine[Any, Any, int]], interrupted: int) -> int:
    loop = asyncio.get_running_loop()
    hurry = asyncio.Event()
    work = loop.create_task(main(hurry))
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            work.cancel()
        else:
            hurry.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        return await work
    except asyncio.CancelledError:
        return interrupted
