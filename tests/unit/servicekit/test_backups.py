"""A database is copied together with its audit log: no record is in both, and none in neither."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from secrets_service.app import MIGRATIONS
from servicekit import backups, database
from servicekit.audit import Trail
from servicekit.audit_export import Exporter
from servicekit.audit_files import FileSink
from servicekit.database import Database


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Database]:
    async with database.opened(tmp_path / "secrets.db", MIGRATIONS) as opened:
        yield opened


def an_exporter(opened: Database, folder: Path) -> Exporter:
    sink = FileSink(folder, "secrets", file_bytes=100, keep_bytes=1_000, keep_seconds=60)
    return Exporter(Trail("secrets", opened, None), opened, sink)


async def test_no_record_is_moved_while_the_two_are_copied(
    opened: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = an_exporter(opened, tmp_path / "audit")
    moved = asyncio.Event()

    async def move() -> None:
        moved.set()

    monkeypatch.setattr(exporter, "move", move)
    copy = opened.copy

    async def copied(to: Path) -> None:
        running.append(asyncio.create_task(exporter.run()))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not moved.is_set()
        await copy(to)

    monkeypatch.setattr(opened, "copy", copied)
    running: list[asyncio.Task[None]] = []
    try:
        (tmp_path / "copies").mkdir()
        await backups.with_audit_log(opened, exporter, tmp_path / "copies" / "secrets.db")
        await asyncio.wait_for(moved.wait(), 30)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_file_that_goes_or_grows_is_copied_as_it_was(opened: Database, tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "copies").mkdir()
    old, new = (tmp_path / "audit" / f"secrets-00000000000{number}.jsonl" for number in (1, 9))
    old.write_text("old\n")
    new.write_text("new\n")
    files = await backups.with_audit_log(
        opened, an_exporter(opened, tmp_path / "audit"), tmp_path / "copies" / "secrets.db"
    )
    old.unlink()
    with new.open("a") as file:
        file.write("newer\n")
    assert sorted(files) == [f"audit/{old.name}", f"audit/{new.name}", "secrets.db"]
    found = {name: b"".join([part async for part in backups._read(files[name])]) for name in sorted(files)[:2]}
    assert found == {f"audit/{old.name}": b"old\n", f"audit/{new.name}": b"new\n"}
