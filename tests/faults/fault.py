"""What a planted fault is, and how it is looked up in a tree: pure, so that a unit test can hold the table to it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Fault:
    """A bug that somebody could make, and the tests that must notice."""

    name: str
    property: str
    """The promise that it breaks, by its id in the security and reliability standard."""
    file: str
    old: str
    """Stands exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Each must go red: `path::name`, without parameters."""

    def planted(self, source: str) -> str:
        """The file's text with the fault in it; raises ValueError when the table no longer fits the file."""
        if (found := source.count(self.old)) != 1:
            raise ValueError(f"{self.name}: the old text stands {found} times in {self.file}, not once.")
        changed = source.replace(self.old, self.new)
        if changed == source:
            raise ValueError(f"{self.name}: the new text is the old one.")
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise ValueError(f"{self.name}: with the new text, {self.file} is no program: {error}.") from None
        return changed


def problems(fault: Fault, root: Path) -> Iterator[str]:
    """What is wrong with an entry of the table."""
    try:
        fault.planted((root / fault.file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield str(error)
    if not fault.tests:
        yield f"{fault.name}: no test is named."
    for test in fault.tests:
        path, _, name = test.partition("::")
        if not (root / path).is_file() or name not in _functions(root / path):
            yield f"{fault.name}: there is no test {test}."


def _functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
