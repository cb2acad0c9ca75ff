"""Values like no other, and a search for them in files, processes and answers, however they are spelled.

A canary's value is two random words of letters and digits around every character that some spelling writes otherwise.
Looked for are the words: those stay themselves in JSON, in URLs and in Python's repr, and have few forms elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_GZIP = b"\x1f\x8b\x08"
_UNPACKED_BYTES = 8 << 20


@dataclass(frozen=True)
class Canary:
    """Something that must not be found; only its name is ever shown."""

    name: str
    needles: tuple[tuple[str, bytes], ...] = field(repr=False)
    value: str = field(repr=False, default="")

    @classmethod
    def of(cls, name: str, value: str | bytes) -> Canary:
        """A canary for a value that exists, and is looked for as a whole."""
        return cls(name, tuple(_forms(value.encode() if isinstance(value, str) else value)))

    @classmethod
    def new(cls, name: str) -> Canary:
        """A canary with a value of its own."""
        first, second = secrets.token_hex(16), secrets.token_hex(16)
        needles = (*_forms(first.encode()), *_forms(second.encode()))
        return cls(name, needles, f"{first}\"\\'/+ é\n{second}")


def _forms(raw: bytes) -> Iterator[tuple[str, bytes]]:
    yield "raw", raw
    yield "hex", raw.hex().encode()
    yield "hex", raw.hex().upper().encode()
    yield "UTF-16", raw.decode("latin-1").encode("utf-16-le")
    yield "UTF-16", raw.decode("latin-1").encode("utf-16-be")
    for offset in range(3):
        # Of a group that the word shares with its neighbours only some characters are the word's own.
        bits = 8 * (offset + len(raw))
        own = slice(-(-8 * offset // 6), bits // 6)
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield "base64", encode(bytes(offset) + raw)[own]


def found_in(data: bytes, canaries: Iterable[Canary], *, place: str) -> list[str]:
    """Which canaries are in some bytes, or in what is packed there with gzip; one line each."""
    found = {
        f"{canary.name} as {form} in {place}"
        for canary in canaries
        for form, needle in canary.needles
        if needle in data
    }
    start = data.find(_GZIP)
    while start >= 0:
        with contextlib.suppress(zlib.error):
            unpacked = zlib.decompressobj(31).decompress(data[start:], _UNPACKED_BYTES)
            found |= set(found_in(unpacked, canaries, place=f"{place}, packed"))
        start = data.find(_GZIP, start + 1)
    return sorted(found)


def found_in_files(folders: Iterable[Path], canaries: Collection[Canary]) -> list[str]:
    """Which canaries are in the files below folders, or in the names of those."""
    lines = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            lines += found_in(bytes(path.relative_to(folder)), canaries, place=f"the name {path}")
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # a file may go while we look
                    lines += found_in(path.read_bytes(), canaries, place=str(path))
    return lines


def found_in_processes(pids: Iterable[int], canaries: Collection[Canary], *, entitled: Collection[int]) -> list[str]:
    """Which canaries are in the arguments of processes, or in the environment of one that is not entitled to them."""
    lines = []
    for pid in pids:
        process = Path("/proc") / str(pid)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = (process / "cmdline").read_bytes()
            shown = command.replace(b"\0", b" ").decode("utf-8", "replace")[:100]
            lines += found_in(command, canaries, place=f"the arguments of {pid}")
            if pid not in entitled:
                environment = (process / "environ").read_bytes()
                lines += found_in(environment, canaries, place=f"the environment of {pid} ({shown})")
    return lines
