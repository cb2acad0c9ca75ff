"""A test that is run on a planted fault sees the fault, in this process or in one that it starts."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.faults.fault import Fault
from tests.faults.run import Copy, Outcome

TEST = """
import subprocess, sys
from pathlib import Path

def test_sum():
    found = subprocess.run([sys.executable, "-c", "import it; print(it.sum_of(2, 3))"], capture_output=True, text=True)
    assert found.stdout == "5\\n"
"""
PROFILES = Path(__file__).parents[2] / "conftest.py"
FAULT = Fault(
    name="difference",
    property="S1",
    file="it.py",
    old="one + other",
    new="one - other",
    tests=("test_it.py::test_sum",),
)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    (tmp_path / "it.py").write_text("def sum_of(one, other):\n    return one + other\n")
    (tmp_path / "test_it.py").write_text(TEST)
    shutil.copy(PROFILES, tmp_path)
    return Copy(tmp_path, Path(sys.executable))


def test_fault_turns_its_test_red_and_is_taken_out_again(copy: Copy) -> None:
    with copy.planted(FAULT):
        assert copy.outcome("test_it.py::test_sum")[0] is Outcome.RED
    assert copy.outcome("test_it.py::test_sum")[0] is Outcome.GREEN


def test_test_that_does_not_run_is_not_red(copy: Copy) -> None:
    assert copy.outcome("test_it.py::test_gone")[0] is Outcome.BROKEN


def test_copy_that_would_import_another_tree_is_refused(copy: Copy) -> None:
    with pytest.raises(RuntimeError, match="would not be imported"):
        copy.require_own_packages()
