"""The GPUs of a machine: which kind of workload takes how many of them, and which of those that are free it gets.

The rule: a GPU is one replica's alone, from before anything of the replica is started until no process of it is left
(`gpu_pool`). It is named by its UUID, which is the same after a restart of the machine, and whose order no library has
an opinion of its own about.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The variable that tells a process which GPUs are there for it; empty: none. Where there is a driver every replica has
it."""

PER_REPLICA: Mapping[str, int] = {
    "GPU_SMALL": 1,
    "GPU_MEDIUM": 1,
    "GPU_LARGE": 1,
    "GPU_XLARGE": 1,
    "MULTIGPU_MEDIUM": 4,
    "GPU_XLARGE_8": 8,
}
"""How many GPUs one replica of each kind takes (contract 5.8). What they are called says nothing here of how large they
are: they are what the machine has."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine has of GPUs."""

    has_driver: bool = False
    """Whether there is a driver, so that processes would find GPUs that they are not told to leave alone."""
    devices: tuple[str, ...] = ()
    """The UUIDs of those that are given to replicas, in the driver's order."""


def needed(workload_type: str) -> int:
    """How many GPUs each replica of a kind takes; none for the kinds that have only processors."""
    return PER_REPLICA.get(workload_type, 0)


def chosen(devices: Sequence[str], taken: Collection[str], count: int) -> tuple[str, ...] | None:
    """Which of the devices a replica gets that needs `count`; None when fewer are free."""
    free = [device for device in devices if device not in taken]
    return tuple(free[:count]) if len(free) >= count else None
