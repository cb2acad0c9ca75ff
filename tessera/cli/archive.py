"""What a backup is: a folder of files, a manifest that names them, and what the manifest is known by.

    secrets.db, serving.db, registry.db, locks/, audit/     what the services copied
    manifest.json                               format, when and by what it was made, size and digest of each file
    manifest.check                              MAC of the manifest, and a digest of manifest and MAC

The rule: a folder without the two manifest files is no backup, and they are written last. Every byte of a backup stands
under a digest, so damage shows without any key; that somebody changed a backup and made the digests anew shows with the
root key, by the MAC.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servicekit.errors import StartError

FORMAT = 1

MANIFEST, CHECK = "manifest.json", "manifest.check"
SECRETS, SERVING, REGISTRY = "secrets.db", "serving.db", "registry.db"

_NAME = re.compile(
    r"(secrets|serving|registry)\.db|locks/[A-Za-z0-9_-]{1,64}\.txt|audit/(secrets|serving)-[0-9]{12}\.jsonl"
)
_CHECK = re.compile(rb"([0-9a-f]{2,256})\n([0-9a-f]{64})\n")
_LONGEST_MANIFEST = 1 << 20
_PART_BYTES = 1 << 20

Tell = Callable[[str], None]


@dataclass(frozen=True)
class File:
    """A file of a backup."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a backup says of itself."""

    made_at: str
    """UTC."""
    version: str
    """Of the program that made it."""
    facts: Mapping[str, str]
    """What the services said besides."""
    files: tuple[File, ...]

    @property
    def has_root_key(self) -> bool:
        """Whether the root key is in it, encrypted by a key service; older ones do not say so."""
        return self.facts.get("root_key") == "encrypted"

    def content(self) -> bytes:
        """The manifest as it is written."""
        document = {
            "format": FORMAT,
            "made_at": self.made_at,
            "tessera": self.version,
            "facts": dict(self.facts),
            "files": [vars(file) for file in self.files],
        }
        return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


class NoBackupError(StartError):
    """What was named is no backup, or none that this program can read; the message says why."""


@dataclass(frozen=True)
class Backup:
    """A backup whose manifest is as it was written."""

    folder: Path
    manifest: Manifest
    content: bytes
    """The manifest as it is written."""
    mac: bytes

    def path(self, name: str) -> Path:
        """Where a file of it is."""
        return self.folder / name


def check(manifest: bytes, mac: bytes) -> bytes:
    """What stands in CHECK."""
    return f"{mac.hex()}\n{hashlib.sha256(manifest + mac).hexdigest()}\n".encode()


def is_name(name: str) -> bool:
    """Whether a file of a backup may be called so."""
    return _NAME.fullmatch(name) is not None


def opened(folder: Path) -> Backup:
    """The backup in a folder; raises NoBackupError. Its files are not looked at."""
    if not folder.is_dir():
        raise NoBackupError(f"{folder} is no directory.")
    content, checked = _whole(folder, MANIFEST), _whole(folder, CHECK)
    said = _CHECK.fullmatch(checked)
    if said is None or check(content, bytes.fromhex(said[1].decode())) != checked:
        raise NoBackupError(f"{folder} is damaged: {MANIFEST} or {CHECK} is not as it was written.")
    return Backup(folder, _manifest(folder, content), content, bytes.fromhex(said[1].decode()))


def _whole(folder: Path, name: str) -> bytes:
    try:
        with open_for_reading(folder / name) as file:
            return bytes(file.read(_LONGEST_MANIFEST))
    except OSError as error:
        raise NoBackupError(f"{folder} is no backup: {name} cannot be read ({error.strerror}).") from None


def _manifest(folder: Path, content: bytes) -> Manifest:
    try:
        document = json.loads(content)
        if document["format"] > FORMAT:
            raise NoBackupError(f"{folder} was made by a newer version ({document['tessera']}). Install that version.")
        manifest = Manifest(
            made_at=document["made_at"],
            version=document["tessera"],
            facts=document["facts"],
            files=tuple(File(**file) for file in document["files"]),
        )
    except (ValueError, KeyError, TypeError):  # somebody has written it who can make digests
        raise NoBackupError(f"{folder} has no manifest of a backup.") from None
    names = [file.name for file in manifest.files]
    if not all(map(is_name, names)) or len({*names}) != len(names) or not {SECRETS, SERVING} <= {*names}:
        raise NoBackupError(f"{folder} names other files than a backup has.")
    return manifest


def faults(backup: Backup, tell: Tell) -> list[str]:
    """How the files of a backup differ from what its manifest says, one line each."""
    found = [
        f"{name} does not belong to it"
        for name in sorted(_names(backup.folder) - {MANIFEST, CHECK} - {file.name for file in backup.manifest.files})
    ]
    for file in backup.manifest.files:
        try:
            with open_for_reading(backup.path(file.name)) as source:
                size, digest = 0, hashlib.sha256()
                for part in parts(source, Progress(file.name, file.size, tell)):
                    size += len(part)
                    digest.update(part)
        except OSError as error:
            found.append(f"{file.name} cannot be read ({error.strerror})")
        else:
            if size != file.size:
                found.append(f"{file.name} has {size} bytes instead of {file.size}")
            elif digest.hexdigest() != file.sha256:
                found.append(f"{file.name} is not as it was written")
    return found


def _names(folder: Path) -> set[str]:
    return {
        Path(above).relative_to(folder).joinpath(name).as_posix()
        for above, folders, names in os.walk(folder)
        for name in (*names, *(each for each in folders if Path(above, each).is_symlink()))
    }


# --- files ---


def open_for_reading(path: Path) -> Any:
    """Opens a regular file that is no link; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "is not a regular file")
    return os.fdopen(descriptor, "rb")


def open_for_writing(path: Path) -> Any:
    """Makes a file for its owner alone; raises OSError when there is one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def parts(file: Any, progress: Progress) -> Iterator[bytes]:
    """What is in a file, in parts."""
    while part := file.read(_PART_BYTES):
        progress.more(len(part))
        yield part


def sync(path: Path) -> None:
    """Returns when a file, or which files there are in a folder, is on stable storage."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Returns when everything in a folder is on stable storage, and the folder itself."""
    for above, _, names in os.walk(folder):
        for name in names:
            sync(Path(above, name))
        sync(Path(above))


class Progress:
    """Tells how far something is that takes long: every second, and nothing where it takes less."""

    def __init__(self, name: str, size: int, tell: Tell) -> None:
        self._name, self._size, self._tell = name, size, tell
        self._done = 0
        self._told = time.monotonic()

    def more(self, count: int) -> None:
        """So many bytes more are done."""
        self._done += count
        if time.monotonic() - self._told >= 1:
            self._told = time.monotonic()
            self._tell(f"  {self._name}: {self._done >> 20} of {self._size >> 20} MiB")
