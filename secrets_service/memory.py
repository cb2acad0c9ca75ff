"""Reads that are remembered until the next write: a call that repeats needs no trip to the database's thread.

One process owns the database, so what it read stays true until it writes itself. The rule: nothing that was read before
a write began is used once it has begun, and nothing is remembered while one is under way. A write is under way until
its transaction has ended, also when whoever asked for it is gone.

What decides about rights is remembered apart. A write that says that it leaves rights alone has only the rest
forgotten, which is values: else each put of a secret would have every caller's token looked up anew. And since
transactions are made in the order in which they are asked for, such a write may rely on rights that were remembered, as
long as no write that may change them has begun.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from secrets_service import grant_store, store
from secrets_service.feed import AccessFeed
from secrets_service.model import AccessChange
from servicekit.once import Answered, Answers
from servicekit.storage import Connection, Storage

P = ParamSpec("P")
T = TypeVar("T")

CAPACITY = 10_000
"""How many reads of each kind are remembered at the most."""

MOST_TOGETHER = 64
"""How many reads are made in one trip to the database's thread."""

RIGHTS = frozenset[Callable[..., Any]](
    {
        store.find_presented,
        store.find_scope_and_standing,
        store.find_token,
        store.find_user,
        store.find_user_named,
    }
)
"""The reads that decide about rights and about nothing else. What is not among them is forgotten with every write."""


_NOTHING: Any = object()
"""Stands for what is not remembered; what was read may be None."""


class Mark(NamedTuple):
    """Stands for a moment."""

    rights: int
    values: int


@dataclass(slots=True)
class _Reads:
    """The remembered reads of one kind."""

    results: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict)
    writes_under_way: int = 0
    changes: int = 0

    def mark(self) -> int:
        return -1 if self.writes_under_way else self.changes

    def are_unchanged(self, since: int) -> bool:
        # From the database's thread, too: what begins after the first look is made after the transaction there.
        return since == self.changes and not self.writes_under_way

    def add(self, key: Hashable, result: Any) -> None:
        self.results[key] = result
        if len(self.results) > CAPACITY:
            self.results.popitem(last=False)

    def write_begins(self) -> None:
        self.writes_under_way += 1
        self._forget()

    def write_ended(self) -> None:
        self.writes_under_way -= 1
        self._forget()

    def _forget(self) -> None:
        self.changes += 1
        self.results.clear()


class _Wanted(NamedTuple):
    """A read that somebody waits for."""

    read: Callable[[Connection], Any]
    result: asyncio.Future[Any]


