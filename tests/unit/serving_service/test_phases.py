"""Phases of launches: no gap between two of them, and causes that say phase, problem and what helps."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_service import phases
from serving_service.phases import LaunchPhase, Step


@given(st.lists(st.integers(0, 10_000_000), max_size=10))
def test_durations_add_up_to_the_time_that_passed(durations: list[int]) -> None:
    first = step = Step(phase=LaunchPhase.START, began=1000.0, started_at=5_000)
    for duration in durations:
        step = step.next(LaunchPhase.LOAD, duration)
    assert step.started_at == first.started_at + sum(durations)
    assert step.began == pytest.approx(first.began + sum(durations) / 1000)


def test_what_began_before_this_process_is_older_than_it() -> None:
    step = phases.since(LaunchPhase.LOAD, time.time() - 90)
    assert step.duration >= 90_000
    assert step.message.startswith("Phase load, for 9")
    # A clock that was set back makes nobody wait longer.
    assert phases.since(LaunchPhase.LOAD, time.time() + 1_000).duration < 1_000


@pytest.mark.parametrize("phase", LaunchPhase)
def test_every_phase_says_what_it_does_and_what_failed(phase: LaunchPhase) -> None:
    assert phases.doing(phase).startswith(f"Phase {phase}: ")
    assert phases.failed(phase, "No such file").startswith(f"Phase {phase} failed: No such file.")


def test_a_sentence_gets_one_full_stop_and_what_helps() -> None:
    helps = "Its log says more. Mend the model or its variables, then update the endpoint."
    assert phases.failed(LaunchPhase.LOAD, "It ended.") == f"Phase load failed: It ended. {helps}"
    assert phases.failed(LaunchPhase.START, "Why?") == "Phase start failed: Why?"
