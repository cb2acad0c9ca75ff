"""Queries without a pause over a few connections that are kept, each noted with its answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from servicekit.http_client import HttpError, HttpPool
from tests.support.eventually import eventually

QUERY, STREAM = b'{"inputs": [1]}', b'{"inputs": [1], "stream": true}'


@dataclass(frozen=True)
class Answered:
    """One query: when it was sent and answered, and with what. Status 0: it broke off."""

    sent: float
    ended: float
    status: int
    body: bytes
    is_stream: bool


@dataclass
class Load:
    """Queries of one endpoint at one gateway with one token."""

    url: str
    name: str
    token: str = field(repr=False)
    answers: list[Answered] = field(default_factory=list)

    def statuses(self, *, since: float = 0.0) -> Counter[int]:
        """How often each status was the answer to what was sent since a moment."""
        return Counter(each.status for each in self.answers if each.sent >= since)

    async def reaches(self, count: int, *, within: float = 120.0) -> None:
        """Returns when so many queries have been answered."""
        await eventually(lambda: len(self.answers) >= count, within=within, what=f"{count} queries are answered")

    async def more(self, count: int = 1) -> None:
        """Returns when so many queries more have been answered."""
        await self.reaches(len(self.answers) + count)

    @asynccontextmanager
    async def running(self, connections: int = 8, *, streams: int = 0) -> AsyncIterator[Load]:
        """Queries while the block runs, on so many connections; `streams` of them ask for streams."""
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as clients:
            for number in range(connections):
                clients.create_task(self._client(is_over, is_stream=number < streams))
            try:
                yield self
            finally:
                is_over.set()

    async def _client(self, is_over: asyncio.Event, *, is_stream: bool) -> None:
        pool = HttpPool()
        headers = [(b"authorization", f"Bearer {self.token}".encode()), (b"content-type", b"application/json")]
        address, path = self.url.removeprefix("http://"), f"/serving-endpoints/{self.name}/invocations"
        try:
            while not is_over.is_set():
                sent, status, body = time.monotonic(), 0, b""
                try:
                    response = await pool.send(
                        address, "POST", path, headers, STREAM if is_stream else QUERY, timeout=60
                    )
                    async with response:
                        body = await response.read()
                        status = response.status
                except HttpError as error:
                    body = repr(error).encode()
                self.answers.append(Answered(sent, time.monotonic(), status, body, is_stream))
        finally:
            await pool.close()
