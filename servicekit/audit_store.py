"""The audit tables, which each service makes by a migration of its own:

    CREATE TABLE audit_records (
      seq INTEGER PRIMARY KEY,
      line TEXT NOT NULL
    ) STRICT;
    CREATE TABLE audit_state (
      one INTEGER PRIMARY KEY CHECK (one = 1),
      seq INTEGER NOT NULL,
      mac TEXT NOT NULL,
      exported INTEGER NOT NULL
    ) STRICT;
    INSERT INTO audit_state (one, seq, mac, exported)
      VALUES (1, 0, '0000000000000000000000000000000000000000000000000000000000000000', 0);

and by another, in which `forwarded` was added:

    ALTER TABLE audit_state ADD COLUMN forwarded INTEGER NOT NULL DEFAULT 0;

`seq` and `mac` are the head of the chain. Records up to `exported` are in the files, and those up to `forwarded` were
taken over by whoever gets them besides; what is needed for neither is no longer here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from servicekit.audit_records import Head
from servicekit.storage import Connection


def head(connection: Connection) -> Head:
    """The end of the chain."""
    return Head(*connection.execute("SELECT seq, mac FROM audit_state").fetchone())


def append(connection: Connection, lines: Sequence[str], before: Head, after: Head) -> None:
    """Adds the records between two heads."""
    if len(lines) == 1:
        connection.execute("INSERT INTO audit_records (seq, line) VALUES (?, ?)", (after.seq, lines[0]))
    else:
        # As one statement: each lets go of the interpreter's lock, and waits for it longer than it works.
        connection.execute(
            "INSERT INTO audit_records (seq, line) SELECT ?1 + key, value FROM json_each(?2) ORDER BY key",
            (before.seq + 1, json.dumps(lines)),
        )
    connection.execute("UPDATE audit_state SET seq = ?, mac = ?", (after.seq, after.mac))


@dataclass(frozen=True, slots=True)
class Progress:
    """Up to which record there are some, and have them who is to have them."""

    seq: int
    exported: int
    forwarded: int


def progress(connection: Connection) -> Progress:
    """How far the log and its copies are."""
    return Progress(*connection.execute("SELECT seq, exported, forwarded FROM audit_state").fetchone())


def after(connection: Connection, seq: int, count: int) -> list[tuple[int, str]]:
    """The oldest records behind one that are here, with their numbers."""
    found = connection.execute("SELECT seq, line FROM audit_records WHERE seq > ? ORDER BY seq LIMIT ?", (seq, count))
    return found.fetchall()


def waiting(connection: Connection) -> int:
    """How many records are here."""
    # Each is found at an end of the index, without counting.
    ((count,),) = connection.execute(
        "SELECT coalesce((SELECT max(seq) FROM audit_records) - (SELECT min(seq) FROM audit_records) + 1, 0)"
    ).fetchall()
    return int(count)


def is_exported(connection: Connection, seq: int) -> None:
    """Records that the files have all records up to one."""
    connection.execute("UPDATE audit_state SET exported = ?1 WHERE exported < ?1", (seq,))


def is_forwarded(connection: Connection, seq: int) -> None:
    """Records that all records up to one were taken over."""
    connection.execute("UPDATE audit_state SET forwarded = ?1 WHERE forwarded < ?1", (seq,))


def drop(connection: Connection, seq: int) -> None:
    """Drops the records up to one."""
    connection.execute("DELETE FROM audit_records WHERE seq <= ?", (seq,))
