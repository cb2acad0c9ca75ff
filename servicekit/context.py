"""The request that the current task is serving: its id, its caller, and the proof of identity that goes with it.

Interceptors set it; use cases, logs and outgoing calls read it. Nobody passes it by hand.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

ADMINS = "admins"


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

    warnings: list[str] = field(default_factory=list, compare=False)
    """What the caller is going to be told beside the answer; `servicekit.warnings.warn` adds to it."""


_current: ContextVar[RequestContext | None] = ContextVar("request", default=None)


def current() -> RequestContext | None:
    """The request being served, or None in background work."""
    return _current.get()


def current_caller() -> Principal:
    """The caller of the request being served; raises LookupError when there is none, which is a bug of ours."""
    request = _current.get()
    if request is None or request.caller is None:
        raise LookupError("this code serves no authenticated request")
    return request.caller


def enter(request: RequestContext) -> None:
    """Makes `request` the current one, for the rest of this task."""
    _current.set(request)
