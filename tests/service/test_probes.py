"""A replica that answers is never taken for one that hangs, however short the patience."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from servicekit.http_client import HttpPool
from serving_service.probes import Probes
from tests.support.sockets import short_directory

PATIENCE = 0.6
"""Seconds; shorter than the pause between two probes is by default."""


async def _answered_unevenly(path: Path) -> asyncio.Server:
    """A server that answers at once, then after a while, then at once..."""
    pauses = itertools.cycle([0.0, PATIENCE / 6])

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(next(pauses))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    return await asyncio.start_unix_server(answer, path)


async def test_a_replica_that_answers_every_time_is_not_silent() -> None:
    pool = HttpPool()
    with short_directory() as directory:
        async with await _answered_unevenly(directory / "http.sock"):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(
                    Probes(pool, patience=PATIENCE).silent(f"unix:{directory}/http.sock"), 2.5 * PATIENCE
                )
    await pool.close()
