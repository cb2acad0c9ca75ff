"""Every call that a service makes of another has a deadline, as the source shows (R14)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gateway", "secrets_service", "servicekit", "serving_service", "tessera/cli")
FOLLOWED = ("Watch", "Copy")
"""Streams that go on; whoever follows one gives it up when it is silent, or when its connection is."""


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from (ROOT / package).rglob("*.py")


def undated(tree: ast.AST) -> list[int]:
    """The lines with a call of a stub's method, or of `channels.call`, that names no `timeout`."""
    stubs = {
        ast.unparse(target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _is_stub(node.value)
        for target in node.targets
    }
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = node.func.value
        is_method = _is_stub(called) or ast.unparse(called) in stubs
        is_call = ast.unparse(node.func) == "channels.call"
        is_dated = "timeout" in [keyword.arg for keyword in node.keywords]
        if not is_dated and (is_call or (is_method and node.func.attr not in FOLLOWED)):
            lines.append(node.lineno)
    return lines


def _is_stub(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Stub")


def test_every_call_of_another_service_has_a_deadline() -> None:
    found = {str(path.relative_to(ROOT)): undated(ast.parse(path.read_text())) for path in sources()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("rpc.AStub(channel).Get(message)", [1]),
        ("rpc.AStub(channel).Get(message, timeout=1)", []),
        ("self._a = rpc.AStub(channel)\nself._a.Get(message)", [2]),
        ("channels.call(method, message, peer='Secrets')", [1]),
        ("channels.call(method, message, peer='Secrets', timeout=1)", []),
        ("rpc.AStub(channel).Watch(metadata=m)", []),
    ],
)
def test_a_call_without_a_deadline_is_found(text: str, lines: list[int]) -> None:
    assert undated(ast.parse(text)) == lines
