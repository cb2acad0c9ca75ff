"""One service as a process of its own, started without `tessera up`, until it says that it is well."""

from __future__ import annotations

import contextlib
import http.client
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tessera.cli import addresses
from tests.bench import programs
from tests.bench.platform import until
from tests.bench.programs import Started
from tests.support.stack import UNHURRIED, clean_environment

SERVICES = ("secrets", "serving", "gateway")
"""In the order in which they need each other."""

_MODULES = {"secrets": "secrets_service", "serving": "serving_service", "gateway": "gateway"}
_START_SECONDS = 30.0
_LOOK_SECONDS = 0.005


@dataclass(frozen=True)
class Services:
    """Services of one data directory, on free ports that are chosen once."""

    data_dir: Path
    log: Path
    addresses: addresses.Addresses

    @classmethod
    def of(cls, data_dir: Path, log: Path) -> Services:
        """For a data directory; nothing is started yet."""
        return cls(data_dir, log, addresses.chosen("127.0.0.1", dict.fromkeys(SERVICES, 0)))

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[Started]:
        """Runs one service; `seconds` is until its health says SERVING (for the gateway, until `/health` is 200)."""
        environment = {
            **clean_environment(),
            **UNHURRIED,
            "TESSERA_DATA_DIR": str(self.data_dir),
            "TESSERA_SECRETS_LISTEN": self.addresses.secrets,
            "TESSERA_SERVING_LISTEN": self.addresses.serving,
            "TESSERA_GATEWAY_LISTEN": self.addresses.gateway,
        }
        began = time.monotonic()
        with programs.running(
            [sys.executable, "-I", "-m", _MODULES[name]], environment=environment, log=self.log
        ) as pid:
            address = getattr(self.addresses, name)
            # Only then a channel: one that has failed to connect waits for a second before it tries again.
            until(lambda: _answers(address), _START_SECONDS, f"{name} listens", period=_LOOK_SECONDS)
            if name != "gateway":
                _wait_until_serving(address)
            yield Started(pid, {}, time.monotonic() - began)


def _answers(address: str) -> bool:
    """Whether a server answers HTTP at all, as one of gRPC does with a complaint."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", "/health")
        connection.getresponse()
    except http.client.HTTPException:
        return True
    except OSError:
        return False
    else:
        return True
    finally:
        connection.close()


def _wait_until_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        for answer in health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=_START_SECONDS
        ):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
