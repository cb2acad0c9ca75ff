"""The C library, for what Python has no function for."""

import ctypes
import os

LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    """Raises the OSError that a call of the C library left behind, with what was being done."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
