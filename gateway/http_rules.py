"""Routes of the REST API, read from the `google.api.http` annotations of the services.

The rule: a path means one RPC or none. Everything that could make it ambiguous is refused when the table is built
(duplicates, rules that name no field), or does not match at all (empty and dotted segments, encoded slashes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor

from servicekit.exposure import REST, exposure
from tessera.options.v1 import options_pb2

HTTP_BODY = "google.api.HttpBody"
"""The answer that is no message but bytes of a media type."""

ALL = "*"
"""The body that is the whole message."""

_VARIABLE = re.compile(r"\{([a-z][a-z0-9_]*)\}((?::[A-Za-z]+)?)")
_LITERAL = re.compile(r"[A-Za-z0-9._~:-]+")


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a path: a literal, or a variable (a field's name) with the verb that may follow it (":stop")."""

    literal: str = ""
    variable: str = ""
    verb: str = ""

    @property
    def shape(self) -> tuple[int, str]:
        """What two segments share if they match the same texts; sorts the more specific one first."""
        if not self.variable:
            return 0, self.literal
        return (1, self.verb) if self.verb else (2, "")

    def match(self, text: str) -> str | None:
        """The value of the variable ("" for a literal) if this segment matches, else None."""
        if not self.variable:
            return "" if text == self.literal else None
        if not text.endswith(self.verb):
            return None
        return text.removesuffix(self.verb) or None


@dataclass(frozen=True, slots=True)
class Binding:
    """One way to call an RPC over HTTP."""

    method: MethodDescriptor
    verb: str
    """The HTTP method, in capitals."""
    template: str
    segments: tuple[Segment, ...]
    body: str
    """"*", the name of the field that the body fills, or "" where the query fills the message."""

    @property
    def service(self) -> ServiceDescriptor:
        """The service that the RPC belongs to."""
        return self.method.containing_service

    @property
    def media_type(self) -> str:
        """What an answer is that is passed on as it comes; empty where it is a message, which becomes JSON."""
        media_type: str = self.method.GetOptions().Extensions[options_pb2.answers_with]
        return media_type

    @property
    def is_stream(self) -> bool:
        """Whether the answer comes in pieces, for as long as there are any."""
        return bool(self.method.server_streaming)

    @property
    def success_status(self) -> int:
        """200, but 201 where SCIM creates something (RFC 7644, 3.3)."""
        is_scim = self.service.GetOptions().Extensions[options_pb2.error_shape] == options_pb2.ERROR_SHAPE_SCIM
        return 201 if is_scim and self.verb == "POST" else 200


class RouteTable:
    """Finds the binding of a request. Raises ValueError when two bindings match the same requests."""

    def __init__(self, bindings: Sequence[Binding]) -> None:
        taken: dict[tuple[object, ...], Binding] = {}
        self._routes: dict[tuple[str, int], list[Binding]] = {}
        for binding in sorted(bindings, key=_specificity):
            other = taken.setdefault((binding.verb, _specificity(binding)), binding)
            if other is not binding:
                raise ValueError(
                    f"{other.method.full_name} and {binding.method.full_name} both claim "
                    f"{binding.verb} {binding.template}."
                )
            self._routes.setdefault((binding.verb, len(binding.segments)), []).append(binding)

    def __iter__(self) -> Iterator[Binding]:
        """All bindings, the more specific ones of one verb and length first."""
        for bindings in self._routes.values():
            yield from bindings

    def match(self, method: str, path: str) -> tuple[Binding, dict[str, str]] | None:
        """The binding of a request and the values of its path variables, or None if there is no such route.

        `path` is the raw path, still percent-encoded, without the query. One trailing slash is tolerated: a widely used
        client sends it. Literals win over variables.
        """
        texts = _segments(path)
        if texts is None:
            return None
        for binding in self._routes.get((method, len(texts)), ()):
            params: dict[str, str] = {}
            for segment, text in zip(binding.segments, texts, strict=True):
                value = segment.match(text)
                if value is None:
                    break
                if segment.variable:
                    params[segment.variable] = value
            else:
                return binding, params
        return None


def bindings(services: Sequence[ServiceDescriptor]) -> RouteTable:
    """The table of all REST bindings of these services.

    Raises ValueError, naming the RPC, when an RPC does not say who may reach it, or its rule is a duplicate, names a
    field that does not exist, or uses what this gateway does not do (streams, wildcards, nested path fields).
    """
    found: list[Binding] = []
    for service in services:
        for method in service.methods:
            if exposure(method) == REST:
                rule = method.GetOptions().Extensions[annotations_pb2.http]
                found += [_binding(method, one) for one in (rule, *rule.additional_bindings)]
    return RouteTable(found)


def _specificity(binding: Binding) -> tuple[tuple[int, str], ...]:
    return tuple(segment.shape for segment in binding.segments)


def _segments(path: str) -> list[str] | None:
    """The decoded segments, or None if the path has no canonical form.

    Decoding comes after splitting, so an encoded slash cannot make a segment; inside of one it could only confuse those
    who build paths of the value later.
    """
    if not path.startswith("/") or not path.isascii():
        return None
    texts = []
    for raw in path.removesuffix("/")[1:].split("/"):
        try:
            text = unquote(raw, errors="strict")
        except UnicodeDecodeError:
            return None
        if text in ("", ".", "..") or "/" in text:
            return None
        texts.append(text)
    return texts


def _binding(method: MethodDescriptor, rule: http_pb2.HttpRule) -> Binding:
    where = f"RPC {method.full_name}"
    verb = rule.WhichOneof("pattern")
    if verb is None or verb == "custom" or rule.response_body:
        raise ValueError(f"{where}: a rule needs one of get, put, post, delete and patch, and no response_body.")
    if method.client_streaming or (method.server_streaming and method.output_type.full_name != HTTP_BODY):
        raise ValueError(f"{where}: of streams only answers that are pieces of {HTTP_BODY} have a REST form here.")
    media_type = method.GetOptions().Extensions[options_pb2.answers_with]
    if bool(media_type) != (method.output_type.full_name == HTTP_BODY):
        raise ValueError(f"{where}: {HTTP_BODY} and the option answers_with belong together.")
    template = getattr(rule, verb)
    segments = tuple(_segment(text, f"{where}: {template}") for text in _parts(template, where))
    fields = method.input_type.fields_by_name
    variables = [segment.variable for segment in segments if segment.variable]
    for variable in variables:
        field = fields.get(variable)
        if field is None or field.is_repeated or field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            raise ValueError(f"{where}: {template} names {variable}, which is no single value of the request.")
    if rule.body and rule.body != ALL:
        field = fields.get(rule.body)
        if field is None or field.is_repeated or field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
            raise ValueError(f"{where}: the body {rule.body} is no message field of the request.")
    if len({*variables, rule.body}) <= len(variables):
        raise ValueError(f"{where}: {template} fills one field twice.")
    return Binding(method, verb.upper(), template, segments, rule.body)


def _parts(template: str, where: str) -> list[str]:
    if not template.startswith("/") or template.endswith("/"):
        raise ValueError(f"{where}: the path {template!r} must begin with a slash and not end with one.")
    return template[1:].split("/")


def _segment(text: str, where: str) -> Segment:
    if variable := _VARIABLE.fullmatch(text):
        return Segment(variable=variable[1], verb=variable[2])
    if _LITERAL.fullmatch(text) and text not in (".", ".."):
        return Segment(literal=text)
    raise ValueError(f"{where}: the segment {text!r} is neither a literal nor a {{field}}.")
