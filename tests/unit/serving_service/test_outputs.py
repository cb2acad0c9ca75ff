"""What a follower is told: of a build every line once, over builds that are tried again, and to its end; of replicas
each line as the one's that said it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from servicekit import database
from serving_service.app import MIGRATIONS
from serving_service.build_logs import BuildLogs
from serving_service.buildenv import BuildLog
from serving_service.controller import EndpointController
from serving_service.outputs import BuildOutput, ReplicaOutput
from serving_service.reconcile import Replica
from serving_service.shim.masking import Masker
from serving_service.shim.ring import Excerpt

KEY = ("endpoint", 1, "entity")


@pytest.fixture
async def build_logs(tmp_path: Path) -> AsyncIterator[BuildLogs]:
    async with database.opened(tmp_path / "serving.db", MIGRATIONS) as opened:
        yield BuildLogs(opened)


async def test_each_line_is_told_once_and_the_outcome_ends_it(build_logs: BuildLogs) -> None:
    output = BuildOutput(build_logs, *KEY)
    assert await output.news(is_awaited=True) == ("", False)
    said = build_logs.begin(*KEY)
    said.decision.append("why")
    assert await output.news(is_awaited=True) == ("why\n", False)
    said.build = BuildLog(Masker(["the-secret-value"]))
    said.build.say("step with the-secret-value")
    assert await output.news(is_awaited=True) == ("step with [secret]\n", False)
    assert await output.news(is_awaited=True) == ("", False)
    said.build.say("last step")
    build_logs.end(*KEY, said)
    assert await output.news(is_awaited=True) == ("last step\n", True)


async def test_a_build_that_failed_is_over_once_nobody_tries_again(build_logs: BuildLogs) -> None:
    output = BuildOutput(build_logs, *KEY)
    for cause in ("index away", "index still away"):
        said = build_logs.begin(*KEY)
        said.outcome = cause
        build_logs.end(*KEY, said)
        assert await output.news(is_awaited=True) == (f"{cause}\n", False)
        assert await output.news(is_awaited=True) == ("", False)
    assert await output.news(is_awaited=False) == ("", True)


async def test_lines_that_are_kept_no_more_are_counted(build_logs: BuildLogs) -> None:
    output = BuildOutput(build_logs, *KEY)
    said = build_logs.begin(*KEY)
    said.build = BuildLog(Masker([]))
    for _ in range(1_000):
        said.build.say("x" * 1_000)
    text = (await output.news(is_awaited=True)).text
    note, _, rest = text.partition("\n")
    assert note == f"--- {1_000 - rest.count('x' * 1_000)} lines are left out"
    build_logs.end(*KEY, said)


async def test_where_nothing_was_said_and_nothing_is_awaited_it_is_over(build_logs: BuildLogs) -> None:
    assert await BuildOutput(build_logs, *KEY).news(is_awaited=False) == ("", True)


class KeptLogs:
    """The one log that is kept, and the controller of the endpoint, whose replicas cannot be asked any more."""

    def __init__(self, *replicas: str) -> None:
        self.text = ""
        self.answers = asyncio.Event()
        self.answers.set()
        self.before_read: Callable[[], None] = lambda: None
        doors: Any = SimpleNamespace(database=self, launched=None, patience=None)
        self.controller = EndpointController("e", doors)
        for each in replicas:
            self.controller._replicas[each] = Replica(id=each, version=1, entity="m")
        controllers: Any = SimpleNamespace(
            handles=lambda *_: {}, last_ended=lambda _, version, entity: self.controller.last_ended(version, entity)
        )
        database: Any = self
        self.output = ReplicaOutput(database, controllers, "e", "m")

    async def write(self, *arguments: Any) -> None:
        self.text = arguments[-1]
        await self.answers.wait()

    async def read(self, *_: Any) -> str:
        self.before_read()
        return self.text

    async def ended(self, replica: str) -> None:
        async def output(*_: Any) -> Excerpt:
            return Excerpt("".join(f"{replica}{line}\n" for line in (1, 2, 3)), 3, 0)

        handle: Any = SimpleNamespace(output=output)
        await self.controller._keep_log(replica, handle)


A = "--- replica A of configuration 1\nA1\nA2\nA3\n"
B = "--- replica B of configuration 1\nB1\nB2\nB3\n"


async def test_no_log_is_told_as_the_one_of_the_replica_before() -> None:
    kept = KeptLogs("A", "B")
    assert await kept.output.news(1) == ""
    await kept.ended("A")
    kept.answers.clear()
    ending = asyncio.create_task(kept.ended("B"))
    await asyncio.sleep(0)
    assert kept.text.startswith("B1")  # it is stored, and whoever stored it has not heard so
    assert await kept.output.news(1) == ""
    kept.answers.set()
    await ending
    assert await kept.output.news(1) == B
    assert await kept.output.news(1) == ""


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_log_that_is_kept_during_a_look_is_told_at_the_next_one(is_first: bool) -> None:
    kept = KeptLogs("A", "B")
    if not is_first:
        assert await kept.output.news(1) == ""
    await kept.ended("A")
    ending = kept.ended("B")

    def ends() -> None:
        kept.before_read = lambda: None
        with pytest.raises(StopIteration):
            ending.send(None)

    kept.before_read = ends
    assert await kept.output.news(1) == ""
    assert await kept.output.news(1) == B


async def test_the_log_of_the_last_one_is_told_once() -> None:
    kept = KeptLogs("A")
    await kept.ended("A")
    assert await kept.output.news(1) == A
    assert await kept.output.news(1) == ""
