"""Followers: what each is told when, how many there may be, and how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from servicekit.errors import Unavailable
from serving_service import followers
from serving_service.followers import Followers, News, TooManyFollowers


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "LOOK_SECONDS", 0.01)


class Said:
    """What is said, one piece at each look; then nothing, until it `is_all`."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = list(pieces)
        self.is_all = False
        self.looks = 0

    async def look(self) -> News:
        self.looks += 1
        text = self.pieces.pop(0) if self.pieces else ""
        return News(text, is_all=self.is_all and not self.pieces)


def following(those: Followers, said: Said, caller: str = "ann") -> AsyncGenerator[str, None]:
    return those.follow(caller, said.look)


async def test_pieces_come_in_order_with_signs_of_life_and_an_end() -> None:
    said = Said("one", "two")
    told = []
    async for text in following(Followers(), said):
        told.append(text)
        said.is_all = len(told) == 4
    assert told[:4] == ["one", "two", "", ""]
    assert set(told[4:]) == {""}


async def test_what_a_look_raises_ends_the_stream_and_gives_its_place_back() -> None:
    those = Followers()

    async def refused() -> News:
        raise Unavailable("not now")

    for _ in range(followers.MOST + 1):
        with pytest.raises(Unavailable):
            await anext(those.follow("ann", refused))
    assert await anext(following(those, Said("one"))) == "one"


async def test_places_are_bounded_for_each_and_for_all() -> None:
    those = Followers()
    async with AsyncExitStack() as stack:
        for number in range(followers.MOST):
            caller = f"caller {number // followers.MOST_OF_ONE}"
            stream = await stack.enter_async_context(aclosing(following(those, Said(), caller)))
            await anext(stream)
            if number == followers.MOST_OF_ONE - 1:
                with pytest.raises(TooManyFollowers, match="You follow 10 logs"):
                    await anext(following(those, Said(), "caller 0"))
        with pytest.raises(TooManyFollowers, match="All callers together follow 40 logs"):
            await anext(following(those, Said(), "another"))
    assert await anext(following(those, Said("one"), "another")) == "one"


async def test_who_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers, "UNREAD_SECONDS", 0.01)

    async def read_one_and_hang() -> None:
        async with aclosing(following(Followers(), Said("one"))) as stream:
            await anext(stream)
            await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(read_one_and_hang())


async def test_all_are_told_when_the_service_stops() -> None:
    those = Followers()
    async with running(those) as job, aclosing(following(those, Said("one"))) as stream:
        await anext(stream)
        waiting = asyncio.create_task(_until_it_ends(stream))
        await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(Unavailable, match="being stopped"):
            await waiting


async def test_who_begins_to_follow_when_the_service_has_stopped_is_told_what_there_is_and_no_more() -> None:
    those = Followers()
    async with running(those) as job:
        job.cancel()
    async with aclosing(following(those, Said("one"))) as stream:
        assert await anext(stream) == "one"
        with pytest.raises(Unavailable, match="being stopped"):
            await anext(stream)


async def _until_it_ends(stream: AsyncIterator[str]) -> None:
    async for _ in stream:
        pass


@asynccontextmanager
async def running(those: Followers) -> AsyncIterator[asyncio.Task[None]]:
    job = asyncio.create_task(those.run())
    await asyncio.sleep(0)
    yield job
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
