"""A warning is logged, kept with the request, and always fit for a header."""

from __future__ import annotations

import asyncio
import contextvars
import logging

import pytest

from servicekit import context
from servicekit.context import RequestContext
from servicekit.warnings import warn


def warned(*texts: str) -> list[str]:
    """What a request has to tell its caller after these warnings."""
    request = RequestContext("r1")

    def serve() -> None:
        context.enter(request)
        for text in texts:
            warn("event", text)

    contextvars.Context().run(serve)
    return request.warnings


def test_warnings_are_told_in_their_order() -> None:
    assert warned("first", "second") == ["first", "second"]
    assert warned() == []


@pytest.mark.parametrize("text", ["Zoë\r\nx-evil: 1", "\0", "\x7f", "☃"])
def test_what_no_header_can_hold_is_escaped(text: str) -> None:
    [told] = warned(text)
    assert told.isascii()
    assert told.isprintable()


def test_warning_outside_of_a_request_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    contextvars.Context().run(warn, "something odd", "A sentence.", scope="Shop")
    [record] = caplog.records
    assert (record.message, record.levelno, vars(record)["scope"]) == ("something odd", logging.WARNING, "Shop")


def test_requests_do_not_share_warnings() -> None:
    async def one(number: int) -> list[str]:
        request = RequestContext(f"r{number}")
        context.enter(request)
        await asyncio.sleep(0)
        warn("event", str(number))
        return request.warnings

    async def both() -> tuple[list[str], list[str]]:
        return await asyncio.gather(one(1), one(2))

    assert list(asyncio.run(both())) == [["1"], ["2"]]
