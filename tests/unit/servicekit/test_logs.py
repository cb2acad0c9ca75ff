"""A log line is one JSON object with the request it belongs to, and never holds what may be a secret."""

from __future__ import annotations

import contextvars
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from servicekit import context, logs
from servicekit.context import Principal, RequestContext

CANARY = "canary-0123456789"
CALLER = Principal("7", "ada@example.com", frozenset({"users"}), "t1", None)

log = logging.getLogger("tests.logs")
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """What a process logs at debug level (or the test's parameter); logging is put back afterwards."""
    root, chatty = logging.getLogger(), [logging.getLogger(name) for name in logs.CHATTY]
    before = (root.handlers[:], root.level, [logger.level for logger in chatty])
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure("shop", getattr(request, "param", "debug"))
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], root.level = before[0], before[1]
    for logger, level in zip(chatty, before[2], strict=True):
        logger.setLevel(level)


def test_event_is_one_line_of_json_with_its_fields(lines: Lines) -> None:
    log.info("replica\nready", extra={"endpoint": "é\u2028x", "count": 2**70, "path": Path("/a"), "odd": "\udcff"})
    (line,) = lines()
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "service": "shop",
        "event": "replica\nready",
        "endpoint": "é\u2028x",
        "count": 2**70,
        "path": "/a",
        "odd": "\udcff",
    }


def test_field_cannot_pass_for_a_part_of_the_line(lines: Lines) -> None:
    def serve() -> None:
        context.enter(RequestContext("r-1", CALLER))
        log.info("paid", extra={"service": "bank", "event": "x", "level": "x", "request_id": "x", "caller": "root"})

    contextvars.Context().run(serve)
    (line,) = lines()
    assert [line[key] for key in ("service", "event", "level", "request_id", "caller")] == [
        "shop",
        "paid",
        "info",
        "r-1",
        "ada@example.com",
    ]


def test_request_and_caller_are_added_without_the_assertion(lines: Lines) -> None:
    def serve() -> None:
        context.enter(RequestContext("r-1"))
        log.info("asked")
        context.enter(RequestContext("r-1", CALLER, assertion=CANARY))
        log.info("answered", extra={"request": context.current()})

    contextvars.Context().run(serve)
    contextvars.Context().run(log.info, "idle")
    asked, answered, idle = lines()
    assert asked["request_id"] == answered["request_id"] == "r-1"
    assert "caller" not in asked
    assert answered["caller"] == "ada@example.com"
    assert "request_id" not in idle
    assert CANARY not in json.dumps([asked, answered, idle])


def test_text_of_an_exception_is_not_logged_but_its_type_and_place_are(lines: Lines) -> None:
    def innermost() -> None:
        try:
            raise KeyError(CANARY)
        except KeyError as error:
            raise ValueError(CANARY) from error

    try:
        innermost()
    except ValueError as error:
        error.add_note(CANARY)
        log.exception("failed", stack_info=True)
    (line,) = lines()
    assert line["exception"].startswith("ValueError < ")
    assert "in innermost" in line["exception"]
    assert CANARY not in json.dumps(line)


def test_members_of_a_group_of_exceptions_are_told_likewise(lines: Lines) -> None:
    def innermost() -> None:
        raise KeyError(CANARY)

    try:
        try:
            innermost()
        except KeyError as error:
            raise ExceptionGroup(CANARY, [error, OSError(CANARY)]) from None
    except ExceptionGroup:
        log.exception("failed")
    (line,) = lines()
    assert line["exception"].startswith("ExceptionGroup < ")
    assert "[KeyError < " in line["exception"]
    assert "in innermost" in line["exception"]
    assert line["exception"].endswith("; OSError]")
    assert CANARY not in json.dumps(line)


def test_field_without_repr_stays_out_of_the_line(lines: Lines) -> None:
    @dataclasses.dataclass
    class Launch:
        name: str
        value: str = dataclasses.field(repr=False)

    log.info("launched", extra={"launch": Launch("churn", CANARY)})
    (line,) = lines()
    assert "churn" in line["launch"]
    assert CANARY not in json.dumps(line)


async def test_statements_and_their_parameters_are_not_logged_at_debug(lines: Lines) -> None:
    async with aiosqlite.connect(":memory:") as connection:
        await connection.execute("SELECT ?", (CANARY,))
        with pytest.raises(aiosqlite.OperationalError):
            await connection.execute(f"SELECT '{CANARY}' FROM nowhere")
    log.debug("done")
    assert [line["event"] for line in lines()] == ["done"]


@pytest.mark.parametrize("lines", ["error"], indirect=True)
def test_level_of_the_settings_holds_for_libraries_too(lines: Lines) -> None:
    logging.getLogger("aiosqlite").warning("chatter")
    log.info("too fine")
    log.error("seen")
    assert [line["event"] for line in lines()] == ["seen"]
