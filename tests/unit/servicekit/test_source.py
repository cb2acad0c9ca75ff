"""Where a request comes from: a forwarding header counts only as far as trusted proxies wrote it."""

from __future__ import annotations

import pytest

from servicekit.source import Source, grpc_peer, networks, source

PROXIES = networks("10.0.0.0/8, fd00::/8")


def told(peer: str, *forwarded_for: str, proto: tuple[str, ...] = ()) -> str:
    found = source(peer, "http", forwarded_for=forwarded_for, forwarded_proto=proto, trusted=PROXIES)
    return f"{found.scheme} {found.address}"


def test_stranger_is_not_believed() -> None:
    assert told("192.0.2.1", "198.51.100.9", proto=("https",)) == "http 192.0.2.1"


def test_trusted_proxy_is_believed() -> None:
    assert told("10.0.0.1", "198.51.100.9", proto=("https",)) == "https 198.51.100.9"
    assert told("fd00::1", "2001:db8::9") == "http 2001:db8::9"
    assert told("10.0.0.1") == "http 10.0.0.1"


@pytest.mark.parametrize(
    "forwarded_for",
    [("203.0.113.66, 198.51.100.9",), ("203.0.113.66", "198.51.100.9"), ("203.0.113.66,198.51.100.9, 10.0.0.2",)],
    ids=["one line", "two lines", "two proxies"],
)
def test_what_was_there_before_the_first_proxy_is_not_believed(forwarded_for: tuple[str, ...]) -> None:
    assert told("10.0.0.1", *forwarded_for) == "http 198.51.100.9"


def test_chain_of_proxies_alone_ends_at_the_farthest() -> None:
    assert told("10.0.0.1", "10.0.0.3, 10.0.0.2") == "http 10.0.0.3"


@pytest.mark.parametrize("nonsense", ["", "unknown", "198.51.100.9; drop", "1" * 5000, "fd00::1]"])
def test_nonsense_ends_the_chain_at_the_last_good_hop(nonsense: str) -> None:
    assert told("10.0.0.1", f"203.0.113.66, {nonsense}, 10.0.0.2") == "http 10.0.0.2"


@pytest.mark.parametrize(
    ("hop", "address"),
    [
        ("198.51.100.9:4711", "198.51.100.9"),
        ("[2001:db8::9]:4711", "2001:db8::9"),
        ("::ffff:198.51.100.9", "198.51.100.9"),
        ("fe80::9%eth0\n", "fe80::9"),
    ],
)
def test_address_is_found_in_each_form_that_proxies_write(hop: str, address: str) -> None:
    assert told("10.0.0.1", hop) == f"http {address}"


def test_peer_on_a_listener_for_both_families_is_known_by_its_own_address() -> None:
    assert told("::ffff:10.0.0.1", "198.51.100.9") == "http 198.51.100.9"


def test_only_the_nearest_proxys_word_on_the_scheme_counts_and_only_if_it_is_one() -> None:
    assert told("10.0.0.1", proto=("http, HTTPS",)) == "https 10.0.0.1"
    assert told("10.0.0.1", proto=("https", "gopher")) == "http 10.0.0.1"


def test_peer_without_address_is_unknown() -> None:
    assert source("", "http", forwarded_for=["10.0.0.1"], forwarded_proto=[], trusted=PROXIES) == Source(
        "unknown", "http"
    )


@pytest.mark.parametrize(
    ("peer", "address"), [("ipv4:127.0.0.1:4711", "127.0.0.1"), ("ipv6:%5B::1%5D:4711", "::1"), ("unix:", "unknown")]
)
def test_peer_of_grpc_is_understood(peer: str, address: str) -> None:
    assert told(grpc_peer(peer)) == f"http {address}"


def test_networks_are_read_from_a_list() -> None:
    assert [str(network) for network in networks("10.0.0.7,10.1.0.0/16, fd00::/8")] == [
        "10.0.0.7/32",
        "10.1.0.0/16",
        "fd00::/8",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("proxy.example", "expected addresses or networks"),
        ("10.0.0.1/8", "expected addresses or networks"),
        ("10.0.0.1,,10.0.0.2", "expected addresses or networks"),
        ("0.0.0.0/0", "is everybody"),
        ("::/0", "is everybody"),
    ],
)
def test_list_with_a_mistake_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        networks(text)
