"""JSON to protobuf messages and back, compiled once per message type from its descriptor.

The dialect is the documented one: names as the .proto spells them (or its explicit `json_name`), int64 as numbers,
lenient input and strict output. The rule: a value that cannot be read is refused with the path of its field and the
kind of thing that was found there, never with the value itself, which may be a secret.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import orjson
from google.protobuf import descriptor_pb2, struct_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tessera.options.v1 import options_pb2

MAX_DEPTH = 32
"""How many objects and lists may stand inside each other in a body, the body itself included."""

MOST_CONTAINERS = 30_000
"""How many objects and lists a body may hold: each is made here, one after the other, while all others wait."""

Read = Callable[[Any], Any]
Write = Callable[[Any], Any]

_EXACT = 2**53  # from here on neighbouring integers share a double, so a float no longer says which one was meant
_MAX_FLOAT = 3.4028234663852886e38
_INTEGER = re.compile(r"-?[0-9]{1,20}")
# From between two tokens to behind the next bracket that opens. It gives nothing back, so it takes linear time.
_TO_CONTAINER = re.compile(rb'(?:[^"\[{]++|"[^"\\]*+(?:\\.[^"\\]*+)*+"?)*+[\[{]', re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]{1,400}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,4})?")


class CodecError(Exception):
    """A body or query that does not fit the message.

    `path` leads to the field ("config.served_entities[0].name", empty for the whole), `problem` says what was expected
    and which kind of value was found. `malformed` is True where the request is no JSON object or contradicts itself.
    """

    def __init__(self, path: str, problem: str, malformed: bool = False) -> None:
        super().__init__(path, problem)
        self.path = path
        self.problem = problem
        self.malformed = malformed

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem

    def under(self, parent: str) -> None:
        """Puts the path below `parent`; called on the way out, so that the good case never builds a path."""
        separator = "." if self.path and not self.path.startswith("[") else ""
        self.path = f"{parent}{separator}{self.path}"


def parse(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`; raises a malformed `CodecError` for anything else and beyond the two bounds above.

    As orjson reads JSON: NaN, infinities, 1e400, lone surrogates, a byte order mark and more than 1024 levels are no
    JSON; integers outside of 64 bits become floats, which the codec refuses for integers and text; of a name that
    occurs twice the last one counts.
    """
    if is_crowded(text):
        raise CodecError("", f"The body has more than {MOST_CONTAINERS} objects and lists.", malformed=True)
    value, place = None, None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
    # Raised outside of the handler: the caught exception holds the whole body and must not travel as a context.
    if place is not None:
        raise CodecError("", f"The body is not valid JSON ({place}).", malformed=True)
    if not isinstance(value, dict):
        raise CodecError("", f"The body must be a JSON object, not {_kind(value)}.", malformed=True)
    # A body with few brackets cannot be deep, and counting bytes is far cheaper than a walk.
    if text.count(b"{") + text.count(b"[") > MAX_DEPTH and _is_deep(value):
        raise CodecError("", f"The body nests deeper than {MAX_DEPTH} levels.", malformed=True)
    return value


def is_crowded(text: bytes) -> bool:
    """Whether JSON holds more objects and lists than a body may; told without reading it."""
    # Counting bytes is far cheaper and mostly enough, but brackets in texts are none.
    if text.count(b"{") + text.count(b"[") <= MOST_CONTAINERS:
        return False
    end = 0
    for _ in range(MOST_CONTAINERS + 1):
        found = _TO_CONTAINER.match(text, end)
        if found is None:
            return False
        end = found.end()
    return True


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Field:
    """What the codec needs to know of one field."""

    descriptor: FieldDescriptor
    json_name: str
    names: frozenset[str]
    has_presence: bool
    always_emit: bool
    takes_null: bool
    oneof: str | None
    read: Read
    write: Write | None
    """None where the value goes out as it is."""


