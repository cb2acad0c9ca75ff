"""Threads for what waits in the standard library, which nothing cancels: not even a time-out ends a look-up of a name.

The rule: it never has a thread of the event loop's pool. These are a handful, and health and files need them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class OneThread:
    """A thread for one piece of work at a time; it ends with the process at the latest."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = asyncio.Lock()

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, once what came before is over, also where nobody waits for that any more."""
        await self._turn.acquire()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(settling: Callable[[Any], None], value: Any) -> None:
            self._turn.release()
            if not done.done():
                settling(value)

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                outcome: tuple[Callable[[Any], None], Any] = (done.set_exception, error)
            else:
                outcome = (done.set_result, result)
            with contextlib.suppress(RuntimeError):  # the service has stopped meanwhile
                loop.call_soon_threadsafe(settle, *outcome)

        try:
            threading.Thread(target=run, name=self._name, daemon=True).start()
        except RuntimeError:  # there can be no more threads
            self._turn.release()
            raise
        return await done
