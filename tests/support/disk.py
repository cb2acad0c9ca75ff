"""The disk below SQLite: what is written to it is recorded, what a power loss leaves is rebuilt, and it may fail.

SQLite reaches files through a table of functions that a process can replace, its VFS. This one hands everything on to
the system's own, below one directory it notes what may change a file, and it returns an error where a test says so. It
is the default of the process while it is installed, so whoever opens a database does not know of it.

A power loss keeps of a file what was synced, and any part of what was written to it since: nothing, all, or some of the
sectors, in any order. Names that came and went are certain when their directory is synced, which SQLite does with the
first sync of a log or journal that it opens to write.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTOR = 512
"""Bytes that are written whole or not at all."""

_OK = 0
_OPEN_CREATE = 0x4
_OPEN_LOG = 0x800 | 0x80000  # a journal, the log of WAL

_LIBRARY = ctypes.CDLL(_sqlite3.__file__)
"""The library that Python's own module uses, and no other copy of it."""

_P, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_OPEN = ctypes.CFUNCTYPE(_INT, _P, _P, _P, _INT, ctypes.POINTER(_INT))
_DELETE = ctypes.CFUNCTYPE(_INT, _P, ctypes.c_char_p, _INT)
_WRITE = ctypes.CFUNCTYPE(_INT, _P, _P, _INT, _LONG)
_TRUNCATE = ctypes.CFUNCTYPE(_INT, _P, _LONG)
_SYNC = ctypes.CFUNCTYPE(_INT, _P, _INT)


class _Vfs(ctypes.Structure):
    _fields_ = (
        ("version", _INT),
        ("file_size", _INT),
        ("longest_path", _INT),
        ("next", _P),
        ("name", ctypes.c_char_p),
        ("data", _P),
        ("open", _OPEN),
        ("delete", _DELETE),
        ("others", _P * 13),
    )


class _Methods(ctypes.Structure):
    _fields_ = (
        ("version", _INT),
        ("close", _P),
        ("read", _P),
        ("write", _WRITE),
        ("truncate", _TRUNCATE),
        ("sync", _SYNC),
        ("others", _P * 13),
    )


_LIBRARY.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
_LIBRARY.sqlite3_vfs_find.argtypes = (ctypes.c_char_p,)
_LIBRARY.sqlite3_vfs_register.argtypes = (ctypes.POINTER(_Vfs), _INT)
_LIBRARY.sqlite3_vfs_unregister.argtypes = (ctypes.POINTER(_Vfs),)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a file."""

    kind: str
    """`found`, `write`, `truncate`, `sync`, `delete`, or `sync names`, which is the directory's."""

    name: str = ""
    """Of the file, in its directory."""

    offset: int = 0
    """Where it was written, or the length that is left."""

    data: bytes = b""


Failing = Callable[[str, str], int]
"""Says for a kind of event and the name of a file what SQLite is told: one of its error codes, or 0 to go on."""


def never(kind: str, name: str) -> int:
    """Lets everything succeed."""
    return _OK


@dataclass
class Disk:
    """What happens to the files of one directory."""

    directory: Path
    events: list[Event] = field(default_factory=list)
    failing: Failing = never

    def _happens(self, event: Event, act: Callable[[], int]) -> int:
        if code := self.failing(event.kind, event.name):
            return code
        code = act()
        if code == _OK:
            self.events.append(event)
        return code


