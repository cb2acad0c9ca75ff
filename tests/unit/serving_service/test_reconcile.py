"""The plan: by table for each situation, and by simulation for what must hold in all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_service.reconcile import (
    GOOD_SECONDS,
    Activate,
    Desired,
    FailUpdate,
    Observed,
    Phase,
    Replica,
    Retry,
    StartReplica,
    StopReplica,
    Wanted,
    after_end,
    after_wait,
    next_look,
    plan,
)

V1, V2 = Wanted(1, {"a": 1}), Wanted(2, {"a": 1, "b": 1})
DEADLINE = 1000.0

CREATING = Desired(is_updating=True, pending=V2, deadline=DEADLINE)
UPDATING = Desired(is_updating=True, active=V1, pending=V2, deadline=DEADLINE)
SERVING = Desired(active=V2)
FAILED = Desired(active=V1, pending=V2)
STOPPED = Desired(active=V2, is_stopped=True)
STARTED = Desired(active=V1, is_stopped=True, is_updating=True, pending=V2, deadline=DEADLINE)
SCALED = Desired(active=Wanted(2, {"a": 3}))
AT_ZERO = Desired(active=Wanted(2, {"a": 0}))
WIDE = Desired(is_updating=True, pending=Wanted(2, {"a": 2}), deadline=DEADLINE)
DELETED = Desired(is_deleted=True, active=V1, pending=V2, is_updating=True)


def replica(id: str, entity: str = "a", version: int = 2, phase: Phase = Phase.READY, **facts: Any) -> Replica:
    return Replica(id=id, version=version, entity=entity, phase=phase, **facts)


OLD = replica("old", version=1)
STARTING, READY, ENDED = Phase.STARTING, Phase.READY, Phase.ENDED


@pytest.mark.parametrize(
    ("desired", "replicas", "actions"),
    [
        pytest.param(Desired(), [], [], id="an endpoint without configuration needs nothing"),
        pytest.param(CREATING, [], [StartReplica(2, "a"), StartReplica(2, "b")], id="every entity is started"),
        pytest.param(CREATING, [replica("1", phase=STARTING)], [StartReplica(2, "b")], id="no entity is started twice"),
        pytest.param(CREATING, [replica("1"), replica("2", "b", phase=STARTING)], [], id="all must be ready"),
        pytest.param(CREATING, [replica("1"), replica("2", "b")], [Activate(2)], id="when all are ready, switch"),
        pytest.param(UPDATING, [OLD], [StartReplica(2, "a"), StartReplica(2, "b")], id="the new runs beside the old"),
        pytest.param(UPDATING, [OLD, replica("1"), replica("2", "b")], [Activate(2)], id="the old goes on till then"),
        pytest.param(
            UPDATING,
            [OLD, replica("1"), replica("2", "b", phase=ENDED, is_final=True, message="no key")],
            [FailUpdate(2, (("b", "no key"),))],
            id="what the process itself reports is final",
        ),
        pytest.param(
            UPDATING,
            [OLD, replica("1"), replica("2", "b", phase=ENDED)],
            [StartReplica(2, "b")],
            id="an accident is not",
        ),
        pytest.param(
            FAILED,
            [OLD, replica("1"), replica("2", "b", phase=ENDED, is_final=True)],
            [StopReplica("1", keep_log=True)],
            id="after a failure the siblings stop and every log is kept",
        ),
        pytest.param(
            SERVING,
            [OLD, replica("1"), replica("2", "b")],
            [StopReplica("old")],
            id="after the switch the old one stops",
        ),
        pytest.param(
            SERVING,
            [dataclasses.replace(OLD, is_stopping=True), replica("1"), replica("2", "b")],
            [],
            id="but once only",
        ),
        pytest.param(
            SERVING,
            [replica("1", phase=ENDED), replica("2", "b")],
            [StartReplica(2, "a")],
            id="a dead one is restarted",
        ),
        pytest.param(
            SERVING,
            [replica("1", phase=ENDED), replica("3", phase=STARTING), replica("2", "b")],
            [],
            id="its log is kept until its successor is ready",
        ),
        pytest.param(
            SERVING,
            [replica("1", phase=ENDED), replica("3"), replica("2", "b")],
            [StopReplica("1")],
            id="and no longer",
        ),
        pytest.param(
            SERVING,
            [replica("1", phase=ENDED), replica("3", phase=ENDED), replica("2", "b")],
            [StartReplica(2, "a"), StopReplica("1")],
            id="of several dead ones the newest is kept",
        ),
        pytest.param(
            STOPPED,
            [replica("1"), replica("2", "b", phase=STARTING)],
            [StopReplica("1", keep_log=True), StopReplica("2", keep_log=True)],
            id="stopped: all stop and every log is kept",
        ),
        pytest.param(STOPPED, [replica("1", phase=ENDED)], [], id="and nothing is started again"),
        pytest.param(
            STARTED, [], [StartReplica(2, "a"), StartReplica(2, "b")], id="started again: only the new version runs"
        ),
        pytest.param(SCALED, [replica("1")], [StartReplica(2, "a")] * 2, id="as many are started as are missing"),
        pytest.param(
            SCALED, [replica("1"), replica("2", phase=STARTING)], [StartReplica(2, "a")], id="what starts is counted"
        ),
        pytest.param(
            SCALED,
            [replica("1"), replica("2", is_stopping=True), replica("3"), replica("4")],
            [],
            id="what is being stopped is not",
        ),
        pytest.param(
            SERVING,
            [replica("1", phase=STARTING), replica("2"), replica("3"), replica("4", "b")],
            [StopReplica("1"), StopReplica("3")],
            id="of too many, what still starts goes first, then the newest",
        ),
        pytest.param(WIDE, [replica("1"), replica("2", phase=STARTING)], [], id="an update needs all its replicas"),
        pytest.param(WIDE, [replica("1"), replica("2")], [Activate(2)], id="and switches when it has them"),
        pytest.param(
            AT_ZERO,
            [replica("1"), replica("2"), replica("3", phase=STARTING)],
            [StopReplica("1"), StopReplica("2"), StopReplica("3", keep_log=True)],
            id="to zero: all stop and the newest log is kept",
        ),
        pytest.param(AT_ZERO, [replica("1", phase=ENDED)], [], id="at zero nothing is started"),
        pytest.param(
            Desired(pending=Wanted(2, {"a": 3})),
            [replica("1"), replica("2", phase=ENDED, is_final=True), replica("3")],
            [StopReplica("1"), StopReplica("3")],
            id="after a failure the log of what failed is kept, not that of its equals",
        ),
        pytest.param(DELETED, [OLD, replica("1")], [StopReplica("old"), StopReplica("1")], id="deleted: all stop"),
    ],
)
def test_plan(desired: Desired, replicas: list[Replica], actions: list[Any]) -> None:
    assert plan(desired, Observed(replicas=tuple(replicas)), now=0.0) == actions


def test_a_back_off_is_waited_for_and_no_longer() -> None:
    observed = Observed(replicas=(replica("2", "b"),), retries={(2, "a"): Retry(2, 10.0, "it ended")})
    assert plan(SERVING, observed, now=9.9) == []
    assert next_look(SERVING, observed, now=9.9) == 10.0
    assert plan(SERVING, observed, now=10.0) == [StartReplica(2, "a")]


def test_what_failed_shows_with_one_replica_that_it_works_again() -> None:
    retries = {(2, "a"): Retry(2, 10.0, "it ended")}
    assert plan(SCALED, Observed(retries=retries), now=10.0) == [StartReplica(2, "a")]
    assert plan(SCALED, Observed(replicas=(replica("1", phase=STARTING),), retries=retries), now=10.0) == []
    assert plan(SCALED, Observed(replicas=(replica("1"),), retries=retries), now=10.0) == [StartReplica(2, "a")] * 2


def test_an_update_that_is_not_ready_in_time_fails_with_what_it_was_doing() -> None:
    observed = Observed(
        replicas=(OLD, replica("1"), replica("2", "b", phase=STARTING, message="Loading the model.")),
        retries={(2, "b"): Retry(1, 0.0, "Secrets was gone.")},
    )
    assert next_look(UPDATING, observed, now=5.0) == DEADLINE
    assert plan(UPDATING, observed, now=DEADLINE - 1) == []
    (failure,) = plan(UPDATING, observed, now=DEADLINE)
    assert isinstance(failure, FailUpdate)
    assert [name for name, _ in failure.causes] == ["b"]
    assert "Loading the model." in failure.causes[0][1]


def test_an_update_that_waits_for_secrets_fails_in_the_end_and_says_so() -> None:
    observed = Observed(retries={(2, "a"): Retry(0, 2000.0, "Secrets is gone."), (2, "b"): Retry(0, 2000.0, "Same.")})
    (failure,) = plan(CREATING, observed, now=DEADLINE)
    assert isinstance(failure, FailUpdate)
    assert "Secrets is gone." in dict(failure.causes)["a"]


def test_restarts_come_at_once_then_later_and_later_and_at_once_again_after_good_minutes() -> None:
    retry, delays = None, []
    for _ in range(8):
        retry = after_end(retry, ready_seconds=5.0, message="", now=100.0)
        delays.append(retry.not_before - 100.0)
    assert delays == [0, 10, 20, 40, 80, 160, 300, 300]
    assert after_end(retry, ready_seconds=GOOD_SECONDS, message="", now=100.0).not_before == 100.0


def test_the_patient_wait_even_the_first_time() -> None:
    retry, delays = None, []
    for _ in range(3):
        retry = after_end(retry, ready_seconds=0.0, message="", now=100.0, is_patient=True)
        delays.append(retry.not_before - 100.0)
    assert delays == [10, 20, 40]


def test_waiting_for_a_neighbour_backs_off_gently_and_is_no_failure_of_the_model() -> None:
    retry, delays = None, []
    for _ in range(7):
        retry = after_wait(retry, message="", now=0.0)
        delays.append(retry.not_before)
    assert delays == [1, 2, 4, 8, 16, 30, 30]
    assert after_end(retry, ready_seconds=0.0, message="", now=0.0).not_before == 0.0


class World:
    """A simulated launcher and database: actions change it at once, and it checks that each was safe."""

    def __init__(self, desired: Desired) -> None:
        self.desired = desired
        self.replicas: dict[str, Replica] = {}
        self.retries: dict[tuple[int, str], Retry] = {}
        self.now = 0.0
        self.count = 0

    def observed(self) -> Observed:
        return Observed(replicas=tuple(self.replicas.values()), retries=self.retries)

    def is_serving(self) -> bool:
        """Whether every entity that is not at zero has a replica that answers."""
        active = self.desired.active
        return active is not None and all(
            self.observed().ready(active.version, entity) for entity, count in active.replicas.items() if count
        )

    def step(self) -> int:
        """One pass; how many actions it took."""
        actions = plan(self.desired, self.observed(), self.now)
        for action in actions:
            was_serving = self.is_serving()
            self.carry_out(action)
            is_to_serve = not (self.desired.is_deleted or self.desired.is_stopped)
            assert not is_to_serve or not was_serving or self.is_serving(), action
        return len(actions)

    def carry_out(self, action: Any) -> None:
        match action:
            case StartReplica(version, entity):
                wanted = next(w for w in (self.desired.active, self.desired.pending) if w and w.version == version)
                assert self.observed().live(version, entity) < wanted.replicas[entity], "more than the planned surge"
                self.count += 1
                self.replicas[str(self.count)] = replica(str(self.count), entity, version, Phase.STARTING)
            case Activate(version):
                assert self.desired.pending is not None
                assert self.observed().is_ready(self.desired.pending)
                self.desired = dataclasses.replace(
                    self.desired, active=self.desired.pending, pending=None, is_updating=False, is_stopped=False
                )
            case FailUpdate():
                self.desired = dataclasses.replace(self.desired, is_updating=False)
            case StopReplica(replica_id, keep_log):
                if keep_log:
                    self.replicas[replica_id] = dataclasses.replace(self.replicas[replica_id], phase=Phase.ENDED)
                else:
                    del self.replicas[replica_id]

    def happen(self, event: str, number: int) -> None:
        """Something that the controller does not decide."""
        self.now += 1.0
        live = [r for r in self.replicas.values() if r.is_live]
        if event == "update" and not self.desired.is_updating and not self.desired.is_deleted:
            version = max([each.version for each in (self.desired.active, self.desired.pending) if each] or [0]) + 1
            replicas = dict.fromkeys(("a", "b", "c")[: 1 + number % 3], 1 + number // 3)
            self.desired = dataclasses.replace(
                self.desired, pending=Wanted(version, replicas), is_updating=True, deadline=self.now + 50.0
            )
        elif event == "scale" and self.desired.active is not None:
            active = self.desired.active
            entity = sorted(active.replicas)[number % len(active.replicas)]
            changed = Wanted(active.version, {**active.replicas, entity: number})
            self.desired = dataclasses.replace(self.desired, active=changed)
        elif event == "stop" and not self.desired.is_updating and self.desired.active is not None:
            self.desired = dataclasses.replace(self.desired, pending=None, is_stopped=True)
        elif event == "cancel":
            self.desired = dataclasses.replace(self.desired, is_updating=False)
        elif event == "delete" and number == 0:
            self.desired = dataclasses.replace(self.desired, is_deleted=True)
        elif live and event in ("ready", "fail", "die"):
            chosen = live[number % len(live)]
            was_ready = chosen.phase is Phase.READY
            if event == "ready":
                self.replicas[chosen.id] = dataclasses.replace(chosen, phase=Phase.READY)
            else:
                self.replicas[chosen.id] = dataclasses.replace(
                    chosen, phase=Phase.ENDED, is_final=event == "fail" and not was_ready
                )
                key = (chosen.version, chosen.entity)
                self.retries[key] = after_end(self.retries.get(key), ready_seconds=0, message="", now=self.now)

    def settle(self) -> None:
        """Everything that starts gets ready; ends when there is nothing left to do."""
        for _ in range(50):
            self.now += 1000.0
            for each in list(self.replicas.values()):
                if each.phase is Phase.STARTING:
                    self.replicas[each.id] = dataclasses.replace(each, phase=Phase.READY)
            if self.step() == 0:
                return
        raise AssertionError("the plan does not come to an end")


events = st.lists(
    st.tuples(
        st.sampled_from(
            ["update", "ready", "ready", "fail", "die", "stop", "scale", "scale", "cancel", "delete", "pass"]
        ),
        st.integers(0, 5),
    ),
    max_size=40,
)


@given(events)
@settings(max_examples=300)
def test_whatever_happens_what_serves_goes_on_serving_and_the_plan_comes_to_an_end(
    story: list[tuple[str, int]],
) -> None:
    world = World(Desired())
    for event, number in story:
        world.happen(event, number)
        world.step()
    world.desired = dataclasses.replace(world.desired, deadline=float("inf"))
    world.settle()
    live = sorted((r.version, r.entity) for r in world.replicas.values() if r.is_live)
    active = world.desired.active
    if world.desired.is_deleted:
        assert world.replicas == {}
    else:
        assert not world.desired.is_updating
        wanted = active if active is not None and not world.desired.is_stopped else Wanted(0, {})
        assert live == sorted((wanted.version, entity) for entity, n in wanted.replicas.items() for _ in range(n))
