"""Where a request comes from, for the log: the peer's address, or what a trusted proxy says about it.

The rule: anybody can write a forwarding header, so one is believed only as far as each hop that added to it is a proxy
that the operator named. Nothing but the log depends on it: neither who calls nor the address that we are known under.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

FORWARDED_FOR = "x-forwarded-for"
FORWARDED_PROTO = "x-forwarded-proto"


IPV6_NETWORK = 64
"""Bits of an address of version 6 that tell who it belongs to; the others are its owner's to choose."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a request comes from."""

    address: str
    """An IP address, or `unknown`."""

    scheme: str
    """`https` or `http`: how it came over the first stretch that we know of."""

    def fields(self) -> dict[str, str]:
        """For an event in the log."""
        return {"source": self.address, "scheme": self.scheme}


def networks(text: str) -> tuple[Network, ...]:
    """Addresses and networks, separated by commas; raises ValueError for what is neither, and for everybody."""
    found = []
    for part in text.split(","):
        try:
            network = ipaddress.ip_network(part.strip())
        except ValueError:
            raise ValueError(
                f"expected addresses or networks such as 10.0.0.7 or 10.0.0.0/8, with commas between, not {part!r}"
            ) from None
        if network.prefixlen == 0:
            raise ValueError(f"{part.strip()} is everybody, and whoever is trusted may claim any address")
        found.append(network)
    return tuple(found)


def source(
    peer: str,
    scheme: str,
    *,
    forwarded_for: Sequence[str] = (),
    forwarded_proto: Sequence[str] = (),
    trusted: Sequence[Network] = (),
) -> Source:
    """The source of a request that `peer`, an IP address, sent over `scheme`.

    `forwarded_for` and `forwarded_proto` are the values of these headers in the order in which they came, `trusted` the
    proxies that are believed.
    """
    address = _peer(peer)
    if address is None or not _is_in(address, trusted):
        return _immediate(peer, scheme)
    # Each proxy adds its own peer on the right, so what is further left was there before and may be made up.
    hops = [hop for value in forwarded_for for hop in value.split(",")]
    while hops and _is_in(address, trusted):
        before = _parsed(hops.pop())
        if before is None:
            break
        address = before
    told = ",".join(forwarded_proto).rpartition(",")[2].strip().lower()
    return Source(str(address), told if told in ("http", "https") else scheme)


@lru_cache(maxsize=1_024)
def _immediate(peer: str, scheme: str) -> Source:
    address = _peer(peer)
    return Source("unknown" if address is None else str(address), scheme)


def is_trusted(peer: str, trusted: Sequence[Network]) -> bool:
    """Whether a peer, an IP address, is a proxy that is believed."""
    address = _peer(peer)
    return address is not None and _is_in(address, trusted)


def is_address(text: str) -> bool:
    """Whether a text is an IP address, or `unknown`: the `address` of a Source."""
    try:
        return text == "unknown" or str(ipaddress.ip_address(text)) == text
    except ValueError:
        return False


@lru_cache(maxsize=1_024)
def owner(address: str) -> str:
    """The part of an address that its owner cannot choose; a text that is none as it is."""
    parsed = _parsed(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, IPV6_NETWORK), strict=False))
    return address if parsed is None else str(parsed)


def grpc_peer(peer: str) -> str:
    """The address in gRPC's name for a peer, such as `ipv6:%5B::1%5D:50051`."""
    return unquote(peer).partition(":")[2]


def _parsed(text: str) -> Address | None:
    """An IP address, also with a port as some proxies write it; without its zone, which is any text."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # How a listener for both families names a caller of the older one.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


# Of the other end of a connection, which is short and asked for with each of its requests; not of headers.
_peer = lru_cache(maxsize=1_024)(_parsed)


def _is_in(address: Address, trusted: Sequence[Network]) -> bool:
    return any(address in network for network in trusted)
