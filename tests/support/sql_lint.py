"""Whether SQL is made of nothing but the program's own text: read from the syntax, without running anything.

The rule: the first argument of every `execute`, `executemany` and `executescript` is *closed*. Closed is a literal; a
constant of a module; text put together from closed text; a local name that is only ever given closed text; a part of
something closed (so a look-up in a closed table, whatever it is looked up by); a parameter of a private function that
every mention of the function gives closed text; and the result of a function of the module that returns closed text
only. All else could hold what a caller said, and is reported, right or not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

EXECUTES = frozenset({"execute", "executemany", "executescript"})

DIALECT = re.compile(
    r"""
      \b(?:OR\s+(?:REPLACE|IGNORE|ABORT|FAIL|ROLLBACK) | REPLACE\s+INTO | ON\s+CONFLICT\s+DO\s+UPDATE
        | IS(?:\s+NOT)?\s+\? | LIMIT\s+\S+, | BEGIN\s+\w+ | INDEXED\s+BY | COLLATE | GLOB | REGEXP
        | PRAGMA | VACUUM | ATTACH | AUTOINCREMENT | rowid | sqlite_\w+)
    | \b(?:iif | ifnull | instr | json\w* | hex | unhex | quote | random | randomblob | zeroblob | typeof | printf
        | total | changes | total_changes | last_insert_rowid | char | unicode | strftime | julianday | unixepoch
        | datetime | date | time | group_concat | likely | unlikely | soundex | load_extension)\s*\(
    | \b(?:min | max)\s*\([^()]*,
    | \bx'' | == | [`\[\]"]
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""What SQLite understands and PostgreSQL does not, or understands otherwise, as far as words tell."""

STATEMENT = re.compile(r"\b(?:SELECT|INSERT|UPDATE|DELETE|FROM|WHERE|SET|VALUES|AND|CREATE|PRAGMA)\b|^\w+\(|\?")
"""How text that belongs to a statement looks."""

LITERAL = re.compile(r"'[^']*'")

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """The syntax of one module."""

    def __init__(self, source: str, *, constants: frozenset[str] = frozenset()) -> None:
        """`constants` are names that the module imports and that are closed where they come from."""
        self._tree = ast.parse(source)
        self._functions = {
            node.name: node for node in ast.walk(self._tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        self._constants = constants | set(_assigned(self._tree.body))
        self._parents = {child: node for node in ast.walk(self._tree) for child in ast.iter_child_nodes(node)}

    def statements(self) -> Iterator[ast.Call]:
        """Every call that hands SQL to a database."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in EXECUTES:
                yield node

    def open_statements(self) -> list[str]:
        """Those whose SQL is not closed: line and text."""
        return [
            f"line {call.lineno}: {ast.unparse(call.args[0]) if call.args else 'nothing'}"
            for call in self.statements()
            if not call.args or not self._is_closed(call.args[0], self._function_of(call), frozenset())
        ]

    def dialect(self) -> set[str]:
        """The words of its statements that not every database knows."""
        documented = {
            node.value for node in ast.walk(self._tree) if isinstance(node, ast.Expr) and _is_text(node.value)
        }
        texts = (
            node.value
            for node in ast.walk(self._tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documented
        )
        return {
            " ".join(found.group().split()).rstrip("( ").lower()
            for text in texts
            if STATEMENT.search(text)
            for found in DIALECT.finditer(LITERAL.sub("''", text))
        }

    def _function_of(self, node: ast.AST) -> Function | None:
        while not isinstance(node, ast.Module):
            node = self._parents[node]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                return node
        return None

    def _is_closed(self, node: ast.expr, within: Function | None, assumed: frozenset[str]) -> bool:
        """Whether an expression is closed; `assumed` are the functions and names that are being looked at already."""

        def closed(*parts: ast.expr | None) -> bool:
            return all(part is not None and self._is_closed(part, within, assumed) for part in parts)

        match node:
            case ast.Constant():
                return True
            case ast.JoinedStr(values):
                return closed(*(each.value if isinstance(each, ast.FormattedValue) else each for each in values))
            case ast.BinOp(left, ast.Add(), right):
                return closed(left, right)
            case ast.IfExp(_, body, orelse):
                return closed(body, orelse)
            case ast.Tuple(parts) | ast.List(parts):
                return closed(*parts)
            case ast.Subscript(value) | ast.Attribute(value):
                return closed(value)
            case ast.GeneratorExp(element):
                return closed(element)
            case ast.Call(ast.Attribute(text, "join" | "format"), arguments, []):
                return closed(text, *arguments)
            case ast.Call(ast.Name(name)) if name in self._functions:
                return self._returns_closed(self._functions[name], assumed)
            case ast.Name(name):
                return self._is_closed_name(name, within, assumed)
        return False

    def _returns_closed(self, function: Function, assumed: frozenset[str]) -> bool:
        if function.name in assumed:  # it calls itself: closed if everything else is
            return True
        returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
        return bool(returned) and all(
            value is not None and self._is_closed(value, function, assumed | {function.name}) for value in returned
        )

    def _is_closed_name(self, name: str, within: Function | None, assumed: frozenset[str]) -> bool:
        if within is None:
            return name in self._constants
        place = f"{within.name}.{name}"
        if place in assumed:
            return True
        assumed |= {place}
        positions = [each.arg for each in (*within.args.posonlyargs, *within.args.args)]
        if name in positions:
            return self._is_given_closed(within, positions.index(name), assumed)
        given = [value for node in ast.walk(within) for target, value in _bound(node) if target == name]
        if not given:
            return name in self._constants and name not in _names_of(within)
        return all(value is not None and self._is_closed(value, within, assumed) for value in given)

    def _is_given_closed(self, function: Function, position: int, assumed: frozenset[str]) -> bool:
        """Whether every mention of a private function gives closed text for a parameter."""
        mentions = [node for node in ast.walk(self._tree) if isinstance(node, ast.Name) and node.id == function.name]
        return (
            function.name.startswith("_")
            and bool(mentions)
            and all(
                self._is_closed(given, self._function_of(mention), assumed)
                if (given := self._argument(mention, position)) is not None
                else False
                for mention in mentions
            )
        )

    def _argument(self, mention: ast.Name, position: int) -> ast.expr | None:
        """What a mention gives for a parameter: in a call, or handed on to be called with a connection in front."""
        call = self._parents[mention]
        if not isinstance(call, ast.Call):
            return None
        if call.func is not mention:
            position += call.args.index(mention)  # the connection, which comes first, takes the function's own place
        return call.args[position] if position < len(call.args) else None


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _assigned(body: list[ast.stmt]) -> Iterator[str]:
    """The constants of a module: names that are given something once, at its top."""
    for node in body:
        for target, value in _bound(node):
            if value is not None:
                yield target


def _bound(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """Names that a node gives something to, and what; None when it cannot be told."""
    match node:
        case ast.Assign(targets, value):
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, value
                else:
                    yield from ((name, None) for name in _names_of(target))
        case ast.AnnAssign(ast.Name(name), _, value) if value is not None:
            yield name, value
        case ast.AugAssign(ast.Name(name), operator, value):
            yield name, value if isinstance(operator, ast.Add) else None
        case ast.For(ast.Name(name), values):
            yield name, values
        case ast.For(target) | ast.comprehension(target):
            yield from ((name, None) for name in _names_of(target))
        case ast.NamedExpr(ast.Name(name), value):
            yield name, value
        case ast.MatchAs(_, str(name)) | ast.MatchStar(str(name)):
            yield name, None
        case ast.withitem(_, ast.expr() as target):
            yield from ((name, None) for name in _names_of(target))


def _names_of(target: ast.AST) -> set[str]:
    """Names that are given something somewhere in a node."""
    names = {node.id for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.arg for node in ast.walk(target) if isinstance(node, ast.arg)}
