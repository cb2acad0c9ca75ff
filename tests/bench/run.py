"""One run of the benchmarks: how long to measure, where files go, and the platform, started when first needed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.bench import platform
from tests.bench.platform import Platform


@dataclass(kw_only=True)
class Run:
    """What every table is given."""

    rounds: int
    seconds: int
    """Of one load."""
    patience: float
    """Seconds for one figure to be measured while nobody else uses the machine."""
    directory: Path
    """For files; removed at the end."""
    exits: ExitStack = field(repr=False)

    @property
    def log(self) -> Path:
        """What the programs under measurement print."""
        return self.directory / "programs.log"

    @cached_property
    def platform(self) -> Platform:
        """The platform, which lives until the run ends."""
        return self.exits.enter_context(platform.running(self.directory))
