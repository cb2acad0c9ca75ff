"""What a message is made of, without what it says: the one thing that prints messages.

The rule: what stands there is ours, and never what somebody sent. So fields have their names, numbers and choices are
told, texts and bytes by their lengths, lists and maps by how many they are; of a field with `debug_redact` one learns
that it is there. (Protobuf for Python prints such a field like any other.) Whoever needs the names that a request was
about finds them in the audit log.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

LONGEST = 1_000
"""Characters; what is beyond is not even looked at."""

MOST_ELEMENTS = 3
"""Of a list."""

REDACTED = "<redacted>"


def safe_repr(message: Message) -> str:
    """The message's shape, cut off after `LONGEST` characters."""
    said = ""
    for piece in _message(message):
        said += piece
        if len(said) > LONGEST:
            return f"{said[:LONGEST]}..."
    return said


def _message(message: Message) -> Iterator[str]:
    name = message.DESCRIPTOR.full_name
    if name.startswith("google."):  # any JSON, any bytes: made of what somebody chose
        yield f"<{message.DESCRIPTOR.name} of {message.ByteSize()} bytes>"
        return
    yield f"{message.DESCRIPTOR.name}("
    for number, (field, content) in enumerate(message.ListFields()):
        yield f"{', ' if number else ''}{field.name}="
        yield from _field(field, content)
    yield ")"


def _field(field: FieldDescriptor, content: Any) -> Iterator[str]:
    if field.GetOptions().debug_redact:
        yield REDACTED
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        yield f"<{len(content)} entries>"
    elif field.is_repeated:
        yield f"<{len(content)}>["
        for number, element in enumerate(islice(content, MOST_ELEMENTS)):
            yield ", " if number else ""
            yield from _one(field, element)
        yield ", ...]" if len(content) > MOST_ELEMENTS else "]"
    else:
        yield from _one(field, content)


def _one(field: FieldDescriptor, content: Any) -> Iterator[str]:
    match content:
        case Message():
            yield from _message(content)
        case str():
            yield f"<{len(content)} characters>"
        case bytes():
            yield f"<{len(content)} bytes>"
        case _ if field.enum_type is not None:
            value = field.enum_type.values_by_number.get(content)
            yield str(content) if value is None else value.name
        case _:
            yield repr(content)
