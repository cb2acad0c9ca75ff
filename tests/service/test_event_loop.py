"""No service waits for a disk, a name server or another process where it answers calls: in its event loop (R24).

How long a loop was late says as much about the machine as about us. What makes one late is told apart by the thread it
happens in: statements of SQLite, syncs, whole trees of files, names, sleep.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from servicekit import database
from servicekit.database import Database
from tests.support.builders import an_input
from tests.support.eventually import eventually
from tests.support.platform import Platform, running_platform

BLOCKING = (
    (time, "sleep"),
    (os, "fsync"),
    (os, "fdatasync"),
    (shutil, "rmtree"),
    (shutil, "copytree"),
    (shutil, "copyfileobj"),
    (socket, "getaddrinfo"),
    (subprocess, "run"),
    (subprocess.Popen, "communicate"),
)


class Watch:
    """What was done in the thread of the event loop that is not done in a moment, and how often elsewhere."""

    def __init__(self) -> None:
        self._loop = threading.get_ident()
        self.found: list[str] = []
        self.elsewhere = 0

    def __call__(self, what: str) -> None:
        if threading.get_ident() != self._loop:
            self.elsewhere += 1
            return
        frames = [frame for frame in traceback.extract_stack() if "/tests/" not in frame.filename]
        self.found.append(f"{what}: " + " < ".join(f"{frame.name}" for frame in reversed(frames[-6:])))


@pytest.fixture
async def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """From the start of the services on: that may take its time, but they are told of here, too."""
    watch = Watch()
    opened: Callable[..., Any] = database.opened

    @asynccontextmanager
    async def traced(*arguments: Any, **named: Any) -> AsyncIterator[Database]:
        async with opened(*arguments, **named) as found:
            await found.equip(lambda connection: connection.set_trace_callback(lambda text: watch("SQL")))
            yield found

    monkeypatch.setattr(database, "opened", traced)
    for place, name in BLOCKING:
        monkeypatch.setattr(place, name, _watched(watch, name, getattr(place, name)))
    return watch


def _watched(watch: Watch, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        watch(name)
        return function(*arguments, **named)

    return call


async def test_nothing_that_takes_its_time_happens_in_the_event_loop(watch: Watch) -> None:
    async with running_platform() as platform:
        watch.found.clear()  # what a start does, it does before anybody asks
        await _everything(platform)
        found = list(watch.found)
    assert watch.elsewhere > 100
    assert not found


async def _everything(platform: Platform) -> None:
    await platform.introduce("ada")
    admin = platform.secrets.admin
    await admin.create_scope("scope")
    await admin.put("scope", "key", b"value")
    assert await admin.get("scope", "key") == b"value"
    ada = platform.endpoints_of("ada")
    await ada.create("demo", "ready", environment={"PLAIN": "text"})
    await ada.settled("demo")
    token = platform.tokens["ada"]

    async def is_answered() -> bool:
        answer = await platform.fetch("POST", "/serving-endpoints/demo/invocations", token=token, body=b"{}")
        return answer.status == 200

    await eventually(is_answered)
    await ada.update("demo", an_input("ready", environment_vars={"PLAIN": "other"}))
    await ada.settled("demo")
    await ada.logs("demo", "ready-1")
    await ada.events("demo")
    for path in ("serving-endpoints", "serving-endpoints/demo/metrics", "tessera/audit/secrets"):
        assert (await platform.fetch("GET", f"/api/2.0/{path}", token=platform.tokens["admin"])).status == 200
    await ada.delete("demo")
    await admin.delete("scope", "key")
    log = platform.secrets.settings.data_dir / "audit"
    await eventually(lambda: any(b"/DeleteSecret" in path.read_bytes() for path in log.glob("secrets-*")))
