"""What a user sees of a model that prints without end, forks, hangs, answers nonsense or will not end; and that whoever
asks the endpoint beside it sees nothing of it.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import bad_model, faulty_models
from tests.support.api import ENDPOINTS, Answer, Api, until
from tests.support.faulty_models import FaultyRegistry
from tests.support.mlflow_models import model_of
from tests.support.registered_models import GOOD, entity
from tests.support.stack import Stack, running_stack

NEIGHBOUR, ENTITY = "neighbour", "bad"
DEADLINE, LIVENESS = 8.0, 5.0
"""What a model has for one request, and for how long it may say nothing at all, in seconds."""

SLOWEST = 5.0
"""Seconds that no query of the neighbour takes, whatever happens beside it; on a busy machine, a generous limit."""

MOST_PROCESSES = 100
STOP_GRACE = 10.0
MIB = 1 << 20
LOG_ROOM = 10 * MIB


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    directory = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    try:
        registry = FaultyRegistry(directory / "registry.db")
        registry.register(model_of(Path(bad_model.__file__), directory / "model"))
        environment = {
            "TESSERA_MODEL_REGISTRY": registry.uri,
            "TESSERA_INFERENCE_DEADLINE_SECONDS": str(DEADLINE),
            "TESSERA_LIVENESS_DEADLINE_SECONDS": str(LIVENESS),
            "TESSERA_MODEL_PROCESSES": str(MOST_PROCESSES),
        }
        with running_stack(environment=environment) as running:
            yield running
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def api(stack: Stack) -> Api:
    api = Api(stack.url, stack.token)
    api.create_endpoint(NEIGHBOUR, entity(GOOD))
    api.deployed(NEIGHBOUR)
    return api


class Bad:
    """An endpoint of the bad model, and what is seen of it."""

    def __init__(self, api: Api, name: str) -> None:
        self.api, self.name = api, name

    def send(self, *inputs: Any) -> Answer:
        return self.api.send("POST", f"/serving-endpoints/{self.name}/invocations", {"inputs": inputs})

    def asked(self, deed: str, argument: Any = None) -> str:
        """What it answers to the wish for a deed."""
        answer = self.send(deed, argument)
        assert answer.status == 200, answer
        return str(answer.json()["predictions"][0])

    def refused(self, deed: str, argument: Any = None) -> tuple[int, str, str]:
        """Status, code and message of a wish that is not answered well."""
        answer = self.send(deed, argument)
        assert answer.status != 200, answer
        return answer.status, answer.json()["error_code"], answer.json()["message"]

    def process(self) -> psutil.Process:
        """The process that answers now."""
        return psutil.Process(int(self.send().json()["predictions"][0]))

    def log(self) -> str:
        return self.api.logs(self.name, ENTITY)

    def state(self) -> tuple[str, str, str]:
        """Whether the endpoint is ready, and deployment and message of its entity."""
        found = self.api.endpoint(self.name)
        state = found["config"]["served_entities"][0]["state"]
        return found["state"]["ready"], state["deployment"], state["deployment_state_message"]

    def failed_requests(self) -> int:
        """How many requests of the last minute the metrics count as failed."""
        text = self.api.send("GET", f"{ENDPOINTS}/{self.name}/metrics").body.decode()
        found = re.search(rf'^request_5xx_count_total{{.*served_model_name="{ENTITY}".*}} (\S+)$', text, re.MULTILINE)
        return int(float(found[1])) if found else 0


@contextmanager
def deployed(api: Api, name: str, **variables: str) -> Iterator[Bad]:
    """An endpoint of the bad model, deleted in the end."""
    api.create_endpoint(name, entity("1", name=ENTITY, model=faulty_models.NAME, **variables))
    api.deployed(name)
    try:
        yield Bad(api, name)
    finally:
        api.send("DELETE", f"{ENDPOINTS}/{name}")


@contextmanager
def unnoticed(api: Api) -> Iterator[None]:
    """Asks the neighbour without a pause while the block runs: every query is answered, and none takes long."""
    with api.querying(NEIGHBOUR, "version") as queries:
        yield
    assert max(queries.seconds) < SLOWEST


def ended(*gone: psutil.Process) -> None:
    """Returns when none of the processes is left."""
    until(lambda: not any(process.is_running() for process in gone), within=3 * STOP_GRACE, what="they have ended")


def used_by(directory: Path) -> int:
    """How many bytes the files below a directory take."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("mebibytes", [200, pytest.param(1_024, marks=pytest.mark.long)])
