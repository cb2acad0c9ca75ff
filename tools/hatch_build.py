"""Build hook: compiles every .proto into `tessera/<area>/v1/`.

Generated code is never committed: protobuf's generated modules refuse to run on a runtime older than their compiler,
so they are made at install time by the exact compiler that `pyproject.toml` pins. Only the generated sub-packages are
wiped and rebuilt; the hand-written parts of `tessera/` (command line, policy) are left alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMMENTS = Path("tessera/options/comments.json")
"""Full name of every declaration that has a comment -> that comment; a value of an enum stands below its enum."""

_DECLARATIONS = frozenset(
    ("message_type", "enum_type", "service", "method", "field", "oneof_decl", "nested_type", "value")
)


def generate(root: Path) -> None:
    """Compiles `root/protos/**/*.proto` into `root/tessera/`; raises RuntimeError when protoc refuses a file."""
    from google.protobuf import descriptor_pb2
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
        "--include_source_info",
    ]
    with tempfile.NamedTemporaryFile() as described:
        arguments += [f"--descriptor_set_out={described.name}", *(str(source) for source in sources)]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc refused a file under protos/; its message stands above")
        found = descriptor_pb2.FileDescriptorSet.FromString(Path(described.name).read_bytes())
    for source in sources:
        package = root / source.parent
        for folder in (package.parent, package):
            (folder / "__init__.py").touch()
        (package / "py.typed").touch()
    (root / COMMENTS).write_text(json.dumps(comments(found.file), ensure_ascii=False, sort_keys=True))


def comments(files: Iterable[Any]) -> dict[str, str]:
    """The comment above each declaration of these FileDescriptorProtos, by full name; lines lose their indentation."""
    found = {}
    for file in files:
        for location in file.source_code_info.location:
            name = _declared(file, location.path) if location.leading_comments else None
            if name is not None:
                lines = location.leading_comments.splitlines()
                found[name] = "\n".join(line.removeprefix(" ").rstrip() for line in lines).strip()
    return found


def _declared(file: Any, path: Iterable[int]) -> str | None:
    """The full name of what a path leads to: pairs of a descriptor's field and an index in it; None for the rest."""
    steps = iter(path)
    node, names = file, [file.package]
    for number in steps:
        field = node.DESCRIPTOR.fields_by_number[number].name
        if field not in _DECLARATIONS:
            return None
        node = getattr(node, field)[next(steps)]
        names.append(node.name)
    return ".".join(names)


class ProtoBuildHook(BuildHookInterface[Any]):
    """Runs `generate` before every wheel and every editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root))
