"""A service as a process that dies where it is told to, and is there again within a fraction of a second.

`python -m MODULE DIRECTORY` imports everything once and forks the service anew for every start (`nursed`). While one
lives it reads its orders itself, from the same pipe: `watch [POINT]` (see `tests/support/failpoints.py`) and `passed`,
which it answers with the points that it passed since.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc

from servicekit import channels
from tests.support.failpoints import Door, Failpoints

START_SECONDS = 20.0


class MortalService:
    """The service; `channel` leads to the gateway socket of the process that was started last."""

    def __init__(self, address: str, nursery: asyncio.subprocess.Process, settings: Mapping[str, float]) -> None:
        self.channel: grpc.aio.Channel
        self.settings = settings
        """Those that are not the default ones, from the next start on."""
        self.pid = 0
        self.status = 0
        """How the last one ended, as `os.waitpid` tells it."""
        self._born: asyncio.Future[None]
        self._address = address
        self._channels = AsyncExitStack()
        self._nursery = nursery
        self.ended = asyncio.Event()
        """Set while no service lives."""
        self.ended.set()
        self._told: asyncio.Queue[list[str]] = asyncio.Queue()
        self._reading = asyncio.create_task(self._read())

    async def start(self, *, deadly: str | None = None) -> None:
        """Starts it, to end at the point `deadly`; returns when it is there, or has ended again."""
        assert self.ended.is_set()
        self.ended.clear()
        self._told = asyncio.Queue()  # without what its predecessor said last
        self._born = asyncio.get_running_loop().create_future()
        self._order("start", deadly)
        told = await asyncio.wait_for(self._told.get(), START_SECONDS)
        self.pid = int(told[0])
        self._born.set_result(None)
        await self._unless_ended(self._told.get())
        # Anew, since one that was refused meanwhile waits for a second until it tries again; and ready, since all
        # channels of this process to one address share what they know of it.
        await self._channels.aclose()
        self.channel = await self._channels.enter_async_context(channels.opened(self._address))
        await self._unless_ended(self.channel.channel_ready())

    async def _unless_ended(self, sign: Coroutine[Any, Any, Any]) -> None:
        """Returns when there is a sign of the service, or when it has ended."""
        waiting, ended = asyncio.create_task(sign), asyncio.create_task(self.ended.wait())
        done, _ = await asyncio.wait((waiting, ended), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        assert done, "the service neither started nor ended"
        for task in (waiting, ended):
            task.cancel()

    async def watch(self, deadly: str | None = None) -> None:
        """Has the service note the points that it passes from now on, and end at the one that is deadly."""
        self._order("watch", deadly)
        await asyncio.wait_for(self._told.get(), START_SECONDS)

    async def passed(self) -> list[str]:
        """The points that the service has passed since `watch`, in their order."""
        self._order("passed", None)
        return await asyncio.wait_for(self._told.get(), START_SECONDS)

    async def kill(self) -> None:
        """Ends it as `kill -9` does; nothing when it has ended."""
        if not self.ended.is_set():
            await self._born  # one that was started a moment ago has no number yet but its predecessor's
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            await self.ended.wait()

    async def close(self) -> None:
        """Ends it and what starts it."""
        await self.kill()
        await self._channels.aclose()
        self._reading.cancel()
        self._nursery.kill()
        await self._nursery.wait()

    def _order(self, word: str, point: str | None) -> None:
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(f"{json.dumps([word, point, dict(self.settings)])}\n".encode())

    async def _read(self) -> None:
        assert self._nursery.stdout is not None
        async for line in self._nursery.stdout:
            told = json.loads(line)
            if told[:1] == ["ended"]:
                self.status = told[1]
                self.ended.set()
            else:
                self._told.put_nowait(told)


@contextlib.asynccontextmanager
async def mortal_service(
    module: str, directory: Path, address: str, settings: Mapping[str, float]
) -> AsyncIterator[MortalService]:
    """The service that a module nurses, on a data directory; not started yet, and killed in the end."""
    nursery = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, str(directory)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    service = MortalService(address, nursery, settings)
    try:
        yield service
    finally:
        await service.close()


Life = Callable[[Mapping[str, Any]], contextlib.AbstractAsyncContextManager[object]]
"""Runs the service with these settings."""


def nurse(life: Life, doors: Sequence[Door]) -> None:
    """Starts the service for every order to, until there is nobody any more who gives orders."""
    gc.freeze()  # nobody who is forked looks through what was imported, which would have it copied
    while (order := _next_order()) is not None:
        word, point, settings = order
        if word != "start":
            continue  # it was meant for one that has just ended
        if (child := os.fork()) == 0:
            asyncio.run(_live(life, Failpoints(doors), settings, deadly=point))
        _tell(child)
        _, status = os.waitpid(child, 0)
        _tell("ended", status)


async def _live(life: Life, points: Failpoints, settings: Mapping[str, Any], *, deadly: str | None) -> None:
    points.install()
    points.watch(deadly)
    async with life(settings):
        _tell("serving")
        while (order := await asyncio.to_thread(_next_order)) is not None:
            word, point, _ = order
            if word == "watch":
                points.watch(point)
                _tell()
            else:
                _tell(*points.passed)


def _next_order() -> list[Any] | None:
    """Byte by byte, so that nothing is taken that is meant for the next one who reads."""
    line = b""
    while not line.endswith(b"\n"):
        if not (piece := os.read(0, 1)):
            return None
        line += piece
    order: list[Any] = json.loads(line)
    return order


def _tell(*words: object) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")
