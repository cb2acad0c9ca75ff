"""The program that talks to the MLflow registry, so that the service itself never has to import mlflow.

One JSON request per line comes in on standard input, one JSON answer per line goes out, in the order in which they are
done; `id` pairs them. It ends when its input closes, whatever is still under way. The first line is no request:

    {"registry": <its address>, "closed": <folders of the platform that no model may be taken from>}

Requests:

    {"id": 1, "op": "describe", "name": ..., "version": ...}
    {"id": 2, "op": "fetch", "name": ..., "version": ..., "destination": <an empty folder>}

Answers are `{"id", "source", "created_at", "location"}`, for a fetch with `path`, the model's folder within the
destination; or `{"id", "error", "message"}`, where `error` is `missing` (there is no such model version), `broken` (its
files are no model), `unusable` (the registry's address or state is wrong), `full` (the disk is), or `unreachable` or
`incomplete` (a retry may help).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import sqlite3
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

WORKERS = 4
_MESSAGE_LENGTH = 500
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")
_PIECES_MISSING = "failures occurred while downloading one or more artifacts"
"""MLflow's words when some files of a model did not arrive."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRANSIENT = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")


class Missing(Exception):
    """There is no such model version."""


class Broken(Exception):
    """There is such a model version, and its files are no model."""


class Unusable(Exception):
    """The registry cannot be used at its address."""


class Incomplete(Exception):
    """Not everything that the store lists has arrived."""


class Registry:
    """The registry at one address; from the folders `closed`, and from what they lie in, nothing is fetched."""

    def __init__(self, uri: str, closed: Sequence[Path] = ()) -> None:
        self._uri = uri
        self._closed = tuple(folder.resolve() for folder in closed)
        self._opening = threading.Lock()
        self._client: Any = None

    def warm(self) -> None:
        """Pays for the imports before anybody waits for them."""
        with self._opening:
            _mlflow()

    def describe(self, name: str, version: str) -> dict[str, Any]:
        """What tells this version from a later one with the same name and number."""
        # A registry may read " 1" as 1, or forget about letter case: one version, and as many copies as spellings.
        found = self._opened().get_model_version(name, version) if _VERSION.fullmatch(version) else None
        if found is None or found.name != name:
            raise Missing
        # MLflow keeps the place beside the source. It is another one where that names a logged model or a version.
        location = str(self._opened().get_model_version_download_uri(name, version))
        return {"source": str(found.source), "created_at": int(found.creation_timestamp), "location": location}

    def fetch(self, name: str, version: str, destination: str) -> dict[str, Any]:
        """Downloads the version's files into the folder `destination`."""
        described = self.describe(name, version)
        location = described["location"]
        path = _mlflow().artifacts.download_artifacts(artifact_uri=location, dst_path=destination)
        if not Path(path).is_relative_to(destination):
            raise Broken("its files were not copied but found at another place")
        # Whoever registers a version says where it lies, maybe in this platform's own data: that must not be kept.
        if not (Path(path) / "MLmodel").is_file():
            raise Broken("it is registered at a place without an MLmodel file")
        check_whole(_listed(location), Path(path))
        return {**described, "path": str(path)}

    def _opened(self) -> Any:
        self._check_sqlite()
        with self._opening:
            if self._client is None:
                mlflow = _mlflow()
                _guard_local_places(self._closed)
                mlflow.set_registry_uri(self._uri)
                # Since MLflow 3 the files of a model are found by way of the tracking store.
                mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or self._uri)
                self._client = mlflow.MlflowClient()
            return self._client

    def _check_sqlite(self) -> None:
        """A database that is not there yet, or that MLflow is creating just now, holds no models.

        MLflow would create it on first sight, and two programs that do so at once spoil each other's work.
        """
        if self._client is not None or not self._uri.startswith("sqlite:///"):
            return
        path = Path(unquote(urlsplit(self._uri).path.removeprefix("/")))
        if not path.exists():
            raise Missing
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as connection:
                if connection.execute("SELECT 1 FROM alembic_version").fetchone() is None:
                    raise Missing
        except sqlite3.OperationalError:  # no such table yet
            raise Missing from None
        except sqlite3.DatabaseError as error:
            raise Unusable(f"{path} is no database of MLflow ({error})") from None


def _mlflow() -> Any:
    """MLflow with all that is needed of it. Its modules import each other in a circle, so of two threads that import it
    at once one may find it half made: whoever may be the first holds a lock."""
    import mlflow
    import mlflow.artifacts
    import mlflow.store.model_registry.sqlalchemy_store

    return mlflow


