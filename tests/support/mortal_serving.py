"""Serving as a process that dies where it is told to (`tests/support/mortal.py`)."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from servicekit import sockets
from servicekit.database import Database
from serving_service import app, launcher
from serving_service.environment import SecretReferences
from serving_service.launcher import LocalLauncher, LocalReplica
from serving_service.routes import RouteTable
from serving_service.settlement import Settlement
from tests.support.failpoints import Door, step_of, written
from tests.support.mortal import MortalService, mortal_service, nurse
from tests.support.serving import MannerRegistry, a_launcher, serving_settings

MortalServing = MortalService

DOORS = (
    Door(Database, "write", written),
    Door(MannerRegistry, "fetch", step_of("fetch model")),
    Door(SecretReferences, "grant", step_of("grant")),
    Door(SecretReferences, "resolve", step_of("resolve")),
    Door(Settlement, "_tell", step_of("settle")),
    Door(Settlement, "reconciled", step_of("reconcile")),
    Door(LocalLauncher, "start", step_of("start replica")),
    Door(launcher, "_spawn_shim", step_of("spawn shim")),
    Door(LocalLauncher, "adopt", step_of("adopt")),
    Door(LocalReplica, "stop", step_of("stop replica")),
    Door(RouteTable, "_change", step_of("change routes")),
    Door(RouteTable, "acknowledged", step_of("acknowledge")),
    Door(RouteTable, "drained", step_of("drain")),
)


def mortal_serving(directory: Path, **settings: float) -> AbstractAsyncContextManager[MortalServing]:
    """The service on a data directory, with these settings, not started yet, and killed in the end."""
    address = sockets.socket_address(serving_settings(directory).sockets, callee="serving", caller="gateway")
    return mortal_service("tests.support.mortal_serving", directory, address, settings)


@asynccontextmanager
async def _living(changes: Mapping[str, Any]) -> AsyncIterator[None]:
    settings = serving_settings(Path(sys.argv[1]), **changes)
    async with app.running(settings, launcher=a_launcher(settings), registry=MannerRegistry(settings.data_dir)):
        yield


if __name__ == "__main__":
    nurse(_living, DOORS)
