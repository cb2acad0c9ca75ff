"""The table of planted faults fits the tree: each could be planted, and the tests that must notice it exist (R30)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fault import Fault, problems
from tests.faults.table import FAULTS, as_markdown

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_can_be_planted_and_names_tests_that_exist(fault: Fault) -> None:
    assert list(problems(fault, ROOT)) == []


def test_every_fault_has_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_faults_are_listed_in_the_readme() -> None:
    assert as_markdown() in (ROOT / "tests/README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"old": "c = 3\n"}, "stands 0 times"),
        ({"old": " = "}, "stands 2 times"),
        ({"new": "a = 1\n"}, "is the old one"),
        ({"new": "a = (\n"}, "is no program"),
        ({"file": "gone.py"}, "gone.py"),
        ({"tests": ()}, "no test is named"),
        ({"tests": ("test_it.py::test_other",)}, "there is no test test_it.py::test_other"),
        ({"tests": ("test_gone.py::test_one",)}, "there is no test test_gone.py::test_one"),
    ],
)
def test_entry_that_fits_no_longer_is_told(tmp_path: Path, changes: dict[str, object], problem: str) -> None:
    (tmp_path / "it.py").write_text("a = 1\nb = 2\n")
    (tmp_path / "test_it.py").write_text("def test_one(): ...\n")
    fields = {"name": "n", "property": "S1", "file": "it.py", "old": "a = 1\n", "new": "a = 2\n"}
    good = Fault(**fields, tests=("test_it.py::test_one",))
    assert list(problems(good, tmp_path)) == []
    found = list(problems(Fault(**{"tests": good.tests, **fields, **changes}), tmp_path))  # type: ignore[arg-type]
    assert problem in "".join(found)
