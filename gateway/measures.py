"""What this gateway measured goes to Serving every few seconds, and is counted there once, whoever of the two restarts.

The rule: reports are numbered, and one is kept until Serving has it on stable storage. Serving says which it expects
next; when it was killed, that is one that it had before and lost. While it does not answer, measures add up here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable

import grpc

from servicekit import channels
from servicekit.errors import ServiceError
from servicekit.measures import Measures, report
from tessera.serving.v1 import serving_pb2 as pb
from tessera.serving.v1 import serving_pb2_grpc as rpc

REPORT_SECONDS = 2.0
"""How often Serving is told."""

ANSWER_SECONDS = 5.0
"""How long Serving has to take a report."""

LAST_SECONDS = 1.0
"""How long a gateway that stops tries to tell the rest."""

MOST_KEPT = 100
"""How many reports are kept; Serving stores what it has once a minute. Beyond that, measures wait to be reported."""


class Reporter:
    """Reports what `measures` holds. `now` tells Unix seconds."""

    def __init__(self, measures: Measures, now: Callable[[], float] = time.time) -> None:
        self._measures = measures
        self._now = now
        self._gateway_id = uuid.uuid4().hex
        self._made = 0
        self._kept: deque[pb.MeasuresReport] = deque()
        self._expected = 1

    async def run(self, channel: grpc.aio.Channel) -> None:
        """Reports until cancelled, and then once more."""
        method = rpc.MeteringStub(channel).Report
        try:
            while True:
                await asyncio.sleep(REPORT_SECONDS)
                with contextlib.suppress(ServiceError):  # it is told again
                    await self.tell(
                        lambda message: channels.call(method, message, peer="Serving", timeout=ANSWER_SECONDS)
                    )
        finally:
            with contextlib.suppress(ServiceError, TimeoutError):
                async with asyncio.timeout(LAST_SECONDS):
                    await self.tell(
                        lambda message: channels.call(method, message, peer="Serving", timeout=LAST_SECONDS)
                    )

    async def tell(self, send: Callable[[pb.MeasuresReport], Awaitable[pb.MeasuresReceipt]]) -> None:
        """Reports everything that Serving does not have, old and new; raises what `send` raises."""
        self._make()
        if not self._kept:
            return
        self._follow(await send(self._next() or self._question()))
        for _ in range(MOST_KEPT):
            if (message := self._next()) is None:
                return
            self._follow(await send(message))

    def _make(self) -> None:
        """Makes a report of what was measured since the last one."""
        if len(self._kept) >= MOST_KEPT:
            return
        if taken := self._measures.take():
            self._made += 1
            message = report(taken)
            message.gateway_id, message.sequence = self._gateway_id, self._made
            message.end_time = int(self._now() * 1000)
            self._kept.append(message)

    def _next(self) -> pb.MeasuresReport | None:
        """The report that Serving expects, if there is one."""
        for message in self._kept:
            if message.sequence >= self._expected:
                message.oldest_sequence = self._kept[0].sequence
                return message
        return None

    def _question(self) -> pb.MeasuresReport:
        """A report of nothing, whose receipt says whether Serving still has what it had."""
        return pb.MeasuresReport(gateway_id=self._gateway_id, oldest_sequence=self._kept[0].sequence)

    def _follow(self, receipt: pb.MeasuresReceipt) -> None:
        while self._kept and self._kept[0].sequence <= receipt.stored_sequence:
            self._kept.popleft()
        self._expected = receipt.expected_sequence
