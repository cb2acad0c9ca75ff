"""What NVIDIA's program says, and what is made of it; the program is a stand-in, the process that runs it is real."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from serving_service import nvidia_smi
from serving_service.gpus import Machine
from serving_service.nvidia_smi import DriverError, Load
from tests.support.nvidia_smi import NvidiaSmi, a_gpu, uuid
from tests.support.nvidia_smi import nvidia_smi as stand_in


@pytest.fixture
def smi(tmp_path: Path) -> NvidiaSmi:
    return stand_in(tmp_path / "bin", a_gpu(1), a_gpu(2), a_gpu(3))


def test_the_program_is_found_in_the_search_path_and_nowhere_else(smi: NvidiaSmi, tmp_path: Path) -> None:
    assert nvidia_smi.program(f"/nonexistent:{smi.folder}") == smi.program
    assert nvidia_smi.program(str(tmp_path)) is None


async def test_without_the_program_there_is_no_driver() -> None:
    assert await nvidia_smi.machine(None, None) == Machine()


async def test_all_gpus_are_given_away_or_those_that_are_named(
    smi: NvidiaSmi, caplog: pytest.LogCaptureFixture
) -> None:
    assert await nvidia_smi.machine(smi.program, None) == Machine(has_driver=True, devices=(uuid(1), uuid(2), uuid(3)))
    named = await nvidia_smi.machine(smi.program, {uuid(3), uuid(9)})
    assert named == Machine(has_driver=True, devices=(uuid(3),))
    assert any(vars(record).get("not_there") == [uuid(9)] for record in caplog.records)


async def test_who_gives_none_away_does_not_ask(smi: NvidiaSmi) -> None:
    smi.has(status=1)
    assert await nvidia_smi.machine(smi.program, frozenset()) == Machine(has_driver=True)


async def test_a_divided_gpu_is_not_given_away(smi: NvidiaSmi, caplog: pytest.LogCaptureFixture) -> None:
    smi.has(a_gpu(1, **{"mig.mode.current": "Enabled"}), a_gpu(2, **{"mig.mode.current": "Disabled"}))
    assert (await nvidia_smi.machine(smi.program, None)).devices == (uuid(2),)
    assert any(vars(record).get("divided") == [uuid(1)] for record in caplog.records)


@pytest.mark.parametrize(
    ("says", "status", "cause"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9, "communicate with"),
        ("No devices were found\n", 0, "No devices were found"),
        ("", 255, "status 255"),
    ],
)
async def test_a_driver_that_does_not_work_gives_no_gpu_and_still_hides_them(
    smi: NvidiaSmi, says: str, status: int, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    smi.has(says=says, status=status)
    assert await nvidia_smi.machine(smi.program, None) == Machine(has_driver=True)
    assert any(cause in vars(record).get("cause", "") for record in caplog.records)


async def test_a_driver_that_hangs_is_not_waited_for(smi: NvidiaSmi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_smi, "ANSWER_SECONDS", 0.2)
    smi.has(a_gpu(1), hangs=600)
    began = time.monotonic()
    with pytest.raises(DriverError, match="did not answer"):
        await nvidia_smi.loads(smi.program)
    assert time.monotonic() - began < 60


async def test_a_program_that_cannot_be_run_is_a_driver_that_does_not_work(smi: NvidiaSmi) -> None:
    smi.program.write_text("#!/nonexistent/python\n")
    with pytest.raises(DriverError, match="cannot be run"):
        await nvidia_smi.loads(smi.program)


async def test_loads_are_shares_and_what_is_not_known_is_none(smi: NvidiaSmi) -> None:
    busy = a_gpu(1, **{"utilization.gpu": 50, "memory.used": 250})
    odd = a_gpu(2, **{"utilization.gpu": "[N/A]", "memory.total": "[N/A]"})
    smi.has(busy, odd, says="WARNING: infoROM is corrupted at gpu 0000:01:00.0\n")
    assert await nvidia_smi.loads(smi.program) == {uuid(1): Load(0.5, 0.25), uuid(2): Load(None, None)}
