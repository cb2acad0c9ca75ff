"""GPUs of replicas: given to one at a time, over restarts too, and measured. The program that finds them is a stand-in;
the replicas are real processes, which say what they were told."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servicekit import database
from servicekit.storage import StorageError
from serving_service import gpus, store
from serving_service.app import MIGRATIONS
from serving_service.gpu_loads import GpuLoads
from serving_service.gpu_pool import GpuPool, GpusImpossible, GpusTaken
from serving_service.gpus import Machine
from serving_service.model import ReplicaRecord, ServedEntity
from serving_service.nvidia_smi import Load
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import a_config_input, an_endpoint, an_entity, an_input
from tests.support.eventually import eventually
from tests.support.nvidia_smi import NvidiaSmi, a_gpu, nvidia_smi, uuid
from tests.support.secrets import data_directory, refusal, running_secrets
from tests.support.serving import RunningServing, ServingCaller, no_replicas, running_serving

# --- who has which --------------------------------------------------------------------------------------------------


def on_gpus(kind: str, **facts: Any) -> ServedEntity:
    return dataclasses.replace(an_entity(**facts), workload_type=kind)


@asynccontextmanager
async def running_pool(directory: Path, *, devices: int) -> AsyncIterator[GpuPool]:
    """A pool as it is after a start, with an endpoint whose replicas may have GPUs."""
    machine = Machine(has_driver=True, devices=tuple(uuid(number) for number in range(devices)))
    async with database.opened(directory / "serving.db", MIGRATIONS) as opened:
        if not await opened.read(store.all_ids):
            await opened.write(store.reserve_endpoint, an_endpoint())
            await opened.write(store.commit_endpoint, an_endpoint())
        yield GpuPool(opened, machine)


async def started(pool: GpuPool, replica_id: str, kind: str = "GPU_SMALL") -> tuple[str, ...] | None:
    await pool._database.write(store.add_replica, ReplicaRecord(replica_id, an_endpoint().id, 1, "churn"))
    return await pool.take(an_endpoint(), on_gpus(kind), replica_id)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from(["GPU_SMALL", "GPU_XLARGE", "MULTIGPU_MEDIUM", "CPU"])),
        st.tuples(st.sampled_from(["end", "forget"]), st.integers(0, 30)),
        st.just(("restart", "")),
    ),
    min_size=10,
    max_size=30,
)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
async def test_no_gpu_is_ever_two_replicas_own_and_none_is_lost(operations: list[tuple[str, Any]]) -> None:
    held: dict[str, tuple[str, ...]] = {}
    with data_directory() as directory:
        async with AsyncExitStack() as stack:
            pool = await stack.enter_async_context(running_pool(directory, devices=5))
            for number, (operation, argument) in enumerate(operations):
                if operation == "restart":
                    await stack.aclose()
                    pool = await stack.enter_async_context(running_pool(directory, devices=5))
                elif operation == "start":
                    needed, free = gpus.needed(argument), 5 - sum(map(len, held.values()))
                    try:
                        taken = await started(pool, f"r{number}", argument)
                    except GpusTaken:
                        assert free < needed
                    else:
                        assert taken is not None
                        assert len(taken) == needed <= free
                        held |= {f"r{number}": taken} if taken else {}
                elif held:
                    replica_id = sorted(held)[argument % len(held)]
                    if operation == "end":
                        await pool.give_back(replica_id)
                    else:
                        await pool._database.write(store.remove_replica, replica_id)
                    del held[replica_id]
                assert await pool.holders() == {each: tuple(sorted(devices)) for each, devices in held.items()}
                given_away = [device for devices in held.values() for device in devices]
                assert len(given_away) == len(set(given_away))


async def test_what_this_machine_cannot_give_is_said_with_what_helps(tmp_path: Path) -> None:
    async with running_pool(tmp_path, devices=2) as pool:
        with pytest.raises(GpusImpossible, match=r"takes 4 GPUs, and this machine had 2 GPUs .* another workload_type"):
            await started(pool, "r1", "MULTIGPU_MEDIUM")
        variables = {gpus.VISIBLE: "0"}
        with pytest.raises(GpusImpossible, match=r"CUDA_VISIBLE_DEVICES belongs to the platform .* without it"):
            await pool.take(an_endpoint(), on_gpus("CPU", environment=variables), "r2")


async def test_where_there_is_no_driver_nothing_is_said_of_gpus(tmp_path: Path) -> None:
    async with database.opened(tmp_path / "serving.db", MIGRATIONS) as opened:
        pool = GpuPool(opened, Machine())
        assert await pool.take(an_endpoint(), on_gpus("CPU", environment={gpus.VISIBLE: ""}), "r1") is None
        with pytest.raises(GpusImpossible, match="had 0 GPUs"):
            await pool.take(an_endpoint(), on_gpus("GPU_SMALL"), "r1")


async def test_loads_are_those_of_each_replicas_own_gpus_and_a_silent_driver_is_left_alone(tmp_path: Path) -> None:
    own, others = a_gpu(0), [a_gpu(each, **{"utilization.gpu": 25 * each}) for each in range(1, 5)]
    smi = nvidia_smi(tmp_path / "bin")
    now = [1_000.0]
    async with running_pool(tmp_path, devices=5) as pool:
        loads = GpuLoads(smi.program, pool, now=lambda: now[0])
        smi.has(status=1)
        assert await loads.look() == {}  # nobody has one, so nobody is asked
        smi.has(own, *others)
        await started(pool, "r1")
        await started(pool, "r2", "MULTIGPU_MEDIUM")
        assert await loads.look() == {"r1": Load(0.0, 0.0), "r2": Load(0.625, 0.0)}
        smi.has(status=1)
        assert await loads.look() == {}
        smi.has(a_gpu(0, **{"memory.used": 500}))
        now[0] += 299
        assert await loads.look() == {}
        now[0] += 2
        assert await loads.look() == {"r1": Load(0.0, 0.5), "r2": Load(None, None)}


async def test_while_the_database_fails_nothing_is_known_of_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise StorageError

    smi = nvidia_smi(tmp_path / "bin")
    smi.has(a_gpu(0))
    async with running_pool(tmp_path, devices=1) as pool:
        loads = GpuLoads(smi.program, pool)
        await started(pool, "r1")
        with monkeypatch.context() as broken:
            broken.setattr(store, "gpu_holders", fails)
            assert await loads.look() == {}
        assert await loads.look() == {"r1": Load(0.0, 0.0)}


# --- endpoints ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Host:
    """A machine with GPUs, and a platform that starts anew as often as one likes."""

    directory: Path
    smi: NvidiaSmi

    @asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[RunningServing, ServingCaller]]:
        async with (
            running_secrets(self.directory) as secrets,
            running_serving(self.directory, route_ack_seconds=0.3) as serving,
        ):
            yield serving, serving.public(secrets.admin_token)


@pytest.fixture
async def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Host]:
    """With two GPUs."""
    smi = nvidia_smi(tmp_path / "bin", a_gpu(0), a_gpu(1))
    monkeypatch.setenv("PATH", f"{smi.folder}{os.pathsep}{os.environ['PATH']}")
    with data_directory() as directory:
        async with no_replicas(directory):
            yield Host(directory, smi)


async def create(caller: ServingCaller, name: str, kind: Any = pb.GPU_SMALL, **fields: Any) -> None:
    entity = an_input("ready", name="one", workload_type=kind, **fields)
    request = pb.CreateServingEndpointRequest(name=name, config=a_config_input(entity))
    await caller(caller.stub.CreateServingEndpoint, request)


async def ready(caller: ServingCaller, name: str) -> None:
    def is_ready(endpoint: pb.ServingEndpointDetailed) -> bool:
        assert endpoint.state.config_update != pb.EndpointState.UPDATE_FAILED, endpoint
        return endpoint.state.ready == pb.EndpointState.READY

    await caller.until(name, is_ready, what=f"{name} is ready")


async def told(caller: ServingCaller, name: str) -> dict[str, Any]:
    """What the process behind an endpoint says of itself."""
    _, body = await caller.query(name)
    found: dict[str, Any] = json.loads(body)
    return found


async def visible(caller: ServingCaller, name: str) -> str:
    """The GPUs that the process behind an endpoint sees."""
    return str((await told(caller, name))["environment"][gpus.VISIBLE])


def message_of(endpoint: pb.ServingEndpointDetailed) -> str:
    return endpoint.pending_config.served_entities[0].state.deployment_state_message


async def test_each_replica_sees_its_own_gpus_and_whoever_has_none_sees_none(host: Host) -> None:
    async with host.running() as (_, admin):
        for name, kind in (("first", pb.GPU_SMALL), ("second", pb.GPU_LARGE), ("other", pb.CPU)):
            await create(admin, name, kind)
            await ready(admin, name)
        assert [await visible(admin, name) for name in ("first", "second", "other")] == [uuid(0), uuid(1), ""]
        endpoint = await admin.get("second")
        assert endpoint.config.served_entities[0].workload_type == pb.GPU_LARGE


async def test_who_finds_no_free_gpu_says_so_and_gets_the_first_that_is(host: Host) -> None:
    async with host.running() as (_, admin):
        for name in ("first", "second"):
            await create(admin, name)
            await ready(admin, name)
        await create(admin, "third")
        cause = "Phase start failed: A replica takes 1 GPU, and of the 2 of this machine too few are free. Stop or"
        waiting = await admin.until("third", lambda each: cause in message_of(each))
        assert waiting.pending_config.served_entities[0].state.deployment == pb.ServedEntityState.DEPLOYMENT_CREATING
        failed = [each for each in await admin.events("third") if each.outcome == pb.LaunchEvent.FAILED]
        assert {each.phase for each in failed} == {pb.LaunchEvent.START}
        assert cause in failed[0].message
        await admin.delete("first")
        await ready(admin, "third")
        assert {await visible(admin, name) for name in ("second", "third")} == {uuid(0), uuid(1)}


async def test_an_update_that_has_no_room_beside_what_it_replaces_says_what_helps(host: Host) -> None:
    host.smi.has(a_gpu(0))
    async with host.running() as (_, admin):
        await create(admin, "only")
        await ready(admin, "only")
        await admin.update("only", an_input("ready", version="2", name="one", workload_type=pb.GPU_SMALL))
        await admin.until("only", lambda each: "own replicas have 1" in message_of(each))
        assert await visible(admin, "only") == uuid(0)
        await admin.cancel("only")
        await admin.stop("only")
        await admin.update("only", an_input("ready", version="2", name="one", workload_type=pb.GPU_SMALL))
        await ready(admin, "only")
        assert await visible(admin, "only") == uuid(0)


async def test_what_replicas_have_is_known_after_a_restart_and_free_when_they_end(host: Host) -> None:
    async with host.running() as (_, admin):
        await create(admin, "first")
        await ready(admin, "first")
    async with host.running() as (serving, admin):
        await create(admin, "second")
        await ready(admin, "second")
        before = await told(admin, "first")
        assert (before["environment"][gpus.VISIBLE], await visible(admin, "second")) == (uuid(0), uuid(1))
        # The one that takes the place of a dead one gets what that one had: there is no other.
        os.kill(before["pid"], signal.SIGKILL)

        async def is_replaced() -> bool:
            return before["pid"] not in (await serving.replicas()).values() and len(await serving.replicas()) == 2

        await eventually(is_replaced, within=60)
        await ready(admin, "first")
        assert await visible(admin, "first") == uuid(0)


@pytest.mark.parametrize("killed", ["model", "shim"])
async def test_what_ended_while_nobody_looked_has_given_its_gpu_back(host: Host, killed: str) -> None:
    host.smi.has(a_gpu(0))
    async with host.running() as (serving, admin):
        await create(admin, "only")
        await ready(admin, "only")
        ((replica_id, process),) = (await serving.replicas()).items()
        lock = Path(serving.launcher._directory, replica_id, "lock")
    os.kill(process if killed == "model" else json.loads(lock.read_bytes())["pid"], signal.SIGKILL)
    async with host.running() as (serving, admin):

        async def is_replaced() -> bool:
            return list((await serving.replicas()).values()) not in ([], [process])

        await eventually(is_replaced, within=60)
        await ready(admin, "only")
        assert await visible(admin, "only") == uuid(0)


async def test_a_launch_that_fails_keeps_no_gpu(host: Host) -> None:
    host.smi.has(a_gpu(0))
    async with host.running() as (_, admin):
        failing = an_input("failing", name="one", workload_type=pb.GPU_SMALL)
        request = pb.CreateServingEndpointRequest(name="bad", config=a_config_input(failing))
        await admin(admin.stub.CreateServingEndpoint, request)
        await admin.until("bad", lambda each: each.state.config_update == pb.EndpointState.UPDATE_FAILED)
        await create(admin, "good")
        await ready(admin, "good")
        assert await visible(admin, "good") == uuid(0)


async def test_what_the_machine_cannot_give_is_refused_by_field(host: Host) -> None:
    async with host.running() as (_, admin):
        refused = await refusal(create(admin, "one", pb.MULTIGPU_MEDIUM))
        assert refused.message.startswith("config.served_entities[0].workload_type: a replica of MULTIGPU_MEDIUM takes")
        assert "Use one of CPU, GPU_SMALL" in refused.message
        refused = await refusal(create(admin, "one", environment_vars={gpus.VISIBLE: "0"}))
        assert refused.message.startswith("config.served_entities[0].environment_vars: CUDA_VISIBLE_DEVICES belongs")
        assert await admin.names() == []


async def test_the_use_of_gpus_is_exported_where_there_are_any(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving_service.consumption.SAMPLE_SECONDS", 0.1)
    host.smi.has(a_gpu(0, **{"utilization.gpu": 40, "memory.used": 250}), a_gpu(1))
    async with host.running() as (_, admin):
        for name, kind in (("with", pb.GPU_SMALL), ("without", pb.CPU)):
            await create(admin, name, kind)
            await ready(admin, name)

        async def exported(name: str) -> list[str]:
            request = pb.ExportServingEndpointMetricsRequest(name=name)
            answer = await admin(admin.stub.ExportServingEndpointMetrics, request)
            return [line for line in answer.data.decode().splitlines() if line.startswith("gpu_")]

        async def is_known() -> bool:
            lines = await exported("with")
            return [line.rpartition(" ")[2] for line in lines] == ["40.0", "25.0"]

        await eventually(is_known, within=60, what="the loads of the GPU")
        names = [line.partition("{")[0] for line in await exported("with")]
        assert names == ["gpu_usage_percentage", "gpu_memory_usage_percentage"]
        assert await exported("without") == []
