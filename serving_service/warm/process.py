"""How a forked process becomes a model server that differs in nothing from one that was executed.

What an interpreter takes from its surroundings when it starts, or a library when it is loaded, is taken here again,
from the surroundings of the model. Variables that cannot be looked at again keep a launch from being forked at all
(`serving_service/template.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import numpy as np

from serving_service.model_server import mlflow_rules
from serving_service.shim.libc import LIBC, checked

_PR_SET_DUMPABLE = 4
_OPENED = 5  # the descriptors of a model process: three streams, listener, report
_ARG_START, _ARG_END = 45, 46  # in /proc/self/stat, behind the name

_BLAS_SPELLINGS = [(before, behind) for before in ("scipy_", "") for behind in ("64_", "_64", "")]


@dataclass(frozen=True)
class Forked:
    """What the processes that are forked from this one have to take again; found once, before the first of them."""

    title: tuple[int, int]
    """Where the kernel looks for the command line, and how many bytes there are."""
    from_home: tuple[tuple[ModuleType, str, str], ...]
    """Variables of modules that were made from HOME: module, name, and what stands behind HOME in the value."""
    blas: tuple[ctypes.CDLL, ...]
    """The loaded libraries for linear algebra; in this process they have one thread."""

    @classmethod
    def from_this(cls) -> Forked:
        """What there is to be taken again in forks of this process."""
        return cls(_place_of_title(), tuple(_made_from(os.environ["HOME"])), tuple(_blas()))

    def entitle(self, command: Iterable[str]) -> None:
        """Has /proc, and so `ps`, show a command line; the end of a long one is cut."""
        start, size = self.title
        # A last byte that is no end tells the kernel that this is one text, and not arguments to the very last byte.
        title = b" ".join(map(os.fsencode, command))[: size - 2].ljust(size - 1, b"\0") + b"\1"
        ctypes.memmove(start, title, size)

    def become(self, command: list[str], environment: dict[bytes, bytes]) -> None:
        """Runs the module of `python ... -m MODULE ARGUMENT...` as if the command had been executed, and ends with it.

        Raises OSError, and then nothing has been run.
        """
        _, module, *arguments = command[command.index("-m") :]
        # A change of user takes this away, and an execution gives it back: else its own files in /proc would be root's.
        checked(LIBC.prctl(_PR_SET_DUMPABLE, *map(ctypes.c_ulong, (1, 0, 0, 0))), "making the process dumpable")
        self.entitle(command)
        sys.orig_argv = command
        self._take_environment(environment)
        _take_signals()
        np.random.seed()  # `random` and OpenSSL see to it themselves
        mlflow_rules.begin_anew()
        for library in self.blas:
            _use_all_cores(library)
        _close_others()
        _run(module, arguments)

    def _take_environment(self, environment: dict[bytes, bytes]) -> None:
        os.environ.clear()
        os.environb.update(environment)
        for module, name, rest in self.from_home:
            setattr(module, name, os.environ["HOME"] + rest)
        tempfile.tempdir = None


def _place_of_title() -> tuple[int, int]:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    return start, end - start


def _made_from(place: str) -> Iterator[tuple[ModuleType, str, str]]:
    for module in list(sys.modules.values()):
        if type(module) is ModuleType:  # a lazy one would be loaded by a look at it
            for name, value in list(vars(module).items()):
                if type(value) is str and value.startswith(place):
                    yield module, name, value.removeprefix(place)


def _take_signals() -> None:
    """What Python sets at its start; the rest is as when the process began."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _blas() -> Iterator[ctypes.CDLL]:
    mapped = {line.partition("/")[2] for line in Path("/proc/self/maps").read_text().splitlines() if "openblas" in line}
    for path in sorted(mapped):
        yield ctypes.CDLL(f"/{path}")


def _use_all_cores(library: ctypes.CDLL) -> None:
    """Gives it the threads that it takes at its start where no variable says otherwise."""
    for before, behind in _BLAS_SPELLINGS:
        names = [f"{before}openblas_{what}{behind}" for what in ("get_num_procs", "set_num_threads")]
        if all(hasattr(library, name) for name in names):
            cores, set_threads = (library[name] for name in names)
            set_threads(cores())
            return


def _close_others() -> None:
    for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if descriptor >= _OPENED:
            with contextlib.suppress(OSError):  # the one that this folder was read through
                os.close(descriptor)


def _run(module: str, arguments: list[str]) -> NoReturn:
    """Runs a module as the program of this process, up to and including its end."""
    status = 1
    try:
        sys.argv = ["-m", *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # As an interpreter ends, and as `multiprocessing` ends what it forked.
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001
            atexit._run_exitfuncs()  # noqa: SLF001
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 0xFF)
