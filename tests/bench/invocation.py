"""An invocation through the gateway, against the same replica asked directly.

The trivial replica shows what the gateway costs, beside Envoy, which does nothing but pass on; the MLflow model shows
what that means to somebody who serves one. Replica and load share a core in every row, so that what is added is the
proxy alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from servicekit.errors import StartError
from tessera.cli.rest import Rest
from tests.bench import peer_servers, platform, programs, tables
from tests.bench.load import Http, Subject, measured
from tests.bench.peer_servers import NotInstalledError
from tests.bench.platform import ENDPOINT, QUESTION, until
from tests.bench.programs import Started
from tests.bench.run import Run
from tests.bench.services import Services
from tests.bench.tables import Cells, Table
from tests.support.gateway import OWNER, TOKENS

_CONNECTIONS = (1, 16, 32)
_PATH = f"/serving-endpoints/{ENDPOINT}/invocations"
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class _Target:
    url: str
    subject: Subject
    token: str = field(default="", repr=False)


def measure(run: Run) -> Table:
    """Measures the table."""
    rows: list[Cells] = []
    for name, targets in (("trivial", _trivial), ("MLflow", _mlflow)):
        with targets(run) as found:
            for connections in _CONNECTIONS:
                rows += _rows(run, connections, {f"{name}: {each}": target for each, target in found.items()})
    return Table(
        title="Invocation",
        note="wrk, keep-alive connections. trivial: a replica that reads the body and always answers the same. "
        "Envoy has one thread. MLflow: the demo's model in our model server. With one connection nothing waits for "
        "anything else.",
        columns=tables.LOAD_COLUMNS,
        rows=rows,
    )


def _rows(run: Run, connections: int, targets: Mapping[str, _Target]) -> list[Cells]:
    loads = {
        name: partial(
            measured,
            Http(url=target.url, authorization=f"Bearer {target.token}", connections=connections, body=QUESTION),
            target.subject,
            run,
        )
        for name, target in targets.items()
    }
    results = tables.interleaved(loads, run.rounds)
    gateway = next(name for name in targets if name.endswith("gateway"))
    limits = {gateway: "added p50 <= 0.4 ms"} if connections == 1 else {}
    if connections == _CONNECTIONS[-1] and (envoy := gateway.replace("gateway", "Envoy")) in results:
        share = tables.ratios([each.rps for each in results[gateway]], [each.rps for each in results[envoy]])
        limits[gateway] = f"{tables.spread(share)} of Envoy, >= 0.6"
    return tables.load_rows(f"c{connections}", results, limits)


@contextmanager
def _trivial(run: Run) -> Iterator[dict[str, _Target]]:
    """A gateway between stand-ins, and Envoy, where it can be installed."""
    token = next(token for token, caller in TOKENS.items() if caller == OWNER)
    path = run.directory / "replica.sock"
    services = Services.of(run.directory / "trivial", run.log)
    with ExitStack() as stack:
        replica = stack.enter_context(programs.server("trivial-replica", str(path), log=run.log))
        others = stack.enter_context(programs.server("neighbours", str(services.data_dir), f"unix:{path}", log=run.log))
        gateway = stack.enter_context(services.running("gateway"))
        direct = _Target(_replica(replica), Subject(replica.pid, is_beside_load=True))
        through = _Target(
            f"{services.addresses.url}{_PATH}", Subject(gateway.pid, behind=[replica.pid, others.pid]), token
        )
        _wait_for_answer(through)
        targets = {"replica": direct, "gateway": through}
        with suppress(NotInstalledError):
            envoy = stack.enter_context(peer_servers.envoy(replica.report["address"], run))
            passed_on = f"http://{envoy.report['address']}/invocations"
            targets["Envoy"] = _Target(passed_on, Subject(envoy.pid, behind=[replica.pid]))
        yield targets


@contextmanager
def _mlflow(run: Run) -> Iterator[dict[str, _Target]]:
    """The whole platform, and the same model server beside it."""
    stack = run.platform.stack
    run.platform.create_endpoint()
    try:
        replicas = run.platform.replica_pids()
        with platform.model_server(run.platform.model_path, run.directory) as server:
            direct = _Target(_replica(server), Subject(server.pid, is_beside_load=True))
            through = _Target(
                f"{stack.url}{_PATH}",
                Subject(stack.pids()["gateway"], behind=replicas),
                stack.token,
            )
            _wait_for_answer(through)
            if _asked(direct) != _asked(through):
                raise RuntimeError("the replica behind the gateway answers something else than the one beside it")
            yield {"replica": direct, "gateway": through}
    finally:
        run.platform.delete_endpoint()


def _replica(server: Started) -> str:
    return f"http://{server.report['address']}/invocations"


def _wait_for_answer(target: _Target) -> None:
    def answers() -> bool:
        try:
            _asked(target)
        except StartError:
            return False
        return True

    until(answers, _ANSWER_SECONDS, "the gateway has a route to the replica", period=0.05)


def _asked(target: _Target) -> object:
    address, _, path = target.url.removeprefix("http://").partition("/")
    return Rest(address, target.token).call("POST", f"/{path}", QUESTION)
