"""Message types as JSON Schemas, in the dialect of the codec; descriptions are the comments of the .proto files.

The rule: a schema shows the one canonical spelling of a message. What the codec takes besides (older names, numbers in
quotes) is said in words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from gateway.json_codec import codec_for
from tessera.options.v1 import options_pb2

Schema = dict[str, Any]

REQUIRED = "Required."
"""How the comment of a field begins that a request cannot do without."""

_FREE_JSON: dict[str, Schema] = {
    "google.protobuf.Struct": {"type": "object"},
    "google.protobuf.ListValue": {"type": "array", "items": {}},
    "google.protobuf.Value": {},
}
_SCALARS: dict[int, Schema] = {
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.CPPTYPE_INT64: {"type": "integer", "format": "int64"},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer", "format": "int64", "minimum": 0},
    FieldDescriptor.CPPTYPE_UINT64: {"type": "integer", "minimum": 0},
    FieldDescriptor.CPPTYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.CPPTYPE_STRING: {"type": "string"},
}


class Schemas:
    """Makes schemas, and collects in `components` every type that one of them refers to, by its name there."""

    def __init__(self, comments: Mapping[str, str]) -> None:
        self._comments = comments
        self.components: dict[str, Schema] = {}

    def reference(self, type_: Descriptor | EnumDescriptor) -> Schema:
        """A reference to a message or enum type, which becomes a component."""
        name = type_.full_name.removeprefix("tessera.")
        if name not in self.components:
            self.components[name] = {}  # a message may contain itself
            self.components[name] = self.message(type_) if isinstance(type_, Descriptor) else self._enum(type_)
        return {"$ref": f"#/components/schemas/{name}"}

    def message(self, descriptor: Descriptor, without: Collection[str] = ()) -> Schema:
        """The schema of a message; the fields named in `without` are given elsewhere, such as in the path."""
        fields = {name: field for name, field in codec_for(descriptor).fields().items() if field.name not in without}
        schema = self._described({"type": "object"}, descriptor.full_name)
        if fields:
            schema["properties"] = {name: self.field(field) for name, field in fields.items()}
        if required := [name for name, field in fields.items() if self.is_required(field)]:
            schema["required"] = required
        if choices := [
            self._described({"not": {"required": list(pair)}}, oneof.full_name)
            for oneof in descriptor.oneofs
            for pair in combinations([name for name, field in fields.items() if field.containing_oneof is oneof], 2)
        ]:
            schema["allOf"] = choices
        return schema

    def field(self, field: FieldDescriptor) -> Schema:
        """The schema of one field: its type, its comment, and its other names."""
        message = field.message_type
        schema: Schema
        if message is not None and message.GetOptions().map_entry:
            schema = {"type": "object", "additionalProperties": self._single(message.fields_by_name["value"])}
        elif field.is_repeated:
            schema = {"type": "array", "items": self._single(field)}
        else:
            schema = self._single(field)
        self._described(schema, field.full_name)
        if aliases := field.GetOptions().Extensions[options_pb2.alias]:
            also = f"Also read as {', '.join(f'`{alias}`' for alias in aliases)}."
            schema["description"] = " ".join(filter(None, (schema.get("description"), also)))
        return schema

    def is_required(self, field: FieldDescriptor) -> bool:
        """Whether the field is always there under this very name; one that has other names may come under those."""
        options = field.GetOptions()
        if options.Extensions[options_pb2.alias]:
            return False
        is_asked_for = self._comments.get(field.full_name, "").startswith(REQUIRED)
        return is_asked_for or bool(options.Extensions[options_pb2.always_emit])

    def _single(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None:
            free = _FREE_JSON.get(field.message_type.full_name)
            return dict(free) if free is not None else self.reference(field.message_type)
        if field.enum_type is not None:
            return self.reference(field.enum_type)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return {"type": "string", "contentEncoding": "base64"}
        return dict(_SCALARS[field.cpp_type])

    def _enum(self, enum: EnumDescriptor) -> Schema:
        values = [value.name for value in enum.values if value.number != 0]  # zero means "not said"
        return {
            "type": "string",
            "enum": values,
            "description": self.explained(self._comments.get(enum.full_name, ""), enum.full_name, values),
        }

    def explained(self, text: str, enum_name: str, values: Collection[str]) -> str:
        """`text` with a list of values of an enum and what each means."""
        lines = [f"- `{value}`: {self._comments.get(f'{enum_name}.{value}', '')}" for value in values]
        return "\n\n".join(filter(None, (text, "\n".join(lines))))

    def _described(self, schema: Schema, full_name: str) -> Schema:
        if comment := self._comments.get(full_name):
            schema["description"] = comment
        return schema
