"""Three services as if on three machines: a directory of its own for each, and nothing between them but mutual TLS."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509

from tessera.cli.service_process import module
from tests.support import processes
from tests.support.api import ENDPOINTS, Api, until
from tests.support.registered_models import BETTER, GOOD, entity, fingerprint, stack_environment
from tests.support.sockets import short_directory
from tests.support.stack import clean_environment

SECRET = "secret-between-machines"
SERVICES = ("secrets", "serving", "gateway")


def certs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*module("tessera.cli"), "certs", *arguments], capture_output=True, text=True, timeout=60)


def issued(directory: Path) -> tuple[str, float]:
    """The URI of Serving's certificate of a set, and how many seconds it lasts."""
    leaf = x509.load_pem_x509_certificate((directory / "serving" / "peer.pem").read_bytes())
    (name,) = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return name.value, (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds()


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


# An address of loopback that nothing else uses: a port of it that is free stays so until a service listens there. On
# 127.0.0.1 any connection of a test beside this one may be given it meanwhile.
_HOST = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.7"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((_HOST, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


class Machines:
    """The three, each told only what its own machine has."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        secrets, serving, gateway = (f"{_HOST}:{port}" for port in _free_ports(3))
        self.url = f"http://{gateway}"
        self._variables = {
            "secrets": {"TESSERA_SECRETS_PEER_LISTEN": secrets, "TESSERA_SECRETS_LISTEN": "127.0.0.1:0"},
            "serving": stack_environment(
                TESSERA_SERVING_PEER_LISTEN=serving,
                TESSERA_SECRETS_ADDRESS=secrets,
                TESSERA_SERVING_LISTEN="127.0.0.1:0",
            ),
            "gateway": {
                "TESSERA_SECRETS_ADDRESS": secrets,
                "TESSERA_SERVING_ADDRESS": serving,
                "TESSERA_GATEWAY_LISTEN": gateway,
            },
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def data(self, name: str) -> Path:
        return self.directory / name

    def start(self, name: str) -> None:
        files = self.directory / "certs" / name
        environment = {
            **clean_environment(),
            **self._variables[name],
            "TESSERA_DATA_DIR": str(self.data(name)),
            "TESSERA_PEER_CERT": str(files / "peer.pem"),
            "TESSERA_PEER_KEY": str(files / "peer.key"),
            "TESSERA_PEER_CA": str(files / "ca.pem"),
        }
        program = name if name == "gateway" else f"{name}_service"
        with self._log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                module(program), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def events(self, name: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._log(name).read_text().splitlines() if line.startswith("{")]

    def says(self, name: str, event: str) -> bool:
        return any(line["event"] == event for line in self.events(name))

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for pid in processes.of_directory(self.data("serving")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def show(self) -> None:
        for name in SERVICES:
            sys.stderr.write("\n".join([f"--- {name}", *self._log(name).read_text().splitlines()[-40:], ""]))

    def until(self, claim: Callable[[], bool], *, within: float, what: str) -> None:
        """As the function of that name; shows what the services said when it fails."""
        try:
            until(claim, within=within, what=what)
        except BaseException:
            self.show()
            raise

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"


@pytest.fixture(scope="module")
def machines(directory: Path) -> Iterator[Machines]:
    made = certs(str(directory / "certs"))
    assert made.returncode == 0, made.stderr
    machines = Machines(directory)
    try:
        for name in SERVICES:
            machines.start(name)
        token = machines.data("secrets") / "admin.token"
        until(token.exists, within=60, what="the first start of Secrets")
        until(lambda: machines.says("gateway", "started"), within=60, what="the gateway's start")
        yield machines
    except BaseException:
        machines.show()
        raise
    finally:
        machines.stop()


def test_endpoint_with_a_secret_is_made_and_queried_across_machines(machines: Machines) -> None:
    admin = Api(machines.url, (machines.data("secrets") / "admin.token").read_text().strip())
    machines.until(lambda: admin.send("GET", ENDPOINTS).status == 200, within=60, what="all three know each other")
    admin.create_scope("far")
    admin.put_secret("far", "key", SECRET)
    wanted = [entity(GOOD, name="one", OPENAI_API_KEY="{{secrets/far/key}}")]
    admin.call("POST", ENDPOINTS, {"name": "far", "config": {"served_entities": wanted}})
    admin.deployed("far")
    assert admin.ask("far", "fingerprint:OPENAI_API_KEY") == [fingerprint(SECRET)]

    # Renewed while everything runs, and then Secrets comes back as another process: nobody else is started anew.
    renewed = certs("--renew", str(machines.directory / "certs"))
    assert renewed.returncode == 0, renewed.stderr
    for name in SERVICES:
        machines.until(partial(machines.says, name, "certificate renewed"), within=20, what=f"renewal at {name}")
    machines.processes["secrets"].kill()
    machines.processes["secrets"].wait()
    assert admin.ask("far", "fingerprint:OPENAI_API_KEY") == [fingerprint(SECRET)]
    machines.start("secrets")
    config = {"served_entities": [entity(BETTER, name="one", OPENAI_API_KEY="{{secrets/far/key}}")]}
    machines.until(
        lambda: admin.send("PUT", f"{ENDPOINTS}/far/config", config).status == 200, within=60, what="Secrets is back"
    )
    admin.deployed("far")
    assert admin.ask("far", "fingerprint:OPENAI_API_KEY") == [fingerprint(SECRET)]

    # Nothing of it went by way of a socket of somebody else's.
    assert not (machines.data("gateway") / "run" / "sockets" / "replicas").exists()
    for name in SERVICES:
        for line in machines.events(name):
            assert line["event"] != "peer refused", line


def test_a_development_set_is_for_its_owner_and_is_not_overwritten(tmp_path: Path) -> None:
    made = certs(str(tmp_path / "set"), "--hours", "2", "--trust-domain", "example.org")
    assert made.returncode == 0, made.stderr
    found = sorted(path for path in (tmp_path / "set").rglob("*") if path.is_file())
    assert [str(path.relative_to(tmp_path / "set")) for path in found] == [
        *("authority/ca.key", "authority/ca.pem"),
        *(
            f"{name}/{file}"
            for name in ("gateway", "secrets", "serving")
            for file in ("ca.pem", "peer.key", "peer.pem")
        ),
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o600}
    assert issued(tmp_path / "set") == ("spiffe://example.org/svc/serving", 2 * 3600 + 300)

    before = {path: path.read_bytes() for path in found}
    again = certs(str(tmp_path / "set"))
    assert again.returncode == 1
    assert "is there already" in again.stderr
    assert {path: path.read_bytes() for path in found} == before
    assert certs("--renew", str(tmp_path / "set")).returncode == 0
    changed = {path.name for path in found if path.read_bytes() != before[path]}
    assert changed == {"peer.key", "peer.pem"}
    nothing = certs("--renew", str(tmp_path / "other"))
    assert nothing.returncode == 1
    assert "no authority" in nothing.stderr


def test_renewed_certificates_are_of_the_trust_domain_and_the_life_of_those_that_are_there(tmp_path: Path) -> None:
    made = certs(str(tmp_path), "--trust-domain", "prod.example", "--hours", "48")
    assert "They last 48 hours" in made.stdout
    serving = tmp_path / "serving" / "peer.pem"
    first = serving.read_bytes()
    renewed = certs("--renew", str(tmp_path))
    assert (renewed.returncode, "They last 48 hours" in renewed.stdout) == (0, True)
    assert serving.read_bytes() != first
    assert issued(tmp_path) == ("spiffe://prod.example/svc/serving", 48 * 3600 + 300)

    # One that is missing becomes one like the others, and what is asked for may say the same.
    serving.unlink()
    assert certs("--renew", str(tmp_path), "--trust-domain", "prod.example", "--hours", "5").returncode == 0
    assert issued(tmp_path) == ("spiffe://prod.example/svc/serving", 5 * 3600 + 300)


def test_nothing_is_renewed_whose_trust_domain_is_another_one_or_is_not_known(tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        ran = certs("--renew", str(tmp_path), *arguments)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
        return ran.stderr

    assert certs(str(tmp_path), "--trust-domain", "prod.example").returncode == 0
    assert "more than one: prod.example, tessera." in refused("--trust-domain", "tessera")
    (tmp_path / "gateway" / "peer.pem").write_bytes((tmp_path / "serving" / "peer.pem").read_bytes())
    assert f"{tmp_path / 'gateway' / 'peer.pem'} is no certificate of such a set" in refused()
    for name in SERVICES:
        (tmp_path / name / "peer.pem").unlink()
    assert "name it with --trust-domain" in refused()
    assert certs("--renew", str(tmp_path), "--trust-domain", "prod.example").returncode == 0
    assert issued(tmp_path) == ("spiffe://prod.example/svc/serving", 24 * 3600 + 300)


def test_what_a_trust_domain_is_called_is_said_to_who_names_none(tmp_path: Path) -> None:
    refused = certs(str(tmp_path / "set"), "--trust-domain", "Prod Example")
    assert refused.returncode == 2
    assert "Prod Example is no name of a trust domain: expected lower case letters, digits" in refused.stderr
    assert not (tmp_path / "set").exists()
