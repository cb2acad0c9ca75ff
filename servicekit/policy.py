"""Who may call what: the rows of a policy table, and what a row leaves for a use case to decide.

The rule: an RPC or a route without a row stops the process at its start, and a row is what is enforced. Where it only
asks who calls, the listener decides. Where it asks for a permission, the use case does, and it takes the level from the
row; an answer that comes without that decision is withheld.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from servicekit.errors import StartError
from servicekit.exposure import exposure


@dataclass(frozen=True, slots=True)
class Row:
    """Who may call one RPC or route."""

    needs_caller: bool = True
    """Whether somebody must be known to call, by a token or an assertion."""

    peers: frozenset[str] = frozenset()
    """The only ones who may call, each over a socket of its own; empty: whoever reaches a public listener."""

    subject: str = ""
    """What the use case must decide about before it may answer, such as `scope`; empty: nothing."""

    level: str = ""
    """Which permission on the subject that takes."""

    is_audited: bool = True
    """Whether each call is recorded (`servicekit.audit`)."""

    is_inference: bool = False
    """Whether a token that is bound to one endpoint is good for it, and callers that were known before may go on with
    it for a while when Secrets does not answer (S12)."""


Table = Mapping[str, Row]
"""A row for each RPC (`package.Service/Method`) and for each route of a gateway that is no RPC (`GET /path/{name}`)."""

OPEN = Row(needs_caller=False, is_audited=False)
"""Anybody, without a credential: there is nothing to decide."""

AUTHENTICATED = Row()
"""Any caller: the answer is about the caller, or nothing that one caller may know and another may not."""


def internal(peer: str, *others: str, is_audited: bool = True) -> Row:
    """The row of what these peers may call, on somebody's behalf or on nobody's."""
    return Row(needs_caller=False, peers=frozenset((peer, *others)), is_audited=is_audited)


def on_behalf(peer: str, *others: str) -> Row:
    """The row of what these peers may call, but only on somebody's behalf."""
    return Row(peers=frozenset((peer, *others)))


def permission(subject: str, level: str = "", *, is_inference: bool = False) -> Row:
    """The row of what takes a permission that a use case decides about."""
    return Row(subject=subject, level=level, is_audited=not is_inference, is_inference=is_inference)


class Decision:
    """What the row of one request leaves to its use case; made once, in whatever thread."""

    __slots__ = ("is_allowed", "row")

    def __init__(self, row: Row) -> None:
        self.row = row
        self.is_allowed = not row.subject
        """Whether an answer may leave."""

    def allow(self) -> None:
        """Says that the caller has the permission that the row asks for."""
        self.is_allowed = True


class Undecided(Exception):
    """A use case answered without the decision that its row asks for: a bug, and the answer must not leave."""


def rpc_name(method: MethodDescriptor) -> str:
    """The name of an RPC's row."""
    return f"{method.containing_service.full_name}/{method.name}"


def check(
    table: Table,
    services: Iterable[ServiceDescriptor],
    *,
    standard: Iterable[ServiceDescriptor] = (),
    routes: Collection[str] | None = None,
) -> None:
    """Raises StartError, which names everything that is wrong, unless rows and what a process serves are the same.

    `standard` are services of gRPC's own: they do not say how they are exposed, and what has no row is not served.
    `routes` are the routes that are no RPCs, None for a process that has none to do with.
    """
    own, foreign = list(services), list(standard)
    problems = [problem for service in own for method in service.methods for problem in _problems(table, method)]
    needed = {rpc_name(method) for service in own for method in service.methods} | set(routes or ())
    problems += [f"{name} has no row" for name in needed - table.keys()]
    served = {service.full_name for service in (*own, *foreign)}
    known = {rpc_name(method) for service in foreign for method in service.methods} | needed
    for name in table.keys() - known:
        service, _, _ = name.partition("/")
        if service in served:
            problems.append(f"the row {name} is for no RPC")
        if " " in service and routes is not None:
            problems.append(f"the row {name} is for no route")
    if problems:
        raise StartError(f"The policy does not fit what is served: {'; '.join(sorted(problems))}.")


def _problems(table: Table, method: MethodDescriptor) -> Iterable[str]:
    """Where the row of an RPC, if it has one, says something else than the RPC about who can reach it."""
    try:
        exposed = exposure(method)
    except ValueError as error:
        yield str(error).removesuffix(".")
        return
    name = rpc_name(method)
    if name in table and table[name].peers != exposed.callers:
        yield f"{name} is exposed to {_named(exposed.callers)}, but its row is for {_named(table[name].peers)}"


def _named(peers: frozenset[str]) -> str:
    return ", ".join(sorted(peers)) or "the public"
