"""`tessera keys`: which keys everything stored is sealed under, and new ones in their place, while the platform runs.

`rotate root` writes the new root key into its file; the one before stays beside it as FILE.previous and opens nothing
but older backups. With a KMS plugin the new root key is encrypted under the key that the plugin has now. `rotate store`
renews what lies between the root key and the keys of scopes. `rotate scope` gives scopes new keys. What they protect
follows in the background, and `status` says how much is still to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from tessera.cli import operator
from tessera.secrets.v1 import secrets_pb2 as pb
from tessera.secrets.v1 import secrets_pb2_grpc as rpc

_TIMEOUT_SECONDS = 60.0


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "keys",
        help="look at the keys that everything is sealed under, and rotate them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = parser.add_subparsers(required=True, metavar="COMMAND")
    status = chosen.add_parser("status", help="tell which keys there are")
    status.set_defaults(request=pb.GetKeyStatusRequest(), method=lambda keys: keys.GetKeyStatus)
    rotate = chosen.add_parser("rotate", help="put new keys in the place of others").add_subparsers(
        required=True, metavar="LEVEL"
    )
    root = rotate.add_parser("root", help="the root key, where it is kept")
    root.set_defaults(request=pb.RotateRootKeyRequest(), method=lambda keys: keys.RotateRootKey)
    store = rotate.add_parser("store", help="the key that the keys of scopes are sealed under")
    store.set_defaults(request=pb.RotateStoreKeyRequest(), method=lambda keys: keys.RotateStoreKey)
    scope = rotate.add_parser("scope", help="the keys of scopes")
    which = scope.add_mutually_exclusive_group(required=True)
    which.add_argument("scopes", nargs="*", default=[], metavar="SCOPE", help="the scopes")
    which.add_argument("--all", action="store_true", help="every scope")
    scope.set_defaults(request=pb.RotateScopeKeysRequest(), method=lambda keys: keys.RotateScopeKeys)
    for each in (status, root, store, scope):
        operator.add_data_dir(each)
        each.set_defaults(run=run, failed="The rotation failed (`tessera keys status` tells which keys are in use)")
    status.set_defaults(failed="The keys are not known")


def run(arguments: argparse.Namespace) -> int:
    """Does it, and prints which keys there are then; never a key itself."""
    request: Message = arguments.request
    if isinstance(request, pb.RotateScopeKeysRequest):
        request.scopes.extend(arguments.scopes)
    choose: Callable[[rpc.KeysStub], Any] = arguments.method

    def method(channel: grpc.aio.Channel) -> Any:
        return choose(rpc.KeysStub(channel))

    status = operator.call(arguments, method, request, pb.KeyStatus, timeout=_TIMEOUT_SECONDS, failed=arguments.failed)
    print(f"root key    {status.root_key_id}, from {status.root_key_source}")
    for key in status.store_keys:
        print(
            f"store key   {key.version}, made {_date(key.creation_timestamp)}:"
            f" {key.scope_keys} keys of scopes, MACs of {key.tokens} tokens and {key.rights} objects of rights"
        )
    oldest = f", the oldest made {_date(status.oldest_scope_key_timestamp)}" if status.scopes else ""
    print(f"scope keys  of {status.scopes} scopes{oldest}; {status.values_behind} values to be sealed anew")
    return 0


def _date(timestamp: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(timestamp / 1000))
