"""How much replicas use: from samples to percent, and from processes to samples."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from serving_service.consumption import Consumption, Sample, average
from serving_service.nvidia_smi import Load
from tests.support.exhaustion import no_descriptor_left, out_of_descriptors

PROCESSORS = len(os.sched_getaffinity(0))

PROGRAM = """
import os, sys
if os.fork() == 0:
    os.setsid()
data = bytearray(64 << 20)
os.write(1, b"here\\n")
os.read(0, 1)
"""
"""Two processes with 64 MiB each, one of them in a session of its own, until their standard input closes."""


def test_average_is_that_of_the_time_between_the_samples_and_of_all_replicas() -> None:
    busy = [Sample(0, 10, 0.25), Sample(30, 10 + 30 * PROCESSORS, 0.75)]
    idle = [Sample(0, 5, 0.1), Sample(60, 5, 0.1)]
    usage = average([busy, idle])
    assert usage.cpu == pytest.approx(50)
    assert usage.memory == pytest.approx(30)


def test_one_sample_says_nothing_of_processors() -> None:
    usage = average([[Sample(0, 10, 0.5)]])
    assert (usage.cpu, usage.memory) == (None, 50)


def test_end_of_a_process_does_not_give_time_back() -> None:
    assert average([[Sample(0, 10, 0.5), Sample(1, 2, 0.5)]]).cpu == 0


def test_nothing_is_known_without_a_replica() -> None:
    usage = average([])
    assert (usage.cpu, usage.memory) == (None, None)


def test_gpus_count_where_something_is_known_of_them() -> None:
    busy = [Sample(0, 1, 0.1, Load(0.5, 0.25)), Sample(9, 1, 0.1, Load(None, None)), Sample(10, 1, 0.1, Load(1, 0.75))]
    usage = average([busy, [Sample(0, 1, 0.1)]])
    assert usage.gpu == pytest.approx(75)
    assert usage.gpu_memory == pytest.approx(50)
    usage = average([[Sample(0, 1, 0.1)]])
    assert (usage.gpu, usage.gpu_memory) == (None, None)


async def test_all_processes_of_a_replica_count() -> None:
    pipe = asyncio.subprocess.PIPE
    program = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, stdin=pipe, stdout=pipe)
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        assert [await program.stdout.readline() for _ in range(2)] == [b"here\n"] * 2
        running = {"r": program.pid}
        consumption = Consumption(lambda: running, memory_limit=1 << 30)
        await consumption.sample()
        memory = consumption.of(["r"]).memory
        assert memory is not None
        assert memory >= 100 * 128 / 1024
        running.clear()
        await consumption.sample()
        assert consumption.of(["r"]).memory is None
    finally:
        program.stdin.close()
        await program.communicate()


async def test_process_that_is_gone_is_no_trouble() -> None:
    consumption = Consumption(lambda: {"r": 2**22 + 1}, memory_limit=1)
    await consumption.sample()
    assert consumption.of(["r"]).cpu is None


async def test_without_a_descriptor_left_nothing_is_known_and_the_next_look_is_as_good_as_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    consumption = Consumption(lambda: {"r": os.getpid()}, memory_limit=1 << 30)
    with no_descriptor_left():
        await consumption.sample()
    assert [record.message for record in caplog.records] == ["what replicas use is not known"]
    assert consumption.of(["r"]).memory is None
    await consumption.sample()
    assert consumption.of(["r"]).memory is not None


async def test_a_process_that_cannot_be_read_is_not_taken_for_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    consumption = Consumption(lambda: {"r": os.getpid()}, memory_limit=1 << 30)
    monkeypatch.setattr(Path, "read_text", out_of_descriptors)
    await consumption.sample()
    assert [record.message for record in caplog.records] == ["what replicas use is not known"]
