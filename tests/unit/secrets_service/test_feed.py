"""The feed of what changes in rights: how its streams end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from secrets_service.feed import AccessFeed, Table
from tessera.identity.v1 import permissions_pb2 as pb


async def no_reports() -> AsyncIterator[pb.AccessReport]:
    await asyncio.Event().wait()
    yield pb.AccessReport()


async def no_rights() -> Table:
    return {}


async def test_a_stream_that_begins_when_the_service_has_stopped_ends_at_once() -> None:
    feed = AccessFeed()
    job = asyncio.create_task(feed.run())
    await asyncio.sleep(0)
    job.cancel()
    await asyncio.gather(job, return_exceptions=True)
    async with asyncio.timeout(10):
        assert [each async for each in feed.watch(no_reports(), no_rights)] == []
