"""The REST API as an OpenAPI 3.1 document, made from what the gateway itself works by: bindings, messages and comments.

Routes that are no messages are described by hand in `base.json`, examples stand in `examples.json`. The rule: nothing
here names an operation, so a new RPC is described by being there.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import orjson
from google.protobuf.descriptor import Descriptor

from gateway.http_rules import ALL, Binding
from gateway.json_codec import codec_for
from gateway.openapi.schemas import Schemas
from servicekit.errors import HTTP_STATUS
from tessera.errors.v1 import errors_pb2
from tessera.options.v1 import options_pb2

JSON = "application/json"

# A credential is judged before a service is chosen, and with it the shape of its errors.
_BEFORE_ROUTING = frozenset((401, 403, 500, 503, 504))
_RETRIED = frozenset((429, 503))
_ANSWERED_ONCE = frozenset(("Secrets", "Scim", "Tokens", "ServicePrincipalSecrets", "Permissions", "ServingEndpoints"))
"""The services that make a change once and answer its retries alike."""

_ERRORS = errors_pb2.ErrorReason.DESCRIPTOR

Node = dict[str, Any]


class Document:
    """The document for the routes of `rules` on a gateway whose clients know it as `public_url`."""

    def __init__(self, rules: Iterable[Binding], public_url: str) -> None:
        self._rules = rules
        self._public_url = public_url

    @cached_property
    def text(self) -> bytes:
        """The document as JSON. Made when it is first asked for, so that a gateway starts without it."""
        return orjson.dumps(described(self._rules, self._public_url))


def described(rules: Iterable[Binding], public_url: str) -> Node:
    """The OpenAPI document of these routes and of those in `base.json`."""
    return _Description(rules).document(public_url)


def examples() -> list[Node]:
    """Requests with their answers, in an order in which an admin can send them to a new platform.

    Each holds `operation` (an operation id) and `name` (unique in it); of the request `parameters` and `body`, where
    there are any; of the answer `status`, unless it is 200, and `answer`.
    """
    return list(_data("gateway.openapi", "examples.json"))


class _Description:
    def __init__(self, rules: Iterable[Binding]) -> None:
        self._rules = sorted(rules, key=lambda binding: (binding.template, binding.verb))
        self._comments: Mapping[str, str] = _data("tessera.options", "comments.json")
        self._schemas = Schemas(self._comments)
        self._used: Counter[str] = Counter()
        self._examples: dict[str, list[Node]] = {}
        for example in examples():
            self._examples.setdefault(example["operation"], []).append(example)

    def document(self, public_url: str) -> Node:
        document: Node = _data("gateway.openapi", "base.json")
        document["info"]["version"] = version("tessera")
        document["servers"] = [{"url": public_url}]
        components, paths = document["components"], document["paths"]
        components["responses"] |= self._error_components()
        for by_hand in _operations(paths):
            if by_hand.get("security") != []:
                by_hand["responses"] |= _error_responses("Error")
        for binding in self._rules:
            paths.setdefault(binding.template, {})[binding.verb.lower()] = self._operation(binding)
        for operation in _operations(paths):
            self._exemplify(operation, components)
        services = {binding.service.name: binding.service.full_name for binding in self._rules}
        document["tags"] += [
            {"name": name, "description": self._comments.get(full_name, "")} for name, full_name in services.items()
        ]
        reasons = [name for name, status in HTTP_STATUS.items() if status]
        components["schemas"]["ErrorReason"] = {
            "type": "string",
            "enum": reasons,
            "description": self._schemas.explained("", _ERRORS.full_name, reasons),
        }
        components["schemas"] |= self._schemas.components
        return document

    def _operation(self, binding: Binding) -> Node:
        method = binding.method
        comment = self._comments.get(method.full_name, "")
        name = f"{binding.service.name}.{method.name}"
        self._used[name] += 1
        operation: Node = {
            "operationId": name if self._used[name] == 1 else f"{name}.{self._used[name]}",
            "tags": [binding.service.name],
            "summary": " ".join(comment.split("\n\n")[0].split()).partition(". ")[0].removesuffix("."),
            "description": comment,
        }
        in_path = [segment.variable for segment in binding.segments if segment.variable]
        parameters = [*self._path_parameters(binding, in_path), *self._query_parameters(binding, in_path)]
        if binding.verb != "GET" and binding.service.name in _ANSWERED_ONCE:
            parameters.append(_request_id())
        if parameters:
            operation["parameters"] = parameters
        if body := self._body(binding, in_path):
            operation["requestBody"] = body
        success = {
            "description": "The operation succeeded.",
            "headers": _headers("X-Tessera-Request-Id", "X-Databricks-Org-Id"),
            "content": self._answer(binding),
        }
        is_scim = binding.service.GetOptions().Extensions[options_pb2.error_shape] == options_pb2.ERROR_SHAPE_SCIM
        operation["responses"] = {
            str(binding.success_status): success,
            **_error_responses("ScimError" if is_scim else "Error"),
        }
        return operation

    def _answer(self, binding: Binding) -> Node:
        if not binding.media_type:
            return {JSON: {"schema": self._schemas.reference(binding.method.output_type)}}
        return {binding.media_type: {"schema": {"type": "object" if binding.media_type == JSON else "string"}}}

    def _path_parameters(self, binding: Binding, in_path: list[str]) -> Iterator[Node]:
        for name in in_path:
            schema = self._schemas.field(binding.method.input_type.fields_by_name[name])
            if schema.get("type") == "string":
                schema |= {"minLength": 1, "pattern": "^[^/]+$"}
            yield _parameter(name, "path", True, schema)

    def _query_parameters(self, binding: Binding, in_path: list[str]) -> Iterator[Node]:
        if binding.body != ALL:
            yield from self._flat(binding.method.input_type, "", {*in_path, binding.body}, ())

    def _flat(
        self, descriptor: Descriptor, prefix: str, without: Iterable[str], parents: tuple[Descriptor, ...]
    ) -> Iterator[Node]:
        """The fields of a message as query parameters; a field of a field is spelled `a.b`."""
        around = (*parents, descriptor)
        for name, field in codec_for(descriptor).fields().items():
            inner = field.message_type
            if field.name in without:
                continue
            if inner is None:
                required = self._schemas.is_required(field) and not parents
                yield _parameter(prefix + name, "query", required, self._schemas.field(field))
            elif not field.is_repeated and not inner.full_name.startswith("google.") and inner not in around:
                yield from self._flat(inner, f"{prefix}{name}.", (), around)

    def _body(self, binding: Binding, in_path: list[str]) -> Node | None:
        request = binding.method.input_type
        if not binding.body:
            return None
        if binding.body != ALL:
            schema = self._schemas.field(request.fields_by_name[binding.body])
        else:
            schema = self._schemas.message(request, in_path) if in_path else self._schemas.reference(request)
        return {"content": {JSON: {"schema": schema}}}

    def _exemplify(self, operation: Node, components: Node) -> None:
        for example in self._examples.get(operation["operationId"], ()):
            name = example["name"]
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in example.get("parameters", {}):
                    value = example["parameters"][parameter["name"]]
                    parameter.setdefault("examples", {})[name] = {"value": value}
            holders = [(operation["responses"], str(example.get("status", 200)), example["answer"])]
            if "body" in example:
                holders.append((operation, "requestBody", example["body"]))
            for holder, key, value in holders:
                content = _own(holder, key, components)["content"][JSON]
                content.setdefault("examples", {})[name] = {"value": value}

    def _error_components(self) -> Node:
        """A response for each status that a reason has, in the documented envelope and in SCIM's document."""
        responses: Node = {}
        for status in _statuses():
            reasons = [name for name, of_reason in HTTP_STATUS.items() if of_reason == status]
            text = self._schemas.explained("Usual reasons:", _ERRORS.full_name, reasons)
            envelope, scim = ({"$ref": f"#/components/schemas/{name}"} for name in ("Error", "ScimError"))
            in_scim = {"oneOf": [scim, envelope]} if status in _BEFORE_ROUTING else scim
            for name, schema in (("Error", envelope), ("ScimError", in_scim)):
                retry = ("Retry-After",) if status in _RETRIED else ()
                responses[f"{name}{status}"] = {
                    "description": text,
                    "headers": _headers("X-Tessera-Request-Id", *retry),
                    "content": {JSON: {"schema": schema}},
                }
        return responses


