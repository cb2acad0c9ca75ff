"""The audit trail: one record for each call that was decided about, in the database of the service that decides.

The rule: no trace, no deed. The record of a change is part of the change's transaction; an answer that holds a value
leaves when its record is on stable storage. Reads that wait for that share one transaction (group commit). All other
records follow at once, without anybody waiting. Where records cannot be kept, or whoever takes them over does not,
values are not read and nothing is changed; everything else goes on, and what is not recorded is counted.

The listener opens an entry for each call and says how it ended. Use cases add what only they know, by the functions at
the end of this page; nobody passes an entry by hand, and in background work there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from servicekit import audit_store
from servicekit.audit_records import AuditKey, Head, length, line
from servicekit.context import Principal
from servicekit.errors import Unavailable
from servicekit.metrics import ServiceMetrics
from servicekit.policy import Row
from servicekit.storage import Connection, Storage, StorageError

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 60.0
"""How often the head of the chain is told, if it is another one."""

MOST_AT_ONCE = 1_000
"""Records of one transaction."""

MOST_WAITING = 10_000
"""Records that wait for their transaction; further ones are counted."""

GATHER_SECONDS = 0.005
"""How long a transaction waits for further records, where many came together the last time."""

KEY_SECONDS = 3.0
"""For how long after the start of a service calls wait for its audit key."""

MOST_ADDRESSES = 100
"""Addresses that are counted apart in one minute."""

NO_KEY = "its key is not known yet"

BACKLOG, SINK, FORWARD = "backlog", "sink", "forward"
"""What can fail: that the log keeps up, its files, and whoever gets the records besides."""

MOST_REFUSED = 20
"""Refused credentials of one address in one minute that are recorded; further ones are counted."""

LONGEST_NAME = 256
"""Bytes of one name as it stands in a record, where a character may take twelve; `...` says that it was longer."""

LONGEST_ID = 40
"""Characters of one id in a record. A longer one is none of ours, and may be a token that was taken for its id."""

MOST_CHANGES = 8
"""How many changes of rights one record tells of: more would be longer than servers of syslog take."""

OK = "OK"
_LATE = frozenset(("CANCELLED", "DEADLINE_EXCEEDED"))
_TURNED_AWAY = "RESOURCE_EXHAUSTED"

_PLAIN = re.compile(r"[\w.@:/+-]+")
# What is more than ASCII is escaped once, in the record.
_quoted = json.JSONEncoder(ensure_ascii=False).encode

OBJECT_FIELDS = (
    *("scope", "key", "principal", "version", "name", "served_model_name", "config_version", "endpoint_id"),
    *("serving_endpoint_id", "replica_id", "digest", "id", "user_name", "display_name", "application_id", "token_id"),
    *("service_principal_id", "secret_id", "created_by_id", "created_by_username", "permission"),
)
"""The fields of requests that say what a call is about. What is not named here is in no record."""


class AuditUnavailable(Unavailable):
    """Nothing can be recorded just now, so nothing that must be is done."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"The audit log cannot take a record ({cause}), so no secret is read and nothing is changed. The operator"
            " of this platform can mend that.",
            retry_after=5,
        )


@dataclass(slots=True, kw_only=True)
class Entry:
    """One call, as it will be recorded.

    Two threads know of it, and neither waits for the other: the database's adds what a use case says, in the
    transaction, while the loop's tells how the call ended, which may be before that. So what came of the use case and
    what the caller was told are apart, and what a record says is put together when it is known that there is one.
    """

    trail: Trail
    method: str
    permission: str
    request_id: str
    source: str
    via: str
    object: str = ""
    caller: Principal | None = None
    outcome: str = OK
    """What came of the use case."""
    reason: str = ""
    told: str = ""
    """What the caller was told, where that is an error."""
    told_reason: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    values: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, str]] = field(default_factory=list)
    """What the call changes about rights, where its request does not say that; told if the change is made."""
    must_be_durable: bool = False
    """Whether the answer has to wait for the record."""
    is_appended: bool = False
    """Whether the record is part of a transaction of the call's own, or is about to be."""
    is_recorded: bool = False
    """Whether there is a record, or will be, without that."""

    def facts(self, outcome: str, reason: str) -> dict[str, Any]:
        """What the record says, as of now."""
        caller, notes = self.caller, self.notes
        facts: dict[str, Any] = {
            "service": self.trail.service,
            "request_id": self.request_id,
            "actor": _short(caller.name) if caller else f"service:{self.via}" if self.via else "",
            "actor_id": caller.id if caller else "",
            "credential": caller.token_id if caller else "",
            "on_behalf_of": notes.get("on_behalf_of", ""),
            "source": _short(self.source),
            "via": self.via,
            "method": self.method,
            "object": self.object,
            "permission": self.permission,
            "outcome": outcome,
            "reason": reason,
        }
        facts |= {name: told for name, told in notes.items() if name not in facts}
        if values := list(self.values):
            facts["values"] = values
        return facts

    async def allowed(self) -> None:
        """Returns when the answer may leave; raises AuditUnavailable when it must not."""
        if self.must_be_durable and not self.is_appended:
            await self.trail.record(self)

    def ended(self, outcome: str, reason: str, *, is_lack_of_audit: bool, is_credential: bool) -> None:
        """Says how the call ended; a no-op when that is recorded already. `is_credential`: for want of a good one.

        Whoever asks too often is turned away before anybody decides, so that is counted.
        """
        if self.is_recorded:
            return
        if outcome != OK:
            # Before it is looked whether there is a record: see Trail.append.
            self.told, self.told_reason = outcome, reason
        if self.is_appended and (outcome == OK or outcome in _LATE):
            return  # a change that outlives its caller has its record
        if is_lack_of_audit:
            self.trail.count(self.source or self.via, "no audit")
        elif is_credential and self.trail.is_flooded(self.source or self.via):
            self.trail.count(self.source or self.via, "too many credentials refused")
        elif outcome == _TURNED_AWAY and not is_credential:
            self.trail.count(self.source or self.via, "too many requests")
        else:
            self.trail.follow(self)


