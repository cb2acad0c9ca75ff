"""`tessera admin-token`: writes a new admin token to DIR/admin.token; the old one stops working."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

import grpc

from servicekit import channels, settings, sockets
from servicekit.errors import StartError
from tessera.identity.v1 import identity_pb2 as pb
from tessera.identity.v1 import identity_pb2_grpc as rpc

_TIMEOUT_SECONDS = 10.0


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("admin-token", help="renew the admin's token", description=__doc__)
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="the running platform's data directory")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the path of the file; the token itself is never shown."""
    environment = dict(os.environ)
    if arguments.data_dir is not None:
        environment["TESSERA_DATA_DIR"] = str(arguments.data_dir)
    configured = settings.load(settings.ServiceSettings, environment)
    if not configured.data_dir.is_dir():
        raise StartError(f"There is no platform in {configured.data_dir}; name its directory with --data-dir.")
    answer = asyncio.run(_renewed(configured))
    expires = time.strftime("%Y-%m-%d", time.gmtime(answer.expiry_time / 1000))
    print(f"{answer.path} (valid until {expires})")
    return 0


async def _renewed(configured: settings.ServiceSettings) -> pb.RenewAdminTokenResponse:
    # The operator is whoever may enter the directory of the internal sockets: the user that the platform runs as.
    address = sockets.socket_address(configured.sockets, callee="secrets", caller="operator")
    async with channels.opened(address) as channel:
        method = rpc.AuthorityStub(channel).RenewAdminToken
        try:
            return await method(
                pb.RenewAdminTokenRequest(), timeout=_TIMEOUT_SECONDS, metadata=channels.outgoing_metadata()
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise StartError(
                    f"No platform is running on {configured.data_dir}; start it with `tessera up`, or name its "
                    "directory with --data-dir."
                ) from None
            raise StartError(f"The token could not be renewed: {error.details()}") from None
