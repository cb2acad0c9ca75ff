"""Where a service can be killed: before and after each of its steps that the world outside can see.

A step is a call of one of `DOORS`, which are wrapped in a process of the tests; the product knows nothing of this. A
point is a step with `before` or `after` in front: `before write activate`, `after start replica`.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from servicekit.database import Database
from serving_service import launcher
from serving_service.environment import SecretReferences
from serving_service.launcher import LocalLauncher, LocalReplica
from serving_service.routes import RouteTable
from serving_service.settlement import Settlement
from tests.support.serving import MannerRegistry

DOORS: dict[str, tuple[Any, str]] = {
    "write": (Database, "write"),
    "fetch model": (MannerRegistry, "fetch"),
    "grant": (SecretReferences, "grant"),
    "resolve": (SecretReferences, "resolve"),
    "settle": (Settlement, "_tell"),
    "reconcile": (Settlement, "reconciled"),
    "start replica": (LocalLauncher, "start"),
    "spawn shim": (launcher, "_spawn_shim"),
    "adopt": (LocalLauncher, "adopt"),
    "stop replica": (LocalReplica, "stop"),
    "change routes": (RouteTable, "_change"),
    "acknowledge": (RouteTable, "acknowledged"),
    "drain": (RouteTable, "drained"),
}
"""What is wrapped, by what a step through it is called. A write is called by its function of `store.py` besides."""


@dataclass
class Failpoints:
    """What was passed since `watch`, and the point at which this process is to end."""

    passed: list[str] = field(default_factory=list)
    deadly: str | None = None

    def install(self) -> None:
        """Wraps the doors, for good."""
        for name, (owner, attribute) in DOORS.items():
            setattr(owner, attribute, self._wrapped(name, getattr(owner, attribute)))

    def watch(self, deadly: str | None) -> None:
        """Forgets what was passed; kills this process at the point `deadly`, when that is passed the next time."""
        self.passed.clear()
        self.deadly = deadly

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def stepping(*args: Any, **kwargs: Any) -> Any:
                if name == "write" and getattr(args[1], "__module__", "").startswith("servicekit.audit"):
                    return await function(*args, **kwargs)  # the audit log's, at moments of its own
                step = f"{name} {_written(args[1], args[2:])}" if name == "write" else name
                self._pass(f"before {step}")
                result = await function(*args, **kwargs)
                self._pass(f"after {step}")
                return result

            return stepping

        @functools.wraps(function)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._pass(f"before {name}")
            result = function(*args, **kwargs)
            self._pass(f"after {name}")
            return result

        return step

    def _pass(self, point: str) -> None:
        if point == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(point)


def _written(function: Any, args: tuple[Any, ...]) -> str:
    """What a transaction is called: a function of `store.py`, or the operation that it commits."""
    while isinstance(function, functools.partial):
        function = function.func
    if function.__name__ == "once":
        function = args[0]
    return str(function.__qualname__.removesuffix(".<locals>.commit").rpartition(".")[2].lstrip("_"))
