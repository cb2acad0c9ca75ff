"""SQL is text of the program's own, with what callers say bound to it, and stands in few modules (S26)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.sql_lint import EXECUTES, Module

ROOT = Path(__file__).parents[2]
PACKAGES = ("secrets_service", "serving_service", "gateway", "servicekit", "tessera")

DOORS = {
    "secrets_service/store.py": frozenset[str](),
    "secrets_service/directory_store.py": frozenset({"ACCOUNT", "IS_AMONG", "PRINCIPAL"}),
    "secrets_service/grant_store.py": frozenset({"ACCOUNT", "IS_AMONG"}),
    "secrets_service/rotation_store.py": frozenset[str](),
    "serving_service/store.py": frozenset[str](),
    # A table of the same shape in two services.
    "servicekit/once.py": frozenset[str](),
    "servicekit/audit_store.py": frozenset[str](),
    "servicekit/database.py": frozenset[str](),
    # Looks whether a database of MLflow's is ready.
    "serving_service/registry_helper.py": frozenset[str](),
}
"""Where SQL may stand, and the constants of other doors that are used there."""

MIGRATIONS = "f'BEGIN IMMEDIATE;\\n{sql}\\nPRAGMA user_version={number};\\nCOMMIT;'"
"""The one statement that is more than text of its module: scripts that are part of the package."""

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("door", DOORS)
def test_statements_are_made_of_the_programs_own_text(door: str) -> None:
    module = Module((ROOT / door).read_text(), constants=DOORS[door])
    assert list(module.statements())
    open_statements = [each.partition(": ")[2] for each in module.open_statements()]
    assert open_statements == ([MIGRATIONS] if door == "servicekit/database.py" else [])


def test_constants_that_are_used_elsewhere_come_from_a_door() -> None:
    store = ast.parse((ROOT / "secrets_service/store.py").read_text())
    assigned = {
        target.id
        for node in store.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert DOORS["secrets_service/directory_store.py"] | DOORS["secrets_service/grant_store.py"] <= assigned


def test_statements_stand_at_the_doors_alone() -> None:
    found = {
        name_of(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in EXECUTES
    }
    assert found == DOORS.keys()


OF_ONE_DATABASE = {"servicekit/database.py", "serving_service/registry_helper.py"}
"""Doors to SQLite as such."""

TO_BE_BROUGHT = {
    "json_each": "lists are bound as one value",
    "json_extract": "a part of what is stored as JSON",
    "instr": "where a text stands in another",
    "rowid": "the order in which rows came, of tables that have no number of their own",
}
"""What is not the same everywhere and is used all the same, because another storage can have it by the same name: as a
function, or as a column that numbers rows (docs/architecture.md, "Storage")."""


def test_statements_say_what_every_database_understands() -> None:
    found = {word for door in DOORS.keys() - OF_ONE_DATABASE for word in Module((ROOT / door).read_text()).dialect()}
    assert found == TO_BE_BROUGHT.keys()


FOREIGN = {
    "INSERT OR REPLACE INTO t VALUES (?)": "or replace",
    "INSERT or\n IGNORE INTO t VALUES (?)": "or ignore",
    "INSERT INTO t VALUES (?) ON CONFLICT DO UPDATE SET a = 1": "on conflict do update",
    "PRAGMA user_version": "pragma",
    "SELECT a FROM t WHERE a IS NOT ?": "is not ?",
    "SELECT iif(a, 1, 2) FROM t": "iif",
    "UPDATE t SET a = max(a, ?)": "max(a,",
    "SELECT coalesce(a, x'00') FROM t": "x''",
    "SELECT a FROM t ORDER BY a COLLATE NOCASE": "collate",
    "SELECT last_insert_rowid() FROM t": "last_insert_rowid",
    "SELECT name FROM sqlite_master": "sqlite_master",
    "SELECT a FROM t LIMIT ?, ?": "limit ?,",
    'SELECT "a" FROM t': '"',
}


@pytest.mark.parametrize("statement", FOREIGN)
def test_what_one_database_understands_is_found(statement: str) -> None:
    source = f'"""Not json_each( of documents."""\ndef f(c):\n c.execute({statement!r})'
    assert FOREIGN[statement] in Module(source).dialect()


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT max(a) FROM t WHERE a IS NOT NULL AND length(b) > ? ORDER BY a LIMIT ? OFFSET ?",
        "INSERT INTO t (a) VALUES (?) ON CONFLICT (a) DO UPDATE SET a = excluded.a RETURNING a",
        "INSERT INTO t (a) SELECT coalesce(max(a), 0) + 1 FROM t ON CONFLICT DO NOTHING",
    ],
)
def test_what_every_database_understands_passes(statement: str) -> None:
    assert Module(f"def f(c): c.execute({statement!r})").dialect() == set()


DRIVERS = {"sqlite3", "aiosqlite"}

AT_THE_DRIVER = {
    "servicekit/database.py",
    "serving_service/registry_helper.py",  # a database of MLflow's, in a process of its own
}


def test_nothing_else_knows_which_database_it_is() -> None:
    found = {
        name_of(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and DRIVERS & {each.name.partition(".")[0] for each in node.names})
        or (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in DRIVERS)
    }
    assert found == AT_THE_DRIVER


GOOD = {
    "a literal": 'def f(c, x): c.execute("SELECT ?", (x,))',
    "a constant": 'A = "SELECT"\ndef f(c, x): c.execute(f"{A} ?", (x,))',
    "a local text": 'def f(c, x):\n s = "SELECT"\n if x: s += " 1"\n c.execute(s)',
    "one of two": 'def f(c, x): c.execute("SELECT 1 ORDER BY " + ("a" if x else "b"))',
    "a look-up": 'A = {"x": "a", "y": "b"}\ndef f(c, x): c.execute(f"SELECT {A[x]}")',
    "a private helper": 'def _g(c, w): c.execute(f"SELECT {w}")\ndef f(c): _g(c, "1")',
    "a helper that is handed on": 'def _g(c, w): c.execute(w)\ndef f(c): run(c, _g, "BEGIN")',
    "a helper that returns": 'def _g(x): return "a" if x else _g(x) + "b"\ndef f(c, x): c.execute(_g(x))',
    "a loop over literals": 'def f(c):\n for p in ("a", "b"): c.execute(f"PRAGMA {p}")',
}

BAD = {
    "a parameter": "def f(c, x): c.execute(x)",
    "an f-string of a parameter": "def f(c, x): c.execute(f\"SELECT '{x}'\")",
    "a sum with a parameter": 'def f(c, x): c.execute("SELECT " + x)',
    "percent": 'def f(c, x): c.execute("SELECT %s" % x)',
    "format": 'def f(c, x): c.execute("SELECT {}".format(x))',
    "join": 'def f(c, x): c.execute("SELECT " + ", ".join(x))',
    "join of what callers say": 'def f(c, x): c.execute(", ".join(f"{y}" for y in x))',
    "a local name that was given more": 'def f(c, x):\n s = "SELECT "\n s += x\n c.execute(s)',
    "a name of a loop": "def f(c, x):\n for y in x: c.execute(y)",
    "a name of a match": "def f(c, x):\n match x:\n  case [y]: c.execute(y)",
    "a name of a with": "def f(c, x):\n with x as y: c.execute(y)",
    "a parameter under a constant's name": 'A = "SELECT"\ndef f(c, A): c.execute(A)',
    "a public helper": 'def g(c, w): c.execute(f"SELECT {w}")\ndef f(c): g(c, "1")',
    "a private helper that is given more": 'def _g(c, w): c.execute(w)\ndef f(c, x): _g(c, "1"); _g(c, x)',
    "a helper that is handed on with more": "def _g(c, w): c.execute(w)\ndef f(c, x): run(c, _g, x)",
    "a helper that returns more": "def _g(x): return x\ndef f(c, x): c.execute(_g(x))",
    "an attribute of a caller's": "def f(c, x): c.execute(x.text)",
    "executemany": "def f(c, x): c.executemany(x, [])",
    "executescript": "def f(c, x): c.executescript(x)",
    "by name": "def f(c, x): c.execute(sql=x)",
}


@pytest.mark.parametrize("name", GOOD)
def test_own_text_passes(name: str) -> None:
    assert Module(GOOD[name]).open_statements() == []


@pytest.mark.parametrize("name", BAD)
def test_text_that_may_be_a_callers_is_found(name: str) -> None:
    assert Module(BAD[name]).open_statements() != []
