"""Who may reach an RPC, read from its descriptor; the gateway builds its routes from it.

The rule: each RPC says exactly one of three things, and one that says none or several stops the process at its start,
so that nothing is ever reachable because somebody forgot to say otherwise. The policy's row of an RPC, from which
listeners are built, must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from google.api import annotations_pb2
from google.protobuf.descriptor import MethodDescriptor

from tessera.options.v1 import options_pb2


class Audience(Enum):
    """The three ways to expose an RPC; the value says it in words."""

    REST = "public over REST and gRPC"
    GRPC_ONLY = "public over gRPC only"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Exposure:
    """How one RPC is exposed; `callers` names the peers that may call an internal one and is empty for a public one."""

    audience: Audience
    callers: frozenset[str] = frozenset()


REST = Exposure(Audience.REST)
GRPC_ONLY = Exposure(Audience.GRPC_ONLY)


def internal(*callers: str) -> Exposure:
    """The exposure of an RPC that only these peers may call."""
    return Exposure(Audience.INTERNAL, frozenset(callers))


def is_read(method: MethodDescriptor) -> bool:
    """Whether a public RPC only reads, which the verb of its route says: it may be called again, and as often."""
    options = method.GetOptions()
    rule = options.Extensions[annotations_pb2.http]
    return options.HasExtension(annotations_pb2.http) and rule.WhichOneof("pattern") == "get"


def exposure(method: MethodDescriptor) -> Exposure:
    """What the options of `method` say; raises ValueError, naming the RPC, when they say nothing or several things."""
    options = method.GetOptions()
    callers = options.Extensions[options_pb2.internal_to]
    said: list[Exposure] = []
    if options.HasExtension(annotations_pb2.http):
        said.append(REST)
    if options.Extensions[options_pb2.grpc_only]:
        said.append(GRPC_ONLY)
    if callers:
        said.append(internal(*callers))
    if len(said) != 1:
        found = " and ".join(one.audience.value for one in said) or "nothing"
        raise ValueError(
            f"RPC {method.full_name} needs exactly one of google.api.http, grpc_only and internal_to; it says {found}."
        )
    return said[0]