def test_what_a_model_prints_without_end_is_kept_to_its_last_lines(stack: Stack, api: Api, mebibytes: int) -> None:
    with deployed(api, "printing") as bad, unnoticed(api):
        shim = bad.process().parent()
        assert shim is not None
        on_disk, in_memory = used_by(stack.data_dir), shim.memory_info().rss
        bad.asked("print", mebibytes)
        until(lambda: f"that were {mebibytes} MiB" in bad.log(), within=120, what="all is printed")
        assert bad.log().splitlines()[-2:] == ["x" * 1_023, f"that were {mebibytes} MiB"]
        assert len(bad.log()) <= MIB
        assert used_by(stack.data_dir) - on_disk < LOG_ROOM
        assert shim.memory_info().rss - in_memory < 4 * LOG_ROOM
        assert bad.process().parent() == shim


@pytest.mark.skipif(os.getuid() != 0, reason="only root can limit how many processes a model has")
def test_a_fork_bomb_is_contained_and_said_and_ends_with_its_endpoint(api: Api) -> None:
    with deployed(api, "forking") as bad, unnoticed(api):
        model = bad.process()
        bad.asked("fork")
        until(lambda: "there can be no further process" in bad.log(), within=60, what="the end of what goes")
        children = model.children(recursive=True)
        assert MOST_PROCESSES / 2 < len(children) < MOST_PROCESSES
        assert bad.process() == model, "it goes on answering"
        api.delete_endpoint("forking")
        ended(model, *children)


def test_who_is_answered_nothing_or_nonsense_is_told_and_it_is_counted(api: Api) -> None:
    with deployed(api, "nonsense") as bad, unnoticed(api):
        before = bad.process()
        for deed in ("close", "garbage"):
            status, code, message = bad.refused(deed)
            assert (status, code) == (500, "INTERNAL_ERROR")
            assert ENTITY in message
        with pytest.raises(http.client.IncompleteRead):
            bad.send("cut", None)
        until(lambda: bad.failed_requests() == 3, within=30, what="all three are counted")
        assert bad.process() == before


def test_who_waits_too_long_is_told_and_a_model_that_ignores_term_is_killed(api: Api) -> None:
    refusals: list[tuple[int, str, str]] = []
    with deployed(api, "late") as late, deployed(api, "stubborn", STUBBORN="yes") as stubborn, unnoticed(api):
        waiting = threading.Thread(target=lambda: refusals.append(late.refused("wait", 60)))
        waiting.start()
        model = stubborn.process()
        api.delete_endpoint("stubborn")
        ended(model)
        waiting.join()
        ((status, code, message),) = refusals
        assert (status, code) == (504, "DEADLINE_EXCEEDED")
        assert f"{DEADLINE:g} s" in message
        until(lambda: late.failed_requests() == 1, within=30, what="it is counted")
        assert late.process().is_running()


class Gate(socketserver.ThreadingTCPServer):
    """Lets through whoever comes while it is open, and has the others wait until it is."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Gatekeeper)
        self.is_open = threading.Event()
        self.is_open.set()

    @property
    def name(self) -> str:
        """Where it is."""
        return "{}:{}".format(*self.socket.getsockname())


class Gatekeeper(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Gate)
        self.server.is_open.wait()
        self.request.sendall(b"pass")


@pytest.fixture
def gate() -> Iterator[Gate]:
    with Gate() as gate:
        thread = threading.Thread(target=gate.serve_forever)
        thread.start()
        yield gate
        gate.is_open.set()
        gate.shutdown()
        thread.join()


def test_a_model_that_cannot_be_reached_or_understood_is_replaced_and_the_endpoint_says_why(
    api: Api, gate: Gate
) -> None:
    hung = f"has not answered for the {LIVENESS:g} s that TESSERA_LIVENESS_DEADLINE_SECONDS allows"
    with (
        deployed(api, "deaf", GATE=gate.name) as deaf,
        deployed(api, "babbling", GATE=gate.name) as babbling,
        unnoticed(api),
    ):
        before = {bad: bad.process() for bad in (deaf, babbling)}
        gate.is_open.clear()  # so that no successor is ready before it was seen what is said until then
        deaf.asked("deafen")
        babbling.asked("babble")
        status, code, message = deaf.refused("wait", 0)
        assert (status, code) == (400, "BAD_REQUEST")
        assert f"{ENTITY} takes no requests" in message
        assert babbling.refused("wait", 0)[:2] == (500, "INTERNAL_ERROR")
        for bad in (deaf, babbling):
            until(lambda bad=bad: hung in bad.state()[2], within=60, what="its end is said")  # type: ignore[misc]
            assert bad.state()[:2] == ("NOT_READY", "DEPLOYMENT_RECOVERING")
            assert bad.refused("wait", 0)[:2] == (400, "BAD_REQUEST")
        gate.is_open.set()
        for bad in (deaf, babbling):
            api.deployed(bad.name)
            assert bad.process() != before[bad]
