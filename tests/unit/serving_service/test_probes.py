"""Asking replicas whether they live, whatever they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

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


STANDSTILL = 1_000.0


class Asked(Probes):
    """Probes whose asks have known outcomes, on a clock that stands for sleeps and for what an ask takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: Iterable[tuple[bool, float]]) -> None:
        """`answers`: of each ask, whether it is answered, and after how many seconds."""
        super().__init__(None, patience=120.0)  # type: ignore[arg-type]
        self.now = 0.0
        self.asks = 0
        self.oversleeps = 0.0
        self._outcomes: Iterator[tuple[bool, float]] = iter(answers)
        monkeypatch.setattr(probes, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(probes, "asyncio", SimpleNamespace(sleep=self._pass))

    async def _pass(self, seconds: float) -> None:
        self.now += seconds + self.oversleeps
        self.oversleeps = 0.0

    async def _answers(self, *_: Any, **__: Any) -> bool:
        self.asks += 1
        answers, seconds = next(self._outcomes)
        self.now += seconds
        return answers


async def test_a_replica_is_silent_once_it_was_asked_in_vain_for_as_long_as_is_borne(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(monkeypatch, [(True, 0.0), *[(False, 10.0)] * 20])
    await asked.silent("unix:/r1")
    assert (asked.now, asked.asks) == (120.0, 12)


async def test_no_replica_is_silent_because_this_process_stood_still_between_two_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(monkeypatch, [(True, 0.0), (True, 0.0), *[(False, 10.0)] * 20])
    asked.oversleeps = STANDSTILL
    await asked.silent("unix:/r1")
    assert asked.asks == 2 + 11


async def test_no_replica_is_silent_because_this_process_stood_still_while_it_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(monkeypatch, [(True, 0.0), (False, STANDSTILL), (True, 0.0), *[(False, 10.0)] * 20])
    await asked.silent("unix:/r1")
    assert asked.asks == 3 + 11


async def test_a_replica_is_not_ready_once_it_was_asked_in_vain_for_long_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(monkeypatch, [(False, 10.0)] * 20)
    assert not await asked.ready("unix:/r1")
    assert asked.asks == 3


async def test_a_replica_gets_the_time_to_be_ready_also_when_this_process_stood_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(monkeypatch, [(False, STANDSTILL), (True, 0.0)])
    assert await asked.ready("unix:/r1")
