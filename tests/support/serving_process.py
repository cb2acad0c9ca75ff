"""The Serving service of `tests/support/serving.py` as a process of its own, to be killed or to be told to end.

`python -I -m tests.support.serving_process` is started as the service itself is: by settings, and until a signal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from servicekit import process, sockets
from serving_service import app
from serving_service.settings import ServingSettings
from tests.support.service_process import ServiceProcess, service_process
from tests.support.serving import MannerRegistry, a_launcher, serving_settings

COMMAND = (sys.executable, "-I", "-m", "tests.support.serving_process")


def environment(directory: Path) -> dict[str, str]:
    """What the process is told of its data directory; how often it may be asked is not limited."""
    return {
        "PATH": os.environ["PATH"],
        "TESSERA_DATA_DIR": str(directory),
        "TESSERA_SERVING_LISTEN": "127.0.0.1:0",
        "TESSERA_LOG_LEVEL": "error",
        "TESSERA_FAILED_LOGINS_PER_MINUTE": "0",
        "TESSERA_CHANGES_PER_SECOND": "0",
        "TESSERA_ENDPOINT_CHANGES_PER_5_MINUTES": "0",
        "TESSERA_ROUTE_ACK_SECONDS": "0.3",
    }


def serving_process(directory: Path) -> AbstractAsyncContextManager[ServiceProcess]:
    """The service as a process on a data directory, started, and killed in the end."""
    address = sockets.socket_address(serving_settings(directory).sockets, callee="serving", caller="gateway")
    return service_process(address, COMMAND, environment(directory))


@asynccontextmanager
async def _running(settings: ServingSettings) -> AsyncIterator[None]:
    launcher, registry = a_launcher(settings), MannerRegistry(settings.data_dir)
    async with app.running(settings, launcher=launcher, registry=registry):
        yield


if __name__ == "__main__":
    sys.exit(process.run("serving_service", "", ServingSettings, _running))
