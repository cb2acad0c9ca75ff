"""The database of Secrets without the service: its schema, with rights authenticated under a key of the tests."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import cache
from pathlib import Path

from secrets_service import directory_store, first_format, integrity, rootkey, store
from secrets_service.app import MIGRATIONS
from secrets_service.integrity import Integrity
from secrets_service.keyring import Keyring
from secrets_service.model import SecretBytes
from servicekit import database
from servicekit.database import Database, SqliteConnection
from servicekit.storage import Connection

KEYRING = Keyring(b"s" * 16, {1: (0, SecretBytes(b"k" * 32))})


@contextmanager
def a_store() -> Iterator[Connection]:
    """An empty store in memory; statements are not held together in transactions unless a test does so."""
    with closing(sqlite3.connect(":memory:", isolation_level=None, factory=SqliteConnection)) as connection:
        connection.deserialize(_empty_store())
        for name, function in directory_store.FUNCTIONS.items():
            connection.create_function(name, 1, function, deterministic=True)
        equip(connection)
        yield connection


@cache
def _empty_store() -> bytes:
    with closing(sqlite3.connect(":memory:")) as connection:
        for script in sorted(MIGRATIONS.iterdir(), key=lambda entry: entry.name):
            connection.executescript(script.read_text())
        return connection.serialize()


@asynccontextmanager
async def opened_store(path: Path) -> AsyncIterator[Database]:
    """The store in a file, which is made when it is not there."""
    async with database.opened(path, MIGRATIONS, functions=directory_store.FUNCTIONS) as opened:
        await opened.equip(equip)
        yield opened


def equip(connection: Connection, keyring: Keyring = KEYRING) -> None:
    """Has rights authenticated under the keys of a keyring."""
    integrity.equip(connection, Integrity(keyring.rights_keys()))


def rewrite(directory: Path, *statements: str) -> None:
    """Changes the store of a service that does not run, as nobody but the service itself can: MACs are made anew."""
    root = rootkey.load(directory / "root.key")
    path = directory / "secrets" / "secrets.db"
    with closing(sqlite3.connect(path, factory=SqliteConnection)) as connection:
        platform, sealed = store.stated_platform(connection), store.find_keyring(connection)
        assert platform is not None
        assert sealed is not None
        equip(connection, Keyring.opened(sealed, root, platform.store_id))
        connection.execute("PRAGMA foreign_keys = ON")
        for statement in statements:
            connection.execute(statement)
        first_format.authenticate_rights(connection)
        connection.commit()
