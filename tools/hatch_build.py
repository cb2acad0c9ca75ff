"""Build hook: compiles every .proto into `tessera/<area>/v1/`.

Generated code is never committed: protobuf's generated modules refuse to run on a runtime older than their compiler,
so they are made at install time by the exact compiler that `pyproject.toml` pins. Only the generated sub-packages are
wiped and rebuilt; the hand-written parts of `tessera/` (the command line) are left alone.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def generate(root: Path) -> None:
    """Compiles `root/protos/**/*.proto` into `root/tessera/`; raises RuntimeError when protoc refuses a file."""
    from grpc_tools import protoc

    protos = root / "protos"
    sources = sorted(path.relative_to(protos) for path in protos.rglob("*.proto"))
    for area in {root / source.parts[0] / source.parts[1] for source in sources}:
        shutil.rmtree(area, ignore_errors=True)
    includes = [protos, Path(str(files("google.api") / "annotations.proto")).parents[2]]
    arguments = [
        "protoc",
        *(f"-I{include}" for include in includes),
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        f"--mypy_out={root}",
        f"--mypy_grpc_out={root}",
        *(str(source) for source in sources),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused a file under protos/; its message stands above")
    for source in sources:
        package = root / source.parent
        for folder in (package.parent, package):
            (folder / "__init__.py").touch()
        (package / "py.typed").touch()


class ProtoBuildHook(BuildHookInterface[Any]):
    """Runs `generate` before every wheel and every editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root))