class Codec:
    """Reads and writes one message type. Made by `codec_for`."""

    def __init__(self, descriptor: Descriptor) -> None:
        if descriptor.full_name.startswith("google.") and descriptor.fields:
            raise ValueError(f"{descriptor.full_name} has no spelling in this JSON dialect.")
        self._descriptor = descriptor
        self._message: type[Message] = GetMessageClass(descriptor)
        self._fields: list[_Field] = []
        self._named: dict[str, _Field] = {}

    def compile(self) -> None:
        """Reads the fields; raises ValueError when two of them share a JSON name or a type has no spelling."""
        explicit_names = _explicit_json_names(self._descriptor.file)
        self._fields = [_field(field, explicit_names) for field in self._descriptor.fields]
        for field in self._fields:
            for name in field.names:
                other = self._named.setdefault(name, field)
                if other is not field:
                    raise ValueError(
                        f"{self._descriptor.full_name}: the JSON name {name} stands for both "
                        f"{other.descriptor.name} and {field.descriptor.name}."
                    )

    def fields(self) -> dict[str, FieldDescriptor]:
        """The fields by the names they are written under, as declared."""
        return {field.json_name: field.descriptor for field in self._fields}

    def field(self, name: str) -> FieldDescriptor | None:
        """The field that is read under this JSON name or alias, if there is one."""
        field = self._named.get(name)
        return field.descriptor if field else None

    def decode(self, mapping: Mapping[str, Any]) -> Message:
        """The message that `mapping` spells; unknown names are ignored. Raises `CodecError`."""
        if not isinstance(mapping, Mapping):
            raise CodecError("", f"expected an object, got {_kind(mapping)}")
        values: dict[str, Any] = {}
        chosen: dict[str, str] = {}
        for name, value in mapping.items():
            field = self._named.get(name)
            if field is None or (value is None and not field.takes_null):
                continue
            try:
                read = field.read(value)
            except CodecError as error:
                error.under(name)
                raise
            attribute = field.descriptor.name
            if attribute in values:
                if field.descriptor.is_repeated or values[attribute] != read:
                    given = ", ".join(sorted(field.names & mapping.keys()))
                    raise CodecError("", f"{given} are names of one field; give one of them")
            elif field.oneof is not None and (first := chosen.setdefault(field.oneof, name)) != name:
                raise CodecError("", f"{first} and {name} exclude each other; give one of them", malformed=True)
            values[attribute] = read
        return self._message(**values)

    def encode(self, message: Message) -> dict[str, Any]:
        """The JSON object for `message`: set fields and `always_emit` ones, as declared; keys of maps sorted."""
        out: dict[str, Any] = {}
        for field in self._fields:
            attribute = field.descriptor.name
            if field.has_presence:
                if not field.always_emit and not message.HasField(attribute):
                    continue
                value = getattr(message, attribute)
            else:
                value = getattr(message, attribute)
                if not value and not field.always_emit:
                    continue
            out[field.json_name] = value if field.write is None else field.write(value)
        return out


_codecs: dict[Descriptor, Codec] = {}


def codec_for(descriptor: Descriptor) -> Codec:
    """The codec of a message type, compiled with all types it contains at the first call; raises ValueError."""
    codec = _codecs.get(descriptor)
    if codec is None:
        codec = _codecs[descriptor] = Codec(descriptor)  # before its fields: a message may contain itself
        try:
            codec.compile()
        except ValueError:
            del _codecs[descriptor]
            raise
    return codec


# Fields


def _field(field: FieldDescriptor, explicit_names: Mapping[str, str]) -> _Field:
    options = field.GetOptions()
    json_name = explicit_names.get(field.full_name, field.name)
    oneof = field.containing_oneof
    message = field.message_type
    read: Read
    write: Write | None
    if message is not None and message.GetOptions().map_entry:
        key, value = message.fields_by_name["key"], message.fields_by_name["value"]
        read_value = _read_map_text if value.type == FieldDescriptor.TYPE_STRING else _item_reader(value)
        read = partial(_read_map, _item_reader(key), read_value)
        write = partial(_write_map, _item_writer(value))
    elif field.is_repeated:
        read = partial(_read_list, _item_reader(field))
        write = partial(_write_list, _item_writer(field))
    else:
        read, write = _item_reader(field), _item_writer(field)
    return _Field(
        descriptor=field,
        json_name=json_name,
        names=frozenset({json_name, field.name, *options.Extensions[options_pb2.alias]}),
        has_presence=field.has_presence,
        always_emit=options.Extensions[options_pb2.always_emit],
        takes_null=not field.is_repeated and message is struct_pb2.Value.DESCRIPTOR,
        oneof=oneof.name if oneof is not None and len(oneof.fields) > 1 else None,  # `optional` is a oneof of one
        read=read,
        write=write,
    )


