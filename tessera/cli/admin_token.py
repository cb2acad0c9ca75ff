"""`tessera admin-token`: writes a new admin token to DIR/admin.token; the old one stops working."""

from __future__ import annotations

import argparse
import time

from tessera.cli import operator
from tessera.identity.v1 import identity_pb2 as pb
from tessera.identity.v1 import identity_pb2_grpc as rpc

_TIMEOUT_SECONDS = 10.0


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("admin-token", help="renew the admin's token", description=__doc__)
    operator.add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the path of the file; the token itself is never shown."""
    answer = operator.call(
        arguments,
        lambda channel: rpc.AuthorityStub(channel).RenewAdminToken,
        pb.RenewAdminTokenRequest(),
        pb.RenewAdminTokenResponse,
        timeout=_TIMEOUT_SECONDS,
        failed="The token could not be renewed",
    )
    expires = time.strftime("%Y-%m-%d", time.gmtime(answer.expiry_time / 1000))
    print(f"{answer.path} (valid until {expires})")
    return 0
