"""A stand-in for NVIDIA's program where there is no GPU: a real executable of that name, which answers like the real
one, from a file beside it. Everything behind that door is real."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROGRAM = """#!{python} -IS
# A stand-in for tests. It knows `--query-gpu=FIELD,... --format=csv,noheader,nounits`, and nothing else.
import json, pathlib, sys, time

state = json.loads(pathlib.Path(__file__).with_name("gpus.json").read_text())
time.sleep(state["hangs"])
query, form = sys.argv[1:]
assert form == "--format=csv,noheader,nounits", form
fields = query.removeprefix("--query-gpu=").split(",")
for gpu in state["gpus"]:
    print(", ".join(str(gpu[field]) for field in fields))
print(state["says"], end="")
sys.exit(state["status"])
"""


def a_gpu(number: int, **facts: Any) -> dict[str, Any]:
    """One GPU as the program tells of it."""
    return {
        "uuid": f"GPU-{number:08d}-0000-0000-0000-000000000000",
        "name": "NVIDIA Stand-in 1",
        "mig.mode.current": "[N/A]",
        "utilization.gpu": 0,
        "memory.used": 0,
        "memory.total": 1_000,
        **facts,
    }


def uuid(number: int) -> str:
    """The UUID of a GPU."""
    return str(a_gpu(number)["uuid"])


@dataclass(frozen=True)
class NvidiaSmi:
    """The stand-in in a folder of its own, to be put into a search path."""

    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / "nvidia-smi"

    def has(self, *gpus: dict[str, Any], says: str = "", status: int = 0, hangs: float = 0) -> None:
        """What it answers from now on: rows for these, another text, a status; after so many seconds."""
        state = {"gpus": gpus, "says": says, "status": status, "hangs": hangs}
        unfinished = self.folder / "gpus.new"
        unfinished.write_text(json.dumps(state))
        unfinished.replace(self.folder / "gpus.json")


def nvidia_smi(folder: Path, *gpus: dict[str, Any]) -> NvidiaSmi:
    """The stand-in, on a machine with these GPUs."""
    folder.mkdir(parents=True)
    made = NvidiaSmi(folder)
    made.program.write_text(_PROGRAM.format(python=sys.executable))
    made.program.chmod(made.program.stat().st_mode | stat.S_IXUSR)
    made.has(*gpus)
    return made
