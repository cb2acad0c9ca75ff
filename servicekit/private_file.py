"""Reading a file that holds a secret, such as a key.

The rule: a file that others could have read or written is refused rather than repaired, since what it protects may be
known already. What is looked at is what is read: the checks are made on the open file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from servicekit.errors import StartError


def read(path: Path, *, what: str, longest: int, may_be_link: bool, may_be_given: bool = False) -> bytes:
    """The first `longest` bytes of a regular file of ours that only we can read.

    `what` begins the texts of errors. With `may_be_given` it may also be root's, and a group may read it: so a
    supervisor hands over what it keeps. Raises FileNotFoundError, and StartError for one that is not as it should be.
    """
    name = f"{what} {path}"
    try:
        # Without O_NONBLOCK a pipe in the file's place would hang the start.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if may_be_link else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        is_link = error.errno == errno.ELOOP and not may_be_link
        cause = "is a symbolic link" if is_link else f"cannot be read ({error.strerror})"
        raise StartError(f"{name} {cause}; it must be a file of its own.") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StartError(f"{name} is not a regular file.")
        if found.st_uid != os.geteuid() and not (may_be_given and found.st_uid == 0):
            raise StartError(
                f"{name} belongs to another user (number {found.st_uid}; this process runs as {os.geteuid()}), who may"
                " have read it. Run as that user; or, if none but you has had it, give it to this one with chown."
            )
        if stat.S_IMODE(found.st_mode) not in (0o400, 0o600, *((0o440, 0o640) if may_be_given else ())):
            raise StartError(
                f"{name} has mode {stat.S_IMODE(found.st_mode):04o}, so others may have read it."
                " If they have not, run chmod 600 on it."
            )
        return os.read(descriptor, longest)
    except OSError as error:
        raise StartError(f"{name} cannot be read ({error.strerror}).") from None
    finally:
        os.close(descriptor)
