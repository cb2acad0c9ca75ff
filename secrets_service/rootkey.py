"""The root key file: 32 random bytes that every stored value is sealed under.

The rule: a key is made only when there is nothing yet that it should open, and it is never replaced. A file that others
could have read or written is refused rather than repaired: what it protected may be known already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from secrets_service import files
from secrets_service.model import SecretBytes
from servicekit.errors import StartError

LENGTH = 32


def load(path: Path) -> SecretBytes:
    """The key in a file; raises StartError when there is none, or when the file is not exactly as it should be."""
    try:
        # Neither a symbolic link nor a pipe that blocks: what is opened is what is looked at.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StartError(
            f"The root key {path} is missing, and there is data that only it opens. Put it back from your safe copy;"
            " a new key would not open anything."
        ) from None
    except OSError as error:
        cause = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise StartError(f"The root key {path} {cause}; it must be a file of its own.") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StartError(f"The root key {path} is not a regular file.")
        if found.st_uid != os.geteuid():
            raise StartError(f"The root key {path} belongs to another user.")
        if stat.S_IMODE(found.st_mode) not in (0o400, 0o600):
            raise StartError(
                f"The root key {path} has mode {stat.S_IMODE(found.st_mode):04o}, so others may have read it."
                " If they have not, run chmod 600 on it."
            )
        key = os.read(descriptor, LENGTH + 1)
    finally:
        os.close(descriptor)
    if len(key) != LENGTH:
        raise StartError(f"The root key {path} must hold exactly {LENGTH} bytes. Put it back from your safe copy.")
    return SecretBytes(key)


def load_or_make(path: Path) -> SecretBytes:
    """The key in a file, which is made when it is not there. Only for a store that holds nothing yet."""
    if not os.path.lexists(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            files.write_private(path, os.urandom(LENGTH), replace=False)
    return load(path)