class Trail:
    """The audit trail of one database. `now` tells Unix seconds; without a `key`, `open` brings it later."""

    def __init__(
        self, service: str, database: Storage, key: AuditKey | None, *, now: Callable[[], float] = time.time
    ) -> None:
        self.service = service
        self.key = key
        self._database = database
        self._now = now
        self._has_key = asyncio.Event()
        self._key_due = time.monotonic() + KEY_SECONDS
        if key is not None:
            self._has_key.set()
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[None] | None]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._problems: dict[str, str] = {}
        self._counts: Counter[tuple[int, str, str]] = Counter()
        self._refused: Counter[str] = Counter()
        self._refused_in = 0
        self._published = Head()
        self.head = Head()
        """The end of the chain, as far as this process has looked."""
        self.backlog = 0
        """Records that wait to be taken over, as of the last look."""

    def open(self, key: AuditKey) -> None:
        """Brings the key, or one to go on with in its place; what waited for it is recorded."""
        self.key = key
        self._has_key.set()
        self._flush_soon()

    async def ready(self) -> None:
        """Waits for the key, where the service has just started and does not have it yet."""
        if self.key is None and time.monotonic() < self._key_due:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._key_due - time.monotonic()):
                    await self._has_key.wait()

    def begin(self, method: str, row: Row | None, *, request_id: str, source: str, via: str) -> Entry:
        """The entry of a call, which use cases find from now on."""
        entry = Entry(trail=self, method=method, permission=_words(row), request_id=request_id, source=source, via=via)
        _current.set(entry)
        return entry

    def fails(self, part: str, cause: str) -> None:
        """Has values and changes refused, until `works` is said of the same part. `cause` is told to callers."""
        if self._problems.get(part) != cause:
            log.error("audit log fails", extra={"part": part, "cause": cause})
        self._problems[part] = cause

    def works(self, part: str) -> None:
        """Takes `fails` back."""
        if self._problems.pop(part, None) is not None:
            log.warning("audit log works again", extra={"part": part})

    def is_failing(self) -> float:
        """Whether values and changes are refused, as a metric: 1 or 0."""
        return float(bool(self._problems))

    def require(self) -> None:
        """Raises AuditUnavailable where the call that is being served could not be recorded."""
        if _current.get() is None:
            return
        if self.key is None:
            raise AuditUnavailable(NO_KEY)
        for cause in self._problems.values():
            raise AuditUnavailable(cause)

    def append(self, connection: Connection) -> None:
        """Records the call that is being served, within the transaction of its change."""
        entry = _current.get()
        if entry is None or entry.is_appended:
            return
        # Before it is looked what the caller was told: who tells it at this moment sees that there is a record, or has
        # told it early enough to stand in it.
        entry.is_appended = True
        facts = entry.facts(entry.outcome, entry.reason)
        if told := entry.told:  # its caller was told something else, or was gone, before the change was made
            facts["told"] = told
        try:
            self._append(connection, _in_parts(facts, entry.changes))
        except BaseException:
            entry.is_appended = False
            raise

    async def record(self, entry: Entry) -> None:
        """Returns when the record is on stable storage; raises AuditUnavailable."""
        self.require()
        if len(self._waiting) >= MOST_WAITING:
            raise AuditUnavailable("too many records wait")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry.is_recorded = True
        self._waiting.append((entry.facts(entry.outcome, entry.reason), waiter))
        self._flush_soon()
        try:
            await waiter
        except AuditUnavailable:
            entry.is_recorded = False
            raise

    def follow(self, entry: Entry) -> None:
        """Has a call recorded, without anybody waiting for it."""
        entry.is_recorded = True
        if len(self._waiting) >= MOST_WAITING or BACKLOG in self._problems:
            self.count(entry.source or entry.via, "no audit")
            return
        outcome, reason = (entry.told, entry.told_reason) if entry.told else (entry.outcome, entry.reason)
        self._waiting.append((entry.facts(outcome, reason), None))
        self._flush_soon()

    async def event(self, method: str, **facts: Any) -> None:
        """Records something that is nobody's call, and returns when it is on stable storage."""
        told = {"service": self.service, "actor": f"service:{self.service}", "method": method, "outcome": OK, **facts}
        await self._database.write(self._append, [told])

    def is_flooded(self, address: str) -> bool:
        """Counts that a credential from an address was refused; whether there were too many in this minute, so that
        whoever guesses cannot fill the log."""
        minute = int(self._now() // 60)
        if minute != self._refused_in:
            self._refused.clear()
            self._refused_in = minute
        if address not in self._refused and len(self._refused) >= MOST_ADDRESSES:
            address = "others"
        self._refused[address] += 1
        return self._refused[address] > MOST_REFUSED

    def count(self, address: str, cause: str) -> None:
        """Counts a call that was turned away before it was decided about, which gets no record of its own."""
        minute = int(self._now() // 60)
        if (minute, address, cause) not in self._counts and len(self._counts) >= MOST_ADDRESSES:
            address = "others"
        self._counts[minute, address, cause] += 1

    async def run(self) -> None:
        """Tells the head of the chain, and what was counted, every minute until cancelled."""
        while True:
            await asyncio.sleep(PUBLISH_SECONDS)
            await self.publish()

    async def publish(self) -> None:
        """Records what was counted, and tells the head of the chain."""
        with contextlib.suppress(StorageError):
            if self.key is not None and self._counts and not self._problems:
                counts, self._counts = self._counts, Counter()
                try:
                    await self.event("audit/counted", counts=_counted(counts))
                except StorageError:
                    self._counts += counts
                    raise
            self.head = await self._database.read(audit_store.head)
        if self.head != self._published:
            self._published = self.head
            log.info("audit head", extra={"seq": self.head.seq, "mac": self.head.mac})

    async def close(self) -> None:
        """Records what waits, and tells the last head."""
        while self._flushing is not None and self.key is not None:
            await asyncio.wait([self._flushing])
        if self._waiting:
            log.error("audit records are lost", extra={"records": len(self._waiting)})
        await self.publish()

    def watched_by(self, metrics: ServiceMetrics) -> None:
        """Has metrics tell of the trail."""
        metrics.watch("tessera_audit_head", "Number of the last audit record.", lambda: self.head.seq)
        metrics.watch(
            "tessera_audit_head_mac",
            "The first 48 bits of that record's MAC, as a number.",
            lambda: int(self.head.mac[:12], 16),
        )
        metrics.watch("tessera_audit_backlog", "Audit records that wait to be taken over.", lambda: self.backlog)
        metrics.watch("tessera_audit_failing", "Whether secrets and changes are refused for it.", self.is_failing)

    def _append(self, connection: Connection, entries: Iterable[dict[str, Any]]) -> None:
        if self.key is None:
            raise AuditUnavailable(NO_KEY)
        before = head = audit_store.head(connection)
        lines = []
        for facts in entries:
            text, head = line(self.key, head, facts, at=self._now())
            lines.append(text)
        audit_store.append(connection, lines, before)

    def _flush_soon(self) -> None:
        if self._flushing is None and self.key is not None and self._waiting:
            # In a context of its own: it serves many calls, and none of them.
            self._flushing = asyncio.get_running_loop().create_task(self._flush(), name="audit", context=Context())

    async def _flush(self) -> None:
        is_crowded = False
        try:
            while self._waiting:
                if is_crowded and len(self._waiting) < MOST_AT_ONCE:
                    await asyncio.sleep(GATHER_SECONDS)
                batch, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
                is_crowded = len(batch) > 1
                await self._commit(batch)
        finally:
            self._flushing = None

    async def _commit(self, batch: Sequence[tuple[dict[str, Any], asyncio.Future[None] | None]]) -> None:
        try:
            await self._database.write(self._append, [facts for facts, _ in batch])
        except Exception as error:
            cause = "its database cannot be written"
            log.exception("audit records are not stored", exc_info=(type(error), error, error.__traceback__))
            for facts, waiter in batch:
                if waiter is None:
                    self.count(facts["source"] or facts["via"], "no audit")
                elif not waiter.done():
                    waiter.set_exception(AuditUnavailable(cause))
        else:
            for _, waiter in batch:
                if waiter is not None and not waiter.done():
                    waiter.set_result(None)


@asynccontextmanager
async def opened(trail: Trail) -> AsyncIterator[Trail]:
    """The trail while the service runs; leaving records what waits."""
    try:
        yield trail
    finally:
        await trail.close()


_current: ContextVar[Entry | None] = ContextVar("audit entry", default=None)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """For what is done while a call is served and is no part of it: that has no record, and needs none."""
    before = _current.set(None)
    try:
        yield
    finally:
        _current.reset(before)


def value(name: str, version: int, content: bytes) -> None:
    """Says that the call that is being served has to do with a value; the answer waits for the record."""
    entry = _current.get()
    if entry is None:
        return
    if entry.trail.key is None:
        raise AuditUnavailable(NO_KEY)
    entry.values.append({"secret": name, "version": version, "hmac": entry.trail.key.of_value(content)})
    entry.must_be_durable = True


def changed(**about: str) -> None:
    """Says what the call that is being served changes about rights, where its request does not: one right each time.

    It is in the call's record if the change is made, and if many are, in further ones of the same call.
    """
    entry = _current.get()
    if entry is not None:
        entry.changes.append({name: _short(told) for name, told in about.items()})


def sensitive() -> None:
    """Says that the answer to the call that is being served holds a credential, and has to wait for the record."""
    entry = _current.get()
    if entry is not None:
        entry.must_be_durable = True


def note(**facts: str | int | bool) -> None:
    """Adds to the record of the call that is being served what only its use case knows; never a value."""
    entry = _current.get()
    if entry is not None:
        told = {name: _short(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}
        entry.notes = entry.notes | told  # another one, since the loop's thread may be going through these


def refused(reason: str) -> None:
    """Says that the call that is being served is refused, though its answer is none of an error."""
    entry = _current.get()
    if entry is not None:
        entry.outcome, entry.reason = "REFUSED", _short(reason)


def about(message: Message) -> str:
    """What a request is about: the fields of OBJECT_FIELDS that it has, as `name=value`.

    A value that could be taken for more than itself is in quotes: a principal may be called `x permission=READ`.
    """
    return " ".join(
        f"{name}={_shown(name, given, words)}"
        for name, words in _object_fields(message.DESCRIPTOR)
        if (given := getattr(message, name))
    )


@cache
def _object_fields(kind: Descriptor) -> list[tuple[str, dict[int, str]]]:
    """The fields, and what their values are called where these have names."""
    fields = kind.fields_by_name
    return [
        (name, {each.number: each.name for each in words.values} if (words := fields[name].enum_type) else {})
        for name in OBJECT_FIELDS
        if name in fields and not fields[name].is_repeated and fields[name].message_type is None
    ]


def _shown(name: str, given: Any, words: Mapping[int, str]) -> str:
    text = given.hex() if isinstance(given, bytes) else words.get(given) or str(given)
    is_id = name == "id" or name.endswith("_id")
    if is_id and len(text) > LONGEST_ID:
        return f"({len(text)} characters)"
    return _short(text, str if _PLAIN.fullmatch(text[:LONGEST_NAME]) else _quoted)


def _short(text: str, shown: Callable[[str], str] = str) -> str:
    """A text as it is shown, or as much of it as takes LONGEST_NAME bytes in a record at the most."""
    if len(text) <= LONGEST_NAME and text.isascii() and _PLAIN.fullmatch(text):
        return shown(text)  # as nearly all are, each character of which is one byte
    kept = text[:LONGEST_NAME]
    if length(shown(kept)) > LONGEST_NAME:
        most = bisect_right(range(len(kept)), LONGEST_NAME, key=lambda count: length(shown(text[:count]))) - 1
        kept = text[:most]
    return shown(kept) if kept == text else f"{shown(kept)}..."


def _in_parts(facts: dict[str, Any], changes: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """The record of a call, and further ones where it changed more than one of them may tell."""
    if not changes:
        return [facts]
    further = {name: fact for name, fact in facts.items() if name != "values"}
    return [
        (facts if at == 0 else further | {"part": at // MOST_CHANGES + 1})
        | {"changes": list(changes[at : at + MOST_CHANGES])}
        for at in range(0, len(changes), MOST_CHANGES)
    ]


def _words(row: Row | None) -> str:
    """What a row asks for, in a few words."""
    if row is None:
        return ""
    if row.subject:
        return f"{row.subject} {row.level}".strip()
    return "internal" if row.peers else "caller" if row.needs_caller else "open"


def _counted(counts: Counter[tuple[int, str, str]]) -> list[dict[str, Any]]:
    return [
        {"minute": minute * 60, "source": address, "cause": cause, "calls": calls}
        for (minute, address, cause), calls in sorted(counts.items())
    ]
