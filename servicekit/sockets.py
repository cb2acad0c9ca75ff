"""Where the internal Unix sockets live: one per caller and callee, in a directory that only we may enter.

The kernel takes about 107 characters of socket path. A data directory whose path is too long for that gets a short
directory below the system's temporary folder instead, named after a hash of the path, so that every process finds it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from servicekit.errors import StartError

LONGEST_SOCKET_PATH = 99
_LONGEST_NAME = len("/replicas/") + 32 + len("/control.sock")


def socket_directory(data_dir: Path, chosen: Path | None = None) -> Path:
    """The directory of all sockets that belong to a data directory; made, and checked to be ours alone.

    `chosen` overrides the place. Raises StartError when it is too long for a socket, or not ours.
    """
    directory = chosen or data_dir / "run" / "sockets"
    if len(os.fsencode(directory)) + _LONGEST_NAME > LONGEST_SOCKET_PATH:
        if chosen is not None:
            raise StartError(
                f"TESSERA_SOCKET_DIR is too long for a Unix socket's path: {chosen}. Choose a shorter one."
            )
        directory = _short_directory(data_dir)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"{directory} cannot be made: {error.strerror}. Set TESSERA_SOCKET_DIR.") from None
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StartError(f"{directory} is not a directory of ours; remove it, or set TESSERA_SOCKET_DIR.")
    if stat.S_IMODE(found.st_mode) != 0o700:
        directory.chmod(0o700)
    return directory


def _short_directory(data_dir: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(data_dir.absolute())).hexdigest()[:12]
    name = f"tessera-{os.getuid()}-{digest}"
    directory = Path(tempfile.gettempdir()) / name
    if len(os.fsencode(directory)) + _LONGEST_NAME > LONGEST_SOCKET_PATH:
        directory = Path("/tmp") / name  # noqa: S108 (the caller checks that it is ours alone)
    return directory


def socket_address(directory: Path, *, callee: str, caller: str) -> str:
    """The gRPC address on which `callee` serves `caller` and nobody else."""
    return f"unix:{socket_path(directory, callee=callee, caller=caller)}"


def socket_path(directory: Path, *, callee: str, caller: str) -> str:
    """The path of that socket."""
    return f"{directory}/{callee}-for-{caller}.sock"