class RememberingDatabase:
    """A database with a memory; all writes of the service go through here.

    So each is made once, and this is where `feed` hears of every change of a right: a write returns when it is in force
    everywhere.
    """

    def __init__(self, database: Storage, answers: Answers, feed: AccessFeed) -> None:
        self._database = database
        self._answers = answers
        self._feed = feed
        self._rights = _Reads()
        self._values = _Reads()
        self._wanted: list[_Wanted] = []
        self._is_reading = False
        self._reading_on: asyncio.Task[None] | None = None
        self._writing_on: set[asyncio.Future[None]] = set()

    async def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `Storage.read`."""
        return await self._database.read(function, *args, **kwargs)

    async def read_together(self, function: Callable[..., T], *args: Hashable) -> T:
        """As `read`, at once or, while such a trip is under way, with whatever else is wanted when that one is over.

        For functions that read a few rows, which costs less than the trip.
        """
        read = partial(_applied, function, args)
        if self._is_reading:
            wanted = _Wanted(_in_context(read), asyncio.get_running_loop().create_future())
            self._wanted.append(wanted)
            result: T = await wanted.result
            return result
        self._is_reading = True
        try:
            return await self._database.read(read)
        finally:
            self._read_on()

    async def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `Storage.write`, once; the transaction ends as it will even if the caller is cancelled."""
        result, revision = await self._writing(self._published(function, *args, **kwargs), self._rights, self._values)
        await self._feed.followed(revision)
        return result

    async def destroy(self, function: Callable[[Connection], tuple[T, int]], *, leaves_rights: bool = False) -> T:
        """As `write`, for a function that returns its result and how many values it destroyed.

        If any, nothing is left of them in the database's files either. `leaves_rights` says that the function changes
        nothing that rights depend on.
        """

        destroyed = 0

        def change(connection: Connection) -> T:
            nonlocal destroyed
            result, destroyed = function(connection)
            return result

        async def destroy() -> tuple[T, int]:
            try:
                if leaves_rights:
                    written = await self._database.write(self._answers.once, change), 0
                else:
                    written = await self._published(change)
            except Answered:  # perhaps between the first call's transaction and its end
                await self._database.erase()
                raise
            if destroyed:
                await self._database.erase()
            return written

        concerned = (self._values,) if leaves_rights else (self._rights, self._values)
        result, revision = await self._writing(destroy(), *concerned)
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

        Only results that `if_kept` agrees to are remembered; they are shared, so they must not be changed. The function
        reads a few rows: others may wait for it.
        """
        reads, key = self._kind(function), (function, args)
        found: T = reads.results.get(key, _NOTHING)
        if found is not _NOTHING:
            reads.results.move_to_end(key)
            return found
        since = reads.mark()
        result: T = await self.read_together(function, *args)
        if reads.are_unchanged(since) and if_kept(result):
            reads.add(key, result)
        return result

    def recalled(self, function: Callable[..., T], *args: Hashable) -> T | None:
        """What `remembered` would return without a trip to the database; None when it has to make one."""
        return self._kind(function).results.get((function, args))

    def remember(self, result: T, since: Mark, function: Callable[..., T | None], *args: Hashable) -> None:
        """Has a result that was read together with another one be found by `remembered`, if it is still true."""
        reads = self._kind(function)
        if reads.are_unchanged(since.values if reads is self._values else since.rights):
            reads.add((function, args), result)

    def mark(self) -> Mark:
        """Stands for this moment, for `is_unchanged`."""
        return Mark(self._rights.mark(), self._values.mark())

    def is_unchanged(self, since: Mark) -> bool:
        """Whether everything that was read since a mark is of one state, which is the present one."""
        return self._values.are_unchanged(since.values) and self.has_same_rights(since)

    def has_same_rights(self, since: Mark) -> bool:
        """Whether rights that were recalled at a mark are still true; within a transaction, whether they are there."""
        return self._rights.are_unchanged(since.rights)

    def _kind(self, function: Callable[..., Any]) -> _Reads:
        return self._rights if function in RIGHTS else self._values

    def _read_on(self) -> None:
        batch, self._wanted = self._wanted[:MOST_TOGETHER], self._wanted[MOST_TOGETHER:]
        self._is_reading = bool(batch)
        if batch:
            reading = self._read_all(batch)
            self._reading_on = asyncio.get_running_loop().create_task(reading, name="reads", context=Context())

    async def _read_all(self, batch: Sequence[_Wanted]) -> None:
        try:
            results = await self._database.read(_each, batch)
        except Exception:  # no matter of the others, which is found by reading for each alone
            for wanted in batch:
                await self._read_alone(wanted)
        else:
            for wanted, result in zip(batch, results, strict=True):
                if not wanted.result.done():  # else whoever asked is gone
                    wanted.result.set_result(result)
        finally:
            self._read_on()

    async def _read_alone(self, wanted: _Wanted) -> None:
        try:
            result = await self._database.read(wanted.read)
        except Exception as error:
            if not wanted.result.done():
                wanted.result.set_exception(error)
        else:
            if not wanted.result.done():
                wanted.result.set_result(result)

    async def _writing(self, work: Coroutine[Any, Any, T], *concerned: _Reads) -> T:
        for reads in concerned:
            reads.write_begins()
        # Rather than by `shield`, which takes one more turn of the loop.
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        writing = asyncio.ensure_future(_written(work, concerned, outcome))
        self._writing_on.add(writing)
        writing.add_done_callback(self._writing_on.discard)
        return await outcome


def _applied(function: Callable[..., T], args: tuple[Hashable, ...], connection: Connection) -> T:
    return function(connection, *args)


def _in_context(read: Callable[[Connection], T]) -> Callable[[Connection], T]:
    """The read, for whose errors whoever asked for it is told from others in the log."""
    context = copy_context()
    return lambda connection: context.run(read, connection)


def _each(connection: Connection, batch: Sequence[_Wanted]) -> list[Any]:
    return [wanted.read(connection) for wanted in batch]


async def _written(work: Coroutine[Any, Any, T], concerned: Sequence[_Reads], outcome: asyncio.Future[T]) -> None:
    try:
        result = await work
    except asyncio.CancelledError:
        outcome.cancel()
        raise
    except Exception as error:
        if not outcome.done():  # else whoever asked is gone
            outcome.set_exception(error)
    else:
        if not outcome.done():
            outcome.set_result(result)
    finally:
        for reads in concerned:
            reads.write_ended()
