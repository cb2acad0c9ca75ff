"""Where this machine lets us limit a replica as a whole, in either version of control groups, and a group there.

Groups are made below the one that this process is in: what limits the platform limits its models too.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from serving_service.shim import cgroups as members

_KINDS = ("pids", "memory")

PREFIX = "tessera-"
"""How the names of all groups of ours begin."""


class _MemoryFiles(NamedTuple):
    used: str
    limit: str
    kept: str
    """A line of memory.stat."""


_MEMORY_FILES = {
    "": _MemoryFiles("memory.current", "memory.max", "inactive_file"),
    "memory": _MemoryFiles("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one replica may use, in all its processes together."""

    processes: int
    """Threads count too."""
    memory: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """A tree of groups, and our place in it."""

    parent: Path
    kinds: tuple[str, ...]
    """What can be limited in it; empty where it only serves to end everything at once."""
    is_unified: bool

    def make(self, name: str, limits: Limits) -> str:
        """A new group below our own, with the limits set; raises OSError."""
        group = self.parent / name
        group.mkdir()
        try:
            for file, value in self._values(limits):
                if file.startswith(("memory.swap", "memory.memsw")) and not (group / file).exists():
                    continue  # swap is not counted here
                (group / file).write_text(str(value))
        except OSError:
            group.rmdir()
            raise
        return str(group)

    def _values(self, limits: Limits) -> Iterator[tuple[str, int]]:
        if "pids" in self.kinds:
            yield "pids.max", limits.processes
        if "memory" in self.kinds and self.is_unified:
            yield from (("memory.max", limits.memory), ("memory.swap.max", 0))
        elif "memory" in self.kinds:
            yield from (("memory.limit_in_bytes", limits.memory), ("memory.memsw.limit_in_bytes", limits.memory))


@dataclass(frozen=True, kw_only=True)
class Cgroups:
    """What can be used of control groups, with the limits to set."""

    hierarchies: tuple[Hierarchy, ...] = ()
    limits: Limits
    missing: tuple[str, ...] = ()
    """What cannot be limited, and why: a sentence each."""

    def named(self, name: str) -> list[str]:
        """The directories of the groups of one replica, made or not."""
        return [str(hierarchy.parent / f"{PREFIX}{name}") for hierarchy in self.hierarchies]

    def make(self, name: str) -> None:
        """Makes the groups of one replica; raises OSError, and then there are none."""
        made: list[str] = []
        try:
            for hierarchy in self.hierarchies:
                made.append(hierarchy.make(f"{PREFIX}{name}", self.limits))
        except OSError:
            members.remove(made)
            raise


def found(limits: Limits) -> Cgroups:
    """What can be used here, tried out."""
    usable, reasons = [], dict.fromkeys(_KINDS, "this machine has no control group for it")
    for hierarchy in _hierarchies():
        try:
            if hierarchy.is_unified and hierarchy.kinds:
                enabled = " ".join(f"+{kind}" for kind in hierarchy.kinds)
                (hierarchy.parent / "cgroup.subtree_control").write_text(enabled)
            members.remove([hierarchy.make(f"{PREFIX}trial-{uuid.uuid4().hex}", limits)])
        except OSError as error:
            reasons.update(dict.fromkeys(hierarchy.kinds, f"{hierarchy.parent} cannot be used: {error.strerror}"))
        else:
            usable.append(hierarchy)
    limited = {kind for hierarchy in usable for kind in hierarchy.kinds}
    words = {"pids": "The number of a model's processes is not limited", "memory": "A model's memory is not limited"}
    missing = tuple(f"{words[kind]}: {reasons[kind]}." for kind in _KINDS if kind not in limited)
    return Cgroups(hierarchies=tuple(usable), limits=limits, missing=missing)


def memory_of_machine() -> int:
    """Bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_of(pid: int) -> tuple[int, int] | None:
    """How much memory the group of a replica's process uses and may use, in bytes; None where it has no limit.

    What is only kept of files in case they are read again is not counted: it makes room when there is need.
    """
    mounts = dict(_mounts())
    try:
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            mount = mounts.get(names)
            if mount is None or not Path(path).name.startswith(PREFIX):
                continue
            group, files = Path(f"{mount}{path}"), _MEMORY_FILES["" if not names else "memory"]
            if (group / files.limit).exists():
                kept = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())[files.kept]
                used, limit = ((group / name).read_text() for name in (files.used, files.limit))
                return max(int(used) - int(kept), 0), int(limit)
    except (OSError, ValueError, KeyError):
        pass  # it ends just now, or has no number for a limit
    return None


def _hierarchies() -> Iterator[Hierarchy]:
    mounts = dict(_mounts())
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        mount = mounts.get(names)
        if mount is None:
            continue
        parent = Path(f"{mount}{path}")
        if names:
            kinds = tuple(kind for kind in _KINDS if kind in names.split(","))
            if kinds:
                yield Hierarchy(parent=parent, kinds=kinds, is_unified=False)
        else:
            yield from _unified(parent)


def _unified(parent: Path) -> Iterator[Hierarchy]:
    try:
        available = (parent / "cgroup.controllers").read_text().split()
    except OSError:
        return
    yield Hierarchy(parent=parent, kinds=tuple(kind for kind in _KINDS if kind in available), is_unified=True)


def _mounts() -> Iterator[tuple[str, str]]:
    yield from mounted(Path("/proc/self/mountinfo").read_text())


def mounted(mountinfo: str) -> Iterator[tuple[str, str]]:
    """The controllers of each tree, as /proc/self/cgroup names them, and where its root is mounted."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        about, kinds = before.split(" "), after.split(" ")  # a source may be empty
        if len(about) < 5 or len(kinds) < 3:
            continue
        root, place = about[3:5]
        kind, _, options = kinds[:3]
        if kind == "cgroup2" and root == "/":
            yield "", place
        elif kind == "cgroup" and root == "/":
            # The controllers are the options that are not those of every file system.
            yield ",".join(option for option in options.split(",") if option not in ("rw", "ro", "xattr")), place