def _operations(paths: Node) -> Iterator[Node]:
    for item in paths.values():
        yield from item.values()


def _own(holder: Node, key: str, components: Node) -> Node:
    """`holder[key]`; what was a reference to a component becomes a copy of it, to be changed alone."""
    if reference := holder[key].get("$ref"):
        kind, name = reference.split("/")[-2:]
        holder[key] = copy.deepcopy(components[kind][name])
    own: Node = holder[key]
    return own


def _parameter(name: str, place: str, required: bool, schema: Node) -> Node:
    description = schema.pop("description", None)
    parameter = {"name": name, "in": place, "required": required, "schema": schema}
    return parameter if description is None else {**parameter, "description": description}


def _request_id() -> Node:
    schema = {
        "type": "string",
        "pattern": "^[A-Za-z0-9._-]{1,64}$",
        "description": "An id of your own for this request. For 24 hours the same request with the same id is a retry:"
        " nothing is changed again, and the answer is the first one. Another request with that id is refused with"
        " `INVALID_PARAMETER_VALUE`.",
    }
    return _parameter("X-Tessera-Request-Id", "header", False, schema)


def _statuses() -> list[int]:
    return sorted({status for status in HTTP_STATUS.values() if status})


def _error_responses(component: str) -> Node:
    return {str(status): {"$ref": f"#/components/responses/{component}{status}"} for status in _statuses()}


def _headers(*names: str) -> Node:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _data(package: str, name: str) -> Any:
    return json.loads((files(package) / name).read_bytes())
