"""What commands for the operator have in common: they speak to Secrets of a running platform, over a socket of its own.

The operator is whoever may enter the directory of the internal sockets: the user that the platform runs as.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from servicekit import channels, settings, sockets
from servicekit.errors import StartError

M = TypeVar("M", bound=Message)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the platform."""
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="the running platform's data directory")


def call(
    arguments: argparse.Namespace,
    method: Callable[[grpc.aio.Channel], Callable[..., Any]],
    request: Message,
    answer: type[M],
    *,
    timeout: float,
    failed: str,
) -> M:
    """Calls a method of Secrets; raises StartError, of which `failed` begins the text when Secrets refuses."""

    async def called() -> Any:
        async with connected(arguments, "secrets", failed=failed) as channel:
            return await method(channel)(request, timeout=timeout, metadata=channels.outgoing_metadata())

    found = asyncio.run(called())
    assert isinstance(found, answer)
    return found


@asynccontextmanager
async def connected(arguments: argparse.Namespace, callee: str, *, failed: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a service, for calls whose errors become StartError, as in `call`."""
    configured = settings_of(arguments)
    if not configured.data_dir.is_dir():
        raise StartError(f"There is no platform in {configured.data_dir}; name its directory with --data-dir.")
    address = sockets.socket_address(configured.sockets, callee=callee, caller="operator")
    async with channels.opened(address) as channel:
        try:
            yield channel
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and not _is_answer(error):
                raise StartError(
                    f"No platform is running on {configured.data_dir}; start it with `tessera up`, or name its "
                    "directory with --data-dir."
                ) from None
            raise StartError(f"{failed}: {error.details()}") from None


def settings_of(arguments: argparse.Namespace) -> settings.ServiceSettings:
    """What is set for the platform that the arguments name."""
    environment = dict(os.environ)
    if arguments.data_dir is not None:
        environment["TESSERA_DATA_DIR"] = str(arguments.data_dir)
    return settings.load(settings.ServiceSettings, environment)


def _is_answer(error: grpc.aio.AioRpcError) -> bool:
    """Whether a service said so itself."""
    return rpc_status.from_call(error) is not None
