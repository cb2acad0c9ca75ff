"""A policy fits what is served, or nothing is served; and a decision belongs to the row that asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from servicekit import context, database
from servicekit.context import current_decision
from servicekit.errors import StartError
from servicekit.policy import AUTHENTICATED, OPEN, Decision, Row, check, internal, on_behalf, permission
from tests.support.descriptors import ProtoFile
from tests.support.policy import serving


def a_service(**rpcs: dict[str, Any]) -> ServiceDescriptor:
    """A service of these RPCs; what is said of each is how it is exposed."""
    file = ProtoFile()
    file.message("Nothing")
    for name, options in rpcs.items():
        file.rpc("Shop", name, "Nothing", "Nothing", **options)
    return file.build().services_by_name["Shop"]


def problems(
    rows: dict[str, Row], service: ServiceDescriptor, *, routes: Collection[str] | None = None, **others: Row
) -> list[str]:
    """What is wrong with a table that has these rows for RPCs of the service, and the others besides."""
    table = {f"{service.full_name}/{name}": row for name, row in rows.items()} | others
    with pytest.raises(StartError, match=r"^The policy does not fit what is served: ") as caught:
        check(table, [service], routes=routes)
    text = str(caught.value).removeprefix("The policy does not fit what is served: ").removesuffix(".")
    return [problem.replace(f"{service.full_name}/", "") for problem in text.split("; ")]


PUBLIC: dict[str, Any] = {"grpc_only": True}
TO_SERVING: dict[str, Any] = {"internal_to": ["serving"]}


def test_table_that_fits_is_taken() -> None:
    service = a_service(Buy=PUBLIC, Count=TO_SERVING, Look=PUBLIC)
    name = service.full_name
    table = {
        f"{name}/Buy": permission("shelf", "WRITE"),
        f"{name}/Count": internal("serving"),
        f"{name}/Look": OPEN,
        "GET /health": OPEN,
        "elsewhere.v1.Bank/Pay": AUTHENTICATED,
    }
    check(table, [service], routes=["GET /health"])
    check(table, [service])


def test_every_rpc_and_route_without_a_row_is_named() -> None:
    service = a_service(Buy=PUBLIC, Count=TO_SERVING, Look=PUBLIC)
    assert problems({"Buy": AUTHENTICATED}, service, routes=["GET /health", "GET /metrics"]) == [
        "GET /health has no row",
        "GET /metrics has no row",
        "Count has no row",
        "Look has no row",
    ]


def test_service_of_grpc_needs_no_row_for_what_it_does_not_serve() -> None:
    standard = a_service(Check={}, List={})
    check({f"{standard.full_name}/Check": OPEN}, [], standard=[standard])
    with pytest.raises(StartError, match=f"the row {standard.full_name}/Checks is for no RPC"):
        check({f"{standard.full_name}/Checks": OPEN}, [], standard=[standard])


def test_row_that_is_for_nothing_is_named() -> None:
    service = a_service(Look=PUBLIC)
    rows = {"Look": OPEN, "Looks": OPEN}
    assert problems(rows, service) == ["the row Looks is for no RPC"]
    assert problems(rows, service, routes=[], **{"GET /old": OPEN}) == [
        "the row GET /old is for no route",
        "the row Looks is for no RPC",
    ]


@pytest.mark.parametrize(
    ("exposed", "row", "problem"),
    [
        (TO_SERVING, AUTHENTICATED, "Do is exposed to serving, but its row is for the public"),
        (TO_SERVING, OPEN, "Do is exposed to serving, but its row is for the public"),
        (TO_SERVING, internal("gateway", "serving"), "Do is exposed to serving, but its row is for gateway, serving"),
        (TO_SERVING, on_behalf("gateway"), "Do is exposed to serving, but its row is for gateway"),
        (PUBLIC, internal("gateway"), "Do is exposed to the public, but its row is for gateway"),
    ],
)
def test_row_that_contradicts_how_its_rpc_is_exposed_is_named(exposed: Any, row: Row, problem: str) -> None:
    assert problems({"Do": row}, a_service(Do=exposed)) == [problem]


def test_rpc_that_does_not_say_who_can_reach_it_is_named() -> None:
    service = a_service(Do={})
    assert problems({"Do": AUTHENTICATED}, service)[0].startswith(f"RPC {service.full_name}.Do needs exactly one of")


def test_only_a_row_that_asks_for_a_permission_leaves_something_to_decide() -> None:
    for row in (OPEN, AUTHENTICATED, internal("gateway"), on_behalf("gateway")):
        assert Decision(row).is_allowed
    decision = Decision(permission("shelf", "WRITE"))
    assert not decision.is_allowed
    decision.allow()
    assert decision.is_allowed


def test_deciding_what_the_row_does_not_ask_for_fails() -> None:
    with pytest.raises(LookupError, match="nothing to decide about shelf"):
        current_decision("shelf")
    for row in (AUTHENTICATED, permission("counter")):
        with serving(row), pytest.raises(LookupError, match="nothing to decide about shelf"):
            current_decision("shelf")


async def test_what_is_decided_in_a_transaction_is_decided_for_its_request_alone(tmp_path: Path) -> None:
    async def decide(opened: database.Database, level: str) -> tuple[str, bool]:
        decision = Decision(permission("shelf", level))
        context.enter(context.RequestContext(level, decision=decision))

        def transaction(_: Any) -> str:
            found = current_decision("shelf")
            if level == "WRITE":
                found.allow()
            return found.row.level

        return await opened.write(transaction), decision.is_allowed

    (tmp_path / "migrations").mkdir()
    async with database.opened(tmp_path / "shop.db", tmp_path / "migrations") as opened:
        tasks = [asyncio.create_task(decide(opened, level)) for level in ("READ", "WRITE")]
        assert await asyncio.gather(*tasks) == [("READ", False), ("WRITE", True)]
