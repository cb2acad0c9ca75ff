"""What is printed of messages: their shape, and nothing of what somebody sent."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api import httpbody_pb2
from google.protobuf import struct_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from servicekit import safe_repr as module
from servicekit.safe_repr import LONGEST, safe_repr
from tessera.secrets.v1 import secrets_pb2
from tessera.serving.v1 import serving_pb2
from tests.support.descriptors import ProtoFile

ROOT = Path(__file__).parents[3]
CANARY = "sk-live-0f1e2d3c"
NUMBER = 58_203_177
"""A canary among numbers."""

Kind = type[Message]


def made() -> dict[str, Kind]:
    """A message whose fields of every kind are redacted, and one that has it, and itself, within."""
    file = ProtoFile()
    file.message("Plain", "string text", "int64 number")
    redacted = {
        "text": "string text",
        "raw": "bytes raw",
        "number": "int64 number",
        "ratio": "double ratio",
        "texts": "repeated string texts",
        "numbers": "repeated int64 numbers",
        "plain": "Plain plain",
        "plains": "repeated Plain plains",
        "entries": "map<string,string> entries",
        "members": "map<string,Plain> members",
        "chosen": "choice: string chosen",
        "perhaps": "optional int64 perhaps",
    }
    file.message("Secret", *redacted.values(), **{name: {"debug_redact": True} for name in redacted})
    file.message("Tree", "Secret secret", "repeated Secret secrets", "map<string,Secret> named", "repeated Tree trees")
    messages = file.build().message_types_by_name
    return {name: GetMessageClass(messages[name]) for name in ("Plain", "Secret", "Tree")}


KINDS = made()


def secret() -> Any:
    plain = KINDS["Plain"](text=CANARY, number=NUMBER)
    return KINDS["Secret"](
        text=CANARY,
        raw=CANARY.encode(),
        number=NUMBER,
        ratio=float(NUMBER),
        texts=[CANARY],
        numbers=[NUMBER],
        plain=plain,
        plains=[plain],
        entries={CANARY: CANARY},
        members={CANARY: plain},
        chosen=CANARY,
        perhaps=NUMBER,
    )


TREES = st.recursive(
    st.just(()),
    lambda children: st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 2), st.lists(children, max_size=4)),
    max_leaves=12,
)


def tree(plan: Any) -> Any:
    """A message as it was drawn."""
    made: Any = KINDS["Tree"]()
    if plan:
        has_one, many, named, children = plan
        if has_one:
            made.secret.CopyFrom(secret())
        made.secrets.extend([secret()] * many)
        for number in range(named):
            made.named[f"{CANARY}{number}"].CopyFrom(secret())
        made.trees.extend(map(tree, children))
    return made


@given(TREES)
def test_redacted_field_never_shows_wherever_it_is(plan: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONGEST", 1 << 30)
        patch.setattr(module, "MOST_ELEMENTS", 1 << 30)
        said = safe_repr(tree(plan))
    assert CANARY not in said
    assert str(NUMBER) not in said
    assert str(len(CANARY)) not in said, "nor how long it is"


def test_redacted_field_is_told_to_be_there() -> None:
    said = safe_repr(secret())
    assert said.count("=<redacted>") == said.count("=") == len(KINDS["Secret"].DESCRIPTOR.fields)


def ours() -> Iterator[Descriptor]:
    """Every message of our protos."""
    for path in sorted((ROOT / "tessera").rglob("*_pb2.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield from importlib.import_module(name).DESCRIPTOR.message_types_by_name.values()


def filled(descriptor: Descriptor, levels: int = 4) -> Message:
    """A message with a canary wherever a text or bytes may stand."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        _fill(message, field, levels)
    return message


def _fill(message: Message, field: FieldDescriptor, levels: int) -> None:
    content: Any = {field.TYPE_STRING: CANARY, field.TYPE_BYTES: CANARY.encode()}.get(field.type)
    place: Any = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        if field.message_type.fields_by_name["value"].message_type is None:
            message.MergeFromString(_entry(field))
        else:
            place[CANARY].SetInParent()
    elif field.message_type is not None:
        if levels:
            inner = filled(field.message_type, levels - 1)
            place.append(inner) if field.is_repeated else place.CopyFrom(inner)
    elif content is not None:
        place.append(content) if field.is_repeated else setattr(message, field.name, content)


def _entry(field: FieldDescriptor) -> bytes:
    """A map with one entry, as it is on the wire."""
    assert field.message_type is not None
    entry = GetMessageClass(field.message_type)()
    for each in field.message_type.fields:
        _fill(entry, each, 0)
    raw = entry.SerializeToString()
    return bytes([field.number << 3 | 2, len(raw)]) + raw


def test_nothing_that_somebody_sent_is_told_of_any_message_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 1 << 30)
    told = [message for message in map(filled, ours()) if CANARY.encode() in message.SerializeToString()]
    assert len(told) > 100
    assert [message.DESCRIPTOR.full_name for message in told if CANARY in safe_repr(message)] == []


def test_shape_tells_names_lengths_numbers_and_choices() -> None:
    put = secrets_pb2.PutSecretRequest(scope="shop", key="db", string_value="hunter2")
    assert safe_repr(put) == "PutSecretRequest(scope=<4 characters>, key=<2 characters>, string_value=<redacted>)"
    acl = secrets_pb2.PutAclRequest(principal="ada", permission=secrets_pb2.READ)
    assert safe_repr(acl) == "PutAclRequest(principal=<3 characters>, permission=READ)"
    query = serving_pb2.QueryRequest(body=httpbody_pb2.HttpBody(data=b"{}"))
    assert "<HttpBody of 4 bytes>" in safe_repr(query)
    assert safe_repr(struct_pb2.Struct(fields={"pin": struct_pb2.Value(number_value=1)})) == "<Struct of 18 bytes>"
    assert safe_repr(KINDS["Plain"](number=3)) == "Plain(number=3)"
    assert safe_repr(KINDS["Plain"]()) == "Plain()"


def test_long_message_is_cut_off_and_not_looked_through() -> None:
    many = KINDS["Tree"](trees=[KINDS["Tree"]()] * 50_000)
    assert safe_repr(many) == "Tree(trees=<50000>[Tree(), Tree(), Tree(), ...])"
    deep = KINDS["Tree"]()
    for _ in range(90):
        deep = KINDS["Tree"](trees=[deep] * 2) if deep.ByteSize() < 10_000 else KINDS["Tree"](trees=[deep])
    said = safe_repr(deep)
    assert len(said) == LONGEST + 3
    assert said.endswith("...")
