"""The protos are the description of the API: everything in them is explained, and each RPC says who may reach it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from servicekit.exposure import exposure
from tessera.errors.v1 import errors_pb2
from tessera.identity.v1 import identity_pb2, permissions_pb2
from tessera.options.v1 import options_pb2
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2

PROTOS = Path(__file__).parents[3] / "protos"
FILES = sorted(PROTOS.rglob("*.proto"))
SERVICES = [
    service
    for module in (identity_pb2, permissions_pb2, secrets_pb2, serving_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]

_DECLARATION = re.compile(
    r"\s*(?:(?:service|message|enum|rpc|oneof)\s+\w+"
    r"|(?:repeated |optional )?[\w.<>, ]+\s\w+ = \d+\b"
    r"|[A-Z][A-Z0-9_]* = \d+\b)"
)


def undocumented(text: str) -> list[str]:
    """The declarations in a .proto file that no comment stands above."""
    found, before = [], ""
    for line in text.splitlines():
        if _DECLARATION.match(line) and not before.lstrip().startswith("//"):
            found.append(line.strip())
        before = line
    return found


def test_there_are_protos() -> None:
    assert len(FILES) >= 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_declaration_has_a_comment(path: Path) -> None:
    assert undocumented(path.read_text()) == []


def test_a_missing_comment_would_be_found() -> None:
    text = (
        "// A thing.\nmessage Thing {\n  // Good.\n  string a = 1;\n"
        "\n  map<string, string> b = 2;\n\n  repeated x.Y c = 3 [d = 1];\n}\n"
    )
    assert undocumented(text) == ["map<string, string> b = 2;", "repeated x.Y c = 3 [d = 1];"]
    assert undocumented("\nenum E {\n  A_B = 0;\n}\nservice S {\n  rpc M(A) returns (B);\n}") == [
        "enum E {",
        "A_B = 0;",
        "service S {",
        "rpc M(A) returns (B);",
    ]


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.full_name)
def test_every_rpc_says_who_may_reach_it(service: object) -> None:
    for method in service.methods:  # type: ignore[attr-defined]
        assert exposure(method)


def test_every_error_reason_has_a_status() -> None:
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values:
        status = value.GetOptions().Extensions[options_pb2.http_status]
        assert (400 <= status <= 599) == (value.number != 0), value.name
