"""Folders that are made once and kept for as long as there is room: fetched models, and environments.

The rules. A folder is made under another name, made durable and then renamed: one with its own name is whole, whenever
who made it ended. What a replica uses is recorded first and then marked as used; what is to go is measured first, then
the records are read, and then only what nobody has marked since is dropped. So whoever finds that its folder could be
marked after it was recorded has it for good; else it makes the folder again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from servicekit.storage import StorageError
from serving_service.shim.libc import LIBC, checked

log = logging.getLogger(__name__)

_UNFINISHED = ".unfinished-"
MANIFEST = "manifest.json"

_SPARE = "packages"
_BLOCK_BYTES = 4_096


class DamagedError(Exception):
    """A folder does not hold what its manifest says."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One folder of a cache."""

    name: str
    used_at: int
    """When it was last marked as used, in nanoseconds."""
    files: Mapping[tuple[int, int], int] = field(repr=False)
    """The bytes of each file in it, by what tells the file from others: folders may share files."""


def size_of(entries: Iterable[Entry]) -> int:
    """The bytes that folders take together."""
    return sum({file: size for entry in entries for file, size in entry.files.items()}.values())


def to_drop(entries: Sequence[Entry], *, bound: int, in_use: Collection[str]) -> list[Entry]:
    """What has to go so that the rest fits into `bound` bytes: the least recently used first, nothing in use."""
    size = size_of(entries)
    owners = Counter(file for entry in entries for file in entry.files)
    chosen = []
    for entry in sorted(entries, key=lambda entry: (entry.used_at, entry.name)):
        if size <= bound:
            break
        if entry.name not in in_use:
            chosen.append(entry)
            owners.subtract(entry.files.keys())
            size -= sum(bytes_ for file, bytes_ in entry.files.items() if not owners[file])
    return chosen


class FolderCache:
    """The folders below `directory`: `directory/NAME/CONTENT`, where `content` is always the same."""

    def __init__(
        self,
        directory: Path,
        *,
        content: str,
        bound: int,
        used: Callable[[], Awaitable[Collection[str]]],
        spare: Path | None = None,
        is_spare_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """`bound` is in bytes; `used` reads the content folders that replicas use.

        `spare` counts too: a folder beside this one that only saves time, and goes first unless it is busy.
        """
        self.directory = directory
        self.bound = bound
        self._content = content
        self._used = used
        self._spare = spare
        self._is_spare_busy = is_spare_busy
        self._leftovers = list(directory.glob(f"{_UNFINISHED}*"))

    def path(self, name: str) -> Path:
        """Where the content of that name lies, or would."""
        return self.directory / name / self._content

    @contextlib.asynccontextmanager
    async def unfinished(self) -> AsyncIterator[Path]:
        """A folder to make something in; what is left in it in the end is removed, while others go on."""
        folder = _begun(self.directory)
        try:
            yield folder
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def keep(self, folder: Path, name: str) -> None:
        """Gives a folder that is whole its name."""
        keep(folder, self.directory / name)

    def drop(self, name: str) -> None:
        """Removes a folder; nobody finds it half there. Takes its time: a folder may hold very many files."""
        if (self.directory / name).exists():
            shutil.rmtree(self._buried(self.directory / name), ignore_errors=True)

    async def dropped(self, name: str) -> None:
        """As `drop`, at once gone for everybody, and removed while others go on."""
        if (self.directory / name).exists():
            await asyncio.to_thread(shutil.rmtree, self._buried(self.directory / name), ignore_errors=True)

    def clear_leftovers(self) -> None:
        """Removes what a predecessor of this process did not finish."""
        for folder in self._leftovers:
            shutil.rmtree(folder, ignore_errors=True)

    async def tidy(self) -> None:
        """Drops what was not used for longest until the rest fits; never what is used. Does nothing when it fails."""
        try:
            await self._tidy()
        except (OSError, StorageError) as error:
            log.warning("a cache cannot be tidied", extra={"cache": str(self.directory), "cause": str(error)})

    async def _tidy(self) -> None:
        entries = await asyncio.to_thread(self._measured)
        if size_of(entries) <= self.bound:
            return
        in_use = {Path(folder).parent.name for folder in await self._used()}
        dropped = set()
        for entry in to_drop(entries, bound=self.bound, in_use=in_use):
            if await self._drop_unless_used(entry):
                dropped.add(entry.name)
                log.info("dropped from a cache", extra={"cache": str(self.directory), "folder": entry.name})
        left = size_of(entry for entry in entries if entry.name not in dropped)
        if left > self.bound:
            log.warning("a cache is larger than it may be", extra={"cache": str(self.directory), "bytes": left})

    async def _drop_unless_used(self, entry: Entry) -> bool:
        # No waiting between the look and the renaming: whoever marks a folder as used does so in this thread too.
        if entry.name == _SPARE:
            assert self._spare is not None
            folder = self._spare
            if self._is_spare_busy():
                return False
        else:
            folder = self.directory / entry.name
            if _used_at(self.path(entry.name)) != entry.used_at:
                return False
        await asyncio.to_thread(shutil.rmtree, self._buried(folder), ignore_errors=True)
        return True

    def _buried(self, folder: Path) -> Path:
        """Takes a folder its name, and tells where it is to be removed."""
        grave = self.directory / f"{_UNFINISHED}{uuid.uuid4().hex}"
        folder.rename(grave)
        return grave

    def _measured(self) -> list[Entry]:
        found = []
        for folder in self.directory.iterdir() if self.directory.is_dir() else ():
            used_at = _used_at(self.path(folder.name))
            if used_at is not None and not folder.name.startswith(_UNFINISHED):
                found.append(Entry(name=folder.name, used_at=used_at, files=_files(folder)))
        if self._spare is not None and self._spare.is_dir():
            found.append(Entry(name=_SPARE, used_at=-1, files=_files(self._spare)))
        return found


@contextlib.contextmanager
def unfinished(directory: Path) -> Iterator[Path]:
    """A folder in `directory` to make something in; what is left in it in the end is removed."""
    folder = _begun(directory)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _begun(directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=directory))


