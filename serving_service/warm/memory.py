"""What the template has in memory, and whether that may be forked."""

import contextlib
import gc
import importlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    "serving_service.model_server.application",
    "serving_service.model_server.report",
    "serving_service.model_server.server",
    "serving_service.model_server.scoring",
    # What uvicorn imports when it starts, uvloop and httptools included where they are.
    "uvicorn.lifespan.off",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    # What MLflow imports when it loads a model.
    "email.policy",
    "serving_service.warm.process",
)


class UnforkableError(Exception):
    """What was imported has left something behind that a forked process would not have, or must not have."""


def fill() -> set[str]:
    """Imports all of it and has MLflow look round; returns the names of the variables that were looked at meanwhile.

    Raises UnforkableError, and what the imports raise.
    """
    with _names_read() as names:
        gc.disable()  # as in the model server: hardly anything that is imported is garbage
        for module in MODULES:
            importlib.import_module(module)
        # Imported here: this module itself needs nothing that may be missing.
        from serving_service.model_server import mlflow_rules

        mlflow_rules.learn_packages()
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page that it looks at
    gc.enable()
    if reason := _why_not():
        raise UnforkableError(reason)
    return names


@contextlib.contextmanager
def _names_read() -> Iterator[set[str]]:
    """Collects the names that are looked up in `os.environ`, found or not."""
    names: set[str] = set()
    kind = type(os.environ)
    looked_up = kind.__getitem__

    def look_up(self: "os._Environ[str]", name: str) -> str:
        names.add(os.fsdecode(name))
        return looked_up(self, name)

    kind.__getitem__ = look_up  # type: ignore[method-assign]
    try:
        yield names
    finally:
        kind.__getitem__ = looked_up  # type: ignore[method-assign]


def _why_not() -> str:
    """Why this process must not be forked; empty when it may."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        return f"an imported library runs threads: {threads}, {[each.name for each in threading.enumerate()]}"
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return "an imported library started a process"
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if int(path.name) > 2 and path.is_symlink()]
    if kept := [str(path) for path in opened if str(path) != f"/proc/{os.getpid()}/fd"]:
        return f"an imported library keeps files open: {kept}"
    return ""
