"""The door to SQLite, and the storage of `servicekit.storage`: one connection writes, a few read.

A transaction is handed over as a function of a connection and runs whole in the connection's own thread: one hop
instead of three (measured: 2.3 to 7 times the throughput), and it begins and ends in one place. `synchronous=FULL`:
what was acknowledged is on stable storage. Only the writer checkpoints; readers cannot write, which also keeps clear of
the WAL-reset bug of SQLite before 3.51.3.

A sync that fails is final: the process ends, without an answer and without another sync. After such a failure the
system may forget what it could not write and call the next sync a success; only a new start, which reads what is there
and writes all of it anew, knows what is stored.

One process has a database, by a lock on a file beside it; a second is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import fcntl
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import aiosqlite

from servicekit.durable import sync_directory
from servicekit.errors import StartError
from servicekit.storage import Connection, ConstraintBroken, StorageDamaged, StorageError, StorageFailed

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

READERS = 2

CHECKPOINT_BYTES = 4 * 1024 * 1024
"""How long the log beside the database may become before what is in it is moved into the database.

It stays that long from then on and is written over: to sync a file that grows takes half as long again (measured)."""

MADE_DIRECTORIES = 3
"""In so many directories above the database a name may be new: the file's, the service's, the data directory's."""

STATUS_NOT_SYNCED = 3
"""How a process ends that does not know any more what is on stable storage."""

_SYNC_FAILED = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})
_PRIMARY = 0xFF
"""What is left of an error's code without the details."""

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

Functions = Mapping[str, Callable[[str], str]]
"""Functions of a text that statements may call, by name."""

LEAST_FREE = 1 << 20
"""Bytes of free disk below which a change cannot be counted on: what one may add to the log."""


class _Place(NamedTuple):
    """Where a database is."""

    file: tuple[int, int]
    """Device and number of the file."""
    free: int
    """Bytes that the disk still has for us."""


class DatabaseError(StartError):
    """The database cannot be opened; the message says why and what to do."""


class SqliteConnection(sqlite3.Connection):
    """A `Connection`: the driver's own, which functions of a store get as it is."""

    equipment: Any = None


class Database:
    """A `Storage` in one file. Functions run in the thread of a connection."""

    def __init__(
        self, path: Path, writer: aiosqlite.Connection, readers: list[aiosqlite.Connection], existed: bool
    ) -> None:
        self._path = path
        self._file = _place(path).file
        self._writer = writer
        self._log = Path(f"{path}-wal")
        self._readers = readers
        self._next = 0
        self.existed = existed
        """Whether there was a database before this process opened it."""

    async def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `Storage.read`."""
        self._next = (self._next + 1) % len(self._readers)
        return await _hop(self._readers[self._next], _transaction, "BEGIN", function, *args, **kwargs)

    async def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `Storage.write`; the process ends when syncing fails."""
        return await _hop(self._writer, _write, self._log, function, *args, **kwargs)

    async def equip(self, function: Callable[[Connection], None]) -> None:
        """As `Storage.equip`."""
        for connection in (self._writer, *self._readers):
            await _hop(connection, function)

    async def erase(self) -> None:
        """Leaves nothing of what was deleted in the files: the log beside the database is moved into it and emptied.

        Deleted content is overwritten in the database (`secure_delete`), but the log keeps older pages until then.
        Waits for reads under way; one that lasts longer than that puts it off until the next time, or the next start.
        """
        try:
            is_done = await _hop(self._writer, _emptied)
        except StorageError:  # what was deleted stays deleted, so nobody is told that it was not
            is_done = False
        if not is_done:
            log.warning("deleted content stays in the database's log for a while")

    async def copy(self, to: Path) -> None:
        """Copies the database, as it is at one moment, into a new file; whoever writes meanwhile need not wait.

        What was deleted meanwhile may stay in the log that much longer. Raises StorageError and OSError.
        """
        await asyncio.to_thread(copied, self._path, to)

    async def ping(self) -> None:
        """Raises when the database does not answer, or could not take a change: its file is gone, or its disk full."""
        found = await asyncio.to_thread(_place, self._path)
        if found.file != self._file:
            raise OSError("the database is another file than the one that was opened")
        if found.free < LEAST_FREE:
            raise OSError("the disk is full")
        await self.read(lambda connection: connection.execute("SELECT 1").fetchone())


