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

`seq` and `mac` are the head of the chain. Records up to `exported` are in the sink, and no longer here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from servicekit.audit_records import Head


def head(connection: sqlite3.Connection) -> Head:
    """The end of the chain."""
    return Head(*connection.execute("SELECT seq, mac FROM audit_state").fetchone())


def backlog(connection: sqlite3.Connection) -> int:
    """How many records the sink may not have."""
    return int(connection.execute("SELECT seq - exported FROM audit_state").fetchone()[0])


def append(connection: sqlite3.Connection, lines: Sequence[str], before: Head, after: Head) -> None:
    """Adds the records between two heads."""
    first = before.seq + 1
    connection.executemany("INSERT INTO audit_records (seq, line) VALUES (?, ?)", enumerate(lines, start=first))
    connection.execute("UPDATE audit_state SET seq = ?, mac = ?", (after.seq, after.mac))


def unexported(connection: sqlite3.Connection, count: int) -> list[tuple[int, str]]:
    """The oldest records that the sink may not have, with their numbers."""
    return connection.execute("SELECT seq, line FROM audit_records ORDER BY seq LIMIT ?", (count,)).fetchall()


def is_exported(connection: sqlite3.Connection, seq: int) -> None:
    """Records that the sink has all records up to one, and drops them here."""
    connection.execute("UPDATE audit_state SET exported = max(exported, ?)", (seq,))
    connection.execute("DELETE FROM audit_records WHERE seq <= ?", (seq,))
