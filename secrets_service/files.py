"""Small private files, written so that a crash leaves the old one, the new one or none, and never a part of one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from servicekit.durable import sync_directory


def write_private(path: Path, content: bytes, *, replace: bool) -> None:
    """Writes a file that only we may read; on stable storage when this returns.

    An existing file is replaced, or with `replace=False` left alone: FileExistsError.
    """
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            staged.replace(path)
        else:
            path.hardlink_to(staged)
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(path.parent)


def refuse_unmovable(path: Path) -> None:
    """Raises OSError when a file cannot be moved or replaced, such as one that is mounted by itself or immutable.

    A link to it fails for the same reasons, and changes nothing.
    """
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    probe.hardlink_to(path)
    probe.unlink()


def rename(path: Path, to: Path) -> None:
    """Moves a file within its directory, in place of another; on stable storage when this returns."""
    path.replace(to)
    sync_directory(to.parent)
