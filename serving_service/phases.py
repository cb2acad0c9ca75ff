"""The phases of a launch: what each is called, and what is said while it goes on, when it failed, and afterwards.

The rule: from its beginning to its end a launch is in exactly one phase, and the next begins when one ends; so the
durations of the phases add up to the time that the launch took.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum


class LaunchPhase(StrEnum):
    """What a launch is busy with, or failed at."""

    MODEL_DOWNLOAD = "model download"
    ENVIRONMENT_BUILD = "environment build"
    REFERENCE = "reference"
    PERMISSION = "permission"
    """What reading references fails at when they are there and may not be read."""
    START = "start"
    LOAD = "load"
    READINESS = "readiness"


class Outcome(StrEnum):
    """How a phase ended."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    ABANDONED = "ABANDONED"
    """The launch was not wanted any more."""


_DOING = {
    LaunchPhase.MODEL_DOWNLOAD: "the model's files are being fetched.",
    LaunchPhase.ENVIRONMENT_BUILD: "the model's environment is being built.",
    LaunchPhase.REFERENCE: "secrets are being read.",
    LaunchPhase.PERMISSION: "secrets are being read.",
    LaunchPhase.START: "the model server is being started.",
    LaunchPhase.LOAD: "the model is being loaded.",
    LaunchPhase.READINESS: "the model server is being asked whether it is ready.",
}

_FIXES = {
    LaunchPhase.LOAD: "Its log says more. Mend the model or its variables, then update the endpoint.",
    LaunchPhase.READINESS: "Its log says more. Mend the model or its variables, then update the endpoint.",
}
"""What helps. What the other phases fail at says so itself, since it knows more."""


@dataclass(frozen=True, kw_only=True)
class LaunchEvent:
    """One phase of one launch. Times are Unix milliseconds, the duration is in milliseconds."""

    replica_id: str
    version: int
    entity: str
    phase: LaunchPhase
    outcome: Outcome
    started_at: int
    duration: int
    message: str
    """What is being done, or the cause of a failure; else empty."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A phase that goes on."""

    phase: LaunchPhase
    began: float = field(default_factory=time.monotonic)
    started_at: int = field(default_factory=lambda: time.time_ns() // 1_000_000)

    @property
    def duration(self) -> int:
        """How long it has gone on, in milliseconds."""
        return _milliseconds(time.monotonic() - self.began)

    @property
    def message(self) -> str:
        """What is being done, and for how long."""
        return f"Phase {self.phase}, for {self.duration // 1000} s: {_DOING[self.phase]}"

    def next(self, phase: LaunchPhase, duration: int) -> Step:
        """The phase that begins where this one ended, after that many milliseconds."""
        return Step(phase=phase, began=self.began + duration / 1000, started_at=self.started_at + duration)


def since(phase: LaunchPhase, epoch: float) -> Step:
    """A phase that goes on since a moment before this process began, in seconds since the epoch."""
    age = max(time.time() - epoch, 0.0)
    return Step(phase=phase, began=time.monotonic() - age, started_at=_milliseconds(epoch))


def doing(phase: LaunchPhase) -> str:
    """What a phase does."""
    return f"Phase {phase}: {_DOING[phase]}"


def failed(phase: LaunchPhase, problem: str) -> str:
    """The cause of a failure: the phase, the offending thing, and what helps."""
    sentence = problem if problem.endswith((".", "!", "?")) else f"{problem}."
    return f"Phase {phase} failed: {sentence} {_FIXES.get(phase, '')}".rstrip()


def overdue(seconds: float, variable: str) -> str:
    """What is wrong with a phase that took too long; `variable` is the setting that says how long it may take."""
    return f"It took longer than the {seconds:g} s that {variable} allows."


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
