"""The audit log as admins read it: one servicer, for every service that keeps a log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from servicekit.audit_tail import MOST_RECORDS, AuditTail
from servicekit.errors import InvalidParameter
from tessera.identity.v1 import audit_pb2 as pb

RECORDS = 100
"""How many are returned to who does not say."""


class AuditLogServicer:
    """Answers with records of one log, once `require_admin` has returned."""

    def __init__(self, tail: AuditTail, require_admin: Callable[[], Awaitable[None]]) -> None:
        self._tail = tail
        self._require_admin = require_admin

    async def ListAuditRecords(self, request: pb.ListAuditRecordsRequest, context: Any) -> pb.ListAuditRecordsResponse:
        await self._require_admin()
        count = request.max_results if request.HasField("max_results") else RECORDS
        if not 1 <= count <= MOST_RECORDS:
            raise InvalidParameter(f"max_results: give 1 to {MOST_RECORDS}.")
        if request.after < 0:
            raise InvalidParameter("after: give the number of a record, or 0 for all that there are.")
        found = (
            await self._tail.after(request.after, count)
            if request.HasField("after")
            else await self._tail.newest(count)
        )
        return pb.ListAuditRecordsResponse(records=[text for _, text in found])

    async def ListServingAuditRecords(
        self, request: pb.ListAuditRecordsRequest, context: Any
    ) -> pb.ListAuditRecordsResponse:
        return await self.ListAuditRecords(request, context)
