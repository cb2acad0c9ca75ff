"""Tells those who enforce rights what changes, and waits until they act by it.

The rule: a change is handed to every stream in the order of the transactions, also when whoever asked for it is gone.
A stream that does not acknowledge in time is cut off and starts again from a whole table. So what was answered is in
force everywhere, unless somebody who follows is not well, and that one has the table's age to go by.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from secrets_service.model import AccessChange
from servicekit import followed
from servicekit.context import Level
from servicekit.followed import Follower
from tessera.identity.v1 import permissions_pb2 as pb

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 1.0
"""How long the answer to a change waits for those who follow."""

CUT_SECONDS = 5.0
"""A stream that has not acknowledged a change for so long is cut off."""

HEARTBEAT_SECONDS = 2.0
"""How often a stream hears something at least."""

PART_SIZE = 100
"""Endpoints in one message of a whole table: at the most 500 entries each, which is less than 2 MiB."""

Table = Mapping[str, Mapping[int, Level]]


@dataclass(eq=False)
class _Stream(Follower):
    """One service that follows."""

    due: list[AccessChange] = field(default_factory=list)


class AccessFeed:
    """The feed, for the life of the service. Lives on one event loop."""

    def __init__(self) -> None:
        self._revision = 1
        self._streams: set[_Stream] = set()
        self._is_over = False
        self._acknowledged = asyncio.Condition()

    def followers(self) -> int:
        """How many follow."""
        return len(self._streams)

    def publish(self, change: AccessChange) -> int:
        """Hands a change to every stream; the revision that stands for it."""
        self._revision += 1
        for stream in self._streams:
            stream.due.append(change)
            stream.woken.set()
            asyncio.get_running_loop().call_later(CUT_SECONDS, self._cut_if_behind, stream, self._revision)
        return self._revision

    async def followed(self, revision: int) -> None:
        """Returns when every stream acts by a revision, or after a second."""
        if all(stream.acknowledged >= revision for stream in self._streams):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FOLLOW_SECONDS), self._acknowledged:
                await self._acknowledged.wait_for(
                    lambda: all(stream.acknowledged >= revision for stream in self._streams)
                )

    async def watch(
        self, reports: AsyncIterator[pb.AccessReport], read_table: Callable[[], Awaitable[Table]]
    ) -> AsyncGenerator[pb.AccessChanges, None]:
        """Serves one who follows, until either side ends. `read_table` reads all that is granted now."""
        if self._is_over:
            return
        # In this order: what changes while the table is being read comes after it, and again does no harm.
        stream = _Stream()
        self._streams.add(stream)
        reading = asyncio.create_task(self._read(stream, reports), name="access reports")
        revision = self._revision
        try:
            for part in _parts(await read_table(), revision):
                yield part
            while not stream.is_over:
                yield self._next(stream)
                await stream.wait(longest=HEARTBEAT_SECONDS)
        finally:
            reading.cancel()
            self._streams.discard(stream)
            await self._notify()

    async def run(self) -> None:
        """Ends every stream when cancelled, also those that are still to come."""
        try:
            await followed.cut_at_end(self._streams)
        finally:
            self._is_over = True

    def _next(self, stream: _Stream) -> pb.AccessChanges:
        """All that a stream was not told yet; nothing, as a sign of life, when it knows everything."""
        stream.woken.clear()
        due, stream.due = stream.due, []
        endpoints: dict[str, Mapping[int, Level]] = {}
        removed: set[str] = set()
        for change in due:
            endpoints |= change.endpoints
            removed |= change.removed_endpoints
        return pb.AccessChanges(
            revision=self._revision,
            endpoints=[_endpoint(each, granted) for each, granted in endpoints.items() if each not in removed],
            removed_endpoint_ids=sorted(removed),
            principal_ids=sorted(frozenset().union(*(change.principals for change in due))),
            token_ids=sorted(frozenset().union(*(change.tokens for change in due))),
        )

    async def _read(self, stream: _Stream, reports: AsyncIterator[pb.AccessReport]) -> None:
        try:
            async for report in reports:
                stream.acknowledged = max(stream.acknowledged, report.acknowledged_revision)
                await self._notify()
        finally:
            stream.end()

    def _cut_if_behind(self, stream: _Stream, revision: int) -> None:
        if stream in self._streams and stream.acknowledged < revision:
            log.warning("a service does not follow the access feed and is cut off", extra={"revision": revision})
            stream.cut()

    async def _notify(self) -> None:
        async with self._acknowledged:
            self._acknowledged.notify_all()


def _parts(table: Table, revision: int) -> Iterator[pb.AccessChanges]:
    """A whole table in messages of bounded size; one even when it is empty."""
    endpoints = [_endpoint(each, granted) for each, granted in table.items()]
    for start in range(0, max(len(endpoints), 1), PART_SIZE):
        yield pb.AccessChanges(
            revision=revision,
            complete=True,
            more=start + PART_SIZE < len(endpoints),
            endpoints=endpoints[start : start + PART_SIZE],
        )


def _endpoint(endpoint_id: str, granted: Mapping[int, Level]) -> pb.EndpointAccess:
    return pb.EndpointAccess(
        endpoint_id=endpoint_id,
        grants=[
            pb.PrincipalAccess(principal_id=str(principal_id), level=pb.PermissionLevel.Value(level.name))
            for principal_id, level in granted.items()
        ],
    )
