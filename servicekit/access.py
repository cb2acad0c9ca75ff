"""What callers may do with endpoints: a table that Secrets keeps up to date, looked up without asking anybody.

The rule: Secrets alone decides, and sends every change at once; who follows acknowledges a change when it acts by it. A
table that has not been confirmed for some seconds is good for inference only, and for that as long as known identities
are (S12).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from functools import partial

import grpc

from servicekit import channels, followed
from servicekit.context import Level, Principal
from servicekit.errors import PermissionDenied, Unavailable
from servicekit.policy import Decision
from tessera.identity.v1 import permissions_pb2 as pb
from tessera.identity.v1 import permissions_pb2_grpc as rpc

log = logging.getLogger(__name__)

CURRENT_SECONDS = 8.0
"""Up to this age the table decides about everything: a right that was taken away is gone everywhere within 10 s."""

SILENCE_SECONDS = 5.0
"""A feed that is silent for longer is given up and opened anew; Secrets sends something every two seconds."""

FIRST_TABLE_SECONDS = 5.0
"""How long a request waits for the first table of a process that has just started."""


Forget = Callable[[Iterable[str], Iterable[str]], None]
"""Drops what is known about principals and about credentials, by their ids."""


class EndpointPermissionDenied(PermissionDenied):
    """The caller may know of the endpoint, and not do this with it; `endpoint` is its name or its id."""

    def __init__(self, user: str, level: Level, endpoint: str) -> None:
        super().__init__(f"User {user} does not have {level.name} permission on serving endpoint '{endpoint}'.")


class AccessTable:
    """Who may do what with which endpoint. `follow` keeps it up to date.

    `forget` hears of principals and credentials that changed. `stale_seconds` is how long inference may go on without
    Secrets; `now` tells seconds on a clock that nobody can set.
    """

    def __init__(self, *, forget: Forget, stale_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._forget = forget
        self._stale_seconds = stale_seconds
        self._now = now
        self._granted: dict[str, dict[str, Level]] = {}
        self._heard_at = -math.inf
        self._is_known = asyncio.Event()

    async def known(self) -> None:
        """Returns once there is a table; raises Unavailable when there is none in time."""
        if self._is_known.is_set():
            return
        try:
            async with asyncio.timeout(FIRST_TABLE_SECONDS):
                await self._is_known.wait()
        except TimeoutError:
            raise _unavailable() from None

    def decide(self, decision: Decision, caller: Principal, *, name: str, endpoint_id: str | None) -> Level | None:
        """The caller's level on the endpoint called `name`, when it is enough for the row; None when the caller may not
        know that there is one.

        Without an endpoint (its id is None) the table is asked all the same, so that one that cannot be judged looks
        like one that does not exist. Raises EndpointPermissionDenied and Unavailable.
        """
        needed = Level[decision.row.level]
        level = self.level(caller, endpoint_id or "", may_be_stale=decision.row.is_inference)
        if endpoint_id is None or level is None:
            return None
        if level < needed:
            raise EndpointPermissionDenied(caller.name, needed, name)
        decision.allow()
        return level

    def level(self, caller: Principal, endpoint_id: str, *, may_be_stale: bool = False) -> Level | None:
        """The strongest level that a caller holds on an endpoint; None when it may not know that there is one.

        `may_be_stale` is for inference. Raises Unavailable when the table is too old to decide.
        """
        limit = max(self._stale_seconds, CURRENT_SECONDS) if may_be_stale else CURRENT_SECONDS
        if self._now() - self._heard_at > limit:
            raise _unavailable()
        if not caller.may_query(endpoint_id):
            return None
        if caller.is_admin:
            return Level.CAN_MANAGE
        granted = self._granted.get(endpoint_id)
        if granted is None:
            return None
        held = [granted[each] for each in (caller.id, *caller.group_ids) if each in granted]
        return max(held, default=None)

    async def follow(self, channel: grpc.aio.Channel) -> None:
        """Keeps the table up to date until cancelled; comes back by itself when Secrets was gone."""
        await followed.follow("access", partial(self._follow_once, channel), heard=lambda: self._heard_at)

    async def _follow_once(self, channel: grpc.aio.Channel) -> None:
        stream = rpc.AccessFeedStub(channel).Watch(metadata=channels.outgoing_metadata())
        parts: dict[str, dict[str, Level]] = {}
        try:
            while True:
                async with asyncio.timeout(SILENCE_SECONDS):
                    changes = await stream.read()
                    if not isinstance(changes, pb.AccessChanges):  # the end of the stream
                        return
                    self._apply(changes, parts)
                    await stream.write(pb.AccessReport(acknowledged_revision=0 if changes.more else changes.revision))
        except TimeoutError:
            log.warning("access feed is silent and is opened anew")
        finally:
            stream.cancel()

    def _apply(self, changes: pb.AccessChanges, parts: dict[str, dict[str, Level]]) -> None:
        """Follows a message; the parts of a whole table are collected in `parts` and replace what was known."""
        granted = {
            each.endpoint_id: {grant.principal_id: Level(grant.level) for grant in each.grants}
            for each in changes.endpoints
        }
        if changes.complete:
            parts |= granted
            if not changes.more:
                self._granted = dict(parts)
                parts.clear()
                self._is_known.set()
        else:
            self._granted |= granted
            for endpoint_id in changes.removed_endpoint_ids:
                self._granted.pop(endpoint_id, None)
            self._forget(changes.principal_ids, changes.token_ids)
        if self._is_known.is_set() and not changes.more:
            self._heard_at = self._now()


def _unavailable() -> Unavailable:
    return Unavailable("The Secrets service does not answer just now. Try again in a moment.", retry_after=1)