@cache
def _explicit_json_names(file: FileDescriptor) -> dict[str, str]:
    """Full field name to explicit `json_name`; a descriptor alone cannot tell it from a derived one."""
    proto = descriptor_pb2.FileDescriptorProto.FromString(file.serialized_pb)
    names: dict[str, str] = {}
    pending = [(f"{proto.package}.{message.name}".lstrip("."), message) for message in proto.message_type]
    while pending:
        parent, message = pending.pop()
        names |= {f"{parent}.{field.name}": field.json_name for field in message.field if field.HasField("json_name")}
        pending += [(f"{parent}.{nested.name}", nested) for nested in message.nested_type]
    return names


def _item_reader(field: FieldDescriptor) -> Read:
    if field.message_type is not None:
        free = _FREE_JSON.get(field.message_type)
        return free[0] if free else codec_for(field.message_type).decode
    if field.enum_type is not None:
        return _enum_reader(field.enum_type)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _read_bytes
    return _SCALARS[field.cpp_type]


def _item_writer(field: FieldDescriptor) -> Write | None:
    if field.message_type is not None:
        free = _FREE_JSON.get(field.message_type)
        return free[1] if free else codec_for(field.message_type).encode
    if field.enum_type is not None:
        return _enum_writer(field.enum_type)
    return _write_bytes if field.type == FieldDescriptor.TYPE_BYTES else None


# Lists and maps


