"""Limits of use: which of them hold for whom, that no minute sees more than they say, and how counts are shared."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.context import Principal
from servicekit.rate_limits import WINDOW_SECONDS, Bucket, Ledger, Limits, RateLimited
from tessera.serving.v1 import serving_pb2 as pb

ADA = Principal("1", "ada@example.com", frozenset({"users", "team"}), "t", None)
BOB = Principal("2", "bob@example.com", frozenset({"users"}), "t", None)
JOB = Principal("3", "app-id", frozenset({"users"}), "t", None, kind="service_principal")


class Clock:
    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def limits(*rules: pb.AiGatewayRateLimit) -> Limits:
    return Limits("e", rules)


def rule(key: str = "endpoint", principal: str = "", **most: int) -> pb.AiGatewayRateLimit:
    return pb.AiGatewayRateLimit(renewal_period="minute", key=key, principal=principal, **most)


def admitted(ledger: Ledger, configured: Limits, caller: Principal, *, attempts: int = 50) -> int:
    """How many of so many calls are let through."""
    count = 0
    for _ in range(attempts):
        try:
            ledger.admit(configured, caller)
        except RateLimited:
            continue
        count += 1
    return count


def by_callers(configured: Limits, callers: Iterable[Principal] = (ADA, BOB, JOB)) -> list[int]:
    ledger = Ledger(now=Clock())
    return [admitted(ledger, configured, caller) for caller in callers]


# Which limits hold for whom


def test_a_limit_of_the_endpoint_is_for_all_callers_together() -> None:
    assert by_callers(limits(rule(calls=5))) == [5, 0, 0]
    assert by_callers(limits(rule(key="", calls=5))) == [5, 0, 0]


def test_a_limit_for_users_is_each_callers_own() -> None:
    assert by_callers(limits(rule("user", calls=5))) == [5, 5, 5]


def test_a_limit_for_one_goes_before_that_for_every_user() -> None:
    for_ada = rule("user", "Ada@Example.com", calls=7)
    for_job = rule("service_principal", "app-id", calls=1)
    assert by_callers(limits(rule("user", calls=5), for_ada, for_job)) == [7, 5, 1]


def test_a_group_shares_its_limit_and_who_has_an_own_one_does_not_take_part() -> None:
    group = rule("user_group", "users", calls=9)
    assert by_callers(limits(group)) == [9, 0, 0]
    assert by_callers(limits(group, rule("user", calls=1))) == [9, 0, 0]
    assert by_callers(limits(group, rule("user", "ada@example.com", calls=2))) == [2, 9, 0]


def test_who_is_in_several_groups_may_ask_while_one_of_them_has_something_left() -> None:
    configured = limits(rule("user_group", "team", calls=2), rule("user_group", "users", calls=3))
    assert by_callers(configured) == [5, 0, 0]
    assert by_callers(configured, (BOB, ADA)) == [3, 2]


def test_calls_and_tokens_are_limited_apart() -> None:
    """A limit by name for tokens leaves the calls to the limit for every user."""
    configured = limits(rule("user", calls=3), rule("user", "ada@example.com", tokens=10))
    ledger = Ledger(now=Clock())
    ledger.admit(configured, ADA).tokens(9)
    ledger.admit(configured, ADA).tokens(9)
    with pytest.raises(RateLimited, match="10 tokens"):
        ledger.admit(configured, ADA)
    assert admitted(ledger, configured, BOB) == 3


def test_all_limits_hold_at_once_and_a_refused_call_counts_for_none() -> None:
    configured = limits(rule(calls=6), rule("user", calls=4))
    ledger = Ledger(now=Clock())
    assert admitted(ledger, configured, ADA) == 4
    assert admitted(ledger, configured, BOB) == 2


def test_none_are_let_through_where_none_are_allowed() -> None:
    assert by_callers(limits(rule("user", calls=0))) == [0, 0, 0]
    assert by_callers(limits(rule(tokens=0))) == [0, 0, 0]


def test_a_limit_that_changes_knows_what_was_used_before() -> None:
    ledger = Ledger(now=Clock())
    assert admitted(ledger, limits(rule("user", calls=5)), ADA) == 5
    assert admitted(ledger, limits(rule("user", "ada@example.com", calls=8)), ADA) == 3
    assert admitted(ledger, limits(rule("user", calls=5)), ADA) == 0


def test_without_limits_nothing_is_counted() -> None:
    ledger = Ledger(now=Clock())
    assert admitted(ledger, limits(), ADA) == 50
    assert len(ledger) == 0


# Time


def test_a_refusal_says_when_it_is_worth_while_to_ask_again() -> None:
    clock = Clock(100.25)
    ledger = Ledger(now=clock)
    configured = limits(rule(calls=2))
    ledger.admit(configured, ADA)
    clock.now = 110.5
    ledger.admit(configured, ADA)
    with pytest.raises(
        RateLimited, match=r"^Exceeded the rate limit of 2 calls per minute for this endpoint"
    ) as refused:
        ledger.admit(configured, ADA)
    assert refused.value.reason == "REQUEST_LIMIT_EXCEEDED"
    assert refused.value.retry_after is not None
    clock.now += refused.value.retry_after
    ledger.admit(configured, ADA)
    with pytest.raises(RateLimited):
        ledger.admit(configured, ADA)


@pytest.mark.parametrize("readings", range(6))
def test_a_use_that_leaves_the_minute_while_it_is_decided_is_waited_for_no_longer(readings: int) -> None:
    configured, times = limits(rule(calls=1)), [0.5]
    ledger = Ledger(now=lambda: times.pop(0) if len(times) > 1 else times[0])
    ledger.admit(configured, ADA)
    times[:] = [60.9] * readings + [61.1]
    waits = []
    try:
        ledger.admit(configured, ADA)
    except RateLimited as refused:
        waits.append(refused.retry_after)
    assert waits in ([], [1])


def test_an_overdrawn_budget_of_tokens_admits_nobody_until_it_is_renewed() -> None:
    clock = Clock()
    ledger = Ledger(now=clock)
    configured = limits(rule(tokens=10))
    ledger.admit(configured, ADA).tokens(500)
    clock.now += WINDOW_SECONDS - 1
    with pytest.raises(RateLimited):
        ledger.admit(configured, BOB)
    clock.now += 2
    assert ledger.admit(configured, BOB).wants_tokens


STEPS = st.lists(st.tuples(st.floats(0, 40), st.integers(1, 8)), max_size=40)


@given(STEPS, st.integers(0, 9), st.floats(0, 1))
def test_no_minute_sees_more_calls_than_the_limit_and_none_is_refused_without_need(
    steps: list[tuple[float, int]], most: int, start: float
) -> None:
    clock = Clock(1_000 + start)
    ledger = Ledger(now=clock)
    times: list[float] = []
    for pause, attempts in steps:
        clock.now += pause
        for _ in range(attempts):
            try:
                ledger.admit(limits(rule(calls=most)), ADA)
            except RateLimited:
                assert sum(clock.now - each < WINDOW_SECONDS + 1 for each in times) >= most
            else:
                times.append(clock.now)
    for each in times:
        assert sum(each <= other < each + WINDOW_SECONDS for other in times) <= most


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), min_size=1, max_size=60))
def test_only_what_was_used_of_late_takes_memory(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    ledger = Ledger(now=clock)
    used: dict[str, float] = {}
    for pause, number in steps:
        clock.now += pause
        caller = Principal(str(number), f"u{number}", frozenset(), "t", None)
        ledger.admit(limits(rule("user", calls=1_000)), caller)
        used[caller.id] = clock.now
        recent = sum(clock.now - at <= 2 * WINDOW_SECONDS + 1 for at in used.values())
        assert len(ledger) <= recent


# Several that admit


def test_what_one_admits_the_others_know_once_it_was_told() -> None:
    clock = Clock()
    one, two = Ledger(now=clock), Ledger(now=clock)
    configured = limits(rule(calls=10))
    with one.feed(lambda: None, own_only=True) as feed:
        assert admitted(one, configured, ADA, attempts=4) == 4
        two.learn(feed.take())
        assert feed.take() == []
        assert admitted(two, configured, ADA) == 6


def test_hearing_the_same_again_or_ones_own_changes_nothing() -> None:
    clock = Clock()
    one, two = Ledger(now=clock), Ledger(now=clock)
    configured = limits(rule(calls=10))
    assert admitted(one, configured, ADA, attempts=4) == 4
    for _ in range(3):
        with one.feed(lambda: None, own_only=True) as feed:
            uses = feed.take()
        two.learn(uses)
        one.learn(uses)
    assert admitted(two, configured, ADA) == 6
    with two.feed(lambda: None, own_only=False) as feed:
        one.learn(feed.take())
    assert admitted(one, configured, ADA) == 0


def test_who_starts_anew_learns_from_another_what_was_used() -> None:
    clock = Clock()
    gone, between, anew = (Ledger(now=clock) for _ in range(3))
    configured = limits(rule(calls=10))
    assert admitted(gone, configured, ADA, attempts=7) == 7
    with gone.feed(lambda: None, own_only=True) as feed:
        between.learn(feed.take())
    with between.feed(lambda: None, own_only=False) as feed:
        feed.without = anew.source
        anew.learn(feed.take())
    assert admitted(anew, configured, ADA) == 3


def test_nobody_is_told_their_own_counts() -> None:
    clock = Clock()
    one, two = Ledger(now=clock), Ledger(now=clock)
    one.use(Bucket("e", "endpoint", "", "calls"), 1)
    with one.feed(lambda: None, own_only=True) as feed:
        two.learn(feed.take())
    with two.feed(lambda: None, own_only=False) as feed:
        feed.without = one.source
        assert feed.take() == []
    with two.feed(lambda: None, own_only=True) as feed:
        assert feed.take() == []


def test_a_follower_is_woken_once_for_all_that_there_is_to_tell() -> None:
    woken: list[None] = []
    ledger = Ledger(now=Clock())
    with ledger.feed(lambda: woken.append(None), own_only=True) as feed:
        for _ in range(2):
            assert admitted(ledger, limits(rule(calls=100)), ADA, attempts=5) == 5
        assert len(woken) == 1
        assert [use.amount for use in feed.take()] == [10]
        ledger.admit(limits(rule(calls=100)), ADA)
    ledger.admit(limits(rule(calls=100)), ADA)
    assert len(woken) == 2


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.booleans(), st.floats(0, 5)), max_size=40),
    st.integers(1, 12),
)
def test_several_exceed_a_limit_by_no_more_than_what_was_not_told_yet(
    steps: list[tuple[int, int, bool, float]], most: int
) -> None:
    clock = Clock()
    ledgers = [Ledger(now=clock) for _ in range(3)]
    configured = limits(rule(calls=most))
    times: list[float] = []
    untold = [0, 0, 0]
    worst = 0
    for who, attempts, is_told, pause in steps:
        count = admitted(ledgers[who], configured, ADA, attempts=attempts)
        times += [clock.now] * count
        untold[who] += count
        worst = max(worst, sum(untold))
        if is_told:
            for one in ledgers:
                with one.feed(lambda: None, own_only=True) as feed:
                    uses = feed.take()
                for other in ledgers:
                    other.learn(uses)
            untold = [0, 0, 0]
        clock.now += pause
    for each in times:
        assert sum(each <= other < each + WINDOW_SECONDS for other in times) <= most + worst