def _guard_local_places(closed: Sequence[Path]) -> None:
    """Has MLflow copy from places on this machine only what is in the folder that is asked for, wherever links lead.

    Whoever registers a version says where it lies, and this program may read more than they: MLflow itself lets links
    lead to whatever lies beside a model.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact import artifact_repository_registry as stores
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    class GuardedPlace(LocalArtifactRepository):
        def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
            self._source = Path(self.artifact_dir, artifact_path or "").resolve()
            self._outside: list[str] = []
            if any(self._source.is_relative_to(each) or each.is_relative_to(self._source) for each in closed):
                raise Broken("it is registered at a place that holds the platform's own data")
            try:
                return str(super().download_artifacts(artifact_path, dst_path))  # type: ignore[no-untyped-call]
            except MlflowException:  # made of the refusals of its files, among others
                if self._outside:
                    raise Broken(f"its file '{self._outside[0]}' is a link that leads out of its folder") from None
                raise

        def _download_file(self, remote_file_path: str, local_path: str) -> None:
            # What was opened is looked at and copied: a path may lead elsewhere a moment later. No pipe is waited for.
            opened = os.open(Path(self.artifact_dir, remote_file_path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                file = Path(f"/proc/self/fd/{opened}")
                if not file.readlink().is_relative_to(self._source):
                    self._outside.append(remote_file_path)
                    raise Broken("a link leads out of its folder")
                shutil.copy2(file, local_path)
            finally:
                os.close(opened)

    known: dict[str, Any] = stores.get_registered_artifact_repositories()
    known.update({"": GuardedPlace, "file": GuardedPlace})


def check_whole(listed: Iterable[tuple[str, int]], folder: Path) -> None:
    """Raises Incomplete unless every listed file is in the folder, in its size."""
    for name, size in listed:
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise Incomplete(f"file '{name}' has {found} of {size} bytes")


def _listed(location: str) -> Iterator[tuple[str, int]]:
    """The files of a model as its store lists them, as far as it says how large they are."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    store: Any = get_artifact_repository(location)
    folders: list[str | None] = [None]
    while folders:
        for found in store.list_artifacts(folders.pop()):
            if found.is_dir:
                folders.append(found.path)
            elif found.file_size is not None:
                yield found.path, int(found.file_size)


def answer_to(registry: Registry, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request; never raises."""
    try:
        arguments = (request["name"], request["version"])
        if request["op"] == "fetch":
            answer = registry.fetch(*arguments, request["destination"])
        else:
            answer = registry.describe(*arguments)
    except Exception as error:
        answer = {"error": kind_of(error), "message": _first_line(error)}
    return {"id": request["id"], **answer}


def kind_of(error: Exception) -> str:
    """What a failure means to the service; see above."""
    if isinstance(error, Missing):
        return "missing"
    if isinstance(error, Broken):
        return "broken"
    if isinstance(error, Unusable):
        return "unusable"
    if _has_no_room(error):
        return "full"
    if isinstance(error, Incomplete) or _PIECES_MISSING in str(error):
        return "incomplete"
    code = getattr(error, "error_code", None)  # of MLflow's own exceptions
    if type(error).__name__.startswith("Unsupported"):  # an address that MLflow cannot read; its code says bad value
        return "unusable"
    if code in _MISSING:
        return "missing"
    return "unreachable" if code in _TRANSIENT or _is_connection_lost(error) else "unusable"


def _has_no_room(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        # Of a folder it is said what went wrong with each of its files, in words only: by shutil, and by MLflow.
        is_about_files = isinstance(error, shutil.Error) or _PIECES_MISSING in str(error)
        if is_about_files and any(os.strerror(number) in str(error) for number in _NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_connection_lost(error: BaseException | None) -> bool:
    """Whether the network is behind a failure; MLflow and its libraries wrap what happened in their own exceptions."""
    while error is not None:
        if type(error).__name__ == "OperationalError":  # of SQLAlchemy: a database server that does not answer
            return True
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    text = " ".join(text.split()) if _PIECES_MISSING in text else text.partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:_MESSAGE_LENGTH] if text else type(error).__name__


def serve(registry: Registry, requests: TextIO, answers: TextIO) -> None:
    """Answers until `requests` closes."""
    writing = threading.Lock()

    def handle(request: dict[str, Any]) -> None:
        line = json.dumps(answer_to(registry, request))
        with writing:
            answers.write(line + "\n")
            answers.flush()

    with ThreadPoolExecutor(WORKERS) as workers:
        workers.submit(registry.warm)
        for line in requests:
            workers.submit(handle, json.loads(line))
        # The service is gone or done with us: a download that nobody waits for must not keep the process.
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving_service.registry_helper", description=__doc__)
    parser.parse_args()
    # The address may hold a password, so it comes as the first line and never as an argument.
    told = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w")
    # Libraries print; what they print must not get between the answers.
    os.dup2(2, 1)
    serve(Registry(told["registry"], [Path(each) for each in told["closed"]]), sys.stdin, answers)


if __name__ == "__main__":
    main()
