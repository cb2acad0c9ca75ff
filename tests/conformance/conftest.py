"""One live platform for all conformance tests: its people, and an endpoint that queries are sent to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.api import ENDPOINTS, Api
from tests.support.registered_models import BETTER, GOOD, SIGNED_MODEL, entity, stack_environment
from tests.support.stack import running_stack

SHARED = "shared"
DESCRIBED = "described"


@dataclass(frozen=True)
class Live:
    """A platform and those who call it."""

    url: str
    workspace_id: str
    people: dict[str, Api]

    @property
    def admin(self) -> Api:
        return self.people["admin"]


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """The endpoints `shared` and `described` are the admin's; no case may change them. The latter has a signature."""
    # Some cases say what is refused where there are no GPUs, whatever this machine has.
    with running_stack(environment=stack_environment(TESSERA_GPUS="none")) as stack:
        admin = Api(stack.url, stack.token)
        workspace_id = admin.send("GET", "/api/2.0/preview/scim/v2/Me").headers["x-databricks-org-id"]
        people = {"admin": admin, "nobody": Api(stack.url, None)}
        people |= {name: admin.new_user(f"{name}@example.com") for name in ("alice", "bob")}
        routes = [
            {"served_entity_name": "current", "traffic_percentage": 100},
            {"served_entity_name": "candidate", "traffic_percentage": 0},
        ]
        entities = [entity(GOOD, name="current"), entity(BETTER, name="candidate")]
        config = {"served_entities": entities, "traffic_config": {"routes": routes}}
        admin.call("POST", ENDPOINTS, {"name": SHARED, "config": config})
        entities = [entity("1", name="signed", model=SIGNED_MODEL)]
        admin.call("POST", ENDPOINTS, {"name": DESCRIBED, "config": {"served_entities": entities}})
        admin.deployed(SHARED)
        admin.deployed(DESCRIBED)
        yield Live(stack.url, workspace_id, people)
