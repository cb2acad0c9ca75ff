"""A process that has no file descriptor left."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Nothing can be opened meanwhile; what is open stays so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def out_of_descriptors(*_: Any, **__: Any) -> NoReturn:
    """Stands in for one call alone that opens something."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
