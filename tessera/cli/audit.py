"""`tessera audit`: reads the audit logs of a running platform, and finds out whether a log is whole."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlencode

import grpc

from servicekit import channels, private_file, settings, sockets
from servicekit.audit_records import AuditKey, Head, verify
from servicekit.errors import StartError
from tessera.cli import shown
from tessera.cli.rest import Rest, connected
from tessera.identity.v1 import audit_pb2 as pb
from tessera.identity.v1 import audit_pb2_grpc as rpc

_TIMEOUT_SECONDS = 10.0
_LOGS = ("secrets", "serving")
_MOST = 1_000
"""Records of one answer."""

_LOOK_SECONDS = 1.0
"""How often who follows a log asks for what is new."""

_LONGEST_KEYS = 1 << 20
"""Bytes of a file of audit keys, which has a hundred for each key that there ever was."""

_HEAD_EVENT = "audit head"
"""What a service logs when it publishes the head of its chain."""

_OF_LOGS = "_service"
"""What a service adds to its name in its own log, where it is that of its program."""


def describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser("audit", help="read and verify the audit logs", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    tail = actions.add_parser("tail", help="print the newest records, as an admin", epilog=shown.WHERE)
    tail.add_argument("log", choices=_LOGS, metavar="LOG", help="secrets or serving: whose log")
    tail.add_argument("-n", type=int, default=20, metavar="COUNT", dest="count", help="how many (default: %(default)s)")
    tail.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    tail.set_defaults(run=_tail)
    exporting = actions.add_parser("export", help="write a whole log to a new file, as an admin", epilog=shown.WHERE)
    exporting.add_argument("log", choices=_LOGS, metavar="LOG", help="secrets or serving: whose log")
    exporting.add_argument(
        "file", type=Path, metavar="FILE", help="where to, mode 0600; the way it is verified; - is standard output"
    )
    exporting.add_argument(
        "--after", type=int, default=0, metavar="SEQ", help="only records behind that one, to go on with an export"
    )
    exporting.set_defaults(run=_export)
    keys = actions.add_parser("keys", help="write the audit keys of a running platform to a new file, mode 0600")
    keys.add_argument("file", type=Path, metavar="FILE", help="where to; keep it away from the logs")
    keys.add_argument("--data-dir", type=Path, metavar="DIR", help="the running platform's data directory")
    keys.set_defaults(run=_keys)
    verifying = actions.add_parser("verify", help="find out whether a log is whole; needs no platform")
    verifying.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="all files of one service's log, in any order"
    )
    verifying.add_argument("--keys", type=Path, required=True, metavar="FILE", help="what `tessera audit keys` wrote")
    verifying.add_argument(
        "--heads",
        type=Path,
        action="append",
        default=[],
        metavar="LOG",
        help="a log of that service with the heads that it published: what was cut off at the end is found by them;"
        " for several give it several times",
    )
    verifying.add_argument(
        "--from",
        type=int,
        default=1,
        metavar="SEQ",
        dest="begin",
        help="the log may begin there, as after `export --after`; nothing is said about what was before, so take the"
        " number from what you know and not from the log",
    )
    verifying.add_argument(
        "--syslog",
        action="store_true",
        help="what stands in a line before the first { is of a syslog server, and not looked at",
    )
    verifying.set_defaults(run=_verify)


def _tail(arguments: argparse.Namespace) -> int:
    """Prints the newest records, the oldest of them first: a JSON object a line."""
    if not 1 <= arguments.count <= _MOST:
        raise StartError(f"-n: give 1 to {_MOST}. `tessera audit export` writes all records.")
    follower = f"follow-{secrets.token_hex(16)}" if arguments.follow else None
    with connected(request_id=follower) as rest:
        newest = _records(rest, arguments.log, max_results=arguments.count)
        shown.lines(newest)
        if follower is not None:
            shown.lines(_coming(rest, arguments.log, follower, after=_seq(newest[-1]) if newest else 0))
    return 0


def _coming(rest: Rest, log: str, follower: str, *, after: int) -> Iterator[str]:
    """The records behind that one, as they come, without end.

    Those of the follower's own questions are left out: each is recorded, too, and the next one would find it.
    """
    while True:
        for record in _records(rest, log, after=after, max_results=_MOST):
            after = _seq(record)
            if json.loads(record).get("request_id") != follower:
                yield record
        time.sleep(_LOOK_SECONDS)


def _export(arguments: argparse.Namespace) -> int:
    """Writes records to a file, and says which; what is written goes on from `--after` and has no gap."""
    first, after = 0, arguments.after
    is_printed = arguments.file == Path("-")
    with connected() as rest, nullcontext(sys.stdout) if is_printed else _new_file(arguments.file) as file:
        # Every question is recorded, too, so there would always be one more.
        newest = _records(rest, arguments.log, max_results=1)
        until = _seq(newest[-1]) if newest else 0
        while after < until and (records := _records(rest, arguments.log, after=after, max_results=_MOST)):
            if after and _seq(records[0]) != after + 1:
                gone = f"Records {after + 1} to {_seq(records[0]) - 1} of the log were removed because of age or size"
                raise StartError(f"{gone} before they were read. Export it again, without --after.")
            file.writelines(f"{record}\n" for record in records)
            first, after = first or _seq(records[0]), _seq(records[-1])
        file.flush()
    said = f"records {first} to {after}" if first else "no records"
    print(f"{arguments.file}: {said}", file=sys.stderr if is_printed else sys.stdout)
    return 0


def _seq(record: str) -> int:
    return int(json.loads(record)["seq"])


def _records(rest: Rest, log: str, **asked: int) -> list[str]:
    return [str(each) for each in rest.call("GET", f"/api/2.0/tessera/audit/{log}?{urlencode(asked)}")["records"]]


def _keys(arguments: argparse.Namespace) -> int:
    environment = dict(os.environ)
    if arguments.data_dir is not None:
        environment["TESSERA_DATA_DIR"] = str(arguments.data_dir)
    configured = settings.load(settings.ServiceSettings, environment)
    if not configured.data_dir.is_dir():
        raise StartError(f"There is no platform in {configured.data_dir}; name its directory with --data-dir.")
    answer = asyncio.run(_listed(configured))
    text = json.dumps([{"service": each.service, "key": each.key.hex()} for each in answer.keys])
    with _new_file(arguments.file) as file:
        file.write(f"{text}\n")
    print(arguments.file)
    return 0


@contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """A file that was not there before, for its owner alone."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            try:
                yield file
            except BaseException:
                path.unlink()  # half of it is no use
                raise
    except OSError as error:
        raise StartError(f"{path} cannot be written: {error.strerror}.") from None


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
        told = json.loads(
            private_file.read(arguments.keys, what="The file of audit keys", longest=_LONGEST_KEYS, may_be_link=True)
        )
        keys: dict[str, list[AuditKey]] = {}
        for each in told:
            keys.setdefault(each["service"], []).append(AuditKey(bytes.fromhex(each["key"])))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise StartError(f"{arguments.keys} cannot be read, or is not what `tessera audit keys` wrote.") from None
    # One service must not put a log of its own in the place of the other's.
    if named := {log for log in _LOGS for path in arguments.files if path.name.startswith(log)}:
        keys = {log: keys.get(log, []) for log in named}
    try:
        lines = _lines(_ordered(arguments.files))
        if arguments.syslog:
            lines = map(_message, lines)
        beginning = list(islice(lines, 1))
        service = _object(beginning[0]).get("service") if beginning else None
        heads = {head for of, head in _heads(arguments.heads) if of == service}
        verdict = verify(chain(beginning, lines), keys, heads, begin=arguments.begin)
    except OSError as error:
        raise StartError(f"{error.filename} cannot be read: {error.strerror}.") from None
    for problem in verdict.problems:
        print(f"NOT WHOLE: {problem}")
    if not verdict.is_whole:
        return 1
    covered = [head.seq for head in heads if head.seq >= verdict.first]
    if arguments.heads and not covered:
        logs = ", ".join(map(str, arguments.heads))
        raise StartError(
            f"No head of {verdict.service} from record {verdict.first} on is in {logs}, so it is not known whether the"
            " end was cut off. What there is has no gap; name further logs of the service with --heads, or verify it"
            " without."
        )
    records = f"{verdict.records} records of {verdict.service}"
    print(f"whole: {records}, {verdict.first} to {verdict.head.seq}, head {verdict.head.mac}")
    if covered:
        print(f"published heads of {verdict.service} that are in it: {len(covered)}, the last at record {max(covered)}")
    return 0


