"""Reads that are remembered until the next write: a call that repeats needs no trip to the database's thread.

One process owns the database, so what it read stays true until it writes itself. The rule: nothing that was read before
a write began is used once it has begun, and nothing is remembered while one is under way. A write is under way until
its transaction has ended, also when whoever asked for it is gone.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Concatenate, ParamSpec, TypeVar

from secrets_service import grant_store
from secrets_service.feed import AccessFeed
from secrets_service.model import AccessChange
from servicekit.once import Answered, Answers
from servicekit.storage import Connection, Storage

P = ParamSpec("P")
T = TypeVar("T")

CAPACITY = 10_000
"""How many reads are remembered at the most."""


class RememberingDatabase:
    """A database with a memory; all writes of the service go through here.

    So each is made once, and this is where `feed` hears of every change of a right: a write returns when it is in force
    everywhere.
    """

    def __init__(self, database: Storage, answers: Answers, feed: AccessFeed) -> None:
        self._database = database
        self._answers = answers
        self._feed = feed
        self._memory: OrderedDict[Hashable, Any] = OrderedDict()
        self._writes_under_way = 0
        self._changes = 0

    async def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `Storage.read`."""
        return await self._database.read(function, *args, **kwargs)

    async def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `Storage.write`, once; the transaction ends as it will even if the caller is cancelled."""
        result, revision = await self._writing(self._published(function, *args, **kwargs))
        await self._feed.followed(revision)
        return result

    async def destroy(self, function: Callable[[Connection], tuple[T, int]]) -> T:
        """As `write`, for a function that returns its result and how many values it destroyed.

        If any, nothing is left of them in the database's files either.
        """

        destroyed = 0

        def change(connection: Connection) -> T:
            nonlocal destroyed
            result, destroyed = function(connection)
            return result

        async def destroy() -> tuple[T, int]:
            try:
                written = await self._published(change)
            except Answered:  # perhaps between the first call's transaction and its end
                await self._database.erase()
                raise
            if destroyed:
                await self._database.erase()
            return written

        result, revision = await self._writing(destroy())
        await self._feed.followed(revision)
        return result

    async def _published(
        self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[T, int]:
        """What a transaction results in, and the revision of the feed that tells what it changed about rights."""

        def changed(connection: Connection) -> tuple[T, AccessChange | None]:
            result = self._answers.once(connection, function, *args, **kwargs)
            return result, grant_store.take_access_changes(connection)

        result, change = await self._database.write(changed)
        return result, 0 if change is None else self._feed.publish(change)

    async def remembered(
        self,
        function: Callable[..., T],
        *args: Hashable,
        if_kept: Callable[[T], bool] = lambda result: True,
    ) -> T:
        """What `function(connection, *args)` reads, from memory when it was read since the last write.

        Only results that `if_kept` agrees to are remembered; they are shared, so they must not be changed.
        """
        key = (function, args)
        if key in self._memory:
            self._memory.move_to_end(key)
            found: T = self._memory[key]
            return found
        since = self.mark()
        result = await self._database.read(function, *args)
        if self.is_unchanged(since) and if_kept(result):
            self._remember(key, result)
        return result

    def recalled(self, function: Callable[..., T], *args: Hashable) -> T | None:
        """What `remembered` would return without a trip to the database; None when it has to make one."""
        return self._memory.get((function, args))

    def remember(self, result: T, since: int, function: Callable[..., T | None], *args: Hashable) -> None:
        """Has a result that was read together with another one be found by `remembered`, if it is still true."""
        if self.is_unchanged(since):
            self._remember((function, args), result)

    def mark(self) -> int:
        """Stands for this moment, for `is_unchanged`."""
        return -1 if self._writes_under_way else self._changes

    def is_unchanged(self, since: int) -> bool:
        """Whether everything that was read since a mark is of one state, which is the present one."""
        return since == self._changes and not self._writes_under_way

    def _remember(self, key: Hashable, result: Any) -> None:
        self._memory[key] = result
        if len(self._memory) > CAPACITY:
            self._memory.popitem(last=False)

    async def _writing(self, work: Coroutine[Any, Any, T]) -> T:
        self._writes_under_way += 1
        self._forget()
        writing = asyncio.ensure_future(work)
        writing.add_done_callback(self._written)
        return await asyncio.shield(writing)

    def _written(self, writing: asyncio.Future[Any]) -> None:
        self._writes_under_way -= 1
        self._forget()
        if not writing.cancelled():
            writing.exception()  # whoever waited has it; nobody need hear of it when the caller is gone

    def _forget(self) -> None:
        self._changes += 1
        self._memory.clear()
