"""The door to SQLite: its files, its log, and what is particular to it; for the rest see `test_storage_contract.py`."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from servicekit import database
from servicekit.database import DatabaseError, opened
from servicekit.errors import StartError, Unavailable
from servicekit.storage import Connection, ConstraintBroken, StorageError, StorageFailed
from tests.support.sockets import short_directory

ROOT = Path(__file__).parents[3]
ITEMS = "CREATE TABLE items (name TEXT PRIMARY KEY, owner TEXT);\n"


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "data" / "shop.db"


@pytest.fixture
def migrations(directory: Path) -> Path:
    """A folder of migrations with one in it."""
    folder = directory / "migrations"
    folder.mkdir()
    (folder / "0001_items.sql").write_text(ITEMS)
    (folder / "README.md").write_text("Not a migration.")
    return folder


def insert(connection: Connection, *names: str) -> None:
    for name in names:
        connection.execute("INSERT INTO items (name) VALUES (?)", (name,))


def names_in(connection: Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM items ORDER BY name")]


def tables_in(path: Path) -> set[str]:
    with sqlite3.connect(path) as connection:
        found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    connection.close()
    return found


async def refusal(path: Path, migrations: Path) -> str:
    with pytest.raises(DatabaseError) as caught:
        async with opened(path, migrations):
            pass
    assert isinstance(caught.value, StartError)
    return str(caught.value)


async def test_orderly_end_leaves_one_self_contained_file(path: Path, migrations: Path) -> None:
    for number in range(20):
        async with opened(path, migrations) as db:
            await db.write(insert, str(number))
            await db.read(names_in)
        assert {file.name for file in path.parent.iterdir()} == {"shop.db", "shop.db.lock"}


async def test_read_that_raises_does_not_hold_on_to_an_old_state(path: Path, migrations: Path) -> None:
    async with opened(path, migrations) as db:
        for _ in range(database.READERS):
            with pytest.raises(StorageError):
                await db.read(lambda connection: connection.execute("SELECT * FROM nothing"))
        await db.write(insert, "a")
        for _ in range(database.READERS):
            assert await db.read(names_in) == ["a"]


async def test_log_says_by_its_name_what_was_refused(
    path: Path, migrations: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(path, migrations) as db:
        with pytest.raises(ConstraintBroken):
            await db.write(insert, "a", "a")
    (record,) = (each for each in caplog.records if each.message == "the database refuses a statement")
    assert vars(record)["code"] == "SQLITE_CONSTRAINT_PRIMARYKEY"


async def test_acknowledged_writes_are_on_stable_storage(path: Path, migrations: Path) -> None:
    def pragmas(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    async with opened(path, migrations) as db:
        full = 2
        assert await db.write(pragmas) == ["wal", full, 1, 1]


async def test_files_are_for_the_owner_only(path: Path, migrations: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.touch()
    path.chmod(0o644)
    before = os.umask(0)
    try:
        async with opened(path, migrations) as db:
            await db.write(insert, "a")
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["shop.db", "shop.db-shm", "shop.db-wal", "shop.db.lock"], 0o600)


async def test_directory_is_made_for_the_owner_only(path: Path, migrations: Path) -> None:
    async with opened(path, migrations):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_names_of_file_and_directories_are_on_stable_storage(
    path: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        sync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", noted)
    async with opened(path, migrations):
        assert synced == [path.parent, path.parent.parent, path.parent.parent.parent]


async def test_full_database_refuses_what_does_not_fit_and_takes_what_does(path: Path, migrations: Path) -> None:
    async with opened(path, migrations) as db:
        await db.write(insert, "a")
        pages = await db.write(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
        await db.write(lambda c: c.execute(f"PRAGMA max_page_count={pages}").fetchone())
        for kind in (StorageFailed, Unavailable, StorageError):
            with pytest.raises(kind):
                await db.write(insert, *(f"{number:0100}" for number in range(100)))
        assert await db.read(names_in) == ["a"]
        await db.write(insert, "b")
        assert await db.read(names_in) == ["a", "b"]


async def test_log_is_moved_into_the_database_while_it_is_open_and_written_over_from_then_on(
    path: Path, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CHECKPOINT_BYTES", 100_000)
    log = Path(f"{path}-wal")
    async with opened(path, migrations) as db:
        sizes, moves = [], set()
        for number in range(100):
            await db.write(insert, f"{number:05000}")
            await db.read(names_in)
            sizes.append(log.stat().st_size)
            moves.add(path.stat().st_mtime_ns)
        assert max(sizes) < 200_000
        assert min(sizes[50:]) == 100_000
        assert 5 < len(moves) < 40, "as often as the log is full, rather than with each write"
        assert path.stat().st_size > 300_000


async def test_path_may_hold_characters_that_mean_something_in_an_address(directory: Path, migrations: Path) -> None:
    odd = directory / "50%20?mode=rw#é" / "shop.db"
    async with opened(odd, migrations) as db:
        await db.write(insert, "a")
        assert await db.read(names_in) == ["a"]


async def test_failing_migration_leaves_the_version_before_intact(path: Path, migrations: Path) -> None:
    async with opened(path, migrations) as db:
        await db.write(insert, "a")
    broken = migrations / "0002_more.sql"
    broken.write_text("CREATE TABLE more (x); DROP TABLE items; INSERT INTO nowhere VALUES (1);")
    assert await refusal(path, migrations) == f"{path} cannot be opened: no such table: nowhere."
    assert tables_in(path) == {"items"}
    broken.unlink()
    async with opened(path, migrations) as db:
        assert await db.read(names_in) == ["a"]
    broken.write_text("CREATE TABLE more (x);")
    async with opened(path, migrations) as db:
        assert await db.read(names_in) == ["a"]
    assert tables_in(path) == {"items", "more"}


@pytest.mark.parametrize("damage", ["not a database", "a damaged page"])
async def test_damaged_file_is_refused_and_left_as_it_is(path: Path, migrations: Path, damage: str) -> None:
    async with opened(path, migrations) as db:
        await db.write(insert, *(f"item-{number:04}" for number in range(2_000)))
    content = bytearray(path.read_bytes())
    start, length = (0, 4096) if damage == "not a database" else (8192, 8192)
    content[start : start + length] = b"\x5a" * length
    path.write_bytes(content)
    message = await refusal(path, migrations)
    assert message.startswith(f"{path} ")
    assert message.endswith("Restore it from a backup.")
    assert path.read_bytes() == content


async def test_place_that_cannot_be_used_is_refused_by_name(directory: Path, migrations: Path) -> None:
    (directory / "file").write_text("")
    assert await refusal(directory / "file" / "shop.db", migrations) == (
        f"{directory}/file/shop.db cannot be opened: File exists."
    )
    (directory / "folder.db").mkdir()
    assert await refusal(directory / "folder.db", migrations) == (
        f"{directory}/folder.db cannot be opened: Is a directory."
    )


async def test_database_existed_once_something_was_stored(path: Path, migrations: Path) -> None:
    path.parent.mkdir()
    path.touch()  # a first start that was killed before it stored anything
    async with opened(path, migrations) as db:
        assert not db.existed
    async with opened(path, migrations) as db:
        assert db.existed


async def test_ping_fails_when_the_database_does_not_answer(path: Path, migrations: Path) -> None:
    async with opened(path, migrations) as db:
        await db.ping()
    with pytest.raises(ValueError, match="no active connection"):
        await db.ping()


async def test_closing_moves_the_log_into_the_database(path: Path, migrations: Path) -> None:
    async with opened(path, migrations) as db:
        await db.write(insert, "a")
        for _ in range(database.READERS):
            await db.ping()
    assert sorted(file.name for file in path.parent.iterdir()) == ["shop.db", "shop.db.lock"]
