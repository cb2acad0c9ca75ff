"""Plants one fault after the other in a copy of the tree and looks whether its tests go red.

The tests run with an interpreter of the copy's own: a virtual environment whose path is the copy and then the packages
of this one. Whatever a test starts with `sys.executable`, isolated (`-I`, `-P`) or not, imports from the copy too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from tests.faults.fault import Fault

ROOT = Path(__file__).parents[2]
TEST_SECONDS = 300
PACKAGES = ("secrets_service", "serving_service", "gateway", "servicekit", "tessera")

_LEFT_OUT = shutil.ignore_patterns(".*_cache", ".git", ".venv", ".hypothesis", "__pycache__")


class Outcome(StrEnum):
    """What became of a test."""

    GREEN = "green"
    RED = "red"
    BROKEN = "did not run"
    HANGS = "hangs"


class Copy:
    """A copy of the tree that tests run in."""

    def __init__(self, root: Path, python: Path) -> None:
        self._root = root
        self._python = python

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """Has the fault in the copy; raises ValueError when the table no longer fits."""
        file = self._root / fault.file
        before = file.read_text(encoding="utf-8")
        file.write_text(fault.planted(before), encoding="utf-8")
        try:
            yield
        finally:
            file.write_text(before, encoding="utf-8")

    def outcome(self, test: str) -> tuple[Outcome, str]:
        """Runs one test; what became of it, and what pytest printed."""
        options = ("-p", "no:cacheprovider", "-p", "no:schemathesis", "--hypothesis-profile=unshrunk")
        command = [str(self._python), "-m", "pytest", "-q", "-x", *options, test]
        # No caches: a file that is changed twice within a second could be taken for its older self.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        try:
            ended = subprocess.run(
                command, cwd=self._root, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS
            )
        except subprocess.TimeoutExpired:
            return Outcome.HANGS, ""
        return {0: Outcome.GREEN, 1: Outcome.RED}.get(ended.returncode, Outcome.BROKEN), ended.stdout + ended.stderr

    def require_own_packages(self) -> None:
        """Raises RuntimeError unless a program that the tests start imports the copy's packages."""
        program = f"import importlib as i\nfor each in {PACKAGES}: print(*i.import_module(each).__path__)"
        for flag in ("-I", "-P"):
            found = subprocess.run(
                [self._python, flag, "-c", program], cwd="/", capture_output=True, text=True, check=True
            ).stdout.splitlines()
            if found != [str(self._root / package) for package in PACKAGES]:
                raise RuntimeError(f"The packages of the copy would not be imported, but {found}.")


@contextmanager
def copied(root: Path = ROOT) -> Iterator[Copy]:
    """A copy of the tree with an interpreter of its own, removed in the end."""
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        tree, environment = Path(temporary).resolve() / "tree", Path(temporary).resolve() / "venv"
        shutil.copytree(root, tree, ignore=_LEFT_OUT, symlinks=True)
        venv.create(environment, symlinks=True)
        paths = {name: sysconfig.get_path(name, vars={"base": str(environment)}) for name in ("purelib", "scripts")}
        ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        # Plain paths: the .pth files beside the packages, which lead to the original tree, are not followed from here.
        (Path(paths["purelib"]) / "tree.pth").write_text("".join(f"{path}\n" for path in (tree, *ours)))
        copy = Copy(tree, Path(paths["scripts"]) / "python")
        copy.require_own_packages()
        yield copy


def run(faults: Sequence[Fault]) -> int:
    """Plants each fault and prints what became of it; how many were missed."""
    missed = 0
    with copied() as copy:
        green: dict[str, bool] = {}
        for fault in faults:
            complaints = []
            for test in fault.tests:
                if test not in green:  # a test that is red anyway catches nothing
                    outcome, output = copy.outcome(test)
                    green[test] = outcome is Outcome.GREEN
                    if not green[test]:
                        _print(output)
                if not green[test]:
                    complaints.append(f"{test} is not green without the fault")
            try:
                with copy.planted(fault):
                    for test in fault.tests:
                        if (outcome := copy.outcome(test)[0]) is not Outcome.RED:
                            complaints.append(f"{test}: {outcome}")
            except ValueError as error:
                complaints.append(str(error))
            missed += bool(complaints)
            _print(f"{'MISSED' if complaints else 'caught'}  {fault.name} ({fault.property})")
            for complaint in complaints:
                _print(f"        {complaint}")
    _print(f"{len(faults) - missed} of {len(faults)} caught")
    return missed


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
