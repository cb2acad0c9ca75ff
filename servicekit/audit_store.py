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

and by others, in which `forwarded` was added, and the head became what it is only when no record is left:

    ALTER TABLE audit_state ADD COLUMN forwarded INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE audit_state RENAME COLUMN seq TO dropped_seq;
    ALTER TABLE audit_state RENAME COLUMN mac TO dropped_mac;

Records up to `exported` are in the files, and those up to `forwarded` were taken over by whoever gets them besides;
what is needed for neither is no longer here. The head of the chain is the last record or, where none is left, what it
was when records were last dropped: so a record is one row, and a commit as few pages as can be.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from servicekit.audit_records import Head, mac_of
from servicekit.storage import Connection


def head(connection: Connection) -> Head:
    """The end of the chain."""
    if last := connection.execute("SELECT seq, line FROM audit_records ORDER BY seq DESC LIMIT 1").fetchone():
        return Head(last[0], mac_of(last[1]))
    return Head(*connection.execute("SELECT dropped_seq, dropped_mac FROM audit_state").fetchone())


def mac_at(connection: Connection, seq: int) -> str:
    """The MAC of a record; empty where it is not known here any more."""
    if found := connection.execute("SELECT line FROM audit_records WHERE seq = ?", (seq,)).fetchone():
        return mac_of(found[0])
    found = connection.execute("SELECT dropped_mac FROM audit_state WHERE dropped_seq = ?", (seq,)).fetchone()
    return str(found[0]) if found else ""


def append(connection: Connection, lines: Sequence[str], before: Head) -> None:
    """Adds the records behind a head."""
    if len(lines) == 1:
        connection.execute("INSERT INTO audit_records (seq, line) VALUES (?, ?)", (before.seq + 1, lines[0]))
    else:
        # As one statement: each lets go of the interpreter's lock, and waits for it longer than it works.
        connection.execute(
            "INSERT INTO audit_records (seq, line) SELECT ?1 + key, value FROM json_each(?2) ORDER BY key",
            (before.seq + 1, json.dumps(lines)),
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """Up to which record those have them who are to have them."""

    exported: int
    forwarded: int


def progress(connection: Connection) -> Progress:
    """How far the log and its copies are."""
    return Progress(*connection.execute("SELECT exported, forwarded FROM audit_state").fetchone())


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
    end = head(connection)
    connection.execute("UPDATE audit_state SET dropped_seq = ?, dropped_mac = ?", (end.seq, end.mac))
    connection.execute("DELETE FROM audit_records WHERE seq <= ?", (seq,))
