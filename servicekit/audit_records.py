"""What an audit record looks like, and whether a log of them is whole: pure, and all that a verifier needs.

A record is one line: a JSON object in ASCII whose last members are `key`, the id of the audit key, `prev`, the MAC of
the record before, and `mac`, the HMAC-SHA256 of all that stands before it. So a line that was changed, taken out, put
in or moved breaks the chain from there on. Lines are verified as they stand, byte by byte; nothing is parsed and
written anew.

A secret value is never in a record. What stands for it is its HMAC, under a key that is made of the audit key for this
alone: a value that somebody chose cannot be made to yield the MAC of a record.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

FIRST_PREV = "0" * 64
"""What stands in the place of a MAC before the first record."""

EXPIRED = "audit/expired"
"""The method of a record that says up to which record the log was removed, because of its age or size."""

_MAC_START = ',"mac":"'
_MAC_LENGTH = 64
_END = len(_MAC_START) + _MAC_LENGTH + len('"}')

# Made once: `json.dumps` makes one at each call.
_as_json = json.JSONEncoder(separators=(",", ":")).encode

REMEMBERED = 5_000
"""How many of the last records a verifier remembers: what an exporter may write twice after a crash."""


class AuditKey:
    """The audit key of one database: 32 bytes that Secrets derives."""

    def __init__(self, key: bytes) -> None:
        if len(key) != hashlib.sha256().digest_size:
            raise ValueError("an audit key has 32 bytes")
        self.raw = key
        self.id = hmac.digest(key, b"id", hashlib.sha256)[:8].hex()
        """Says which key it is, and nothing about it."""
        # Copied for each record: one call for all, `hmac.digest`, lets go of the interpreter's lock, and waits for it
        # longer than it works.
        self._chain = hmac.new(hmac.digest(key, b"chain", hashlib.sha256), digestmod=hashlib.sha256)
        self._values = hmac.new(hmac.digest(key, b"value", hashlib.sha256), digestmod=hashlib.sha256)

    def __repr__(self) -> str:
        return f"AuditKey({self.id})"

    def of_line(self, text: str) -> str:
        """The MAC of a record, from all that stands before its MAC."""
        mac = self._chain.copy()
        mac.update(text.encode("ascii"))
        return mac.hexdigest()

    def of_value(self, value: bytes) -> str:
        """What stands for a value: the same for the same value, and no help to whoever lacks the key."""
        mac = self._values.copy()
        mac.update(value)
        return mac.hexdigest()


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chain."""

    seq: int = 0
    mac: str = FIRST_PREV


def line(key: AuditKey, head: Head, facts: Mapping[str, Any], *, at: float) -> tuple[str, Head]:
    """The record of `facts` behind `head`, and the head from then on; `at` is Unix seconds."""
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    content = {"seq": head.seq + 1, "time": moment, **facts, "key": key.id, "prev": head.mac}
    text = _as_json(content)[:-1]
    mac = key.of_line(text)
    return f'{text}{_MAC_START}{mac}"}}', Head(head.seq + 1, mac)


def length(text: str) -> int:
    """How many bytes a text takes in a record."""
    return len(_as_json(text)) - len('""')


def mac_of(text: str) -> str:
    """The MAC at the end of a record."""
    return text[-_MAC_LENGTH - len('"}') : -len('"}')]


@dataclass(slots=True)
class Verdict:
    """What a log turned out to be."""

    service: str = ""
    """Whose log it is."""
    first: int = 0
    head: Head = Head()
    records: int = 0
    repeated: int = 0
    """Lines that are there twice, because an exporter was killed between two steps."""
    problems: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not self.problems


def verify(
    lines: Iterable[bytes], keys: Mapping[str, Sequence[AuditKey]], anchors: Iterable[Head] = (), *, begin: int = 1
) -> Verdict:
    """Looks whether a log is whole; `lines` are all of it, in its order, without line breaks.

    `keys` are the audit keys of each service, the oldest first: a log is of one service, and goes on with a newer key
    and never with an older one again. `anchors` are heads that were published: the log must hold each that is not older
    than its beginning. A log that begins later than record `begin` must say in its chain that what was before was
    removed. Stops at the first break, since nothing after it can be told from an invention.
    """
    verdict = Verdict()
    known = {(service, key.id): (age, key) for service, of in keys.items() for age, key in enumerate(of)}
    newest = 0
    wanted: dict[int, set[str]] = {}
    for anchor in anchors:
        if anchor.seq > 0:
            wanted.setdefault(anchor.seq, set()).add(anchor.mac)
    recent: OrderedDict[int, str] = OrderedDict()
    removed = 0
    for number, raw in enumerate(lines, start=1):
        problem, record = _opened(raw, known)
        if record is None:
            verdict.problems.append(f"line {number}: {problem}")
            break
        seq, mac, service = record["seq"], record["mac"], record["service"]
        age, _ = known[service, record["key"]]
        if recent.get(seq) == mac:
            verdict.repeated += 1
            continue
        if verdict.records == 0:
            verdict.first, verdict.service = seq, service
        elif service != verdict.service:
            # Whoever has the key of one log must not go on with the other.
            verdict.problems.append(f"line {number}: record {seq} is of the log of {service}, not {verdict.service}")
            break
        elif (seq, record["prev"]) != (verdict.head.seq + 1, verdict.head.mac):
            verdict.problems.append(f"line {number}: record {seq} does not follow record {verdict.head.seq}")
            break
        if seq == 1 and record["prev"] != FIRST_PREV:
            verdict.problems.append(f"line {number}: the first record follows another one")
            break
        if age < newest:
            verdict.problems.append(f"line {number}: record {seq} was made with a key from before the last one")
            break
        newest = age
        if record.get("method") == EXPIRED:
            removed = max(removed, int(record["through"]))
        if wanted.pop(seq, {mac}) != {mac}:
            verdict.problems.append(f"line {number}: record {seq} is not the one that was published")
            break
        verdict.head = Head(seq, mac)
        verdict.records += 1
        recent[seq] = mac
        if len(recent) > REMEMBERED:
            recent.popitem(last=False)
    if verdict.is_whole and verdict.first > max(removed + 1, begin):
        verdict.problems.append(f"the log begins at record {verdict.first}, and does not say that what was before went")
    if verdict.is_whole and verdict.records == 0:
        verdict.problems.append("the log holds no record")
    if verdict.is_whole and (missing := max(wanted, default=0)) > verdict.head.seq:
        verdict.problems.append(f"the log ends at record {verdict.head.seq}, and record {missing} was published")
    return verdict


def _opened(raw: bytes, known: Mapping[tuple[str, str], tuple[int, AuditKey]]) -> tuple[str, dict[str, Any] | None]:
    """The record of a line whose MAC is right by a key of the service that it names, or what is wrong with it."""
    try:
        text = raw.decode("ascii")
        record = json.loads(text)
        seq, mac = record["seq"], record["mac"]
        is_record = isinstance(seq, int) and isinstance(mac, str) and text[-_END:] == f'{_MAC_START}{mac}"}}'
        _, key = known.get((record["service"], record["key"]), (0, None))
    except (ValueError, KeyError, TypeError, RecursionError):
        is_record, key = False, None
        record = None
    if not is_record or record is None:
        return "this is no record", None
    if key is None:
        made = f"record {record['seq']} was made with the key {record['key']!s:.32}"
        return f"{made}, which is none at hand of the service that it names", None
    if not hmac.compare_digest(key.of_line(text[:-_END]), record["mac"]):
        return f"record {record['seq']} was changed", None
    return "", record