@contextmanager
def installed(disk: Disk) -> Iterator[Disk]:
    """Has SQLite use this disk for every file that this process opens meanwhile."""
    original = _LIBRARY.sqlite3_vfs_find(None)
    vfs = _Vfs.from_buffer_copy(original.contents)
    vfs.name = b"recorded"
    vfs.next = None
    tables: dict[int, _Methods] = {}
    names: dict[int, str] = {}
    fresh: set[int] = set()  # with whose first sync the directory is synced

    def opened(_: Any, path: int | None, file: int, flags: int, out: Any) -> int:
        # The library knows more of the path than its text, so it is handed on as it came.
        code: int = original.contents.open(ctypes.addressof(original.contents), path, file, flags, out)
        place = Path(os.fsdecode(ctypes.string_at(path))) if path else None
        if code == _OK and place is not None and place.parent == disk.directory:
            if flags & _OPEN_CREATE:
                found = place.read_bytes()
                if not any(event.name == place.name for event in disk.events):
                    disk.events.append(Event("found", place.name, data=found))
            names[file] = place.name
            fresh.discard(file)
            if flags & _OPEN_CREATE and flags & _OPEN_LOG:
                fresh.add(file)
            methods = ctypes.cast(file, ctypes.POINTER(_P))
            address = methods.contents.value
            assert address is not None
            if address not in tables:
                tables[address] = watched(_Methods.from_address(address))
            methods[0] = ctypes.addressof(tables[address])
        return code

    def deleted(_: Any, path: bytes, syncs: int) -> int:
        def act() -> int:
            code: int = original.contents.delete(ctypes.addressof(original.contents), path, syncs)
            return code

        place = Path(os.fsdecode(path))
        if place.parent != disk.directory:
            return act()
        code = disk._happens(Event("delete", place.name), act)
        if code == _OK and syncs:
            disk.events.append(Event("sync names"))
        return code

    def watched(methods: _Methods) -> _Methods:
        def write(file: int, data: int, length: int, offset: int) -> int:
            event = Event("write", names[file], offset, ctypes.string_at(data, length))
            return disk._happens(event, lambda: methods.write(file, data, length, offset))

        def truncate(file: int, length: int) -> int:
            return disk._happens(Event("truncate", names[file], length), lambda: methods.truncate(file, length))

        def sync(file: int, flags: int) -> int:
            code = disk._happens(Event("sync", names[file]), lambda: methods.sync(file, flags))
            if code == _OK and file in fresh:
                fresh.discard(file)
                disk.events.append(Event("sync names"))
            return code

        copy = _Methods.from_buffer_copy(methods)
        copy.write, copy.truncate, copy.sync = _WRITE(write), _TRUNCATE(truncate), _SYNC(sync)
        return copy

    vfs.open, vfs.delete = _OPEN(opened), _DELETE(deleted)
    assert _LIBRARY.sqlite3_vfs_register(ctypes.pointer(vfs), 1) == _OK
    try:
        yield disk
    finally:
        _LIBRARY.sqlite3_vfs_register(original, 1)
        _LIBRARY.sqlite3_vfs_unregister(ctypes.pointer(vfs))


@dataclass
class _File:
    """A file; None is one that is not there."""

    synced: bytearray = field(default_factory=bytearray)
    now: bytearray | None = None
    since: list[Event] = field(default_factory=list)
    """What happened to it after the last sync."""
    is_named: bool = False
    """Whether its directory is sure to have it."""

    def sync_name(self) -> None:
        """Makes it certain whether there is such a file."""
        self.is_named = self.now is not None
        if self.now is None:
            self.synced.clear()
            self.since.clear()


Image = dict[str, bytes]
"""Files by name."""


class Replay:
    """The disk at some moment of a recording, and what a power loss then would leave."""

    def __init__(self, chance: random.Random) -> None:
        self._files: dict[str, _File] = {}
        self._chance = chance

    def follow(self, event: Event) -> None:
        """Goes on by one event."""
        if event.kind == "sync names":
            for each in self._files.values():
                each.sync_name()
            return
        file = self._files.setdefault(event.name, _File())
        match event.kind:
            case "found":
                # One that is empty was made a moment ago.
                file.synced, file.now, file.is_named = bytearray(event.data), bytearray(event.data), bool(event.data)
            case "sync":
                assert file.now is not None
                file.synced = bytearray(file.now)
                file.since.clear()
            case _:
                file.now = _changed(file.now, event)
                file.since.append(event)

    def images(self, *, what_is_synced: bool = True) -> Iterator[tuple[str, Image]]:
        """Each kind of image with its name; what is synced changes only by other events than writes."""
        yield "everything", self.everything()
        yield "some", self.some()
        if what_is_synced:
            yield "synced", self.synced()

    def synced(self) -> Image:
        """Only what was synced."""
        return {name: bytes(file.synced) for name, file in self._files.items() if file.is_named}

    def everything(self) -> Image:
        """All that was written."""
        return {name: bytes(file.now) for name, file in self._files.items() if file.now is not None}

    def some(self) -> Image:
        """What was synced, and of the rest a part that chance chooses, sector by sector."""
        image = {}
        for name, file in self._files.items():
            is_there = file.is_named or self._chance.random() < 0.5
            content: bytearray | None = bytearray(file.synced) if is_there else None
            for event in file.since:
                for part in _parts(event):
                    if self._chance.random() < 0.5:
                        content = _changed(content, part)
            if content is not None:
                image[name] = bytes(content)
        return image


def _changed(content: bytearray | None, event: Event) -> bytearray | None:
    if event.kind == "delete":
        return None
    content = bytearray() if content is None else content
    if event.kind == "truncate":
        del content[event.offset :]
        return content
    end = event.offset + len(event.data)
    content.extend(bytes(max(0, end - len(content))))
    content[event.offset : end] = event.data
    return content


def _parts(event: Event) -> Iterator[Event]:
    """What of an event may be on the disk without the rest of it."""
    if event.kind != "write":
        yield event
        return
    start, end = event.offset, event.offset + len(event.data)
    while start < end:
        stop = min(end, (start // SECTOR + 1) * SECTOR)
        yield Event("write", event.name, start, event.data[start - event.offset : stop - event.offset])
        start = stop


def error(name: str) -> int:
    """The code of an error, by its name in SQLite without the prefix: `FULL`, `IOERR_FSYNC`."""
    code: int = getattr(sqlite3, f"SQLITE_{name}")
    return code
