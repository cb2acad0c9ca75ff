"""Streams of what is being said: to each follower what is there, then what comes, until it is over or not allowed.

The rule: a follower costs its writer nothing that depends on how fast it reads. It is told twice a second what there is
by then, or given a sign of life, which is empty; what it could not be told in time is left out and counted. Each time
it is decided anew whether it may still read. One that takes nothing for a while is cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from servicekit.errors import TooManyRequests, Unavailable
from servicekit.followed import Follower

LOOK_SECONDS = 0.5
"""How long a follower waits for what comes next."""

UNREAD_SECONDS = 30.0
"""How long a follower may take for one piece."""

MOST = 40
"""How many there may be. Each takes one of the hundred streams of a connection, and a gateway has one connection."""

MOST_OF_ONE = 10
"""How many of them may be one caller's."""


class News(NamedTuple):
    """What there is to tell at one look."""

    text: str
    is_all: bool = False
    """Whether nothing is going to follow."""


Look = Callable[[], Awaitable[News]]
"""Decides whether the caller may read, and reads what is new; what it raises ends the stream."""


class TooManyFollowers(TooManyRequests):
    """No more can be followed at the same time."""

    def __init__(self, whose: str, most: int) -> None:
        super().__init__(f"{whose} {most} logs at the same time, which is the limit. End one first.", retry_after=10)


@dataclass(eq=False)
class _Stream(Follower):
    """One follower's stream."""

    caller_id: str = field(kw_only=True)
    is_telling: bool = False
    """Whether it is being told something and has not taken it yet."""


class Followers:
    """All who follow."""

    def __init__(self) -> None:
        self._streams: set[_Stream] = set()
        self._is_over = False

    async def run(self) -> None:
        """Waits to be cancelled, and ends every stream then, so that a service that stops does not wait for them.

        Those that are still to come end after what they are told first.
        """
        try:
            await asyncio.Event().wait()
        finally:
            self._is_over = True
            for stream in list(self._streams):
                if stream.is_telling:
                    stream.cut()
                stream.end()

    async def follow(self, caller_id: str, look: Look) -> AsyncGenerator[str, None]:
        """What looks find, the first one at once; raises TooManyFollowers, Unavailable, and what a look does."""
        news = await look()  # whoever may not read is told so, and nothing about others who do
        stream = self._admitted(caller_id)
        try:
            while True:
                with _telling(stream):
                    yield news.text
                if news.is_all:
                    return
                await stream.wait(longest=LOOK_SECONDS)
                if stream.is_over:
                    raise Unavailable("The Serving service is being stopped. Follow again in a moment.", retry_after=1)
                news = await look()
        finally:
            self._streams.discard(stream)

    def _admitted(self, caller_id: str) -> _Stream:
        if len(self._streams) >= MOST:
            raise TooManyFollowers("All callers together follow", MOST)
        if sum(each.caller_id == caller_id for each in self._streams) >= MOST_OF_ONE:
            raise TooManyFollowers("You follow", MOST_OF_ONE)
        stream = _Stream(caller_id=caller_id)
        if self._is_over:
            stream.end()
        self._streams.add(stream)
        return stream


@contextmanager
def _telling(stream: _Stream) -> Iterator[None]:
    """Cuts a stream off that does not come back in time from telling something."""
    timer = asyncio.get_running_loop().call_later(UNREAD_SECONDS, stream.cut)
    stream.is_telling = True
    try:
        yield
    finally:
        stream.is_telling = False
        timer.cancel()
