"""What a program may say, read from its syntax: logs, texts that are put together, and who looks at secret values.

The rules. A log event is a fixed text, and its fields are chosen one by one: nothing that holds what a caller sent
(`SENSITIVE`) is one as a whole. An exception becomes text only where its type is one of ours, whose texts we wrote; of
the others each place is known. So no request, metadata or environment is ever printed, and of a message no more than
`safe_repr` tells.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

LEVELS = frozenset({"debug", "info", "warning", "error", "critical", "exception", "log"})

SENSITIVE = frozenset(
    {
        *("request", "requests", "message", "messages", "metadata", "headers", "body", "content", "payload", "rpc"),
        *("environ", "environment", "variables", "token", "secret", "value", "values", "assertion", "credential"),
        *("error", "exc", "exception", "event", "record", "key"),
    }
)
"""Names of what may hold what a caller sent, or a text that a foreign library wrote."""

TELLING_LITTLE = frozenset({"safe_repr", "len", "type"})
"""Functions that make something safe of what may not be logged as a whole. The first alone prints messages."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """The syntax of one module."""

    def __init__(self, source: str) -> None:
        self._tree = ast.parse(source)
        self._parents = {child: node for node in ast.walk(self._tree) for child in ast.iter_child_nodes(node)}

    def classes(self) -> set[str]:
        """The names of the classes that it defines."""
        return {node.name for node in ast.walk(self._tree) if isinstance(node, ast.ClassDef)}

    def careless_events(self) -> Iterator[str]:
        """Log calls whose text is not fixed, or that have something as a field which is sensitive as a whole."""
        for call in ast.walk(self._tree):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and _is_log(call.func)):
                continue
            texts = call.args[1:] if call.func.attr == "log" else call.args  # after the level
            if len(texts) != 1 or not _is_fixed(texts[0]):
                yield f"{self._place(call)}: the text is not fixed"
            for keyword in call.keywords:
                if keyword.arg == "extra":
                    yield from (f"{self._place(call)}: {name}" for name in _wholes(keyword.value))

    def exceptions_as_text(self) -> Iterator[tuple[str, str]]:
        """Where a caught exception becomes text, and which type it has, one by one."""
        for handler in ast.walk(self._tree):
            if not (isinstance(handler, ast.ExceptHandler) and handler.name and handler.type):
                continue
            kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
            for node in ast.walk(handler):
                if _becomes_text(node, handler.name):
                    yield from ((self._place(handler), ast.unparse(kind)) for kind in kinds)

    def revealing(self) -> Iterator[str]:
        """The functions that look at secret values."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Attribute) and node.attr == "reveal":
                yield self._place(node)

    def _place(self, node: ast.AST) -> str:
        names = []
        while not isinstance(node, ast.Module):
            node = self._parents[node]
            if isinstance(node, Function | ast.ClassDef):
                names.append(node.name)
        return ".".join(reversed(names)) or "(module)"


def _is_log(function: ast.Attribute) -> bool:
    return (
        function.attr in LEVELS
        and isinstance(function.value, ast.Name)
        and function.value.id in ("log", "logger", "logging")
    )


def _is_fixed(text: ast.expr) -> bool:
    match text:
        case ast.Constant(str()):
            return True
        case ast.IfExp(_, body, orelse):
            return _is_fixed(body) and _is_fixed(orelse)
    return False


def _wholes(fields: ast.expr) -> Iterator[str]:
    """Sensitive names that are a field themselves, or its text; what is a part of them was chosen."""
    match fields:
        case ast.Dict(_, values):
            for value in values:
                yield from _wholes(value)
        case ast.Name(name):
            if name in SENSITIVE:
                yield name
        case ast.Call(ast.Name("str"), [ast.Name("error")]):
            return  # whether that may be text, its type decides: see `exceptions_as_text`
        case ast.Call(ast.Name(function)) if function in TELLING_LITTLE:
            return
        case ast.Call(function, arguments):
            if isinstance(function, ast.Attribute):  # a method may tell as much as what it is a method of
                yield from _wholes(function.value)
            for argument in arguments:
                yield from _wholes(argument)
        case ast.JoinedStr(parts) | ast.List(parts) | ast.Tuple(parts):
            for part in parts:
                yield from _wholes(part)
        case ast.FormattedValue(value):
            yield from _wholes(value)
        case ast.BinOp(left, _, right) | ast.IfExp(_, left, right):
            yield from _wholes(left)
            yield from _wholes(right)


def _becomes_text(node: ast.AST, name: str) -> bool:
    match node:
        case ast.FormattedValue(ast.Name(formatted)):
            return formatted == name
        case ast.Call(ast.Name("str" | "repr"), [ast.Name(argument)]):
            return argument == name
    return False
