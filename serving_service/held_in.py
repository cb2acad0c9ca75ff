"""Becomes another program, held in: `python -I -S <this file> PARENT FILE_BYTES PROGRAM [ARGUMENT ...]`.

What builds an environment handles files that strangers wrote. It gets no new privileges, lower priority, limits, and
ends with the process PARENT that started it, however that ends.
"""

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_OPEN_FILES = 4_096


def main(parent: int, file_bytes: int, command: list[str]) -> None:
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return  # it ended before that was said
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.nice(5)
    # The users that models run as must be able to read what is made; nobody comes as far without being led there.
    os.umask(0o022)
    for which, value in (
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    os.execv(command[0], command)  # noqa: S606 (no shell is wanted)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    sys.exit(1)
