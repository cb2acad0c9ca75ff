"""Models that cannot be served, each wrong in one way, and a registry that holds them.

Written as files, so that nobody has to import mlflow to make them. A model of the folder `manner` runs one of the tiny
programs of `model_servers` instead of our model server, for what has nothing to do with MLflow.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.support.registered_models import registry_uri

NAME = "faulty"

_DESCRIPTION = """\
flavors:
  python_function:
    loader_module: faulty
    code: code
    python_version: 3.11.0
mlflow_version: 3.5.0
"""

_LOADERS = {
    "fine": "def _load_pyfunc(path): return type('Model', (), {'predict': lambda self, frame: [1]})()",
    "import": "import nothing_of_this_name",
    "load": "def _load_pyfunc(path): raise ValueError('no weights for ' + __import__('os').environ['KEY'])",
    "data": "def _load_pyfunc(path): return open(path + '/weights.bin').read()",
    "exit": "def _load_pyfunc(path): __import__('os')._exit(3)",
    "system exit": "def _load_pyfunc(path): raise SystemExit('no license')",
    "kill": "def _load_pyfunc(path): __import__('os').kill(__import__('os').getpid(), 9)",
    "memory": "def _load_pyfunc(path): bytearray(1 << 62)",
}
_DESCRIPTIONS = {
    "truncated": _DESCRIPTION[: _DESCRIPTION.index("loader_module") + 10],
    "flavour": _DESCRIPTION.replace("python_function", "crayon"),
}
MANNERS = ("ready", "slow", "crashing", "flooding", "silent")


def written(folder: Path) -> dict[str, Path]:
    """Writes every model below a folder; where each is, by its name."""
    models = {name: folder / name.replace(" ", "-") for name in (*_LOADERS, *_DESCRIPTIONS, *MANNERS)}
    for name, path in models.items():
        (path / "code").mkdir(parents=True)
        (path / "MLmodel").write_text(_DESCRIPTIONS.get(name, _DESCRIPTION))
        (path / "code" / "faulty.py").write_text(_LOADERS.get(name, _LOADERS["fine"]))
        if name in MANNERS:
            (path / "manner").write_text(name)
    return models


class FaultyRegistry:
    """A copy of the tests' registry, in which versions can be registered, and everything lost."""

    def __init__(self, path: Path) -> None:
        shutil.copy(registry_uri().removeprefix("sqlite:///"), path)
        self._path = path
        self._versions = 0
        self._change("INSERT INTO registered_models (name, creation_time) VALUES (?, 1)", NAME)

    @property
    def uri(self) -> str:
        """Its address."""
        return f"sqlite:///{self._path}"

    def register(self, folder: Path) -> str:
        """Registers a folder as the next version of the model; which that is."""
        self._versions += 1
        self._change(
            "INSERT INTO model_versions (name, version, creation_time, current_stage, source, storage_location, status)"
            " VALUES (?, ?, 1, 'None', ?, ?, 'READY')",
            *(NAME, self._versions, str(folder), str(folder)),
        )
        return str(self._versions)

    def delete(self, version: str) -> None:
        """Deletes a version."""
        self._change("DELETE FROM model_versions WHERE name = ? AND version = ?", NAME, version)

    def register_anew(self, version: str) -> None:
        """Has a version be another one, under the same number."""
        self._change("UPDATE model_versions SET creation_time = 2 WHERE name = ? AND version = ?", NAME, version)

    def break_down(self) -> None:
        """Has the database fail until it is mended."""
        self._change("ALTER TABLE model_versions RENAME TO lost")

    def mend(self) -> None:
        """Ends that."""
        self._change("ALTER TABLE lost RENAME TO model_versions")

    def _change(self, statement: str, *parameters: object) -> None:
        with closing(sqlite3.connect(self._path, timeout=10)) as connection, connection:
            connection.execute(statement, parameters)