def _ordered(files: list[Path]) -> list[Path]:
    """The files in the order of their first records, whatever they are called."""
    if len(files) == 1:
        return files
    for path in files:
        if path.exists() and not path.is_file():
            raise StartError(f"{path} is no regular file. Verify it by itself, since several are read twice.")
    return sorted(files, key=_first)


def _first(path: Path) -> float:
    """The number of a file's first record; of a file without one a number behind all others."""
    if not path.exists() and (number := path.stem.rpartition("-")[2]).isdecimal():
        return int(number)  # it may have expired just now, and its name says where it was
    with path.open("rb") as file:
        numbers = (_object(_message(line)).get("seq") for line in file)
        return next((number for number in numbers if isinstance(number, int)), math.inf)


def _message(line: bytes) -> bytes:
    """A line without what a syslog server writes before a record."""
    return line[max(line.find(b"{"), 0) :]


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, which is empty where that has none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(files: list[Path]) -> Iterator[bytes]:
    is_begun = False
    for path in files:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            # The oldest may expire while a service runs, which its log has to say then.
            if is_begun or path == files[-1]:
                raise
            continue
        is_begun = True
        with file:
            for line in file:
                yield line.removesuffix(b"\n")


def _heads(logs: list[Path]) -> Iterator[tuple[str, Head]]:
    """The heads in logs, and which service published each."""
    for path in logs:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                event = _object(line)
                if event.get("event") != _HEAD_EVENT:
                    continue
                seq, mac = event.get("seq"), event.get("mac")
                if type(seq) is not int or not isinstance(mac, str):
                    raise StartError(f"{path}, line {number}, is no head of an audit log, though it says so.")
                yield str(event.get("service")).removesuffix(_OF_LOGS), Head(seq, mac)
