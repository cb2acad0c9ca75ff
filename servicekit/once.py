"""A retry gives the first answer: a change whose caller chose the request id is made once and answered alike for a day.

Whoever is told of an error, or of nothing, cannot know whether a change was made; with the same id it may ask again.
The rule: the answer is recorded in the transaction of its change, so that both are there or neither. What is refused
changes nothing, so it is not recorded and a retry is judged anew. An answer belongs to whoever got it: to the same
principal it is given again, whatever that one may do by then, and to nobody else.

The table, which each service makes by a migration of its own:

    CREATE TABLE answers (
      id INTEGER PRIMARY KEY,
      principal_id INTEGER NOT NULL,
      request_id TEXT NOT NULL,
      answered_ms INTEGER NOT NULL,
      position INTEGER NOT NULL,
      record BLOB NOT NULL,
      UNIQUE (principal_id, request_id)
    ) STRICT;
    CREATE UNIQUE INDEX answers_by_position ON answers (principal_id, position);
    CREATE INDEX answers_by_age ON answers (answered_ms);

`position` adds up the bytes of a principal's records, that one included, so that the oldest go when they become many.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from google.protobuf.message import Message

from servicekit import context
from servicekit.errors import InvalidParameter
from servicekit.storage import Connection

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=Message)

KEPT_SECONDS = 24 * 3600
"""How long a retry gives the first answer."""

MOST_BYTES = 8 * 1024 * 1024
"""Of the records of one principal, the newest; an answer without content takes some 130 of them. One record may be
larger, and is then the only one."""

DROPPED_AT_ONCE = 100
"""How many records that are too old go with each new one: more than one, so that they become fewer."""


class Answered(Exception):
    """The request was answered before; this is the answer. Its text is empty, since an answer may hold a token."""

    def __init__(self, answer: bytes, warnings: Sequence[str]) -> None:
        super().__init__()
        self.answer = answer
        self.warnings = warnings


class Seal(Protocol):
    """How records are kept from whoever reads the database's files, where that matters."""

    def seal(self, text: bytes, *, place: str) -> bytes:
        """The record of a text, which opens at that place only."""

    def open(self, record: bytes, *, place: str) -> bytes:
        """The text of a record; raises DataLoss when it is damaged."""


@dataclass(slots=True)
class _Request:
    """The request being served, whose caller chose its id."""

    caller: int
    id: str
    fingerprint: str
    """Stands for method and message."""

    warnings: list[str]
    as_message: Callable[[Any], Message] | None = None
    is_recorded: bool = False

    @property
    def place(self) -> str:
        return f"{self.caller}/{self.id}"


_current: ContextVar[_Request | None] = ContextVar("repeatable request", default=None)


def enter(method: str, message: Message) -> None:
    """Has the request being served changed things once, if its caller chose its id."""
    request = context.current()
    if request is None or request.caller is None or not request.may_be_repeated:
        return
    asked = method.encode() + b"\n" + message.SerializeToString(deterministic=True)
    _current.set(
        _Request(
            int(request.caller.id),
            request.request_id,
            hashlib.sha256(asked).hexdigest(),
            request.warnings,
        )
    )


def chosen_id() -> tuple[int, str] | None:
    """The caller of the request being served and the id that it chose; None when it chose none."""
    request = _current.get()
    return None if request is None else (request.caller, request.id)


async def answer(work: Awaitable[T], as_message: Callable[[T], M]) -> M:
    """The answer of a use case that makes a change and whose result has something to tell.

    `as_message` is applied within the transaction, too, to what the transaction returns: the result, already whole.
    """
    request = _current.get()
    if request is not None:
        request.as_message = as_message
    return as_message(await work)


class Trail(Protocol):
    """Where the call that is being served is recorded (`servicekit.audit`)."""

    def require(self) -> None:
        """Raises when it could not be."""

    def append(self, connection: Connection) -> None:
        """Records it within the transaction of its change."""


