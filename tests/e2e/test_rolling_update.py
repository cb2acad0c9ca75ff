"""An update replaces replicas without a failed query; one that fails, or is cut short, leaves what was there."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.api import ENDPOINTS, Api, until
from tests.support.registered_models import BETTER, FAILING, GOOD, LOAD_FAILURE, WAITING, entity, stack_environment
from tests.support.stack import Stack, running_stack

SECRET = "rolling-update-secret"
KEY = {"OPENAI_API_KEY": "{{secrets/scope/key}}"}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(environment=stack_environment()) as running:
        yield running


@pytest.fixture(scope="module")
def api(stack: Stack) -> Api:
    api = Api(stack.url, stack.token)
    api.create_scope("scope")
    api.put_secret("scope", "key", SECRET)
    return api


def model_servers(stack: Stack) -> set[int]:
    return {pid for pid, arguments in stack.processes().items() if "serving_service.model_server" in arguments}


def test_queries_see_no_gap_while_versions_change_and_a_bad_version_changes_nothing(stack: Stack, api: Api) -> None:
    api.create_endpoint("rolling", entity(GOOD, **KEY))
    api.deployed("rolling")
    old = int(api.ask("rolling", "pid")[0])
    others = model_servers(stack) - {old}

    with api.querying("rolling", "version") as queries:
        accepted = api.update_endpoint("rolling", entity(BETTER, **KEY))
        assert accepted["state"] == {
            "ready": "READY",
            "config_update": "IN_PROGRESS",
            "suspend": "NOT_SUSPENDED",
        }
        assert (accepted["config"]["config_version"], accepted["pending_config"]["config_version"]) == (1, 2)
        found = api.deployed("rolling")
        assert "pending_config" not in found
        assert found["config"]["served_entities"][0]["entity_version"] == BETTER
        queries.more()
    versions = [answer[0] for answer in queries.answers]
    assert set(versions) == {GOOD, BETTER}
    assert versions == sorted(versions), "the old version answered after the new one had taken over"
    until(lambda: old not in model_servers(stack), within=60, what="the old replica has ended")

    with api.querying("rolling", "version") as queries:
        api.update_endpoint("rolling", entity(FAILING, **KEY))
        found = api.failed("rolling")
    assert {answer[0] for answer in queries.answers} == {BETTER}
    assert found["state"]["ready"] == "READY"
    assert found["config"]["served_entities"][0]["state"]["deployment"] == "DEPLOYMENT_READY"
    failed = found["pending_config"]["served_entities"][0]
    assert failed["state"]["deployment"] == "DEPLOYMENT_FAILED"
    assert LOAD_FAILURE in failed["state"]["deployment_state_message"]
    assert SECRET not in str(found)
    logs = api.logs("rolling", failed["name"])
    assert f"version {FAILING} loads with [secret]" in logs
    assert LOAD_FAILURE in logs
    assert SECRET not in logs
    until(lambda: len(model_servers(stack) - others) == 1, within=60, what="only the good replica is left")

    with api.querying("rolling", "version"):
        assert api.update_endpoint("rolling", entity(GOOD))["pending_config"]["config_version"] == 4
        assert "pending_config" not in api.deployed("rolling")
    api.delete_endpoint("rolling")
    until(lambda: model_servers(stack) == others, within=60, what="no replica is left")


def test_it_is_said_at_the_start_and_by_every_endpoint_whether_models_are_isolated(stack: Stack, api: Api) -> None:
    (said,) = (line for line in stack.output().splitlines() if line.startswith("  Isolation "))
    api.create_endpoint("shown", entity(GOOD))
    state = api.deployed("shown")["config"]["served_entities"][0]["state"]["deployment_state_message"]
    user = Path(f"/proc/{api.ask('shown', 'pid')[0]}").stat().st_uid
    api.delete_endpoint("shown")
    if os.getuid() == 0:
        assert user != 0
        found = re.search(r"\((\d+)-(\d+)\)", said)
        assert found, said
        assert int(found[1]) <= user <= int(found[2])
    else:
        assert "only root can start them as others" in said
        assert "only root can start them as others" in state
    assert state == "" or state in said


def test_first_deployment_that_fails_says_why_and_can_be_put_right(api: Api) -> None:
    api.create_endpoint("unlucky", entity(FAILING, name="one", **KEY))
    found = api.failed("unlucky")
    assert found["state"]["ready"] == "NOT_READY"
    assert "config" not in found
    assert LOAD_FAILURE in found["pending_config"]["served_entities"][0]["state"]["deployment_state_message"]
    assert api.refused("POST", "/serving-endpoints/unlucky/invocations", {})[:2] == (404, "ENDPOINT_NOT_FOUND")
    api.update_endpoint("unlucky", entity(GOOD, name="one"))
    assert api.deployed("unlucky")["config"]["config_version"] == 2
    api.delete_endpoint("unlucky")


@pytest.fixture
def gate() -> Iterator[socket.socket]:
    """A closed gate: it opens when this listens. Not a file, since a model sees none of ours."""
    with socket.socket() as gate:
        gate.bind(("127.0.0.1", 0))
        yield gate


def address(gate: socket.socket) -> str:
    host, port = gate.getsockname()
    return f"{host}:{port}"


def test_one_failing_entity_fails_the_update_and_aborts_the_other(gate: socket.socket, api: Api) -> None:
    """The other waits at a gate that never opens, so that it is certainly not ready yet."""
    routes = [{"served_entity_name": name, "traffic_percentage": 50} for name in ("bad", "slow")]
    entities = [entity(FAILING, name="bad"), entity(WAITING, name="slow", GATE=address(gate))]
    config = {"served_entities": entities, "traffic_config": {"routes": routes}}
    api.call("POST", ENDPOINTS, {"name": "mixed", "config": config})
    bad, slow = api.failed("mixed")["pending_config"]["served_entities"]
    assert bad["state"]["deployment"] == "DEPLOYMENT_FAILED"
    assert slow["state"]["deployment"] == "DEPLOYMENT_ABORTED"
    assert "bad" in slow["state"]["deployment_state_message"]
    api.delete_endpoint("mixed")


def test_second_update_waits_its_turn_and_delete_does_not(gate: socket.socket, stack: Stack, api: Api) -> None:
    api.create_endpoint("impatient", entity(GOOD))
    first = api.deployed("impatient")
    others = model_servers(stack) - {int(api.ask("impatient", "pid")[0])}
    waiting = entity(WAITING, name="waiting", GATE=address(gate))
    api.update_endpoint("impatient", waiting)
    until(lambda: f"version {WAITING} loads" in api.logs("impatient", "waiting"), within=60, what="the model loads")
    status, code, message = api.refused("PUT", f"{ENDPOINTS}/impatient/config", {"served_entities": [waiting]})
    assert (status, code) == (409, "RESOURCE_CONFLICT")
    assert "impatient" in message
    assert len(model_servers(stack) - others) == 2

    api.delete_endpoint("impatient")
    assert api.refused("GET", f"{ENDPOINTS}/impatient")[:2] == (404, "RESOURCE_DOES_NOT_EXIST")
    assert api.refused("POST", "/serving-endpoints/impatient/invocations", {})[:2] == (404, "ENDPOINT_NOT_FOUND")
    again = api.create_endpoint("impatient", entity(BETTER))
    assert again["id"] != first["id"]
    assert again["pending_config"]["config_version"] == 1
    api.deployed("impatient")
    assert api.ask("impatient", "version") == [BETTER]
    alone = {int(api.ask("impatient", "pid")[0])}
    until(lambda: model_servers(stack) - others == alone, within=60, what="nothing of the first is left")
    api.delete_endpoint("impatient")


def test_waiting_update_takes_over_when_its_model_is_ready(gate: socket.socket, api: Api) -> None:
    api.create_endpoint("patient", entity(GOOD))
    api.deployed("patient")
    with api.querying("patient", "version") as queries:
        api.update_endpoint("patient", entity(WAITING, name="waiting", GATE=address(gate)))
        until(lambda: f"version {WAITING} loads" in api.logs("patient", "waiting"), within=60, what="the model loads")
        queries.more()
        assert {answer[0] for answer in queries.answers} == {GOOD}
        assert api.endpoint("patient")["state"]["config_update"] == "IN_PROGRESS"
        gate.listen()
        api.deployed("patient")
        until(lambda: queries.answers[-1] == [WAITING], within=60, what="the new version answers")
    api.delete_endpoint("patient")
