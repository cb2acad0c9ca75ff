"""Endpoints at zero: what a service costs that has many of which nobody asks anything.

Serving's database is filled through its own store; to deploy a thousand replicas first would measure something else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

from servicekit import database
from servicekit.storage import Connection
from serving_service import app, store
from serving_service.model import ConfigUpdate
from tessera.cli.rest import Rest
from tests.bench import programs
from tests.bench.load import Http, Subject, measured
from tests.bench.platform import until
from tests.bench.run import Run
from tests.bench.services import Services
from tests.bench.tables import Cells, Table
from tests.support.builders import a_config, an_endpoint, an_entity

_COUNTS = (1, 100, 1_000)
_PATH = "/api/2.0/serving-endpoints"
_IDLE_SECONDS = 10.0
_LIST_SECONDS = 30.0
_LIMITS = "start <= 5 s; idle <= 2 %; list <= 200 ms"


def measure(run: Run) -> Table:
    """Measures the table."""
    return Table(
        title="Endpoints at zero",
        note="Seconds from spawning Serving to health SERVING; processor time of Serving with its helpers over"
        f" {_IDLE_SECONDS:g} s in which nobody asks, in percent of a core; milliseconds of the list over REST at p50,"
        " wrk, one connection, gateway and Secrets beside it.",
        columns=("endpoints", "start s", "idle %", "list ms", "others", "limit"),
        rows=[_row(run, count) for count in _COUNTS],
    )


def _row(run: Run, count: int) -> Cells:
    directory = run.directory / f"endpoints-{count}"
    services = Services.of(directory, run.log)
    with ExitStack() as stack:
        secrets = stack.enter_context(services.running("secrets"))
        asyncio.run(_fill(directory / "serving", count))
        with services.running("serving"):  # the first start makes what is not there yet
            pass
        serving = stack.enter_context(services.running("serving"))
        gateway = stack.enter_context(services.running("gateway"))
        token = (directory / "admin.token").read_text().strip()
        admin = Rest(services.addresses.gateway, token)
        until(lambda: len(_listed(admin)) == count, _LIST_SECONDS, f"{count} endpoints are listed", period=0.1)
        if any(each["state"]["ready"] != "READY" for each in _listed(admin)):
            raise RuntimeError("an endpoint at zero is not READY")
        idle = _idle_percent(serving.pid)
        load = Http(url=f"{services.addresses.url}{_PATH}", authorization=f"Bearer {token}", connections=1)
        listed = measured(load, Subject(gateway.pid, behind=[serving.pid, secrets.pid]), run)
        if listed.fails:
            raise RuntimeError("a list failed")
        limits = _LIMITS if count == _COUNTS[-1] else ""
        others = f"{listed.foreign_percent:.0f} %"
        return [str(count), f"{serving.seconds:.2f}", f"{idle:.2f}", f"{listed.p50_ms:.1f}", others, limits]


def _listed(admin: Rest) -> list[dict[str, dict[str, str]]]:
    return list(admin.call("GET", _PATH).get("endpoints", []))


def _idle_percent(pid: int) -> float:
    """Of a core, once what a start begins is over."""
    time.sleep(_IDLE_SECONDS / 2)
    before = programs.cpu_seconds([pid])
    time.sleep(_IDLE_SECONDS)
    return 100 * (programs.cpu_seconds([pid]) - before) / _IDLE_SECONDS


async def _fill(directory: Path, count: int) -> None:
    """Endpoints whose one entity may be at zero, and is."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = dataclasses.replace(a_config(), entities=(dataclasses.replace(an_entity(), scale_to_zero=True),))

    def fill(connection: Connection) -> None:
        for number in range(count):
            endpoint = an_endpoint(
                f"bench-{number}",
                id=uuid.uuid4().hex,
                latest_version=1,
                pending=config,
                config_update=ConfigUpdate.IN_PROGRESS,
            )
            store.reserve_endpoint(connection, endpoint)
            store.commit_endpoint(connection, endpoint)
            store.activate(connection, endpoint.id, 1)

    async with database.opened(directory / "serving.db", app.MIGRATIONS) as opened:
        await opened.write(fill)
