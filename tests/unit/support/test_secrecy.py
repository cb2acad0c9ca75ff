"""What tells two answers apart, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest

from tests.support.http import Answer
from tests.support.secrecy import shown

HEADERS = {"content-type": "application/json", "x-tessera-request-id": "id-1", "date": "Fri, 27 Nov 2026 06:00:00 GMT"}
PRESENT = Answer(403, HEADERS, b'{"message":"No permission on present. Request id: id-1."}')


def about_missing(body: bytes = PRESENT.body, *, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
    """The same answer about another name, under another request id, at another time."""
    own = {**HEADERS, "x-tessera-request-id": "id-22", "date": "Fri, 27 Nov 2026 06:00:01 GMT", **headers}
    return Answer(403, own, body.replace(b"present", b"missing").replace(b"id-1", b"id-22"))


def test_name_request_id_and_time_tell_nothing() -> None:
    assert shown(PRESENT, "present") == shown(about_missing(), "missing")


@pytest.mark.parametrize(
    "other",
    [
        replace(about_missing(), status=404),
        about_missing(headers={"etag": "1"}),
        about_missing(headers={"content-type": "text/plain"}),
        about_missing(PRESENT.body + b" "),
        about_missing(PRESENT.body.replace(b"present", b"that")),
    ],
    ids=["status", "another header", "another value of a header", "body", "name"],
)
def test_every_other_difference_tells(other: Answer) -> None:
    assert shown(PRESENT, "present") != shown(other, "missing")
