"""What launches did when, and why they failed: the same cause wherever it is shown, and no gap between two phases."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serving_service import controller, probes, store, timeline
from serving_service.model import ModelVersion
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import an_input
from tests.support.eventually import eventually
from tests.support.platform import running_pair
from tests.support.secrets import RunningSecrets, data_directory, running_secrets
from tests.support.serving import MannerRegistry, RunningServing, ServingCaller, no_replicas, running_serving

REFERENCE = "{{secrets/team/api.key}}"

PHASES = ("MODEL_DOWNLOAD", "ENVIRONMENT_BUILD", "REFERENCE", "START", "LOAD", "READINESS")


class Stuck(MannerRegistry):
    """A registry whose downloads do not end."""

    async def fetch(self, model: ModelVersion) -> Path:
        await asyncio.Event().wait()
        raise AssertionError


class Broken(MannerRegistry):
    """A registry on a disk that is full; counts how often it is asked for files."""

    fetches = 0

    async def fetch(self, model: ModelVersion) -> Path:
        self.fetches += 1
        raise OSError(28, "No space left on device")


@dataclass(frozen=True)
class Platform:
    """Both services."""

    secrets: RunningSecrets
    serving: RunningServing

    @property
    def admin(self) -> ServingCaller:
        return self.serving.public(self.secrets.admin_token)

    async def lose_replicas(self) -> None:
        """Kills every model server."""
        for pid in (await self.serving.replicas()).values():
            os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def running_platform(directory: Path, **changes: Any) -> AsyncIterator[Platform]:
    async with running_pair(directory, **changes) as (secrets, serving):
        yield Platform(secrets, serving)


@pytest.fixture
async def platform() -> AsyncIterator[Platform]:
    with data_directory() as directory:
        async with running_platform(directory) as found:
            yield found


@pytest.fixture
def admin(platform: Platform) -> ServingCaller:
    return platform.admin


def told(event: pb.LaunchEvent) -> tuple[str, str, str]:
    """Entity, phase and outcome."""
    return (
        event.served_entity_name,
        pb.LaunchEvent.Phase.Name(event.phase),
        pb.LaunchEvent.Outcome.Name(event.outcome),
    )


async def events_until(admin: ServingCaller, last: tuple[str, str, str]) -> list[pb.LaunchEvent]:
    """The events of demo, once one like this is the last of them."""
    found: list[pb.LaunchEvent] = []

    async def is_there() -> bool:
        found[:] = await admin.events("demo")
        return bool(found) and told(found[-1]) == last

    await eventually(is_there, what=str(last))
    return found


def message_of(endpoint: pb.ServingEndpointDetailed) -> str:
    config = endpoint.pending_config if endpoint.HasField("pending_config") else endpoint.config
    return config.served_entities[0].state.deployment_state_message


async def test_phases_of_a_launch_follow_each_other_without_a_gap(admin: ServingCaller) -> None:
    created = await admin.create("demo")
    await admin.settled("demo")
    events = await events_until(admin, ("ready-1", "READINESS", "SUCCEEDED"))
    assert [told(event) for event in events] == [("ready-1", phase, "SUCCEEDED") for phase in PHASES]
    assert len({event.replica_id for event in events}) == 1
    assert {event.config_version for event in events} == {1}
    for before, after in itertools.pairwise(events):
        assert before.start_time + before.duration_ms == after.start_time
    assert events[0].start_time >= created.creation_timestamp
    assert sum(event.duration_ms for event in events) > 0


async def test_cause_of_a_failure_is_the_same_in_state_events_and_log(
    admin: ServingCaller, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        await admin.create("demo", "failing", environment={"SAID": "the weights are missing"})
        cause = message_of(await admin.settled("demo"))
        events = await events_until(admin, ("failing-1", "LOAD", "FAILED"))
    assert cause.startswith("Phase load failed: KeyError: the weights are missing. Its log says more.")
    assert events[-1].message == cause
    (record,) = [record for record in caplog.records if record.message == "configuration failed"]
    assert record.__dict__["causes"] == {"failing-1": cause}


async def test_model_server_that_dies_fails_while_loading(admin: ServingCaller) -> None:
    await admin.create("demo", "dying")
    cause = message_of(await admin.settled("demo"))
    assert cause.startswith("Phase load failed: ")
    assert "status 3" in cause


@pytest.mark.parametrize(
    ("loss", "phase", "says"),
    [
        ("key", "reference", "Put the secret."),
        ("scope", "reference", "Create the scope."),
        ("right", "permission", "User maker does not have READ permission on scope"),
    ],
)
async def test_secret_that_is_lost_is_said_with_its_phase_and_what_helps(
    platform: Platform, loss: str, phase: str, says: str
) -> None:
    owner = platform.secrets.admin
    await owner.create_user("maker")
    await owner.create_scope("team")
    await owner.put("team", "api.key", "value")
    await owner.grant("team", "maker", secrets_pb2.READ)
    maker = platform.serving.public(await platform.secrets.token_for("maker"))
    await maker.create("demo", environment={"KEY": REFERENCE})
    await maker.settled("demo")
    if loss == "key":
        await owner.delete("team", "api.key")
    elif loss == "scope":
        await owner(owner.secrets.DeleteScope, secrets_pb2.DeleteScopeRequest(scope="team"))
    else:
        await owner(owner.secrets.DeleteAcl, secrets_pb2.DeleteAclRequest(scope="team", principal="maker"))
    await platform.lose_replicas()
    found = await maker.until("demo", lambda endpoint: f"Phase {phase} failed: " in message_of(endpoint))
    assert says in message_of(found)
    assert "KEY of served entity 'ready-1'" in message_of(found)
    events = await events_until(maker, ("ready-1", phase.upper(), "FAILED"))
    assert events[-1].message in message_of(found)


async def test_phase_that_goes_on_is_seen_with_its_duration_and_told_to_the_log(
    admin: ServingCaller, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "BEAT_SECONDS", 0.05)
    with caplog.at_level(logging.INFO):
        await admin.create("demo", "slow")
        first = await events_until(admin, ("slow-1", "LOAD", "RUNNING"))
        assert "Phase load, for 0 s: " in first[-1].message

        async def goes_on() -> bool:
            (event,) = [event for event in await admin.events("demo") if told(event)[2] == "RUNNING"]
            is_same = event.start_time == first[-1].start_time
            return is_same and bool(event.duration_ms > first[-1].duration_ms)

        await eventually(goes_on)
        found = await admin.get("demo")
        assert message_of(found).startswith("Phase load, for ")

        def is_told() -> bool:
            beats = [record for record in caplog.records if record.message == "launch goes on"]
            return [record.__dict__["phase"] for record in beats].count("load") > 1

        await eventually(is_told)


async def test_launch_that_is_not_wanted_any_more_is_abandoned(admin: ServingCaller) -> None:
    await admin.create("demo", "slow")
    await events_until(admin, ("slow-1", "LOAD", "RUNNING"))
    await admin.cancel("demo")
    await events_until(admin, ("slow-1", "LOAD", "ABANDONED"))


async def test_events_are_there_after_a_restart_and_gone_with_their_endpoint() -> None:
    with data_directory() as directory:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(no_replicas(directory))
            secrets = await stack.enter_async_context(running_secrets(directory))
            async with running_serving(directory) as serving:
                admin = serving.public(secrets.admin_token)
                await admin.create("demo", "slow")
                before = await events_until(admin, ("slow-1", "LOAD", "RUNNING"))
                stored = before[:-1]

                async def are_stored() -> bool:
                    with closing(sqlite3.connect(directory / "serving" / "serving.db")) as connection:
                        return bool(connection.execute("SELECT count(*) FROM events").fetchone()[0] == len(stored))

                await eventually(are_stored)
            async with running_serving(directory) as serving:
                admin = serving.public(secrets.admin_token)
                after = await events_until(admin, ("slow-1", "LOAD", "RUNNING"))
                assert after[:-1] == stored
                assert abs(after[-1].start_time - before[-1].start_time) < 5_000
                await admin.delete("demo")
                await admin.create("demo", None)
                assert await admin.events("demo") == []


async def test_events_are_bounded_in_number(admin: ServingCaller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_EVENTS", 5)
    await admin.create("demo", environment={"A": "1"})
    await admin.settled("demo")
    await admin.update("demo", an_input("ready", version="2"))
    await admin.settled("demo")
    events = await events_until(admin, ("ready-2", "READINESS", "SUCCEEDED"))

    async def are_few() -> bool:
        return len(await admin.events("demo")) == 5

    await eventually(are_few)
    assert [told(event)[1] for event in events[-5:]] == list(PHASES[-5:])


# Deadlines


async def test_download_that_takes_too_long_fails_with_its_cause() -> None:
    with data_directory() as directory:
        async with running_platform(directory, registry=Stuck(directory), download_deadline=0.2) as platform:
            await platform.admin.create("demo")
            cause = message_of(await platform.admin.settled("demo"))
            assert cause.startswith("Phase model download failed: It took longer than the 0.2 s")
            assert "TESSERA_DOWNLOAD_DEADLINE_SECONDS" in cause
            await events_until(platform.admin, ("ready-1", "MODEL_DOWNLOAD", "FAILED"))


async def test_download_that_cannot_be_kept_is_tried_again_and_said() -> None:
    with data_directory() as directory:
        registry = Broken(directory)
        async with running_platform(directory, registry=registry) as platform:
            await platform.admin.create("demo")
            says = "Phase model download failed: The model's files cannot be kept: No space left on device."
            await platform.admin.until("demo", lambda endpoint: says in message_of(endpoint))
            await eventually(lambda: registry.fetches >= 2, what="another download")
            assert (await platform.admin.get("demo")).state.config_update == pb.EndpointState.IN_PROGRESS


async def test_model_that_loads_too_long_is_ended_and_the_update_fails_with_its_cause() -> None:
    with data_directory() as directory:
        async with running_platform(directory, load_deadline=0.3) as platform:
            await platform.admin.create("demo", "slow")
            cause = message_of(await platform.admin.settled("demo"))
            assert cause.startswith("Phase load failed: It took longer than the 0.3 s")
            assert "TESSERA_LOAD_DEADLINE_SECONDS" in cause
            events = await events_until(platform.admin, ("slow-1", "LOAD", "FAILED"))
            assert events[-1].message == cause
            assert await platform.serving.replicas() == {}


async def test_model_server_that_says_it_is_ready_and_does_not_answer_never_gets_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "READINESS_SECONDS", 0.3)
    with data_directory() as directory:
        async with running_platform(directory) as platform:
            await platform.admin.create("demo", "mute")
            cause = message_of(await platform.admin.settled("demo"))
            assert "Phase readiness failed: The model server says that it is ready and does not answer" in cause
            events = await platform.admin.events("demo")
            assert ("mute-1", "READINESS", "FAILED") in map(told, events)
            assert ("mute-1", "READINESS", "SUCCEEDED") not in map(told, events)


async def test_replica_that_hangs_is_ended_and_started_again_with_its_cause(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "PERIOD_SECONDS", 0.05)
    monkeypatch.setattr(controller, "STOP_GRACE_SECONDS", 0.1)
    with data_directory() as directory, caplog.at_level(logging.INFO):
        async with running_platform(directory, liveness_deadline=0.5) as platform:
            await platform.admin.create("demo")
            await platform.admin.settled("demo")
            before = await platform.serving.replicas()
            for pid in before.values():
                os.kill(pid, signal.SIGSTOP)

            async def is_another() -> bool:
                return bool((found := await platform.serving.replicas()) and not found.keys() & before.keys())

            await eventually(is_another)
            await platform.admin.until("demo", lambda endpoint: endpoint.state.ready == pb.EndpointState.READY)
    (ended,) = [
        each for each in caplog.records if each.message == "replica ended" and each.__dict__["replica"] in before
    ]
    assert "has not answered for the 0.5 s that TESSERA_LIVENESS_DEADLINE_SECONDS allows" in ended.__dict__["cause"]


async def test_update_that_is_overdue_says_so_in_its_events_too() -> None:
    with data_directory() as directory:
        async with running_platform(directory, deploy_deadline=5.0) as platform:
            await platform.admin.create("demo", "slow")
            cause = message_of(await platform.admin.settled("demo"))
            assert "not ready in time" in cause
            assert "Phase load: " in cause
            events = await events_until(platform.admin, ("slow-1", "LOAD", "FAILED"))
            assert events[-1].message == cause
