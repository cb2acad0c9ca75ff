"""What was acknowledged survives a power loss, at any moment and whatever part of the rest reached the disk (R1).

The real service works on a disk that is recorded (`tests/support/disk.py`), with several clients at once. For every
event of the recording, the files are rebuilt that a power loss at that moment may leave: only what was synced; all that
was written; and that part of it which chance chooses. Each must be a sound database that holds everything for which a
client had its answer by then. The same recording without the syncs that SQLite is told to make fails, so it can.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from servicekit import database
from tests.support.disk import Disk, Image, Replay, installed
from tests.support.secrets import Caller, data_directory, running_secrets
from tests.support.seed import seeded

CLIENTS = 4
CHECKPOINT_BYTES = 64 * 1024
"""A log that is moved into the database this early is moved several times in a recording."""

Stored = tuple[str, int]
"""A key and its version."""


@dataclass
class Recording:
    """What happened to the files, and by when clients had their answers."""

    disk: Disk
    acknowledged: list[tuple[int, Stored]] = field(default_factory=list)
    """After how many events, and what."""
    values: dict[Stored, bytes] = field(default_factory=dict)

    async def client(self, caller: Caller, number: int, puts: int) -> None:
        """Stores two versions each of one key after the other."""
        for turn in range(puts):
            stored = f"k{number}.{turn // 2}", turn % 2 + 1
            self.values[stored] = f"{number}/{turn}/".encode() * 40
            await caller.put("shop", stored[0], self.values[stored])
            self.acknowledged.append((len(self.disk.events), stored))


async def recorded(directory: Path, puts: int) -> Recording:
    """A life of the service, from its first start to its end, in which each client makes so many puts."""
    recording = Recording(Disk(directory / "secrets"))
    with installed(recording.disk):
        async with running_secrets(directory) as service:
            await service.admin.create_scope("shop")
            await service.admin.put("shop", "gone", b"gone")
            async with asyncio.TaskGroup() as clients:
                for number in range(CLIENTS):
                    clients.create_task(recording.client(service.admin, number, puts))
                # Which empties the log beside the database, whatever the others do meanwhile.
                clients.create_task(service.admin.delete("shop", "gone"))
    return recording


@dataclass
class Losses:
    """What was wrong with images, each with the event after which the power was gone."""

    images: int = 0
    corrupt: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def replayed(recording: Recording, directory: Path, *, at_answers_only: bool = False) -> Losses:
    """Looks at the images of every event, or of those after which a client had an answer."""
    losses, replay = Losses(), Replay(seeded())
    waiting = iter(recording.acknowledged)
    due = next(waiting, None)
    promised: set[Stored] = set()
    for number, event in enumerate(recording.disk.events, start=1):
        replay.follow(event)
        is_new = False
        while due is not None and due[0] <= number:
            promised.add(due[1])
            due, is_new = next(waiting, None), True
        if at_answers_only and not is_new:
            continue
        for kind, image in replay.images(what_is_synced=is_new or event.kind != "write"):
            losses.images += 1
            moment = f"{kind} after event {number}, {event.kind} of {event.name}"
            held = held_by(image, directory)
            if held is None:
                losses.corrupt.append(moment)
            elif missing := promised - held:
                losses.lost.append(f"{moment}: {sorted(missing)}")
    assert due is None
    return losses


def held_by(image: Image, directory: Path) -> set[Stored] | None:
    """The versions in a database that is rebuilt in a directory; None when it is not sound."""
    for left in directory.iterdir():
        left.unlink()
    for name, content in image.items():
        (directory / name).write_bytes(content)
    with closing(sqlite3.connect(directory / "secrets.db", isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA synchronous=OFF")  # the image need not outlive us, and there are many
            if connection.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
                return None
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'versions'").fetchone():
                return set()
            return set(connection.execute("SELECT k.key, v.version FROM versions v JOIN keys k ON k.id = v.key_id"))
        except sqlite3.DatabaseError:
            return None


@pytest.fixture(autouse=True)
def _early_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "CHECKPOINT_BYTES", CHECKPOINT_BYTES)


@pytest.mark.parametrize("puts", [6, pytest.param(60, marks=pytest.mark.long)])
async def test_nothing_acknowledged_is_lost_by_a_power_loss_at_any_moment(tmp_path: Path, puts: int) -> None:
    with data_directory() as directory:
        recording = await recorded(directory, puts)
        losses = replayed(recording, tmp_path)
        assert (losses.corrupt, losses.lost) == ([], [])
        kinds = {(event.kind, event.name) for event in recording.disk.events}
        assert {(kind, name) for kind in ("write", "sync") for name in ("secrets.db", "secrets.db-wal")} <= kinds
        assert losses.images > 300


async def test_service_starts_from_what_a_power_loss_leaves_and_has_every_value(tmp_path: Path) -> None:
    with data_directory() as directory:
        recording = await recorded(directory, 6)
        events = recording.disk.events
        replay = Replay(seeded())
        # After the last answer nothing is left to be done, so everything that was promised is in what was synced.
        last = recording.acknowledged[-1][0]
        for event in events[:last]:
            replay.follow(event)
        for name, image in replay.images():
            for file in (directory / "secrets").iterdir():
                file.unlink()
            for file_name, content in image.items():
                (directory / "secrets" / file_name).write_bytes(content)
            # The audit log's own files are not those of that moment.
            async with running_secrets(directory, audit_dir=tmp_path / name) as service:
                for (key, version), value in recording.values.items():
                    if version == 2:
                        assert await service.admin.get("shop", key) == value


@pytest.mark.parametrize("level", ["NORMAL", "OFF"])
async def test_replay_finds_what_fewer_syncs_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    prepare = database._prepare

    def less_careful(connection: sqlite3.Connection, *args: object) -> None:
        prepare(connection, *args)  # type: ignore[arg-type]
        connection.execute(f"PRAGMA synchronous={level}")

    monkeypatch.setattr(database, "_prepare", less_careful)
    with data_directory() as directory:
        losses = replayed(await recorded(directory, 6), tmp_path, at_answers_only=True)
    assert losses.lost
    assert bool(losses.corrupt) == (level == "OFF")