def keep(folder: Path, target: Path) -> None:
    """Gives a folder that is whole its name, once it is durable; where there is one already, that one stays."""
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        checked(LIBC.syncfs(descriptor), "making a folder durable")
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def mark_used(folder: Path) -> bool:
    """Marks a content folder, or a file, as used now; False when it is not there any more. Does not wait: see above."""
    try:
        os.utime(folder)
    except FileNotFoundError:
        return False
    return True


def seal(content: Path) -> str:
    """Writes beside a folder what is in it, and returns the digest of that; raises DamagedError for what is no file."""
    files = {}
    for path in sorted(content.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            files[str(path.relative_to(content))] = [path.stat().st_size, _digest(path)]
        elif not stat.S_ISDIR(mode):
            raise DamagedError(f"'{path.relative_to(content)}' is neither a file nor a folder")
    manifest = json.dumps(files).encode()
    (content.parent / MANIFEST).write_bytes(manifest)
    return hashlib.sha256(manifest).hexdigest()


def check(content: Path, *, digests: bool) -> str:
    """The digest of what is written beside a folder; raises DamagedError unless the folder was sealed and still holds
    every file in its size, or, with `digests`, every byte.

    What lies there besides is removed: code among it would be imported before what it has the name of, and what an
    interpreter compiled, and may keep there, in place of its source.
    """
    try:
        manifest = (content.parent / MANIFEST).read_bytes()
        files: dict[str, tuple[int, str]] = json.loads(manifest)
    except FileNotFoundError:
        raise DamagedError("it has no manifest") from None
    except ValueError:
        raise DamagedError("its manifest cannot be read") from None
    _remove_strangers(content, files)
    for name, (size, digest) in files.items():
        try:
            is_whole = (content / name).stat().st_size == size and (not digests or _digest(content / name) == digest)
        except FileNotFoundError:
            raise DamagedError(f"'{name}' is not there any more") from None
        if not is_whole:
            raise DamagedError(f"'{name}' is not what it was")
    return hashlib.sha256(manifest).hexdigest()


def _remove_strangers(content: Path, files: Collection[str]) -> None:
    """Removes what is none of these files, and every link, which may lead to something else at any time."""
    for folder, folders, names in os.walk(content):
        for path in (Path(folder, name) for name in (*folders, *names)):
            if path.is_symlink() or (str(path.relative_to(content)) not in files and not path.is_dir()):
                path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[tuple[int, int], int]:
    """What lies below a folder; what goes meanwhile is left out."""
    found = {}
    for _, directories, files, descriptor in os.fwalk(folder):
        for name in (*directories, *files):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                found[(status.st_dev, status.st_ino)] = -(-status.st_size // _BLOCK_BYTES) * _BLOCK_BYTES
    return found


def _used_at(content: Path) -> int | None:
    try:
        return content.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None
