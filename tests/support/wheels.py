"""Wheels made by hand, and indexes of them that are only a folder: environments are built without any network."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serving_service.model_environments import RUNNER


def make_wheel(
    folder: Path, name: str, version: str, *, requires: Iterable[str] = (), files: Mapping[str, str] | None = None
) -> Path:
    """A wheel of one module of the same name, which says its version, and of more files."""
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}-{version}.dist-info"
    needed = "".join(f"Requires-Dist: {each}\n" for each in requires)
    content = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(files or {}),
    }
    return _written(folder / f"{name}-{version}-py3-none-any.whl", content, about)


def index_variables(*folders: Path) -> dict[str, str]:
    """What the builder has to be told in order to use nothing but these folders."""
    return {"UV_OFFLINE": "1", "UV_FIND_LINKS": ",".join(map(str, folders))}


@contextmanager
def serving_index(folder: Path) -> Iterator[str]:
    """An index over HTTP of the wheels in a folder; where it is."""

    class Index(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith("/simple/"):
                super().do_GET()
                return
            name = self.path.removeprefix("/simple/").strip("/")
            links = [f"<a href='/{path.name}'>{path.name}</a>" for path in folder.glob(f"{name}-*")]
            content = "".join(links).encode()
            self.send_response(200 if links else 404)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/simple"
        finally:
            server.shutdown()
            thread.join()


def variables_file(path: Path, variables: dict[str, str]) -> Path:
    """A file of variables for helpers, as it has to be."""
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    return path


@functools.cache
def runner_wheels() -> Path:
    """What the model server needs, packed again from this environment; gone with this process."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for found in _closure([*RUNNER, "mlflow-skinny"]):
        _packed(folder, found)
    return folder


def _closure(wanted: Iterable[str]) -> Iterator[metadata.Distribution]:
    pending, seen = [(Requirement(each), "") for each in wanted], set[str]()
    while pending:
        requirement, extra = pending.pop()
        key = f"{canonicalize_name(requirement.name)}[{','.join(sorted(requirement.extras))}]"
        if key in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        if not (seen & {key, (bare := f"{canonicalize_name(requirement.name)}[]")}):
            yield metadata.distribution(requirement.name)
        seen |= {key, bare}
        needed = [Requirement(each) for each in metadata.distribution(requirement.name).requires or ()]
        pending += [(each, extra) for each in needed for extra in ("", *requirement.extras)]


def _packed(folder: Path, found: metadata.Distribution) -> None:
    name, about = found.metadata["Name"], ""
    files: dict[str, str] = {}
    for path in found.files or ():
        about = path.parts[0] if path.parts[0].endswith(".dist-info") else about
        is_part = (
            not path.parts[0].startswith("..") and path.suffix != ".pyc" and path.name not in ("RECORD", "REQUESTED")
        )
        if is_part and path.name != "direct_url.json" and "tests" not in path.parts:
            files[str(path)] = str(found.locate_file(path))
    tags = [line.removeprefix("Tag: ") for line in (found.read_text("WHEEL") or "").splitlines() if "Tag: " in line]
    wheel = folder / f"{name.replace('-', '_').replace('.', '_')}-{found.version}-{_joined(tags)}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for inside, outside in files.items():
            archive.write(outside, inside)
        archive.writestr(f"{about}/RECORD", "".join(f"{each},,\n" for each in files))


def _joined(tags: list[str]) -> str:
    """Several tags as one, as the names of files have it."""
    parts = zip(*(tag.split("-") for tag in tags), strict=True)
    return "-".join(".".join(dict.fromkeys(part)) for part in parts)


def _written(wheel: Path, files: dict[str, str], about: str) -> Path:
    unfinished = wheel.with_suffix(".new")
    with zipfile.ZipFile(unfinished, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{about}/RECORD", "".join(f"{each},,\n" for each in files))
    os.replace(unfinished, wheel)  # noqa: PTH105
    return wheel
