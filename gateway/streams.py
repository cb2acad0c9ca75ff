"""Answers that go on: piece by piece, for as long as somebody reads them and may.

The rule: with every piece, and a service sends one at least every few seconds, the caller is asked for again (S12).
What is given up before its end is not ended, so its connection is cut.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
from google.api.httpbody_pb2 import HttpBody

from gateway.http import Answer, Request, WhileWanted
from servicekit.context import Principal
from servicekit.errors import PermissionDenied, ServiceError, Unavailable
from servicekit.identity import TokenExchange, token_from

log = logging.getLogger(__name__)

UNREAD_SECONDS = 30.0
"""How long a caller may take for one piece."""


class Streams:
    """Passes streams on; `stop` has all of them end soon."""

    def __init__(self, exchange: TokenExchange) -> None:
        self._exchange = exchange
        self._is_stopping = False

    def stop(self) -> None:
        """Has every stream end with its next piece, so that the gateway does not wait for them."""
        self._is_stopping = True

    async def pass_on(
        self, request: Request, answer: Answer, caller: Principal, pieces: AsyncGenerator[HttpBody, None]
    ) -> None:
        """Answers with `pieces`; raises what they do as long as nothing was answered, and ClientGone."""
        try:
            with WhileWanted(request):
                async with aclosing(pieces):
                    async for piece in pieces:
                        await self._check(request, caller)
                        if not answer.status:
                            answer.begin(200, [(b"content-type", piece.content_type.encode("ascii"))])
                        async with asyncio.timeout(UNREAD_SECONDS):
                            await answer.piece(piece.data)
        except (grpc.aio.AioRpcError, ServiceError, TimeoutError) as error:
            if not answer.status:
                raise
            log.info("stream given up", extra={"request_id": request.id, "problem": type(error).__name__})
        else:
            if not answer.status:
                answer.begin(200, [])
            answer.end()

    async def _check(self, request: Request, caller: Principal) -> None:
        """Raises unless the stream may go on."""
        if self._is_stopping:
            raise Unavailable("The gateway is being stopped. Ask again in a moment.", retry_after=1)
        identity = await self._exchange.identify(token_from(request.header(b"authorization")))
        if identity.principal != caller:  # what the service decides by is what it was told in the beginning
            raise PermissionDenied("What you belong to has changed meanwhile. Ask again.")
