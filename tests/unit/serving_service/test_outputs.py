"""What a follower of a build is told: every line once, over builds that are tried again, and to its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from servicekit import database
from serving_service.app import MIGRATIONS
from serving_service.build_logs import BuildLogs
from serving_service.buildenv import BuildLog
from serving_service.outputs import BuildOutput
from serving_service.shim.masking import Masker

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
