"""The web server around the application: on the inherited socket, without an access log, ending in good order."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from socket import socket

import uvicorn

from serving_service.model_server.asgi import App

_KEEP_ALIVE_SECONDS = 75  # longer than the gateway keeps an unused connection: it is the one to close it


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # The original raises the signal again when all is done, so that a good end would look like a violent one.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        yield


def serve(app: App, *, fd: int, on_ready: Callable[[], None]) -> None:
    """Serves until TERM and until the requests in flight are done."""
    config = uvicorn.Config(
        app,
        http="auto",  # httptools, and uvloop, where the model's environment has them
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        backlog=512,
    )
    # uvicorn's own `fd` option would duplicate the socket and leave it inheritable.
    _Server(config, on_ready).run(sockets=[socket(fileno=fd)])
