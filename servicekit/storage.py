"""What the services know of a database: a storage runs functions of a connection, each as one transaction.

The rule: SQL stands in `store.py` and its siblings, as functions of a `Connection`, and whoever calls one hands it to a
`Storage`. Nothing else of a database is known outside `servicekit.database`, which is the one storage that there is.
What another one has to do is written as tests (`tests/service/test_storage_contract.py`), and what it has to bring in
docs/architecture.md.

Both are protocols, so nothing stands between a function and the driver's own connection. Errors are made ours where a
transaction ends, not at each statement; within its function nobody looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from servicekit.errors import DataLoss, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

RETRY_AFTER_SECONDS = 5
"""When it is worth while to try again what the storage could not do."""


class Cursor(Protocol):
    """What a statement found or did."""

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""

    def fetchone(self) -> Any:
        """The next row, a tuple; None when there is none."""

    def fetchall(self) -> list[Any]:
        """All rows that are left."""

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """What a function does its work with: statements of the transaction that it is.

    Values are bound, never written into a statement: `?` is the next one, `?1` the first. They are None, whole numbers
    of 64 bits, floats, texts and bytes.
    """

    equipment: Any
    """What functions need besides data (`Storage.equip`); None before."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Cursor:
        """Runs one statement."""

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> Cursor:
        """Runs one statement that returns no rows for each of several lists of values."""


class Storage(Protocol):
    """An open database. Its functions run in threads of its own: no awaiting there."""

    @property
    def existed(self) -> bool:
        """Whether there was something before this process opened it."""

    async def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a function that only reads, and returns its result. All its statements see one state of the database.

        Raises StorageError.
        """

    async def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a function as one transaction: all of it is on stable storage afterwards, or none when it raises.

        One runs at a time, and goes on to its end when its caller is cancelled. Raises StorageError.
        """

    async def equip(self, function: Callable[[Connection], None]) -> None:
        """Runs a function once on each connection, also on those to come: for what it has to know besides data."""

    async def erase(self) -> None:
        """Leaves nothing of what was deleted on the disk, as far as that is the storage's to say."""

    async def copy(self, to: Path) -> None:
        """Copies everything, as it is at one moment, into a new file; nobody waits for it.

        Raises StorageError and OSError.
        """

    async def ping(self) -> None:
        """Raises when the database does not answer, or could not take a change."""


class StorageError(Exception):
    """A transaction was not done, and nothing of it is stored."""


class ConstraintBroken(StorageError):
    """It would have stored what the schema forbids: something twice, or what refers to nothing."""


class StorageFailed(Unavailable, StorageError):
    """Its storage is full or fails just now: for callers a 503 like others."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after=RETRY_AFTER_SECONDS)


class StorageDamaged(DataLoss, StorageError):
    """What is stored cannot be read."""

    def __init__(self) -> None:
        super().__init__("What is stored is damaged and was not used. Restore the data from a backup.")
