"""That the figures are what they are called: above all that a wrong answer is never counted as a fast one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.bench import load, tables
from tests.bench.load import Grpc, Result

# What h2load prints about 1000 calls: when all were answered with 10 bytes, and when half of them failed.
_SUMMARY = """
requests: 1000 total, 1000 started, 1000 done, 1000 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 1000 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 40.00KB (40960) total, 9.77KB (10000) headers (space savings 90.00%), 14.65KB ({data}) data
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.write_text("".join(f"{number}\t200\t{number}\n" for number in range(1, 1001)))
    return path


def _read(data: int, log: Path) -> Result:
    call = Grpc(address="", method="", message=b"", answer_bytes=10, authorization="", connections=1, streams=1)
    return call.result(_SUMMARY.format(data=data), log, 2)


def test_calls_that_were_answered_count_by_the_second(log: Path) -> None:
    result = _read(15_000, log)
    assert (result.requests, result.rps, result.fails) == (1000, 500, 0)
    assert result.p50_ms == pytest.approx(0.5, rel=0.01)
    assert result.p99_ms == pytest.approx(0.99, rel=0.01)


def test_a_grpc_error_is_a_failed_call_though_its_http_status_is_200(log: Path) -> None:
    assert _read(7_500, log).fails == 500


def test_a_ratio_is_taken_within_its_round() -> None:
    # The machine became half as fast; the server did not.
    assert tables.ratios([50, 25], [100, 50]) == [0.5, 0.5]


def test_subjects_take_turns() -> None:
    order: list[str] = []
    tables.interleaved({name: partial(order.append, name) for name in ("ours", "baseline")}, 2)
    assert order == ["ours", "baseline", "ours", "baseline"]


def test_missing_load_programs_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        load.require_programs()
    assert ended.value.code == 2
    assert "nghttp2-client" in capsys.readouterr().err
