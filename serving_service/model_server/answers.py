"""What is answered to an invocation: all at once, or event by event."""

from collections.abc import Generator
from typing import NamedTuple


class Answer(NamedTuple):
    """A whole answer, in JSON."""

    status: int
    body: bytes


class Stream(NamedTuple):
    """An answer in server-sent events. Every step of `rest` has to run in the context that this was made in."""

    first: bytes
    rest: Generator[bytes, None, None]


def error_event(body: bytes) -> bytes:
    """The last event of a stream that fails, from the body that the error would have as an answer."""
    return b'data: {"error": ' + body + b"}\n\n"
