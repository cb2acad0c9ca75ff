"""Somebody who follows a log, over gRPC or over REST, and what was told by then."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from servicekit.http_client import HttpError, HttpPool
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.eventually import eventually
from tests.support.platform import Platform
from tests.support.serving import ServingCaller

FOLLOW_SECONDS = 60.0

CUT = "cut"
"""How a stream over REST ends that is given up."""


@dataclass
class Following:
    """What one follower was told; `ending` is empty while it goes on, then `OK`, a code of gRPC, a status, or CUT."""

    text: str = ""
    ending: str = ""
    pieces: int = 0

    async def until(self, words: str) -> str:
        """All that was told, once the words are among it."""
        await eventually(lambda: words in self.text, what=f"{words!r} is told")
        return self.text

    async def end(self) -> str:
        """How it ended, once it has."""
        await eventually(lambda: bool(self.ending), what="the stream has ended")
        return self.ending


@asynccontextmanager
async def over_grpc(
    caller: ServingCaller, name: str, entity: str, *, is_build: bool = False
) -> AsyncIterator[Following]:
    """Follows at Serving itself."""
    found = Following()

    async def follow() -> None:
        method: Any = caller.stub.FollowServedModelLogs
        request: Any = pb.FollowServedModelLogsRequest
        if is_build:
            method, request = caller.stub.FollowServedModelBuildLogs, pb.FollowServedModelBuildLogsRequest
        call = method(request(name=name, served_model_name=entity), metadata=caller._metadata, timeout=FOLLOW_SECONDS)
        try:
            async for piece in call:
                assert piece.content_type == "text/plain; charset=utf-8"
                found.text += piece.data.decode()
                found.pieces += 1
            found.ending = "OK"
        except grpc.aio.AioRpcError as error:
            found.ending = error.code().name
        finally:
            call.cancel()

    async with _going_on(follow()):
        yield found


@asynccontextmanager
async def over_rest(platform: Platform, who: str, name: str, entity: str, *, url: str = "") -> AsyncIterator[Following]:
    """Follows at a gateway."""
    found = Following()

    async def follow() -> None:
        path = f"/api/2.0/tessera/serving-endpoints/{name}/served-models/{entity}/logs:follow"
        headers = [(b"authorization", f"Bearer {platform.tokens[who]}".encode())]
        pool = HttpPool()
        try:
            address = (url or platform.url).removeprefix("http://")
            async with await pool.send(address, "GET", path, headers, b"", timeout=FOLLOW_SECONDS) as response:
                if response.status != 200:
                    found.ending = str(response.status)
                    return
                assert response.header(b"content-type") == b"text/plain; charset=utf-8"
                async for piece in response:
                    found.text += piece.decode()
                    found.pieces += 1
            found.ending = "OK"
        except HttpError:
            found.ending = CUT
        finally:
            await pool.close()

    async with _going_on(follow()):
        yield found


@asynccontextmanager
async def _going_on(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
