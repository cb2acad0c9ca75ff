"""What an issuer that cannot be reached costs everybody else."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from secrets_service import issuer_keys
from secrets_service.issuer_keys import IssuerKeys
from servicekit.errors import Unavailable
from tests.support.eventually import eventually


class HangingNames:
    """A name server that answers nothing until it is let go, and then that there is no such name."""

    def __init__(self) -> None:
        self.asked = 0
        self.is_let_go = threading.Event()

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.asked += 1
        self.is_let_go.wait(30)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")


async def test_a_name_server_that_hangs_has_one_thread_which_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuer_keys, "FETCH_SECONDS", 0.02)
    now, names = 0.0, HangingNames()
    keys = IssuerKeys("https://issuer.invalid", "", lambda: now)

    async def is_asked_for() -> None:
        nonlocal now
        now += issuer_keys.REFETCH_SECONDS
        with pytest.raises(Unavailable):
            await keys.find("k", "RS256")

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", names)
        try:
            for _ in range(40):  # the event loop's pool has 32 threads at the most
                await is_asked_for()
            assert names.asked == 1
            async with asyncio.timeout(5):
                assert await asyncio.to_thread(lambda: "done") == "done"
        finally:
            names.is_let_go.set()

        async def is_asked_again() -> bool:
            await is_asked_for()
            return names.asked > 1

        await eventually(is_asked_again)
    await keys.close()
