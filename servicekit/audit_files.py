"""The files of an audit log, as a service writes them.

A file is named after its first record and never changed once the next one is begun, so that rotation keeps the chain
and needs no renaming: `secrets-000000000001.jsonl`.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

DIGITS = 12
"""Of the number in a file's name."""

AT_ONCE = 1_000
"""Records that are written and synced together."""

_STEP = 65_536
"""Bytes that are read of the end of a file at a time."""

_ENDS_OF_ONE_LINE = 2
"""The break before a line, and its own."""


class FileSink:
    """A directory with the files of one service. Sizes are in bytes, ages in seconds. Raises OSError."""

    def __init__(self, directory: Path, service: str, *, file_bytes: int, keep_bytes: int, keep_seconds: float) -> None:
        self._directory = directory
        self._service = service
        self._file_bytes = file_bytes
        self._keep_bytes = keep_bytes
        self._keep_seconds = keep_seconds
        self._file: Path | None = None
        self._size = 0
        self._last: int | None = None
        self._last_text = ""
        self._one_at_a_time = threading.Lock()
        """A writer whose task was cancelled goes on in its thread; the next one comes after it."""

    def files(self) -> list[Path]:
        """All files, the oldest first."""
        return sorted(self._directory.glob(f"{self._service}-{'[0-9]' * DIGITS}.jsonl"))

    def add(self, records: list[tuple[int, str]]) -> None:
        """Has these records on stable storage; those that are there already are left out. Raises Diverged."""
        with self._one_at_a_time:
            self._add(records)

    def _add(self, records: list[tuple[int, str]]) -> None:
        try:
            self._check_overlap(records, *self.end())
        except Diverged:
            self.forget()
            raise
        for at in range(0, len(records), AT_ONCE):
            new = [(seq, text) for seq, text in records[at : at + AT_ONCE] if seq > (self._last or 0)]
            if new:
                self._write(new[0][0], "".join(f"{text}\n" for _, text in new).encode("ascii"))
                self._last, self._last_text = new[-1]

    def end(self) -> tuple[int, str]:
        """The last record's number and text, as far as there are any; raises Diverged."""
        if self._last is None:
            self._find_end()
        return self._last or 0, self._last_text

    def forget(self) -> None:
        """Has the end looked for again the next time, since somebody is to mend the files."""
        self._last = None

    def superfluous(self, now: float) -> list[Path]:
        """The oldest files, as far as they are to go; never the one that is being written."""
        files = self.files()
        sizes = {path: path.stat() for path in files}
        total = sum(each.st_size for each in sizes.values())
        going = []
        for path in files[:-1]:
            if total <= self._keep_bytes and now - sizes[path].st_mtime <= self._keep_seconds:
                break
            total -= sizes[path].st_size
            going.append(path)
        return going

    def _find_end(self) -> None:
        """Looks where the last process stopped, and takes half a line back."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = self.files()
        if not files:
            self._file, self._size, self._last, self._last_text = None, 0, 0, ""
            return
        descriptor = os.open(files[-1], os.O_RDWR | os.O_CLOEXEC)
        try:
            size, text = whole_lines(descriptor)
        finally:
            os.close(descriptor)
        try:
            last = int(json.loads(text)["seq"]) if size else first_of(files[-1]) - 1
        except (ValueError, KeyError, TypeError):
            raise Diverged(f"{files[-1].name} does not end with a record") from None
        self._file, self._size, self._last, self._last_text = files[-1], size, last, text

    def _check_overlap(self, records: list[tuple[int, str]], last: int, text: str) -> None:
        """Raises Diverged where the files are of another history, as after a backup was restored beside them."""
        if records and records[0][0] <= last and text and (last, text) not in records:
            raise other_records(last)

    def _write(self, first: int, content: bytes) -> None:
        if self._file is None or self._size >= self._file_bytes:
            self._file, self._size = self._directory / f"{self._service}-{first:0{DIGITS}}.jsonl", 0
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            try:
                written = 0
                while written < len(content):
                    written += os.write(descriptor, content[written:])
            except OSError:
                os.ftruncate(descriptor, self._size)  # nothing of it counts before all of it is there
                raise
            try:
                os.fsync(descriptor)
                if not self._size:
                    _sync_directory(self._directory)
            except OSError as error:
                raise SyncFailed(f"an audit file cannot be synced: {error.strerror}") from None
        finally:
            os.close(descriptor)
        self._size += len(content)


class Diverged(Exception):
    """The files cannot be continued; the message says why."""


def other_records(last: int) -> Diverged:
    """What to raise where the files are of another history."""
    return Diverged(f"the files hold other records up to {last} than the database, which may be restored")


class SyncFailed(Exception):
    """What is on the disk is not known any more."""


def first_of(path: Path) -> int:
    """The number of the first record of a file."""
    return int(path.stem.rpartition("-")[2])


def whole_lines(descriptor: int) -> tuple[int, str]:
    """Takes half a line at the end of an open file back; the size of what stays, and its last line."""
    size = os.fstat(descriptor).st_size
    end = b""
    while (start := size - len(end)) and end.count(b"\n") < _ENDS_OF_ONE_LINE:
        step = min(start, _STEP)
        end = os.pread(descriptor, step, start - step) + end
    whole = end[: end.rfind(b"\n") + 1]
    if len(whole) != len(end):
        size -= len(end) - len(whole)
        os.ftruncate(descriptor, size)
    return size, whole.rstrip(b"\n").rpartition(b"\n")[2].decode("ascii", "replace")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
