"""The Serving service of `tests/support/serving.py` as a process of its own, to be killed without warning.

`python -m tests.support.serving_process DIRECTORY` runs until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from servicekit import sockets
from serving_service import app
from tests.support.service_process import ServiceProcess, service_process
from tests.support.serving import MannerRegistry, a_launcher, serving_settings

ROUTE_ACK_SECONDS = 0.3


def serving_process(directory: Path) -> AbstractAsyncContextManager[ServiceProcess]:
    """The service as a process on a data directory, started, and killed in the end."""
    address = sockets.socket_address(serving_settings(directory).sockets, callee="serving", caller="gateway")
    return service_process(address, [sys.executable, "-m", "tests.support.serving_process", str(directory)])


async def main(directory: Path) -> None:
    settings = serving_settings(directory, route_ack_seconds=ROUTE_ACK_SECONDS)
    async with app.running(settings, launcher=a_launcher(settings), registry=MannerRegistry(directory)):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
