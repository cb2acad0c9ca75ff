"""`tessera audit`: the keys of the audit logs, and whether a log is whole."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import grpc

from servicekit import channels, settings, sockets
from servicekit.audit_records import AuditKey, Head, verify
from servicekit.errors import StartError
from tessera.identity.v1 import audit_pb2 as pb
from tessera.identity.v1 import audit_pb2_grpc as rpc

_TIMEOUT_SECONDS = 10.0
_HEAD_EVENT = "audit head"
"""What a service logs when it publishes the head of its chain."""


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("audit", help="verify the audit logs", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    keys = actions.add_parser("keys", help="write the audit keys of a running platform to a new file, mode 0600")
    keys.add_argument("file", type=Path, metavar="FILE", help="where to; keep it away from the logs")
    keys.add_argument("--data-dir", type=Path, metavar="DIR", help="the running platform's data directory")
    keys.set_defaults(run=_keys)
    verifying = actions.add_parser("verify", help="find out whether a log is whole; needs no platform")
    verifying.add_argument("files", type=Path, nargs="+", metavar="FILE", help="all files of one service's log")
    verifying.add_argument("--keys", type=Path, required=True, metavar="FILE", help="what `tessera audit keys` wrote")
    verifying.add_argument(
        "--heads",
        type=Path,
        action="append",
        default=[],
        metavar="LOG",
        help="a log of that service with the heads that it published: what was cut off at the end is found by them",
    )
    verifying.set_defaults(run=_verify)


def _keys(arguments: argparse.Namespace) -> int:
    environment = dict(os.environ)
    if arguments.data_dir is not None:
        environment["TESSERA_DATA_DIR"] = str(arguments.data_dir)
    configured = settings.load(settings.ServiceSettings, environment)
    if not configured.data_dir.is_dir():
        raise StartError(f"There is no platform in {configured.data_dir}; name its directory with --data-dir.")
    answer = asyncio.run(_listed(configured))
    text = json.dumps([{"service": each.service, "key": each.key.hex()} for each in answer.keys])
    try:
        descriptor = os.open(arguments.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{text}\n")
    except OSError as error:
        raise StartError(f"{arguments.file} cannot be written: {error.strerror}.") from None
    print(arguments.file)
    return 0


async def _listed(configured: settings.ServiceSettings) -> pb.ListAuditKeysResponse:
    address = sockets.socket_address(configured.sockets, callee="secrets", caller="operator")
    async with channels.opened(address) as channel:
        try:
            return await rpc.AuditKeysStub(channel).ListKeys(
                pb.ListAuditKeysRequest(), timeout=_TIMEOUT_SECONDS, metadata=channels.outgoing_metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise StartError(f"The keys cannot be had of {configured.data_dir}: {error.details()}") from None


def _verify(arguments: argparse.Namespace) -> int:
    """Prints what the log holds, or what is wrong with it."""
    try:
        told = json.loads(arguments.keys.read_text())
        keys = {key.id: key for key in (AuditKey(bytes.fromhex(each["key"])) for each in told)}
    except (OSError, ValueError, TypeError, KeyError):
        raise StartError(f"{arguments.keys} cannot be read, or is not what `tessera audit keys` wrote.") from None
    try:
        verdict = verify(_lines(sorted(arguments.files, key=lambda path: path.name)), keys, _heads(arguments.heads))
    except OSError as error:
        raise StartError(f"{error.filename} cannot be read: {error.strerror}.") from None
    for problem in verdict.problems:
        print(f"NOT WHOLE: {problem}")
    if verdict.is_whole:
        print(f"whole: {verdict.records} records, {verdict.first} to {verdict.head.seq}, head {verdict.head.mac}")
    return 0 if verdict.is_whole else 1


def _lines(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            for line in file:
                yield line.removesuffix(b"\n")


def _heads(logs: list[Path]) -> Iterator[Head]:
    for path in logs:
        with path.open("rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict) and event.get("event") == _HEAD_EVENT:
                    yield Head(int(event["seq"]), str(event["mac"]))
