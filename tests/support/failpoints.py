"""Where a service can be killed: before and after each of its steps that the world outside can see.

A step is a call through a door of the service, which is wrapped in a process of the tests; the product knows nothing of
this. A
point is a step with `before` or `after` in front: `before write activate`, `after start replica`.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


def step_of(name: str) -> Callable[[Sequence[Any]], str | None]:
    """Calls every step through a door alike."""
    return lambda args: name


def written(args: Sequence[Any]) -> str | None:
    """What a transaction is called: the function of `store.py`, or the operation that it commits."""
    function, *rest = args[1:]
    if getattr(function, "__module__", "").startswith("servicekit.audit"):
        return None  # the audit log's, at moments of its own
    while isinstance(function, functools.partial):
        function = function.func
    if function.__name__ == "once":
        function = rest[0]
    return f"write {function.__qualname__.removesuffix('.<locals>.commit').rpartition('.')[2].lstrip('_')}"


@dataclass(frozen=True)
class Door:
    """Where a service touches the world outside: an attribute of a class or a module, which is wrapped."""

    owner: Any
    attribute: str
    step: Callable[[Sequence[Any]], str | None]
    """What a call with these arguments is called; None when it is no step."""


@dataclass
class Failpoints:
    """What was passed since `watch`, and the point at which this process is to end."""

    doors: Sequence[Door]
    passed: list[str] = field(default_factory=list)
    deadly: str | None = None

    def install(self) -> None:
        """Wraps the doors, for good."""
        for door in self.doors:
            setattr(door.owner, door.attribute, self._wrapped(door.step, getattr(door.owner, door.attribute)))

    def watch(self, deadly: str | None) -> None:
        """Forgets what was passed; kills this process at the point `deadly`, when that is passed the next time."""
        self.passed.clear()
        self.deadly = deadly

    def _wrapped(self, step: Callable[[Sequence[Any]], str | None], function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                name = step(args)
                self._pass("before", name)
                result = await function(*args, **kwargs)
                self._pass("after", name)
                return result

            return awaited

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            name = step(args)
            self._pass("before", name)
            result = function(*args, **kwargs)
            self._pass("after", name)
            return result

        return called

    def _pass(self, side: str, name: str | None) -> None:
        if name is None:
            return
        point = f"{side} {name}"
        if point == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(point)
