"""The request that the current task is serving: its id, its caller, and what its row of the policy asks for.

Interceptors set it; use cases, logs and outgoing calls read it. Nobody passes it by hand.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum

from servicekit.policy import Decision

ADMINS = "admins"


class Level(IntEnum):
    """What a principal may do with an endpoint; each level includes those below it (contract 3.4)."""

    CAN_VIEW = 1
    CAN_QUERY = 2
    CAN_MANAGE = 3


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling, as Secrets vouched for it."""

    id: str
    """Decimal digits; never reused."""

    name: str
    """User name, or a service principal's application id."""

    groups: frozenset[str]
    """Names of all groups that the principal belongs to."""

    token_id: str
    """Public id of the credential that was presented, or that the presented access token was obtained with. Empty for
    a token of an external issuer, which we keep nothing about."""

    token_expires_at: float | None
    """When that token stops working, in Unix seconds; None when never."""

    kind: str = "user"
    """`user` or `service_principal`."""

    group_ids: frozenset[str] = frozenset()
    """Ids of the same groups: what permissions are granted to."""

    endpoint_id: str | None = None
    """The one endpoint that the caller's token may query, and nothing else; None for a token without such a bound."""

    @property
    def is_admin(self) -> bool:
        return ADMINS in self.groups

    def may_query(self, endpoint_id: str) -> bool:
        """Whether the caller's token is good for this endpoint; whether the caller may query it is another question."""
        return self.endpoint_id in (None, endpoint_id)


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What is known about one request."""

    request_id: str
    caller: Principal | None = None
    assertion: str | None = field(default=None, repr=False)
    """The signed statement about `caller`, passed on with calls to other services."""

    may_be_repeated: bool = False
    """Whether the caller chose the id, so that the same request under the same id is a retry (`servicekit.once`)."""

    warnings: list[str] = field(default_factory=list, compare=False)
    """What the caller is going to be told beside the answer; `servicekit.warnings.warn` adds to it."""

    again: Callable[[], Awaitable[Principal]] | None = field(default=None, compare=False, repr=False)
    """Asks once more who calls, for a request that has waited; None where nothing waits. Raises as the first time."""

    decision: Decision | None = field(default=None, compare=False)
    """The row of what is being called, and whether what it leaves to the use case is decided; None: there is no row."""


_current: ContextVar[RequestContext | None] = ContextVar("request", default=None)


_source: ContextVar[str] = ContextVar("source", default="")


def came_from(address: str) -> None:
    """Says where the request being served comes from."""
    _source.set(address)


def source() -> str:
    """The address that the request being served comes from; empty when nobody knows."""
    return _source.get()


def current() -> RequestContext | None:
    """The request being served, or None in background work."""
    return _current.get()


def current_caller() -> Principal:
    """The caller of the request being served; raises LookupError when there is none, which is a bug of ours."""
    request = _current.get()
    if request is None or request.caller is None:
        raise LookupError("this code serves no authenticated request")
    return request.caller


async def caller_again() -> Principal:
    """As `current_caller`, asked anew: the credential may have been revoked since. Raises Unauthenticated."""
    request = _current.get()
    if request is None or request.again is None:
        raise LookupError("this code serves no request that may wait")
    return await request.again()


def current_decision(subject: str) -> Decision:
    """What the row of the request being served leaves to decide about `subject`; also within transactions.

    Raises LookupError when it leaves nothing or something else, which is a bug of ours: in the table or at the caller.
    """
    request = _current.get()
    if request is None or request.decision is None or request.decision.row.subject != subject:
        raise LookupError(f"the row of what is being served leaves nothing to decide about {subject}")
    return request.decision


def enter(request: RequestContext) -> None:
    """Makes `request` the current one, for the rest of this task."""
    _current.set(request)
