"""What a shim is told: one JSON document in one frame over an inherited pipe; nothing over argv or the environment.

A frame is four bytes of length (big-endian) and then that many bytes of JSON: a writer that dies half way is noticed.
"""

import json
import struct
from dataclasses import asdict, dataclass, field
from typing import BinaryIO

from serving_service.shim.confinement import Confinement

_LENGTH = struct.Struct(">I")


class IncompleteSpecError(Exception):
    """The pipe ended before the whole document had arrived; nothing may be started from it."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One launch, as the shim needs it."""

    replica_id: str
    epoch: int
    """Of the Serving that starts it; see `control`."""
    directory: str
    """The replica's own 0700 directory; the shim removes it when the replica is dismissed."""
    lock_fd: int
    """The inherited, already locked `directory/lock`: locked before there is a shim, so that it is never ownerless."""
    working_directory: str
    command: list[str]
    """An absolute program and its arguments; `{listen_fd}` and `{report_fd}` become numbers."""
    environment: dict[str, str] = field(repr=False)
    """The whole environment of the model process."""
    masked_values: list[str] = field(repr=False)
    """Secret values that must not be kept when the model prints them."""
    confinement: Confinement
    supervisor_lock: str | None
    """The lock file of `tessera up`, or None when nobody supervises."""
    orphan_seconds: float
    """How long the supervisor's lock may be free before the replica ends."""
    idle_seconds: float
    """Without a supervisor: how long nobody may have asked before the replica ends."""
    log_bytes: int
    log_line_bytes: int

    def to_frame(self) -> bytes:
        document = json.dumps(asdict(self)).encode()
        return _LENGTH.pack(len(document)) + document


def read_spec(pipe: BinaryIO) -> Spec:
    """Reads one frame; raises IncompleteSpecError when the pipe ends early."""
    document = _read_exactly(pipe, _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))[0])
    content = json.loads(document)
    return Spec(**{**content, "confinement": Confinement(**content["confinement"])})


def _read_exactly(pipe: BinaryIO, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise IncompleteSpecError(f"the launch document ended after {len(data)} of {size} bytes")
    return data
