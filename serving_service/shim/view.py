"""What a model process sees of the file system: everything that is open to all users, read-only, and what it needs.

Made of a mount namespace of its own, by root, before the user is changed. A directory that is closed to others is
covered by an empty one where something behind it is needed, and just that is laid on top: an interpreter below a closed
home, the working directory below the closed directory of the platform's own sockets. So nothing has to be opened to
everybody, and of what lies beside it nothing is even there. The places that anybody may write to are private and empty,
so that a user's next owner finds nothing of the last one.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from serving_service.shim.libc import LIBC, checked

_CLONE_NEWNS, _CLONE_NEWIPC = 0x00020000, 0x08000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_SETATTR = 442  # one number on every architecture
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_READ_ONLY, _NO_SETUID = 1, 2

_SHARED = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", "/dev/mqueue")  # noqa: S108 (they are what is covered)
_SHARED_OPTIONS = "mode=1777,size=256m,nr_inodes=64k"
_COVER_OPTIONS = "mode=0755,size=1m"


def enter(*, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Gives this process its own view, for good; the paths are absolute. Raises OSError."""
    checked(LIBC.unshare(_CLONE_NEWNS | _CLONE_NEWIPC), "making a view of its own")
    _mount(None, "/", flags=_MS_REC | _MS_PRIVATE)
    # Opened before anything is covered: a covered place can only be reached through what was open before.
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in (*readable, *writable)}
    _set_attributes("/", set_=_READ_ONLY | _NO_SETUID, recursive=True)
    for place in _SHARED:
        if Path(place).is_dir() and not Path(place).is_symlink():
            _mount("tmpfs", place, kind="tmpfs", flags=_MS_NOSUID | _MS_NODEV, options=_SHARED_OPTIONS)
    for path in readable:
        _uncover(path, sources[path])
    for path in writable:
        _uncover(path, sources[path], is_writable=True)
    for source in sources.values():
        os.close(source)


def _uncover(path: str, source: int, *, is_writable: bool = False) -> None:
    """Makes `path` reachable for everybody in this view, as what `source` is."""
    for parent in reversed(Path(path).parents):
        if not parent.exists():
            parent.mkdir()
            parent.chmod(0o755)
        elif not parent.stat().st_mode & stat.S_IXOTH:
            _mount("tmpfs", str(parent), kind="tmpfs", flags=_MS_NOSUID | _MS_NODEV, options=_COVER_OPTIONS)
    if not is_writable and _is_there(path, source):
        return
    if stat.S_ISDIR(os.fstat(source).st_mode):
        Path(path).mkdir(exist_ok=True)
    else:
        Path(path).touch()
    _mount(f"/proc/self/fd/{source}", path, flags=_MS_BIND | _MS_REC)
    if is_writable:
        _set_attributes(path, clear=_READ_ONLY)


def _is_there(path: str, source: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(source))  # noqa: PTH116
    except FileNotFoundError:
        return False


def _mount(source: str | None, place: str, *, kind: str | None = None, flags: int, options: str | None = None) -> None:
    arguments = [None if text is None else os.fsencode(text) for text in (source, place, kind)]
    data = None if options is None else options.encode()
    checked(LIBC.mount(*arguments, ctypes.c_ulong(flags), data), f"mounting {place}")


def _set_attributes(place: str, *, set_: int = 0, clear: int = 0, recursive: bool = False) -> None:
    attributes = struct.pack("=QQQQ", set_, clear, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = LIBC.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        *(
            ctypes.c_long(_AT_FDCWD),
            os.fsencode(place),
            ctypes.c_ulong(flags),
            attributes,
            ctypes.c_size_t(len(attributes)),
        ),
    )
    checked(result, f"making {place} {'writable' if clear else 'read-only'}")