class Unsealed:
    """For a service whose answers hold nothing that its database does not hold in clear."""

    def seal(self, text: bytes, *, place: str) -> bytes:
        """The text itself."""
        return text

    def open(self, record: bytes, *, place: str) -> bytes:
        """The text itself."""
        return record


class Answers:
    """The first answers, in a table of the service's database, and the record of each change in its `trail`.

    `now` tells Unix seconds.
    """

    def __init__(self, seal: Seal, now: Callable[[], float], trail: Trail | None = None) -> None:
        self._seal = seal
        self._now = now
        self._trail = trail

    def once(
        self,
        connection: Connection,
        change: Callable[Concatenate[Connection, P], T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Runs a change within its transaction, and records the answer; without a chosen id it only runs it.

        Raises what `look` raises. A request that returns something from its transaction is served by `answer`.
        """
        request = _current.get()
        self.look(connection)
        result = change(connection, *args, **kwargs)
        if request is not None:
            self._record(connection, request, _serialized(request, result))
        if self._trail is not None:
            self._trail.append(connection)
        return result

    def look(self, connection: Connection) -> None:
        """Raises Answered when the request being served was answered before, and InvalidParameter when another was.

        For checks ahead of a transaction which its change would let fail. Raises AuditUnavailable, too, when the change
        could not be recorded.
        """
        request = _current.get()
        if self._trail is not None:
            self._trail.require()
        if request is None:
            return
        row = connection.execute(
            "SELECT record FROM answers WHERE principal_id = ? AND request_id = ? AND answered_ms > ?",
            (request.caller, request.id, self._now_ms() - KEPT_SECONDS * 1000),
        ).fetchone()
        if row is None:
            return
        if request.is_recorded:
            raise RuntimeError("a request makes one change, in one transaction")
        head, _, answer = self._seal.open(row[0], place=request.place).partition(b"\n")
        fingerprint, warnings = json.loads(head)
        if fingerprint != request.fingerprint:
            raise InvalidParameter(
                f"X-Tessera-Request-Id: {request.id} was used for another request within the last 24 hours."
                " Choose a new id for every request, and keep it for retries of that one."
            )
        raise Answered(answer, warnings)

    def _record(self, connection: Connection, request: _Request, answer: bytes) -> None:
        head = json.dumps([request.fingerprint, request.warnings]).encode()  # without a line break
        record = self._seal.seal(head + b"\n" + answer, place=request.place)
        now_ms = self._now_ms()
        connection.execute(
            "INSERT INTO answers (principal_id, request_id, answered_ms, position, record) VALUES (?1, ?2,"
            " ?3, ?5 + (SELECT coalesce(max(position), 0) FROM answers WHERE principal_id = ?1), ?4)"
            " ON CONFLICT (principal_id, request_id) DO UPDATE SET answered_ms = excluded.answered_ms,"
            " position = excluded.position, record = excluded.record",
            (request.caller, request.id, now_ms, record, len(record)),
        )
        connection.execute(
            "DELETE FROM answers WHERE principal_id = ?1"
            " AND position <= (SELECT max(position) FROM answers WHERE principal_id = ?1) - ?2",
            (request.caller, MOST_BYTES),
        )
        connection.execute(
            "DELETE FROM answers WHERE id IN"
            " (SELECT id FROM answers WHERE answered_ms <= ? ORDER BY answered_ms LIMIT ?)",
            (now_ms - KEPT_SECONDS * 1000, DROPPED_AT_ONCE),
        )
        request.is_recorded = True

    def _now_ms(self) -> int:
        return int(self._now() * 1000)


def _serialized(request: _Request, result: Any) -> bytes:
    """The answer that a result stands for; without a word from `answer`, the message without content."""
    if request.as_message is not None:
        return request.as_message(result).SerializeToString()
    if result is not None:
        raise RuntimeError("what a change returns is made into a message by servicekit.once.answer")
    return b""
