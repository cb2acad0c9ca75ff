"""How many replicas are wanted: the bounds by table, the decision by stories, and what must hold in all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_service.scaling import REPLICA_CONCURRENCY, Bounds, Need, Patience, Scaling, bounds
from tests.support.builders import a_config, an_entity

QUIET, IDLE = 300.0, 1800.0
PATIENCE = Patience(quiet=QUIET, idle=IDLE)
MEDIUM: dict[str, Any] = {"workload_size": "Medium"}
SLEEPY: dict[str, Any] = {"workload_size": "Medium", "scale_to_zero": True}


def scaling(ready: int = 0, *, version: int = 1, **fields: Any) -> Scaling:
    """The scaling of an endpoint with one entity, of which so many replicas are ready at second 0."""
    followed = Scaling(PATIENCE)
    config = a_config(version)
    entity = dataclasses.replace(an_entity(), **fields)
    followed.follow(dataclasses.replace(config, entities=(entity,)), {"churn": ready}, 0.0)
    return followed


def wanted(scaling: Scaling, now: float, ready: int, live: int | None = None) -> int:
    return scaling.wanted("churn", ready=ready, live=ready if live is None else live, now=now)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"workload_size": "Small"}, Bounds(1, 1)),
        (MEDIUM, Bounds(2, 4)),
        ({"workload_size": "Large"}, Bounds(4, 16)),
        (SLEEPY, Bounds(0, 4)),
        ({"workload_size": "", "min_concurrency": 8, "max_concurrency": 24}, Bounds(2, 6)),
        ({"workload_size": "", "min_concurrency": 0, "max_concurrency": 8}, Bounds(0, 2)),
        ({"workload_size": "", "min_concurrency": 8, "max_concurrency": 24, "scale_to_zero": True}, Bounds(0, 6)),
        ({"workload_size": "", "min_concurrency": 0}, Bounds(0, 1)),
        ({"workload_size": "", "min_concurrency": 12}, Bounds(3, 3)),
        ({"workload_size": "", "max_concurrency": 12}, Bounds(1, 3)),
    ],
)
def test_the_compute_fields_say_how_many_there_are(fields: dict[str, Any], expected: Bounds) -> None:
    assert bounds(dataclasses.replace(an_entity(), **fields)) == expected


def test_more_are_wanted_at_once_and_fewer_after_a_quiet_time() -> None:
    medium = scaling(2, **MEDIUM)
    assert wanted(medium, 1.0, ready=2) == 2
    medium.loaded("churn", 4 * 2 + 1, 10.0)
    assert wanted(medium, 10.0, ready=2) == 3
    medium.loaded("churn", 1_000, 20.0)
    assert wanted(medium, 20.0, ready=3) == 4
    medium.loaded("churn", 1, 30.0)
    assert wanted(medium, 30.0 + QUIET - 1, ready=4) == 4
    assert wanted(medium, 30.0 + QUIET, ready=4) == 2


def test_a_peak_within_the_quiet_time_keeps_what_it_needed() -> None:
    medium = scaling(2, **MEDIUM)
    for now, load in ((0.0, 16), (10.0, 1), (200.0, 12), (210.0, 0)):
        medium.loaded("churn", load, now)
    assert wanted(medium, 10.0 + QUIET, ready=4) == 3
    assert wanted(medium, 210.0 + QUIET, ready=3) == 2


def test_what_may_be_at_zero_goes_there_after_an_idle_time_and_sleeps() -> None:
    sleepy = scaling(1, **SLEEPY)
    sleepy.loaded("churn", 1, 50.0)
    sleepy.loaded("churn", 0, 100.0)
    assert wanted(sleepy, 100.0 + IDLE - 1, ready=1) == 1
    assert not sleepy.is_asleep("churn")
    assert sleepy.next_change(500.0) == 100.0 + IDLE
    assert wanted(sleepy, 100.0 + IDLE, ready=1) == 0
    assert sleepy.is_asleep("churn")
    assert sleepy.next_change(100.0 + IDLE) is None


def test_any_number_of_callers_wakes_it_with_one_launch() -> None:
    sleepy = scaling(0, **SLEEPY)
    assert wanted(sleepy, 0.0, ready=0) == 0
    sleepy.loaded("churn", 100, 1.0)
    assert wanted(sleepy, 1.0, ready=0) == 1
    assert sleepy.is_asleep("churn"), "it is awake once it answers"
    assert wanted(sleepy, 30.0, ready=1) == 4, "and then there may be more"
    assert not sleepy.is_asleep("churn")


def test_a_launch_goes_on_when_its_callers_have_left_and_what_it_brought_up_is_kept_for_the_idle_time() -> None:
    sleepy = scaling(0, **SLEEPY)
    sleepy.loaded("churn", 1, 1.0)
    sleepy.loaded("churn", 0, 2.0)
    assert wanted(sleepy, 2.0, ready=0, live=1) == 1
    assert wanted(sleepy, 10.0, ready=1) == 1
    assert wanted(sleepy, 10.0 + IDLE - 1, ready=1) == 1
    assert wanted(sleepy, 10.0 + IDLE, ready=1) == 0


def test_what_cannot_be_woken_is_not_tried_again_for_nobody() -> None:
    sleepy = scaling(0, **SLEEPY)
    sleepy.loaded("churn", 3, 1.0)
    sleepy.not_woken("churn", "no key")
    sleepy.loaded("churn", 0, 2.0)
    assert wanted(sleepy, 3.0, ready=0) == 0
    assert sleepy.problem("churn") == "no key"
    sleepy.loaded("churn", 1, 50.0)
    assert wanted(sleepy, 50.0, ready=0) == 1
    assert sleepy.problem("churn") == "no key"
    assert wanted(sleepy, 60.0, ready=1) == 1
    assert sleepy.problem("churn") == ""


def test_one_that_was_about_to_go_to_zero_stays_when_somebody_asks() -> None:
    sleepy = scaling(1, **SLEEPY)
    assert wanted(sleepy, IDLE, ready=1) == 0
    assert wanted(sleepy, IDLE + 1, ready=1) == 0, "it is not its own predecessor that wakes it"
    sleepy.loaded("churn", 1, IDLE + 2)
    assert wanted(sleepy, IDLE + 2, ready=1) == 1
    assert not sleepy.is_asleep("churn")


def test_what_was_awake_and_lost_its_replicas_is_started_again_without_a_caller() -> None:
    sleepy = scaling(1, **SLEEPY)
    assert wanted(sleepy, IDLE * 9, ready=0) == 1
    assert not sleepy.is_asleep("churn")
    assert wanted(scaling(2, **MEDIUM), IDLE * 9, ready=0) == 2


def test_a_version_that_has_just_been_activated_is_not_asleep_and_its_predecessor_is_forgotten() -> None:
    sleepy = scaling(0, **SLEEPY)
    entity = dataclasses.replace(an_entity(), **SLEEPY)
    sleepy.follow(dataclasses.replace(a_config(2), entities=(entity,)), {"churn": 1}, 500.0)
    assert not sleepy.is_asleep("churn")
    assert wanted(sleepy, 500.0 + IDLE - 1, ready=1) == 1
    assert wanted(sleepy, 500.0 + IDLE, ready=1) == 0


sizes = st.builds(lambda lower, more: Bounds(lower, max(lower + more, 1)), st.integers(0, 4), st.integers(0, 12))
stories = st.lists(st.tuples(st.integers(0, 80), st.floats(0.1, 2 * IDLE)), min_size=1, max_size=20)


@given(sizes, stories)
def test_whatever_the_load_the_bounds_hold_and_nothing_that_is_needed_is_missing(
    size: Bounds, story: list[tuple[int, float]]
) -> None:
    followed = scaling(
        size.first,
        workload_size="",
        min_concurrency=size.lower * REPLICA_CONCURRENCY,
        max_concurrency=size.upper * REPLICA_CONCURRENCY,
    )
    now = 0.0
    ready = size.first
    for load, seconds in story:
        followed.loaded("churn", load, now)
        ready = wanted(followed, now, ready=ready)
        assert size.lower <= ready <= size.upper
        if not followed.is_asleep("churn"):
            assert ready * REPLICA_CONCURRENCY >= min(load, size.upper * REPLICA_CONCURRENCY)
        now += seconds


@given(stories)
def test_nothing_changes_before_the_moment_that_is_said_to_be_the_next(story: list[tuple[int, float]]) -> None:
    need, now = Need(), 0.0
    for load, seconds in story:
        need = need.after(load, now, most=20)
        kept, change = need.kept(PATIENCE, now), need.next_change(PATIENCE, now)
        assert (change is None) == (kept == 0)
        if change is not None:
            assert change > now
            assert need.kept(PATIENCE, (now + change) / 2) == kept
            assert need.after(0, now, most=20).kept(PATIENCE, change) < kept
        now += seconds


@given(stories)
def test_what_is_kept_is_the_most_that_was_needed_within_the_quiet_time(story: list[tuple[int, float]]) -> None:
    patience = Patience(quiet=QUIET, idle=QUIET)
    need, now, seen = Need(), 0.0, [(0.0, 0.0, 0)]
    for load, seconds in story:
        need = need.after(load, now, most=100)
        seen.append((now, now + seconds, -(-load // REPLICA_CONCURRENCY)))
        now += seconds
        assert need.kept(patience, now) == max(count for start, end, count in seen if now < end + QUIET or end == now)
