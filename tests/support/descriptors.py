"""Protos made in Python, for tests that need a message or a rule which our own protos do not have (or must not have).

Each `ProtoFile` is its own package in the default pool, where the options and google.protobuf.Struct live too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FileDescriptor, ServiceDescriptor

from tessera.options.v1 import options_pb2

_numbers = itertools.count(1)
_DEPENDENCIES = (
    "google/api/annotations.proto",
    "google/api/httpbody.proto",
    "google/protobuf/struct.proto",
    "google/protobuf/timestamp.proto",
    "tessera/options/v1/options.proto",
)
_SCALARS = {
    name.removeprefix("TYPE_").lower(): number for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}


class ProtoFile:
    """A .proto under construction; types are named without their package."""

    def __init__(self) -> None:
        from google.api import httpbody_pb2  # noqa: F401 (these files must be in the pool)
        from google.protobuf import struct_pb2, timestamp_pb2  # noqa: F401

        number = next(_numbers)
        self.package = f"tessera.testing.v{number}"
        self._file = descriptor_pb2.FileDescriptorProto(
            name=f"tessera/testing/v{number}.proto", package=self.package, syntax="proto3", dependency=_DEPENDENCIES
        )

    def enum(self, name: str, *values: str) -> None:
        """Adds an enum whose values count from 0."""
        enum = self._file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)

    def message(self, name: str, *fields: str, **options: dict[str, Any]) -> None:
        """Adds a message of fields like "string name", "optional int64 n", "map<string,Item> items".

        "choice: string text" puts a field into the oneof `choice`. `options` holds the options of a field by its name:
        alias, always_emit, debug_redact, json_name.
        """
        message = self._file.message_type.add(name=name)
        optional = []
        for number, line in enumerate(fields, 1):
            oneof, _, declaration = line.rpartition(": ")
            *label, kind, field_name = declaration.split()
            field = message.field.add(
                name=field_name, number=number, label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
            )
            if label == ["repeated"]:
                field.label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
            if label == ["optional"]:
                optional.append(field)
            if oneof:
                if oneof not in [known.name for known in message.oneof_decl]:
                    message.oneof_decl.add(name=oneof)
                field.oneof_index = [known.name for known in message.oneof_decl].index(oneof)
            if kind.startswith("map<"):
                kind = self._map_entry(message, field_name, kind)
                field.label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
            self._set_type(field, kind)
            for option, value in options.get(field_name, {}).items():
                if option == "json_name":
                    field.json_name = value
                elif option == "debug_redact":
                    field.options.debug_redact = value
                elif option == "alias":
                    field.options.Extensions[options_pb2.alias].extend(value)
                else:
                    field.options.Extensions[options_pb2.always_emit] = value
        for field in optional:  # their oneofs of one come last, as protoc has them
            field.proto3_optional = True
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field.name}")

    def rpc(
        self,
        service: str,
        name: str,
        request: str,
        response: str,
        *,
        http: Sequence[dict[str, str]] = (),
        grpc_only: bool = False,
        internal_to: Sequence[str] = (),
        streaming: bool = False,
        answers_with: str = "",
        error_shape: options_pb2.ErrorShape.ValueType = options_pb2.ERROR_SHAPE_UNSPECIFIED,
    ) -> None:
        """Adds an RPC, and its service if need be. `http` holds the rule, then the additional bindings."""
        services = {known.name: known for known in self._file.service}
        target = services.get(service) or self._file.service.add(name=service)
        if error_shape:
            target.options.Extensions[options_pb2.error_shape] = error_shape
        method = target.method.add(
            name=name, input_type=self._full(request), output_type=self._full(response), server_streaming=streaming
        )
        for number, rule in enumerate(http):
            made = http_pb2.HttpRule(**rule)
            if number == 0:
                method.options.Extensions[annotations_pb2.http].CopyFrom(made)
            else:
                method.options.Extensions[annotations_pb2.http].additional_bindings.append(made)
        if grpc_only:
            method.options.Extensions[options_pb2.grpc_only] = True
        method.options.Extensions[options_pb2.internal_to].extend(internal_to)
        if answers_with:
            method.options.Extensions[options_pb2.answers_with] = answers_with

    def build(self) -> FileDescriptor:
        """The file in the default pool; to be called once."""
        pool = descriptor_pool.Default()
        pool.AddSerializedFile(self._file.SerializeToString())
        return pool.FindFileByName(self._file.name)

    def _full(self, name: str) -> str:
        return f".{name}" if name.startswith("google.") else f".{self.package}.{name}"

    def _map_entry(self, message: descriptor_pb2.DescriptorProto, field_name: str, kind: str) -> str:
        key, value = kind.removeprefix("map<").removesuffix(">").split(",")
        # protoc derives the entry's name from the field's.
        entry = message.nested_type.add(name="".join(part.title() for part in field_name.split("_")) + "Entry")
        entry.options.map_entry = True
        for number, (name, type_name) in enumerate((("key", key), ("value", value)), 1):
            field = entry.field.add(name=name, number=number, label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL)
            self._set_type(field, type_name)
        return f"{message.name}.{entry.name}"

    def _set_type(self, field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
        if kind in _SCALARS:
            field.type = _SCALARS[kind]
            return
        field.type_name = self._full(kind)
        enums = {enum.name for enum in self._file.enum_type}
        field.type = _SCALARS["enum" if kind in enums else "message"]


@cache
def library() -> FileDescriptor:
    """A file with a message for each thing that the JSON dialect knows, and two services around it."""
    file = ProtoFile()
    file.enum("Color", "COLOR_UNSPECIFIED", "RED", "DARK_GREEN")
    file.message("Item", "string title", "int64 count")
    file.message(
        "Everything",
        "string name",
        "int64 big",
        "int32 small",
        "uint32 natural",
        "uint64 huge",
        "double ratio",
        "float single",
        "bool flag",
        "bytes blob",
        "Color color",
        "optional string note",
        "optional bool choice_made",
        "repeated string words",
        "repeated int64 counts",
        "repeated Color colors",
        "map<string,string> variables",
        "map<string,Item> items",
        "map<int64,bool> marks",
        "Item item",
        "repeated Item entities",
        "payload: string text_value",
        "payload: bytes bytes_value",
        "google.protobuf.Struct free",
        "google.protobuf.Value any",
        "google.protobuf.ListValue list",
        "Everything child",
        "string version",
        entities={"alias": ["old_entities"]},
        version={"alias": ["model_version", "release"]},
    )
    # Declared out of the order of their numbers' names on purpose: the order of the output is the declared one.
    file.message(
        "Shown",
        "bool zero",
        "repeated string apples",
        "Color mood",
        "int64 count",
        "map<string,string> labels",
        "string hidden",
        zero={"always_emit": True},
        apples={"always_emit": True},
        count={"always_emit": True},
        labels={"always_emit": True},
    )
    file.message(
        "Person",
        "string user_name",
        "string ref",
        "string home_town",
        "repeated Person friends",
        user_name={"json_name": "userName"},
        ref={"json_name": "$ref"},
    )
    file.message("Nothing")
    file.rpc("Library", "Create", "Everything", "Everything", http=[{"post": "/api/things", "body": "*"}])
    file.rpc("Library", "Get", "Everything", "Everything", http=[{"get": "/api/things/{name}"}])
    file.rpc(
        "Library", "Put", "Everything", "Everything", http=[{"put": "/api/things/{name}/small/{small}", "body": "*"}]
    )
    file.rpc(
        "Library", "PutItem", "Everything", "Everything", http=[{"put": "/api/things/{name}/item", "body": "item"}]
    )
    file.rpc("Library", "Delete", "Everything", "Nothing", http=[{"delete": "/api/things/{name}"}])
    file.rpc(
        "Library",
        "Print",
        "Everything",
        "google.api.HttpBody",
        http=[{"get": "/api/things/{name}/print"}],
        answers_with="text/plain",
    )
    file.rpc("Library", "Watch", "Everything", "Nothing", grpc_only=True)
    file.rpc("Library", "Resolve", "Everything", "Nothing", internal_to=["serving"])
    file.rpc(
        "People",
        "CreatePerson",
        "Person",
        "Person",
        http=[{"post": "/scim/People", "body": "*"}],
        error_shape=options_pb2.ERROR_SHAPE_SCIM,
    )
    file.rpc("People", "GetPerson", "Person", "Person", http=[{"get": "/scim/People/{user_name}"}])
    return file.build()


def message_type(name: str) -> Descriptor:
    """A message of `library()`."""
    return library().message_types_by_name[name]


def service(name: str) -> ServiceDescriptor:
    """A service of `library()`."""
    return library().services_by_name[name]