def _read_list(read: Read, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise CodecError("", f"expected a list, got {_kind(value)}")
    items = []
    for index, item in enumerate(value):
        try:
            items.append(read(item))
        except CodecError as error:
            error.under(f"[{index}]")
            raise
    return items


def _write_list(write: Write | None, values: Any) -> list[Any]:
    return list(values) if write is None else [write(value) for value in values]


def _read_map(read_key: Read, read_value: Read, value: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise CodecError("", f"expected an object, got {_kind(value)}")
    items = {}
    for key, item in value.items():
        try:
            items[read_key(key)] = read_value(item)
        except CodecError as error:
            error.under(_step(key))
            raise
    return items


def _write_map(write: Write | None, values: Any) -> dict[str, Any]:
    return {_key(key): values[key] if write is None else write(values[key]) for key in sorted(values)}


def _key(key: Any) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


def _step(key: str) -> str:
    """A map key as a part of a path: short, on one line, and writable as UTF-8."""
    text = key if len(key) <= 64 else f"{key[:64]}..."
    return f'["{text if text.isprintable() else ascii(text)[1:-1]}"]'


# Scalars


def _kind(value: Any) -> str:
    """What is said of a value in place of the value."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise CodecError("", f"expected true or false, got {_kind(value)}")


def _read_int(low: int, high: int, value: Any) -> int:
    number: int | None = None
    match value:
        case bool():
            pass
        case int():
            number = value
        case float() if abs(value) < _EXACT and value.is_integer():
            number = int(value)
        case str() if _INTEGER.fullmatch(value):
            number = int(value)
    if number is None:
        found = "a fraction or a number beyond 64 bits" if isinstance(value, float) else _kind(value)
        raise CodecError("", f"expected an integer, got {found}")
    if not low <= number <= high:
        raise CodecError("", f"expected an integer from {low} to {high}, got one outside of it")
    return number


def _read_float(limit: float, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise CodecError("", f"expected a number, got {_kind(value)}")
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise CodecError("", "expected a number, got a string that is none")
    if isinstance(value, int) and abs(value) > 2**64:
        value = math.inf
    number = float(value)
    if not abs(number) <= limit:  # NaN compares false
        raise CodecError("", "expected a finite number that fits the field")
    return number


def _read_text(value: Any) -> str:
    match value:
        case str() if value.isascii() or _is_unicode(value):
            return value
        case str():
            raise CodecError("", "expected text, got a string with half a surrogate pair")
        case bool():
            pass
        case int() | float() if abs(value) < 2**64 and (isinstance(value, int) or abs(value) < _EXACT):
            return str(value)
        case int() | float():
            raise CodecError("", "expected text, got a number too large to keep its digits; put it in quotes")
    raise CodecError("", f"expected text, got {_kind(value)}")


def _read_map_text(value: Any) -> str:
    """Values of `map<string, string>` are environment variables and the like, where users write `true` unquoted."""
    return str(value).lower() if isinstance(value, bool) else _read_text(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_bytes(value: Any) -> bytes:
    if not isinstance(value, str):
        raise CodecError("", f"expected text in base64, got {_kind(value)}")
    decoded = None
    with suppress(ValueError):
        decoded = base64.b64decode(value, validate=True)
    if decoded is None:
        raise CodecError("", "expected base64 in the standard alphabet, with padding", malformed=True)
    return decoded


def _write_bytes(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _enum_reader(enum: EnumDescriptor) -> Read:
    # The zero value means "not said"; nobody can say it.
    numbers = {value.name.upper(): value.number for value in enum.values if value.number != 0}
    allowed = ", ".join(value.name for value in enum.values if value.number != 0)

    def read(value: Any) -> int:
        # ASCII only: upper() maps a few other letters onto it.
        number = numbers.get(value.upper()) if isinstance(value, str) and value.isascii() else None
        if number is None:
            found = "another string" if isinstance(value, str) else _kind(value)
            raise CodecError("", f"expected one of {allowed}, got {found}")
        return number

    return read


def _enum_writer(enum: EnumDescriptor) -> Write:
    names = {value.number: value.name for value in reversed(enum.values)}  # the first name of a number counts
    # A number that this gateway does not know comes from a newer peer; clients decode enums as text.
    return lambda number: names.get(number) or str(number)


_SCALARS: dict[int, Read] = {
    FieldDescriptor.CPPTYPE_BOOL: _read_bool,
    FieldDescriptor.CPPTYPE_INT32: partial(_read_int, -(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: partial(_read_int, -(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: partial(_read_int, 0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: partial(_read_int, 0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_FLOAT: partial(_read_float, _MAX_FLOAT),
    FieldDescriptor.CPPTYPE_DOUBLE: partial(_read_float, 1.7976931348623157e308),
    FieldDescriptor.CPPTYPE_STRING: _read_text,
}


# Free JSON: google.protobuf.Struct, Value and ListValue


def _read_any(value: Any) -> struct_pb2.Value:
    match value:
        case None:
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        case bool():
            return struct_pb2.Value(bool_value=value)
        case int() | float():
            return struct_pb2.Value(number_value=_SCALARS[FieldDescriptor.CPPTYPE_DOUBLE](value))
        case str():
            return struct_pb2.Value(string_value=_read_text(value))
        case list():
            return struct_pb2.Value(list_value=_read_any_list(value))
        case _:
            return struct_pb2.Value(struct_value=_read_struct(value))


def _read_any_list(value: Any) -> struct_pb2.ListValue:
    return struct_pb2.ListValue(values=_read_list(_read_any, value))


def _read_struct(value: Any) -> struct_pb2.Struct:
    return struct_pb2.Struct(fields=_read_map(_read_text, _read_any, value))


def _write_any(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind is None or kind == "null_value":
        return None
    if kind == "number_value":
        number = value.number_value
        return int(number) if abs(number) < _EXACT and number.is_integer() else number
    if kind == "list_value":
        return _write_any_list(value.list_value)
    if kind == "struct_value":
        return _write_struct(value.struct_value)
    return getattr(value, kind)


def _write_any_list(value: struct_pb2.ListValue) -> list[Any]:
    return _write_list(_write_any, value.values)


def _write_struct(value: struct_pb2.Struct) -> dict[str, Any]:
    return _write_map(_write_any, value.fields)


_FREE_JSON: dict[Descriptor, tuple[Read, Write]] = {
    struct_pb2.Struct.DESCRIPTOR: (_read_struct, _write_struct),
    struct_pb2.Value.DESCRIPTOR: (_read_any, _write_any),
    struct_pb2.ListValue.DESCRIPTOR: (_read_any_list, _write_any_list),
}
