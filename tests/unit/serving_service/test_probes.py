"""Asking replicas whether they live, whatever they answer."""

from __future__ import annotations

import asyncio

import pytest

from servicekit.http_client import HttpPool
from serving_service import probes
from serving_service.probes import Probes
from tests.support.sockets import short_directory


async def test_an_answer_without_end_is_one_of_which_only_the_beginning_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "READINESS_SECONDS", 5.0)
    sent = 0
    hung_up = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while sent < 1 << 30:
                writer.write(bytes(1 << 16))
                sent += 1 << 16
                await writer.drain()
        except ConnectionError:
            pass
        hung_up.set()
        writer.close()

    pool = HttpPool()
    with short_directory() as folder:
        async with await asyncio.start_unix_server(answer, folder / "http.sock"):
            assert await Probes(pool, patience=30).ready(f"unix:{folder / 'http.sock'}")
            await asyncio.wait_for(hung_up.wait(), 30)
    await pool.close()
    assert sent < 16 << 20
