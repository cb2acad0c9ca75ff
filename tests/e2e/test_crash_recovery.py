"""Whatever is killed, inference goes on and the platform finds its way back: nothing is lost and nothing runs twice."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.api import Api, until
from tests.support.registered_models import BETTER, GOOD, entity, fingerprint, stack_environment
from tests.support.stack import Stack, running_stack

SECRET = "crash-recovery-secret"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(environment=stack_environment()) as running:
        prepare(Api(running.url, running.token))
        yield running


@pytest.fixture(scope="module")
def api(stack: Stack) -> Api:
    return Api(stack.url, stack.token)


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def prepare(api: Api) -> None:
    api.create_scope("scope")
    api.put_secret("scope", "key", SECRET)


def create(api: Api, name: str) -> int:
    """A ready endpoint of version 1; returns the process number of its replica."""
    api.create_endpoint(name, entity(GOOD, OPENAI_API_KEY="{{secrets/scope/key}}"))
    api.deployed(name)
    return replica_of(api, name)


def replica_of(api: Api, name: str) -> int:
    return int(api.ask(name, "pid")[0])


def model_servers(stack: Stack) -> set[int]:
    return {pid for pid, arguments in stack.processes().items() if "serving_service.model_server" in arguments}


def kill_service(stack: Stack, name: str) -> None:
    """Kills a service and returns when its successor runs."""
    before = stack.pids()[name]
    os.kill(before, signal.SIGKILL)
    until(lambda: stack.pids().get(name, before) != before, within=60, what=f"a new {name}")


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def answers(api: Api, method: str, path: str) -> bool:
    return api.send(method, path).status == 200


def until_routed(api: Api, name: str) -> None:
    """Returns when queries are answered; until a new gateway has its first table it asks for a retry."""
    path, body = f"/serving-endpoints/{name}/invocations", {"dataframe_records": [{"ask": "pid"}]}
    until(lambda: api.send("POST", path, body).status == 200, within=60, what=f"{name} answers")


def test_killed_serving_costs_no_query_and_its_successor_keeps_the_replica_and_manages_it(
    stack: Stack, api: Api
) -> None:
    pid = create(api, "without-serving")
    others = model_servers(stack) - {pid}
    with api.querying("without-serving", "pid", "version") as queries:
        kill_service(stack, "serving")
        until(
            lambda: answers(api, "GET", "/api/2.0/serving-endpoints/without-serving"), within=60, what="Serving answers"
        )
        queries.more()
        found = api.deployed("without-serving")
        assert found["config"]["config_version"] == 1
        assert {answer[0] for answer in queries.answers} == {str(pid)}
        assert model_servers(stack) - others == {pid}

        api.update_endpoint("without-serving", entity(BETTER, OPENAI_API_KEY="{{secrets/scope/key}}"))
        api.deployed("without-serving")
        until(lambda: queries.answers[-1][1] == BETTER, within=60, what="version 2 answers")
    until(lambda: not is_alive(pid), within=60, what="the old replica has ended")
    assert model_servers(stack) - others == {replica_of(api, "without-serving")}
    api.delete_endpoint("without-serving")


def test_killed_secrets_costs_no_query_and_its_successor_serves_launches(stack: Stack, api: Api) -> None:
    create(api, "without-secrets")
    with api.querying("without-secrets", "version") as queries:
        kill_service(stack, "secrets")
        queries.more()
        until(lambda: answers(api, "GET", "/api/2.0/secrets/list?scope=scope"), within=60, what="Secrets answers")
        api.update_endpoint("without-secrets", entity(BETTER, OPENAI_API_KEY="{{secrets/scope/key}}"))
        api.deployed("without-secrets")
    assert api.ask("without-secrets", "version", "fingerprint:OPENAI_API_KEY") == [BETTER, fingerprint(SECRET)]
    api.delete_endpoint("without-secrets")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_endpoint_whose_replica_dies_recovers_by_itself(stack: Stack, api: Api, number: signal.Signals) -> None:
    name = f"dying-by-{number.name}"
    pid = create(api, name)
    others = model_servers(stack) - {pid}
    os.kill(pid, number)
    path, body = f"/serving-endpoints/{name}/invocations", {"dataframe_records": [{"ask": "pid"}]}

    def is_answered() -> bool:
        answer = api.send("POST", path, body)
        # Never 429 or 503: clients would retry those for minutes.
        assert answer.status in (200, 400, 500), answer
        return answer.status == 200 and answer.json()["predictions"] != [str(pid)]

    until(is_answered, within=60, what="a new replica answers")
    found = api.deployed(name)
    assert found["config"]["config_version"] == 1
    assert model_servers(stack) - others == {replica_of(api, name)}
    assert api.ask(name, "fingerprint:OPENAI_API_KEY") == [fingerprint(SECRET)]
    api.delete_endpoint(name)


def test_endpoints_are_ready_again_by_themselves_after_a_restart(directory: Path) -> None:
    with running_stack(directory, environment=stack_environment()) as stack:
        api = Api(stack.url, stack.token)
        prepare(api)
        pid = create(api, "lasting")
        before = api.endpoint("lasting")
        assert stack.stop() == 0
        assert not is_alive(pid)
    with running_stack(directory, environment=stack_environment()) as stack:
        api = Api(stack.url, stack.token)
        until_routed(api, "lasting")
        after = api.deployed("lasting")
        assert (after["id"], after["config"]["config_version"]) == (before["id"], 1)
        assert api.ask("lasting", "fingerprint:OPENAI_API_KEY") == [fingerprint(SECRET)]
        assert model_servers(stack) == {replica_of(api, "lasting")}


def test_successor_of_a_killed_platform_takes_its_replicas_over(directory: Path) -> None:
    with running_stack(directory, environment=stack_environment()) as stack:
        api = Api(stack.url, stack.token)
        prepare(api)
        pid = create(api, "orphaned")
        services = set(stack.pids().values())
        stack.stop(signal.SIGKILL)
        until(lambda: not any(map(is_alive, services)), within=60, what="the services have ended")
        assert is_alive(pid)
    with running_stack(directory, environment=stack_environment()) as stack:
        api = Api(stack.url, stack.token)
        until_routed(api, "orphaned")
        api.deployed("orphaned")
        assert replica_of(api, "orphaned") == pid
        assert model_servers(stack) == {pid}
        assert stack.stop() == 0
        assert stack.processes() == {}