def _place(path: Path) -> _Place:
    found, disk = path.stat(), os.statvfs(path)
    # What a disk keeps back is for the administrator.
    return _Place((found.st_dev, found.st_ino), disk.f_frsize * (disk.f_bavail if os.geteuid() else disk.f_bfree))


def _emptied(connection: sqlite3.Connection) -> bool:
    is_busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not is_busy


def _write(
    connection: SqliteConnection,
    log_file: Path,
    function: Callable[Concatenate[Connection, P], T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    result = _transaction(connection, "BEGIN IMMEDIATE", function, *args, **kwargs)
    # Ours, since SQLite's own checkpoints keep to themselves what goes wrong in them.
    if log_file.stat().st_size > CHECKPOINT_BYTES:
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:
            _end_if_not_synced(error)
            log.warning("the database's log was not moved into the database", extra={"code": error.sqlite_errorname})
    return result


def _transaction(
    connection: SqliteConnection,
    begin: str,
    function: Callable[Concatenate[Connection, P], T],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    connection.execute(begin)
    try:
        result = function(connection, *args, **kwargs)
        connection.execute("COMMIT")
    except BaseException as error:
        if isinstance(error, sqlite3.Error):
            _end_if_not_synced(error)
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def _guarded(
    function: Callable[Concatenate[SqliteConnection, P], T],
    connection: SqliteConnection,
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    try:
        return function(connection, *args, **kwargs)
    except sqlite3.Error as error:
        _end_if_not_synced(error)
        raise _ours(error) from error


def _end_if_not_synced(error: sqlite3.Error) -> None:
    """Ends this process when a sync has failed; nothing of it may sync again, not even by closing the database."""
    if _code_of(error) in _SYNC_FAILED:
        log.critical("what was written cannot be synced, so this process ends", extra={"code": error.sqlite_errorname})
        os._exit(STATUS_NOT_SYNCED)


def _ours(error: sqlite3.Error) -> StorageError:
    """What an error is to everybody else."""
    code = _code_of(error) & _PRIMARY
    if code == sqlite3.SQLITE_FULL:
        log.error("no room left for the database")
        return StorageFailed("The service has no room left to store changes. Tell its operator.")
    if code == sqlite3.SQLITE_IOERR:
        log.error("the database's storage fails", extra={"code": error.sqlite_errorname})
        return StorageFailed("The service's storage fails just now. Try again in a moment.")
    if code in _DAMAGED or "decode to UTF-8" in str(error):
        log.error("what is stored is damaged")
        return StorageDamaged()
    name = _name_of(error)
    log.error("the database refuses a statement", extra={"code": name})
    return (ConstraintBroken if code == sqlite3.SQLITE_CONSTRAINT else StorageError)(str(error))


def _code_of(error: sqlite3.Error) -> int:
    # Errors of the module itself, rather than of the library, have none.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)


def _name_of(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", type(error).__name__)


async def _hop(
    connection: aiosqlite.Connection,
    function: Callable[Concatenate[SqliteConnection, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    # aiosqlite has no public call for "run this function in your thread"; its own methods are all made of this one.
    # The thread finishes a function whose caller was cancelled, so a transaction is never left open. It runs in the
    # caller's context, so that it knows the request being served.
    run = contextvars.copy_context().run
    result: T = await connection._execute(run, _guarded, function, connection._conn, *args, **kwargs)  # type: ignore[no-untyped-call]  # noqa: SLF001
    return result


# --- copies, which nobody has open ---


def copied(path: Path, to: Path) -> None:
    """Copies a database, which others may be writing to, into a new file for its owner alone, without a log beside it.

    Raises StorageError and OSError.
    """
    os.close(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with (
        _of_a_copy(),
        contextlib.closing(sqlite3.connect(_address(path, "mode=ro"), uri=True)) as source,
        contextlib.closing(sqlite3.connect(to, isolation_level=None)) as target,
    ):
        source.backup(target)  # in one step, and so in one transaction
        target.execute("PRAGMA journal_mode=DELETE")


@contextlib.contextmanager
def looked_at(path: Path) -> Iterator[SqliteConnection]:
    """A connection to a copy, which reads and leaves nothing beside it. Raises StorageError."""
    with _of_a_copy(), contextlib.closing(_connected(_address(path, "mode=ro&immutable=1"))) as connection:
        _prepare_reader(connection)
        yield connection


def amended(path: Path, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kw: P.kwargs) -> T:
    """Runs a function as one transaction on a copy; raises StorageError."""
    with _of_a_copy(), contextlib.closing(_connected(_address(path, "mode=rw"))) as connection:
        for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", "trusted_schema=OFF"):
            connection.execute(f"PRAGMA {pragma}")
        return _transaction(connection, "BEGIN IMMEDIATE", function, *args, **kw)


def faults(path: Path, migrations: Traversable | None) -> list[str]:
    """What is wrong with a copy, one line each; with `migrations` also whether this program can use it.

    All of it is read. Without them it is a database of somebody else's.
    """
    try:
        with looked_at(path) as connection:
            found = [row[0] for row in connection.execute("PRAGMA integrity_check(10)") if row[0] != "ok"]
            if migrations is None or found:
                return found
            if connection.execute("PRAGMA foreign_key_check").fetchone():
                found.append("rows refer to others that there are not")
            scripts = _scripts(migrations)
            if _applied(connection) > len(scripts):
                return [*found, "it was written by a newer version of this program; install that version"]
            if not _applied(connection):
                return [*found, "it is no database of this program"]
            if foreign := _foreign_code(connection, scripts[: _applied(connection)]):
                found.append(f"it has other triggers or views than this program makes ({foreign})")
            return found
    except StorageError as error:
        return [str(error)]


def _connected(address: str) -> SqliteConnection:
    return sqlite3.connect(address, uri=True, isolation_level=None, factory=SqliteConnection)


@contextlib.contextmanager
def _of_a_copy() -> Iterator[None]:
    """Errors are told as they are: to an operator, and not of what the service stores."""
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(str(error)) from error


def _address(path: Path, parameters: str) -> str:
    return f"{path.absolute().as_uri()}?{parameters}"


@asynccontextmanager
async def opened(path: Path, migrations: Traversable, *, functions: Functions | None = None) -> AsyncIterator[Database]:
    """Opens the database at `path`, brings its schema up to date, and closes it in the end.

    `migrations` holds `0001_name.sql`, `0002_name.sql` ...: each is applied once, whole or not at all. Statements may
    call `functions`. Raises DatabaseError when another process has it open, when it is damaged, or when it is newer
    than this program.
    """
    lock = _locked(path)
    try:
        existed = path.stat().st_size > 0
        writer = await aiosqlite.connect(path, isolation_level=None, factory=SqliteConnection)
        readers: list[aiosqlite.Connection] = []
        try:
            await _hop(writer, _begin, path, migrations)
            for _ in range(READERS):
                reader = await aiosqlite.connect(
                    _address(path, "mode=ro"), uri=True, isolation_level=None, factory=SqliteConnection
                )
                readers.append(reader)
                await _hop(reader, _prepare_reader)
            for connection in (writer, *readers):
                await _hop(connection, _make_known, functions or {})
            yield Database(path, writer, readers, existed)
        finally:
            await asyncio.gather(*(reader.close() for reader in readers))
            # Last, since whoever closes last moves the WAL into the database, and only the writer may.
            await writer.close()
    finally:
        os.close(lock)


def _locked(path: Path) -> int:
    """Makes the files, owner-only, and takes the lock: its descriptor, to be closed when the database is."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _owned(Path(f"{path}.lock"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(_owned(path))
            for directory in path.absolute().parents[:MADE_DIRECTORIES]:
                with contextlib.suppress(PermissionError):  # then it is not one that we have just made
                    sync_directory(directory)
        except BaseException:
            os.close(lock)
            raise
    except BlockingIOError:
        raise DatabaseError(f"{path} is in use by another process. Stop that one first.") from None
    except OSError as error:
        raise DatabaseError(f"{path} cannot be opened: {error.strerror}.") from None
    return lock


def _owned(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)  # it may be older than this rule, or come from a backup
    return descriptor


def _make_known(connection: sqlite3.Connection, functions: Functions) -> None:
    for name, function in functions.items():
        connection.create_function(name, 1, function, deterministic=True)


def _begin(connection: sqlite3.Connection, path: Path, migrations: Traversable) -> None:
    try:
        _prepare(connection, path, migrations)
    except sqlite3.DatabaseError as error:
        _end_if_not_synced(error)
        if isinstance(error, sqlite3.OperationalError):
            raise DatabaseError(f"{path} cannot be opened: {error}.") from None
        raise DatabaseError(f"{path} cannot be used: {error}. Restore it from a backup.") from None


def _prepare_reader(connection: sqlite3.Connection) -> None:
    for pragma in ("busy_timeout=5000", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}")


def _prepare(connection: sqlite3.Connection, path: Path, migrations: Traversable) -> None:
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
        "busy_timeout=5000",
        "wal_autocheckpoint=0",  # see `_write`
        f"journal_size_limit={CHECKPOINT_BYTES}",  # so that a longer one holds what is still to be moved
        "trusted_schema=OFF",  # a schema that somebody else has written runs no function of ours
    ):
        connection.execute(f"PRAGMA {pragma}")
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise DatabaseError(f"{path} is damaged ({damage}). Restore it from a backup.")
    scripts = _scripts(migrations)
    applied = _applied(connection)
    if applied > len(scripts):
        raise DatabaseError(f"{path} was written by a newer version of this program. Install that version.")
    for number, script in enumerate(scripts[applied:], start=applied + 1):
        _apply(connection, number, script)
        log.info("migration applied", extra={"database": path.name, "migration": script.name})
    _refuse_foreign_code(connection, path, scripts)
    _emptied(connection)  # a process that was killed may have left deleted content there


def _apply(connection: sqlite3.Connection, number: int, script: Traversable) -> None:
    sql = script.read_text(encoding="utf-8")
    connection.executescript(f"BEGIN IMMEDIATE;\n{sql}\nPRAGMA user_version={number};\nCOMMIT;")


def _scripts(migrations: Traversable) -> list[Traversable]:
    return sorted((entry for entry in migrations.iterdir() if entry.name.endswith(".sql")), key=lambda e: e.name)


def _applied(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _refuse_foreign_code(connection: sqlite3.Connection, path: Path, scripts: list[Traversable]) -> None:
    if name := _foreign_code(connection, scripts):
        raise DatabaseError(f"{path} has other triggers or views than this program ({name}). Restore it from a backup.")


def _foreign_code(connection: sqlite3.Connection, scripts: list[Traversable]) -> str:
    """The name of a trigger or view that the migrations do not make, or that they make and is not there.

    They would run with every change of ours, whoever wrote them.
    """
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        for number, script in enumerate(scripts, start=1):
            _apply(fresh, number, script)
        expected = _code(fresh)
    foreign = _code(connection) ^ expected
    return min(foreign)[0] if foreign else ""


def _code(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE type IN ('trigger', 'view')"))
