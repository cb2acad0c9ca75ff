"""What is remembered about rights survives a put: so nothing that rights are read from may change with one."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest

from secrets_service import memory, store
from secrets_service.memory import RememberingDatabase
from tessera.secrets.v1 import secrets_pb2 as pb
from tests.support.secrets import running_secrets

WRITES = (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE)


@contextmanager
def tables_of(connection: Any, actions: tuple[int, ...], tables: set[str]) -> Iterator[None]:
    """Collects the tables that statements touch meanwhile; within another one, that one goes on afterwards."""

    def note(action: int, table: str | None, *rest: str | None) -> int:
        if action in actions and table is not None:
            tables.add(table)
        return sqlite3.SQLITE_OK

    noting = _noting.get()
    connection.set_authorizer(note)  # which has every statement compiled anew
    token = _noting.set(note)
    try:
        yield
    finally:
        _noting.reset(token)
        connection.set_authorizer(noting)


_noting: ContextVar[Callable[..., int] | None] = ContextVar("noting", default=None)


async def test_what_leaves_rights_alone_writes_nothing_that_rights_are_read_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: set[str] = set()
    read: dict[str, set[str]] = defaultdict(set)
    changes = 0
    destroy, find_standing, applied = RememberingDatabase.destroy, store.find_scope_and_standing, memory._applied

    async def watched(
        self: RememberingDatabase,
        function: Callable[[Any], tuple[Any, int]],
        *,
        leaves_rights: bool = False,
    ) -> Any:
        def change(connection: Any) -> tuple[Any, int]:
            nonlocal changes
            changes += 1
            with tables_of(connection, WRITES, written):
                return function(connection)

        return await destroy(self, change if leaves_rights else function, leaves_rights=leaves_rights)

    def standing(connection: Any, *args: Any) -> Any:
        with tables_of(connection, (sqlite3.SQLITE_READ,), read["find_scope_and_standing"]):
            return find_standing(connection, *args)

    def looked_up(function: Callable[..., Any], args: tuple[Any, ...], connection: Any) -> Any:
        if function not in memory.RIGHTS:
            return applied(function, args, connection)
        with tables_of(connection, (sqlite3.SQLITE_READ,), read[function.__name__]):
            return applied(function, args, connection)

    monkeypatch.setattr(RememberingDatabase, "destroy", watched)
    monkeypatch.setattr(store, "find_scope_and_standing", standing)
    monkeypatch.setattr(memory, "RIGHTS", {*memory.RIGHTS, standing})
    monkeypatch.setattr(memory, "_applied", looked_up)
    async with running_secrets() as service:
        alice = await service.user("alice")
        await alice.create_scope("team")
        await alice.put("team", "key", "1")
        assert await alice.get("team", "key") == b"1"
        await alice.put("team", "key", "2")
        await service.grant(alice, ("team", "key"))
        await alice.restore("team", "key", 1)
        await alice.delete("team", "key")
        await alice.put("team", "key", "3")
        await alice.purge("team", "key")
        await alice(alice.secrets.DeleteScope, pb.DeleteScopeRequest(scope="team"))
    assert changes == 6
    assert written == {"keys", "versions", "holds"}
    assert read.keys() >= {"find_presented", "find_token", "find_scope_and_standing"}
    assert all(tables and not tables & written for tables in read.values()), read
