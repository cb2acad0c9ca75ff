"""A small HTTP client for tests: one request over `servicekit.http_client`, which has tests of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson

from servicekit.http_client import HttpPool


@dataclass
class Answer:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return orjson.loads(self.body)


async def fetch(
    url: str,
    method: str,
    path: str,
    *,
    token: str | None = None,
    json: Any = None,
    body: bytes | AsyncIterator[bytes] = b"",
    headers: dict[str, str] | None = None,
    timeout: float = 30,
) -> Answer:
    """Sends one request on a connection of its own and returns the whole answer, which has so many seconds to come."""
    sent = {name.lower(): value for name, value in (headers or {}).items()}
    if token is not None:
        sent["authorization"] = f"Bearer {token}"
    if json is not None:
        body = orjson.dumps(json)
        sent.setdefault("content-type", "application/json")
    pool = HttpPool(connect_timeout=30)  # with the whole suite under way, a second may be too short
    try:
        response = await pool.send(
            url.removeprefix("http://"),
            method,
            path,
            [(name.encode(), value.encode()) for name, value in sent.items()],
            body,
            timeout=timeout,
        )
        async with response:
            text = await response.read()
            found = {name.decode(): value.decode() for name, value in response.headers}
            return Answer(response.status, found, text)
    finally:
        await pool.close()
