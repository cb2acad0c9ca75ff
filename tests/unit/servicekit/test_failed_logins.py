"""How many wrong credentials of an address are answered as such, on a clock of the test's own."""

from __future__ import annotations

import logging

import pytest

from servicekit import pace
from servicekit.errors import ServiceError, Unauthenticated
from servicekit.failed_logins import FailedLogins, TooManyFailures
from servicekit.identity import InvalidToken
from servicekit.source import Source


class Guesses:
    """Somebody who fails, with a clock that stands still between."""

    def __init__(self, per_minute: int = 10) -> None:
        self.time = 1_000.0
        self._logins = FailedLogins(per_minute, now=lambda: self.time)

    def fail(self, address: str = "192.0.2.1", error: ServiceError | None = None) -> ServiceError:
        return self._logins.refusal(error or InvalidToken(), Source(address, "https"), {"request_id": "r"})

    def wait_told(self, address: str = "192.0.2.1") -> int | None:
        """The seconds that the next failure is told to wait, if it is one too many."""
        refused = self.fail(address)
        return refused.retry_after if isinstance(refused, TooManyFailures) else None


def test_twenty_at_once_and_then_ten_a_minute() -> None:
    guesses = Guesses()
    assert [guesses.wait_told() for _ in range(20)] == [None] * 20
    assert [guesses.wait_told() for _ in range(1_000)] == [6] * 1_000, "asking does not make it longer"
    guesses.time += 5.5
    assert guesses.wait_told() == 1
    guesses.time += 0.5
    assert [guesses.wait_told(), guesses.wait_told()] == [None, 6]
    guesses.time += 60
    assert [guesses.wait_told() for _ in range(11)] == [None] * 10 + [6]
    guesses.time += 1_000
    assert [guesses.wait_told() for _ in range(21)] == [None] * 20 + [6]


def test_addresses_are_counted_apart_and_networks_of_version_6_together() -> None:
    guesses = Guesses(1)
    assert [guesses.wait_told("192.0.2.1") for _ in range(3)] == [None, None, 60]
    assert guesses.wait_told("192.0.2.2") is None
    own = [f"2001:db8:0:1::{number:x}" for number in range(3)]
    assert [guesses.wait_told(address) for address in own] == [None, None, 60]
    assert guesses.wait_told("2001:db8:0:2::1") is None
    assert guesses.wait_told("unknown") is None


def test_to_send_no_credential_is_answered_the_same_for_ever() -> None:
    guesses = Guesses(1)
    missing = Unauthenticated()
    assert all(guesses.fail(error=missing) is missing for _ in range(100))


def test_no_limit() -> None:
    guesses = Guesses(0)
    assert not any(guesses.wait_told() for _ in range(1_000))


def test_who_failed_the_longest_ago_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MOST_KEPT", 2)
    guesses = Guesses(1)
    for address in ("a", "a", "b", "b"):
        guesses.fail(address)
    assert (guesses.wait_told("a"), guesses.wait_told("b")) == (60, 60)
    guesses.fail("c")
    assert (guesses.wait_told("b"), guesses.wait_told("a")) == (60, None)


def test_the_log_is_told_of_the_burst_and_then_once(caplog: pytest.LogCaptureFixture) -> None:
    guesses = Guesses()
    with caplog.at_level(logging.INFO):
        for _ in range(1_000):
            guesses.fail()
    messages = [record.message for record in caplog.records]
    assert messages.count("credential refused") == 20
    assert len(messages) == 21
