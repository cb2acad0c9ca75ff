"""Runs a program, and tells how much processor time it has taken with all its descendants, wherever they went.

`python -m tests.support.reaper PROGRAM ARGUMENT...` prints the seconds so far for each line of its input, and ends the
program at the end of its input.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time

import psutil

from serving_service.shim.libc import LIBC

_PR_SET_CHILD_SUBREAPER = 36


def _main(command: list[str]) -> None:
    LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a descendant whose parent has ended comes to us
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_reap, daemon=True).start()
    for _ in sys.stdin:
        sys.stdout.write(f"{_seconds()}\n")
        sys.stdout.flush()
    program.kill()


def _reap() -> None:
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.05)


def _seconds() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return ended.ru_utime + ended.ru_stime + sum(sum(times[:4]) for times in living)


if __name__ == "__main__":
    _main(sys.argv[1:])
